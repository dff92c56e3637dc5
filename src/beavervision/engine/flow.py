"""Stages chained into a running flow: threads, bounded channels, timing, cancelling and error wrapping.

Every stage is a generator that runs, fails and is closed in a thread of its own, so a stage that holds a temporary
file removes it where it made it. A stage whose neighbour has gone sees :class:`~beavervision.engine.channel.Cancelled`
in place of its next clip (or GeneratorExit where it yields), never a false end of the stream.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from beavervision import metrics
from beavervision.engine.channel import Cancelled, Channel
from beavervision.errors import BeaverVisionError, Interrupted
from beavervision.media import Clip, Stage
from beavervision.metrics import StageTimes

Source: TypeAlias = Callable[[], Iterator[Clip]] | Iterable[Clip]
Merge: TypeAlias = Callable[[Clip, Clip], Clip | None]

_CANCEL_POLL_S = 0.05
_END = object()

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Step:
    name: str
    start: Callable[[Iterator[Clip]], Iterator[Clip]]
    merge: Merge | None = None
    guard: Callable[[], object] | None = None


class Flow:
    """A source and the stages after it; iterate it to run it, as often as the source allows.

    Iterating starts one thread for the source and for each stage, with at most `depth` clips waiting after each, and
    yields what the last stage yields. However the iteration ends (done, an error, closed early, Ctrl-C in the
    consumer) all stages are closed and all threads joined before it returns. A stage that returns early ends those
    before it, without an error. Wrap the iterator in :func:`contextlib.closing` where it may be left half-way.

    Args:
        source: called (or iterated) in its own thread, once for each run. One that blocks for ever on a device would
            hold up the end: give it a timeout.
        name: what the source is called in times and errors; by default its `name`, else "source".
        depth: clips that may wait after each stage.
        times: where times go; each run has its own if None.
        cancel: setting it ends the run.
        guard: called before each clip is taken from the source, e.g. ``MemoryBudget.check``; its errors end the run.

    Raises (while iterated):
        BeaverVisionError: the first error of a stage, as it was raised; any other exception becomes one that names the
            stage, with the original as its cause.
        Interrupted: `cancel` was set.
    """

    __slots__ = ("_cancel", "_depth", "_steps", "_times")

    def __init__(
        self,
        source: Source,
        *,
        name: str | None = None,
        depth: int = 2,
        times: StageTimes | None = None,
        cancel: threading.Event | None = None,
        guard: Callable[[], object] | None = None,
    ) -> None:
        def start(_: Iterator[Clip]) -> Iterator[Clip]:
            return source() if callable(source) else iter(source)

        self._steps: tuple[_Step, ...] = (_Step(name or getattr(source, "name", None) or "source", start, guard=guard),)
        self._depth = depth
        self._times = times
        self._cancel = cancel

    def then(self, stage: Stage, name: str | None = None, merge: Merge | None = None) -> Flow:
        """This flow with `stage` at its end.

        With `merge` (a live session) nobody waits for the stage: clips that it has not taken yet are merged when its
        queue is full (see :class:`~beavervision.engine.channel.Channel`).
        """
        label = name or stage.name
        if any(step.name == label for step in self._steps):
            raise ValueError(f"two stages of a flow are called {label!r}: give one of them another name")
        longer = copy.copy(self)
        longer._steps = (*self._steps, _Step(label, stage, merge))
        return longer

    def __iter__(self) -> Generator[Clip, None, None]:
        return _threaded(self._steps, self._depth, self._run())

    def run_inline(self) -> Generator[Clip, None, None]:
        """The same run as nested generators in the caller's thread, without queues: for tests and debugging."""
        return _inline(self._steps, self._run())

    def _run(self) -> _Run:
        times = self._times or StageTimes()
        times.expect(*(step.name for step in self._steps))
        return _Run(times, self._cancel)


class _Run:
    """What the threads of one run share: its times, the first error, and whether to stop."""

    def __init__(self, times: StageTimes, cancel: threading.Event | None) -> None:
        self.times = times
        self.cancel = cancel
        self.error: BaseException | None = None
        self._lock = threading.Lock()

    def check(self) -> None:
        if self.cancel is not None and self.cancel.is_set():
            self._keep(Interrupted("cancelled before the end; no partial result was kept. Run it again if needed."))
            raise Cancelled

    def fail(self, stage: str, error: BaseException) -> None:
        """Keep `error` as what ended the run, unless another came first: then it is a consequence, and a note."""
        if isinstance(error, Exception) and not isinstance(error, BeaverVisionError):
            wrapped = BeaverVisionError(
                f"stage {stage} failed unexpectedly ({type(error).__name__}: {error}). "
                "This is a defect of the program: please report it with the input that causes it."
            )
            wrapped.__cause__ = error
            error = wrapped
        if not self._keep(error):
            assert self.error is not None
            self.error.add_note(f"afterwards, in stage {stage}: {error}")

    def _keep(self, error: BaseException) -> bool:
        with self._lock:
            first = self.error is None
            if first:
                self.error = error
            return first


