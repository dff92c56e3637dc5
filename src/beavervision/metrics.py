"""Every metric of the product, in one registry of its own, and the times of one run.

The registry is process-wide and what ``/metrics`` serves; :class:`StageTimes` is one run's share of it, for the JSON
report and the command line. Only the engine and the server write here: stages never time themselves.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import Counter as Tally
from dataclasses import dataclass, field
from typing import TypedDict

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

REGISTRY = CollectorRegistry()

_CLIP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)

STAGE_WALL_SECONDS = Histogram(
    "beavervision_stage_wall_seconds",
    "Wall time inside a stage for one clip, without waiting for its neighbours",
    ["stage"],
    buckets=_CLIP_SECONDS,
    registry=REGISTRY,
)
STAGE_CPU_SECONDS = Histogram(
    "beavervision_stage_cpu_seconds",
    "CPU time of the stage's own thread for one clip",
    ["stage"],
    buckets=_CLIP_SECONDS,
    registry=REGISTRY,
)
STAGE_WAIT_SECONDS = Counter(
    "beavervision_stage_wait_seconds", "Time a stage waited for its neighbours", ["stage"], registry=REGISTRY
)
PICTURES = Counter("beavervision_pictures", "Pictures that left a stage", ["stage"], registry=REGISTRY)
SHED = Counter("beavervision_clips_shed", "Clips merged away before a stage that lagged", ["stage"], registry=REGISTRY)
QUEUE_DEPTH = Gauge("beavervision_queue_depth", "Clips waiting after a stage, all flows", ["stage"], registry=REGISTRY)
BATCH_SIZE = Histogram(
    "beavervision_batch_size",
    "Rows that a network was given in one call",
    ["net"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128),
    registry=REGISTRY,
)
DEVICE_MEMORY_USED_BYTES = Gauge(
    "beavervision_device_memory_used_bytes", "Measured use of a device's memory", ["device"], registry=REGISTRY
)
DEVICE_MEMORY_BUDGET_BYTES = Gauge(
    "beavervision_device_memory_budget_bytes", "What may be used of a device's memory", ["device"], registry=REGISTRY
)
DEVICE_UTILISATION = Gauge(
    "beavervision_device_utilisation_ratio",
    "How busy a GPU is, of 1, as its driver tells",
    ["device"],
    registry=REGISTRY,
)
JOBS = Counter("beavervision_jobs", "Jobs that ended, by outcome", ["outcome"], registry=REGISTRY)
WEBHOOKS = Counter("beavervision_webhooks", "Webhooks tried, by outcome", ["outcome"], registry=REGISTRY)
JOBS_QUEUED = Gauge("beavervision_jobs_queued", "Jobs that wait for a worker", registry=REGISTRY)
JOB_SECONDS = Histogram(
    "beavervision_job_seconds",
    "Time from the acceptance of a job to its success",
    buckets=(1, 2, 5, 10, 20, 60, 120, 300, 600, 1800, 3600),
    registry=REGISTRY,
)
HTTP_SECONDS = Histogram(
    "beavervision_http_seconds",
    "Time to the end of an answer, by route",
    ["method", "route", "status"],
    buckets=(0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60),
    registry=REGISTRY,
)
JOBS_RUNNING = Gauge("beavervision_jobs_running", "Jobs at work now", registry=REGISTRY)

LIVE_SESSIONS = Gauge("beavervision_live_sessions", "Live sessions that are open", registry=REGISTRY)
LIVE_PICTURES_DUE = Counter(
    "beavervision_live_pictures_due", "Pictures of a session whose time came", ["session"], registry=REGISTRY
)
LIVE_PICTURES_DROPPED = Counter(
    "beavervision_live_pictures_dropped", "Those that were not there in time", ["session"], registry=REGISTRY
)
LIVE_DELAY_SECONDS = Histogram(
    "beavervision_live_delay_seconds",
    "From the arrival of streamed sound to the moment that holds it",
    ["session"],
    buckets=(0.1, 0.15, 0.2, 0.225, 0.25, 0.3, 0.4, 0.6, 1, 2),
    registry=REGISTRY,
)
LIVE_SKEW_SECONDS = Gauge(
    "beavervision_live_skew_seconds",
    "Largest distance of a picture's time from its sound's",
    ["session"],
    registry=REGISTRY,
)
LIVE_SAY_SECONDS = Histogram(
    "beavervision_live_say_seconds",
    "From a text to its first sound and picture",
    buckets=(0.05, 0.1, 0.2, 0.3, 0.5, 0.9, 1.5, 3, 10),
    registry=REGISTRY,
)
LIVE_ENCODED_SECONDS = Histogram(
    "beavervision_live_encoded_seconds",
    "From the time of a moment to its encoded picture and sound",
    buckets=(0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.5, 2),
    registry=REGISTRY,
)
_LIVE = (LIVE_PICTURES_DUE, LIVE_PICTURES_DROPPED, LIVE_DELAY_SECONDS, LIVE_SKEW_SECONDS)


def forget_live(session: str) -> None:
    """A session is over: its series end."""
    for metric in _LIVE:
        with contextlib.suppress(KeyError):
            metric.remove(session)


def exposition() -> bytes:
    """The whole registry in Prometheus' text format."""
    return generate_latest(REGISTRY)


