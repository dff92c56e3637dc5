"""A face for Pipecat agents, in the real library's pipeline, with its output transport."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings(action="ignore"):  # of its own imports
    pytest.importorskip("pipecat.frames.frames", reason="needs the extra pipecat")

from pipecat.frames.frames import (
    BotStoppedSpeakingFrame,
    EndFrame,
    Frame,
    InterruptionFrame,
    OutputAudioRawFrame,
    OutputImageRawFrame,
    StartFrame,
    TTSAudioRawFrame,
    TTSStartedFrame,
    TTSStoppedFrame,
)
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.frame_processor import FrameDirection, FrameProcessor
from pipecat.transports.base_output import BaseOutputTransport
from pipecat.transports.base_transport import TransportParams
from pipecat.workers.runner import WorkerRunner

from beavervision.live import LiveEngine
from beavervision.live.pipecat import FaceVideoService
from tests.test_live import pipeline, speech, still

PATIENCE_S = 60.0
HZ, OUT_HZ = 24_000, 16_000


class Screen(BaseOutputTransport):
    """A transport that keeps what it would send; sound takes its time."""

    def __init__(self) -> None:
        width_px, height_px = still().size_px
        super().__init__(
            TransportParams(
                audio_out_enabled=True,
                audio_out_sample_rate=OUT_HZ,
                audio_out_end_silence_secs=0,
                video_out_enabled=True,
                video_out_is_live=True,
                video_out_framerate=25,
                video_out_width=width_px,
                video_out_height=height_px,
            )
        )
        self.pictures: list[OutputImageRawFrame] = []
        self.sound = b""

    async def start(self, frame: StartFrame) -> None:
        await super().start(frame)
        await self.set_transport_ready(frame)

    async def write_video_frame(self, frame: OutputImageRawFrame) -> bool:
        self.pictures.append(frame)
        return True

    async def write_audio_frame(self, frame: OutputAudioRawFrame) -> bool:
        self.sound += frame.audio
        await asyncio.sleep(len(frame.audio) / 2 / OUT_HZ)
        return True

    @property
    def heard_s(self) -> float:
        return len(self.sound) / 2 / OUT_HZ


class Last(FrameProcessor):
    """Keeps what comes out behind the transport."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[Frame] = []

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        self.frames.append(frame)
        await self.push_frame(frame, direction)

    def count(self, kind: type[Frame]) -> int:
        return sum(isinstance(frame, kind) for frame in self.frames)


async def until(true: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not true():
            await asyncio.sleep(0.02)


def spoken(seconds: float) -> list[Frame]:
    """What a speech synthesis says, in pieces of 40 ms, faster than it is heard."""
    pcm = (np.tile(speech()[::2], 20)[: int(seconds * HZ)] * 32767).astype("<i2")
    size = HZ // 25
    pieces = [TTSAudioRawFrame(pcm[i : i + size].tobytes(), HZ, 1) for i in range(0, len(pcm), size)]
    return [TTSStartedFrame(), *pieces, TTSStoppedFrame()]


def test_speech_comes_out_with_a_face_and_ends_when_it_was_heard() -> None:
    async def scene(engine: LiveEngine) -> None:
        screen, last = Screen(), Last()
        service = FaceVideoService(still(), engine=engine)
        worker = PipelineWorker(Pipeline([service, screen, last]), cancel_on_idle_timeout=False)
        runner = WorkerRunner(handle_sigint=False)
        await runner.add_workers(worker)
        running = asyncio.ensure_future(runner.run())
        try:
            await until(lambda: len(screen.pictures) > 10)
            assert screen.sound == b"", "in silence there are pictures alone"
            assert screen.pictures[0].size == still().size_px

            await worker.queue_frames(spoken(2.0))
            await until(lambda: last.count(TTSStoppedFrame))
            assert screen.heard_s == pytest.approx(2.0, abs=0.05), "the transport fills its last piece"
            assert last.count(BotStoppedSpeakingFrame) == 1

            while (
                len({bytes(picture.image) for picture in screen.pictures}) < 10
            ):  # a busy machine shows a still face first
                await worker.queue_frames(spoken(2.0))
                ended = last.count(BotStoppedSpeakingFrame)
                await until(lambda ended=ended: last.count(BotStoppedSpeakingFrame) > ended)
            stops, ended = last.count(TTSStoppedFrame), last.count(BotStoppedSpeakingFrame)

            before_s = screen.heard_s
            await worker.queue_frames(spoken(30.0))
            await until(lambda: screen.heard_s > before_s + 1.0)
            await worker.queue_frame(InterruptionFrame())
            await until(lambda: last.count(BotStoppedSpeakingFrame) == ended + 1)
            heard_s, shown = screen.heard_s, len(screen.pictures)
            await until(lambda: len(screen.pictures) > shown + 15)
            assert screen.heard_s <= heard_s + 0.05, "nothing of what was cut is heard later"
            assert last.count(TTSStoppedFrame) == stops

            before_s = screen.heard_s
            await worker.queue_frames([*spoken(1.0), EndFrame()])
            await asyncio.wait_for(running, PATIENCE_S)
            assert screen.heard_s - before_s == pytest.approx(1.0, abs=0.05), "the end waits for what was said"
            assert last.count(TTSStoppedFrame) == stops + 1
        finally:
            await worker.cancel()  # else a failure would wait for the pipeline for ever
        assert engine.sessions() == ()

    with LiveEngine(pipeline()) as engine:
        engine.warm(still())
        asyncio.run(scene(engine))
    assert not [t for t in threading.enumerate() if t.name.startswith("live-")]
