"""The route of previews: how an expression looks on a face."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError

from beavervision.serve.problems import Problem, of_validation
from beavervision.serve.schema import FACE, PreviewSettings, file_field, form_body
from beavervision.serve.service import Service
from beavervision.serve.upload import Intake, Upload
from beavervision.serve.who import Owner

PREVIEW = "/api/v1/expressions/preview"
_PICTURE_BYTES = 4 << 20
_FIELD_BYTES = {"expression": 4000, "face": 64, "view": 16, "side_px": 8}
_FORM = form_body(
    {
        "video": file_field("A picture of the face, of up to 4 MiB and 1280 pixels a side."),
        "expression": {"type": "string", "maxLength": 1000, "description": "As in jobs.", "examples": ["happy:0.6"]},
        "face": {"type": "string", "pattern": FACE, "description": "Which face, as in jobs.", "examples": ["left"]},
        "view": {"type": "string", "enum": ["picture", "face"]},
        "side_px": {"type": "integer", "minimum": 64, "maximum": 1280},
    },
    required=["video", "expression"],
)


def add_previews(app: FastAPI, service: Service) -> None:
    intake = Intake(_PICTURE_BYTES)

    @app.post(
        PREVIEW,
        response_class=Response,
        openapi_extra=_FORM,
        responses={200: {"content": {"image/jpeg": {}}, "description": "The picture with the expression (JPEG)."}},
    )
    async def preview(request: Request, who: Owner) -> Response:
        """See an expression on a face. Nothing is kept; `auto` shows nothing, for it needs words."""
        with service.scratch() as folder:
            upload = await intake.receive(request, folder, _FIELD_BYTES, ("video",))
            data = await run_in_threadpool(_drawn, service, upload)
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "no-store"})


def _drawn(service: Service, upload: Upload) -> bytes:
    try:
        wanted = PreviewSettings.model_validate(upload.fields)
    except ValidationError as error:
        raise of_validation(error, "form") from error
    path = upload.files.get("video")
    if path is None:
        raise Problem(422, "usage", "There is no face: send a picture in the field video.")
    look = service.look(wanted.expression)
    return service.previewer.show(path, _digest(path), wanted.face, look, wanted.view, wanted.side_px)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
