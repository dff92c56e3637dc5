"""A face for LiveKit agents, by the real library: its agent, its avatar runner, its byte stream; only the room is made up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("livekit.agents", reason="needs the extra livekit")

from livekit import rtc
from livekit.agents import Agent, AgentSession
from livekit.agents.voice.avatar import AudioSegmentEnd, DataStreamAudioOutput, DataStreamAudioReceiver

from beavervision.live import LiveEngine
from beavervision.live.agent import RATE_HZ, AgentFace
from beavervision.live.livekit import AvatarSession, FaceGenerator
from tests.test_live import pipeline, speech, still

PATIENCE_S = 60.0
HZ = 24_000


class Room(rtc.EventEmitter[str]):
    """A room without a server: what is published is kept, and what is sent comes to the other one at once."""

    def __init__(self, identity: str) -> None:
        super().__init__()
        self.published: list[Any] = []
        self.other: Room | None = None
        self.streams: dict[str, Callable[[Any, str], None]] = {}
        self.local_participant = Participant(self, identity)
        self.name = "room"

    def isconnected(self) -> bool:
        return True

    @property
    def remote_participants(self) -> dict[str, Any]:
        return {} if self.other is None else {self.other.local_participant.identity: self.other.local_participant}

    def register_byte_stream_handler(self, topic: str, handler: Callable[[Any, str], None]) -> None:
        self.streams[topic] = handler


class Participant:
    kind = rtc.ParticipantKind.PARTICIPANT_KIND_AGENT
    state = rtc.ParticipantState.PARTICIPANT_STATE_ACTIVE

    def __init__(self, room: Room, identity: str) -> None:
        self.identity, self._room = identity, room
        self.track_publications: dict[str, Any] = {}
        self._rpc_handlers: dict[str, Any] = {}

    async def publish_track(self, track: Any, options: Any) -> Any:
        async def subscribed() -> None: ...

        publication = SimpleNamespace(kind=track.kind, track=track, wait_for_subscription=subscribed)
        self._room.published.append(publication)
        self.track_publications[str(len(self._room.published))] = publication
        self._room.emit("local_track_published", publication, track)
        return publication

    def register_rpc_method(self, method: str, handler: Any) -> None:
        self._rpc_handlers[method] = handler

    async def perform_rpc(self, *, destination_identity: str, method: str, payload: str) -> str:
        assert self._room.other is not None
        told = SimpleNamespace(caller_identity=self.identity, payload=payload)
        answer: str = self._room.other.local_participant._rpc_handlers[method](told)
        return answer

    async def stream_bytes(self, *, topic: str, attributes: dict[str, str], **_: Any) -> Any:
        assert self._room.other is not None
        data: asyncio.Queue[bytes | None] = asyncio.Queue()

        class Reader:
            info = SimpleNamespace(attributes=attributes, stream_id="x")

            async def __anext__(self) -> bytes:
                if (piece := await data.get()) is None:
                    raise StopAsyncIteration
                return piece

        self._room.other.streams[topic](Reader(), self.identity)
        return SimpleNamespace(write=data.put, aclose=lambda: data.put(None))


def frames(seconds: float) -> list[rtc.AudioFrame]:
    """Speech in pieces of 20 ms."""
    pcm = (np.tile(speech()[::2], 20)[: int(seconds * HZ)] * 32767).astype("<i2")
    size = HZ // 50
    return [rtc.AudioFrame(pcm[i : i + size].tobytes(), HZ, 1, size) for i in range(0, len(pcm), size)]


async def aloud(seconds: float) -> AsyncIterator[rtc.AudioFrame]:
    for frame in frames(seconds):
        yield frame


class Given:
    """What a runner was given, on the way to the room."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pictures: list[Any] = []
        self.samples = 0
        real = rtc.AVSynchronizer.push

        async def push(sync: Any, frame: Any, timestamp: float | None = None) -> None:
            if isinstance(frame, rtc.VideoFrame):
                self.pictures.append(frame)
            else:
                self.samples += frame.samples_per_channel
            await real(sync, frame, timestamp)

        monkeypatch.setattr(rtc.AVSynchronizer, "push", push)


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.02)


