"""A face for agents built with Pipecat (extra ``pipecat``; tested with pipecat-ai 1.14).

One more processor, between the speech synthesis and the output::

    Pipeline([..., tts, FaceVideoService("portrait.png"), transport.output(), ...])
"""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path
from typing import Any

from pipecat.frames.frames import (
    CancelFrame,
    EndFrame,
    Frame,
    InterruptionFrame,
    OutputImageRawFrame,
    OutputTransportReadyFrame,
    TTSAudioRawFrame,
    TTSStoppedFrame,
)
from pipecat.processors.frame_processor import FrameDirection, FrameProcessorSetup
from pipecat.services.ai_service import AIService
from pipecat.services.settings import ServiceSettings

from beavervision.live.agent import RATE_HZ, AgentFace
from beavervision.live.avatar import Avatar
from beavervision.live.engine import LiveEngine
from beavervision.media import Picture


class FaceVideoService(AIService):
    """Takes the sound of speech and gives it again with the pictures of a face that says it; pictures alone in silence.

    The transport needs ``video_out_enabled``, ``video_out_is_live`` and the face's size and rate.

    Args:
        face: a picture, a video or a prepared avatar.
        engine: to share networks among agents; by default it has one of its own.
        how: of the session, as :meth:`LiveEngine.open` takes it: `rate`, `expression`.
        kwargs: for Pipecat.
    """

    def __init__(
        self,
        face: str | Path | Avatar,
        *,
        engine: LiveEngine | None = None,
        how: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(settings=ServiceSettings(model=None), **kwargs)
        self._source, self._with, self._how = face, engine, how or {}
        self._face: AgentFace | None = None
        self._showing: asyncio.Task[None] | None = None
        self._stops: deque[TTSStoppedFrame] = deque()  # of what is not said to its end yet
        self._shown: tuple[Picture, bytes] | None = None

    async def setup(self, setup: FrameProcessorSetup) -> None:
        """Pipecat waits for it: the face is there when the pipeline starts."""
        await super().setup(setup)
        self._face = await AgentFace.open(self._source, self._with, **self._how)

    async def stop(self, frame: EndFrame) -> None:
        """What was said before it is heard to its end."""
        await super().stop(frame)
        if self._face is not None and self._showing is not None:
            self._face.end()
            await self._face.silent()
        await self._close()

    async def cancel(self, frame: CancelFrame) -> None:
        await super().cancel(frame)
        await self._close()

    async def cleanup(self) -> None:
        await super().cleanup()
        await self._close()

    async def process_frame(self, frame: Frame, direction: FrameDirection) -> None:
        await super().process_frame(frame, direction)
        face = self._face
        if face is not None and isinstance(frame, TTSAudioRawFrame):
            await face.push(frame.audio, frame.sample_rate, frame.num_channels)
            return
        if face is not None and isinstance(frame, TTSStoppedFrame) and face.end():
            self._stops.append(frame)
            return
        if face is not None and isinstance(frame, InterruptionFrame):
            face.interrupt()
            self._stops.clear()
        elif isinstance(frame, OutputTransportReadyFrame) and self._showing is None:
            self._showing = self.create_task(self._show())
        await self.push_frame(frame, direction)

    async def _show(self) -> None:
        assert self._face is not None
        async for part in self._face.parts():
            if part.picture is not None:
                await self.push_frame(self._image(part.picture))
            if part.pcm16:
                await self.push_frame(TTSAudioRawFrame(part.pcm16, RATE_HZ, 1))
            if part.over and self._stops:
                await self.push_frame(self._stops.popleft())

    def _image(self, picture: Picture) -> OutputImageRawFrame:
        if self._shown is None or self._shown[0] is not picture:
            self._shown = picture, picture.rgb().tobytes()
        return OutputImageRawFrame(self._shown[1], (picture.width_px, picture.height_px), "RGB")

    async def _close(self) -> None:
        showing, self._showing = self._showing, None
        if showing is not None:
            await self.cancel_task(showing)
        face, self._face = self._face, None
        if face is not None:
            await face.close()
