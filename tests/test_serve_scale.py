"""As many workers as there are jobs for: started while some wait, ended when there is nothing to do."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra serve")

from beavervision.errors import UsageError
from beavervision.evaluate.samples import portrait as sample_portrait
from beavervision.serve import exposition
from beavervision.serve.jobs import NewJob, new_id
from beavervision.serve.place import Place
from beavervision.serve.scaling import Scaler, room
from beavervision.serve.schema import MemoryOut
from beavervision.serve.supervisor import Supervisor
from beavervision.settings import Settings
from tests.answers import Clock, until
from tests.test_serve import started

TEXT = "Papa moved away, and nobody ever asked him why he did so. " * 3


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def scaler(clock: Clock) -> Scaler:
    return Scaler(1, 4, 60.0, clock)


@pytest.mark.parametrize(
    ("workers", "busy", "waiting", "wanted"),
    [(1, 0, 0, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 2), (1, 1, 2, 3), (2, 1, 1, 2), (2, 2, 9, 4), (4, 4, 9, 4)],
)
def test_each_job_that_waits_gets_a_worker_as_far_as_allowed(
    scaler: Scaler, workers: int, busy: int, waiting: int, wanted: int
) -> None:
    assert scaler.wanted(workers, busy, waiting) == wanted


def test_workers_go_when_they_were_too_many_for_long(scaler: Scaler, clock: Clock) -> None:
    def at(now_s: float, workers: int, busy: int) -> int:
        clock.now_s = now_s
        return scaler.wanted(workers, busy, 0)

    assert at(10, 4, 4) == 4
    assert at(11, 4, 2) == 4  # two have nothing to do
    assert at(40, 4, 3) == 4  # one of them got something to do
    assert at(69, 4, 2) == 4
    assert at(70, 4, 2) == 3  # one was too many all the time
    assert at(99, 3, 1) == 2  # it goes
    assert at(100, 2, 0) == 1  # two were since 40
    assert at(500, 2, 0) == 1  # never less than the least


def test_a_short_rush_starts_the_time_anew(scaler: Scaler, clock: Clock) -> None:
    assert scaler.wanted(2, 0, 0) == 2
    clock.now_s = 59
    assert scaler.wanted(2, 1, 1) == 2
    clock.now_s = 60
    assert scaler.wanted(2, 0, 0) == 2
    clock.now_s = 120
    assert scaler.wanted(2, 0, 0) == 1


def test_those_that_go_at_once_are_not_those_whom_a_job_waits_for(clock: Clock) -> None:
    scaler = Scaler(1, 4, 0.0, clock)
    assert scaler.wanted(3, 1, 1) == 2
    assert scaler.wanted(2, 1, 1) == 2
    assert scaler.wanted(2, 1, 0) == 1


def used(device: str, *mib: int) -> list[MemoryOut]:
    return [
        MemoryOut(worker=f"worker-{i}", device=device, used_bytes=n << 20, budget_bytes=3000 << 20, utilisation=None)
        for i, n in enumerate(mib)
    ]


@pytest.mark.parametrize(
    ("memory", "more", "fits"),
    [
        ([], 1, True),
        (used("cpu", 1000), 1, True),
        (used("cpu", 1000), 2, True),
        (used("cpu", 1000), 3, False),
        (used("cpu", 800, 1100), 1, True),
        (used("cpu", 800, 1101), 1, False),
        (used("cuda:0", 2000, 2000), 1, True),  # both tell what both of them take
        (used("cuda:0", 2000, 2000), 2, False),
        (used("cpu", 500, 500) + used("cuda:0", 2900, 2900), 1, False),
    ],
)
def test_no_worker_is_started_that_memory_has_no_room_for(memory: list[MemoryOut], more: int, fits: bool) -> None:
    assert room(memory, more) is fits


def test_a_worker_more_waits_until_memory_has_room_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(serve_folder=tmp_path, serve_workers_max=2)
    place = Place.open(settings)
    supervisor = Supervisor(settings, place)
    assert supervisor._scaler is not None
    told = used("cpu", 1600)
    monkeypatch.setattr(exposition, "memory", lambda folder: told)
    for _ in range(2):
        place.table.add(NewJob(new_id(), "me", {}, "f"), 9)
    for names in (["worker-0"], ["worker-0", "worker-1"]):
        supervisor._scale(supervisor._scaler)
        assert [worker.slot for worker in supervisor.workers()] == names
        told[:] = used("cpu", 1000)
    place.table.close()


def test_fewer_at_most_than_at_least_is_refused() -> None:
    assert Settings(serve_workers=3).most_workers == 3
    assert Settings(serve_workers=2, serve_workers_max=5).most_workers == 5
    with pytest.raises(UsageError, match="serve_workers_max"):
        Settings(serve_workers=3, serve_workers_max=2)


def test_a_second_worker_comes_for_jobs_that_wait_and_goes_after_them(tmp_path: Path) -> None:
    with sample_portrait() as path, Image.open(path) as picture:
        small = io.BytesIO()
        picture.convert("RGB").resize((192, 192)).save(small, "JPEG", quality=92)
    server = started(tmp_path, serve_workers_max="2", serve_idle_s="2", serve_queue="9")
    try:

        def workers() -> dict[str, int | None]:
            return {worker["name"]: worker["pid"] for worker in server.get("/api/v1/status")["workers"]}

        def asked() -> str:
            fields: dict[str, bytes | str] = {"video": small.getvalue(), "text": TEXT, "consent": "true"}
            answer = server.lipsync(fields, prefer="respond-async")
            assert answer.status == 202, answer
            return str(answer.json["id"])

        (first,) = workers().items()
        ids = [asked() for _ in range(3)]
        until(lambda: sum(server.job(job_id)["state"] == "running" for job_id in ids) == 2)
        both = workers()
        assert len(both) == 2
        until(lambda: all(server.job(job_id)["state"] == "succeeded" for job_id in ids))
        until(lambda: workers() == dict([first]))
        second = (set(both.values()) - {first[1]}).pop()
        assert second is not None
        with pytest.raises(ProcessLookupError):
            os.kill(second, 0)
        last = asked()
        until(lambda: server.job(last)["state"] == "succeeded")
        assert workers() == dict([first])
        assert all(worker["restarts"] == 0 for worker in server.get("/api/v1/status")["workers"])
    finally:
        server.kill()
