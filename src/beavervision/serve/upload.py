"""A multipart request, written to disk as it comes: nothing of a file is held in memory, and every limit holds at once."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

from fastapi import Header
from fastapi.concurrency import run_in_threadpool
from fastapi.requests import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from beavervision.serve.problems import Problem

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FILES = ("video", "audio")
IdempotencyKey = Annotated[
    str | None, Header(min_length=1, max_length=200, description="Makes the request safe to repeat.")
]
_AT_ONCE = 16
_UPLOAD_S = 600  # for one
_FRAMING_BYTES = 1 << 16  # for boundaries and the headers of parts


@dataclass(frozen=True, slots=True)
class Upload:
    """What came: files by the name of their field, the other fields as text, and a digest of both."""

    files: dict[str, Path]
    fields: dict[str, str]
    fingerprint: str

    @property
    def consent(self) -> bool:
        """Whether the right to use the face was confirmed."""
        return self.fields.get("consent", "").strip().lower() in ("true", "1", "yes", "on")


class Intake:
    """Takes uploads, `_AT_ONCE` at a time, of `file_bytes` each."""

    def __init__(self, file_bytes: int) -> None:
        self._file_bytes = file_bytes
        self._places = asyncio.Semaphore(_AT_ONCE)

    async def receive(
        self, request: Request, folder: Path, field_bytes: dict[str, int], files: tuple[str, ...] = FILES
    ) -> Upload:
        """As :func:`receive`.

        Raises:
            Problem: as it, or there are too many at once, or it is too slow.
        """
        if self._places.locked():
            raise Problem(503, "busy", "Too many uploads at once. Try again in a moment.", headers={"Retry-After": "5"})
        async with self._places:
            try:
                async with asyncio.timeout(_UPLOAD_S):
                    return await receive(request, folder, self._file_bytes, field_bytes, files)
            except TimeoutError as error:
                raise Problem(408, "too_slow", f"The upload took longer than {_UPLOAD_S} s. Send less.") from error


async def receive(
    request: Request, folder: Path, file_bytes: int, field_bytes: dict[str, int], files: tuple[str, ...] = FILES
) -> Upload:
    """Write the files of a request into `folder`. `file_bytes` is for all files together, `field_bytes` for each field.

    Raises:
        Problem: no multipart, an unknown or repeated field, or more than the limits.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        fields = ", ".join((*files, *field_bytes))
        raise Problem(415, "not_multipart", f"Send multipart/form-data, as curl -F does. Its fields: {fields}.")
    whole_bytes = file_bytes + sum(field_bytes.values()) + _FRAMING_BYTES
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > whole_bytes:
        raise _too_large(file_bytes)
    parts = _Parts(folder, file_bytes, field_bytes, files)
    try:
        parser = MultipartParser(options[b"boundary"], parts.callbacks())
        taken = 0
        async for chunk in request.stream():
            taken += len(chunk)
            if taken > whole_bytes:
                raise _too_large(file_bytes)
            await run_in_threadpool(parser.write, chunk)
        parser.finalize()
        return parts.upload()
    except FormParserError as error:
        raise Problem(400, "malformed", "The multipart body is malformed. Send it again.") from error
    finally:
        parts.close()


def _too_large(file_bytes: int) -> Problem:
    return Problem(413, "too_large", f"The files may have {file_bytes >> 20} MiB together. Cut or compress them first.")


@dataclass(slots=True)
class _Part:
    name: str
    digest: str = ""
    value: bytearray = field(default_factory=bytearray)


class _Parts:
    def __init__(self, folder: Path, file_bytes: int, field_bytes: dict[str, int], files: tuple[str, ...]) -> None:
        self._folder, self._field_bytes, self._files = folder, field_bytes, files
        self._left_bytes, self._limit_bytes = file_bytes, file_bytes
        self._done: dict[str, _Part] = {}
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._part: _Part | None = None
        self._file: IO[bytes] | None = None
        self._hash = hashlib.sha256()
        self._whole = False

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._open,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finish,
        }

    def upload(self) -> Upload:
        if not self._whole:
            raise Problem(400, "malformed", "The multipart body ends too early. Send it again.")
        files = {name: self._folder / name for name in self._files if name in self._done}
        digest = hashlib.sha256()
        for name in sorted(self._done):
            digest.update(f"{name}={self._done[name].digest}\n".encode())
        try:
            fields = {name: part.value.decode() for name, part in self._done.items() if name not in files}
        except UnicodeDecodeError as error:
            raise Problem(400, "malformed", "A field is no UTF-8 text. Send it as UTF-8.") from error
        return Upload(files, fields, digest.hexdigest())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._disposition = b""

    def _header_end(self) -> None:
        name, value = (bytes(part) for part in self._header)
        self._header = (bytearray(), bytearray())
        if name.lower() == b"content-disposition":
            self._disposition = value

    def _open(self) -> None:
        name = parse_options_header(self._disposition)[1].get(b"name", b"").decode("utf-8", "replace")
        known = (*self._files, *self._field_bytes)
        if name not in known:
            raise Problem(422, "unknown_field", f"There is no field {name[:40]!r}. There are: {', '.join(known)}.")
        if name in self._done:
            raise Problem(422, "repeated_field", f"The field {name} came twice. Send it once.")
        self._part, self._hash = _Part(name), hashlib.sha256()
        if name in self._files:
            try:
                self._file = (self._folder / name).open("xb")
            except OSError as error:
                raise _no_space() from error

    def _data(self, data: bytes, start: int, end: int) -> None:
        assert self._part is not None
        piece = memoryview(data)[start:end]
        self._hash.update(piece)
        if self._file is None:
            limit = self._field_bytes[self._part.name]
            if len(self._part.value) + len(piece) > limit:
                raise Problem(413, "too_large", f"The field {self._part.name} may have {limit} bytes. Shorten it.")
            self._part.value += piece
            return
        self._left_bytes -= len(piece)
        if self._left_bytes < 0:
            raise _too_large(self._limit_bytes)
        try:
            self._file.write(piece)
        except OSError as error:
            raise _no_space() from error

    def _end(self) -> None:
        assert self._part is not None
        try:
            self.close()
        except OSError as error:
            raise _no_space() from error
        self._part.digest = self._hash.hexdigest()
        self._done[self._part.name] = self._part

    def _finish(self) -> None:
        self._whole = True


def _no_space() -> Problem:
    return Problem(507, "storage", "The upload cannot be stored: no space is left. Try again later.")
