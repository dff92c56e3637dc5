"""What live sessions share: the networks, the voices, and how many sessions this machine can carry."""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from importlib.resources import as_file, files

from beavervision import metrics
from beavervision.engine.host import cores
from beavervision.errors import BusyError, UsageError
from beavervision.live.avatar import Avatar
from beavervision.live.clock import Clock, ManualClock, SystemClock
from beavervision.live.footage import Camera
from beavervision.live.session import LiveSession
from beavervision.pipeline import Pipeline

RATES = (5, 60)  # pictures a second, from and to
_SHARE = 0.65  # of the machine that may be promised
_PICTURE_PX = 512 * 512  # what capacity is counted in
_GUESS_MS = 14.0  # of drawing a picture, until one was drawn
_TRACK_MS = 12.0  # of finding the face in a camera's picture
_PACE = 0.02  # at which a measured cost counts
_REHEARSAL = 60  # pictures
_REAP_S = 5.0


@dataclass(frozen=True, slots=True)
class Capacity:
    """What this machine can make, in 512-px pictures a second, and what of it is promised to the open sessions."""

    pictures_per_s: float
    promised_per_s: float
    picture_ms: float  # of CPU, drawing and encoding
    sessions: int

    @property
    def free_per_s(self) -> float:
        return max(self.pictures_per_s - self.promised_per_s, 0.0)


