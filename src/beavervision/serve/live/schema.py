"""What the API of live sessions takes and gives, as typed models."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, Field
from pydantic_core import PydanticCustomError

from beavervision.serve.schema import Name, Strict, VoiceSettings

Expression = Annotated[str, Field(max_length=1000)]
_RTMP = re.compile(r"rtmps?://[^\s/?#@]+/\S+")


class SessionSettings(VoiceSettings):
    """What a session is opened with."""

    avatar: Annotated[str, Field(pattern=r"^[0-9a-f]{24}$")] | None = Field(
        None, description="An avatar, as /api/v1/avatars lists them. Or upload a face; or set `camera`."
    )
    camera: bool = Field(False, description="The face is that of a camera, which is sent by WHIP.")
    model: Name | None = Field(None, description="The lip-sync model, as /api/v1/models lists them.")
    expression: Expression | None = Field(None, description="What the face expresses, such as `happy:0.6`.")
    size_px: int = Field(512, ge=128, le=1280, description="The longer side of the pictures.")
    fps: Literal[10, 12, 15, 20, 24, 25, 30] = 25
    face: str = Field(
        "largest", pattern=r"^(largest|left|right|center|\d{1,3})$", description="Which face of the upload."
    )
    shape: Literal["4:3", "16:9", "1:1", "3:4", "9:16"] = Field("4:3", description="Of a camera's pictures.")
    consent: bool = Field(False, description="You have the right to use this face and voice. Not needed for an avatar.")

    @property
    def camera_px(self) -> tuple[int, int]:
        """Width and height of a camera's pictures."""
        across, down = (int(part) for part in self.shape.split(":"))
        longer = max(across, down)
        return self.size_px * across // longer // 2 * 2, self.size_px * down // longer // 2 * 2


class SayIn(Strict):
    """A text to say."""

    text: str = Field(min_length=1, max_length=10_000, examples=["Hello there."])
    interrupt: bool = Field(False, description="Fall silent first.")


class SaidOut(BaseModel):
    utterance: int


class ExpressionIn(Strict):
    expression: Expression = Field(examples=["happy:0.6"])


def _rtmp(url: str) -> str:
    """Refuses what is no address to push to."""
    try:
        parts = urlsplit(url)
        good = bool(_RTMP.fullmatch(url) and parts.hostname) and parts.port != 0
    except ValueError:  # a bad host in brackets, or a port that is none
        good = False
    if not good:
        raise PydanticCustomError("rtmp", "send an address as rtmp://HOST/APP/KEY, or rtmps://HOST:PORT/APP/KEY")
    return url


class PushIn(Strict):
    url: Annotated[str, AfterValidator(_rtmp)] = Field(
        max_length=1000,
        json_schema_extra={"pattern": f"^{_RTMP.pattern}$"},
        description="Where to, with the stream's key.",
        examples=["rtmp://live.example.org/app/key"],
    )


class PushOut(BaseModel):
    id: str
    url: str = Field(description="Without the stream's key.")
    state: Literal["connecting", "running", "failed", "ended"]
    error: str


class MediaOut(BaseModel):
    """Where to watch and to send sound or a camera. The addresses are signed: whoever has them needs no API key. They
    expire; asking for the session gives new ones."""

    whep: str = Field(description="WebRTC out: POST an SDP offer.")
    whip: str = Field(description="Camera and microphone in: POST an SDP offer.")
    websocket: str = Field(description="Fragmented MP4 over WebSocket; see docs/live.md.")
    audio: str = Field(description="WebSocket for PCM16; see docs/live.md.")
    hls: str
    expires: datetime
    ice_servers: list[dict[str, Any]]


class DelayOut(BaseModel):
    """The constant delay from sound that is sent to the picture that leaves, and what makes it up."""

    total_ms: float
    look_ahead_ms: float = Field(description="Owed to the model: it hears so far ahead.")
    work_ms: float = Field(description="Kept for drawing.")


class SessionOut(BaseModel):
    """A live session."""

    id: str
    created: datetime
    avatar: str | None
    camera: bool
    model: str
    voice: str | None
    size_px: tuple[int, int]
    fps: float
    delay: DelayOut
    media: MediaOut
    pushes: list[PushOut]
    facts: dict[str, Any] = Field(description="What is measured: pictures due and dropped, delays, viewers.")


class SessionsOut(BaseModel):
    sessions: list[SessionOut]


class CheckOut(BaseModel):
    """One thing that a connection needs."""

    name: str
    ok: bool
    detail: str = Field(description="What is wrong and what to do, or what was found.")


class ChecksOut(BaseModel):
    checks: list[CheckOut]
