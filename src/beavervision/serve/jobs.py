"""The job table: leases that a killed worker loses, bounded attempts, states that change only forwards.

Every change of a job by a worker is fenced: it holds only while the job is still running under that worker's lease. So a
worker that was thought dead cannot overwrite what its successor does, and a cancelled job stays cancelled. On
PostgreSQL rows are taken with SKIP LOCKED.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    Column,
    Connection,
    Double,
    Index,
    Integer,
    Row,
    String,
    Table,
    UniqueConstraint,
    and_,
    case,
    delete,
    func,
    insert,
    null,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError

from beavervision.serve.database import META, Database

_RETRY_S = 2.0  # before the second attempt after a passing failure; doubled each time
_DAY_S = 86_400.0
_SAMPLE = 1000  # ended jobs that figures are taken from


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({State.SUCCEEDED, State.FAILED, State.CANCELLED})


class QueueFullError(Exception):
    """As many jobs wait as may wait."""


class KeyReusedError(Exception):
    """The idempotency key was used for another request."""


_JOBS = Table(
    "jobs",
    META,
    Column("id", String(32), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("state", String(10), nullable=False),
    Column("request", JSON, nullable=False),
    Column("idempotency_key", String(200)),
    Column("fingerprint", String(64), nullable=False),
    Column("created_s", Double, nullable=False),
    Column("started_s", Double),
    Column("ended_s", Double),
    Column("not_before_s", Double, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("worker", String(64)),
    Column("lease_until_s", Double),
    Column("pictures", Integer, nullable=False),
    Column("pictures_expected", Integer),
    Column("pictures_per_s", Double, nullable=False),
    Column("error_code", String(32)),
    Column("error_message", String),
    Column("report", JSON(none_as_null=True)),
    Column("result_key", String(200)),
    Column("result_s", Double),
    Column("stage", String(16)),
    Column("hook_url", String(2000)),
    Column("hook_attempts", Integer),
    Column("hook_next_s", Double),
    UniqueConstraint("owner", "idempotency_key"),
    Index("jobs_by_state", "state", "created_s"),
    Index("jobs_by_owner", "owner", "created_s"),
)
# What succeeded of whom; it outlives the jobs, so that deleting them does not win a quota back.
_USAGE = Table(
    "usage",
    META,
    Column("number", Integer, primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("ended_s", Double, nullable=False),
    Column("seconds", Double, nullable=False),
    Index("usage_by_owner", "owner", "ended_s"),
)


@dataclass(frozen=True, slots=True)
class Job:
    """One row. Times are seconds since the epoch; `request` is what :class:`NewJob` brought; `result_s` its length.

    The webhook `hook_url` is told of the end when `hook_next_s` has come, and never again when that is None.
    """

    id: str
    owner: str
    state: State
    request: dict[str, Any]
    idempotency_key: str | None
    fingerprint: str
    created_s: float
    started_s: float | None
    ended_s: float | None
    not_before_s: float
    attempts: int
    worker: str | None
    lease_until_s: float | None
    pictures: int
    pictures_expected: int | None
    pictures_per_s: float
    error_code: str | None
    error_message: str | None
    report: dict[str, Any] | None
    result_key: str | None
    result_s: float | None
    stage: str | None
    hook_url: str | None
    hook_attempts: int | None
    hook_next_s: float | None

    @property
    def ended(self) -> bool:
        return self.state in ENDED


@dataclass(frozen=True, slots=True)
class NewJob:
    """What is asked for. `fingerprint` tells requests with the same idempotency key apart."""

    id: str
    owner: str
    request: dict[str, Any]
    fingerprint: str
    idempotency_key: str | None = None
    hook_url: str | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """Measured over the jobs that ended in the last day; None where there are none."""

    succeeded: int
    failed: int
    cancelled: int
    processed_hours: float
    success_rate: float | None
    response_p50_s: float | None
    response_p95_s: float | None
    work_mean_s: float | None


def new_id() -> str:
    return secrets.token_hex(12)


class JobTable:
    """The jobs of a service, shared by its processes. Safe from many threads.

    Args:
        url: of the database, as SQLAlchemy writes it.
        attempts: how often a job is begun before it fails for good.
        lease_s: how long a worker may be silent.
        clock: seconds since the epoch.
    """

    def __init__(self, url: str, *, attempts: int, lease_s: float, clock: Callable[[], float] = time.time) -> None:
        self._attempts, self._lease_s, self._clock = attempts, lease_s, clock
        self.database = Database(url)

    def close(self) -> None:
        self.database.close()

    def add(self, new: NewJob, waiting_limit: int) -> tuple[Job, bool]:
        """Queue a job; or the job that came with the same idempotency key, and False.

        Raises:
            QueueFullError: `waiting_limit` jobs wait already.
            KeyReusedError: the key came with another request.
        """
        now_s = self._clock()
        try:
            with self.database.write() as connection:
                earlier = self._by_key(connection, new)
                if earlier is not None:
                    return earlier, False
                waiting = select(func.count()).select_from(_JOBS).where(_JOBS.c.state == State.QUEUED)
                if connection.execute(waiting).scalar_one() >= waiting_limit:
                    raise QueueFullError
                connection.execute(
                    insert(_JOBS).values(
                        id=new.id,
                        owner=new.owner,
                        state=State.QUEUED,
                        request=new.request,
                        idempotency_key=new.idempotency_key,
                        fingerprint=new.fingerprint,
                        created_s=now_s,
                        not_before_s=now_s,
                        attempts=0,
                        pictures=0,
                        pictures_per_s=0.0,
                        hook_url=new.hook_url,
                        hook_attempts=0,
                        hook_next_s=None if new.hook_url is None else now_s,
                    )
                )
                return _job(connection.execute(select(_JOBS).where(_JOBS.c.id == new.id)).one()), True
        except IntegrityError:  # another process queued the same key at the same moment
            earlier = self.by_key(new)
            if earlier is None:
                raise
            return earlier, False

    def by_key(self, new: NewJob) -> Job | None:
        """The job that came with the idempotency key of `new`.

        Raises:
            KeyReusedError: as :meth:`add`.
        """
        with self.database.read() as connection:
            return self._by_key(connection, new)

    def _by_key(self, connection: Connection, new: NewJob) -> Job | None:
        if new.idempotency_key is None:
            return None
        same = and_(_JOBS.c.owner == new.owner, _JOBS.c.idempotency_key == new.idempotency_key)
        row = connection.execute(select(_JOBS).where(same)).first()
        if row is None:
            return None
        if row.fingerprint != new.fingerprint:
            raise KeyReusedError
        return _job(row)

    def get(self, job_id: str) -> Job | None:
        with self.database.read() as connection:
            row = connection.execute(select(_JOBS).where(_JOBS.c.id == job_id)).first()
            return None if row is None else _job(row)

    def list(
        self, owner: str, *, state: State | None = None, before_s: float | None = None, limit: int = 50
    ) -> tuple[Job, ...]:
        """The newest jobs of `owner`, created before `before_s`."""
        query = select(_JOBS).where(_JOBS.c.owner == owner).order_by(_JOBS.c.created_s.desc(), _JOBS.c.id).limit(limit)
        if state is not None:
            query = query.where(_JOBS.c.state == state)
        if before_s is not None:
            query = query.where(_JOBS.c.created_s < before_s)
        with self.database.read() as connection:
            return tuple(_job(row) for row in connection.execute(query))

    # What workers do -----------------------------------------------------------------------------

    def take(self, worker: str, on_lost: Callable[[Job], None] = lambda job: None) -> Job | None:
        """Lease the oldest job that waits, or whose worker fell silent; None if there is none.

        A job that was begun often enough already fails instead, and `on_lost` is told of it.
        """
        lost: deque[Job] = deque()
        job = self._take(worker, lost)
        for one in lost:
            on_lost(one)
        return job

    def _take(self, worker: str, lost: deque[Job]) -> Job | None:
        if not self._any_ready():
            return None
        with self.database.write() as connection:
            while True:
                query = (
                    select(_JOBS)
                    .where(self._ready())
                    .order_by(_JOBS.c.created_s)
                    .limit(1)
                    .with_for_update(skip_locked=True)
                )
                row = connection.execute(query).first()
                if row is None:
                    return None
                now_s = self._clock()
                if row.attempts >= self._attempts:
                    message = (
                        f"Its worker died {row.attempts} times. Try other settings or material, or report a defect."
                    )
                    values = self._end(State.FAILED) | {"error_code": "worker_lost", "error_message": message}
                    connection.execute(update(_JOBS).where(_JOBS.c.id == row.id).values(values))
                    lost.append(_job(row))
                    continue
                values = {
                    "state": State.RUNNING,
                    "attempts": row.attempts + 1,
                    "worker": worker,
                    "lease_until_s": now_s + self._lease_s,
                    "started_s": row.started_s or now_s,
                    "pictures": 0,
                    "pictures_expected": None,
                    "pictures_per_s": 0.0,
                    "stage": None,
                }
                connection.execute(update(_JOBS).where(_JOBS.c.id == row.id).values(values))
                return _job(connection.execute(select(_JOBS).where(_JOBS.c.id == row.id)).one())

    def _ready(self) -> Any:
        now_s = self._clock()
        waiting = and_(_JOBS.c.state == State.QUEUED, _JOBS.c.not_before_s <= now_s)
        return or_(waiting, and_(_JOBS.c.state == State.RUNNING, _JOBS.c.lease_until_s < now_s))

    def _any_ready(self) -> bool:
        with self.database.read() as connection:
            return connection.execute(select(_JOBS.c.id).where(self._ready()).limit(1)).first() is not None

    def beat(self, job: Job, pictures: int, expected: int | None, per_s: float, stage: str | None = None) -> bool:
        """Renew the lease and tell of progress; False if the job is no longer this worker's."""
        return self._fenced(
            job,
            lease_until_s=self._clock() + self._lease_s,
            pictures=pictures,
            pictures_expected=expected,
            pictures_per_s=per_s,
            stage=stage,
        )

    def succeed(
        self,
        job: Job,
        report: dict[str, Any],
        result_key: str | None,
        result_s: float,
        pictures: int,
        per_s: float = 0.0,
    ) -> bool:
        """The job is done; False if it was no longer this worker's."""
        done = {"report": report, "result_key": result_key, "result_s": result_s}
        values = {**self._end(State.SUCCEEDED), **done, "pictures": pictures, "pictures_expected": pictures}
        values["pictures_per_s"] = per_s
        used = {"owner": job.owner, "ended_s": values["ended_s"], "seconds": result_s}
        with self.database.write() as connection:
            mine = connection.execute(update(_JOBS).where(_fence(job)).values(values)).rowcount == 1
            if mine and result_s:
                connection.execute(insert(_USAGE).values(used))
            return mine

    def fail(self, job: Job, code: str, message: str, *, passing: bool = False) -> State | None:
        """The attempt failed; a `passing` failure is tried again. The job's state after it, None if not this worker's."""
        told = {"error_code": code, "error_message": message}
        if passing and job.attempts < self._attempts:
            wait_s = _RETRY_S * 2 ** (job.attempts - 1)
            again = self._fenced(job, **told, **_QUEUED, not_before_s=self._clock() + wait_s)
            return State.QUEUED if again else None
        return State.FAILED if self._fenced(job, **(self._end(State.FAILED) | told)) else None

    def give_back(self, job: Job) -> bool:
        """The worker must stop through no fault of the job: queue it again without counting the attempt."""
        return self._fenced(job, **_QUEUED, attempts=job.attempts - 1, not_before_s=self._clock())

    def release(self, worker: str) -> None:
        """The worker is dead: its job may be taken at once."""
        with self.database.write() as connection:
            held = and_(_JOBS.c.worker == worker, _JOBS.c.state == State.RUNNING)
            connection.execute(update(_JOBS).where(held).values(lease_until_s=0.0))

    def _fenced(self, job: Job, **values: Any) -> bool:
        with self.database.write() as connection:
            return connection.execute(update(_JOBS).where(_fence(job)).values(values)).rowcount == 1

    def _end(self, state: State) -> dict[str, Any]:
        return {
            "state": state,
            "ended_s": self._clock(),
            "lease_until_s": None,
            "error_code": None,
            "error_message": None,
        }

    # What clients and the keeper do --------------------------------------------------------------

    def cancel(self, job_id: str) -> bool:
        """End a job that has not ended; its worker finds out at its next beat. False if it had ended."""
        with self.database.write() as connection:
            alive = and_(_JOBS.c.id == job_id, _JOBS.c.state.in_((State.QUEUED, State.RUNNING)))
            return connection.execute(update(_JOBS).where(alive).values(self._end(State.CANCELLED))).rowcount == 1

    def remove(self, job_id: str) -> None:
        with self.database.write() as connection:
            connection.execute(delete(_JOBS).where(_JOBS.c.id == job_id))

    def ended_before(self, time_s: float) -> tuple[str, ...]:
        """The ids of jobs that ended earlier than that."""
        with self.database.read() as connection:
            return tuple(connection.execute(select(_JOBS.c.id).where(_JOBS.c.ended_s < time_s)).scalars())

    def used(self, owner: str, window_s: float = _DAY_S) -> tuple[float, float]:
        """The seconds of video made for `owner` within the window, and when the earliest of them leaves it."""
        since = and_(_USAGE.c.owner == owner, _USAGE.c.ended_s > self._clock() - window_s)
        with self.database.read() as connection:
            query = select(func.sum(_USAGE.c.seconds), func.min(_USAGE.c.ended_s)).where(since)
            seconds, first_s = connection.execute(query).one()
        return seconds or 0.0, (first_s or self._clock()) + window_s

    def forget_usage(self, before_s: float) -> None:
        with self.database.write() as connection:
            connection.execute(delete(_USAGE).where(_USAGE.c.ended_s < before_s))

    # Webhooks ------------------------------------------------------------------------------------

    def to_tell(self, again_s: float) -> Job | None:
        """A job that ended and whose webhook is due; it is due again in `again_s` unless :meth:`told` says otherwise."""
        now_s = self._clock()
        due = and_(_JOBS.c.hook_next_s <= now_s, _JOBS.c.state.in_(tuple(ENDED)))
        with self.database.read() as connection:
            if connection.execute(select(_JOBS.c.id).where(due).limit(1)).first() is None:
                return None
        with self.database.write() as connection:
            query = select(_JOBS).where(due).order_by(_JOBS.c.hook_next_s).limit(1).with_for_update(skip_locked=True)
            row = connection.execute(query).first()
            if row is None:
                return None
            values = {"hook_attempts": (row.hook_attempts or 0) + 1, "hook_next_s": now_s + again_s}
            connection.execute(update(_JOBS).where(_JOBS.c.id == row.id).values(values))
            return _job(connection.execute(select(_JOBS).where(_JOBS.c.id == row.id)).one())

    def told(self, job: Job, again_s: float | None) -> None:
        """The webhook of `job` was tried; it is due again in `again_s`, or never if None."""
        next_s = None if again_s is None else self._clock() + again_s
        this = and_(_JOBS.c.id == job.id, _JOBS.c.hook_attempts == job.hook_attempts)
        with self.database.write() as connection:
            connection.execute(update(_JOBS).where(this).values(hook_next_s=next_s))

    # Figures -------------------------------------------------------------------------------------

    def counts(self) -> dict[State, int]:
        """How many jobs are in each state."""
        with self.database.read() as connection:
            rows = connection.execute(select(_JOBS.c.state, func.count()).group_by(_JOBS.c.state)).all()
        return dict.fromkeys(State, 0) | {State(state): count for state, count in rows}

    def demand(self) -> tuple[int, frozenset[str]]:
        """How many jobs could be taken now, and the workers that have one."""
        ready = self._ready()
        # In one query: a job that is taken between two would be in both.
        holder = case((ready, null()), else_=_JOBS.c.worker)
        with self.database.read() as connection:
            query = select(holder).where(or_(ready, _JOBS.c.state == State.RUNNING))
            holders = connection.execute(query).scalars().all()
        return holders.count(None), frozenset(holders) - {None}

    def figures(self) -> Figures:
        since = _JOBS.c.ended_s > self._clock() - _DAY_S
        columns = (_JOBS.c.state, _JOBS.c.created_s, _JOBS.c.started_s, _JOBS.c.ended_s, _JOBS.c.result_s)
        query = select(*columns).where(since).order_by(_JOBS.c.ended_s.desc()).limit(_SAMPLE)
        with self.database.read() as connection:
            rows = connection.execute(query).all()
        count = {state: sum(row.state == state for row in rows) for state in ENDED}
        good = [row for row in rows if row.state == State.SUCCEEDED]
        times = sorted(row.ended_s - row.created_s for row in good)
        decided = count[State.SUCCEEDED] + count[State.FAILED]
        return Figures(
            succeeded=count[State.SUCCEEDED],
            failed=count[State.FAILED],
            cancelled=count[State.CANCELLED],
            processed_hours=sum(row.result_s or 0.0 for row in good) / 3600,
            success_rate=count[State.SUCCEEDED] / decided if decided else None,
            response_p50_s=_quantile(times, 0.5),
            response_p95_s=_quantile(times, 0.95),
            work_mean_s=sum(row.ended_s - row.started_s for row in good) / len(good) if good else None,
        )


_QUEUED: dict[str, Any] = {"state": State.QUEUED, "worker": None, "lease_until_s": None}


def _job(row: Row[Any]) -> Job:
    values = row._asdict()
    return Job(**(values | {"state": State(values["state"])}))


def _fence(job: Job) -> Any:
    """Whether the job is still what its worker took."""
    return and_(
        _JOBS.c.id == job.id,
        _JOBS.c.state == State.RUNNING,
        _JOBS.c.worker == job.worker,
        _JOBS.c.attempts == job.attempts,
    )


def _quantile(ordered: list[float], share: float) -> float | None:
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None
