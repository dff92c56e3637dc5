"""A server for tests of live delivery: the real application on a real socket, with sessions that flash and beep."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from beavervision.errors import BusyError
from beavervision.live import Camera, Event, Moment
from beavervision.media import Audio, Picture, sample_at
from beavervision.serve.app import create_app
from beavervision.serve.live.rooms import Rooms
from beavervision.serve.service import Service
from beavervision.settings import Settings
from tests.answers import PATIENCE_S, Answer, multipart, until

FLASH_EVERY = 12  # pictures
SIZE = 96


@dataclass(eq=False)
class HeardStream:
    """What one caller pushed."""

    of: Flashes
    rate_hz: int
    heard: bytearray = field(default_factory=bytearray)
    open: bool = False

    def push(self, pcm16: bytes) -> int:
        self.open = True
        self.heard += pcm16
        return self.of.push_audio(pcm16, self.rate_hz)

    def end(self) -> None:
        if self.open:
            self.of.end_audio()
        self.open = False


@dataclass(eq=False)
class Flashes:
    """A session that turns white and beeps together, every FLASH_EVERY pictures, and remembers what it was told."""

    rate: Fraction = Fraction(25)
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    size_px: tuple[int, int] = (SIZE, SIZE)
    closed: bool = False
    has_camera: bool = False
    delay_s: float = 0.2
    said: list[str] = field(default_factory=list)
    heard: bytearray = field(default_factory=bytearray)
    rates: list[int] = field(default_factory=list)
    ends: int = 0
    interrupts: int = 0
    expressions: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    full: bool = False
    next: int = 0
    face: Any = None
    streams: list[HeardStream] = field(default_factory=list)
    listeners: list[Callable[[Event], None]] = field(default_factory=list)

    def on_event(self, listener: Callable[[Event], None]) -> None:
        self.listeners.append(listener)

    def say(self, text: str, *, interrupt: bool = False) -> int:
        if self.full:
            raise BusyError("Enough waits. Wait for some.")
        self.interrupts += interrupt
        self.said.append(text)
        for listener in self.listeners:
            listener(Event("started", len(self.said)))
        return len(self.said)

    def push_audio(self, pcm16: bytes, rate_hz: int) -> int:
        if self.full:
            raise BusyError("More than enough sound waits. Send less ahead.")
        self.heard += pcm16
        self.rates.append(rate_hz)
        return 1

    def stream(self, rate_hz: int) -> HeardStream:
        self.streams.append(HeardStream(self, rate_hz))
        return self.streams[-1]

    def end_audio(self) -> None:
        self.ends += 1

    def interrupt(self) -> float:
        self.interrupts += 1
        return 0.0

    def set_expression(self, expression: str) -> None:
        self.expressions.append(expression)

    def push_picture(self, picture: Picture) -> None:
        self.pictures.append(picture)

    def facts(self) -> dict[str, Any]:
        return {"state": "idle", "delay_ms": {"play_out": 200.0, "look_ahead": 150.0, "work": 50.0}}

    def close(self) -> None:
        self.closed = True

    async def frames(self) -> AsyncIterator[Moment]:
        loop = asyncio.get_running_loop()
        origin_s = loop.time() - float(self.next / self.rate)
        while not self.closed:
            n = self.next
            due_s = origin_s + float(n / self.rate)
            await asyncio.sleep(max(due_s - loop.time(), 0))
            self.next += 1
            yield moment(n, self.rate, due_s)


def moment(n: int, rate: Fraction, due_s: float = 0.0, size_px: int = SIZE) -> Moment:
    flash = n % FLASH_EVERY == 0
    y = np.full((size_px, size_px), 235 if flash else 16, np.uint8)
    u = np.full((size_px // 2, size_px // 2), 128, np.uint8)
    start, stop = sample_at(n, rate, 48_000), sample_at(n + 1, rate, 48_000)
    tone = np.sin(2 * np.pi * 1000 * np.arange(start, stop) / 48_000) * (0.8 if flash else 0)
    return Moment(
        Picture(y, u, u), Audio(tone[None].astype(np.float32), 48_000, start), n, n / rate, due_s, True, False
    )


class _Engine:
    def __init__(self, limit: int) -> None:
        self.sessions: list[Flashes] = []
        self._limit = limit

    def open(self, source: Any, *, rate: Fraction, **how: Any) -> Flashes:
        if self._limit and sum(not s.closed for s in self.sessions) >= self._limit:
            raise BusyError(f"{self._limit} live sessions are open, as many as may be.")
        session = Flashes(rate, has_camera=isinstance(source, Camera))
        if session.has_camera:
            session.size_px = (source.width_px, source.height_px)
        else:
            session.face = source
        self.sessions.append(session)
        return session

    def close(self) -> None:
        for session in self.sessions:
            session.close()


def flash(rooms: Rooms, limit: int, patch: pytest.MonkeyPatch) -> None:
    """Let a server's sessions be flashing ones, whatever face they are given."""

    async def face(engine: Any, source: Path, wanted: Any, choice: Any) -> Any:
        assert source.stat().st_size
        return choice or wanted.face

    patch.setattr(rooms, "_loaded", lambda model: _Engine(limit))
    patch.setattr(rooms, "_face", face)


