"""One live session with everybody who watches it, speaks through it or sends it a camera."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, cast

import av
import numpy as np
from av.video.reformatter import ColorRange

from beavervision import metrics
from beavervision.errors import BeaverVisionError, UsageError
from beavervision.live import Event, LiveSession, Moment
from beavervision.media import Color, Matrix, Picture
from beavervision.serve.live.encoder import Coded, Encoder, Kind, recolored
from beavervision.serve.live.fanout import Ended, Fanout
from beavervision.serve.live.hls import Hls
from beavervision.serve.live.push import Push
from beavervision.serve.live.webrtc import Network, Peer, take, watch
from beavervision.serve.problems import Problem
from beavervision.stages.decode import MATRICES

_KEY_S = 0.2  # at least between two key pictures that viewers asked for
_HLS_IDLE_S = 20.0  # after the last request for a playlist or segment
_MEASURED = 3000  # pictures: two minutes
_PEERS, _PUSHES = 32, 4
_EVENTS = 64
_CAMERA = Color()  # of a camera's pictures, whatever it sends
_LOG = logging.getLogger("beavervision.serve")


@dataclass(frozen=True, slots=True)
class Terms:
    """What a session was opened with."""

    owner: str
    avatar: str | None
    camera: bool
    model: str
    voice: str | None


class Events:
    """Events that one listener has still to get; of one who does not listen the oldest are forgotten."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue(_EVENTS)

    def put(self, event: dict[str, Any] | None) -> None:
        if self._waiting.full():
            self._waiting.get_nowait()
        self._waiting.put_nowait(event)

    async def get(self) -> dict[str, Any]:
        """Raises Ended."""
        event = await self._waiting.get()
        if event is None:
            raise Ended
        return event


