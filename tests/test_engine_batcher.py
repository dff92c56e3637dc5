"""Joining calls of real threads: what is joined, whose rows are whose, who waits for whom, and what fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from beavervision import metrics
from beavervision.engine.batcher import MicroBatcher
from beavervision.errors import BeaverVisionError

_LIMIT_S = 10.0
_LONG_MS = 60_000.0  # a deadline that no test waits for

Array = npt.NDArray[Any]


class Double:
    """Twice the input; records the batches and refuses to be entered by two threads."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self._inside = threading.Lock()

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        assert self._inside.acquire(blocking=False), "two threads in one network"
        try:
            self.batches.append(len(inputs[0]))
            return tuple(2 * x for x in inputs)
        finally:
            self._inside.release()


class Gate(Double):
    """Waits inside its first call until opened, so that a test can let others queue up meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.open = threading.Event(), threading.Event()

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        self.entered.set()
        assert self.open.wait(_LIMIT_S)
        return super().__call__(*inputs)


class Callers:
    """Calls in threads of their own."""

    def __init__(self) -> None:
        self.results: dict[int, Any] = {}
        self._threads: list[threading.Thread] = []

    def call(self, key: int, call: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                self.results[key] = call()
            except BaseException as error:
                self.results[key] = error

        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()

    def join(self) -> dict[int, Any]:
        for thread in self._threads:
            thread.join(_LIMIT_S)
            assert not thread.is_alive(), "a caller hangs"
        return self.results


def _until_waiting(batcher: MicroBatcher, count: int) -> None:
    """Until `count` calls wait: seen under the batcher's own condition."""
    with batcher._changed:
        assert batcher._changed.wait_for(lambda: len(batcher._waiting) == count, _LIMIT_S)


def _rows(value: float, count: int = 1) -> Array:
    return np.full((count, 3), value, np.float32)


def test_a_single_caller_does_not_wait_for_the_deadline() -> None:
    net = Double()
    batcher = MicroBatcher(net, 8, _LONG_MS)
    start_s = time.monotonic()
    for n in range(50):
        (out,) = batcher(_rows(n, 2))
        np.testing.assert_array_equal(out, _rows(2 * n, 2))
    assert time.monotonic() - start_s < _LIMIT_S
    assert net.batches == [2] * 50


def test_calls_that_wait_while_a_batch_runs_are_joined() -> None:
    net = Gate()
    batcher = MicroBatcher(net, 8, 0.0, name="joined")
    callers = Callers()
    callers.call(0, lambda: batcher(_rows(0)))
    assert net.entered.wait(_LIMIT_S)
    for n in (1, 2, 3):
        callers.call(n, lambda n=n: batcher(_rows(n, n)))
        _until_waiting(batcher, n)
    net.open.set()
    for n, (out,) in callers.join().items():
        np.testing.assert_array_equal(out, _rows(2 * n, max(n, 1)))
    assert net.batches == [1, 6]
    assert metrics.REGISTRY.get_sample_value("beavervision_batch_size_count", {"net": "joined"}) == 2
    assert metrics.REGISTRY.get_sample_value("beavervision_batch_size_sum", {"net": "joined"}) == 7


def test_active_callers_are_waited_for_and_joined() -> None:
    """Three threads in step: after the first round each knows of the others, and all rounds are one batch."""
    net = Double()
    batcher = MicroBatcher(net, 8, _LONG_MS)
    rounds, callers = 20, Callers()
    warm, step = threading.Barrier(3), threading.Barrier(3)

    def work(n: int) -> list[float]:
        batcher._seen_s[threading.get_ident()] = time.monotonic()  # known from the start
        warm.wait(_LIMIT_S)
        got = []
        for _ in range(rounds):
            step.wait(_LIMIT_S)
            got.append(float(batcher(_rows(n))[0][0, 0]))
        return got

    for n in range(3):
        callers.call(n, lambda n=n: work(n))
    results = callers.join()
    assert results == {n: [2.0 * n] * rounds for n in range(3)}
    assert net.batches == [3] * rounds


def test_a_full_batch_does_not_wait_for_others() -> None:
    net = Double()
    batcher = MicroBatcher(net, 4, _LONG_MS)
    batcher._seen_s[-1] = time.monotonic() + _LIMIT_S  # somebody else is active
    batcher(_rows(1, 4))
    assert net.batches == [4]


def test_the_deadline_ends_the_wait_and_a_silent_caller_is_forgotten() -> None:
    net = Double()
    batcher = MicroBatcher(net, 4, 5.0)
    batcher._seen_s[-1] = time.monotonic()  # was active, never comes again
    start_s = time.monotonic()
    batcher(_rows(1))
    assert 0.0045 <= time.monotonic() - start_s < _LIMIT_S
    batcher._seen_s[-1] -= 1.0
    batcher(_rows(1))
    assert list(batcher._seen_s) == [threading.get_ident()]


