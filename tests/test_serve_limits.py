"""Limits of one client: requests a second, and limits of one key's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the service needs the extra serve")

from fastapi import Request

from beavervision.errors import UsageError
from beavervision.serve.access import Keys, add_key
from beavervision.serve.limits import Allowance, Buckets
from beavervision.serve.problems import Problem
from beavervision.serve.service import Service
from beavervision.serve.who import owner_of
from beavervision.settings import Settings
from tests.answers import Clock


def test_a_bucket_gives_the_burst_then_the_rate() -> None:
    clock = Clock(100.0)
    buckets, allowed = Buckets(clock), Allowance(2.0, 3, 0.0)
    assert [buckets.take("a", allowed) for _ in range(4)] == [0, 0, 0, 0.5]
    assert buckets.take("b", allowed) == 0
    clock.now_s += 0.5
    assert [buckets.take("a", allowed) > 0 for _ in range(2)] == [False, True]
    clock.now_s += 1000
    assert [buckets.take("a", allowed) > 0 for _ in range(4)] == [False, False, False, True]
    assert all(buckets.take("a", Allowance(0.0, 1, 0.0)) == 0 for _ in range(100))


def test_few_clients_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("beavervision.serve.limits._KNOWN", 10)
    buckets, allowed = Buckets(Clock(100.0)), Allowance(1.0, 1, 0.0)
    for number in range(1000):
        buckets.take(str(number), allowed)
    assert len(buckets._left) == 10


def test_a_key_may_have_limits_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    add_key(path, "ann")
    add_key(path, "bob")
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]} daily_media_s=60 burst=7\n{lines[1]}\n")
    keys, general = Keys.load(path), Allowance(5.0, 20, 0.0)
    assert keys.allowance("ann", general) == Allowance(5.0, 7, 60.0)
    assert keys.allowance("bob", general) == general
    for wrong in ("speed=3", "burst=1.5", "daily_media_s="):
        path.write_text(f"{lines[0]} {wrong}\n")
        with pytest.raises(UsageError, match="line 1"):
            Keys.load(path)


def a_request(service: Service, key: str | None, peer: str) -> Request:
    headers = [(b"host", b"localhost")] + ([(b"authorization", f"Bearer {key}".encode())] if key else [])
    app: Any = type("App", (), {"state": type("State", (), {"service": service})})
    scope = {"type": "http", "headers": headers, "client": (peer, 1), "app": app, "server": ("localhost", 80)}
    return Request({**scope, "method": "GET", "path": "/", "scheme": "http", "query_string": b""})


def refusal(service: Service, key: str | None, peer: str = "127.0.0.1") -> str | None:
    """The code with which a request is refused, with a sign where it says when to try again."""
    try:
        owner_of(a_request(service, key, peer))
    except Problem as problem:
        return problem.code + ("+" if int((problem.headers or {}).get("Retry-After", 0)) >= 1 else "")
    return None


def test_keys_and_addresses_that_ask_too_often_are_refused(tmp_path: Path) -> None:
    keys = {name: add_key(tmp_path / "keys", name) for name in ("ann", "bob")}
    service = Service(Settings(serve_folder=tmp_path, data_dir=tmp_path, serve_rate_per_s=0.001, serve_burst=2))
    try:
        assert [refusal(service, keys["ann"], f"10.0.0.{n}") for n in range(3)] == [None, None, "rate+"]
        assert refusal(service, keys["bob"]) is None
        # Whoever tries keys is slowed down by the address, and does not slow down others.
        assert [refusal(service, "bv_wrong", "10.0.0.9") for _ in range(3)] == ["no_key", "no_key", "rate+"]
        assert refusal(service, keys["bob"], "10.0.0.9") is None
        assert refusal(service, "bv_wrong", "10.0.0.8") == "no_key"
    finally:
        service.close()
