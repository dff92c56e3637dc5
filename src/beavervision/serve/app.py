"""The API, version 1, as an ASGI application."""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import AsyncIterator, MutableMapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from beavervision import metrics
from beavervision.errors import BeaverVisionError
from beavervision.serve import exposition, problems
from beavervision.serve.avatar_routes import AVATARS, add_avatars
from beavervision.serve.jobs import Job, State
from beavervision.serve.pages import add_pages
from beavervision.serve.preview_routes import PREVIEW, add_previews
from beavervision.serve.problems import Problem
from beavervision.serve.ranges import file_answer
from beavervision.serve.schema import (
    ExpressionOut,
    Health,
    JobOut,
    JobsOut,
    LipsyncSettings,
    ModelOut,
    ProblemOut,
    SpeechOut,
    SpeechRequest,
    StatusOut,
    VoiceOut,
    WebhooksOut,
    file_field,
    form_body,
    whole_schema,
)
from beavervision.serve.service import Service
from beavervision.serve.telemetry import Span, Traces
from beavervision.serve.upload import IdempotencyKey, Intake
from beavervision.serve.waiting import POLL_S, ended, preferred
from beavervision.serve.who import Owner, origins, owner_of

if TYPE_CHECKING:
    from beavervision.serve.live import Rooms

_API = "/api/v1"
_LIPSYNC = f"{_API}/lipsync"
SESSIONS = f"{_API}/sessions"
_KEEP_ALIVE_S = 15.0
_JSON_BYTES = 1 << 16
_SETTINGS_BYTES = 1 << 20  # phones are many
_LOG = logging.getLogger("beavervision.serve")

JobId = Annotated[str, Path(pattern=r"^[0-9a-f]{24}$", description="The id of a job.")]
_WRONG: dict[int | str, dict[str, Any]] = {
    status: {
        "description": "What is wrong, and what to do.",
        "content": {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/ProblemOut"}}},
    }
    for status in ("4XX", "5XX")
}
_FORM = form_body(
    {
        "avatar": {
            "type": "string",
            "description": "The id of an avatar. Either this or video.",
            "examples": ["92f5f494a7aae89fdd398f2f"],
        },
        "video": file_field("A video or picture of the face. Either this or avatar."),
        "text": {
            "type": "string",
            "description": "What to say. Either this or audio.",
            "examples": ["Hello there."],
        },
        "audio": file_field("Recorded speech to follow."),
        "settings": whole_schema(LipsyncSettings),
        "webhook": {
            "type": "string",
            "maxLength": 2000,
            "description": "An https address that is told of the job's end; see docs/service.md.",
            "examples": ["https://example.org/told"],
        },
        "consent": {
            "type": "boolean",
            "examples": [True],
            "description": "You have the right to use this face and voice. Required unless configured off.",
        },
    },
    anyOf=[{"required": ["video"]}, {"required": ["avatar"]}],
)


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        document = super().openapi()
        # FastAPI would describe a model of another media type as JSON
        document["components"]["schemas"]["ProblemOut"] = ProblemOut.model_json_schema()
        key = {
            "type": "http",
            "scheme": "bearer",
            "description": "An API key. Where the service has none, none is needed.",
        }
        document["components"]["securitySchemes"] = {"key": key}
        document["security"] = [{"key": []}, {}]
        return document


def create_app(service: Service) -> FastAPI:
    """The application. It neither starts nor stops the workers of `service`."""
    app = _App(
        title="BeaverVision",
        version="1",
        description="Give a face speech: text or sound plus a face in, a video of that face saying it out.",
        openapi_url=f"{_API}/openapi.json",
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        responses=_WRONG,
    )
    app.state.service = service
    _handle_errors(app)
    intake = Intake(service.settings.serve_max_upload_mb << 20)
    _add_jobs(app, service, intake)
    add_avatars(app, service, intake)
    add_previews(app, service)
    _add_facts(app, service)
    app.state.rooms = _add_live(app, service, intake)
    add_pages(app)
    app.add_middleware(_Edge, traces=service.traces)
    allowed = origins(service)
    if allowed:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Prefer", "Range"],
            expose_headers=["Location", "Link", "Retry-After", "Content-Range", "Preference-Applied"],
        )
    return app


