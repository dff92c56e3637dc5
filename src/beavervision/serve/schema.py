"""What the API takes and gives, as typed models."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from beavervision.serve.jobs import Job, State

Factor = Annotated[float, Field(ge=0.5, le=2, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]
_SHARE = r"(0(\.\d{1,9})?|1(\.0{1,9})?)"


class Strict(BaseModel):
    """A model that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class VoiceSettings(Strict):
    """How a text is spoken."""

    voice: Name | None = Field(None, description="A voice, as /api/v1/voices lists them.")
    language: Name | None = Field(
        None, description="The language of the text, such as en-us or fr.", examples=["en-us"]
    )
    speed: Factor = Field(1.0, description="How fast to speak.")
    pitch: Factor = Field(1.0, description="How high to speak.")
    seed: int = Field(0, ge=0, lt=2**31, description="The same seed gives the same voice, to the sample.")


class LipsyncSettings(VoiceSettings):
    """The `settings` of a job."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"language": "en-us", "speed": 1.1, "fit": "loop", "face": "largest"}]},
    )

    model: Name | None = Field(None, description="The lip-sync model, as /api/v1/models lists them.")
    fit: Literal["loop", "freeze", "trim", "keep"] = Field(
        "loop", description="What happens where picture and sound differ in length; see docs/service.md."
    )
    face: str = Field(
        "largest",
        pattern=rf"^(largest|speaker|left|right|center|\d{{1,3}}|{_SHARE},{_SHARE})$",
        description="Which face: largest, speaker, left, right, center, a number from 0 (left), or x,y in 0..1.",
    )
    keep_audio: float = Field(0.0, ge=0, le=1, allow_inf_nan=False, description="The level of the source's own sound.")


class SpeechRequest(VoiceSettings):
    """A text to speak."""

    text: str = Field(min_length=1, max_length=2000, examples=["Hello there."])


class PhoneTime(BaseModel):
    ipa: str
    start_ms: int
    end_ms: int


class SpeechOut(BaseModel):
    """A text spoken. `audio_base64` is a WAV file; ask with `Accept: audio/wav` to get that file alone."""

    voice: str
    language: str
    licence: str
    rate_hz: int
    seconds: float
    left_out: str = Field(description="Characters that the voice cannot say.")
    timing: str
    phones: list[PhoneTime]
    audio_base64: str


class ProgressOut(BaseModel):
    stage: Literal["waiting", "preparing", "drawing", "done"]
    pictures: int
    pictures_expected: int | None = Field(description="An estimate while speech is synthesised; null before.")
    pictures_per_s: float
    remaining_s: float | None


class ErrorOut(BaseModel):
    code: str
    message: str


class JobOut(BaseModel):
    """A job. `video_url` is there once it has succeeded; it is signed and expires."""

    id: str
    state: State
    created: datetime
    started: datetime | None
    ended: datetime | None
    attempts: int
    progress: ProgressOut
    error: ErrorOut | None
    video_url: str | None
    video_url_expires: datetime | None
    seconds: float | None = Field(description="The length of the video.")
    links: dict[str, str]


class JobsOut(BaseModel):
    jobs: list[JobOut]
    next: str | None = Field(description="Where older jobs are.")


class VoiceOut(BaseModel):
    name: str
    language: str
    engine: str
    gender: str
    description: str
    licence: str
    rate_hz: int
    timing: str
    unavailable: str


class ModelOut(BaseModel):
    name: str
    kind: str
    summary: str
    licence_code: str
    licence_weights: str
    non_commercial: bool
    usable: bool = Field(description="Whether a job may name it in `model`.")


class WorkerOut(BaseModel):
    name: str
    pid: int | None
    ready: bool
    restarts: int


class MemoryOut(BaseModel):
    worker: str
    device: str
    used_bytes: int
    budget_bytes: int


class StatusOut(BaseModel):
    """Measured; null where nothing was measured yet. The figures of jobs are over the last day."""

    version: str
    uptime_s: float
    draining: bool
    workers: list[WorkerOut]
    memory: list[MemoryOut]
    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int
    processed_hours: float
    success_rate: float | None
    response_p50_s: float | None
    response_p95_s: float | None
    free_disk_bytes: int


class Health(BaseModel):
    status: Literal["ok"]


class ProblemOut(BaseModel):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    code: str


def job_out(job: Job, base: str, video_url: str | None, expires_s: float | None) -> JobOut:
    """`base` is the job's own address."""
    left = None
    if job.state is State.RUNNING and job.pictures_per_s > 0 and job.pictures_expected is not None:
        left = round(max(job.pictures_expected - job.pictures, 0) / job.pictures_per_s, 1)
    stage: Any = {State.QUEUED: "waiting", State.RUNNING: "drawing" if job.pictures else "preparing"}
    links = {"self": base, "events": f"{base}/events"}
    if not job.ended:
        links["cancel"] = f"{base}/cancel"
    if job.state is State.SUCCEEDED:
        links |= {"result": f"{base}/result", "report": f"{base}/report"}
    return JobOut(
        id=job.id,
        state=job.state,
        created=_time(job.created_s),
        started=None if job.started_s is None else _time(job.started_s),
        ended=None if job.ended_s is None else _time(job.ended_s),
        attempts=job.attempts,
        progress=ProgressOut(
            stage=stage.get(job.state, "done"),
            pictures=job.pictures,
            pictures_expected=job.pictures_expected,
            pictures_per_s=round(job.pictures_per_s, 2),
            remaining_s=left,
        ),
        error=None if job.error_code is None else ErrorOut(code=job.error_code, message=job.error_message or ""),
        video_url=video_url,
        video_url_expires=None if expires_s is None else _time(expires_s),
        seconds=job.result_s,
        links=links,
    )


def _time(time_s: float) -> datetime:
    return datetime.fromtimestamp(time_s, UTC)
