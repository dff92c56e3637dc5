"""Files that appear whole or not at all, and JSON."""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from beavervision.errors import InputError, OutputError, UsageError

_PART_BYTES = 60


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: what is there at the end takes its place, and after an error nothing is left.

    Where `path` is a symbolic link, it is the file that the link leads to.

    Raises:
        OutputError: `path` is a folder, a device, a pipe or a socket, or the system refuses.
    """
    try:
        place = place_of(path)
        part = partial(place)
        try:
            yield part
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document, making its folder; errors as of :func:`whole`."""
    with whole(path) as part:
        part.parent.mkdir(parents=True, exist_ok=True)
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


def place_of(path: Path) -> Path:
    """The file that is meant by an output's name: `path`, or what it leads to as a symbolic link.

    Raises:
        OutputError: it is a folder, a device, a pipe or a socket, over which no file may be renamed.
        OSError: the system refuses.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise OutputError(f"{path} is a folder. Name a file in it.")
        if not stat.S_ISREG(mode):
            raise OutputError(f"{path} is a device or a pipe. Name a file.")
    return path.resolve() if path.is_symlink() else path


def check_apart(inputs: Iterable[object], outputs: Iterable[Path | str | None]) -> None:
    """Find out whether an output would replace an input or another output. What is no name of a file has none.

    Raises:
        UsageError: it would.
    """
    read = {os.path.realpath(path) for path in inputs if isinstance(path, (str, Path)) and "\0" not in str(path)}
    written: set[str] = set()
    for path in (os.path.realpath(path) for path in outputs if path is not None):
        if path in read:
            raise UsageError(f"{path} would be written over itself. Give the output another name.")
        if path in written:
            raise UsageError(f"{path} is named as two outputs. Give each a name of its own.")
        written.add(path)


def check_place(path: Path) -> None:
    """Find out, before any work, whether a file can be made at `path`.

    Raises:
        OutputError: as :func:`whole`, or the folder is missing.
    """
    try:
        trial = partial(place_of(path))
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise unwritable(path, error) from error


def partial(path: Path) -> Path:
    """A hidden name of its own in the folder of `path`, with the same suffix if that is no longer than a suffix is."""
    return path.with_name(f".{_cut(path.stem)}.{secrets.token_hex(4)}.part{_cut(path.suffix)}")


def _cut(name: str) -> str:
    """As much of a name as lets two such parts and some more fit into the 255 bytes that systems allow."""
    return name.encode(errors="ignore")[:_PART_BYTES].decode(errors="ignore")


def unreadable(name: Path | str, error: OSError) -> InputError:
    return InputError(f"{name} cannot be read: {error.strerror}. Check the name and the rights.")


def unwritable(path: Path, error: OSError) -> OutputError:
    return OutputError(f"{path} cannot be written: {error.strerror}. Check the folder, the rights and the space left.")
