"""The job table: leases, attempts, fences, admission."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy", reason="the service needs the extra serve")

from beavervision.serve.jobs import Job, JobTable, KeyReusedError, NewJob, QueueFullError, State, new_id
from tests.answers import Clock

ATTEMPTS, LEASE_S = 3, 10.0


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def table(tmp_path: Path, clock: Clock) -> Iterator[JobTable]:
    made = JobTable(url(tmp_path), attempts=ATTEMPTS, lease_s=LEASE_S, clock=clock)
    yield made
    made.close()


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'jobs.sqlite'}"


def queued(table: JobTable, owner: str = "me", key: str | None = None, fingerprint: str = "f") -> Job:
    return table.add(NewJob(new_id(), owner, {"text": "Hi."}, fingerprint, key), 100)[0]


def taken(table: JobTable, worker: str = "w") -> Job:
    job = table.take(worker)
    assert job is not None
    return job


def test_jobs_are_taken_in_order_and_once(table: JobTable, clock: Clock) -> None:
    first = queued(table)
    clock.now_s += 1
    second = queued(table)
    assert [taken(table, "a").id, taken(table, "b").id] == [first.id, second.id]
    assert table.take("c") is None


def test_a_silent_worker_loses_its_job_and_cannot_touch_it_again(table: JobTable, clock: Clock) -> None:
    job = queued(table)
    lost = taken(table, "a")
    clock.now_s += LEASE_S - 1
    assert table.beat(lost, 5, 10, 2.0)
    clock.now_s += LEASE_S - 1
    assert table.take("b") is None
    clock.now_s += 2
    found = taken(table, "b")
    assert (found.id, found.attempts, found.pictures) == (job.id, 2, 0)
    assert not table.beat(lost, 6, 10, 2.0)
    assert not table.succeed(lost, {}, "x/y/z", 1.0, 25)
    assert table.fail(lost, "media", "bad") is None
    assert table.succeed(found, {"a": 1}, "x/y/z", 1.0, 25)
    done = table.get(job.id)
    assert done is not None
    assert (done.state, done.report, done.result_key) == (State.SUCCEEDED, {"a": 1}, "x/y/z")


def test_a_dead_workers_job_can_be_taken_at_once(table: JobTable) -> None:
    queued(table)
    taken(table, "a")
    table.release("a")
    assert taken(table, "b").attempts == 2


def test_a_job_that_kills_its_workers_fails_in_the_end(table: JobTable) -> None:
    job = queued(table)
    for number in range(ATTEMPTS):
        assert taken(table, f"w{number}").attempts == number + 1
        table.release(f"w{number}")
    assert table.take("last") is None
    failed = table.get(job.id)
    assert failed is not None
    assert (failed.state, failed.error_code) == (State.FAILED, "worker_lost")


def test_passing_failures_are_tried_again_later_and_others_are_not(table: JobTable, clock: Clock) -> None:
    job = queued(table)
    assert table.fail(taken(table), "device", "full", passing=True) is State.QUEUED
    assert table.take("w") is None
    clock.now_s += 60
    assert table.fail(taken(table), "device", "full", passing=True) is State.QUEUED
    clock.now_s += 60
    assert table.fail(taken(table), "device", "full", passing=True) is State.FAILED
    failed = table.get(job.id)
    assert failed is not None
    assert (failed.error_code, failed.error_message, failed.attempts) == ("device", "full", ATTEMPTS)
    queued(table)
    assert table.fail(taken(table), "no_face", "none") is State.FAILED


def test_a_job_given_back_has_lost_no_attempt(table: JobTable) -> None:
    queued(table)
    assert table.give_back(taken(table, "a"))
    assert taken(table, "b").attempts == 1


def test_a_cancelled_job_stays_cancelled(table: JobTable) -> None:
    job = queued(table)
    held = taken(table)
    assert table.cancel(job.id)
    assert not table.cancel(job.id)
    assert not table.beat(held, 1, 2, 1.0)
    assert not table.succeed(held, {}, "x/y/z", 1.0, 25)
    assert not table.give_back(held)
    assert table.take("b") is None


def test_as_many_wait_as_may(table: JobTable) -> None:
    for _ in range(2):
        table.add(NewJob(new_id(), "me", {}, "f"), 2)
    with pytest.raises(QueueFullError):
        table.add(NewJob(new_id(), "me", {}, "f"), 2)
    taken(table)
    table.add(NewJob(new_id(), "me", {}, "f"), 2)


def test_an_idempotency_key_is_one_job_of_one_owner(table: JobTable) -> None:
    job = queued(table, key="k")
    assert queued(table, key="k").id == job.id
    assert queued(table, owner="you", key="k").id != job.id
    with pytest.raises(KeyReusedError):
        queued(table, key="k", fingerprint="other")


def test_lists_are_of_one_owner_newest_first_in_pages(table: JobTable, clock: Clock) -> None:
    jobs = []
    for _ in range(5):
        clock.now_s += 1
        jobs.append(queued(table))
    queued(table, owner="you")
    page = table.list("me", limit=3)
    rest = table.list("me", limit=3, before_s=page[-1].created_s)
    assert [job.id for job in (*page, *rest)] == [job.id for job in reversed(jobs)]
    assert table.list("me", state=State.RUNNING) == ()


def test_demand_counts_what_could_be_taken_now(table: JobTable, clock: Clock) -> None:
    for _ in range(3):
        queued(table)
    assert table.demand() == (3, frozenset())
    taken(table, "a")
    assert table.demand() == (2, {"a"})
    table.fail(taken(table, "b"), "device", "busy", passing=True)  # tried again later
    assert table.demand() == (1, {"a"})
    clock.now_s += LEASE_S + 1  # and "a" fell silent
    assert table.demand() == (3, frozenset())


def test_figures_are_measured(table: JobTable, clock: Clock) -> None:
    assert table.figures().success_rate is None
    for wait_s in (1, 2, 4):
        queued(table)
        held = taken(table)
        clock.now_s += wait_s
        table.succeed(held, {}, "x/y/z", 36.0, 900)
    queued(table)
    table.fail(taken(table), "media", "bad")
    figures = table.figures()
    assert (figures.succeeded, figures.failed, figures.success_rate) == (3, 1, 0.75)
    assert (figures.response_p50_s, figures.response_p95_s) == (2, 4)
    assert figures.processed_hours == pytest.approx(0.03)


def test_ended_jobs_can_be_found_and_removed(table: JobTable, clock: Clock) -> None:
    job = queued(table)
    queued(table)
    table.cancel(job.id)
    assert table.ended_before(clock.now_s) == ()
    assert table.ended_before(clock.now_s + 1) == (job.id,)
    table.remove(job.id)
    assert table.get(job.id) is None


def _take_all(database: str, name: str, found: multiprocessing.Queue[list[str]]) -> None:
    table = JobTable(database, attempts=ATTEMPTS, lease_s=LEASE_S)
    ids = []
    while (job := table.take(name)) is not None:
        ids.append(job.id)
    table.close()
    found.put(ids)


def test_processes_never_take_the_same_job(tmp_path: Path) -> None:
    table = JobTable(url(tmp_path), attempts=ATTEMPTS, lease_s=LEASE_S)
    jobs = {queued(table).id for _ in range(30)}
    context = multiprocessing.get_context("spawn")
    found: multiprocessing.Queue[list[str]] = context.Queue()
    processes = [context.Process(target=_take_all, args=(url(tmp_path), f"w{n}", found)) for n in range(2)]
    for process in processes:
        process.start()
    taken_ids = [job_id for _ in processes for job_id in found.get(timeout=60)]
    for process in processes:
        process.join()
    found.close()
    found.join_thread()
    table.close()
    assert sorted(taken_ids) == sorted(jobs)


def test_the_table_compiles_for_postgres() -> None:
    from sqlalchemy import select
    from sqlalchemy.dialects import postgresql

    from beavervision.serve import jobs

    query = select(jobs._JOBS).limit(1).with_for_update(skip_locked=True)
    assert "FOR UPDATE SKIP LOCKED" in str(query.compile(dialect=postgresql.dialect()))


def test_a_fence_holds_for_the_attempt_not_just_the_worker(table: JobTable) -> None:
    queued(table)
    held = taken(table, "a")
    table.release("a")
    again = taken(table, "a")
    assert not table.beat(held, 1, 2, 1.0)
    assert table.beat(again, 1, 2, 1.0)
    assert not table.beat(replace(again, worker="b"), 1, 2, 1.0)