def _clips(run: _Run, step: _Step, upstream: Iterator[Clip], *, waits: bool) -> Generator[Clip, None, None]:
    """One stage at work in the calling thread: timed, its errors kept in `run`, closed at the end whatever happens.

    `waits` says whether the time in `upstream` is waiting for another thread, or other stages' work in this one.

    Raises:
        Cancelled: this stage failed, or one before it, or the run was cancelled.
    """
    away_wall_s = away_cpu_s = 0.0
    broken = False

    def pulled() -> Iterator[Clip]:
        nonlocal away_wall_s, away_cpu_s, broken
        while True:
            wall_s, cpu_s = time.perf_counter(), time.thread_time()
            try:
                run.check()
                clip = next(upstream)
            except StopIteration:
                return
            except BaseException:
                broken = True
                raise
            finally:
                away_wall_s += time.perf_counter() - wall_s
                away_cpu_s += time.thread_time() - cpu_s
            yield clip
            del clip

    stream: Iterator[Clip] | None = None
    try:
        try:
            while True:
                run.check()
                if step.guard is not None:
                    step.guard()
                away_wall_s = away_cpu_s = 0.0
                wall_s, cpu_s = time.perf_counter(), time.thread_time()
                if stream is None:
                    stream = iter(step.start(pulled()))
                clip = next(stream, _END)
                cpu_s = time.thread_time() - cpu_s - away_cpu_s
                wall_s = time.perf_counter() - wall_s - away_wall_s
                run.times.worked(step.name, wall_s, cpu_s, len(clip) if isinstance(clip, Clip) else 0)
                if waits:
                    run.times.waited(step.name, away_wall_s)
                if clip is _END:
                    break
                if not isinstance(clip, Clip):
                    raise TypeError(f"it yielded {type(clip).__name__}, not Clip")
                yield clip
                del clip
        finally:
            _close(stream)
            with contextlib.suppress(Cancelled):  # an error while closing is in `run` already
                _close(upstream)
    except (Cancelled, GeneratorExit):
        raise
    except BaseException as error:
        run.fail(step.name, error)
        raise Cancelled from error
    if broken:  # the stage took the break for an end; those after it must not
        raise Cancelled


def _close(stream: Iterator[Clip] | None) -> None:
    close = getattr(stream, "close", None)
    if close is not None:
        close()


def _work(run: _Run, steps: tuple[_Step, ...], channels: list[Channel[Clip]], index: int) -> None:
    """The thread of the stage `index`: from the channel before it to the one after it."""
    step, out = steps[index], channels[index]
    upstream: Iterator[Clip] = iter(channels[index - 1]) if index else iter(())
    whole = False
    try:
        with contextlib.closing(_clips(run, step, upstream, waits=index > 0)) as clips:
            for clip in clips:
                start_s = time.perf_counter()
                if merged := out.put(clip):
                    metrics.SHED.labels(steps[index + 1].name).inc(merged)
                run.times.waited(step.name, time.perf_counter() - start_s)
                del clip
        whole = True
    except Cancelled:
        pass
    except BaseException as error:  # a thread that died without closing its channel would hang the others
        run.fail(step.name, error)
    for channel in channels[:index]:
        channel.cancel()
    out.close(None if whole else Cancelled())


def _threaded(steps: tuple[_Step, ...], depth: int, run: _Run) -> Generator[Clip, None, None]:
    merges = [*(step.merge for step in steps[1:]), None]
    channels: list[Channel[Clip]] = [
        Channel(depth, merge, metrics.QUEUE_DEPTH.labels(step.name).inc)
        for step, merge in zip(steps, merges, strict=True)
    ]
    threads = [
        threading.Thread(target=_work, args=(run, steps, channels, index), name=f"flow-{step.name}")
        for index, step in enumerate(steps)
    ]
    poll_s = None if run.cancel is None else _CANCEL_POLL_S
    broken = False
    try:
        for thread in threads:
            thread.start()
        while True:
            run.check()
            try:
                clip = channels[-1].get(poll_s)
            except TimeoutError:
                continue
            except EOFError:
                break
            run.times.delivered(len(clip))
            yield clip
            del clip
    except Cancelled:
        broken = True
    finally:
        for channel in channels:
            channel.cancel()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        _log_unless(broken, run)
    if broken:
        assert run.error is not None
        raise run.error


def _inline(steps: tuple[_Step, ...], run: _Run) -> Generator[Clip, None, None]:
    clips: Iterator[Clip] = iter(())
    for step in steps:
        clips = _clips(run, step, clips, waits=False)
    broken = False
    try:
        for clip in clips:
            run.times.delivered(len(clip))
            yield clip
            del clip
    except Cancelled:
        broken = True
    finally:
        with contextlib.suppress(Cancelled):
            _close(clips)
        _log_unless(broken, run)
    if broken:
        assert run.error is not None
        raise run.error


def _log_unless(raised: bool, run: _Run) -> None:
    """An error that the consumer no longer asks for (it has ended, or left) is not raised, yet not lost."""
    if not raised and run.error is not None and not isinstance(run.error, Interrupted):
        _log.warning("after the flow was ended: %s", run.error, exc_info=run.error)
