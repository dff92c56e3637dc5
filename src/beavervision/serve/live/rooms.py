"""All live sessions of a server: who may open one, and when it ends."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from fractions import Fraction
from functools import partial
from pathlib import Path

from fastapi.concurrency import run_in_threadpool

from beavervision.errors import BusyError
from beavervision.live import Avatar, Camera, LiveEngine, LiveSession
from beavervision.pipeline import Pipeline
from beavervision.serve.live.room import Room, Terms
from beavervision.serve.live.schema import SessionSettings
from beavervision.serve.live.webrtc import Network
from beavervision.serve.problems import Problem
from beavervision.settings import Settings
from beavervision.stages.detect import FaceChoice

_REAP_S = 1.0
_FACES = 3  # prepared avatars that are kept
_RETRY_S = "10"


class Rooms:
    """The networks are loaded with the first session. All on the event loop's thread."""

    def __init__(self, settings: Settings) -> None:
        self.network = Network.of(settings)
        self._settings = settings
        self._rooms: dict[str, Room] = {}
        self._engines: dict[str, LiveEngine] = {}
        self._faces: OrderedDict[tuple[str, str, int, int], Avatar] = OrderedDict()
        self._opening = asyncio.Lock()
        self._reaper: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def open_now(self) -> int:
        """How many sessions there are. From any thread."""
        return len(self._rooms)

    async def open(
        self, owner: str, wanted: SessionSettings, source: Path | None, choice: FaceChoice | None = None
    ) -> Room:
        """A session with the face of `source`, that of `choice` if there is one, or of a camera if there is no source.

        Raises:
            Problem: no more sessions can be carried.
            BeaverVisionError: the face, the voice or the model cannot be used.
        """
        async with self._opening:
            if self._closed:
                detail = "The service is being stopped. Try again in a moment."
                raise Problem(503, "draining", detail, headers={"Retry-After": _RETRY_S})
            model = wanted.model or self._settings.model
            engine = await self._engine(model)
            face = None if source is None else await self._face(engine, source, wanted, choice)
            try:
                session = await run_in_threadpool(self._session, engine, face, wanted)
            except BusyError as error:
                raise Problem(503, "busy", str(error), headers={"Retry-After": _RETRY_S}) from error
            room = Room(
                session, Terms(owner, wanted.avatar, wanted.camera, model, wanted.voice), self.network, self._gone
            )
            self._rooms[room.id] = room
            room.start()
            if self._reaper is None:
                self._reaper = asyncio.ensure_future(self._reap())
            return room

    def get(self, room_id: str, owner: str | None) -> Room:
        """A session; of whomever if `owner` is None.

        Raises:
            Problem (404): there is none.
        """
        room = self._rooms.get(room_id)
        if room is None or (owner is not None and room.terms.owner != owner):
            raise Problem(404, "no_session", "There is no such session: it has ended, or belongs to another key.")
        return room

    def list(self, owner: str) -> list[Room]:
        return [room for room in self._rooms.values() if room.terms.owner == owner]

    async def close(self) -> None:
        self._closed = True
        if self._reaper is not None:
            self._reaper.cancel()
            await asyncio.gather(self._reaper, return_exceptions=True)
        await asyncio.gather(*(room.close() for room in tuple(self._rooms.values())))
        for engine in self._engines.values():
            await run_in_threadpool(engine.close)

    async def _engine(self, model: str) -> LiveEngine:
        if model not in self._engines:
            self._engines[model] = await run_in_threadpool(self._loaded, model)
        return self._engines[model]

    def _loaded(self, model: str) -> LiveEngine:
        allow = self._settings.serve_allow_non_commercial
        pipeline = Pipeline(model, allow_non_commercial=allow, settings=self._settings)
        engine = LiveEngine(pipeline, limit=self._settings.live_sessions or None, abandoned_s=math.inf)
        engine.warm()
        return engine

    async def _face(
        self, engine: LiveEngine, source: Path, wanted: SessionSettings, choice: FaceChoice | None
    ) -> Avatar:
        key = (wanted.avatar or "", engine.pipeline.card.name, wanted.size_px, wanted.fps)
        if wanted.avatar is not None and key in self._faces:
            self._faces.move_to_end(key)
            return self._faces[key]
        prepare = partial(Avatar.prepare, size_px=wanted.size_px, rate=wanted.fps, face=choice or wanted.face)
        face = await run_in_threadpool(prepare, source, engine.pipeline)
        if wanted.avatar is not None:
            self._faces[key] = face
            while len(self._faces) > _FACES:
                self._faces.popitem(last=False)
        return face

    def _session(self, engine: LiveEngine, face: Avatar | None, wanted: SessionSettings) -> LiveSession:
        how = wanted.model_dump(include={"voice", "language", "speed", "pitch", "seed"})
        source = face or Camera(*wanted.camera_px, wanted.face)
        session = engine.open(source, rate=Fraction(wanted.fps), **how)
        try:
            if wanted.expression is not None:
                session.set_expression(wanted.expression)
        except BaseException:
            session.close()
            raise
        return session

    def _gone(self, room: Room) -> None:
        self._rooms.pop(room.id, None)

    async def _reap(self) -> None:
        """End sessions that nobody watches, listens to or speaks through."""
        while True:
            await asyncio.sleep(_REAP_S)
            for room in tuple(self._rooms.values()):
                if await room.unused_s() > self._settings.live_idle_s:
                    await room.close()
