"""What the API takes and gives, as typed models."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from beavervision.serve.jobs import Job, State

Factor = Annotated[float, Field(ge=0.5, le=2, allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")]
_SHARE = r"(0(\.\d{1,9})?|1(\.0{1,9})?)"
FACE = rf"^(largest|speaker|left|right|center|\d{{1,3}}|{_SHARE},{_SHARE})$"
_FACES = "largest, speaker, left, right, center, a number from 0 (left), or x,y in 0..1"


def _face_name(text: str) -> str:
    if re.fullmatch(FACE, text) is None:
        raise PydanticCustomError("face", f"it is one of {_FACES}")
    return text


FaceName = Annotated[
    str,
    AfterValidator(_face_name),
    Field(description=f"Which face: {_FACES}.", json_schema_extra={"pattern": FACE}),
]


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


class KeyframeIn(Strict):
    """An expression at a time."""

    time_s: float = Field(ge=0, le=86_400, allow_inf_nan=False)
    expression: Annotated[str, Field(max_length=1000)] | dict[Name, float] = Field(examples=["happy:0.6"])
    ease: Literal["in-out", "in", "out", "linear", "hold"] = Field("in-out", description="How it is come to.")


class PhoneIn(Strict):
    """A speech sound of a recording."""

    ipa: str = Field(min_length=1, max_length=16, examples=["p", "oʊ"])
    start_ms: int = Field(ge=0, le=86_400_000)
    end_ms: int = Field(ge=0, le=86_400_000)


class LipsyncSettings(VoiceSettings):
    """The `settings` of a job."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"language": "en-us", "speed": 1.1, "fit": "loop", "face": "largest"}]},
    )

    model: Name | None = Field(None, description="The lip-sync model, as /api/v1/models lists them.")
    fit: Literal["loop", "freeze", "trim", "keep"] = Field(
        "loop",
        description="Where picture and sound differ in length: loop plays a shorter picture back and forth, freeze holds its last, "
        "trim ends with the shorter one, keep keeps the picture's length.",
    )
    face: FaceName = "largest"
    mark: bool = Field(False, description="Say in a corner of the pictures that they are synthetic.")
    keep_audio: float = Field(0.0, ge=0, le=1, allow_inf_nan=False, description="The level of the source's own sound.")
    phones: list[PhoneIn] | None = Field(
        None,
        max_length=20_000,
        description="The speech sounds of the audio that is sent, where they are known, in order of time, as /api/v1/speech tells "
        "them: the lips of the default model follow them. Those of a text are known.",
    )
    expression: str | None = Field(
        None,
        max_length=1000,
        description="What to express, as /api/v1/expressions lists it, with an intensity. Marks in the text change it on the way.",
        examples=["happy:0.6", "auto"],
    )
    expression_track: list[KeyframeIn] | None = Field(
        None, min_length=1, max_length=1000, description="Keyframes of expressions to add, in order of time."
    )
    style: dict[str, Any] | None = Field(
        None, description="The manner of another speaker: what `beavervision style learn` writes."
    )
    alive: bool | None = Field(
        None, description="Let the face blink, breathe and stress words unasked. By default stills alone do."
    )
    restore: Name | None = Field(None, description="A face restorer (kind `restore`), as /api/v1/models lists them.")
    restore_area: Literal["mouth", "face"] = Field("mouth", description="Where the restorer's detail shows.")
    boxes: Name | None = Field(
        None,
        description="For a Wav2Lip model: the face detector (kind `boxes`) whose boxes it draws in, as published. By default "
        "they are the face mesh's.",
    )
    whole_box: bool = Field(
        False,
        description="For a Wav2Lip model: paste the whole box with hard edges, as published, instead of the lower face.",
    )


class AvatarSettings(Strict):
    """The fields of an avatar."""

    name: str = Field("", max_length=100)
    face: FaceName = "largest"


class PreviewSettings(Strict):
    """The fields of a preview."""

    expression: str = Field(max_length=1000)
    face: FaceName = "largest"
    view: Literal["picture", "face"] = "picture"
    side_px: int = Field(720, ge=64, le=1280)


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
    step: str | None = Field(
        description="What the worker does: loading (networks), looking (for the face), drawing, signing, storing."
    )
    pictures: int
    pictures_expected: int | None = Field(description="An estimate while speech is synthesised; null before.")
    pictures_per_s: float
    remaining_s: float | None


class ErrorOut(BaseModel):
    code: str
    message: str


