"""Memory budgets on a fake device: what is given up, in which order; and the pool of buffers."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from beavervision import metrics
from beavervision.engine.batcher import MicroBatcher
from beavervision.engine.memory import BufferPool, MemoryBudget
from beavervision.errors import DeviceError

_MIB = 1 << 20


class FakeDevice:
    """1000 MiB of memory, of which `others` are somebody's, and a pool's free buffers count."""

    def __init__(self, others_mb: float) -> None:
        self.others_mb = others_mb
        self.budget: MemoryBudget | None = None

    def __call__(self) -> tuple[int, int]:
        free = self.budget.pool.free_bytes if self.budget is not None else 0
        return int(self.others_mb * _MIB) + free, 1000 * _MIB


def _budget(others_mb: float, threshold: float = 0.85) -> tuple[FakeDevice, MemoryBudget]:
    device = FakeDevice(others_mb)
    device.budget = MemoryBudget("cuda:7", threshold, device)
    return device, device.budget


def _fill_pool(budget: MemoryBudget, mb: int) -> None:
    with budget.pool.buffer((mb, _MIB), np.uint8):
        pass
    assert budget.pool.free_bytes == mb * _MIB


def test_below_the_budget_nothing_is_given_up() -> None:
    _, budget = _budget(700)
    halved: list[bool] = []

    def halve() -> bool:
        halved.append(True)
        return True

    budget.on_pressure(halve)
    _fill_pool(budget, 100)
    budget.check()
    assert budget.pool.free_bytes == 100 * _MIB
    assert halved == []


def test_use_and_budget_are_measured_into_metrics() -> None:
    _, budget = _budget(700, threshold=0.8)
    budget.check()
    used = metrics.REGISTRY.get_sample_value("beavervision_device_memory_used_bytes", {"device": "cuda:7"})
    limit = metrics.REGISTRY.get_sample_value("beavervision_device_memory_budget_bytes", {"device": "cuda:7"})
    assert used == 700 * _MIB
    assert limit == pytest.approx(800 * _MIB)


def test_first_the_pool_goes_and_batches_stay_if_that_is_enough() -> None:
    device, budget = _budget(700)
    batcher = MicroBatcher(lambda *x: x, 8, 1.0)
    budget.on_pressure(batcher.halve)
    _fill_pool(budget, 100)
    device.others_mb = 800
    budget.check()
    assert budget.pool.free_bytes == 0
    assert batcher.max_batch == 8


def test_then_batches_are_halved_then_it_is_an_error() -> None:
    device, budget = _budget(900)
    large, small = MicroBatcher(lambda *x: x, 4, 1.0), MicroBatcher(lambda *x: x, 2, 1.0)
    budget.on_pressure(large.halve)
    budget.on_pressure(small.halve)
    sizes = []
    for _ in range(2):
        budget.check()
        sizes.append((large.max_batch, small.max_batch))
    assert sizes == [(2, 1), (1, 1)]
    with pytest.raises(DeviceError, match=r"cuda:7 is out of memory: 900 MB of 1000 MB.*85%.*smaller picture"):
        budget.check()
    device.others_mb = 500
    budget.check()


def test_no_buffer_is_kept_while_above_the_budget() -> None:
    device, budget = _budget(900)
    budget.on_pressure(lambda: True)
    budget.check()
    with budget.pool.buffer((10, _MIB), np.uint8):
        pass
    assert budget.pool.free_bytes == 0
    device.others_mb = 100
    budget.check()
    _fill_pool(budget, 10)


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01])
def test_threshold_is_a_share(threshold: float) -> None:
    with pytest.raises(ValueError, match="share"):
        MemoryBudget("cpu", threshold)


def test_the_cpu_is_measured() -> None:
    MemoryBudget("cpu", 1.0).check()
    used = metrics.REGISTRY.get_sample_value("beavervision_device_memory_used_bytes", {"device": "cpu"})
    assert used is not None
    assert used > 10 * _MIB
    with pytest.raises(DeviceError, match="cpu is out of memory"):
        MemoryBudget("cpu", 1e-6).check()


def test_a_gpu_without_torch_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DeviceError, match=r"beavervision\[gpu\]"):
        MemoryBudget("cuda:0")


@pytest.mark.torch
def test_a_gpu_that_does_not_answer_is_a_device_error() -> None:
    torch = pytest.importorskip("torch", reason="needs the gpu extra")
    if torch.cuda.is_available():
        pytest.skip("has a GPU that answers")
    with pytest.raises(DeviceError, match="does not answer"):
        MemoryBudget("cuda:0").check()


def test_pool_gives_the_same_buffer_again_only_for_the_same_shape_and_type() -> None:
    pool = BufferPool(10 * _MIB)
    with pool.buffer((4, 5), np.float32) as first:
        assert first.shape == (4, 5)
        with pool.buffer((4, 5), np.float32) as second:
            assert second is not first, "in use"
    with pool.buffer((4, 5), np.float32) as again:
        assert again is first or again is second
    with pool.buffer((4, 5), np.int32) as other:
        assert other.dtype == np.int32
    assert pool.free_bytes == 2 * 80 + 80


def test_pool_keeps_its_limit_and_lets_go() -> None:
    pool = BufferPool(100)
    for shape in ((60,), (50,), (40,)):
        with pool.buffer(shape, np.uint8):
            pass
    assert pool.free_bytes == 100  # 60 and 40
    pool.clear()
    assert pool.free_bytes == 0


def test_pool_takes_a_buffer_back_from_a_block_that_failed() -> None:
    pool = BufferPool(100)
    with pytest.raises(KeyError), pool.buffer((10,), np.uint8):
        raise KeyError
    assert pool.free_bytes == 10


def test_pool_hands_no_buffer_to_two_threads() -> None:
    pool = BufferPool(_MIB)
    clashes: list[int] = []
    start = threading.Barrier(4)

    def work(mark: int) -> None:
        start.wait()
        for _ in range(300):
            with pool.buffer((64,), np.uint8) as array:
                array[:] = mark
                if (array != mark).any():
                    clashes.append(mark)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert clashes == []
    assert pool.free_bytes <= 4 * 64