class StageReport(TypedDict):
    """One stage over one run. Sums are in ms; the medians are ms per picture, within 1 %."""

    pictures: int
    wall_ms: float
    cpu_ms: float
    waiting_ms: float
    first_picture_ms: float | None
    wall_ms_per_picture: float | None
    cpu_ms_per_picture: float | None


class RunReport(TypedDict):
    """One run. process_cpu_ms counts every thread of the process, so it includes those inside codecs and runtimes."""

    pictures: int
    elapsed_ms: float
    first_picture_ms: float | None
    pictures_per_s: float
    stages_cpu_ms: float
    process_cpu_ms: float
    stages: dict[str, StageReport]


class _Spread:
    """A median in constant memory: counts over logarithmic bins 2 % wide."""

    _STEP = math.log(1.02)
    _FLOOR_MS = 1e-3

    def __init__(self) -> None:
        self._bins: Tally[int] = Tally()

    def add(self, value_ms: float, weight: int) -> None:
        self._bins[round(math.log(max(value_ms, self._FLOOR_MS)) / self._STEP)] += weight

    def median(self) -> float | None:
        half, seen = self._bins.total() / 2, 0
        for key in sorted(self._bins):
            seen += self._bins[key]
            if seen >= half:
                return math.exp(key * self._STEP)
        return None


@dataclass(slots=True)
class _Stage:
    pictures: int = 0
    wall_ms: float = 0.0
    cpu_ms: float = 0.0
    waiting_ms: float = 0.0
    first_picture_ms: float | None = None
    wall: _Spread = field(default_factory=_Spread)
    cpu: _Spread = field(default_factory=_Spread)


class StageTimes:
    """The times of one run, stage by stage; the clock starts with the object. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: dict[str, _Stage] = {}
        self._pictures = 0
        self._first_ms: float | None = None
        self._start_s = time.perf_counter()
        self._start_cpu_s = time.process_time()

    def expect(self, *stages: str) -> None:
        """Fix the order in which stages are reported."""
        with self._lock:
            for stage in stages:
                self._stages.setdefault(stage, _Stage())

    def worked(self, stage: str, wall_s: float, cpu_s: float, pictures: int) -> None:
        """A stage spent this on handing on `pictures` pictures (0: its last words after the last clip)."""
        STAGE_WALL_SECONDS.labels(stage).observe(wall_s)
        STAGE_CPU_SECONDS.labels(stage).observe(cpu_s)
        PICTURES.labels(stage).inc(pictures)
        now_ms = self._now_ms()
        with self._lock:
            entry = self._stages.setdefault(stage, _Stage())
            entry.wall_ms += wall_s * 1e3
            entry.cpu_ms += cpu_s * 1e3
            if pictures:
                if entry.first_picture_ms is None:
                    entry.first_picture_ms = now_ms
                entry.pictures += pictures
                entry.wall.add(wall_s * 1e3 / pictures, pictures)
                entry.cpu.add(cpu_s * 1e3 / pictures, pictures)

    def waited(self, stage: str, wall_s: float) -> None:
        """A stage waited for the one before or after it."""
        STAGE_WAIT_SECONDS.labels(stage).inc(wall_s)
        with self._lock:
            self._stages.setdefault(stage, _Stage()).waiting_ms += wall_s * 1e3

    def delivered(self, pictures: int) -> None:
        """The run as a whole handed out `pictures` pictures."""
        now_ms = self._now_ms()
        with self._lock:
            if self._first_ms is None:
                self._first_ms = now_ms
            self._pictures += pictures

    def report(self) -> RunReport:
        """Everything so far, ready for JSON."""
        elapsed_ms = self._now_ms()
        process_cpu_ms = (time.process_time() - self._start_cpu_s) * 1e3
        with self._lock:
            stages = {
                name: StageReport(
                    pictures=s.pictures,
                    wall_ms=round(s.wall_ms, 3),
                    cpu_ms=round(s.cpu_ms, 3),
                    waiting_ms=round(s.waiting_ms, 3),
                    first_picture_ms=_rounded(s.first_picture_ms),
                    wall_ms_per_picture=_rounded(s.wall.median()),
                    cpu_ms_per_picture=_rounded(s.cpu.median()),
                )
                for name, s in self._stages.items()
            }
            return RunReport(
                pictures=self._pictures,
                elapsed_ms=round(elapsed_ms, 3),
                first_picture_ms=_rounded(self._first_ms),
                pictures_per_s=round(self._pictures / elapsed_ms * 1e3, 3),
                stages_cpu_ms=round(sum(s.cpu_ms for s in self._stages.values()), 3),
                process_cpu_ms=round(process_cpu_ms, 3),
                stages=stages,
            )

    def _now_ms(self) -> float:
        return (time.perf_counter() - self._start_s) * 1e3


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
