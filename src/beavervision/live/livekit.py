"""A face for agents built with LiveKit (extra ``livekit``; tested with livekit-agents 1.8).

Beside the agent::

    await AvatarSession("portrait.png").start(session, room=ctx.room)  # before session.start(...)

or in a process of its own, which hears the agent through LiveKit's byte stream of audio::

    await FaceGenerator(face).runner(room, DataStreamAudioReceiver(room)).start()
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from livekit import rtc
from livekit.agents import AgentSession
from livekit.agents.voice import avatar
from livekit.agents.voice.avatar import AudioReceiver, AudioSegmentEnd, AvatarOptions, AvatarRunner, QueueAudioOutput

from beavervision.live.agent import RATE_HZ, AgentFace
from beavervision.live.avatar import Avatar
from beavervision.live.engine import LiveEngine
from beavervision.media import Picture


class FaceGenerator(avatar.VideoGenerator):
    """What LiveKit's ``AvatarRunner`` shows and plays.

    In silence it gives pictures alone: LiveKit takes the sound that it was given for how far the agent's words were heard.
    """

    def __init__(self, face: AgentFace) -> None:
        self._face = face

    @property
    def options(self) -> AvatarOptions:
        """As ``AvatarRunner`` needs them."""
        session = self._face.session
        width_px, height_px = session.size_px
        return AvatarOptions(width_px, height_px, float(session.rate), RATE_HZ, 1)

    def runner(self, room: rtc.Room, receiver: AudioReceiver) -> AvatarRunner:
        """What puts it into `room`, speaking what `receiver` brings."""
        return AvatarRunner(room, audio_recv=receiver, video_gen=self, options=self.options)

    async def push_audio(self, frame: rtc.AudioFrame | AudioSegmentEnd) -> None:
        if isinstance(frame, AudioSegmentEnd):
            self._face.end()
        else:
            await self._face.push(bytes(frame.data), frame.sample_rate, frame.num_channels)

    def clear_buffer(self) -> None:
        self._face.interrupt()

    async def __aiter__(self) -> AsyncGenerator[rtc.VideoFrame | rtc.AudioFrame | AudioSegmentEnd, None]:
        async for part in self._face.parts():
            if part.picture is not None:
                yield _shown(part.picture)
            if part.pcm16:
                yield rtc.AudioFrame(part.pcm16, RATE_HZ, 1, len(part.pcm16) // 2)
            if part.over:
                yield AudioSegmentEnd()

    async def aclose(self) -> None:
        await self._face.close()


class AvatarSession(avatar.AvatarSession[Any]):
    """Gives an agent a face, in the agent's own process.

    Args:
        face: a picture, a video or a prepared avatar.
        engine: to share networks among agents; by default it has one of its own.
        how: of the session, as :meth:`LiveEngine.open` takes it: `rate`, `expression`.
    """

    def __init__(self, face: str | Path | Avatar, *, engine: LiveEngine | None = None, **how: Any) -> None:
        super().__init__()
        self._source, self._with, self._how = face, engine, how
        self._generator: FaceGenerator | None = None
        self._runner: AvatarRunner | None = None
        self._identity = ""

    @property
    def avatar_identity(self) -> str:
        return self._identity

    @property
    def provider(self) -> str:
        return "beavervision"

    async def start(self, agent_session: AgentSession[Any], room: rtc.Room) -> None:
        """Let the agent speak through the face, from the first word if this comes before the agent's own start.

        Raises:
            BeaverVisionError: the face cannot be used, or this machine carries no further session.
        """
        self._identity = room.local_participant.identity
        await super().start(agent_session, room)
        self._generator = FaceGenerator(await AgentFace.open(self._source, self._with, **self._how))
        output = QueueAudioOutput(wait_playback_start=True)
        self._runner = self._generator.runner(room, output)
        await self._runner.start()
        agent_session.output.replace_audio_tail(output)

    async def aclose(self) -> None:
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.aclose()
        generator, self._generator = self._generator, None
        if generator is not None:
            await generator.aclose()
        self._room = None  # the participant is the agent's own: it stays
        await super().aclose()


def _shown(picture: Picture) -> rtc.VideoFrame:
    planes = b"".join(plane.tobytes() for plane in (picture.y, picture.u, picture.v))
    return rtc.VideoFrame(picture.width_px, picture.height_px, rtc.VideoBufferType.I420, planes)
