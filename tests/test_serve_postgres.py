"""The job table on a real PostgreSQL: one is started where its programs are installed, and ended with the tests."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("sqlalchemy", reason="the service needs the extra serve")
pytest.importorskip("pg8000", reason="needs the extra postgres")

from sqlalchemy import Engine, event

from beavervision.serve.avatars import Avatars
from beavervision.serve.jobs import Job, JobTable, KeyReusedError, NewJob, QueueFullError, State, new_id
from beavervision.serve.storage import LocalStorage
from tests.answers import Clock

ATTEMPTS, LEASE_S = 3, 10.0
_USER = "postgres"  # who runs it where the tests run as root, which it refuses to


def programs() -> Path | None:
    found = shutil.which("initdb")
    folders = [Path(found).parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    where = programs()
    if where is None:
        pytest.skip("PostgreSQL is not installed")
    as_other = hasattr(os, "getuid") and os.getuid() == 0
    folder = Path(tempfile.mkdtemp(prefix="pg"))  # the path of its socket must be short
    if as_other:
        try:
            shutil.chown(folder, _USER)
        except LookupError:
            pytest.skip("there is no user to run PostgreSQL as")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def run(*command: str) -> None:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, user=_USER if as_other else None
        )
        assert done.returncode == 0, done.stderr + done.stdout

    data = str(folder / "data")
    try:
        run(str(where / "initdb"), "-D", data, "-U", "me", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        run(str(where / "pg_ctl"), "-D", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql+pg8000://me@127.0.0.1:{port}/postgres"
        finally:
            run(str(where / "pg_ctl"), "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def table(database: str, clock: Clock) -> Iterator[JobTable]:
    made = JobTable(database, attempts=ATTEMPTS, lease_s=LEASE_S, clock=clock)
    yield made
    for owner in ("me", "you"):
        for job in made.list(owner, limit=1000):
            made.remove(job.id)
    made.forget_usage(1e12)
    made.close()


def queued(table: JobTable, owner: str = "me", key: str | None = None, fingerprint: str = "f") -> Job:
    return table.add(NewJob(new_id(), owner, {"text": "Hi."}, fingerprint, key, "https://example.com/"), 1000)[0]


def test_a_job_that_is_taken_in_that_moment_is_counted_once(database: str, table: JobTable, clock: Clock) -> None:
    queued(table)
    other = JobTable(database, attempts=ATTEMPTS, lease_s=LEASE_S, clock=clock)
    event.listen(Engine, "after_cursor_execute", lambda *_: other.take("a"), once=True)
    waiting, workers = table.demand()
    other.close()
    assert waiting + len(workers) == 1
    assert table.demand() == (0, frozenset({"a"}))


def test_many_workers_take_each_job_once(database: str, table: JobTable) -> None:
    jobs = {queued(table).id for _ in range(60)}
    found: list[str] = []
    tables = [JobTable(database, attempts=ATTEMPTS, lease_s=LEASE_S, clock=Clock(1000.0)) for _ in range(4)]

    def take_all(own: JobTable, name: str) -> None:
        while (job := own.take(name)) is not None:
            found.append(job.id)

    threads = [threading.Thread(target=take_all, args=(own, f"w{n}")) for n, own in enumerate(tables)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in tables:
        own.close()
    assert sorted(found) == sorted(jobs)


def test_a_row_that_another_holds_is_skipped_not_waited_for(table: JobTable) -> None:
    from sqlalchemy import select

    from beavervision.serve.jobs import _JOBS

    first, second = queued(table), queued(table)
    with table.database.write() as connection:
        held = connection.execute(select(_JOBS.c.id).where(_JOBS.c.id == first.id).with_for_update()).scalar_one()
        job = table.take("w")  # it would wait for ever
    assert job is not None
    assert (held, job.id) == (first.id, second.id)


def test_leases_fences_and_attempts_hold(table: JobTable, clock: Clock) -> None:
    job = queued(table)
    lost = table.take("a")
    assert lost is not None
    clock.now_s += LEASE_S + 1
    again = table.take("b")
    assert again is not None
    assert (again.id, again.attempts) == (job.id, 2)
    assert not table.beat(lost, 1, 2, 1.0, "drawing")
    assert not table.succeed(lost, {}, "x/y/z", 1.0, 25)
    assert table.beat(again, 1, 2, 1.0, "drawing")
    assert table.succeed(again, {"a": 1}, "x/y/z", 2.5, 25)
    done = table.get(job.id)
    assert done is not None
    assert (done.state, done.report, done.result_s) == (State.SUCCEEDED, {"a": 1}, 2.5)
    assert table.used("me")[0] == 2.5
    doomed = queued(table)
    ended: list[Job] = []
    for number in range(ATTEMPTS):
        assert table.take(f"w{number}") is not None
        table.release(f"w{number}")
    assert table.take("last", ended.append) is None
    assert [one.id for one in ended] == [doomed.id]
    assert table.figures().failed == 1


def test_keys_queues_and_webhooks_hold(table: JobTable) -> None:
    job = queued(table, key="k")
    assert queued(table, key="k").id == job.id
    assert queued(table, owner="you", key="k").id != job.id
    with pytest.raises(KeyReusedError):
        queued(table, key="k", fingerprint="other")
    with pytest.raises(QueueFullError):
        table.add(NewJob(new_id(), "me", {}, "f"), 2)
    assert table.to_tell(60) is None
    table.cancel(job.id)
    due = table.to_tell(60)
    assert due is not None
    assert (due.id, due.hook_attempts) == (job.id, 1)
    assert table.to_tell(60) is None


def test_the_same_key_at_the_same_moment_is_one_job(database: str, table: JobTable) -> None:
    tables = [JobTable(database, attempts=ATTEMPTS, lease_s=LEASE_S) for _ in range(6)]
    found: set[str] = set()
    ready = threading.Barrier(len(tables))

    def ask(own: JobTable) -> None:
        ready.wait()
        found.add(queued(own, key="same").id)

    threads = [threading.Thread(target=ask, args=(own,)) for own in tables]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own in tables:
        own.close()
    assert len(found) == 1


def test_avatars_are_kept(table: JobTable, tmp_path: Path) -> None:
    avatars = Avatars(table.database, LocalStorage(tmp_path / "files"))
    for name in ("video", "survey", "picture"):
        (tmp_path / name).write_text("x")
    avatars.add("a" * 24, "me", "Ann", "b" * 24, tmp_path / "video")
    assert avatars.ready("a" * 24, tmp_path / "survey", tmp_path / "picture", {"kind": "still"})
    row = avatars.get("a" * 24)
    assert row is not None
    assert (row.name, row.facts) == ("Ann", {"kind": "still"})
    avatars.remove("a" * 24)
    assert avatars.list("me") == ()
