"""What becomes of accepted jobs when processes are killed, the database is locked and the disk is full."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra serve")

from beavervision.evaluate.samples import portrait as sample_portrait
from tests.answers import until
from tests.test_serve import LONG, Server, drawing, started

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills by /proc and mounts")

SENTENCE = "Papa moved away. "
STAGES = ("decode", "detect", "hear", "lipsync", "render", "watch", "encode")
# Python runs a module of this name in every process at its start. In a worker it strikes once at the place that the file
# `fault` names, with what it says: a stage of the flow, or before (`-`) or after (`+`) a call on the table or the storage.
FAULTS = """
import errno, os, signal, sys

if "beavervision.serve.worker" in sys.orig_argv:
    from beavervision.engine import flow
    from beavervision.serve import jobs, storage

    def strike(place):
        name = os.environ["TEST_FAULT"]
        try:
            wanted, what, times = open(name).read().split()
            if wanted != place:
                return
            if int(times) > 1:
                open(name, "w").write(f"{wanted} {what} {int(times) - 1}")
            else:
                os.rename(name, name + ".done")
        except FileNotFoundError:
            return
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(getattr(errno, what), os.strerror(getattr(errno, what)))

    def around(kind, method):
        call = getattr(kind, method)

        def wrapped(*args, **options):
            strike("-" + method)
            given = call(*args, **options)
            if given:
                strike("+" + method)
            return given

        setattr(kind, method, wrapped)

    def with_strike(step):
        def start(clips):
            for clip in step.start(clips):
                strike(step.name)
                yield clip

        return flow._Step(step.name, start, step.merge, step.guard)

    threaded = flow._threaded
    flow._threaded = lambda steps, *rest: threaded(tuple(with_strike(s) for s in steps), *rest)
    for method in ("take", "succeed"):
        around(jobs.JobTable, method)
    put = storage.LocalStorage.put

    def put_and_strike(self, path, key):
        strike("-put")
        put(self, path, key)
        strike("+put")

    storage.LocalStorage.put = put_and_strike
"""


@pytest.fixture(scope="module")
def face() -> bytes:
    with sample_portrait() as path, Image.open(path) as picture:
        small = io.BytesIO()
        picture.convert("RGB").resize((192, 192)).save(small, "JPEG", quality=92)
    return small.getvalue()


@pytest.fixture
def fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Says where the next worker is struck, and with what; for servers started after it."""
    return prepared(tmp_path, monkeypatch)


def prepared(folder: Path, patch: pytest.MonkeyPatch) -> Callable[[str], None]:
    (folder / "faults").mkdir()
    (folder / "faults" / "sitecustomize.py").write_text(FAULTS)
    patch.setenv("TEST_FAULT", str(folder / "fault"))
    patch.syspath_prepend(str(folder / "faults"))

    def set_fault(what: str) -> None:
        (folder / "fault").write_text(what)

    return set_fault


@contextlib.contextmanager
def serving(folder: Path, **settings: str) -> Iterator[Server]:
    server = started(folder, serve_queue="16", serve_lease_s="2", **settings)
    try:
        yield server
    finally:
        server.kill()
        until(lambda: processes_of(folder) == [])


