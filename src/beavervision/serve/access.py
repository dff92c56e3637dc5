"""Who may do what: API keys (only their hashes are kept), signed links, and the audit log."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from beavervision.errors import OutputError, UsageError
from beavervision.serve.limits import Allowance
from beavervision.settings import Settings

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LINE = re.compile(r"([A-Za-z0-9._-]{1,64})\s+([0-9a-f]{64})((?:\s+[a-z_]+=[0-9.]{1,12})*)")
_PRIVATE = 0o600
_Stamp = tuple[int, int, int]
_LOG = logging.getLogger("beavervision.serve")


def key_file(settings: Settings) -> Path:
    return Path(settings.serve_keys).expanduser() if settings.serve_keys else settings.serve_folder / "keys"


def add_key(path: Path, name: str) -> str:
    """Make an API key for `name`, add its hash to the file, and return it: it is shown once.

    Raises:
        UsageError: the name is not usable, or taken.
        OutputError: the file cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name for a key. Use letters, digits, dots and dashes, at most 64.")
    if path.exists() and name in Keys.load(path).names:
        raise UsageError(f"There is a key for {name!r} already. Delete its line in {path} first.")
    key = f"bv_{secrets.token_urlsafe(32)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, _PRIVATE), "a") as file:
            unended = path.read_bytes()[-1:] not in (b"", b"\n")  # as editors may leave it
            file.write("\n" * unended + f"{name} {_hashed(key)}\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}. Check the folder and the rights.") from error
    return key


class Keys:
    """The API keys of a file: one line each, a name and the SHA-256 of the key. Keys are long and random, so no salt.

    After them may stand limits of this key's own, as ``daily_media_s=3600``: the fields of
    :class:`~beavervision.serve.limits.Allowance`.
    """

    def __init__(self, owners: Mapping[str, str], own: Mapping[str, Mapping[str, float]] | None = None) -> None:
        self._owners, self._own = dict(owners), dict(own or {})

    @classmethod
    def load(cls, path: Path) -> Keys:
        """Raises UsageError if the file cannot be read."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"The key file {path} cannot be read. Correct it or its rights.") from error
        owners, own = {}, {}
        for number, line in enumerate(lines, 1):
            if not line.strip() or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line.strip())
            if match is None:
                raise UsageError(f"{path}, line {number}: write a name, a space and the SHA-256 of the key in hex.")
            owners[match[2]] = match[1]
            own[match[1]] = _limits(match[3].split(), f"{path}, line {number}")
        return cls(owners, own)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._owners.values())

    def owner(self, key: str) -> str | None:
        """Whose key this is."""
        return self._owners.get(_hashed(key))

    def allowance(self, owner: str, general: Allowance) -> Allowance:
        """The limits of a key: its own, and for the rest the general ones."""
        own: dict[str, Any] = dict(self._own.get(owner, {}))
        return replace(general, **own)


class KeyRing:
    """The keys of a file, read again when it changes: a new one counts at once, and one whose line is gone no longer.

    Where there were keys once, a request needs one for good, even if the file is gone. Safe from many threads.

    Args:
        required: there must be a file from the beginning.

    Raises:
        UsageError: it cannot be read.
    """

    def __init__(self, path: Path, required: bool) -> None:
        self._path = path
        seen = _stamp(path)
        # Both at once: threads that read at the same time do not leave the keys of one with the stamp of another.
        self._read = seen, (Keys.load(path) if required or seen is not None else None)
        self._refused: _Stamp | None = None

    @property
    def keys(self) -> Keys | None:
        """Those of now; None where there never were any. A file that cannot be read leaves those that were, until it can."""
        before, keys = self._read
        seen = _stamp(self._path)
        if seen == before:
            return keys
        try:
            if seen is not None:
                keys = Keys.load(self._path)
            elif keys is not None:
                keys = Keys({})
        except UsageError as error:
            if seen != self._refused:
                _LOG.error("the keys stay as they were: %s", error)
            self._refused = seen
            return keys
        self._read = seen, keys
        _LOG.info("the keys of %s have changed", self._path)
        return keys


def _stamp(path: Path) -> _Stamp | None:
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ctime_ns, facts.st_size, facts.st_ino


def _limits(words: list[str], where: str) -> dict[str, float]:
    kinds = {"rate_per_s": float, "burst": int, "daily_media_s": float}
    found: dict[str, float] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            found[name] = kinds[name](value)
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"{where}: {word!r} is no limit. Known: {', '.join(kinds)}, each with = and a number."
            ) from error
    return found


def _hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def secret(settings: Settings) -> bytes:
    """What links are signed with: the setting, else made once and kept in the folder of the service."""
    if settings.serve_secret:
        return settings.serve_secret.encode()
    path = settings.serve_folder / "secret"
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE), "w") as file:
            file.write(secrets.token_hex(32))
    except FileExistsError:
        pass
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}. Check the folder and the rights.") from error
    return path.read_bytes().strip()


@dataclass(frozen=True, slots=True)
class Links:
    """Signs addresses for a time: HMAC-SHA256 over the path and the second it expires in."""

    secret: bytes
    valid_s: float

    def sign(self, path: str) -> tuple[str, int]:
        """The query that makes `path` valid, and when it expires (seconds since the epoch)."""
        expires_s = int(time.time() + self.valid_s)
        return urlencode({"expires": expires_s, "signature": self._signature(path, expires_s)}), expires_s

    def holds(self, path: str, expires_s: int, signature: str) -> bool:
        """Whether this service signed that; not whether it has expired."""
        return hmac.compare_digest(self._signature(path, expires_s).encode(), signature.encode())

    def _signature(self, path: str, expires_s: int) -> str:
        return hmac.new(self.secret, f"{path}\n{expires_s}".encode(), hashlib.sha256).hexdigest()


class Audit:
    """A log of who did what, a JSON document a line. Several processes may write to it.

    What cannot be written there, on a full disk, goes to the process's log: the deed itself is done and stands.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(self, event: str, **facts: Any) -> None:
        line = json.dumps({"time_s": round(time.time(), 3), "event": event, **facts}) + "\n"
        try:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, _PRIVATE)
            try:
                os.write(descriptor, line.encode())  # one call, so that lines of several processes do not mix
            finally:
                os.close(descriptor)
        except OSError as error:
            _LOG.error("the audit log cannot be written (%s): %s", error.strerror, line.rstrip())