def _add_live(app: FastAPI, service: Service, intake: Intake) -> Rooms | None:
    """The live sessions; None where what they need is not installed, which their address then tells."""
    try:
        from beavervision.serve.live import add_live
    except ModuleNotFoundError as error:
        if (missing := error.name or "") not in ("aiortc", "aioice", "websockets"):
            raise

        @app.api_route(SESSIONS, methods=["GET", "POST"], dependencies=[Depends(owner_of)], include_in_schema=False)
        def sessions() -> None:
            detail = f"Live sessions need {missing}. Install it with: pip install 'beavervision[live]'"
            raise Problem(501, "not_installed", detail)

        return None
    return add_live(app, service, intake)


# Jobs --------------------------------------------------------------------------------------------


def _add_jobs(app: FastAPI, service: Service, intake: Intake) -> None:
    settings, table = service.settings, service.place.table
    field_bytes = {
        "avatar": 64,
        "text": settings.serve_max_text_chars * 4,
        "settings": _SETTINGS_BYTES,
        "consent": 16,
        "webhook": 2048,
    }

    def shown(job: Job, request: Request) -> JobOut:
        return service.shown(job, str(request.base_url))

    @app.post(_LIPSYNC, openapi_extra=_FORM, responses={202: {"model": JobOut, "description": "It is not done yet."}})
    async def lipsync(
        request: Request,
        who: Owner,
        response: Response,
        prefer: Annotated[str, Header(max_length=200, description="respond-async, or wait=SECONDS")] = "",
        idempotency_key: IdempotencyKey = None,
    ) -> JobOut:
        """Make a face say a text or follow recorded speech.

        Answers with the job, and in it the address of the video, if that is done within the time that the service lets
        requests wait; else 202, and the job's address in Location.
        """
        await run_in_threadpool(service.admit)
        with service.scratch() as folder:
            upload = await intake.receive(request, folder, field_bytes)
            address = request.client.host if request.client else ""
            job = await run_in_threadpool(service.accept, upload, who, address, idempotency_key, str(request.base_url))
        asynchronous, wait_s = preferred(prefer, settings.serve_wait_s)
        job = await ended(service, job, request, wait_s)
        if job.state is State.FAILED:
            raise problems.of_code(job.error_code or "error", job.error_message or "", job=f"{_API}/jobs/{job.id}")
        if job.state is State.CANCELLED:
            raise Problem(409, "cancelled", "The job was cancelled.", job=f"{_API}/jobs/{job.id}")
        response.headers["Location"] = f"{_API}/jobs/{job.id}"
        if asynchronous:
            response.headers["Preference-Applied"] = "respond-async"
        response.status_code = 200 if job.ended else 202
        return shown(job, request)

    @app.get(f"{_API}/jobs")
    def jobs(
        request: Request,
        who: Owner,
        state: State | None = None,
        limit: Annotated[int, Query(ge=1, le=200)] = 50,
        before: Annotated[float | None, Query(allow_inf_nan=False, description="As `next` says.")] = None,
    ) -> JobsOut:
        """Your jobs, newest first."""
        found = table.list(who, state=state, before_s=before, limit=limit)
        more = f"{_API}/jobs?limit={limit}&before={found[-1].created_s!r}" if len(found) == limit else None
        if more is not None and state is not None:
            more += f"&state={state}"
        return JobsOut(jobs=[shown(job, request) for job in found], next=more)

    @app.get(f"{_API}/jobs/{{job_id}}")
    def job(job_id: JobId, request: Request, who: Owner) -> JobOut:
        """A job: its state, how far it is, and the address of its video."""
        return shown(service.job(job_id, who), request)

    @app.post(f"{_API}/jobs/{{job_id}}/cancel")
    def cancel(job_id: JobId, request: Request, who: Owner) -> JobOut:
        """Stop a job and remove its files; a job that has ended stays as it is."""
        return shown(service.cancel(job_id, who), request)

    @app.delete(f"{_API}/jobs/{{job_id}}", status_code=204)
    def delete(job_id: JobId, who: Owner) -> None:
        """Stop a job if it has not ended, and remove everything of it."""
        service.delete(job_id, who)

    @app.get(
        f"{_API}/jobs/{{job_id}}/events",
        response_class=StreamingResponse,
        responses={200: {"content": {"text/event-stream": {}}}},
    )
    async def events(job_id: JobId, request: Request, who: Owner) -> StreamingResponse:
        """Server-sent events `job`, each with the job as JSON, at every change until it has ended."""
        first = await run_in_threadpool(service.job, job_id, who)

        async def told() -> AsyncIterator[str]:
            current: Job | None = first
            before, told_s, number = "", time.monotonic(), 0
            with service.supervisor.news.watch(job_id) as bell:
                while current is not None:
                    facts = _plain(shown(current, request))
                    if (text := json.dumps(facts, sort_keys=True)) != before:
                        before, told_s, number = text, time.monotonic(), number + 1
                        yield f"event: job\nid: {number}\ndata: {text}\n\n"
                    elif time.monotonic() - told_s > _KEEP_ALIVE_S:
                        told_s = time.monotonic()
                        yield ": still here\n\n"
                    if current.ended or (service.draining.is_set() and current.state is State.QUEUED):
                        return
                    await bell.wait(POLL_S)
                    current = await run_in_threadpool(table.get, job_id)

        return StreamingResponse(told(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.head(f"{_API}/jobs/{{job_id}}/result", include_in_schema=False)
    @app.get(
        f"{_API}/jobs/{{job_id}}/result",
        response_class=FileResponse,
        responses={
            200: {"content": {"video/mp4": {}}},
            206: {"content": {"video/mp4": {}}, "description": "The range that was asked for."},
        },
    )
    def result(
        job_id: JobId,
        request: Request,
        expires: Annotated[int | None, Query(ge=0, lt=2**53)] = None,
        signature: Annotated[str | None, Query(max_length=64)] = None,
    ) -> FileResponse:
        """The video. A signed link needs no API key; ranges are answered."""
        path = f"{_API}/jobs/{job_id}/result"
        if expires is None and signature is None:
            found = service.job(job_id, owner_of(request))
        else:
            if not service.links.holds(path, expires or 0, signature or ""):
                raise Problem(403, "link_invalid", "This link was not made here, or was changed. Get it from the job.")
            if time.time() >= (expires or 0):
                raise Problem(403, "link_expired", "This link has expired. Get a new one from the job.")
            known = table.get(job_id)
            if known is None:
                raise Problem(410, "gone", "The job was deleted or has expired. Send it again.")
            found = known
        return file_answer(
            request,
            service.result(found),
            media_type="video/mp4",
            filename=f"{job_id}.mp4",
            content_disposition_type="inline",
            headers={"Cache-Control": "private, no-store"},
        )

    @app.get(f"{_API}/jobs/{{job_id}}/report")
    def report(job_id: JobId, who: Owner) -> dict[str, Any]:
        """What was done, and how fast: the stages' times, the face's track, the speech."""
        found = service.job(job_id, who)
        if found.report is None:
            raise Problem(409, "no_result", f"The job is {found.state}: it has no report. Look at its resource.")
        return found.report


def _plain(shown: JobOut) -> dict[str, Any]:
    """A job for events: without the link, which would differ at every look; it is told with the end of the job."""
    leave_out = {"video_url_expires"} if shown.video_url else {"video_url", "video_url_expires"}
    return shown.model_dump(mode="json", exclude=leave_out)


# What there is -----------------------------------------------------------------------------------


def _add_facts(app: FastAPI, service: Service) -> None:
    known = [Depends(owner_of)]

    @app.get(f"{_API}/voices", dependencies=known)
    def voices() -> list[VoiceOut]:
        """The voices; those that cannot be used here say why in `unavailable`."""
        return service.voices()

    @app.get(f"{_API}/expressions", dependencies=known)
    def expressions() -> list[ExpressionOut]:
        """The names of expressions and controls, custom ones included."""
        return service.expressions()

    @app.get(f"{_API}/models", dependencies=known)
    def models() -> list[ModelOut]:
        """The models with their licences."""
        return service.models()

    @app.post(
        f"{_API}/speech",
        dependencies=known,
        response_model=SpeechOut,
        responses={200: {"content": {"audio/wav": {}}, "description": "JSON, or with Accept: audio/wav a WAV file."}},
    )
    def speech(wanted: SpeechRequest, accept: Annotated[str, Header()] = "") -> Any:
        """Speak a text: the sound, and when each speech sound is heard."""
        said = service.speak(wanted)
        if accept.strip().lower().startswith("audio/wav"):
            return Response(base64.b64decode(said.audio_base64), media_type="audio/wav")
        return said

    @app.get(f"{_API}/webhooks")
    def webhooks(who: Owner) -> WebhooksOut:
        """The secret that your webhooks are signed with."""
        return WebhooksOut(secret=service.webhook_secret(who))

    @app.get(f"{_API}/status", dependencies=known)
    def status() -> StatusOut:
        """Figures of the service, all measured."""
        rooms: Rooms | None = app.state.rooms
        return service.status(0 if rooms is None else rooms.open_now)

    @app.get("/metrics", dependencies=known, response_class=Response)
    def prometheus() -> Response:
        """Metrics for Prometheus."""
        metrics.JOBS_QUEUED.set(service.place.table.counts()[State.QUEUED])
        return Response(exposition.page(service.place.workers), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/healthz")
    def healthz() -> Health:
        """The process answers."""
        return Health(status="ok")

    @app.get("/readyz")
    def readyz() -> Health:
        """Jobs can be taken: the database answers, a worker is loaded, and the service is not being stopped."""
        service.admit()
        if not any(worker.ready for worker in service.supervisor.workers()):
            raise Problem(
                503, "starting", "No worker is ready yet. Try again in a moment.", headers={"Retry-After": "2"}
            )
        return Health(status="ok")


# Errors and the edge -----------------------------------------------------------------------------


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> JSONResponse:
        return error.response()

    @app.exception_handler(BeaverVisionError)
    async def known(request: Request, error: BeaverVisionError) -> JSONResponse:
        return problems.of_error(error, app.state.service.settings.serve_folder).response()

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> JSONResponse:
        return Problem(400, "malformed", "The request broke off. Send it again.").response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problems.of_fields(list(error.errors()), "request").response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        codes = {
            400: ("malformed", "The body is no JSON. Send JSON in UTF-8."),
            404: ("no_page", "There is nothing at this address."),
            405: ("method", "This method is not known here."),
        }
        code, detail = codes.get(error.status_code, ("http", str(error.detail)))
        detail += " The document /api/v1/openapi.json has all addresses."
        return Problem(error.status_code, code, detail, headers=error.headers).response()

    @app.exception_handler(SQLAlchemyError)
    async def database(request: Request, error: SQLAlchemyError) -> JSONResponse:
        _LOG.error("the database does not answer: %s", error)
        detail = "The database does not answer. Try again in a moment."
        return Problem(503, "database", detail, headers={"Retry-After": "5"}).response()

    @app.exception_handler(Exception)
    async def unknown(request: Request, error: Exception) -> JSONResponse:
        return Problem(500, "error", "Something unexpected happened. Please report it, with the time.").response()


class _Edge:
    """Limits small bodies, sets safe headers, and measures every answer."""

    def __init__(self, app: ASGIApp, traces: Traces) -> None:
        self._app, self._traces = app, traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_s = time.perf_counter()
        status = 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                safe = [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message["headers"], *safe]}
            await send(message)

        refused = _oversized(scope)
        parent = dict(scope["headers"]).get(b"traceparent", b"").decode("latin-1")
        with ExitStack() as stack:
            span = Span()
            if scope["method"] in ("POST", "DELETE"):  # what only looks is asked for too often
                span = stack.enter_context(self._traces.span(_method(scope), parent, server=True))
            try:
                if refused is None:
                    await self._app(scope, receive, sent)
                else:
                    await refused.response()(scope, receive, sent)
            finally:
                route = getattr(scope.get("route"), "path", "none")
                seconds = time.perf_counter() - began_s
                metrics.HTTP_SECONDS.labels(_method(scope), route, str(status)).observe(seconds)
                span.set("http.route", route)
                span.set("http.response.status_code", status)
                _LOG.info("%s %s %d", _method(scope), route, status, extra={"http": _told(scope, status, seconds)})


def _told(scope: Scope, status: int, seconds: float) -> dict[str, Any]:
    """A request for the log. Not its query: that may be a signature."""
    return {
        "requestMethod": _method(scope),
        "requestUrl": scope["path"],
        "status": status,
        "latency": f"{seconds:.6f}s",
        "remoteIp": scope["client"][0] if scope.get("client") else "",
        "protocol": f"HTTP/{scope.get('http_version', '')}",
    }


def _method(scope: Scope) -> str:
    return (
        scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS") else "other"
    )


def _oversized(scope: MutableMapping[str, Any]) -> Problem | None:
    """What is wrong with the length of a body that is no upload."""
    headers = dict(scope["headers"])
    form = headers.get(b"content-type", b"").lower().startswith(b"multipart/form-data")
    if scope["path"] in (_LIPSYNC, AVATARS, PREVIEW) or (scope["path"] == SESSIONS and form):
        return None
    if b"transfer-encoding" in headers:
        return Problem(411, "length_required", "Send this request with a Content-Length.")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length) > _JSON_BYTES:
        return Problem(413, "too_large", f"The body may have {_JSON_BYTES} bytes. Shorten it.")
    return None
