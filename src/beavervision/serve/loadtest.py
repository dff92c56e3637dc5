"""The BeaverVision paper's test protocol against a running service: users who send jobs, and what they meet.

Four scenarios: one user who goes on and on, several at once, twice as many as that in one moment, and the time after it. A
user sends a job, waits for its video, fetches it, deletes the job and sends the next. A service that says "later" (429 or
503 with Retry-After) is obeyed: that is no failure, but the time counts.

It talks HTTP with the standard library alone, so that it also runs where the service is not installed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import math
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from beavervision.errors import BeaverVisionError, UsageError

SCENARIOS = ("single_user_continuous", "multi_user_concurrent", "peak_load", "recovery")
SENTENCE = "Papa moved away, and nobody asked him why."  # some two seconds

_ENDED = ("succeeded", "failed", "cancelled")
_TIMEOUT_S = 120.0  # for one answer
_JOB_S = 1800.0  # for one job, waiting included
_FOLLOW_S = 0.2  # between two looks at a job
_SAMPLE_S = 0.5  # between two looks at memory, GPU and readiness
_START_S = 120.0  # until a service of our own is ready
_STOP_S = 20.0
_RECOVERED = 1.5  # a job within so many times the usual latency is a usual one
_RECOVERY_S = 300.0  # so long it is waited for
_PEAK = 2  # requests in one moment, for each of the most users
_GPU, _USED = "beavervision_device_utilisation_ratio", "beavervision_device_memory_used_bytes"

Told = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Plan:
    """What to try. `users` are the numbers of users at once; each scenario takes `seconds`, and as long as its last jobs need."""

    users: tuple[int, ...] = (1, 5, 10, 20)
    seconds: float = 30.0
    scenarios: tuple[str, ...] = SCENARIOS
    text: str = SENTENCE

    def __post_init__(self) -> None:
        if not self.users or min(self.users) < 1 or max(self.users) > 1000:
            raise UsageError(f"users {self.users}: give numbers from 1 to 1000.")
        if not self.seconds > 0:
            raise UsageError(f"seconds must be above 0, not {self.seconds:g}.")
        if not self.scenarios or not set(self.scenarios) <= set(SCENARIOS):
            raise UsageError(f"Scenarios {', '.join(self.scenarios)}: there are {', '.join(SCENARIOS)}.")


@dataclass(frozen=True, slots=True)
class Row:
    """One scenario with one number of users. None where nothing was measured.

    response_s is the time until the service has taken a job, latency_s until its video is there; fps counts the pictures of
    all users, job_fps is the median of single jobs while they are at work. availability is the share of looks at
    ``/readyz`` that were answered in time, whatever the answer; ready_share that of those that said yes. Memory is that
    of the server and its workers, at the scenario's start and at its peak. recovered_s is the time from the peak's last
    answer to the end of the first job as fast as before it.
    """

    scenario: str
    users: int
    seconds: float
    requests: int
    succeeded: int
    success_rate: float | None
    error_rate: float | None
    errors: dict[str, int]
    told_to_wait: int
    availability: float | None
    ready_share: float | None
    response_p50_s: float | None
    response_p95_s: float | None
    latency_p50_s: float | None
    latency_p95_s: float | None
    fps: float
    job_fps: float | None
    memory_before_mb: float | None
    memory_peak_mb: float | None
    gpu_use: float | None
    gpu_memory_mb: float | None
    recovered_s: float | None = None


@dataclass(frozen=True, slots=True)
class LoadReport:
    """All rows. memory_for_extra_user_mb is how much the peak grows from the fewest to the most users, for each of them."""

    service: dict[str, Any]
    seconds_of_video: float | None
    rows: tuple[Row, ...]
    memory_for_extra_user_mb: float | None
    failed: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def loadtest(
    url: str, face: bytes, plan: Plan | None = None, *, key: str | None = None, on_progress: Told | None = None
) -> LoadReport:
    """Run the scenarios of `plan` one after another against the service at `url`.

    Args:
        face: a video or picture that each job uploads.
        key: the API key to send.
        on_progress: told what begins.

    Raises:
        UsageError: there is no service at `url`, or it does not let us in.
    """
    plan, told = plan or Plan(), on_progress or (lambda line: None)
    client = _Client(url, key)
    status = client.status()
    crowd = _Crowd(client, face, plan.text)
    alone = [crowd.job() for _ in range(2)][-1]  # what is loaded for the first is not to count
    if not isinstance(alone, _Done):
        raise UsageError(f"The service cannot do the job ({alone}). Send one yourself to see what it says.")
    crowd.usual_s = alone.latency_s
    rows: list[Row] = []
    for scenario in SCENARIOS:
        if scenario not in plan.scenarios:
            continue
        for users in plan.users if scenario == "multi_user_concurrent" else (max(plan.users),):
            users = 1 if scenario == "single_user_continuous" else users
            told(f"{scenario}, {users} users")
            rows.append(_RUNS[scenario](crowd, users, plan))
    return LoadReport(
        service={"version": status["version"], "workers": len(status["workers"]), "url": url},
        seconds_of_video=alone.video_s,
        rows=tuple(rows),
        memory_for_extra_user_mb=_growth(rows),
        failed=sum(sum(row.errors.values()) for row in rows),
    )


@contextlib.contextmanager
def own_service(workers: int | None = None) -> Iterator[str]:
    """Start a service on this machine in a temporary folder; its address. It is stopped in the end.

    Raises:
        BeaverVisionError: it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="beavervision-loadtest-") as folder:
        command = [sys.executable, "-m", "beavervision", "serve", "--port", "0", "--folder", folder]
        command += [] if workers is None else ["--workers", str(workers)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            found = re.search(r"http://\S+", process.stdout.readline())
            if found is None:
                raise BeaverVisionError("The service does not start. `beavervision serve` says why.")
            until_s = time.monotonic() + _START_S
            client = _Client(found[0], None)
            while not client.ready()[1]:
                if time.monotonic() > until_s or process.poll() is not None:
                    raise BeaverVisionError("The service does not become ready. `beavervision serve` says why.")
                time.sleep(_FOLLOW_S)
            yield found[0]
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


# The scenarios -----------------------------------------------------------------------------------


def _continuous(crowd: _Crowd, users: int, plan: Plan) -> Row:
    return crowd.run("single_user_continuous", users, seconds=plan.seconds)


def _concurrent(crowd: _Crowd, users: int, plan: Plan) -> Row:
    return crowd.run("multi_user_concurrent", users, seconds=plan.seconds)


def _peak(crowd: _Crowd, users: int, plan: Plan) -> Row:
    return crowd.run("peak_load", users * _PEAK, seconds=0.0)


def _recovery(crowd: _Crowd, users: int, plan: Plan) -> Row:
    """One user after a peak, until a job is as fast as before it, and for the plan's time at least."""
    if "peak_load" not in plan.scenarios:  # else it is just over
        _peak(crowd, users, plan)
    return crowd.run("recovery", 1, seconds=plan.seconds, fast_s=crowd.usual_s * _RECOVERED)


_RUNS: dict[str, Callable[[_Crowd, int, Plan], Row]] = dict(
    zip(SCENARIOS, (_continuous, _concurrent, _peak, _recovery), strict=True)
)


@dataclass(frozen=True, slots=True)
class _Done:
    """A job that succeeded; `at_s` on the monotonic clock."""

    response_s: float
    latency_s: float
    pictures: int
    fps: float | None
    video_s: float | None
    at_s: float


@dataclass(slots=True)
class _Seen:
    """What the users of one run met. Guarded by the crowd's lock."""

    done: list[_Done] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    waits: int = 0


class _Crowd:
    """Users of a service: each a thread."""

    def __init__(self, client: _Client, face: bytes, text: str) -> None:
        self._client = client
        self._body, self._kind = form({"video": face, "text": text, "consent": "true"})
        self._lock = threading.Lock()
        self._seen = _Seen()
        self.usual_s = math.inf  # the latency of a job alone

    def job(self) -> _Done | str:
        """Send a job and fetch its video: how it went, or what went wrong."""
        began_s = time.monotonic()
        client, headers = self._client, {"content-type": self._kind, "prefer": "respond-async"}
        try:
            while True:
                status, told, document = client.call("POST", "/api/v1/lipsync", self._body, headers)
                wait = told.get("retry-after", "")
                if status not in (429, 503) or not wait.isdigit() or time.monotonic() - began_s > _JOB_S:
                    break
                with self._lock:
                    self._seen.waits += 1
                time.sleep(int(wait))
            if status not in (200, 202):
                return str(document.get("code", status))
            response_s = time.monotonic() - began_s
            job = document
            while job["state"] not in _ENDED:
                if time.monotonic() - began_s > _JOB_S:
                    return "too_slow"
                time.sleep(_FOLLOW_S)
                status, _, job = client.call("GET", document["links"]["self"])
                if status != 200:
                    return str(job.get("code", status))
            at_s = time.monotonic()
            if job["state"] != "succeeded":
                return str((job["error"] or {}).get("code", job["state"]))
            status, _, _ = client.call("GET", job["links"]["result"])
            if status != 200:
                return f"result_{status}"
            client.call("DELETE", document["links"]["self"])
            pictures, work_s = int(job["progress"]["pictures"]), _seconds(job["started"], job["ended"])
            fps = pictures / work_s if work_s > 0 else None
            return _Done(response_s, at_s - began_s, pictures, fps, job["seconds"], at_s)
        except (OSError, http.client.HTTPException, KeyError, ValueError) as error:
            return f"broken: {type(error).__name__}"

    def run(self, scenario: str, users: int, *, seconds: float, fast_s: float | None = None) -> Row:
        """So many users for `seconds`, at least one job each; with `fast_s` on until a job was as fast as that."""
        self._seen = seen = _Seen()
        watch = _Watch(self._client)
        recovered_s: list[float] = []

        def use() -> None:
            while True:
                found = self.job()
                with self._lock:
                    if isinstance(found, _Done):
                        seen.done.append(found)
                        if fast_s is not None and found.latency_s <= fast_s and not recovered_s:
                            recovered_s.append(found.at_s - began_s)
                    else:
                        seen.errors[found] += 1
                over = time.monotonic() - began_s >= seconds
                if over and (fast_s is None or recovered_s or time.monotonic() - began_s > _RECOVERY_S):
                    return
                if not isinstance(found, _Done):
                    time.sleep(_FOLLOW_S)

        with watch.watching():
            began_s = time.monotonic()
            threads = [threading.Thread(target=use, name=f"user {number}", daemon=True) for number in range(users)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            lasted_s = time.monotonic() - began_s
        return _row(scenario, users, lasted_s, seen, watch, recovered_s[0] if recovered_s else None)


def _row(scenario: str, users: int, lasted_s: float, seen: _Seen, watch: _Watch, recovered_s: float | None) -> Row:
    good, bad = len(seen.done), sum(seen.errors.values())
    response, latency = (sorted(getattr(d, name) for d in seen.done) for name in ("response_s", "latency_s"))
    rates = sorted(d.fps for d in seen.done if d.fps is not None)
    return Row(
        scenario=scenario,
        users=users,
        seconds=round(lasted_s, 3),
        requests=good + bad,
        succeeded=good,
        success_rate=round(good / (good + bad), 4) if good + bad else None,
        error_rate=round(bad / (good + bad), 4) if good + bad else None,
        errors=dict(seen.errors),
        told_to_wait=seen.waits,
        availability=_share(watch.answered, watch.looks),
        ready_share=_share(watch.ready, watch.looks),
        response_p50_s=_quantile(response, 0.5),
        response_p95_s=_quantile(response, 0.95),
        latency_p50_s=_quantile(latency, 0.5),
        latency_p95_s=_quantile(latency, 0.95),
        fps=round(sum(d.pictures for d in seen.done) / lasted_s, 1),
        job_fps=_quantile(rates, 0.5),
        memory_before_mb=_mb(watch.memory[0] if watch.memory else None),
        memory_peak_mb=_mb(max(watch.memory, default=None)),
        gpu_use=max(watch.gpu_use, default=None),
        gpu_memory_mb=_mb(max(watch.gpu_memory, default=None)),
        recovered_s=None if recovered_s is None else round(recovered_s, 1),
    )


def _growth(rows: Sequence[Row]) -> float | None:
    """Of the peak of memory, for each user more, over the rows of several users."""
    peaks = {
        row.users: row.memory_peak_mb
        for row in rows
        if row.scenario == "multi_user_concurrent" and row.memory_peak_mb is not None
    }
    if len(peaks) < 2:
        return None
    few, many = min(peaks), max(peaks)
    return round((peaks[many] - peaks[few]) / (many - few), 1)


class _Watch:
    """Looks at the service while others use it."""

    def __init__(self, client: _Client) -> None:
        self.looks = self.answered = self.ready = 0
        self.memory: list[int] = []
        self.gpu_use: list[float] = []
        self.gpu_memory: list[int] = []
        self._client, self._over = client, threading.Event()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        thread = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._look()
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            self._look()

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            self._look()

    def _look(self) -> None:
        answered, ready = self._client.ready()
        self.looks += 1
        self.answered += answered
        self.ready += ready
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            measured = self._client.metrics()
            memory = self._client.memory_here()
            if memory is None:
                memory = sum(int(value) for name, device, value in measured if name == _USED and device == "cpu")
            if memory:
                self.memory.append(memory)
            self.gpu_use += [value for name, _, value in measured if name == _GPU]
            used = [int(value) for name, device, value in measured if name == _USED and device != "cpu"]
            if used:  # a driver tells each worker of everybody's use
                self.gpu_memory.append(max(used))


# HTTP --------------------------------------------------------------------------------------------

_METRIC = re.compile(rf'^({_GPU}|{_USED}){{[^}}]*device="([^"]*)"[^}}]*}} (\S+)', re.MULTILINE)


class _Client:
    """Calls one service. Safe from many threads: each call has a connection of its own."""

    def __init__(self, url: str, key: str | None) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{url!r} is no address of a service. Give one like http://127.0.0.1:8000.")
        self._secure, self._host = parts.scheme == "https", parts.netloc.rpartition("@")[2]
        self._local = parts.hostname in ("127.0.0.1", "::1", "localhost")
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    def call(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and document (an empty one where the answer is no JSON)."""
        status, told, data = self._raw(method, path, body, headers or {})
        is_json = "json" in told.get("content-type", "")
        return status, told, json.loads(data) if is_json and data else {}

    def _raw(
        self, method: str, path: str, body: bytes | None, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        make = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        with contextlib.closing(make(self._host, timeout=_TIMEOUT_S)) as connection:
            connection.request(method, path, body, self._headers | headers)
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def status(self) -> Any:
        """Raises UsageError where there is no service, or none that lets us in."""
        try:
            status, _, document = self.call("GET", "/api/v1/status")
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UsageError(f"No service answers at {self._host}: {error}. Start one, or use --start.") from error
        if status != 200:
            raise UsageError(f"The service at {self._host} says: {document.get('detail', status)}")
        return document

    def ready(self) -> tuple[bool, bool]:
        """Whether it answers, and whether it would take a job."""
        try:
            status = self._raw("GET", "/readyz", None, {})[0]
        except (OSError, http.client.HTTPException):
            return False, False
        return status in (200, 503), status == 200

    def metrics(self) -> list[tuple[str, str, float]]:
        """What the service tells of its devices: metric, device, value."""
        page = self._raw("GET", "/metrics", None, {})[2].decode()
        return [(name, device, float(value)) for name, device, value in _METRIC.findall(page)]

    def memory_here(self) -> int | None:
        """The resident memory of the server and its workers, in bytes, where they run on this machine."""
        if not self._local or sys.platform != "linux":
            return None
        try:
            return self._resident()
        except (OSError, IndexError, UsageError):  # a worker ended in this moment, or nobody answers
            return None

    def _resident(self) -> int | None:
        workers = [int(worker["pid"]) for worker in self.status()["workers"] if worker["pid"]]
        # Behind a tunnel the numbers are those of another machine.
        if not workers or "beavervision.serve.worker" not in Path(f"/proc/{workers[0]}/cmdline").read_text():
            return None
        server = int(Path(f"/proc/{workers[0]}/stat").read_text().rpartition(")")[2].split()[1])  # a worker's parent
        pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in (server, *workers))
        return pages * os.sysconf("SC_PAGE_SIZE")


def form(fields: dict[str, bytes | str], filename: str = "face") -> tuple[bytes, str]:
    """The fields as a multipart form, those that are bytes as files, and its content type."""
    boundary = secrets.token_hex(16)
    body = b""
    for name, value in fields.items():
        name_of_file, content = ("", value.encode()) if isinstance(value, str) else (f'; filename="{filename}"', value)
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{name_of_file}\r\n\r\n'.encode()
        body += content + b"\r\n"
    return body + f"--{boundary}--\r\n".encode(), f"multipart/form-data; boundary={boundary}"


# Figures -----------------------------------------------------------------------------------------


def _seconds(begin: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


def _quantile(ordered: Sequence[float], share: float) -> float | None:
    return round(ordered[math.ceil(share * len(ordered)) - 1], 3) if ordered else None


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def _mb(value: int | None) -> float | None:
    return None if value is None else round(value / 1e6, 1)


_HEAD = (
    "scenario", "users", "jobs", "failed", "success", "available", "response p50", "latency p50", "p95", "fps",
    "fps of a job", "memory", "GPU", "recovered",
)  # fmt: skip


def format_table(report: LoadReport) -> list[str]:
    """The report for a terminal: times in seconds, memory in MB at its peak."""
    rows = [
        (
            row.scenario, str(row.users), str(row.requests), str(sum(row.errors.values())), _percent(row.success_rate),
            _percent(row.availability), _plain(row.response_p50_s), _plain(row.latency_p50_s), _plain(row.latency_p95_s),
            _plain(row.fps), _plain(row.job_fps), _plain(row.memory_peak_mb), _percent(row.gpu_use),
            _plain(row.recovered_s),
        )
        for row in report.rows
    ]  # fmt: skip
    widths = [max(len(row[column]) for row in (_HEAD, *rows)) for column in range(len(_HEAD))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (_HEAD, *rows)]
    lines.append(f"Each job makes {report.seconds_of_video} s of video; {report.service['workers']} workers.")
    if report.memory_for_extra_user_mb is not None:
        lines.append(f"Each user more takes {report.memory_for_extra_user_mb} MB.")
    wrong: Counter[str] = Counter()
    for row in report.rows:
        wrong.update(row.errors)
    lines.append(f"Failed: {dict(wrong)}" if wrong else "Nothing failed.")
    return lines


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
