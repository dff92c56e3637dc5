"""Tell a client's server that a job has ended: signed, once or more, until it answers or the attempts are used up.

What is due stands in the job table, so that a delivery survives the server. The signature is that of Standard Webhooks
(https://www.standardwebhooks.com): HMAC-SHA256 over ``id.timestamp.body``. An address is resolved once, every address
that it stands for must be public, and the connection goes to one of these: a name that points elsewhere a moment later
leads nowhere. Redirects are not followed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import ipaddress
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy.exc import SQLAlchemyError

from beavervision import metrics
from beavervision.serve.access import Audit
from beavervision.serve.jobs import Job, JobTable
from beavervision.serve.problems import Problem

_PAUSES_S = (5.0, 30.0, 300.0, 1800.0, 7200.0)  # after the first, second, ... attempt that failed
_TIMEOUT_S = 10.0  # until there is a connection,
_WHOLE_S = 30.0  # and of all
_THREADS = 4  # so that a slow receiver does not hold up the others
_AGAIN_S = 120.0  # a server that died while it told is thought dead after so long
_STOP_S = 2.0
_LOOK_S = 1.0
_ANSWER_BYTES = 4096
_URL_CHARS = 2000
_LOG = logging.getLogger("beavervision.serve.webhooks")


class WebhookError(Exception):
    """It was not delivered; the message says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """Where a webhook goes, as its URL says."""

    secure: bool
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, url: str, allowed_hosts: frozenset[str]) -> Target:
        """Read a URL that a client gave.

        Raises:
            Problem: it is none, or none that may be called.
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            parts, host, port = urlsplit(""), "", None
        secure = parts.scheme == "https"
        plain = url.isascii() and url.isprintable() and " " not in url and len(url) <= _URL_CHARS
        if not plain or parts.scheme not in ("http", "https") or not host or port == 0 or "@" in parts.netloc:
            raise Problem(422, "webhook", "The webhook is no https address. Send one like https://example.com/hook.")
        if not secure and host not in allowed_hosts:
            raise Problem(422, "webhook", "A webhook must be https. Or let the service's operator allow the host.")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(secure, host, port or (443 if secure else 80), path)

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"

    def addresses(self, allowed_hosts: frozenset[str]) -> list[str]:
        """The addresses of the host.

        Raises:
            WebhookError: it has none, or one that is not public.
        """
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise WebhookError(f"{self.host} has no address") from error
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if self.host not in allowed_hosts and not all(_is_public(address) for address in addresses):
            raise WebhookError(f"{self.host} is not a public address")
        return addresses


def _is_public(address: str) -> bool:
    ip: Any = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    return bool((inner or ip).is_global and not (inner or ip).is_multicast)


def secret_of(secret: bytes, owner: str) -> str:
    """What an owner's webhooks are signed with, as it is shown to the owner."""
    return "whsec_" + base64.b64encode(hmac.new(secret, f"webhook:{owner}".encode(), hashlib.sha256).digest()).decode()


def signature(shown: str, message_id: str, timestamp_s: int, body: bytes) -> str:
    """The value of the header ``webhook-signature``; `shown` is as :func:`secret_of` gives it."""
    key = base64.b64decode(shown.removeprefix("whsec_"))
    signed = f"{message_id}.{timestamp_s}.".encode() + body
    return "v1," + base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()


class Webhooks:
    """Delivers what is due, in threads of its own.

    Args:
        secret: what the owners' secrets are made from.
        allowed_hosts: may be called without TLS and at private addresses.
        payload: the document for a job.
        context: TLS settings; those of the system if None.
    """

    def __init__(
        self,
        table: JobTable,
        audit: Audit,
        secret: bytes,
        allowed_hosts: frozenset[str],
        payload: Callable[[Job], dict[str, Any]],
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._table, self._audit, self._secret = table, audit, secret
        self._allowed, self._payload = allowed_hosts, payload
        self._context = context or ssl.create_default_context()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, name="webhooks", daemon=True) for _ in range(_THREADS)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Begin no other delivery. One under way ends, or is tried again by the next server."""
        self._over.set()
        until_s = time.monotonic() + _STOP_S
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, until_s - time.monotonic()))

    def _run(self) -> None:
        while not self._over.wait(_LOOK_S):
            try:
                while not self._over.is_set() and self.deliver_one():
                    pass
            except (SQLAlchemyError, OSError) as error:
                _LOG.warning("webhooks wait: %s", error)

    def deliver_one(self) -> bool:
        """Try the delivery that is due; False if there is none."""
        job = self._table.to_tell(_AGAIN_S)
        if job is None:
            return False
        attempt = job.hook_attempts or 1
        try:
            self._deliver(job)
        except WebhookError as error:
            last = attempt > len(_PAUSES_S)
            metrics.WEBHOOKS.labels("given_up" if last else "failed").inc()
            if last:
                self._audit.write("webhook_given_up", job=job.id, owner=job.owner, attempts=attempt, why=str(error))
            self._table.told(job, None if last else _PAUSES_S[attempt - 1])
        else:
            metrics.WEBHOOKS.labels("delivered").inc()
            self._audit.write("webhook", job=job.id, owner=job.owner, attempts=attempt)
            self._table.told(job, None)
        return True

    def _deliver(self, job: Job) -> None:
        assert job.hook_url is not None
        try:
            target = Target.of(job.hook_url, self._allowed)
        except Problem as error:  # the settings have changed
            raise WebhookError(error.detail) from error
        body = json.dumps(self._payload(job)).encode()
        message_id, now_s = f"job-{job.id}", int(time.time())
        headers = {
            "Host": target.netloc,
            "Content-Type": "application/json",
            "User-Agent": "BeaverVision",
            "webhook-id": message_id,
            "webhook-timestamp": str(now_s),
            "webhook-signature": signature(secret_of(self._secret, job.owner), message_id, now_s, body),
        }
        address = target.addresses(self._allowed)[0]
        connection = _Pinned(target, address, self._context)
        limit = threading.Timer(_WHOLE_S, connection.end)  # each step has a time of its own, and there may be many
        limit.start()
        try:
            connection.request("POST", target.path, body, headers)
            answer = connection.getresponse()
            answer.read(_ANSWER_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise WebhookError(f"{target.host} cannot be reached: {error}") from error
        finally:
            limit.cancel()
            connection.close()
        if not 200 <= answer.status < 300:
            raise WebhookError(f"{target.host} answered {answer.status}")


class _Pinned(http.client.HTTPConnection):
    """A connection to one address, whatever the name stands for meanwhile."""

    def __init__(self, target: Target, address: str, context: ssl.SSLContext) -> None:
        super().__init__(target.host, target.port, timeout=_TIMEOUT_S)
        self._target, self._address, self._tls = target, address, context

    def end(self) -> None:
        """From another thread: whatever waits for the other side fails."""
        if self.sock is not None:
            with suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self._target.port), _TIMEOUT_S)
        try:
            secure = self._target.secure
            self.sock = self._tls.wrap_socket(plain, server_hostname=self._target.host) if secure else plain
        except BaseException:
            plain.close()
            raise
        self.sock.settimeout(_WHOLE_S)
