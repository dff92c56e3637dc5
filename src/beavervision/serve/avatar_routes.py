"""The routes of avatars: faces that are uploaded once and used by many jobs."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated

from fastapi import FastAPI, Header, Path, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse

from beavervision.serve import problems
from beavervision.serve.jobs import State
from beavervision.serve.problems import Problem
from beavervision.serve.ranges import file_answer
from beavervision.serve.schema import FACE, AvatarOut, file_field, form_body
from beavervision.serve.service import Service
from beavervision.serve.upload import IdempotencyKey, Intake
from beavervision.serve.waiting import ended, preferred
from beavervision.serve.who import Owner

AVATARS = "/api/v1/avatars"
_FIELD_BYTES = {"name": 400, "face": 64, "consent": 16}
_FORM = form_body(
    {
        "video": file_field("A video or picture of the face."),
        "name": {"type": "string", "maxLength": 100, "description": "For your own use.", "examples": ["Ann"]},
        "face": {"type": "string", "pattern": FACE, "description": "Which face, as in jobs.", "examples": ["left"]},
        "consent": {
            "type": "boolean",
            "examples": [True],
            "description": "You have the right to use this face. Required unless configured off.",
        },
    },
    required=["video"],
)
AvatarId = Annotated[str, Path(pattern=r"^[0-9a-f]{24}$", description="The id of an avatar.")]


def add_avatars(app: FastAPI, service: Service, intake: Intake) -> None:
    avatars = service.avatars

    @app.post(
        AVATARS,
        status_code=201,
        openapi_extra=_FORM,
        responses={202: {"model": AvatarOut, "description": "It is not ready yet."}},
    )
    async def new_avatar(
        request: Request,
        who: Owner,
        response: Response,
        prefer: Annotated[str, Header(max_length=200, description="respond-async, or wait=SECONDS")] = "",
        idempotency_key: IdempotencyKey = None,
    ) -> AvatarOut:
        """Keep a face for later jobs: it is looked at once, now."""
        await run_in_threadpool(service.admit)
        with service.scratch() as folder:
            upload = await intake.receive(request, folder, _FIELD_BYTES, ("video",))
            address = request.client.host if request.client else ""
            avatar_id, job = await run_in_threadpool(avatars.accept, upload, who, address, idempotency_key)
        asynchronous, wait_s = preferred(prefer, service.settings.serve_wait_s)
        job = await ended(service, job, request, wait_s)
        if job.state is State.FAILED:
            with suppress(Problem):  # it was removed already
                await run_in_threadpool(avatars.delete, avatar_id, who)
            raise problems.of_code(job.error_code or "error", job.error_message or "", job=f"/api/v1/jobs/{job.id}")
        if job.state is State.CANCELLED:
            raise Problem(409, "cancelled", "The avatar was deleted.")
        response.headers["Location"] = f"{AVATARS}/{avatar_id}"
        if asynchronous:
            response.headers["Preference-Applied"] = "respond-async"
        response.status_code = 201 if job.ended else 202
        return await run_in_threadpool(avatars.shown, await run_in_threadpool(avatars.get, avatar_id, who))

    @app.get(AVATARS)
    def list_avatars(who: Owner) -> list[AvatarOut]:
        """Your avatars, newest first."""
        return avatars.list(who)

    @app.get(f"{AVATARS}/{{avatar_id}}")
    def one_avatar(avatar_id: AvatarId, who: Owner) -> AvatarOut:
        """An avatar; `ready` says that jobs can use it."""
        return avatars.shown(avatars.get(avatar_id, who))

    @app.get(f"{AVATARS}/{{avatar_id}}/picture", response_class=FileResponse)
    def avatar_picture(avatar_id: AvatarId, request: Request, who: Owner) -> FileResponse:
        """A small picture of it (JPEG)."""
        headers = {"Cache-Control": "private, max-age=3600"}
        return file_answer(request, avatars.picture(avatar_id, who), media_type="image/jpeg", headers=headers)

    @app.delete(f"{AVATARS}/{{avatar_id}}", status_code=204)
    def delete_avatar(avatar_id: AvatarId, who: Owner) -> None:
        """Remove it and its files. Jobs that wait for it will fail; those that are done keep their results."""
        avatars.delete(avatar_id, who)
