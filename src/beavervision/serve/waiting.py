"""Requests that wait for a job."""

from __future__ import annotations

import time

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from beavervision.serve.jobs import Job, State
from beavervision.serve.problems import Problem
from beavervision.serve.service import Service

POLL_S = 0.5  # for jobs that no worker of this server tells of


async def ended(service: Service, job: Job, request: Request, wait_s: float) -> Job:
    """The job once it has ended, or as it is when the time, the client's patience or the service is over.

    Raises:
        Problem: it was deleted.
    """
    until_s = time.monotonic() + wait_s
    with service.supervisor.news.watch(job.id) as bell:
        while not job.ended and (left_s := until_s - time.monotonic()) > 0:
            if service.draining.is_set() and job.state is State.QUEUED:
                break
            if await request.is_disconnected():
                break
            await bell.wait(min(POLL_S, left_s))
            found = await run_in_threadpool(service.place.table.get, job.id)
            if found is None:
                raise Problem(404, "no_job", "The job was deleted while you waited for it.")
            job = found
    return job


def preferred(prefer: str, limit_s: float) -> tuple[bool, float]:
    """Whether the client wants to be answered at once, and how long the request may wait (RFC 7240)."""
    wishes = dict(part.strip().lower().partition("=")[::2] for part in prefer.replace(";", ",").split(","))
    if "respond-async" in wishes:
        return True, 0.0
    wait = wishes.get("wait", "").strip('"')
    return False, min(int(wait), limit_s) if wait.isdecimal() and len(wait) < 9 else limit_s
