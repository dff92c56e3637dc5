"""The load test against a service of its own making, and against a real one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from beavervision.serve.loadtest import SCENARIOS, Plan, Row, _growth, format_table, loadtest
from tests.conftest import Ran


class Stage:
    """A service that does what a test wants: `job_s` for a job, `broken` says which job fails, and how."""

    def __init__(self, job_s: float = 0.05, broken: Callable[[int], str | None] = lambda number: None) -> None:
        self.job_s, self.broken = job_s, broken
        self.lock = threading.Lock()
        self.sent = self.at_once = self.most = 0
        self.jobs: dict[str, float] = {}
        self.keys: set[str | None] = set()
        self.deleted: list[str] = []

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], Any]:
        if path == "/readyz":
            return 200, {}, {"status": "ok"}
        if path == "/api/v1/status":
            return 200, {}, {"version": "1", "workers": [{"pid": None}]}
        if path == "/metrics":
            page = 'beavervision_device_memory_used_bytes{device="cpu",worker="w"} 5e+07\n'
            page += 'beavervision_device_memory_used_bytes{device="cuda:0",worker="w"} 1e+09\n'
            page += 'beavervision_device_utilisation_ratio{device="cuda:0",worker="w"} 0.5\n'
            return 200, {"Content-Type": "text/plain"}, page
        if method == "POST":
            assert b'name="consent"\r\n\r\ntrue' in body
            with self.lock:
                self.sent += 1
                wrong = self.broken(self.sent)
                if wrong == "wait":
                    return 503, {"Retry-After": "0"}, {"code": "queue_full"}
                if wrong is not None:
                    return 422, {}, {"code": wrong}
                name = f"/api/v1/jobs/{self.sent}"
                self.jobs[name] = time.monotonic()
                self.most = max(self.most, len(self.jobs))
            return 202, {}, self.job(name)
        if path.endswith("/result"):
            return 200, {"Content-Type": "video/mp4"}, "video"
        if method == "DELETE":
            with self.lock:
                del self.jobs[path]
                self.deleted.append(path)
            return 204, {}, {}
        return 200, {}, self.job(path)

    def job(self, name: str) -> Any:
        done = time.monotonic() - self.jobs[name] > self.job_s
        return {
            "state": "succeeded" if done else "running",
            "error": None,
            "progress": {"pictures": 50},
            "seconds": 2.0,
            "started": "2026-01-01T00:00:00Z",
            "ended": "2026-01-01T00:00:02Z" if done else None,
            "links": {"self": name, "result": f"{name}/result"},
        }


@contextmanager
def staged(stage: Stage) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            stage.keys.add(self.headers.get("Authorization"))
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, document = stage.answer(self.command, self.path, body)
            data = document.encode() if isinstance(document, str) else json.dumps(document).encode()
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data) if status != 204 else 0))
            self.end_headers()
            if status != 204:
                self.wfile.write(data)

        do_GET = do_POST = do_DELETE = do  # noqa: N815  # http.server's names

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = False  # so that closing it waits for them
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def rows(stage: Stage, plan: Plan) -> dict[tuple[str, int], Row]:
    with staged(stage) as url:
        report = loadtest(url, b"face", plan)
    assert stage.jobs == {}  # nothing is left behind
    return {(row.scenario, row.users): row for row in report.rows}


def test_all_scenarios_are_run_with_their_users() -> None:
    stage = Stage()
    found = rows(stage, Plan(users=(1, 3), seconds=0.5))
    assert list(found) == [
        ("single_user_continuous", 1),
        ("multi_user_concurrent", 1),
        ("multi_user_concurrent", 3),
        ("peak_load", 6),
        ("recovery", 1),
    ]
    alone, many = found["single_user_continuous", 1], found["multi_user_concurrent", 3]
    assert alone.requests >= 2
    assert many.requests >= 6
    assert stage.most == found["peak_load", 6].requests == 6  # all in one moment
    for row in found.values():
        assert (row.success_rate, row.error_rate, row.errors, row.availability) == (1.0, 0.0, {}, 1.0)
        assert row.succeeded == row.requests
        assert row.latency_p50_s is not None and row.response_p50_s is not None and row.latency_p95_s is not None
        assert 0.05 <= row.latency_p50_s <= row.latency_p95_s
        assert row.response_p50_s < row.latency_p50_s
        assert row.fps == pytest.approx(50 * row.succeeded / row.seconds, rel=0.15)
        assert row.job_fps == 25
        assert (row.memory_peak_mb, row.gpu_use, row.gpu_memory_mb) == (50, 0.5, 1000)
    assert found["recovery", 1].recovered_s is not None
    assert len(stage.deleted) == stage.sent


def test_failures_are_counted_by_what_the_service_says() -> None:
    stage = Stage(broken=lambda number: "no_face" if number % 3 == 0 else None)
    row = rows(stage, Plan(users=(2,), seconds=1.0, scenarios=("multi_user_concurrent",)))["multi_user_concurrent", 2]
    assert row.errors.keys() == {"no_face"}
    assert row.requests == row.succeeded + row.errors["no_face"]
    assert row.success_rate is not None and row.error_rate is not None
    assert row.success_rate + row.error_rate == pytest.approx(1, abs=1e-3)
    assert 0.1 < row.error_rate < 0.6


def test_a_service_that_says_later_is_obeyed() -> None:
    stage = Stage(broken=lambda number: "wait" if number % 2 else None)
    row = rows(stage, Plan(users=(2,), seconds=0.1, scenarios=("multi_user_concurrent",)))["multi_user_concurrent", 2]
    assert (row.errors, row.success_rate) == ({}, 1.0)
    assert row.told_to_wait >= row.succeeded - 1


def test_memory_grows_for_each_user_more() -> None:
    with staged(Stage()) as url:
        row = loadtest(url, b"face", Plan((1,), 0.01, ("multi_user_concurrent",))).rows[0]
    many = replace(row, users=11, memory_peak_mb=350.0)
    assert _growth([row, many]) == 30.0
    assert _growth([row]) is None
    assert _growth([row, replace(many, scenario="peak_load")]) is None


def test_the_command_says_what_it_found(cli: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("bv_secret\n")
    short = ("--users", "1,2", "--seconds", "0.1", "--quiet", "--key", tmp_path / "key")
    stage = Stage()
    with staged(stage) as url:
        told = cli("loadtest", url, *short)
        document = json.loads(cli("loadtest", url, *short, "--json", "--scenario", "peak_load").out)
        begin = stage.sent
        stage.broken = lambda number: "media" if number == begin + 3 else None
        failed = cli("loadtest", url, *short, "--scenario", "multi_user_concurrent")
    assert told.code == 0
    assert [line.split()[0] for line in told.out.splitlines()[1:6]] == [
        "single_user_continuous",
        "multi_user_concurrent",
        "multi_user_concurrent",
        "peak_load",
        "recovery",
    ]
    assert told.out.splitlines()[-1] == "Nothing failed."
    assert stage.keys == {"Bearer bv_secret"}
    assert [row["scenario"] for row in document["rows"]] == ["peak_load"]
    assert (document["failed"], document["seconds_of_video"]) == (0, 2.0)
    assert (failed.code, failed.out.splitlines()[-1]) == (1, "Failed: {'media': 1}")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "address of a service, or --start"),
        (("http://127.0.0.1:9", "--start"), "address of a service, or --start"),
        (("http://127.0.0.1:9", "--workers", "2"), "--start"),
        (("http://127.0.0.1:9", "--users", "1,x"), "numbers with commas"),
        (("http://127.0.0.1:9", "--users", "0"), "from 1 to 1000"),
        (("http://127.0.0.1:9", "--seconds", "0"), "above 0"),
        (("http://127.0.0.1:9", "--scenario", "none"), "there are single_user_continuous"),
        (("http://127.0.0.1:9",), "No service answers"),
        (("ftp://127.0.0.1",), "no address of a service"),
    ],
)
def test_what_cannot_be_tried_is_refused(cli: Callable[..., Ran], args: tuple[str, ...], message: str) -> None:
    refused = cli("loadtest", *args)
    assert (refused.code, message in refused.err) == (2, True), refused


def test_a_report_without_memory_or_gpu_can_be_shown() -> None:
    class Bare(Stage):
        def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], Any]:
            return (
                (200, {"Content-Type": "text/plain"}, "") if path == "/metrics" else super().answer(method, path, body)
            )

    with staged(Bare()) as url:
        report = loadtest(url, b"face", Plan((1,), 0.01, SCENARIOS[:1]))
    assert report.rows[0].memory_peak_mb is None
    assert any(" - " in line for line in format_table(report))
    assert json.dumps(report.as_dict(), allow_nan=False)


@pytest.mark.slow
def test_a_real_service_is_started_tried_and_stopped(cli: Callable[..., Ran]) -> None:
    pytest.importorskip("fastapi", reason="the service needs the extra serve")
    ran = cli("loadtest", "--start", "--users", "1,2", "--seconds", "1", "--text", "Hi.", "--json", "--quiet")
    document = json.loads(ran.out)
    assert (ran.code, document["failed"]) == (0, 0)
    assert all(row["success_rate"] == 1 and row["fps"] > 0 for row in document["rows"])
    assert all(row["memory_peak_mb"] > 50 for row in document["rows"])
