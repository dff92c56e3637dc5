"""The face of a voice agent: its speech in, pictures with exactly the sound of that speech out, and word of where it ends.

Frameworks for agents have their own idea of silence: sound is what the agent says, and between that there are pictures
alone. The adapters to them (:mod:`~beavervision.live.livekit`, :mod:`~beavervision.live.pipecat`) stand on this.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from beavervision.errors import BusyError
from beavervision.live.avatar import Avatar
from beavervision.live.engine import LiveEngine
from beavervision.live.session import Event, LiveSession, Moment
from beavervision.live.sound import RATE_HZ
from beavervision.media import Picture
from beavervision.pipeline import Pipeline

_RETRY_S = 0.1  # after which it is tried again to hand over sound, where enough waits already


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What to show and to play next. `picture` is None where it goes on being shown."""

    picture: Picture | None
    pcm16: bytes  # mono, :data:`RATE_HZ`; empty where nothing is said
    over: bool  # an utterance ends with it


class AgentFace:
    """One agent's session. All but :meth:`open` is for one event loop.

    Args:
        session: is closed with it.
        engine: is closed with it too, if given.
    """

    def __init__(self, session: LiveSession, engine: LiveEngine | None = None) -> None:
        self.session = session
        self._engine = engine
        self._rate_hz = 0  # of the sound that comes now; 0 between utterances
        self._cut = 0  # how often it was interrupted
        self._events: deque[Event] = deque()
        self._saying = False
        self._pending = 0  # utterances that are not over
        self._silent = asyncio.Event()
        self._silent.set()
        session.on_event(self._events.append)

    @classmethod
    async def open(
        cls, face: str | Path | Avatar, engine: LiveEngine | None = None, *, size_px: int = 512, **how: Any
    ) -> AgentFace:
        """Make the session: with `engine`, or one of its own.

        Args:
            face: a picture, a video or an avatar.
            size_px: of a face that is not an avatar yet: the longer side.
            how: as :meth:`LiveEngine.open` takes it.

        Raises:
            BeaverVisionError: the face cannot be used, or this machine carries no further session.
        """

        def opened() -> AgentFace:
            ours = LiveEngine(Pipeline()) if engine is None else None
            used = engine or ours
            assert used is not None
            try:
                avatar = (
                    face if isinstance(face, Avatar) else Avatar.prepare(Path(face), used.pipeline, size_px=size_px)
                )
                if ours is not None:
                    ours.warm(avatar)
                return cls(used.open(avatar, **how), ours)
            except BaseException:
                if ours is not None:
                    ours.close()
                raise

        return await asyncio.to_thread(opened)

    async def push(self, pcm16: bytes, rate_hz: int, channels: int = 1) -> None:
        """The next piece of what is said. It waits while more waits to be heard than is held.

        What is interrupted meanwhile is forgotten.
        """
        if self._rate_hz not in (0, rate_hz):
            self.end()
        if channels > 1:
            pcm16 = np.frombuffer(pcm16, "<i2").reshape(-1, channels).mean(axis=1).astype("<i2").tobytes()
        if not self._rate_hz:
            self._pending += 1
            self._silent.clear()
        self._rate_hz = rate_hz
        cut = self._cut
        while cut == self._cut and not self.session.closed:
            try:
                self.session.push_audio(pcm16, rate_hz)
                return
            except BusyError:
                await asyncio.sleep(_RETRY_S)

    def end(self) -> bool:
        """What is said is complete; whether there was anything."""
        began, self._rate_hz = self._rate_hz > 0, 0
        self.session.end_audio()
        return began

    def interrupt(self) -> None:
        """Fall silent."""
        self._cut += 1
        self._rate_hz = self._pending = 0
        self._silent.set()
        self.session.interrupt()

    async def silent(self) -> None:
        """Return when all that was said has been given out, or somebody fell in, or nobody takes the parts any more."""
        await self._silent.wait()

    async def parts(self) -> AsyncGenerator[Part, None]:
        """What to show and to play, each at its time, until it is closed.

        Whoever plays them keeps a pace of its own: where it is held up, the session's time stands still, for a taker that
        stays behind would never get a picture in time.
        """
        session = self.session
        try:
            while not session.closed:
                async with aclosing(session.frames()) as moments:
                    async for moment in moments:
                        late = session.clock.now() - moment.due_s > float(1 / session.rate)
                        for part in self._parts(moment):
                            yield part
                            if part.over:
                                self._ended()
                        if late:
                            break
        finally:
            self._silent.set()

    def _ended(self) -> None:
        self._pending = max(self._pending - 1, 0)
        if not self._pending:
            self._silent.set()

    def _parts(self, moment: Moment) -> list[Part]:
        """A moment, cut where utterances begin and end in it."""
        pcm, first = moment.audio.pcm[0], moment.audio.start
        parts: list[Part] = []
        at = first  # from which on it is not handed out yet

        def add(until: int, over: bool) -> None:
            said = pcm[at - first : until - first]
            samples = (np.clip(said, -1, 32767 / 32768) * 32768).astype("<i2").tobytes()
            parts.append(Part(None if parts else moment.picture, samples, over))

        while self._events:
            event = self._events.popleft()
            if event.kind == "started":
                at = min(max(event.sample, first), first + len(pcm))
                self._saying = True
            elif event.kind == "finished":
                stop = min(max(event.sample, at), first + len(pcm))
                add(stop if self._saying else at, True)
                at, self._saying = stop, False
            else:
                self._saying = False
        if self._saying:
            add(first + len(pcm), False)
        return parts or [Part(moment.picture, b"", False)]

    async def close(self) -> None:
        """End the session; returns when nothing of it is left."""
        await asyncio.to_thread(self.session.close)
        if self._engine is not None:
            await asyncio.to_thread(self._engine.close)


__all__ = ["RATE_HZ", "AgentFace", "Part"]
