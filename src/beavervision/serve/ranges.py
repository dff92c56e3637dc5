"""Files as answers, whole or in ranges."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastapi import Request
from fastapi.responses import FileResponse
from starlette.types import Receive, Scope, Send

from beavervision.serve.problems import Problem

_ONE = r"(\d{1,18})-(\d{0,18})|-(\d{1,18})"
_RANGES = re.compile(rf"bytes=\s*(?:{_ONE})(?:\s*,\s*(?:{_ONE}))*\s*")


class _Whole(FileResponse):
    """Takes no notice of a Range."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [pair for pair in scope["headers"] if pair[0] != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)


def file_answer(request: Request, path: Path, **how: Any) -> FileResponse:
    """The file, or the ranges of it that are asked for; a Range that is none is not minded (RFC 9110, 14.2).

    Raises:
        Problem (416): a range begins beyond the end.
    """
    asked = request.headers.get("range", "")
    if _RANGES.fullmatch(asked) is None:
        return _Whole(path, **how)
    size = path.stat().st_size
    for first, last, final in re.findall(_ONE, asked):
        if last and int(last) < int(first):
            return _Whole(path, **how)
        if int(first) >= size if first else int(final) == 0:
            headers = {"Content-Range": f"bytes */{size}"}
            raise Problem(416, "range", f"The file has {size} bytes. Ask for some of these.", headers=headers)
    return FileResponse(path, **how)