def processes_of(folder: Path) -> list[int]:
    """The server, its workers and what they started: all whose environment names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"BEAVERVISION_SERVE_FOLDER={folder}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return sorted(found)


def asked(server: Server, face: bytes, text: str = SENTENCE, **headers: str) -> str:
    answer = server.lipsync({"video": face, "text": text, "consent": "true"}, prefer="respond-async", **headers)
    assert answer.status == 202, answer
    return str(answer.json["id"])


def ended(server: Server, job_id: str) -> Any:
    until(lambda: server.job(job_id)["state"] in ("succeeded", "failed", "cancelled"))
    return server.job(job_id)


def events(server: Server, job_id: str) -> list[str]:
    lines = (server.folder / "audit.jsonl").read_text().splitlines()
    return [event["event"] for event in map(json.loads, lines) if event.get("job") == job_id]


def well_done(server: Server, job_id: str, attempts: set[int]) -> None:
    """The job succeeded, its video is there, and it was accepted and ended once."""
    job = ended(server, job_id)
    assert (job["state"], job["error"]) == ("succeeded", None), job
    assert job["attempts"] in attempts
    video = server.call("GET", f"/api/v1/jobs/{job_id}/result")
    assert video.status == 200 and video.body[4:8] == b"ftyp"
    assert server.get(f"/api/v1/jobs/{job_id}/report")["output"]["pictures"] == job["progress"]["pictures"]
    seen = events(server, job_id)
    assert seen.count("accepted") == 1
    assert seen.count("ended") <= 1


def all_ended(server: Server, ids: list[str]) -> None:
    """Each job is there once, and nothing else is left of them when they are deleted."""
    assert sorted(job["id"] for job in server.get("/api/v1/jobs")["jobs"]) == sorted(ids)
    for job_id in ids:
        assert server.call("DELETE", f"/api/v1/jobs/{job_id}").status == 204
    until(lambda: server.files() == [])  # the scratch folder of a killed worker goes when the next one begins


# --- workers ----------------------------------------------------------------------------------------------------------


def struck(server: Server, face: bytes, fault: Callable[[str], None], place: str, what: str, times: int = 1) -> str:
    fault(f"{place} {what} {times}")
    job_id = asked(server, face)
    ended(server, job_id)
    Path(os.environ["TEST_FAULT"] + ".done").unlink()  # it did strike
    return job_id


@pytest.mark.parametrize(
    "place",
    [
        *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("+take", *STAGES, "-put", "-succeed", "+succeed")),
        "+put",
    ],
)
def test_a_killed_workers_job_is_done_once(
    tmp_path: Path, face: bytes, fault: Callable[[str], None], place: str
) -> None:
    with serving(tmp_path / "serve") as server:
        job_id = struck(server, face, fault, place, "kill")
        # once the job has succeeded in the table, the end of its worker changes nothing
        well_done(server, job_id, {1} if place == "+succeed" else {2})
        until(lambda: server.get("/api/v1/status")["workers"][0]["restarts"] == 1)
        all_ended(server, [job_id])


@pytest.mark.slow
def test_a_job_that_kills_every_worker_fails_with_a_reason(
    tmp_path: Path, face: bytes, fault: Callable[[str], None]
) -> None:
    with serving(tmp_path / "serve", serve_attempts="2") as server:
        job_id = struck(server, face, fault, "detect", "kill", times=2)
        job = server.job(job_id)
        assert (job["state"], job["error"]["code"], job["attempts"]) == ("failed", "worker_lost", 2)
        well_done(server, asked(server, face), {1})


# --- the server -------------------------------------------------------------------------------------------------------


def test_a_killed_server_loses_no_job(tmp_path: Path, face: bytes) -> None:
    folder = tmp_path / "serve"
    with serving(folder) as server:
        ids = [asked(server, face, SENTENCE * 2, idempotency_key=f"k{n}") for n in range(3)]
        until(lambda: server.job(ids[0])["state"] == "succeeded")
        drawing(server, ids[1])
        server.kill()
        until(lambda: processes_of(folder) == [])
    with serving(folder) as server:
        # the answer was perhaps lost with the server: the same request is the same job
        assert [asked_again(server, face, f"k{n}") for n in range(3)] == ids
        for job_id in ids:
            well_done(server, job_id, {1})
        all_ended(server, ids)


def asked_again(server: Server, face: bytes, key: str) -> str:
    fields: dict[str, bytes | str] = {"video": face, "text": SENTENCE * 2, "consent": "true"}
    answer = server.lipsync(fields, prefer="respond-async", idempotency_key=key)
    assert answer.status in (200, 202), answer
    return str(answer.json["id"])


@pytest.mark.slow
def test_a_power_cut_loses_no_job(tmp_path: Path, face: bytes) -> None:
    """Server and workers die at the same moment: nobody gives the running job back."""
    folder = tmp_path / "serve"
    with serving(folder, serve_workers="2") as server:
        ids = [asked(server, face, SENTENCE * 2) for _ in range(3)]
        drawing(server, ids[0])
        for pid in [server.process.pid, *processes_of(folder)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.kill()
    with serving(folder) as server:
        for job_id in ids:
            well_done(server, job_id, {1, 2})
        all_ended(server, ids)


# --- the database -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    connection = sqlite3.connect(folder / "jobs.sqlite", isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def test_a_database_that_is_locked_for_a_while_delays_and_loses_nothing(tmp_path: Path, face: bytes) -> None:
    with serving(tmp_path / "serve") as server:
        ids = [asked(server, face, SENTENCE * 2)]
        drawing(server, ids[0])
        with locked(server.folder):
            late = threading.Thread(target=lambda: ids.append(asked(server, face)))
            late.start()
            late.join(1.0)
            assert late.is_alive()  # not accepted before it is on disk
            assert server.job(ids[0])["state"] == "running"
        late.join()
        for job_id in ids:
            well_done(server, job_id, {1, 2})
        all_ended(server, ids)


@pytest.mark.slow
def test_a_database_that_stays_locked_refuses_and_loses_nothing(tmp_path: Path, face: bytes) -> None:
    with serving(tmp_path / "serve") as server:
        ids = [asked(server, face, LONG), asked(server, face)]
        drawing(server, ids[0])
        with locked(server.folder):
            refused = server.lipsync({"video": face, "text": "Hi.", "consent": "true"})
            assert (refused.status, refused.json["code"]) == (503, "database")
            assert refused.headers["retry-after"]
            assert server.call("GET", "/healthz").status == 200
        assert server.call("POST", f"/api/v1/jobs/{ids[0]}/cancel").status == 200
        assert ended(server, ids[0])["state"] == "cancelled"
        well_done(server, ids[1], {1, 2})
        all_ended(server, ids)


# --- the disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_moment_delays_a_job(
    tmp_path: Path, face: bytes, fault: Callable[[str], None]
) -> None:
    with serving(tmp_path / "serve") as server:
        job_id = struck(server, face, fault, "-put", "ENOSPC")
        well_done(server, job_id, {2})
        all_ended(server, [job_id])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(path: Path) -> None:
    """Leave no byte free."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
    assert os.statvfs(path.parent).f_bavail == 0


def test_a_full_disk_refuses_and_loses_nothing(small_disk: Path, face: bytes) -> None:
    folder = small_disk / "serve"
    with serving(folder) as server:
        ids = [asked(server, face, SENTENCE * 8), asked(server, face)]
        drawing(server, ids[0])
        fill(small_disk / "filler")
        refused = server.lipsync({"video": face, "text": "Hi.", "consent": "true"})
        assert (refused.status, refused.json["code"]) == (503, "storage"), refused
        assert server.call("GET", "/healthz").status == 200
        until(lambda: not (folder / "scratch" / "worker-0").exists())  # the attempt has met the full disk
        (small_disk / "filler").unlink()
        for job_id in ids:
            job = ended(server, job_id)
            assert job["state"] == "succeeded" or job["error"]["code"] == "output", job
        well_done(server, asked(server, face), {1})
        assert server.process.poll() is None
