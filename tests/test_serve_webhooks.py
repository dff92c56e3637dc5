"""Webhooks: signed, tried again, kept in the table, and never sent where they must not go."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the service needs the extra serve")

from beavervision.serve import webhooks
from beavervision.serve.access import Audit
from beavervision.serve.jobs import Job, JobTable, NewJob, State, new_id
from beavervision.serve.problems import Problem
from beavervision.serve.webhooks import Target, Webhooks, secret_of
from tests.answers import until
from tests.test_serve import face, started

__all__ = ["face"]  # a fixture

SECRET = b"s"
LOCAL = frozenset({"127.0.0.1"})


@dataclass
class Receiver:
    """An HTTP server that remembers what it was told, and answers with `status` after `pause_s`."""

    status: int = 204
    pause_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    told: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    port: int = 0


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            made.told.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            time.sleep(made.pause_s)
            self.send_response(made.status)
            for name, value in made.headers.items():
                self.send_header(name, value)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    made.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


class Clock:
    later_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.later_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(tmp_path: Path, clock: Clock) -> Iterator[JobTable]:
    made = JobTable(f"sqlite:///{tmp_path / 'jobs.sqlite'}", attempts=1, lease_s=10, clock=clock)
    yield made
    made.close()


@pytest.fixture
def hooks(table: JobTable, tmp_path: Path) -> Callable[..., Webhooks]:
    def make(hosts: frozenset[str] = LOCAL) -> Webhooks:
        return Webhooks(table, Audit(tmp_path / "audit"), SECRET, hosts, lambda job: {"type": f"job.{job.state}"})

    return make


def an_ended_job(table: JobTable, url: str) -> Job:
    table.add(NewJob(new_id(), "ann", {}, "f", None, url), 10)
    job = table.take("w")
    assert job is not None
    table.fail(job, "media", "bad")
    return job


def test_the_end_of_a_job_is_told_once_and_signed(
    table: JobTable, hooks: Callable[..., Webhooks], receiver: Receiver
) -> None:
    url = f"http://127.0.0.1:{receiver.port}/hook?a=b"
    table.add(NewJob(new_id(), "ann", {}, "f", None, url), 10)
    assert not hooks().deliver_one()  # not before its end
    job = table.take("w")
    assert job is not None
    table.fail(job, "media", "bad")
    assert hooks().deliver_one()
    assert not hooks().deliver_one()
    ((path, headers, body),) = receiver.told
    assert (path, json.loads(body)) == ("/hook?a=b", {"type": "job.failed"})
    key = base64.b64decode(secret_of(SECRET, "ann").removeprefix("whsec_"))
    signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    expected = base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60
    assert secret_of(SECRET, "bob") != secret_of(SECRET, "ann")


def test_a_failure_is_tried_again_later_and_given_up_in_the_end(
    table: JobTable, hooks: Callable[..., Webhooks], receiver: Receiver, clock: Clock, tmp_path: Path
) -> None:
    receiver.status = 500
    an_ended_job(table, f"http://127.0.0.1:{receiver.port}/")
    for number, pause_s in enumerate((*webhooks._PAUSES_S, 0), 1):
        assert hooks().deliver_one()  # as if each time by a new server
        assert len(receiver.told) == number
        clock.later_s += pause_s - 1
        assert pause_s == 0 or not hooks().deliver_one()
        clock.later_s += 2
    clock.later_s += 1e6
    assert not hooks().deliver_one()
    assert len({headers["webhook-id"] for _, headers, _ in receiver.told}) == 1
    events = [json.loads(line) for line in (tmp_path / "audit").read_text().splitlines()]
    assert [(e["event"], e["why"]) for e in events] == [("webhook_given_up", "127.0.0.1 answered 500")]


def test_a_receiver_may_take_its_time(
    table: JobTable, hooks: Callable[..., Webhooks], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "_TIMEOUT_S", 0.2)
    receiver.pause_s = 0.6
    job = an_ended_job(table, f"http://127.0.0.1:{receiver.port}/")
    assert hooks().deliver_one()
    told = table.get(job.id)
    assert told is not None
    assert (told.hook_attempts, told.hook_next_s) == (1, None)


def test_a_delivery_that_was_interrupted_is_due_again(
    table: JobTable, hooks: Callable[..., Webhooks], receiver: Receiver, clock: Clock
) -> None:
    an_ended_job(table, f"http://127.0.0.1:{receiver.port}/")
    assert table.to_tell(webhooks._AGAIN_S) is not None  # and that server died
    assert not hooks().deliver_one()
    clock.later_s += webhooks._AGAIN_S + 1
    assert hooks().deliver_one()
    assert len(receiver.told) == 1


def test_redirects_are_not_followed(table: JobTable, hooks: Callable[..., Webhooks], receiver: Receiver) -> None:
    receiver.status, receiver.headers = 307, {"location": f"http://127.0.0.1:{receiver.port}/secret"}
    an_ended_job(table, f"http://127.0.0.1:{receiver.port}/hook")
    assert hooks().deliver_one()
    assert [path for path, _, _ in receiver.told] == ["/hook"]


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.0.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "224.0.0.1",
        "100.64.0.1",
        "::1",
        "::ffff:10.0.0.1",
        "fe80::1",
        "fd00::1",
        "2002:0a00:0001::",
    ],
)
def test_a_name_that_leads_inside_is_not_called(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    def resolve(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, 0, 0, "", ("93.184.216.34", 443)), (socket.AF_INET, 0, 0, "", (address, 443))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    target = Target.of("https://example.com/", frozenset())
    with pytest.raises(webhooks.WebhookError, match="not a public"):
        target.addresses(frozenset())
    assert target.addresses(frozenset({"example.com"})) == ["93.184.216.34", address]


def test_the_connection_goes_to_the_address_that_was_checked(
    table: JobTable, hooks: Callable[..., Webhooks], receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def resolve(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    an_ended_job(table, f"http://inside.example:{receiver.port}/")
    assert hooks(frozenset({"inside.example"})).deliver_one()
    assert [host for host in asked if host != "127.0.0.1"] == ["inside.example"]
    assert receiver.told[0][1]["host"] == f"inside.example:{receiver.port}"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://example.com/",
        "ftp://example.com/",
        "https://",
        "https://u:p@example.com/",
        "https://example.com:x/",
        "https://example.com:0/",
        "example.com",
        "https://example.com/\r\nX: y",
        "https://exämple.com/",
        "https://e.com/" + "x" * 2000,
    ],
)
def test_what_is_no_address_for_webhooks_is_refused(url: str) -> None:
    with pytest.raises(Problem) as caught:
        Target.of(url, LOCAL)
    assert caught.value.code == "webhook"


@pytest.mark.parametrize(
    ("url", "netloc"),
    [
        ("https://e.com/", "e.com"),
        ("https://e.com:80/", "e.com:80"),
        ("https://[2001:db8::1]:444/", "[2001:db8::1]:444"),
        ("https://[2001:db8::1]/", "[2001:db8::1]"),
    ],
)
def test_the_host_is_told_as_the_url_has_it(url: str, netloc: str) -> None:
    assert Target.of(url, frozenset()).netloc == netloc


def test_a_receiver_without_a_trusted_certificate_is_told_nothing(
    table: JobTable, hooks: Callable[..., Webhooks], receiver: Receiver
) -> None:
    an_ended_job(table, f"https://127.0.0.1:{receiver.port}/")  # and it speaks no TLS at all
    assert hooks().deliver_one()
    assert receiver.told == []


def test_a_request_names_a_webhook_and_the_server_calls_it(
    tmp_path: Path, face: bytes, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("BEAVERVISION_")]:
        monkeypatch.delenv(name)
    server = started(tmp_path, serve_webhook_hosts="127.0.0.1", serve_rate_per_s="1000", serve_daily_media_s="0.1")
    try:
        fields: dict[str, bytes | str] = {"video": face, "text": "Hi.", "consent": "true"}
        refused = server.lipsync(fields | {"webhook": "http://10.0.0.1/"})
        assert (refused.status, refused.json["code"]) == (422, "webhook")
        url = f"http://127.0.0.1:{receiver.port}/done"
        job = server.lipsync(fields | {"webhook": url}).json
        until(lambda: bool(receiver.told))
        path, headers, body = receiver.told[0]
        told = json.loads(body)
        assert (path, told["type"], told["data"]["id"]) == ("/done", "job.succeeded", job["id"])
        assert told["data"]["video_url"].startswith(f"http://{server.address}/api/v1/jobs/{job['id']}/result?")
        link = told["data"]["video_url"].removeprefix(f"http://{server.address}")
        assert server.call("GET", link).status == 200
        secret = server.get("/api/v1/webhooks")["secret"]
        assert headers["webhook-signature"] == webhooks.signature(
            secret, headers["webhook-id"], int(headers["webhook-timestamp"]), body
        )
        # The day's seconds are used up by that video, and deleting it does not win them back.
        assert server.call("DELETE", f"/api/v1/jobs/{job['id']}").status == 204
        spent = server.lipsync(fields)
        assert (spent.status, spent.json["code"]) == (429, "quota")
        assert 86_000 < int(spent.headers["retry-after"]) <= 86_400
    finally:
        server.kill()


def test_the_state_of_jobs_that_ended_before_webhooks_existed_is_read(tmp_path: Path) -> None:
    import sqlite3

    table = JobTable(f"sqlite:///{tmp_path / 'jobs.sqlite'}", attempts=1, lease_s=10)
    job, _ = table.add(NewJob(new_id(), "ann", {}, "f"), 10)
    table.close()
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as old:
        for name in ("stage", "hook_url", "hook_attempts", "hook_next_s"):
            old.execute(f"ALTER TABLE jobs DROP COLUMN {name}")
        old.commit()
    table = JobTable(f"sqlite:///{tmp_path / 'jobs.sqlite'}", attempts=1, lease_s=10)
    found = table.get(job.id)
    assert found is not None
    assert (found.state, found.hook_url) == (State.QUEUED, None)
    table.close()
