"""How live sessions keep their promises on this machine: delays, barge-in, sessions at once, a long run.

Everything runs in this process: sessions, encoder and, over UDP on loopback, a WebRTC viewer, which takes CPU time of its
own. Times are to the encoded packet, or to the decoded picture and sound at the viewer.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from beavervision.engine.host import Stolen, cores, rss_bytes
from beavervision.errors import BusyError, DeviceError
from beavervision.live import Avatar, LiveEngine, LiveSession, Moment
from beavervision.media import Picture, sample_at
from beavervision.models.face import Crop, FaceNets
from beavervision.models.mesh import opening
from beavervision.pipeline import Pipeline
from beavervision.serve.live.bench_browser import BETWEEN_S, BrowserViewer, browser_viewer
from beavervision.serve.live.encoder import AUDIO_HZ, Coded, Kind
from beavervision.serve.live.fanout import Ended
from beavervision.serve.live.room import Room, Terms, as_picture
from beavervision.serve.live.webrtc import Network
from beavervision.settings import Settings

_TEXT = "Hello there, it is good to see you again today."
_LONG = "Papa moved away, and nobody ever asked him why he did so, since everyone had moved about before. " * 20
_LOUD = 0.01  # root mean square of sound that is heard
_MOVED = 0.03  # change of the gap between the lips, in mouth widths
_PASSED = 10  # loud moments before an interruption, at least
_AFTER = 20  # pictures looked at from the first sound on
_CHUNK_S = 0.02
_PATIENCE_S = 30.0
_PAUSE_S = 0.6  # of silence before the next try
_FLASH_EVERY, _FLASHES = 12, 16  # pictures from one to the next, and how many of them tell the skew
_SETTLED_S = 60.0  # from which memory is counted in a long run

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds: the median, the 95th percentile, the largest, and how many were measured."""

    p50: float
    p95: float
    most: float
    count: int

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        if not seconds:
            return cls(math.nan, math.nan, math.nan, 0)
        ms = np.array(seconds) * 1e3
        p50, p95, most = (round(float(v), 1) for v in (*np.percentile(ms, (50, 95)), ms.max()))
        return cls(p50, p95, most, len(seconds))


@dataclass(frozen=True, slots=True)
class Load:
    """Some sessions that all speak: cpu is in cores, late_ms from a moment's time to its packet."""

    sessions: int
    fps: int
    carried: int  # how many were admitted
    cpu: float
    dropped_percent: float
    late_ms: Spread


@dataclass(frozen=True, slots=True)
class Soak:
    """A long run of one session. The skew is by how much a beep comes later than its flash (median) at `viewer`, which watches
    by WebRTC: a Chromium that stays for the whole run, or "aiortc", which plays both as they come, so that its buffer of
    sound is in it and what the run did is the difference. stolen_percent is how much of the CPU time wanted the host of a
    virtual machine gave to others.
    """

    minutes: float
    pictures: int
    dropped_percent: float
    memory_growth_mb: float
    viewer: str
    skew_start_ms: float
    skew_end_ms: float
    late_ms: Spread
    stolen_percent: float | None