@dataclass(slots=True)
class LiveServer:
    port: int
    service: Service
    rooms: Rooms
    loop: asyncio.AbstractEventLoop
    headers: dict[str, str] = field(default_factory=dict)

    def call(self, method: str, path: str, body: bytes | Any = None, kind: str = "application/json") -> Answer:
        """`path` may be an address of this server; `body` bytes, or what becomes JSON."""
        sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        path = path.removeprefix(f"http://127.0.0.1:{self.port}")
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)) as connection:
            connection.request(method, path, sent, self.headers | ({"Content-Type": kind} if sent is not None else {}))
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def open(self, face: bytes = b"face", **settings: Any) -> dict[str, Any]:
        answer = self.form(face, **settings)
        assert answer.status == 201, answer
        assert answer.headers["location"] == f"/api/v1/sessions/{answer.json['id']}"
        opened: dict[str, Any] = answer.json
        return opened

    def form(self, face: bytes | None, **settings: Any) -> Answer:
        fields: dict[str, bytes | str] = {"settings": json.dumps({"consent": True} | settings)}
        body, kind = multipart(fields | ({} if face is None else {"video": face}))
        return self.call("POST", "/api/v1/sessions", body, kind)

    def source(self, session: dict[str, Any]) -> Flashes:
        """What is behind a session, of flashing ones."""
        found = self.rooms.get(session["id"], None).session
        assert isinstance(found, Flashes)
        return found

    def tasks(self) -> int:
        """How many tasks the server's loop has."""

        async def count() -> int:
            return len(asyncio.all_tasks())

        return asyncio.run_coroutine_threadsafe(count(), self.loop).result(PATIENCE_S)


@contextmanager
def served(folder: Path, *, flashing: bool, **settings: Any) -> Iterator[LiveServer]:
    """The application on a free port, in a thread; without workers."""
    service = Service(Settings(serve_folder=folder, device="cpu", **settings))
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(service)
        if flashing:
            flash(app.state.rooms, service.settings.live_sessions, patch)
            patch.setattr(service, "examine", lambda video, audio: None)
        config = uvicorn.Config(
            app, log_config=None, lifespan="off", loop="asyncio", ws="websockets-sansio", ws_per_message_deflate=False
        )
        server = uvicorn.Server(config)
        loops: list[asyncio.AbstractEventLoop] = []

        async def run() -> None:
            loops.append(asyncio.get_running_loop())
            await server.serve(sockets=[listener])
            await app.state.rooms.close()

        thread = threading.Thread(target=asyncio.run, args=(run(),))
        thread.start()
        try:
            until(lambda: server.started)
            yield LiveServer(listener.getsockname()[1], service, app.state.rooms, loops[0])
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            service.close()


async def until_async(true: Callable[[], Any], patience_s: float = PATIENCE_S) -> None:
    async with asyncio.timeout(patience_s):
        while not true():
            await asyncio.sleep(0.02)


class Viewer:
    """A WHEP player: what came, with the time of its arrival."""

    def __init__(self, server: LiveServer, url: str) -> None:
        self.pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.pictures: list[tuple[float, np.ndarray[Any, Any]]] = []
        self.sounds: list[tuple[float, np.ndarray[Any, Any]]] = []
        self.location = ""
        self._server, self._url = server, url
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Viewer:
        self.pc.on("track", lambda track: self._tasks.append(asyncio.ensure_future(self._take(track))))
        for kind in ("video", "audio"):
            self.pc.addTransceiver(kind, "recvonly")
        await self.pc.setLocalDescription(await self.pc.createOffer())
        offer = self.pc.localDescription.sdp.encode()
        answer = await asyncio.to_thread(self._server.call, "POST", self._url, offer, "application/sdp")
        assert answer.status == 201, answer
        self.location = answer.headers["location"]
        await self.pc.setRemoteDescription(RTCSessionDescription(answer.body.decode(), "answer"))
        return self

    async def _take(self, track: Any) -> None:
        into = self.pictures if track.kind == "video" else self.sounds
        try:
            for _ in itertools.count():
                frame = await track.recv()
                array = frame.to_ndarray(format="gray") if track.kind == "video" else frame.to_ndarray()
                into.append((time.monotonic(), array))
        except MediaStreamError:
            return

    async def __aexit__(self, *_: object) -> None:
        await self.pc.close()
        await asyncio.gather(*self._tasks)
