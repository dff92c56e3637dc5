"""Errors as the client sees them: problem+json (RFC 9457) with a stable code, and a detail that says what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError

from beavervision.errors import BeaverVisionError

MEDIA_TYPE = "application/problem+json"

# The HTTP status of the codes of beavervision.errors; of the others it is 500.
_STATUS = {
    "usage": 422,
    "input": 422,
    "media": 422,
    "no_face": 422,
    "no_audio": 422,
    "text": 422,
    "model": 422,
    "licence": 403,
    "output": 507,
    "device": 503,
    "interrupted": 503,
    "time_limit": 422,
}


# What pydantic says unclearly, by the type of its error.
_WORDS = {"extra_forbidden": "there is no such field", "missing": "it is required"}


class Problem(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, code: str, detail: str, *, headers: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail
        self.headers, self.more = headers, more

    def response(self) -> JSONResponse:
        document = {
            "type": f"urn:beavervision:problem:{self.code}",
            "title": HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": self.detail,
            "code": self.code,
            **self.more,
        }
        return JSONResponse(document, self.status, self.headers, MEDIA_TYPE)


def of_code(code: str, message: str, **more: Any) -> Problem:
    """What the failure of a job answers to the request that waits for it."""
    return Problem(_STATUS.get(code, 500), code, message, **more)


def of_error(error: BeaverVisionError, folder: Path) -> Problem:
    return of_code(error.code, without_folders(str(error), folder))


def without_folders(message: str, folder: Path) -> str:
    """A message that does not tell where a service has its `folder`."""
    told = re.sub(rf"{re.escape(str(folder))}\S*?/(video|audio|result|source|speech)(\.\w+)?", r"the \1", message)
    told = told.replace(str(folder), "")
    return told[:1].upper() + told[1:]


def of_fields(errors: list[Any], what: str) -> Problem:
    """From what pydantic says of a document or of parameters."""
    told = [
        {
            "field": ".".join(str(part) for part in error["loc"]) or what,
            "message": _WORDS.get(error["type"], error["msg"]),
        }
        for error in errors[:20]
    ]
    where = f"{what}: {told[0]['field']}" if errors[0]["loc"] else what
    detail = f"{where}: {told[0]['message']}. The document /api/v1/openapi.json has the fields that there are."
    return Problem(422, "invalid", detail, errors=told)


def of_validation(error: ValidationError, what: str) -> Problem:
    return of_fields(error.errors(include_url=False, include_context=False, include_input=False), what)
