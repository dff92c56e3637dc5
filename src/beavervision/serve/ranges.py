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


class _Answer(FileResponse):
    """Gives the `ranges`, whatever the request has for them; all of the file if there are none."""

    ranges: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [pair for pair in scope["headers"] if pair[0] != b"range"]
        if self.ranges is not None:
            headers.append((b"range", self.ranges.encode()))
        await super().__call__({**scope, "headers": headers}, receive, send)


def file_answer(request: Request, path: Path, **how: Any) -> FileResponse:
    """The file, or as much of the ranges that are asked for as it has.

    A Range that is none, or that is for another version of the file, is not minded (RFC 9110, 13.1.5 and 14.2).

    Raises:
        Problem (416): all ranges begin beyond the end.
    """
    answer = _Answer(path, stat_result=path.stat(), **how)
    asked, version = request.headers.get("range", ""), request.headers.get("if-range")
    if not _RANGES.fullmatch(asked) or version not in (None, answer.headers["etag"], answer.headers["last-modified"]):
        return answer
    size = int(answer.headers["content-length"])
    there: list[str] = []
    for first, last, final in re.findall(_ONE, asked):
        if last and int(last) < int(first):
            return answer
        if int(first) < size if first else int(final):
            there.append(f"{first}-{last}" if first else f"-{final}")
    if not there:
        headers = {"Content-Range": f"bytes */{size}"}
        raise Problem(416, "range", f"The file has {size} bytes. Ask for some of these.", headers=headers)
    answer.ranges = f"bytes={','.join(there)}"
    return answer
