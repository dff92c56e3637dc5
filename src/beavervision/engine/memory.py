"""A device's memory, measured and held below a share of what there is (85 % in the BeaverVision paper).

Beyond it, step by step: the pool of free buffers is let go; then every network's largest batch is halved, check by
check; then a DeviceError says what to do.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from beavervision import metrics
from beavervision.engine.host import memory_total_bytes, rss_bytes
from beavervision.errors import DeviceError

Probe: TypeAlias = Callable[[], tuple[int, int]]  # (bytes used, bytes in all)
Array: TypeAlias = npt.NDArray[Any]

_MIB = 1 << 20


class BufferPool:
    """Arrays to use again; pinned for fast copies to a GPU if `pinned`. Safe from any thread.

    Keeps at most `limit_bytes` of free arrays, and none while `full` says so.
    """

    def __init__(self, limit_bytes: int, pinned: bool = False, full: Callable[[], bool] = lambda: False) -> None:
        self._limit_bytes = limit_bytes
        self._pinned = pinned
        self._full = full
        self._lock = threading.Lock()
        self._free: dict[tuple[tuple[int, ...], np.dtype[Any]], list[Array]] = {}
        self._free_bytes = 0

    @property
    def free_bytes(self) -> int:
        return self._free_bytes

    @contextlib.contextmanager
    def buffer(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Iterator[Array]:
        """An array with arbitrary content, for the time of the block: no view of it may outlive that."""
        key = (shape, np.dtype(dtype))
        with self._lock:
            free = self._free.get(key)
            array = free.pop() if free else None
            if array is not None:
                self._free_bytes -= array.nbytes
        if array is None:
            array = _pinned(*key) if self._pinned else np.empty(*key)
        try:
            yield array
        finally:
            with self._lock:
                if self._free_bytes + array.nbytes <= self._limit_bytes and not self._full():
                    self._free.setdefault(key, []).append(array)
                    self._free_bytes += array.nbytes

    def clear(self) -> None:
        """Let all free arrays go."""
        with self._lock:
            self._free.clear()
            self._free_bytes = 0


def _pinned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    import torch  # an extra: not part of the default install

    kind = torch.from_numpy(np.empty(0, dtype)).dtype
    array: Array = torch.empty(shape, dtype=kind, pin_memory=True).numpy()
    return array


class MemoryBudget:
    """Measured use of one device against `threshold` of its memory; call :meth:`check` now and then (each clip, say).

    Args:
        device: "cpu" or "cuda:<index>".
        threshold: the share of the device's memory that may be used, above 0 and at most 1.
        probe: measures (bytes used, bytes in all). By default the process's memory and its limit for the CPU, and
            everybody's use of a GPU.
        pool_mb: the most that free buffers may hold.
    """

    def __init__(self, device: str, threshold: float = 0.85, probe: Probe | None = None, pool_mb: int = 256) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold {threshold} is no share between 0 and 1")
        self.device = device
        self.threshold = threshold
        self._torch = probe is None and device != "cpu"
        self._probe = probe or (_gpu_probe(device) if self._torch else _cpu_probe())
        self._halve: list[Callable[[], bool]] = []
        self._lock = threading.Lock()
        self._over = False
        self.pool = BufferPool(pool_mb * _MIB, pinned=self._torch, full=lambda: self._over)

    def on_pressure(self, halve: Callable[[], bool]) -> None:
        """Call `halve` (e.g. ``MicroBatcher.halve``) when memory runs short; it returns False when it cannot go on."""
        with self._lock:
            self._halve.append(halve)

    def check(self) -> None:
        """Measure, and make room if the use is above the budget.

        Raises:
            DeviceError: above it, with nothing left to give up.
        """
        with self._lock:
            used, total = self._measure()
            if not self._over:
                return
            self.pool.clear()
            if self._torch:
                _empty_gpu_cache()
            used, total = self._measure()
            if not self._over:
                return
            halved = [halve() for halve in self._halve]
            if any(halved):
                return
        raise DeviceError(
            f"{self.device} is out of memory: {used / _MIB:.0f} MB of {total / _MIB:.0f} MB are used, the budget is "
            f"{self.threshold:.0%}, and batches are as small as can be. Run fewer jobs at once, use a smaller picture "
            "or another device, or raise memory_threshold."
        )

    def _measure(self) -> tuple[int, int]:
        used, total = self._probe()
        budget = self.threshold * total
        self._over = used > budget
        metrics.DEVICE_MEMORY_USED_BYTES.labels(self.device).set(used)
        metrics.DEVICE_MEMORY_BUDGET_BYTES.labels(self.device).set(budget)
        return used, total


def _cpu_probe() -> Probe:
    total = memory_total_bytes()
    return lambda: (rss_bytes(), total)


def _gpu_probe(device: str) -> Probe:
    try:
        import torch  # an extra: not part of the default install
    except ImportError as error:
        raise DeviceError(f"{device} needs torch: pip install 'beavervision[gpu]', or use the device cpu.") from error

    def probe() -> tuple[int, int]:
        try:
            free, total = torch.cuda.mem_get_info(device)
        except (RuntimeError, AssertionError) as error:
            raise DeviceError(f"{device} does not answer: {error}. Check the driver, or use device cpu.") from error
        return total - free, total

    return probe


def _empty_gpu_cache() -> None:
    import torch  # an extra: not part of the default install

    torch.cuda.empty_cache()