class LiveEngine:
    """Opens sessions and keeps what they share; close it, and it closes them.

    Args:
        pipeline: its networks and voices are shared by all sessions.
        encode_ms: CPU time to reserve for whoever encodes a 512-px picture.
        limit: sessions at once, besides what the machine can carry; None for no other limit.
        abandoned_s: a session that nobody watches and nobody speaks to is closed after so long.
        clock: for tests.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        encode_ms: float = 8.0,
        limit: int | None = None,
        abandoned_s: float = 120.0,
        clock: Clock | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.clock: Clock = clock or SystemClock()
        self._encode_ms = encode_ms
        self._limit = limit
        self._abandoned_s = abandoned_s
        self._lock = threading.Lock()
        self._sessions: dict[str, LiveSession] = {}
        self._draw_ms = _GUESS_MS
        self._speakers = ThreadPoolExecutor(max_workers=max(2, cores() // 2), thread_name_prefix="live-speak")
        self._closed = threading.Event()
        self._reaper: threading.Thread | None = None

    def __enter__(self) -> LiveEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def warm(self, avatar: Avatar | None = None, voice: str | None = None, language: str | None = None) -> Capacity:
        """Speak a sentence unheard, with `avatar` or the sample portrait: loads all that the first text would wait for, and
        measures what a picture costs here.
        """
        if avatar is None:
            with as_file(files("beavervision") / "samples" / "eileen_collins.png") as portrait:
                avatar = Avatar.prepare(portrait, self.pipeline)
        with LiveEngine(self.pipeline, clock=ManualClock()) as engine:
            session = engine.open(avatar, voice=voice, language=language)
            session.say("Ready to speak whenever you are, for as long as you like, about whatever there is to say.")
            for _ in itertools.islice(session.moments(), _REHEARSAL):
                pass
            self._draw_ms = engine._draw_ms
        return self.capacity()

    def open(
        self,
        source: Avatar | Camera,
        *,
        rate: Fraction | int = 25,
        voice: str | None = None,
        language: str | None = None,
        speed: float = 1.0,
        pitch: float = 1.0,
        seed: int = 0,
        expression: str = "",
    ) -> LiveSession:
        """A new session.

        Args:
            source: the face: prepared, or a camera that sends it.
            rate: pictures a second.
            expression: what the face expresses from the beginning on, as :meth:`LiveSession.set_expression`.
            voice, language, speed, pitch, seed: of what it says, as :meth:`beavervision.speech.Speaker.speak`.

        Raises:
            BusyError: this machine carries no further one; the message says what it could.
            UsageError: the rate is out of range, or there is no such voice.
        """
        rate = Fraction(rate)
        if not RATES[0] <= rate <= RATES[1]:
            raise UsageError(f"A live session has {RATES[0]} to {RATES[1]} pictures a second, not {float(rate):g}.")
        if isinstance(source, Avatar) and source.model != self.pipeline.card.name:
            raise UsageError(
                f"The avatar was prepared for the model {source.model}, not {self.pipeline.card.name}. Prepare it again."
            )
        settings = self.pipeline.settings
        chosen = self.pipeline.speaker.voice(*settings.voice_for(voice, language))
        script = self.pipeline.script(expression)
        camera = isinstance(source, Camera)
        width_px, height_px = (source.width_px, source.height_px) if isinstance(source, Camera) else source.size_px
        with self._lock:
            self._admit(float(rate), self._cost_ms(width_px * height_px, camera))
            session = LiveSession(
                self,
                secrets.token_hex(8),
                source,
                rate,
                voice=chosen,
                speed=speed,
                pitch=pitch,
                seed=seed,
                script=script,
            )
            self._sessions[session.id] = session
            if self._reaper is None and not self.clock.inline:
                self._reaper = threading.Thread(target=self._reap, name="live-reaper", daemon=True)
                self._reaper.start()
        metrics.LIVE_SESSIONS.inc()
        return session

    def sessions(self) -> tuple[LiveSession, ...]:
        with self._lock:
            return tuple(self._sessions.values())

    def capacity(self) -> Capacity:
        """What this machine carries, as far as it was measured."""
        with self._lock:
            return self._capacity()

    def close(self) -> None:
        """Close all sessions; returns when no thread is left."""
        self._closed.set()
        for session in self.sessions():
            session.close()
        self._speakers.shutdown(wait=True, cancel_futures=True)
        if self._reaper is not None and self._reaper is not threading.current_thread():
            self._reaper.join()

    # For sessions -------------------------------------------------------------------------------

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Run `job` after those that wait: speech is synthesised for a few sessions at a time, piece by piece."""
        return self._speakers.submit(job)

    def drew(self, cost_s: float) -> None:
        """A picture was drawn at that cost of CPU time."""
        self._draw_ms += _PACE * (cost_s * 1000 - self._draw_ms)

    def forget(self, session: LiveSession) -> None:
        with self._lock:
            if self._sessions.pop(session.id, None) is None:
                return
        metrics.LIVE_SESSIONS.dec()

    # --------------------------------------------------------------------------------------------

    def _cost_ms(self, pixels: int, camera: bool) -> float:
        """Of one picture: drawing costs the same whatever lies around the face."""
        return self._draw_ms + self._encode_ms * pixels / _PICTURE_PX + _TRACK_MS * camera

    def _capacity(self) -> Capacity:
        picture_ms = self._cost_ms(_PICTURE_PX, False)
        promised_ms = sum(
            float(s.rate) * self._cost_ms(s.size_px[0] * s.size_px[1], s.has_camera) for s in self._sessions.values()
        )
        return Capacity(cores() * _SHARE * 1000 / picture_ms, promised_ms / picture_ms, picture_ms, len(self._sessions))

    def _admit(self, rate: float, cost_ms: float) -> None:
        if self._closed.is_set():
            raise UsageError("This engine is closed. Make another.")
        if self._limit is not None and len(self._sessions) >= self._limit:
            raise BusyError(f"{self._limit} live sessions are open, as many as may be. Close one, or try again later.")
        capacity = self._capacity()
        if self._sessions and rate * cost_ms > capacity.free_per_s * capacity.picture_ms:
            possible = int(capacity.free_per_s * capacity.picture_ms / cost_ms)
            hint = f"Ask for {possible} pictures a second, or try" if possible >= RATES[0] else "Try"
            raise BusyError(
                f"This machine is at its limit: of {capacity.pictures_per_s:.0f} pictures a second that it draws and encodes, "
                f"{capacity.promised_per_s:.0f} are promised, and {rate:g} more were asked for. {hint} again later."
            )

    def _reap(self) -> None:
        while not self._closed.wait(_REAP_S):
            self.reap()

    def reap(self) -> int:
        """Close the abandoned sessions; returns how many there were. Done every few seconds by itself."""
        now_s = self.clock.now()
        abandoned = [s for s in self.sessions() if not s.watched and now_s - s.touched_s > self._abandoned_s]
        for session in abandoned:
            session.close()
        return len(abandoned)