@dataclass(frozen=True, slots=True)
class LiveReport:
    """What was measured. A part that was not asked for is empty or None."""

    cores: int
    size_px: tuple[int, int]
    fps: int
    codec: str
    delay_ms: float
    look_ahead_ms: float
    say_to_packet_ms: Spread
    say_to_viewer_ms: Spread
    say_to_browser_ms: Spread | None
    audio_to_packet_ms: Spread
    silence_ms: Spread
    loads: tuple[Load, ...]
    soak: Soak | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For people."""

        def told(name: str, s: Spread) -> str:
            return f"{name:44} p50 {s.p50:7.1f}   p95 {s.p95:7.1f}   most {s.most:7.1f} ms   of {s.count}"

        width, height = self.size_px
        lines = [
            f"One session of {width}x{height} at {self.fps}/s by {self.codec}, {self.cores} cores. Its constant delay is "
            f"{self.delay_ms:.0f} ms, {self.look_ahead_ms:.0f} of them the model's look-ahead.",
            told("say to moving picture with sound, encoded", self.say_to_packet_ms),
            told("say to moving picture with sound, at a viewer", self.say_to_viewer_ms),
            *([told("the same, in Chromium", self.say_to_browser_ms)] if self.say_to_browser_ms is not None else []),
            told("streamed audio to its picture, encoded", self.audio_to_packet_ms),
            told("interruption to silence and lips at rest", self.silence_ms),
        ]
        if self.loads:
            lines.append("sessions  fps  carried   cores   dropped   late p50   late p95")
        lines += [
            f"{load.sessions:8}  {load.fps:3}  {load.carried:7}  {load.cpu:6.2f}  {load.dropped_percent:6.1f} %  "
            f"{load.late_ms.p50:6.1f} ms  {load.late_ms.p95:6.1f} ms"
            for load in self.loads
        ]
        if (s := self.soak) is not None:
            lines += [
                f"{s.minutes:g} min: {s.pictures} pictures, {s.dropped_percent:.2f} % dropped, late p95 {s.late_ms.p95:.1f},",
                *(
                    [f"    {s.stolen_percent:.1f} % of the CPU time was taken by the machine's host,"]
                    if s.stolen_percent
                    else []
                ),
                f"    memory {s.memory_growth_mb:+.1f} MB, beep after flash in {s.viewer} {s.skew_start_ms:.1f} ms, at the end "
                f"{s.skew_end_ms:.1f} ms",
            ]
        return lines


def measure(
    face: Path,
    settings: Settings,
    *,
    fps: int = 25,
    size_px: int = 512,
    times: int = 20,
    interruptions: int = 50,
    sessions: tuple[tuple[int, int], ...] = (),
    seconds: float = 10.0,
    minutes: float = 0.0,
    browser: bool = False,
    on_progress: Progress = lambda line: None,
) -> LiveReport:
    """Measure live sessions with `face`.

    Args:
        fps, size_px: of the session that delays are measured with.
        times: how often something is said; `interruptions`: how often it is interrupted.
        sessions: pairs of how many sessions at once and their pictures a second, each tried for `seconds`.
        minutes: of a long run; 0 for none.
        browser: whether to time what is said in a Chromium too, and have it watch the long run.

    Raises:
        UsageError: there is no browser to do that with.
        BeaverVisionError: the face or the model cannot be used.
        DeviceError: the machine is too busy to draw anything in time.
    """
    on_progress("loading the networks and looking at the face")
    pipeline = Pipeline(settings=settings)
    with LiveEngine(pipeline, abandoned_s=math.inf) as engine:
        engine.warm()
        avatar = Avatar.prepare(face, pipeline, size_px=size_px, rate=fps)
        bench = _Bench(engine, avatar, fps, on_progress)
        try:
            return asyncio.run(bench.run(times, interruptions, sessions, seconds, minutes, browser))
        except TimeoutError as error:
            raise DeviceError(
                f"No face moved within {_PATIENCE_S:.0f} s: this machine is too busy. Close other programs, or ask for fewer "
                "or smaller pictures."
            ) from error


class _Seen(Room):
    """A room that tells each moment once it is encoded."""

    def __init__(self, session: LiveSession) -> None:
        network = Network((), "", (), "", "", "")
        super().__init__(session, Terms("bench", None, False, "", None), network, lambda room: None)
        self.moments: asyncio.Queue[tuple[Moment, float]] = asyncio.Queue(1000)
        self.late_s: list[float] = []
        self.flashing = False

    async def _packets(self, moment: Moment) -> list[Coded]:
        if self.flashing and moment.index % _FLASH_EVERY == 0:
            moment = _flash(moment)
        packets = await super()._packets(moment)
        now_s = time.monotonic()
        self.late_s.append(now_s - moment.due_s)
        if self.moments.full():
            self.moments.get_nowait()
        self.moments.put_nowait((moment, now_s))
        return packets


def _flash(moment: Moment) -> Moment:
    """The same, white and with a tone."""
    white = np.full_like(moment.picture.y, 235)
    tone = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(moment.audio.pcm.shape[1]) / AUDIO_HZ)
    return replace(
        moment,
        picture=replace(moment.picture, y=white),
        audio=replace(moment.audio, pcm=tone[None].astype(np.float32)),
        fresh=True,
    )


class _Bench:
    def __init__(self, engine: LiveEngine, avatar: Avatar, fps: int, on_progress: Progress) -> None:
        self._engine, self._avatar, self._fps, self._told = engine, avatar, fps, on_progress
        self._lips = _Lips(avatar)

    async def run(
        self,
        times: int,
        interruptions: int,
        sessions: tuple[tuple[int, int], ...],
        seconds: float,
        minutes: float,
        browser: bool,
    ) -> LiveReport:
        async with self._room(self._fps) as room, _viewer(room) as viewer:
            says, arrivals = await self._says(room, viewer, times)
            session, codec = room.session, room.codec
            facts = session.facts()["delay_ms"]
        in_browser = await self._says_in_browser(times) if browser else None
        async with self._room(self._fps) as room, _drained(room):
            pushed = await self._pushes(room)
            cuts = await self._cuts(room, interruptions)
        loads = [await self._load(count, fps, seconds) for count, fps in sessions]
        return LiveReport(
            cores=cores(),
            size_px=session.size_px,
            fps=self._fps,
            codec=codec,
            delay_ms=facts["play_out"],
            look_ahead_ms=facts["look_ahead"],
            say_to_packet_ms=Spread.of(says),
            say_to_viewer_ms=Spread.of(arrivals),
            say_to_browser_ms=in_browser,
            audio_to_packet_ms=Spread.of(pushed),
            silence_ms=Spread.of(cuts),
            loads=tuple(loads),
            soak=await self._soak(minutes, browser) if minutes > 0 else None,
        )

    @asynccontextmanager
    async def _room(self, fps: int) -> AsyncIterator[_Seen]:
        room = _Seen(self._engine.open(self._avatar, rate=Fraction(fps)))
        room.start()
        try:
            yield room
        finally:
            await room.close()

    async def _still(self, room: _Seen) -> Picture:
        """Wait until it has been silent for a moment; gives the picture."""
        quiet = 0
        while True:
            moment, _ = await _in_time(room.moments.get())
            quiet = 0 if moment.speaking or _loud(moment.audio.pcm) else quiet + 1
            if quiet >= _PAUSE_S * self._fps:
                rest: Picture = moment.picture
                return rest

    async def _says(self, room: _Seen, viewer: _Viewer, times: int) -> tuple[list[float], list[float]]:
        """From a text to the first encoded moment, and the first at the viewer, by which it was heard and seen to move."""
        encoded: list[float] = []
        arrived: list[float] = []
        for number in range(times):
            self._told(f"saying something, {number + 1} of {times}")
            rest = await self._lips.gap(await self._still(room))
            viewer.look()
            began_s = time.monotonic()
            await asyncio.to_thread(room.session.say, _TEXT)
            sent = _Noticed()
            async with asyncio.timeout(_PATIENCE_S):
                while not (sent.complete and viewer.noticed.complete):
                    moment, at_s = await room.moments.get()
                    sent.heard(at_s, moment.audio.pcm)
                    sent.saw(at_s, moment.picture)
            for found, into in ((sent, encoded), (viewer.noticed, arrived)):
                at_s = await self._lips.moved_s(found, rest)
                into.append(at_s - began_s)
        return encoded, arrived

    async def _says_in_browser(self, times: int) -> Spread:
        """From a text to the first picture by which a Chromium was heard and seen to speak."""
        taken: list[float] = []
        async with self._room(self._fps) as room, browser_viewer(room) as viewer:
            for number in range(times):
                self._told(f"saying something to a browser, {number + 1} of {times}")
                await self._still(room)
                await viewer.look(_AFTER)
                began_s = time.monotonic()
                await asyncio.to_thread(room.session.say, _TEXT)
                shown = await _in_time(viewer.shown())
                pictures = shown.pictures()
                _, at_rest = await anext(pictures)
                seen_s = await self._lips.first_moved_s(pictures, await self._lips.gap(at_rest))
                taken.append(max(shown.heard_s, seen_s) - began_s)
        return Spread.of(taken)

    async def _pushes(self, room: _Seen) -> list[float]:
        """From the arrival of each piece of streamed sound to the packet of the picture with its last sample."""
        self._told("streaming sound")
        await self._still(room)
        chunks = self._engine.pipeline.speaker.speak(_TEXT * 2)
        parts = [chunk.audio for chunk in chunks]
        rate_hz = parts[0].rate_hz
        # Never exactly silent, so that its first sample is found again.
        pcm = np.concatenate([part.pcm[0] for part in parts])
        pcm = np.where(np.abs(pcm) < 1e-3, 1e-3, pcm)
        size = int(rate_hz * _CHUNK_S)
        whole = [(np.clip(pcm[i : i + size], -1, 1) * 32767).astype("<i2").tobytes() for i in range(0, len(pcm), size)]
        sent_s: list[float] = []

        async def send() -> None:
            began_s = time.monotonic()
            for number, piece in enumerate(whole):
                await asyncio.sleep(max(began_s + number * _CHUNK_S - time.monotonic(), 0))
                sent_s.append(time.monotonic())
                room.session.push_audio(piece, rate_hz)
            room.session.end_audio()

        sending = asyncio.ensure_future(send())
        delays: list[float] = []
        first: int | None = None
        while len(delays) < len(whole) - 1:
            moment, at_s = await _in_time(room.moments.get())
            if first is None:
                sounding = np.flatnonzero(moment.audio.pcm[0])
                if not len(sounding):
                    continue
                first = moment.audio.start + int(sounding[0])
            stop = sample_at(moment.index + 1, room.session.rate, AUDIO_HZ)
            complete = int((stop - first) / (AUDIO_HZ * _CHUNK_S))
            delays += [at_s - sent_s[k] for k in range(len(delays), min(complete, len(whole) - 1))]
        await sending
        return delays

    async def _cuts(self, room: _Seen, times: int) -> list[float]:
        """From an interruption amid speech to the packet from which on sound and lips are at rest."""
        taken = []
        for number in range(times):
            self._told(f"interrupting, {number + 1} of {times}")
            rest = await self._lips.gap(await self._still(room))
            await asyncio.to_thread(room.session.say, _LONG)
            async with asyncio.timeout(_PATIENCE_S):
                loud, open_ = 0, False
                while loud < _PASSED + number % _PASSED or not open_:  # somewhere else each time, with the mouth open
                    moment, _ = await room.moments.get()
                    loud += _loud(moment.audio.pcm)
                    open_ = loud >= _PASSED and await self._lips.gap(moment.picture) > rest + 2 * _MOVED
            while not room.moments.empty():
                room.moments.get_nowait()
            began_s = last_s = time.monotonic()
            await asyncio.to_thread(room.session.interrupt)
            after = [await _in_time(room.moments.get()) for _ in range(self._fps // 2)]
            for moment, at_s in after:
                if _loud(moment.audio.pcm) or await self._lips.gap(moment.picture) > rest + _MOVED:
                    last_s = at_s + 1 / self._fps  # such a moment goes on for its whole length
            taken.append(last_s - began_s)
        return taken

    async def _load(self, count: int, fps: int, seconds: float) -> Load:
        """`count` sessions that speak all the time."""
        self._told(f"{count} sessions at {fps}/s for {seconds:g} s")
        rooms: list[_Seen] = []
        drains: list[asyncio.Task[None]] = []
        try:
            for _ in range(count):
                try:
                    rooms.append(_Seen(self._engine.open(self._avatar, rate=Fraction(fps))))
                except BusyError:
                    break
            for room in rooms:
                room.start()
                drains.append(asyncio.ensure_future(_drain(room)))
                await asyncio.to_thread(room.session.say, _LONG)
            await asyncio.sleep(2.0)  # the first pictures are dear
            before = [room.session.facts()["pictures"] for room in rooms]
            for room in rooms:
                room.late_s.clear()
            cpu_s, began_s = time.process_time(), time.monotonic()
            await asyncio.sleep(seconds)
            cpu = (time.process_time() - cpu_s) / (time.monotonic() - began_s)
            after = [room.session.facts()["pictures"] for room in rooms]
        finally:
            for room in rooms:
                await room.close()
            await asyncio.gather(*drains)
        due = sum(a["due"] - b["due"] for a, b in zip(after, before, strict=True))
        dropped = sum(a["dropped"] - b["dropped"] for a, b in zip(after, before, strict=True))
        late_s = [late for room in rooms for late in room.late_s]
        return Load(count, fps, len(rooms), round(cpu, 2), round(100 * dropped / max(due, 1), 2), Spread.of(late_s))

    async def _soak(self, minutes: float, browser: bool) -> Soak:
        """One session that speaks and is silent in turn."""
        async with self._room(self._fps) as room, AsyncExitStack() as stack:
            seen = await stack.enter_async_context(browser_viewer(room)) if browser else None
            skew_start_s = await self._skew(room, seen)
            async with _drained(room):
                began_s, stolen = time.monotonic(), Stolen()
                memory_mb = 0.0
                while (gone_s := time.monotonic() - began_s) < minutes * 60:
                    if not memory_mb and gone_s > min(_SETTLED_S, minutes * 20):
                        memory_mb = rss_bytes() / 2**20
                        room.late_s.clear()
                    self._told(f"a long run, {gone_s / 60:.1f} of {minutes:g} min")
                    await asyncio.to_thread(room.session.say, _TEXT)
                    await self._still(room)
                pictures = room.session.facts()["pictures"]
                stolen_percent = stolen.percent()
                growth_mb, late_s = rss_bytes() / 2**20 - memory_mb, list(room.late_s)
            return Soak(
                minutes=minutes,
                pictures=pictures["due"],
                dropped_percent=round(100 * pictures["dropped"] / max(pictures["due"], 1), 3),
                memory_growth_mb=round(growth_mb, 1),
                viewer="aiortc" if seen is None else "Chromium",
                skew_start_ms=round(1e3 * skew_start_s, 1),
                skew_end_ms=round(1e3 * await self._skew(room, seen), 1),
                late_ms=Spread.of(late_s),
                stolen_percent=stolen_percent,
            )

    async def _skew(self, room: _Seen, browser: BrowserViewer | None) -> float:
        """By how many seconds a beep is later than its flash at a viewer."""
        self._told("flashing and beeping")
        room.flashing = True
        if browser is not None:
            passing = asyncio.ensure_future(_pass(room))
            try:
                flashes, beeps = await _in_time(browser.marks(_FLASHES))
            finally:
                passing.cancel()
        else:
            async with _viewer(room) as viewer:
                async with asyncio.timeout(_PATIENCE_S):
                    while len(viewer.flashes) < _FLASHES or len(viewer.beeps) < _FLASHES:
                        await room.moments.get()
            flashes, beeps = viewer.flashes, viewer.beeps
        room.flashing = False
        flashes = flashes[_FLASHES // 4 : -1]  # a viewer's buffers fill at first
        return float(np.median([min((beep - at_s for beep in beeps), key=abs) for at_s in flashes]))


class _Viewer:
    """What a WebRTC viewer on loopback sees and hears."""

    def __init__(self) -> None:
        self.pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.tasks: list[asyncio.Task[None]] = []
        self.noticed = _Noticed()
        self.flashes: list[float] = []  # when white pictures came,
        self.beeps: list[float] = []  # and when tones began

    def look(self) -> None:
        """Note what comes from now on."""
        self.noticed = _Noticed()

    async def take(self, track: Any) -> None:
        with suppress(MediaStreamError):
            while True:
                frame = await track.recv()
                now_s = time.monotonic()
                if track.kind == "audio":
                    pcm = frame.to_ndarray()[0] / 32768
                    self.noticed.heard(now_s, pcm)
                    loud = np.flatnonzero(np.abs(pcm) > 0.2)
                    begun_s = now_s + (int(loud[0]) / pcm.size * frame.samples / frame.sample_rate if loud.size else 0)
                    if loud.size and (not self.beeps or begun_s - self.beeps[-1] > BETWEEN_S):
                        self.beeps.append(begun_s)
                    continue
                if _is_white(frame) and (not self.flashes or now_s - self.flashes[-1] > BETWEEN_S):
                    self.flashes.append(now_s)
                if not self.noticed.complete:
                    self.noticed.saw(now_s, as_picture(frame, (frame.width, frame.height)))


def _is_white(frame: av.VideoFrame) -> bool:
    plane = frame.planes[0]
    return float(np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[:, : frame.width].mean()) > 220


class _Noticed:
    """When sound came first, and the pictures until a little later."""

    def __init__(self) -> None:
        self.heard_s: float | None = None
        self.pictures: list[tuple[float, Picture]] = []
        self._after = 0

    @property
    def complete(self) -> bool:
        return self._after >= _AFTER

    def heard(self, at_s: float, pcm: Any) -> None:
        if self.heard_s is None and _loud(pcm):
            self.heard_s = at_s

    def saw(self, at_s: float, picture: Picture) -> None:
        if not self.complete:
            self.pictures.append((at_s, picture))
            self._after += self.heard_s is not None

    async def seen(self) -> AsyncIterator[tuple[float, Picture]]:
        for at_s, picture in self.pictures:
            yield at_s, picture


class _Lips:
    """Looks at the mouth in pictures of an avatar."""

    def __init__(self, avatar: Avatar) -> None:
        self._nets = FaceNets()
        self._crop = Crop.of_points(next(f for f in avatar.track.faces if f is not None).points_px)

    async def gap(self, picture: Picture) -> float:
        """Between the lips, in mouth widths. Found in another thread: the event loop is the session's."""
        points, _ = await asyncio.to_thread(self._nets.mesh, picture, self._crop)
        return opening(points)

    async def moved_s(self, noticed: _Noticed, rest: float) -> float:
        """When it was both heard and seen to speak; the end of what was looked at, if it was not seen to."""
        assert noticed.heard_s is not None
        return max(noticed.heard_s, await self.first_moved_s(noticed.seen(), rest))

    async def first_moved_s(self, pictures: AsyncIterator[tuple[float, Picture]], rest: float) -> float:
        """The time of the first picture with the lips apart otherwise than by `rest`, or of the last."""
        last_s = math.nan
        async for at_s, picture in pictures:
            last_s = at_s
            if abs(await self.gap(picture) - rest) > _MOVED:
                break
        return last_s


