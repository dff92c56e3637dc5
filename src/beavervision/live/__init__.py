"""Live sessions: a face that speaks in real time. :class:`LiveEngine` opens them, :class:`LiveSession` is one."""

from beavervision.live.avatar import Avatar
from beavervision.live.clock import Clock, ManualClock, SystemClock
from beavervision.live.engine import Capacity, LiveEngine
from beavervision.live.footage import Camera
from beavervision.live.session import Event, LiveSession, Moment, SoundStream

__all__ = [
    "Avatar",
    "Camera",
    "Capacity",
    "Clock",
    "Event",
    "LiveEngine",
    "LiveSession",
    "ManualClock",
    "Moment",
    "SoundStream",
    "SystemClock",
]
