"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beavervision.errors import OutputError


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


def partial(path: Path) -> Path:
    """A hidden name of its own in the folder of `path`, with the same suffix."""
    return path.with_name(f".{path.stem[:100]}.{secrets.token_hex(4)}.part{path.suffix}")


def unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written: {error.strerror}. Check the folder, the rights and the space left.")
