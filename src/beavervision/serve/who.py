"""Who asks, and whether they may: what every route but the public ones depends on."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

from fastapi import Depends, Request

from beavervision.serve.access import is_loopback
from beavervision.serve.problems import Problem

if TYPE_CHECKING:
    from beavervision.serve.service import Service

LOCAL = "local"  # the owner of everything where there are no keys


def origins(service: Service) -> list[str]:
    """The web origins that may call the service, its own aside."""
    return [origin.strip() for origin in service.settings.serve_cors_origins.split(",") if origin.strip()]


def owner_of(request: Request) -> str:
    """Who asks.

    Raises:
        Problem: nobody who may, or too often.
    """
    service: Service = request.app.state.service
    peer = request.client.host if request.client is not None else ""
    keys = service.keys
    if keys is not None:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        owner = keys.owner(key.strip()) if scheme.lower() == "bearer" else None
        _slow(service, owner, peer)
        if owner is None:
            detail = "Send an API key that is known here: Authorization: Bearer KEY."
            raise Problem(401, "no_key", detail, headers={"WWW-Authenticate": "Bearer"})
        return owner
    if not service.settings.serve_open:
        # Without keys any web page that the user of this machine opens could call the service: names that resolve to
        # it and foreign origins are kept out.
        if not is_loopback(peer):
            detail = "Without API keys the service answers its own machine only. Its operator can make a key."
            raise Problem(403, "not_local", detail)
        if not is_loopback(request.url.hostname or ""):
            raise Problem(403, "not_local", "Without API keys address the service as 127.0.0.1 or localhost.")
    origin = request.headers.get("origin")
    if origin and origin not in origins(service) and urlsplit(origin).netloc != request.headers.get("host"):
        raise Problem(
            403,
            "origin",
            "This web origin may not call the service. Its operator can allow it with serve_cors_origins.",
        )
    _slow(service, None, peer)
    return LOCAL


def _slow(service: Service, owner: str | None, peer: str) -> None:
    """Raises Problem (429) to a key, or without one to an address, that asks too often."""
    client = f"peer {peer}" if owner is None else f"key {owner}"
    wait_s = service.buckets.take(client, service.allowance(owner or LOCAL))
    if wait_s > 0:
        seconds = math.ceil(wait_s)
        detail = f"Too many requests. Try again in {seconds} s, and ask less often: events tell of every change."
        raise Problem(429, "rate", detail, headers={"Retry-After": str(seconds)})


Owner = Annotated[str, Depends(owner_of)]