@asynccontextmanager
async def _viewer(room: _Seen) -> AsyncIterator[_Viewer]:
    viewer = _Viewer()
    viewer.pc.on("track", lambda track: viewer.tasks.append(asyncio.ensure_future(viewer.take(track))))
    for kind in ("video", "audio"):
        viewer.pc.addTransceiver(kind, "recvonly")
    await viewer.pc.setLocalDescription(await viewer.pc.createOffer())
    _, answer = await room.play(viewer.pc.localDescription.sdp, loopback=True)
    await viewer.pc.setRemoteDescription(RTCSessionDescription(answer, "answer"))
    try:
        yield viewer
    finally:
        await viewer.pc.close()
        await asyncio.gather(*viewer.tasks)


@asynccontextmanager
async def _drained(room: _Seen) -> AsyncIterator[None]:
    """A viewer that costs nothing."""
    task = asyncio.ensure_future(_drain(room))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _pass(room: _Seen) -> None:
    """Let moments go that nobody looks at."""
    while True:
        await room.moments.get()


async def _drain(room: _Seen) -> None:
    with suppress(Ended), room.fanout.view(Kind.VIDEO, Kind.OPUS) as view:
        while True:
            await view.get()


async def _in_time(work: Any) -> Any:
    return await asyncio.wait_for(work, _PATIENCE_S)


def _loud(pcm: Any) -> bool:
    return float(np.sqrt(np.mean(np.square(pcm, dtype=np.float64)))) > _LOUD
