"""A worker process: loads the networks once, takes jobs one after another, and tells the table that it lives.

The server starts it with ``python -m beavervision.serve.worker`` and talks to it over its standard input: first the
pickled :class:`~beavervision.serve.place.Task`, later lines: ``job`` (there is one to take) and ``drain`` (finish the job at
work and end). The end of the input means that the server is gone: the job goes back to the table at once, unharmed, for
whoever takes it next. On its standard output it tells the ids of jobs that it changed, one a line.
"""

from __future__ import annotations

import base64
import ctypes
import logging
import os
import pickle
import secrets
import shutil
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import RawIOBase
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from beavervision import metrics
from beavervision.engine.gpus import GpuWatch
from beavervision.engine.host import cores
from beavervision.errors import BeaverVisionError, DeviceError, Interrupted, OutputError
from beavervision.pipeline import Pipeline
from beavervision.serve.avatars import LOOK, SOURCE
from beavervision.serve.credentials import Credentials
from beavervision.serve.jobs import Job, State
from beavervision.serve.looks import load_look, save_look, write_picture
from beavervision.serve.place import Place, Task
from beavervision.serve.problems import without_folders
from beavervision.serve.telemetry import Span, Traces, set_up_logs
from beavervision.serve.version import program_version
from beavervision.settings import Settings
from beavervision.stages.decode import Decode, probe

_BEAT_S = 0.4  # so that a cancelled job stops within a second
_POLL_S = 0.25  # for jobs that nobody tells of: of other servers, or tried again
_TELL_S = 2.0  # between two writings of the metrics
_PIPELINES = 2  # models loaded at once
_ARENA_MAX = -8  # of glibc's mallopt
_LOG = logging.getLogger("beavervision.serve.worker")