class Room:
    """Runs from :meth:`start` until its session ends or :meth:`close`. All on the event loop's thread."""

    def __init__(self, session: LiveSession, terms: Terms, network: Network, on_closed: Callable[[Room], None]) -> None:
        self.id = session.id
        self.session, self.terms = session, terms
        self.created_s = time.time()
        self.fanout = Fanout(self._ask_for_key)
        self.peers: dict[str, Peer] = {}
        self.pushes: dict[str, Push] = {}
        self.network = network
        self.over = asyncio.Event()
        self.sockets = 0  # WebSockets open now
        self.codec = ""
        self._on_closed = on_closed
        self._hls: Hls | None = None
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, f"encode-{self.id[:6]}")
        self._encoder: Encoder | None = None
        self._key_wanted, self._key_s = False, 0.0
        self._watched = asyncio.Event()
        self._used_s = self._loop.time()
        self._late_ms: deque[float] = deque(maxlen=_MEASURED)  # from a picture's time to its packet
        self._coded = 0
        self._heard: set[Events] = set()
        session.on_event(self._event)
        self._task: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.ensure_future(self._run())

    @contextmanager
    def events(self) -> Iterator[Events]:
        """What becomes of utterances, from now on."""
        events = Events()
        self._heard.add(events)
        if self.over.is_set():
            events.put(None)
        try:
            yield events
        finally:
            self._heard.discard(events)

    def _event(self, event: Event) -> None:
        """From the session's threads."""
        with suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._tell, asdict(event))

    def _tell(self, event: dict[str, Any] | None) -> None:
        for events in self._heard:
            events.put(event)

    # The stream ----------------------------------------------------------------------------------

    async def _run(self) -> None:
        """While nobody watches no moments are taken, and the session's time stands still."""
        try:
            while not self.session.closed:
                await self._watched.wait()
                async with aclosing(cast(Any, self.session.frames())) as moments:
                    async for moment in moments:
                        if not len(self.fanout):
                            self._watched.clear()
                            break
                        self.fanout.publish(await self._packets(moment))
        except BeaverVisionError as error:
            _LOG.error("session %s ends: %s", self.id, error)
        finally:
            self._closing = self._closing or asyncio.ensure_future(self._close())

    async def _packets(self, moment: Moment) -> list[Coded]:
        now_s = self._loop.time()
        key = self._key_wanted and now_s - self._key_s >= _KEY_S
        if key:
            self._key_wanted, self._key_s = False, now_s
        aac = self.fanout.wants(Kind.AAC)
        packets = await self._loop.run_in_executor(self._thread, self._encode, moment, now_s, key, aac)
        late_s = self._loop.time() - moment.due_s
        self._late_ms.append(late_s * 1e3)
        self._coded += 1
        metrics.LIVE_ENCODED_SECONDS.observe(late_s)
        return packets

    def _encode(self, moment: Moment, now_s: float, key: bool, aac: bool) -> list[Coded]:
        picture = moment.picture
        if self._encoder is None:
            self._encoder = Encoder(picture.width_px, picture.height_px, self.session.rate, picture.color)
            self.codec = self._encoder.codec
        packets = self._encoder.picture(picture, moment.index, now_s, keyframe=key) if moment.fresh or key else []
        return packets + self._encoder.sound(moment.audio.pcm[0], moment.audio.start, now_s, aac=aac)

    def _ask_for_key(self) -> None:
        self._key_wanted = True
        self._watched.set()

    # Viewers -------------------------------------------------------------------------------------

    async def play(self, offer: str, *, loopback: bool) -> tuple[str, str]:
        """A WHEP viewer: the peer's name and the answer. Raises Problem."""
        return await self._join(offer, lambda peer: watch(peer, self.fanout, offer), loopback)

    async def bring(self, offer: str, *, loopback: bool) -> tuple[str, str]:
        """A WHIP source of camera, microphone or both: the peer's name and the answer. Raises Problem."""
        return await self._join(offer, lambda peer: take(peer, self._camera, self.session.stream), loopback)

    async def _join(self, offer: str, prepare: Callable[[Peer], None], loopback: bool) -> tuple[str, str]:
        if len(self.peers) >= _PEERS:
            raise Problem(
                503, "busy", f"{_PEERS} are connected already. Try again later.", headers={"Retry-After": "10"}
            )
        name = secrets.token_hex(12)
        peer = Peer(self.network, lambda _: self._left(name))
        self.peers[name] = peer
        try:
            prepare(peer)
            return name, await peer.answer(offer, loopback=loopback)
        except BaseException:
            await peer.close()
            raise

    def _left(self, name: str) -> None:
        self.peers.pop(name, None)
        self.used()

    def peer(self, name: str) -> Peer:
        """Raises Problem (404)."""
        if name not in self.peers:
            raise Problem(404, "no_peer", "There is no such connection: it has ended. Make a new offer.")
        return self.peers[name]

    async def _camera(self, frame: av.VideoFrame) -> None:
        if not self.session.has_camera:
            return
        picture = await self._loop.run_in_executor(None, as_picture, frame, self.session.size_px)
        with suppress(UsageError):  # the session was closed meanwhile
            self.session.push_picture(picture)

    async def hls(self, name: str, query: str) -> tuple[bytes, str]:
        """A file of the HLS delivery, which begins with the first that is asked for. Raises Problem."""
        if self._hls is None:
            try:
                self._hls = Hls(self.fanout, self.session.size_px)
            except Ended as error:
                raise ended() from error
        found = await self._hls.file(name, query)
        if found is None:
            raise Problem(
                404, "no_segment", "There is no such playlist or segment, or no longer. Load the playlist again."
            )
        return found

    async def push(self, url: str) -> tuple[str, Push]:
        """Raises Problem."""
        if len(self.pushes) >= _PUSHES:
            raise Problem(422, "pushes", f"A session is pushed to {_PUSHES} places at most. Remove one first.")
        try:
            push = Push(url, self.fanout, self.session.size_px)
        except Ended as error:
            raise ended() from error
        name = secrets.token_hex(8)
        self.pushes[name] = push
        return name, push

    async def unpush(self, name: str) -> None:
        """Raises Problem (404)."""
        push = self.pushes.pop(name, None)
        if push is None:
            raise Problem(404, "no_push", "The session is not pushed there.")
        await push.close()

    # Life ----------------------------------------------------------------------------------------

    def used(self) -> None:
        """Somebody did something with it."""
        self._used_s = self._loop.time()

    async def unused_s(self) -> float:
        """For how long nobody has watched it or sent it anything."""
        now_s = self._loop.time()
        if self._hls is not None and now_s - self._hls.asked_s > _HLS_IDLE_S:
            hls, self._hls = self._hls, None
            await hls.close()
        pushed = any(push.state in ("connecting", "running") for push in self.pushes.values())
        if self.peers or self.sockets or pushed or self._hls is not None:
            self._used_s = now_s
        return now_s - self._used_s

    def facts(self) -> dict[str, Any]:
        """What is measured of its delivery."""
        late = np.percentile(self._late_ms, (50, 95)) if self._late_ms else (None, None)
        return {
            "viewers": {
                "webrtc": sum(peer.state == "connected" for peer in self.peers.values()),
                "websocket": self.sockets,
                "hls": int(self._hls is not None),
                "rtmp": sum(push.state == "running" for push in self.pushes.values()),
            },
            "codec": self.codec or None,
            "pictures_encoded": self._coded,
            "encoded_after_due_p50_ms": None if late[0] is None else round(float(late[0]), 1),
            "encoded_after_due_p95_ms": None if late[1] is None else round(float(late[1]), 1),
        }

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._on_closed(self)
        self.fanout.end()
        self.over.set()
        self._tell(None)
        work: list[Awaitable[Any]] = [peer.close() for peer in tuple(self.peers.values())]
        work += [push.close() for push in self.pushes.values()]
        if self._hls is not None:
            work.append(self._hls.close())
        await asyncio.gather(*work, return_exceptions=True)
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._loop.run_in_executor(None, self.session.close)  # it waits for its threads
        self._thread.shutdown(wait=False)


def ended() -> Problem:
    return Problem(404, "no_session", "The session has ended. Open a new one.")


def as_picture(frame: av.VideoFrame, size_px: tuple[int, int]) -> Picture:
    """A camera's frame at the size of the session's pictures, whose colours are all alike; what is too wide or too high is
    cut off."""
    width, height = size_px
    scale = max(width / frame.width, height / frame.height)
    wide, high = max(round(frame.width * scale / 2) * 2, width), max(round(frame.height * scale / 2) * 2, height)
    full_range = frame.format.name.startswith("yuvj") or frame.color_range == ColorRange.JPEG
    color = Color(MATRICES.get(frame.colorspace, Matrix.BT601), full_range)  # cameras that tell none mean BT.601
    frame = recolored(frame, color, _CAMERA, wide, high)
    x, y = (wide - width) // 4 * 2, (high - height) // 4 * 2
    planes = []
    for plane, part in zip(frame.planes, (1, 2, 2), strict=True):
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        planes.append(rows[y // part : (y + height) // part, x // part : (x + width) // part].copy())
    return Picture(planes[0], planes[1], planes[2], _CAMERA)