def test_nothing_is_ever_mixed_under_load() -> None:
    """Many threads, calls of several sizes, kinds and numbers of inputs: everyone gets their own rows back."""
    net = Double()
    batcher = MicroBatcher(net, 7, 1.0)
    callers = Callers()

    def work(seed: int) -> int:
        rng = np.random.default_rng(seed)
        for turn in range(60):
            rows, width = int(rng.integers(1, 12)), int(rng.integers(1, 4))
            dtype = (np.float32, np.int64)[turn % 2]
            inputs = [rng.integers(0, 10**6, (rows, width)).astype(dtype) for _ in range(1 + turn % 3 // 2)]
            outputs = batcher(*inputs)
            assert len(outputs) == len(inputs)
            for x, y in zip(inputs, outputs, strict=True):
                assert y.dtype == dtype
                np.testing.assert_array_equal(y, 2 * x)
        return 60

    for n in range(6):
        callers.call(n, lambda n=n: work(n))
    assert callers.join() == dict.fromkeys(range(6), 60)
    assert max(net.batches) <= 7
    assert batcher._waiting == []


def test_a_call_larger_than_a_batch_is_cut() -> None:
    net = Double()
    x = np.arange(30, dtype=np.float32).reshape(10, 3)
    (out,) = MicroBatcher(net, 4, 1.0)(x)
    np.testing.assert_array_equal(out, 2 * x)
    assert net.batches == [4, 4, 2]


def test_halving() -> None:
    net = Double()
    batcher = MicroBatcher(net, 5, 1.0)
    assert batcher.halve()
    assert batcher.max_batch == 2
    batcher(_rows(1, 4))
    assert net.batches == [2, 2]
    assert batcher.halve()
    assert not batcher.halve()
    assert batcher.max_batch == 1


def test_an_error_reaches_every_call_of_its_batch_and_no_other() -> None:
    class Refuses(Gate):
        def __call__(self, *inputs: Array) -> tuple[Array, ...]:
            (out,) = super().__call__(*inputs)
            if len(inputs[0]) > 1:
                raise BeaverVisionError("the network is unwell. Call a doctor.")
            return (out,)

    net = Refuses()
    batcher = MicroBatcher(net, 8, 0.0)
    callers = Callers()
    callers.call(0, lambda: batcher(_rows(0)))
    assert net.entered.wait(_LIMIT_S)
    for n in (1, 2):
        callers.call(n, lambda n=n: batcher(_rows(n)))
        _until_waiting(batcher, n)
    net.open.set()
    results = callers.join()
    np.testing.assert_array_equal(results[0][0], _rows(0))
    assert [type(results[n]) for n in (1, 2)] == [BeaverVisionError] * 2
    assert len(batcher(_rows(3))[0]) == 1, "and it goes on"


def test_an_interrupted_leader_leaves_the_others_their_results() -> None:
    class Interrupts(Gate):
        interrupted = False

        def __call__(self, *inputs: Array) -> tuple[Array, ...]:
            outputs = super().__call__(*inputs)
            if len(inputs[0]) == 3 and not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt
            return outputs

    net = Interrupts()
    batcher = MicroBatcher(net, 8, 0.0)
    callers = Callers()
    callers.call(0, lambda: batcher(_rows(0)))
    assert net.entered.wait(_LIMIT_S)
    for n in (1, 2, 3):
        callers.call(n, lambda n=n: batcher(_rows(n)))
        _until_waiting(batcher, n)
    net.open.set()
    results = callers.join()
    assert isinstance(results[1], KeyboardInterrupt)
    for n in (0, 2, 3):
        np.testing.assert_array_equal(results[n][0], _rows(2 * n))


def test_a_net_without_one_row_for_each_row_is_told_of() -> None:
    def pooled(*inputs: Array) -> tuple[Array, ...]:
        return (inputs[0].mean(axis=0, keepdims=True),)

    with pytest.raises(BeaverVisionError, match="for 2 rows"):
        MicroBatcher(pooled, 8, 1.0)(_rows(1, 2))


def test_inputs_need_one_number_of_rows() -> None:
    batcher = MicroBatcher(Double(), 8, 1.0)
    with pytest.raises(ValueError, match="one common number of rows"):
        batcher(_rows(1, 2), _rows(1, 3))
    with pytest.raises(ValueError, match="rows"):
        batcher()


def test_close_waits_for_what_is_under_way_and_refuses_the_rest() -> None:
    net = Gate()
    batcher = MicroBatcher(net, 1, _LONG_MS)
    callers = Callers()
    callers.call(0, lambda: batcher(_rows(0)))
    assert net.entered.wait(_LIMIT_S)
    callers.call(1, lambda: batcher(_rows(1)))
    _until_waiting(batcher, 1)
    callers.call(2, batcher.close)
    net.open.set()
    results = callers.join()
    np.testing.assert_array_equal(results[1][0], _rows(2))
    assert net.batches == [1, 1]
    with pytest.raises(BeaverVisionError, match="closed"):
        batcher(_rows(1))
    batcher.close()


def test_close_ends_the_wait_for_others() -> None:
    batcher = MicroBatcher(Double(), 8, _LONG_MS)
    batcher._seen_s[-1] = time.monotonic() + _LIMIT_S  # somebody else is active
    callers = Callers()
    callers.call(0, lambda: batcher(_rows(1)))
    with batcher._changed:
        assert batcher._changed.wait_for(lambda: batcher._busy, _LIMIT_S)
    batcher.close()
    assert len(callers.join()[0]) == 1


@pytest.mark.parametrize(("max_batch", "deadline_ms"), [(0, 1.0), (1, -1.0)])
def test_limits_are_checked(max_batch: int, deadline_ms: float) -> None:
    with pytest.raises(ValueError, match="at least"):
        MicroBatcher(Double(), max_batch, deadline_ms)
