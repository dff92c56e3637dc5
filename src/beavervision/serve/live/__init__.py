"""Live sessions over the network: WebRTC, fragmented MP4 over WebSocket, HLS and RTMP push. Needs the extra ``live``."""

from beavervision.serve.live.rooms import Rooms
from beavervision.serve.live.routes import SESSIONS, add_live

__all__ = ["SESSIONS", "Rooms", "add_live"]