def test_an_agent_gets_a_face_by_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Given(monkeypatch)

    async def scene(engine: LiveEngine) -> None:
        room = Room("agent")
        session: AgentSession[None] = AgentSession()
        avatar = AvatarSession(still(), engine=engine)
        await avatar.start(session, room=room)  # type: ignore[arg-type]
        await session.start(Agent(instructions="Speak."))
        ends: list[Any] = []
        assert session.output.audio is not None
        session.output.audio.on("playback_finished", ends.append)

        await until(lambda: len(given.pictures) > 10)
        assert given.samples == 0, "in silence there are pictures alone"
        await avatar.wait_for_join(timeout=PATIENCE_S)
        assert [p.kind for p in room.published] == [rtc.TrackKind.KIND_AUDIO, rtc.TrackKind.KIND_VIDEO]

        async with asyncio.timeout(PATIENCE_S):
            while len({bytes(p.data) for p in given.pictures}) < 10:  # a busy machine shows a still face first
                await session.say("Apples.", audio=aloud(2.0))
        assert {(e.interrupted, round(e.playback_position, 3)) for e in ends} == {(False, 2.0)}
        assert given.samples == len(ends) * 2 * RATE_HZ

        before = given.samples
        ends.clear()
        saying = session.say("Apples and apples.", audio=aloud(30.0))
        await until(lambda: given.samples > before + RATE_HZ)
        await session.interrupt()
        await saying
        await until(lambda: ends)
        heard = given.samples
        assert ends[0].interrupted and 0.5 < ends[0].playback_position < 5.0
        before = len(given.pictures)
        await until(lambda: len(given.pictures) > before + 5)
        assert given.samples - heard <= RATE_HZ // 25, "no more of what was cut than was on its way"
        heard = given.samples

        await session.say("Yes.", audio=aloud(1.0))
        assert given.samples == heard + RATE_HZ and not ends[1].interrupted
        await session.aclose()
        await avatar.aclose()
        assert engine.sessions() == ()

    with LiveEngine(pipeline()) as engine:
        engine.warm(still())
        asyncio.run(scene(engine))
    assert not [t for t in threading.enumerate() if t.name.startswith("live-")]


def test_a_face_in_another_process_hears_the_agent_by_its_byte_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    given = Given(monkeypatch)

    async def scene(engine: LiveEngine) -> None:
        agent, worker = Room("agent"), Room("face")
        agent.other, worker.other = worker, agent
        generator = FaceGenerator(await AgentFace.open(still(), engine))
        runner = generator.runner(worker, DataStreamAudioReceiver(worker, sender_identity="agent"))  # type: ignore[arg-type]
        await runner.start()
        output = DataStreamAudioOutput(agent, destination_identity="face", wait_playback_start=True)  # type: ignore[arg-type]
        starts: list[Any] = []
        output.on("playback_started", starts.append)

        for frame in frames(1.5):
            await output.capture_frame(frame)
        output.flush()
        done = await asyncio.wait_for(output.wait_for_playout(), PATIENCE_S)
        assert not done.interrupted and round(done.playback_position, 3) == 1.5
        assert len(starts) == 1 and given.samples == 1.5 * RATE_HZ

        for frame in frames(20.0):
            await output.capture_frame(frame)
        await until(lambda: given.samples > 2 * RATE_HZ)
        output.clear_buffer()
        done = await asyncio.wait_for(output.wait_for_playout(), PATIENCE_S)
        assert done.interrupted and done.playback_position < 3.0
        await runner.aclose()
        await generator.aclose()

    with LiveEngine(pipeline()) as engine:
        asyncio.run(scene(engine))


def test_more_than_is_held_waits_and_an_interruption_lets_it_go() -> None:
    async def scene(engine: LiveEngine) -> None:
        face = AgentFace(engine.open(still()))
        generator = FaceGenerator(face)
        pushing = asyncio.ensure_future(_push(generator, 90.0))
        await asyncio.sleep(1.0)
        assert not pushing.done(), "a minute is held"
        generator.clear_buffer()
        await asyncio.wait_for(pushing, PATIENCE_S)
        await generator.aclose()

    with LiveEngine(pipeline()) as engine:
        asyncio.run(scene(engine))


async def _push(generator: FaceGenerator, seconds: float) -> None:
    big = HZ * 10
    for _ in range(int(seconds / 10)):
        await generator.push_audio(rtc.AudioFrame(bytes(2 * big), HZ, 1, big))
    await generator.push_audio(AudioSegmentEnd())
