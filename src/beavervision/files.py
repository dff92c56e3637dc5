"""Files that appear whole or not at all, and JSON."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beavervision.errors import InputError, OutputError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: what is there at the end takes its place, and after an error nothing is left.

    Raises:
        OutputError: the system refuses.
    """
    part = partial(path)
    try:
        try:
            yield part
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document, making its folder; errors as of :func:`whole`."""
    with whole(path) as part:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path, limit_bytes: int) -> Any:
    """The JSON document in a file of at most `limit_bytes`.

    Raises:
        InputError: it cannot be read, is larger, or is no JSON.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise unreadable(path, error) from error
    if len(data) > limit_bytes:
        raise InputError(f"{path} is larger than {limit_bytes >> 10} KiB: it is not what was asked for.")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no JSON ({error}). Correct it.") from error


def partial(path: Path) -> Path:
    """A hidden name of its own in the folder of `path`, with the same suffix."""
    return path.with_name(f".{path.stem[:100]}.{secrets.token_hex(4)}.part{path.suffix}")


def unreadable(name: Path | str, error: OSError) -> InputError:
    return InputError(f"{name} cannot be read: {error.strerror}. Check the name and the rights.")


def unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written: {error.strerror}. Check the folder, the rights and the space left.")
