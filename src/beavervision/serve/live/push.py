"""RTMP push: a session to a streaming platform, which fans it out from there."""

from __future__ import annotations

import asyncio
import io
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from fractions import Fraction
from functools import partial
from typing import Literal, TypeVar
from urllib.parse import urlsplit

import av
from av.container import OutputContainer
from av.stream import Stream

from beavervision.serve.live.encoder import AUDIO_HZ, VIDEO_HZ, Coded, Kind
from beavervision.serve.live.fanout import Ended, Fanout
from beavervision.serve.live.fmp4 import avcc, fragment, sound_track, video_track

_CLOSE_S = 3.0

_T = TypeVar("_T")
State = Literal["connecting", "running", "failed", "ended"]


class Push:
    """Goes on until the session ends, the platform hangs up, or :meth:`close`."""

    def __init__(self, url: str, fanout: Fanout, size_px: tuple[int, int]) -> None:
        self.state: State = "connecting"
        self.error = ""
        self.packets = 0
        self._url, self._size_px = url, size_px
        self._view = fanout.view(Kind.VIDEO, Kind.AAC)
        self._worker = _Worker()
        self._task = asyncio.ensure_future(self._run())

    @property
    def shown_url(self) -> str:
        """Where to, without the stream's key, which is a secret."""
        parts = urlsplit(self._url)
        return f"{parts.scheme}://{parts.hostname or ''}{':' + str(parts.port) if parts.port else ''}/..."

    async def close(self) -> None:
        self._view.close()
        await asyncio.wait((self._task,), timeout=_CLOSE_S)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        out: _Out | None = None
        try:
            while True:
                packet = await self._view.get()
                if out is None:
                    if packet.kind is not Kind.VIDEO:
                        continue
                    out = await self._worker.do(partial(_Out, self._url, packet, self._size_px))
                await self._worker.do(partial(out.write, packet))
                self.state = "running"
                self.packets += 1
        except Ended:
            self.state = "ended"
            if out is not None:
                await self._worker.do(out.close)
        except (av.FFmpegError, OSError, ValueError) as error:
            self.state = "failed"
            reason = getattr(error, "strerror", None) or type(error).__name__
            self.error = f"The platform does not take the stream ({reason}). Check its address and the stream's key."
        finally:
            self._view.close()
            self._worker.end()


class _Worker(threading.Thread):
    """A thread that is left behind when it hangs: a platform that takes nothing blocks it, and nothing can stop that."""

    def __init__(self) -> None:
        super().__init__(name="rtmp", daemon=True)
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.start()

    async def do(self, work: Callable[[], _T]) -> _T:
        done: Future[_T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except Exception as error:  # for the one who waits
                done.set_exception(error)

        self._work.put(run)
        return await asyncio.shield(asyncio.wrap_future(done))

    def end(self) -> None:
        self._work.put(None)

    def run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


class _Out:
    """The connection, in a thread of its own."""

    def __init__(self, url: str, first: Coded, size_px: tuple[int, int]) -> None:
        self._start = Fraction(first.pts, VIDEO_HZ)
        self._container: OutputContainer = av.open(url, "w", format="flv")
        self._streams: dict[Kind, tuple[Stream, int]] = {}
        # A stream for packets that somebody else encoded takes its description from another container only.
        for track, hz, begin in (
            (video_track(first.data, *size_px), VIDEO_HZ, fragment(first, 1)),
            (sound_track(), AUDIO_HZ, b""),
        ):
            with av.open(io.BytesIO(track.head + begin)) as described:
                self._streams[track.kind] = (self._container.add_stream_from_template(described.streams[0]), hz)

    def write(self, coded: Coded) -> None:
        stream, hz = self._streams[coded.kind]
        pts = coded.pts - int(self._start * hz)
        if pts < 0:
            return
        packet = av.Packet(avcc(coded.data) if coded.kind is Kind.VIDEO else coded.data)
        packet.stream, packet.time_base = stream, Fraction(1, hz)
        packet.pts = packet.dts = pts
        packet.duration, packet.is_keyframe = coded.duration, coded.keyframe
        self._container.mux_one(packet)

    def close(self) -> None:
        with suppress(av.FFmpegError, OSError, ValueError):
            self._container.close()
