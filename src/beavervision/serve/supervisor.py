"""Starts the workers, as many as are needed, starts them again when they die, and keeps the folders clean."""

from __future__ import annotations

import base64
import logging
import os
import pickle
import secrets
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy.exc import SQLAlchemyError

from beavervision.serve import exposition
from beavervision.serve.avatars import Avatars
from beavervision.serve.jobs import State
from beavervision.serve.news import News
from beavervision.serve.place import Place, Task
from beavervision.serve.scaling import Scaler, room
from beavervision.settings import Settings

_LOOK_S = 0.1
_SCALE_S = 1.0
_SWEEP_S = 30.0
_PAUSES_S = (0.0, 1.0, 2.0, 5.0, 15.0, 30.0)  # before a worker that keeps dying is started again
_HEALTHY_S = 60.0  # a worker that lived so long begins at the first pause again
_USAGE_S = 172_800.0  # what was used longer ago counts for no quota
_ORPHAN_S = 3600.0  # files without a job are removed when they are older
_LOG = logging.getLogger("beavervision.serve")


@dataclass(slots=True, eq=False)
class _Slot:
    """One place for a worker; `name` is the process's that has it now. A worker that is not `wanted` ends after its job."""

    slot: str
    wanted: bool
    name: str = ""
    process: subprocess.Popen[bytes] | None = None
    began_s: float = 0.0
    next_s: float = 0.0
    restarts: int = 0
    deaths: int = 0  # one after another


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker as the server knows it."""

    slot: str
    pid: int | None
    ready: bool
    restarts: int


class Supervisor:
    """The workers of one server, watched by a thread. `news` has what they tell of jobs."""

    def __init__(self, settings: Settings, place: Place) -> None:
        self.news = News()
        self._settings, self._place = settings, place
        least, most = settings.serve_workers, settings.most_workers
        self._slots = [_Slot(f"worker-{number}", number < least) for number in range(most)]
        self._scaler = Scaler(least, most, settings.serve_idle_s) if most > least else None
        self._lock = threading.Lock()
        self._draining = self._short = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    def start(self) -> None:
        for path in self._place.scratch.iterdir():
            shutil.rmtree(path, ignore_errors=True)
        for path in self._place.workers.iterdir():
            path.unlink(missing_ok=True)
        self._thread.start()

    def workers(self) -> list[WorkerState]:
        with self._lock:
            return [
                WorkerState(
                    s.slot,
                    None if s.process is None else s.process.pid,
                    s.wanted and s.process is not None and (self._place.workers / f"{s.slot}.prom").exists(),
                    s.restarts,
                )
                for s in self._slots
                if s.wanted or s.process is not None
            ]

    def drain(self) -> None:
        """Let each worker finish its job and end; none is started any more."""
        with self._lock:
            self._draining = True
            for slot in self._slots:
                _say(slot, b"drain\n")

    def wake(self) -> None:
        """There is a job to take."""
        with self._lock:
            for slot in self._slots:
                _say(slot, b"job\n")

    @property
    def idle(self) -> bool:
        """Whether no worker runs."""
        with self._lock:
            return all(slot.process is None for slot in self._slots)

    def stop(self, patience_s: float = 3.0) -> None:
        """End all workers now: their jobs go back to the table."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            self._draining = True
            for slot in self._slots:
                _hang_up(slot.process)
            until_s = time.monotonic() + patience_s
            for slot in self._slots:
                if slot.process is None:
                    continue
                try:
                    slot.process.wait(max(0.0, until_s - time.monotonic()))
                except subprocess.TimeoutExpired:
                    slot.process.kill()
                    slot.process.wait()
                self._buried(slot)

    def _watch(self) -> None:
        next_scale_s = next_sweep_s = 0.0
        blind = False
        while not self._over.wait(_LOOK_S):
            with self._lock:
                for slot in self._slots:
                    self._look(slot)
            if self._scaler is not None and time.monotonic() >= next_scale_s:
                try:
                    self._scale(self._scaler)
                    blind = False
                except SQLAlchemyError as error:
                    if not blind:
                        _LOG.warning("how many jobs wait cannot be told: %s", error)
                    blind = True
                next_scale_s = time.monotonic() + _SCALE_S
            if time.monotonic() >= next_sweep_s:
                try:
                    self.sweep()
                except (SQLAlchemyError, OSError) as error:
                    _LOG.warning("cleaning up failed and is tried again: %s", error)
                next_sweep_s = time.monotonic() + _SWEEP_S

    def _look(self, slot: _Slot) -> None:
        now_s = time.monotonic()
        if slot.process is None:
            if slot.wanted and not self._draining and now_s >= slot.next_s:
                self._begin(slot)
            return
        code = slot.process.poll()
        if code is None:
            return
        _hang_up(slot.process)
        self._buried(slot)
        if slot.wanted and not self._draining:
            _LOG.warning("%s ended with code %d and is started again", slot.slot, code)
            slot.deaths = slot.deaths + 1 if now_s - slot.began_s < _HEALTHY_S else 1
            slot.restarts += 1
            slot.next_s = now_s + _PAUSES_S[min(slot.deaths, len(_PAUSES_S)) - 1]

    def _scale(self, scaler: Scaler) -> None:
        """Start a worker more where jobs wait for one, or let those go that are too many."""
        waiting, names = self._place.table.demand()
        with self._lock:
            now_s = time.monotonic()
            able = [s for s in self._slots if s.wanted and (s.process is not None or now_s >= s.next_s)]
            idle = [s for s in able if s.name not in names]
            change = scaler.wanted(len(able), len(able) - len(idle), waiting) - len(able)
            if change > 0 and waiting:
                self._grow()
            extra = [s for s in reversed(self._slots[self._settings.serve_workers :]) if s in idle]
            for slot in extra[: max(-change, 0)]:
                _LOG.info("%s had nothing to do and ends", slot.slot)
                slot.wanted = False
                _say(slot, b"drain\n")

    def _grow(self) -> None:
        free = next((s for s in self._slots if not s.wanted and s.process is None), None)
        if free is None or self._draining:
            return
        told = exposition.memory(self._place.workers)
        silent = sum(s.process is not None for s in self._slots) - len({use.worker for use in told} - {"server"})
        short = not room(told, 1 + max(silent, 0))
        if short and not self._short:
            _LOG.warning("jobs wait, but there is no memory for a worker more")
        self._short = short
        if not short:
            _LOG.info("jobs wait: %s starts", free.slot)
            free.wanted, free.deaths, free.next_s = True, 0, 0.0

    def _begin(self, slot: _Slot) -> None:
        slot.name = f"{slot.slot}-{secrets.token_hex(6)}"
        slot.began_s = time.monotonic()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "beavervision.serve.worker"],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=sys.stderr,
            )
        except OSError as error:
            _LOG.error("%s cannot be started: %s", slot.slot, error)
            slot.next_s = slot.began_s + _PAUSES_S[-1]
            return
        slot.process = process
        assert process.stdin is not None
        try:
            process.stdin.write(base64.b64encode(pickle.dumps(Task(self._settings, slot.name, slot.slot))) + b"\n")
            os.set_blocking(process.stdin.fileno(), False)  # a hung worker is not to hang the server
        except OSError:  # dead already: the next look sees it
            return
        threading.Thread(target=self._listen, args=(process,), name=slot.slot, daemon=True).start()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Hear what a worker says, a job's id a line, until it ends."""
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self.news.told(line.decode("utf-8", "replace").strip())

    def _buried(self, slot: _Slot) -> None:
        """What a dead worker had goes to the next."""
        slot.process = None
        (self._place.workers / f"{slot.slot}.prom").unlink(missing_ok=True)
        try:
            self._place.table.release(slot.name)
        except SQLAlchemyError as error:  # then the lease runs out
            _LOG.warning("the lease of %s cannot be released: %s", slot.slot, error)

    def sweep(self) -> None:
        """Remove jobs past their time, and files that belong to no job any more."""
        table, storage = self._place.table, self._place.storage
        for job_id in table.ended_before(time.time() - self._settings.serve_keep_hours * 3600):
            storage.remove(job_id)
            table.remove(job_id)
            self._place.audit.write("expired", job=job_id)
        table.forget_usage(time.time() - _USAGE_S)
        for group, changed_s in storage.groups():
            avatar_id = Avatars.id_of(group)
            if avatar_id is not None:
                avatar = self._place.avatars.get(avatar_id)
                lost = avatar is not None and not avatar.ready and table.get(avatar.job_id) is None
                if (avatar is None or lost) and changed_s < time.time() - _ORPHAN_S:
                    self._place.avatars.remove(avatar_id)
                continue
            job = table.get(group)
            if job is None:
                if changed_s < time.time() - _ORPHAN_S:
                    storage.remove(group)
            elif job.state is State.SUCCEEDED:
                storage.remove(f"{group}/in")
            elif job.ended:
                storage.remove(group)


def _say(slot: _Slot, line: bytes) -> None:
    if slot.process is not None and slot.process.stdin is not None:
        with suppress(OSError, ValueError):  # it is dead, or was hung up on
            slot.process.stdin.write(line)


def _hang_up(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None and process.stdin is not None:
        try:
            process.stdin.close()
        except OSError:
            return
