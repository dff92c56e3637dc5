"""Where uploads and results lie: named blobs in groups, one group for each job."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from beavervision.errors import OutputError

_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}(/[A-Za-z0-9_-]{1,64}(\.[a-z0-9]{1,8})?){0,2}")


def checked(key: str) -> str:
    """Raises ValueError if `key` is none."""
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key!r} is no key")
    return key


class Storage(Protocol):
    """A place for blobs; a key is ``group/kind/name``. Safe from many threads and processes."""

    def put(self, path: Path, key: str) -> None:
        """Take over the local file `path`; it appears under `key` whole or not at all.

        Raises:
            OutputError: it cannot be stored.
        """
        ...

    def fetch(self, key: str) -> Path:
        """A local file with the content of `key`, for reading only.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def remove(self, key: str) -> None:
        """Remove `key` and all below it; nothing happens where there is none."""
        ...

    def groups(self) -> Iterator[tuple[str, float]]:
        """Every group, and when it last changed (seconds since the epoch)."""
        ...


class LocalStorage:
    """A folder; `put` is a rename, so files to put should lie on the same file system."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, path: Path, key: str) -> None:
        target = self._path(key)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
        except OSError as error:
            raise OutputError(
                f"The file cannot be stored: {error.strerror}. Check the space and the rights."
            ) from error

    def fetch(self, key: str) -> Path:
        path = self._path(key)
        if not path.is_file():
            raise FileNotFoundError(key)
        return path

    def remove(self, key: str) -> None:
        path = self._path(key)
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        for parent in path.parents:
            if parent == self._root:
                break
            try:
                parent.rmdir()
            except OSError:  # not empty, or never there
                break

    def groups(self) -> Iterator[tuple[str, float]]:
        for path in self._root.iterdir() if self._root.is_dir() else ():
            try:
                yield path.name, path.stat().st_mtime
            except FileNotFoundError:
                continue

    def _path(self, key: str) -> Path:
        return self._root / checked(key)
