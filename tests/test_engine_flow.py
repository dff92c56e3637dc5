"""Running flows with real threads: order, bounds, errors in each position, ends of each kind, times."""

from __future__ import annotations

import contextlib
import logging
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from beavervision import metrics
from beavervision.engine.channel import Cancelled, Channel
from beavervision.engine.flow import Flow
from beavervision.errors import BeaverVisionError, DeviceError, Interrupted, OutputError
from beavervision.media import Audio, Clip, Frames, Picture
from beavervision.metrics import StageTimes

_LIMIT_S = 10.0
_PLANE = np.zeros((2, 2), np.uint8)
_PICTURE = Picture(_PLANE, _PLANE[:1, :1], _PLANE[:1, :1])


def clip(index: int, pictures: int = 2) -> Clip:
    return Clip(Frames((_PICTURE,) * pictures, index * pictures, Fraction(25)))


def clips(count: int) -> Iterator[Clip]:
    return (clip(n) for n in range(count))


def starts(stream: Iterator[Clip]) -> list[int]:
    return [c.frames.start for c in stream]


class Pass:
    """Hands clips on; remembers the threads it ran and was closed in and how it ended."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ended_by: type[BaseException] | None = None
        self.threads: list[str] = []
        self.taken = 0

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        self.threads.append(threading.current_thread().name)
        try:
            for item in clips:
                self.taken += 1
                yield self.work(item)
        except BaseException as error:
            self.ended_by = type(error)
            raise
        finally:
            self.threads.append(threading.current_thread().name)

    def work(self, item: Clip) -> Clip:
        return item


class FailAt(Pass):
    def __init__(self, name: str, start: int, error: BaseException) -> None:
        super().__init__(name)
        self.start, self.error = start, error

    def work(self, item: Clip) -> Clip:
        if item.frames.start == self.start:
            raise self.error
        return item


class Take:
    """Returns after `count` clips."""

    name = "take"

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        for _, item in zip(range(self.count), clips, strict=False):
            yield item


class WriteFile:
    """As an encoder does: a temporary file, renamed when whole, removed otherwise."""

    name = "write"

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        part = self.path.with_suffix(".part")
        try:
            with part.open("w", encoding="utf-8") as file:
                for item in clips:
                    file.write(f"{item.frames.start}\n")
                    yield item
            part.rename(self.path)
        finally:
            part.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before
    depths = [
        s for family in metrics.REGISTRY.collect() for s in family.samples if s.name == "beavervision_queue_depth"
    ]
    assert all(sample.value == 0 for sample in depths)


Runner = Callable[[Flow], Iterator[Clip]]
both = pytest.mark.parametrize("run", [iter, Flow.run_inline], ids=["threads", "inline"])


@both
def test_order_and_content_are_kept(run: Runner) -> None:
    stages = [Pass("a"), Pass("b"), Pass("c")]
    flow = Flow(lambda: clips(200))
    for stage in stages:
        flow = flow.then(stage)
    assert starts(run(flow)) == [2 * n for n in range(200)]
    assert [stage.taken for stage in stages] == [200] * 3


def test_each_stage_has_a_thread_of_its_own() -> None:
    a, b = Pass("a"), Pass("b")
    assert len(list(Flow(lambda: clips(3)).then(a).then(b))) == 3
    assert (a.threads, b.threads) == (["flow-a"] * 2, ["flow-b"] * 2)


@both
def test_a_flow_is_a_value_that_runs_again(run: Runner) -> None:
    base = Flow([clip(0), clip(1)])
    longer = base.then(Take(1))
    assert (len(list(run(base))), len(list(run(longer))), len(list(run(base)))) == (2, 1, 2)


def test_two_stages_of_one_name_need_other_names() -> None:
    flow = Flow(lambda: clips(1)).then(Pass("a"))
    with pytest.raises(ValueError, match="called 'a'"):
        flow.then(Pass("a"))
    assert len(list(flow.then(Pass("a"), name="a2"))) == 1


def _source(fail_at: int, error: BaseException) -> Iterator[Clip]:
    for n in range(20):
        if n == fail_at:
            raise error
        yield clip(n)


@both
@pytest.mark.parametrize("position", ["source", "a", "b", "c"])
@pytest.mark.parametrize("at", [0, 7])
def test_an_unexpected_error_names_the_stage(run: Runner, position: str, at: int) -> None:
    error = KeyError("lost")
    flow = Flow(lambda: _source(at if position == "source" else -1, error))
    stages = [FailAt(n, 2 * at, error) if n == position else Pass(n) for n in ("a", "b", "c")]
    for stage in stages:
        flow = flow.then(stage)
    got: list[int] = []
    with pytest.raises(
        BeaverVisionError, match=rf"stage {position} failed unexpectedly \(KeyError: 'lost'\)"
    ) as caught:
        got.extend(c.frames.start for c in run(flow))
    assert type(caught.value) is BeaverVisionError
    assert caught.value.__cause__ is error
    lines = "".join(traceback.format_exception(caught.value))
    assert ("in _source" if position == "source" else "in work") in lines
    assert got == [2 * n for n in range(at)]
    others = [stage.ended_by for stage in stages if stage.name != position]
    assert all(kind in (Cancelled, GeneratorExit) for kind in others), "nobody may see a false end"


@both
def test_clips_before_an_error_are_delivered(run: Runner) -> None:
    stream = run(Flow(lambda: _source(3, OSError("gone"))).then(Pass("a")))
    assert [next(stream).frames.start for _ in range(3)] == [0, 2, 4]
    with pytest.raises(BeaverVisionError, match="stage source"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


@both
def test_our_own_errors_pass_unchanged(run: Runner) -> None:
    error = OutputError("disk full. Free some space.")
    with pytest.raises(OutputError) as caught:
        list(run(Flow(lambda: clips(9)).then(Pass("a")).then(FailAt("b", 4, error)).then(Pass("c"))))
    assert caught.value is error
    assert caught.value.__cause__ is None


@both
def test_an_error_before_the_first_clip_and_at_the_call(run: Runner) -> None:
    class Refuses:
        name = "refuses"

        def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
            raise DeviceError("no such device. Use cpu.")

    with pytest.raises(DeviceError):
        list(run(Flow(lambda: clips(9)).then(Refuses()).then(Pass("c"))))

    def broken() -> Iterator[Clip]:
        raise DeviceError("no camera. Plug one in.")

    with pytest.raises(DeviceError, match="camera"):
        list(run(Flow(broken).then(Pass("a"))))


@both
def test_yielding_something_else_is_a_defect(run: Runner) -> None:
    class Wrong:
        name = "wrong"

        def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
            for _ in clips:
                yield None  # type: ignore[misc]

    with pytest.raises(BeaverVisionError, match=r"stage wrong .*yielded NoneType"):
        list(run(Flow(lambda: clips(2)).then(Wrong())))


@both
def test_keyboard_interrupt_in_a_stage_passes(run: Runner) -> None:
    with pytest.raises(KeyboardInterrupt):
        list(run(Flow(lambda: clips(9)).then(FailAt("a", 4, KeyboardInterrupt())).then(Pass("b"))))


@both
def test_an_error_while_cleaning_up_is_a_note_on_the_first(run: Runner) -> None:
    class Untidy:
        name = "untidy"

        def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
            try:
                yield from clips
            finally:
                raise OSError("cannot remove")

    first = OutputError("disk full. Free some space.")
    with pytest.raises(OutputError) as caught:
        list(run(Flow(lambda: clips(9)).then(FailAt("a", 4, first)).then(Untidy())))
    assert caught.value is first
    assert any("in stage untidy" in note and "cannot remove" in note for note in caught.value.__notes__)


@both
def test_a_stage_that_takes_the_break_for_an_end_ends_nothing(run: Runner, tmp_path: Path) -> None:
    class Swallows:
        name = "swallows"

        def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
            with contextlib.suppress(BaseException):
                yield from clips

    write = WriteFile(tmp_path / "out")
    with pytest.raises(OutputError):
        list(run(Flow(lambda: _source(5, OutputError("x. y."))).then(Swallows()).then(write)))
    assert list(tmp_path.iterdir()) == []


@both
def test_a_whole_run_keeps_its_file(run: Runner, tmp_path: Path) -> None:
    assert len(list(run(Flow(lambda: clips(5)).then(WriteFile(tmp_path / "out")).then(Pass("after"))))) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@both
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_closing_early_leaves_no_file_and_closes_every_stage(run: Runner, taken: int, tmp_path: Path) -> None:
    before, after = Pass("before"), Pass("after")
    flow = Flow(lambda: clips(1000)).then(before).then(WriteFile(tmp_path / "out")).then(after)
    with contextlib.closing(run(flow)) as stream:  # type: ignore[type-var]
        for _ in range(taken):
            next(stream)
    assert list(tmp_path.iterdir()) == []
    if taken:
        assert before.ended_by in (GeneratorExit, Cancelled)
        assert after.ended_by in (GeneratorExit, Cancelled)
        assert before.taken <= taken + 4 * 3
        assert set(before.threads) <= {"flow-before", "MainThread"}


@both
def test_an_exception_in_the_consumer_ends_the_run(run: Runner, tmp_path: Path) -> None:
    def consume() -> None:
        for item in run(Flow(lambda: clips(1000)).then(WriteFile(tmp_path / "out"))):
            if item.frames.start == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_while_waiting_for_a_clip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The interrupt arrives inside the consumer's get, with every stage waiting for a source that has nothing."""
    waiting, released = threading.Event(), threading.Event()

    def source() -> Iterator[Clip]:
        yield clip(0)
        waiting.set()
        assert released.wait(_LIMIT_S)

    stream = iter(Flow(source).then(Pass("a")).then(WriteFile(tmp_path / "out")))
    next(stream)
    assert waiting.wait(_LIMIT_S)

    def interrupted(*_: object) -> None:
        released.set()
        raise KeyboardInterrupt

    monkeypatch.setattr(Channel, "get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert list(tmp_path.iterdir()) == []


@both
def test_a_stage_that_returns_early_ends_those_before_it(run: Runner) -> None:
    a, b = Pass("a"), Pass("b")
    flow = Flow(lambda: clips(10**9)).then(a).then(b).then(Take(3)).then(Pass("c"))
    assert starts(run(flow)) == [0, 2, 4]
    assert a.ended_by in (GeneratorExit, Cancelled)
    assert b.ended_by in (GeneratorExit, Cancelled)


def test_an_early_end_wakes_a_stage_that_waits(caplog: pytest.LogCaptureFixture) -> None:
    """`slow` waits for a second clip which the source gives only after the flow has been told to end."""
    ended = threading.Event()

    def source() -> Iterator[Clip]:
        yield clip(0)
        assert ended.wait(_LIMIT_S)
        yield clip(1)

    class First:
        name = "first"

        def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
            yield next(clips)

    class Ends(Pass):
        def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
            try:
                yield from super().__call__(clips)
            finally:
                ended.set()

    assert starts(iter(Flow(source).then(Ends("slow")).then(First()))) == [0]
    assert not caplog.records


@both
def test_an_error_of_a_stage_nobody_needs_any_more_is_logged(run: Runner, caplog: pytest.LogCaptureFixture) -> None:
    class Untidy:
        name = "untidy"

        def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
            try:
                yield from clips
            except BaseException:
                raise OSError("cannot remove") from None

    with caplog.at_level(logging.WARNING):
        assert starts(run(Flow(lambda: clips(50)).then(Untidy()).then(Take(2)))) == [0, 2]
    assert len(caplog.records) == 1
    assert "stage untidy" in caplog.text
    assert "in __call__" in caplog.text, "with its traceback"


@both
def test_cancel_between_clips(run: Runner, tmp_path: Path) -> None:
    cancel = threading.Event()
    stream = run(Flow(lambda: clips(1000), cancel=cancel).then(Pass("a")).then(WriteFile(tmp_path / "out")))
    next(stream)
    cancel.set()
    with pytest.raises(Interrupted):
        next(stream)
    assert list(tmp_path.iterdir()) == []


def test_cancel_while_all_wait(tmp_path: Path) -> None:
    cancel, source_waits, released = threading.Event(), threading.Event(), threading.Event()
    took, woken = threading.Event(), list[bool]()

    def source() -> Iterator[Clip]:
        yield clip(0)
        source_waits.set()
        woken.append(released.wait(_LIMIT_S))

    class Releases(Pass):
        def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
            try:
                yield from super().__call__(clips)
            finally:
                released.set()  # the source waits until cancelling has woken this stage

        def work(self, item: Clip) -> Clip:
            took.set()
            return item

    def user() -> None:
        assert took.wait(_LIMIT_S)
        assert source_waits.wait(_LIMIT_S)
        cancel.set()

    helper = threading.Thread(target=user)
    helper.start()
    with pytest.raises(Interrupted):
        list(Flow(source, cancel=cancel).then(Releases("a")).then(WriteFile(tmp_path / "out")))
    helper.join()
    assert woken == [True]
    assert list(tmp_path.iterdir()) == []


@both
def test_cancelling_and_closing_is_not_worth_a_warning(run: Runner, caplog: pytest.LogCaptureFixture) -> None:
    cancel = threading.Event()
    with contextlib.closing(run(Flow(lambda: clips(1000), cancel=cancel).then(Pass("a")))) as stream:  # type: ignore[type-var]
        next(stream)
        cancel.set()
    assert not caplog.records


def test_a_set_cancel_starts_nothing() -> None:
    cancel = threading.Event()
    cancel.set()
    stage = Pass("a")
    with pytest.raises(Interrupted):
        list(Flow(lambda: clips(5), cancel=cancel).then(stage))
    assert stage.taken == 0


def test_a_flow_that_is_never_started_starts_no_thread() -> None:
    before = threading.active_count()
    stream = iter(Flow(lambda: clips(5)).then(Pass("a")))
    assert threading.active_count() == before
    stream.close()


def test_no_thread_to_be_had_ends_cleanly(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    started: list[str] = []

    def refuse(thread: threading.Thread) -> None:
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread.name)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(RuntimeError, match="new thread"):
        list(Flow(lambda: clips(5)).then(Pass("a")).then(Pass("b")))
    assert started == ["flow-source", "flow-a"]


class Counted(Clip):
    """Knows how many of it are alive, and the most there ever were."""

    lock = threading.Lock()
    alive = 0
    peak = 0

    def __init__(self, index: int) -> None:
        super().__init__(clip(index).frames)
        with Counted.lock:
            Counted.alive += 1
            Counted.peak = max(Counted.peak, Counted.alive)

    def __del__(self) -> None:
        with Counted.lock:
            Counted.alive -= 1


@pytest.mark.parametrize("depth", [1, 3])
def test_memory_is_bounded_however_slow_the_consumer(depth: int) -> None:
    Counted.alive = Counted.peak = 0
    total, stages = 300, 3
    flow = Flow(lambda: (Counted(n) for n in range(total)), depth=depth)
    for n in range(stages):
        flow = flow.then(Pass(str(n)))
    seen = 0
    for item in flow:
        seen += 1
        del item
    assert seen == total
    assert Counted.alive == 0
    # each thread holds one in hand and each channel `depth`; one more is the consumer's
    assert Counted.peak <= (stages + 1) * (depth + 1) + 1


def _with_sound(index: int) -> Clip:
    return replace(clip(index, 1), audio=Audio(np.full((1, 4), index, np.float32), 100, index * 4))


def _hold(older: Clip, newer: Clip) -> Clip:
    """Live shedding: all the sound and time of both, but only the newer picture is worked on."""
    assert older.audio is not None
    assert newer.audio is not None
    frames = Frames(newer.frames.pictures[:1] * (len(older) + len(newer)), older.frames.start, older.frames.rate)
    pcm = np.concatenate([older.audio.pcm, newer.audio.pcm], axis=1)
    return replace(newer, frames=frames, audio=Audio(pcm, newer.audio.rate_hz, older.audio.start))


def test_a_live_flow_sheds_before_a_slow_stage_and_keeps_the_sound() -> None:
    given = threading.Event()

    def camera() -> Iterator[Clip]:
        for n in range(50):
            yield _with_sound(n)
        given.set()  # never waited for the stage

    class Slow(Pass):
        def work(self, item: Clip) -> Clip:
            assert given.wait(_LIMIT_S)
            return item

    shed = metrics.SHED.labels("slow-live")
    before = shed._value.get()
    out = list(Flow(camera).then(Slow("slow-live"), merge=_hold))
    assert len(out) < 10
    assert shed._value.get() - before == 50 - len(out)
    pcm = np.concatenate([item.audio.pcm for item in out if item.audio is not None], axis=1)
    np.testing.assert_array_equal(pcm, np.repeat(np.arange(50, dtype=np.float32), 4)[None])
    assert sum(len(item) for item in out) == 50


def test_guard_ends_the_run_with_its_error() -> None:
    calls = iter(range(100))

    def guard() -> None:
        if next(calls) == 3:
            raise DeviceError("out of memory. Use less.")

    with pytest.raises(DeviceError):
        list(Flow(lambda: clips(50), guard=guard).then(Pass("a")))


class Works:
    """Spends CPU time on each clip, and notes how much: a host that takes the processor away lets it overshoot."""

    def __init__(self, name: str, cpu_s: float) -> None:
        self.name, self.cpu_s = name, cpu_s
        self.spent_ms: list[float] = []

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        for item in clips:
            begin_s = now_s = time.thread_time()
            while now_s < begin_s + self.cpu_s:
                now_s = time.thread_time()
            self.spent_ms.append((now_s - begin_s) * 1e3)
            yield item


@both
def test_times_are_of_the_stage_itself(run: Runner) -> None:
    times = StageTimes()
    count, light_s, heavy_s = 12, 0.002, 0.008
    light, heavy = Works("light", light_s), Works("heavy", heavy_s)
    assert len(list(run(Flow(lambda: clips(count), times=times).then(light).then(heavy)))) == count
    report = times.report()
    stages = report["stages"]
    assert list(stages) == ["source", "light", "heavy"]
    for stage in (light, heavy):
        told = stages[stage.name]
        assert told["cpu_ms"] == pytest.approx(sum(stage.spent_ms), rel=0.25)
        assert told["cpu_ms_per_picture"] == pytest.approx(statistics.median(stage.spent_ms) / 2, rel=0.25)
        assert told["wall_ms"] >= 0.95 * told["cpu_ms"]
        assert told["pictures"] == 2 * count
    assert stages["source"]["cpu_ms"] < stages["light"]["cpu_ms"]
    assert report["pictures"] == 2 * count
    assert report["first_picture_ms"] is not None
    assert report["first_picture_ms"] < report["elapsed_ms"]
    waiting_ms = sum(stage["waiting_ms"] for stage in stages.values())
    assert (waiting_ms > 0) == (run is iter)


def test_the_source_is_named() -> None:
    class Decode:
        name = "decode"

        def __call__(self) -> Iterator[Clip]:
            return clips(2)

    times = StageTimes()
    list(Flow(Decode(), times=times))
    assert list(times.report()["stages"]) == ["decode"]
    list(Flow(lambda: clips(2), name="camera", times=times))
    assert "camera" in times.report()["stages"]