class JobOut(BaseModel):
    """A job. `video_url` is there once it has succeeded; it is signed and expires."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [  # null is left out of the document
                {
                    "id": "eccb2bf7c602e6563ddad14f",
                    "kind": "lipsync",
                    "state": "succeeded",
                    "created": "2026-01-31T12:00:00Z",
                    "started": "2026-01-31T12:00:01Z",
                    "ended": "2026-01-31T12:00:06Z",
                    "attempts": 1,
                    "progress": {"stage": "done", "pictures": 250, "pictures_expected": 250, "pictures_per_s": 50.0},
                    "video_url": "https://faces.example/api/v1/jobs/eccb2bf7c602e6563ddad14f/result?expires=1769864406&signature=5f",
                    "video_url_expires": "2026-01-31T13:00:06Z",
                    "seconds": 10.0,
                    "links": {
                        "self": "/api/v1/jobs/eccb2bf7c602e6563ddad14f",
                        "result": "/api/v1/jobs/eccb2bf7c602e6563ddad14f/result",
                    },
                }
            ]
        }
    )

    id: str
    kind: Literal["lipsync", "avatar"] = Field(description="Whether it makes a video, or looks at an avatar.")
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


class AvatarOut(BaseModel):
    """A face that was uploaded once."""

    id: str
    name: str
    state: Literal["preparing", "ready", "failed"]
    created: datetime
    kind: Literal["still", "video"] | None = Field(description="This and what follows is known once it is ready.")
    width_px: int | None
    height_px: int | None
    seconds: float | None = Field(description="The length of a video.")
    people: int | None = Field(description="How many faces were seen, the chosen one included.")
    face: str | None = Field(description="Which of them it is, as it was asked for.")
    error: ErrorOut | None
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


class ExpressionOut(BaseModel):
    """A name that `expression`, `expression_track` and marks in the text take, with a number from low to high."""

    name: str
    kind: str = Field(description="preset, auto, custom, control or head.")
    summary: str
    low: float
    high: float


class WebhooksOut(BaseModel):
    """How webhooks are signed: as https://www.standardwebhooks.com says, with this secret."""

    secret: str


class WorkerOut(BaseModel):
    name: str
    pid: int | None
    ready: bool
    restarts: int


class MemoryOut(BaseModel):
    worker: str = Field(description="The process that uses it: a worker, or `server` for live sessions.")
    device: str
    used_bytes: int
    budget_bytes: int
    utilisation: float | None = Field(description="How busy a GPU is, of 1, where its driver tells.")


class LimitsOut(BaseModel):
    """What a request may have; `consent` says whether it must confirm the right to use the face."""

    upload_mb: int
    text_chars: int
    media_s: float
    side_px: int
    keep_hours: float
    consent: bool


class StatusOut(BaseModel):
    """Measured; null where nothing was measured yet. The figures of jobs are over the last day."""

    version: str
    uptime_s: float
    draining: bool
    workers: list[WorkerOut]
    memory: list[MemoryOut]
    sessions: int = Field(description="Live sessions that are open.")
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
    limits: LimitsOut


class Health(BaseModel):
    status: Literal["ok"]


class ProblemOut(BaseModel):
    """RFC 9457."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:beavervision:problem:text",
                    "title": "Unprocessable Entity",
                    "status": 422,
                    "detail": "The text is empty. Give at least one word to say.",
                    "code": "text",
                }
            ]
        }
    )

    type: str
    title: str
    status: int
    detail: str
    code: str


def whole_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of a model without references, for places in the OpenAPI document where these would lead nowhere."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def put_in(value: Any) -> Any:
        if isinstance(value, dict):
            if "$ref" in value:
                return put_in(parts[value["$ref"].removeprefix("#/$defs/")])
            return {name: put_in(inner) for name, inner in value.items()}
        return [put_in(inner) for inner in value] if isinstance(value, list) else value

    whole: dict[str, Any] = put_in(schema)
    return whole


def file_field(description: str) -> dict[str, Any]:
    return {"type": "string", "format": "binary", "description": description}


def form_body(
    fields: dict[str, dict[str, Any]], *, or_json: dict[str, Any] | None = None, **schema: Any
) -> dict[str, Any]:
    """For the OpenAPI document: a body that is a multipart form with these fields and no others, or JSON as `or_json` says."""
    form: dict[str, Any] = {
        "schema": {"type": "object", "additionalProperties": False, "properties": fields, **schema},
    }
    if "settings" in fields:
        form["encoding"] = {"settings": {"contentType": "application/json"}}
    content = {"multipart/form-data": form} | ({} if or_json is None else {"application/json": {"schema": or_json}})
    return {"requestBody": {"required": True, "content": content}}


def job_out(job: Job, base: str, video_url: str | None, expires_s: float | None) -> JobOut:
    """`base` is the job's own address."""
    left = None
    kind = job.request.get("kind", "lipsync")
    if job.state is State.RUNNING and job.pictures_per_s > 0 and job.pictures_expected is not None:
        left = round(max(job.pictures_expected - job.pictures, 0) / job.pictures_per_s, 1)
    stage: Any = {
        State.QUEUED: "waiting",
        State.RUNNING: "drawing" if job.pictures and kind == "lipsync" else "preparing",
    }
    links = {"self": base, "events": f"{base}/events"}
    if not job.ended:
        links["cancel"] = f"{base}/cancel"
    if job.state is State.SUCCEEDED:
        links |= {"report": f"{base}/report"} | ({"result": f"{base}/result"} if job.result_key else {})
    return JobOut(
        id=job.id,
        kind=kind,
        state=job.state,
        created=time_of(job.created_s),
        started=None if job.started_s is None else time_of(job.started_s),
        ended=None if job.ended_s is None else time_of(job.ended_s),
        attempts=job.attempts,
        progress=ProgressOut(
            stage=stage.get(job.state, "done"),
            step=job.stage if job.state is State.RUNNING else None,
            pictures=job.pictures,
            pictures_expected=job.pictures_expected,
            pictures_per_s=round(job.pictures_per_s, 2),
            remaining_s=left,
        ),
        error=None if job.error_code is None else ErrorOut(code=job.error_code, message=job.error_message or ""),
        video_url=video_url,
        video_url_expires=None if expires_s is None else time_of(expires_s),
        seconds=job.result_s,
        links=links,
    )


def time_of(time_s: float) -> datetime:
    return datetime.fromtimestamp(time_s, UTC)
