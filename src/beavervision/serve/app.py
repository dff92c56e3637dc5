"""The API, version 1, as an ASGI application."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import time
from collections.abc import AsyncIterator, MutableMapping
from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from beavervision import metrics
from beavervision.errors import BeaverVisionError
from beavervision.serve import exposition, problems
from beavervision.serve.access import is_loopback
from beavervision.serve.jobs import Job, State
from beavervision.serve.problems import Problem
from beavervision.serve.schema import (
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
    job_out,
)
from beavervision.serve.service import Service
from beavervision.serve.upload import receive

_API = "/api/v1"
_LIPSYNC = f"{_API}/lipsync"
_POLL_S = 0.1
_KEEP_ALIVE_S = 15.0
_JSON_BYTES = 1 << 16
_SETTINGS_BYTES = 1 << 16
_UPLOADS = 16  # at once
_UPLOAD_S = 600  # for one
_LOG = logging.getLogger("beavervision.serve")

JobId = Annotated[str, Path(pattern=r"^[0-9a-f]{24}$", description="The id of a job.")]
_WRONG: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "What is wrong, and what to do.", "content": {problems.MEDIA_TYPE: {}}, "model": ProblemOut},
    "5XX": {"description": "What is wrong, and what to do.", "content": {problems.MEDIA_TYPE: {}}, "model": ProblemOut},
}
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["video"],
                    "additionalProperties": False,
                    "properties": {
                        "video": {
                            "type": "string",
                            "format": "binary",
                            "description": "A video or picture of the face.",
                        },
                        "text": {"type": "string", "description": "What to say. Either this or audio."},
                        "audio": {"type": "string", "format": "binary", "description": "Recorded speech to follow."},
                        "settings": LipsyncSettings.model_json_schema(),
                        "consent": {
                            "type": "boolean",
                            "description": "You have the right to use this face and voice. Required unless configured off.",
                        },
                    },
                },
                "encoding": {"settings": {"contentType": "application/json"}},
            }
        },
    }
}


def create_app(service: Service) -> FastAPI:
    """The application. It neither starts nor stops the workers of `service`."""
    app = FastAPI(
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
    _add_jobs(app, service)
    _add_facts(app, service)
    app.add_middleware(_Edge)
    origins = _origins(service)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Prefer", "Range"],
            expose_headers=["Location", "Retry-After", "Content-Range", "Preference-Applied"],
        )
    return app


def _origins(service: Service) -> list[str]:
    return [origin.strip() for origin in service.settings.serve_cors_origins.split(",") if origin.strip()]


def _owner(request: Request) -> str:
    """Who asks.

    Raises:
        Problem: nobody who may.
    """
    service: Service = request.app.state.service
    if service.keys is not None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        owner = service.keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        if owner is None:
            detail = "Send an API key that is known here: Authorization: Bearer KEY."
            raise Problem(401, "no_key", detail, headers={"WWW-Authenticate": "Bearer"})
        return owner
    if not service.settings.serve_open:
        # Without keys any web page that the user of this machine opens could call the service: names that resolve to
        # it and foreign origins are kept out.
        if not (request.client is not None and is_loopback(request.client.host)):
            raise Problem(403, "not_local", "Without API keys the service answers this machine only. Make a key first.")
        if not is_loopback(request.url.hostname or ""):
            raise Problem(403, "not_local", "Without API keys address the service as 127.0.0.1 or localhost.")
    origin = request.headers.get("origin")
    if origin and origin not in _origins(service) and urlsplit(origin).netloc != request.headers.get("host"):
        raise Problem(403, "origin", "This web origin may not call the service. Name it in serve_cors_origins.")
    return "local"


Owner = Annotated[str, Depends(_owner)]


# Jobs --------------------------------------------------------------------------------------------


def _add_jobs(app: FastAPI, service: Service) -> None:
    settings, table = service.settings, service.place.table
    uploads = asyncio.Semaphore(_UPLOADS)
    field_bytes = {"text": settings.serve_max_text_chars * 4, "settings": _SETTINGS_BYTES, "consent": 16}

    def shown(job: Job, request: Request) -> JobOut:
        base = f"{_API}/jobs/{job.id}"
        if job.state is not State.SUCCEEDED:
            return job_out(job, base, None, None)
        query, expires_s = service.links.sign(f"{base}/result")
        public = (settings.serve_public_url or str(request.base_url)).rstrip("/")
        return job_out(job, base, f"{public}{base}/result?{query}", expires_s)

    async def ended(job: Job, request: Request, wait_s: float) -> Job:
        until_s = time.monotonic() + wait_s
        while not job.ended and time.monotonic() < until_s:
            if service.draining.is_set() and job.state is State.QUEUED:
                break
            if await request.is_disconnected():
                break
            await asyncio.sleep(_POLL_S)
            found = await run_in_threadpool(table.get, job.id)
            if found is None:
                raise Problem(404, "no_job", "The job was deleted while you waited for it.")
            job = found
        return job

    @app.post(_LIPSYNC, openapi_extra=_FORM, responses={202: {"model": JobOut, "description": "It is not done yet."}})
    async def lipsync(
        request: Request,
        who: Owner,
        response: Response,
        prefer: Annotated[str, Header(max_length=200, description="respond-async, or wait=SECONDS")] = "",
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
    ) -> JobOut:
        """Make a face say a text or follow recorded speech.

        Answers with the job, and in it the address of the video, if that is done within the time that the service lets
        requests wait; else 202, and the job's address in Location.
        """
        await run_in_threadpool(service.admit)
        if uploads.locked():
            raise Problem(503, "busy", "Too many uploads at once. Try again in a moment.", headers={"Retry-After": "5"})
        async with uploads:
            with service.scratch() as folder:
                try:
                    async with asyncio.timeout(_UPLOAD_S):
                        upload = await receive(request, folder, settings.serve_max_upload_mb << 20, field_bytes)
                except TimeoutError as error:
                    raise Problem(408, "too_slow", f"The upload took longer than {_UPLOAD_S} s. Send less.") from error
                address = request.client.host if request.client else ""
                job = await run_in_threadpool(service.accept, upload, who, address, idempotency_key)
        asynchronous, wait_s = _preferred(prefer, settings.serve_wait_s)
        job = await ended(job, request, wait_s)
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

    @app.get(f"{_API}/jobs/{{job_id}}/events", response_class=StreamingResponse)
    async def events(job_id: JobId, request: Request, who: Owner) -> StreamingResponse:
        """Server-sent events `job`, each with the job as JSON, at every change until it has ended."""
        first = await run_in_threadpool(service.job, job_id, who)

        async def told() -> AsyncIterator[str]:
            current: Job | None = first
            before, told_s, number = "", time.monotonic(), 0
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
                await asyncio.sleep(_POLL_S)
                current = await run_in_threadpool(table.get, job_id)

        return StreamingResponse(told(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    @app.head(f"{_API}/jobs/{{job_id}}/result", include_in_schema=False)
    @app.get(f"{_API}/jobs/{{job_id}}/result", response_class=FileResponse)
    def result(
        job_id: JobId,
        request: Request,
        expires: Annotated[int | None, Query(ge=0, lt=2**53)] = None,
        signature: Annotated[str | None, Query(max_length=64)] = None,
    ) -> FileResponse:
        """The video. A signed link needs no API key; ranges are answered."""
        path = f"{_API}/jobs/{job_id}/result"
        if expires is None and signature is None:
            found = service.job(job_id, _owner(request))
        else:
            if not service.links.holds(path, expires or 0, signature or ""):
                raise Problem(403, "link_invalid", "This link was not made here, or was changed. Get it from the job.")
            if time.time() >= (expires or 0):
                raise Problem(403, "link_expired", "This link has expired. Get a new one from the job.")
            known = table.get(job_id)
            if known is None:
                raise Problem(410, "gone", "The job was deleted or has expired. Send it again.")
            found = known
        return FileResponse(
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


def _preferred(prefer: str, limit_s: float) -> tuple[bool, float]:
    """Whether the client wants to be answered at once, and how long the request may wait (RFC 7240)."""
    wishes = dict(part.strip().lower().partition("=")[::2] for part in prefer.replace(";", ",").split(","))
    if "respond-async" in wishes:
        return True, 0.0
    wait = wishes.get("wait", "").strip('"')
    return False, min(int(wait), limit_s) if wait.isdecimal() and len(wait) < 9 else limit_s


# What there is -----------------------------------------------------------------------------------


def _add_facts(app: FastAPI, service: Service) -> None:
    known = [Depends(_owner)]

    @app.get(f"{_API}/voices", dependencies=known)
    def voices() -> list[VoiceOut]:
        """The voices; those that cannot be used here say why in `unavailable`."""
        return service.voices()

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

    @app.get(f"{_API}/status", dependencies=known)
    def status() -> StatusOut:
        """Figures of the service, all measured."""
        return service.status()

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
        return problems.of_error(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problems.of_fields(list(error.errors()), "request").response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        codes = {
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

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

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
        try:
            if refused is None:
                await self._app(scope, receive, sent)
            else:
                await refused.response()(scope, receive, sent)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            seconds = time.perf_counter() - began_s
            metrics.HTTP_SECONDS.labels(_method(scope), route, str(status)).observe(seconds)


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in ("GET", "HEAD", "POST", "DELETE", "OPTIONS") else "other"


def _oversized(scope: MutableMapping[str, Any]) -> Problem | None:
    """What is wrong with the length of a body that is no upload."""
    if scope["path"] == _LIPSYNC:
        return None
    headers = dict(scope["headers"])
    if b"transfer-encoding" in headers:
        return Problem(411, "length_required", "Send this request with a Content-Length.")
    length = headers.get(b"content-length", b"0")
    if not length.isdigit() or int(length) > _JSON_BYTES:
        return Problem(413, "too_large", f"The body may have {_JSON_BYTES} bytes. Shorten it.")
    return None
