"""Uploads and results in a bucket of Google Cloud Storage. Needs the extra gcp.

What is put or fetched also stays in a local folder of bounded size, so that the machine that made a result does not
download it to hand it out. Results are streamed through the service: its signed links, ranges and keys stay the same.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from beavervision.errors import OutputError, UsageError
from beavervision.serve.storage import checked

_CACHE_BYTES = 4 << 30
_IN_USE_S = 600.0  # files used more recently are never removed to make room
_FORGOTTEN_S = 3600.0  # local copies of groups that are gone from the bucket
_TIMEOUT_S = 60.0
_LOG = logging.getLogger("beavervision.serve")


class BucketStorage:
    """The blobs below a folder of a bucket. Credentials are found as Google's libraries find them.

    Args:
        url: ``gs://BUCKET`` or ``gs://BUCKET/FOLDER``.
        cache: the folder for local copies; on the file system of the files that are put.

    Raises:
        UsageError: the extra is missing, or the bucket cannot be reached.
    """

    def __init__(self, url: str, cache: Path, cache_bytes: int = _CACHE_BYTES) -> None:
        parts = urlsplit(url)
        if parts.scheme != "gs" or not parts.netloc or parts.query or parts.fragment:
            raise UsageError(f"{url!r} is no storage. Write gs://BUCKET/FOLDER, or nothing for local files.")
        try:
            from google.api_core.exceptions import GoogleAPIError, NotFound
            from google.auth.exceptions import GoogleAuthError
            from google.cloud import storage
        except ImportError as error:
            raise UsageError("Google Cloud Storage needs an extra: pip install 'beavervision[gcp]'.") from error
        self._url, self._prefix = url, f"{parts.path.strip('/')}/".lstrip("/")
        self._cache, self._cache_bytes = cache, cache_bytes
        self._lock = threading.Lock()
        self._not_found: Any = NotFound
        self._errors: tuple[type[Exception], ...] = (GoogleAPIError, GoogleAuthError, OSError, ValueError)
        try:
            self._client = storage.Client()
            self._bucket = self._client.bucket(parts.netloc)
            there = self._bucket.exists(timeout=_TIMEOUT_S)
        except self._errors as error:
            raise UsageError(f"{url} cannot be reached: {error}. Check serve_storage and the credentials.") from error
        if not there:
            raise UsageError(f"There is no bucket {parts.netloc}. Create it, or correct serve_storage.")

    def put(self, path: Path, key: str) -> None:
        with self._translated():
            self._blob(key).upload_from_filename(str(path), timeout=_TIMEOUT_S)
            local = self._local(key)
            local.parent.mkdir(parents=True, exist_ok=True)
            path.replace(local)
        self._make_room()

    def fetch(self, key: str) -> Path:
        local = self._local(key)
        if not local.is_file():
            part = local.with_name(f".{secrets.token_hex(8)}.part")
            try:
                with self._translated():
                    local.parent.mkdir(parents=True, exist_ok=True)
                    self._blob(key).download_to_filename(str(part), timeout=_TIMEOUT_S)
                    part.replace(local)
            except self._not_found as error:
                raise FileNotFoundError(key) from error
            finally:
                part.unlink(missing_ok=True)
            self._make_room()
        with suppress(FileNotFoundError):
            local.touch()
        return local

    def remove(self, key: str) -> None:
        local = self._local(key)
        name = self._prefix + checked(key)
        try:
            blobs = [
                blob
                for blob in self._client.list_blobs(self._bucket, prefix=name, timeout=_TIMEOUT_S)
                if blob.name == name or blob.name.startswith(f"{name}/")
            ]
            self._bucket.delete_blobs(blobs, on_error=lambda blob: None, timeout=_TIMEOUT_S)  # gone already
        except self._errors as error:  # the next sweep finds it
            _LOG.warning("%s: %s cannot be removed now: %s", self._url, key, error)
        if local.is_dir():
            shutil.rmtree(local, ignore_errors=True)
        else:
            local.unlink(missing_ok=True)

    def groups(self) -> Iterator[tuple[str, float]]:
        found: dict[str, float] = {}
        with self._translated():
            for blob in self._client.list_blobs(self._bucket, prefix=self._prefix, timeout=_TIMEOUT_S):
                group = blob.name.removeprefix(self._prefix).partition("/")[0]
                found[group] = max(found.get(group, 0.0), blob.updated.timestamp() if blob.updated else time.time())
        for path in self._cache.iterdir() if self._cache.is_dir() else ():
            if path.name not in found and time.time() - path.stat().st_mtime > _FORGOTTEN_S:
                shutil.rmtree(path, ignore_errors=True)
        yield from found.items()

    def _blob(self, key: str) -> Any:
        return self._bucket.blob(self._prefix + checked(key))

    def _local(self, key: str) -> Path:
        return self._cache / checked(key)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._not_found:
            raise
        except self._errors as error:
            raise OutputError(f"{self._url} does not answer: {error}. Check it, and try again.") from error

    def _make_room(self) -> None:
        """Remove what was not used for longest, until the copies fit."""
        with self._lock:
            files = []
            for path in self._cache.rglob("*"):
                with suppress(OSError):
                    facts = path.stat()
                    if path.is_file():
                        files.append((facts.st_mtime, facts.st_size, path))
            too_much = sum(size for _, size, _ in files) - self._cache_bytes
            for used_s, size, path in sorted(files):
                if too_much <= 0 or time.time() - used_s < _IN_USE_S:
                    break
                path.unlink(missing_ok=True)
                too_much -= size