class Worker:
    """Takes jobs until it is told to stop."""

    def __init__(self, task: Task) -> None:
        self._name, self._slot = task.name, task.slot
        threads = task.settings.threads or max(1, cores() // task.settings.most_workers)
        self._settings = replace(task.settings, threads=threads)
        self._place = Place.open(task.settings)
        self._credentials = Credentials.of(task.settings)
        self._traces = Traces(task.settings, task.name)
        self._gpus: GpuWatch | None = None
        self._pipelines: OrderedDict[str, Pipeline] = OrderedDict()
        self._stop = threading.Event()
        self._awake = threading.Event()
        self._abandon = threading.Event()
        self._told_s = 0.0

    def listen(self, commands: RawIOBase) -> None:
        """Obey the server until it goes away; to be run in a thread."""
        for line in commands:
            if line.strip() == b"drain":
                self.drain()
            self._awake.set()
        self._abandon.set()
        self.drain()

    def drain(self, *_: object) -> None:
        self._stop.set()
        self._awake.set()

    def run(self) -> None:
        scratch = self._place.scratch / self._slot
        shutil.rmtree(scratch, ignore_errors=True)  # what a killed predecessor left
        self._pipeline(self._settings.model)
        self._tell()
        while not self._stop.is_set():
            self._awake.clear()
            try:
                job = self._place.table.take(self._name, self._lost)
            except SQLAlchemyError as error:
                _LOG.warning("the database does not answer: %s", error)
                self._stop.wait(_BEAT_S)
                continue
            if job is None:
                self._awake.wait(_POLL_S)
            else:
                try:
                    self._work(job, scratch)
                except (SQLAlchemyError, OSError) as error:  # the lease will pass, and the job will be taken again
                    _LOG.warning("job %s: the database or the disk fails: %s", job.id, error)
                finally:
                    shutil.rmtree(scratch, ignore_errors=True)
                    _say(job)
            self._tell()
        self._traces.close()

    def _work(self, job: Job, scratch: Path) -> None:
        facts = {"job.id": job.id, "job.kind": job.request.get("kind", "lipsync"), "job.attempt": job.attempts}
        with self._traces.span("job", job.request.get("trace", ""), facts=facts) as span:
            self._do(job, scratch, span)

    def _do(self, job: Job, scratch: Path, span: Span) -> None:
        table, storage = self._place.table, self._place.storage
        lease = _Lease(self._place, job, self._settings, self._abandon, self._tell)
        metrics.JOBS_RUNNING.inc()
        _say(job)
        state: State | None = None
        done: _Done | None = None
        try:
            with lease.kept():
                scratch.mkdir(parents=True, exist_ok=True)
                done = (self._look if job.request.get("kind") == "avatar" else self._draw)(job, scratch, lease)
            if table.succeed(job, done.report, done.key, done.seconds, done.pictures, lease.per_s):
                state = State.SUCCEEDED
                metrics.JOB_SECONDS.observe(time.time() - job.created_s)
            elif done.key is not None:
                storage.remove(done.key)
        except Interrupted:
            if lease.too_long:
                limit = f"The job took longer than {self._settings.serve_job_limit_s:g} s. Use a shorter text or video."
                state = table.fail(job, "time_limit", limit)
            elif self._abandon.is_set():
                table.give_back(job)
        except SQLAlchemyError:
            raise  # nothing can be told: the lease will pass, and the job will be taken again
        except FileNotFoundError:
            message = "What was uploaded for the job is gone. Send it again."
            if job.request.get("avatar") and job.request.get("kind") != "avatar":
                message = "The avatar of the job was deleted. Use another, or upload the face again."
            state = table.fail(job, "input", message)
        except OSError as error:
            message = f"The disk of the service fails: {error.strerror}. Send it again when that is mended."
            state = table.fail(job, "output", message, passing=True)
        except BeaverVisionError as error:
            passing = isinstance(error, (DeviceError, OutputError))
            state = table.fail(
                job, error.code, without_folders(str(error), self._settings.serve_folder), passing=passing
            )
        except MemoryError:
            state = table.fail(job, "device", "The memory is used up. Use a smaller video.", passing=True)
        except Exception:
            _LOG.exception("job %s", job.id)
            state = table.fail(
                job, "error", f"Something unexpected happened. Please report it with the job's id, {job.id}."
            )
        finally:
            metrics.JOBS_RUNNING.dec()
            span.set("job.state", None if state is None else state.value)
            self._trace_steps(lease.steps, span.traceparent, done)
        if state in (State.SUCCEEDED, State.FAILED):
            self._ended(job, state)

    def _trace_steps(self, steps: list[tuple[str, float]], parent: str, done: _Done | None) -> None:
        """What was done when, and how long each stage took."""
        ends_s = [began_s for _, began_s in steps[1:]] + [time.time()]
        for (name, began_s), ended_s in zip(steps, ends_s, strict=True):
            step = self._traces.past(name, parent, began_s, ended_s, {})
            stages = done.report.get("times", {}).get("stages", {}) if done is not None and name == "drawing" else {}
            for stage, times in stages.items():
                facts = {key: value for key, value in times.items() if value is not None}
                self._traces.past(f"stage {stage}", step, began_s, ended_s, facts)

    def _ended(self, job: Job, state: State) -> None:
        _LOG.info("job %s %s", job.id, state.value, extra={"labels": {"job": job.id, "state": state.value}})
        metrics.JOBS.labels(state.value).inc()
        self._place.storage.remove(f"{job.id}/in" if state is State.SUCCEEDED else job.id)
        if state is State.FAILED and job.request.get("kind") == "avatar":
            self._place.avatars.remove_files(job.request["avatar"])
        self._place.audit.write("ended", job=job.id, owner=job.owner, state=state.value, attempts=job.attempts)

    def _lost(self, job: Job) -> None:
        """The job was begun too often."""
        try:
            self._ended(job, State.FAILED)
        except OSError as error:  # what is left is swept away later
            _LOG.warning("job %s: the disk fails: %s", job.id, error)
        _say(job)

    def _draw(self, job: Job, scratch: Path, lease: _Lease) -> _Done:
        request, options = job.request, dict(job.request["settings"])
        storage, avatars = self._place.storage, self._place.avatars
        lease.step("loading")
        pipeline = self._pipeline(options.pop("model", None) or self._settings.model)
        audio = storage.fetch(f"{job.id}/in/audio") if request["audio"] else None
        avatar_id = request.get("avatar")
        if avatar_id is None:
            video = storage.fetch(f"{job.id}/in/video")
        else:
            video, look = avatars.file(avatar_id, SOURCE), load_look(avatars.file(avatar_id, LOOK))
            options["look"] = look
        options["mark"] = options.get("mark", False) or self._settings.serve_mark
        lease.step("looking")
        out = scratch / "result.mp4"
        report = pipeline.lipsync(
            video, out, text=request["text"], audio=audio, on_progress=lease.told, cancel=lease.cancel, **options
        ).as_dict()
        for part in ("output", "source", "speech"):  # a client is not told this machine's folders
            report[part] = {name: value for name, value in report[part].items() if name != "path"}
        if self._credentials is not None:
            lease.step("signing")
            signed = scratch / "signed.mp4"
            self._credentials.sign(out, signed, program_version(), report["model"]["name"])
            out = signed
        report["content_credentials"] = self._credentials is not None
        report["notes"] = [without_folders(note, self._settings.serve_folder) for note in report["notes"]]
        lease.step("storing")
        key = f"{job.id}/out/{secrets.token_hex(8)}.mp4"
        storage.put(out, key)  # the scratch is on the storage's file system: where that is local, this is a rename
        return _Done(report, key, report["output"]["seconds"], report["output"]["pictures"])

    def _look(self, job: Job, scratch: Path, lease: _Lease) -> _Done:
        """Find the face of an avatar, for the jobs to come."""
        avatar_id, avatars = job.request["avatar"], self._place.avatars
        lease.step("loading")
        pipeline = self._pipeline(self._settings.model)
        source = avatars.file(avatar_id, SOURCE)
        lease.step("looking")
        look = pipeline.look(source, face=job.request["face"], on_progress=lease.looked, cancel=lease.cancel)
        info = probe(source)
        save_look(look, scratch / "look.npz")
        first = next(iter(Decode(1, extend="none")(info))).frames.pictures[0]
        write_picture(first, scratch / "picture.jpg")
        facts: dict[str, Any] = {
            "kind": info.kind,
            "width_px": info.width_px,
            "height_px": info.height_px,
            "seconds": None if info.kind == "still" or info.duration is None else round(float(info.duration), 3),
            "people": look.survey.faces_seen,
            "face": job.request["face"],
        }
        lease.step("storing")
        if not avatars.ready(avatar_id, scratch / "look.npz", scratch / "picture.jpg", facts):
            raise FileNotFoundError(avatar_id)
        return _Done(facts, None, 0.0, 0)

    def _pipeline(self, model: str) -> Pipeline:
        if model in self._pipelines:
            self._pipelines.move_to_end(model)
        else:
            while len(self._pipelines) >= _PIPELINES:
                self._pipelines.popitem(last=False)
            allow = self._settings.serve_allow_non_commercial
            self._pipelines[model] = Pipeline(model, allow_non_commercial=allow, settings=self._settings)
        return self._pipelines[model]

    def _tell(self) -> None:
        """Write the metrics where the server finds them; the first time says that the worker is ready."""
        if time.monotonic() < self._told_s:
            return
        self._told_s = time.monotonic() + _TELL_S
        for pipeline in self._pipelines.values():
            for budget in pipeline.budgets:
                with suppress(DeviceError):
                    budget.check()
        if self._gpus is None:
            self._gpus = GpuWatch(
                [budget.device for pipeline in self._pipelines.values() for budget in pipeline.budgets]
            )
        self._gpus.measure()
        path = self._place.workers / f"{self._slot}.prom"
        partial = path.with_suffix(".part")
        try:
            partial.write_bytes(metrics.exposition())
            partial.replace(path)
        except OSError as error:
            _LOG.warning("the metrics cannot be written: %s", error)


@dataclass(frozen=True, slots=True)
class _Done:
    """What came of a job; `key` is of its video."""

    report: dict[str, Any]
    key: str | None
    seconds: float
    pictures: int


class _Lease:
    """The hold on one job: renewed by a thread of its own, until it is lost or given up."""

    def __init__(
        self, place: Place, job: Job, settings: Settings, abandon: threading.Event, each_beat: Callable[[], None]
    ) -> None:
        self.cancel = threading.Event()
        self.too_long = False
        self._place, self._job, self._abandon, self._each_beat = place, job, abandon, each_beat
        self._lease_s, self._limit_s = settings.serve_lease_s, settings.serve_job_limit_s
        self._progress: tuple[int, int | None] = (0, None)
        self._first: tuple[float, int] | None = None
        self.per_s = 0.0
        self.steps: list[tuple[str, float]] = []  # what was begun when (seconds since the epoch)
        self._over = threading.Event()

    def step(self, name: str) -> None:
        """What is done from now on."""
        if not self.steps or self.steps[-1][0] != name:
            self.steps.append((name, time.time()))

    def told(self, pictures: int, expected: int | None) -> None:
        self.step("drawing")
        self.looked(pictures, expected)

    def looked(self, pictures: int, expected: int | None) -> None:
        """As `told`, where nothing is drawn."""
        now_s = time.monotonic()
        if self._first is None:
            self._first = now_s, pictures
        elif now_s > self._first[0]:
            self.per_s = (pictures - self._first[1]) / (now_s - self._first[0])
        self._progress = pictures, expected

    @contextmanager
    def kept(self) -> Iterator[None]:
        thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()

    def _keep(self) -> None:
        began_s = renewed_s = time.monotonic()
        while not self._over.wait(_BEAT_S):
            now_s = time.monotonic()
            self.too_long = now_s - began_s > self._limit_s
            if self.too_long or self._abandon.is_set():
                break
            try:
                if not self._place.table.beat(
                    self._job, *self._progress, self.per_s, self.steps[-1][0] if self.steps else None
                ):
                    break
                renewed_s = now_s
                _say(self._job)
                self._each_beat()
            except SQLAlchemyError as error:
                _LOG.warning("job %s: no heartbeat: %s", self._job.id, error)
                if now_s - renewed_s > self._lease_s:
                    break
        else:
            return
        self.cancel.set()


def _say(job: Job) -> None:
    """Tell the server that the job changed."""
    with suppress(OSError):  # it has no time, or is gone
        os.write(1, f"{job.id}\n".encode())


def _few_arenas() -> None:
    """Keep the C library from giving each thread of each run a heap of its own: together they hold a third of the memory."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        ctypes.CDLL(None).mallopt(_ARENA_MAX, 2)


def main() -> None:
    """The process, from its first byte of input to its end."""
    _few_arenas()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's whole group: the server decides
    os.set_blocking(1, False)
    # Unbuffered: a thread that waits in a buffered reader would hold its lock when the interpreter ends.
    commands = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115
    task = pickle.loads(base64.b64decode(commands.readline()))
    assert isinstance(task, Task)
    set_up_logs(task.settings, task.slot)
    worker = Worker(task)
    signal.signal(signal.SIGTERM, worker.drain)
    threading.Thread(target=worker.listen, args=(commands,), name="commands", daemon=True).start()
    try:
        worker.run()
    except BeaverVisionError as error:
        _LOG.error("cannot work: %s", error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
