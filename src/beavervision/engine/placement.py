"""Which stage runs on which device, and with how many CPU threads.

:func:`plan` is a pure function of the devices and the measured costs. With two GPUs it gives the BeaverVision paper's
split (what comes before the lip sync on one, lip sync on the other) wherever the measured costs call for it.
"""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from beavervision.engine.host import memory_total_bytes
from beavervision.errors import DeviceError

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Device:
    """A place to run networks: name "cpu" or "cuda:<index>"; `model` is what the hardware calls itself."""

    name: str
    memory_mb: int
    model: str = ""

    @property
    def is_gpu(self) -> bool:
        return self.name != "cpu"


@dataclass(frozen=True, slots=True)
class StageCost:
    """What a stage was measured to cost for one picture.

    cpu_ms: on one core. gpu_ms: on one GPU; None if it only runs on the CPU. memory_mb: of the GPU, weights and
    working set. max_threads: CPU threads it gains from.
    """

    cpu_ms: float
    gpu_ms: float | None = None
    memory_mb: int = 0
    max_threads: int = 1


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one stage runs. Several devices are replicas: each serves whole streams. threads: CPU threads of each."""

    stage: str
    devices: tuple[str, ...]
    threads: int


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """A placement for every stage, in the order of the chain; load_ms is each used device's time for one picture."""

    placements: tuple[Placement, ...]
    load_ms: tuple[tuple[str, float], ...]

    def __getitem__(self, stage: str) -> Placement:
        for placement in self.placements:
            if placement.stage == stage:
                return placement
        raise KeyError(stage)

    @property
    def bottleneck_ms(self) -> float:
        """The time for one picture of the busiest device: the expected pace of the whole."""
        return max((ms for _, ms in self.load_ms), default=0.0)


def plan(
    devices: Sequence[Device], costs: Mapping[str, StageCost], cores: int, memory_threshold: float = 0.85
) -> DevicePlan:
    """Place the stages of `costs` (in the order of the chain) on `devices`; the CPU is there without being named.

    Stages with a gpu_ms run on the GPUs if there are any: the chain is cut into contiguous parts, one for each GPU,
    so that the largest load is the least possible (linear partitioning) and each part fits `memory_threshold` of its
    GPU's memory. Only when there are more GPUs than such stages, single stages get several.

    A CPU stage gets as many threads as its share of the CPU work is worth in cores, and at least one, so that the
    threads busy at one time come to about `cores`.

    Raises:
        DeviceError: no cut of the chain fits the GPUs' memory.
    """
    if cores < 1:
        raise ValueError(f"{cores} cores")
    gpus = [device for device in devices if device.is_gpu]
    on_gpu = {stage: cost for stage, cost in costs.items() if gpus and cost.gpu_ms is not None}
    where = _partition(on_gpu, gpus, memory_threshold)
    on_cpu_ms = sum(cost.cpu_ms for stage, cost in costs.items() if stage not in on_gpu)

    placements = []
    load_ms = dict.fromkeys((d for names in where.values() for d in names), 0.0)
    busiest_ms = 0.0
    for stage, cost in costs.items():
        if stage in on_gpu:
            assert cost.gpu_ms is not None
            names, threads = where[stage], 1
            for name in names:
                load_ms[name] += cost.gpu_ms / len(names)
        else:
            share = cores * cost.cpu_ms / on_cpu_ms if on_cpu_ms else 0.0
            names, threads = ("cpu",), max(1, min(math.floor(share + 0.5), cost.max_threads, cores))
            busiest_ms = max(busiest_ms, cost.cpu_ms / threads)
        placements.append(Placement(stage, names, threads))
    if len(on_gpu) < len(costs):
        load_ms["cpu"] = max(busiest_ms, on_cpu_ms / cores)
    return DevicePlan(tuple(placements), tuple(load_ms.items()))


# (largest load in ms, GPUs used, for each stage the range of GPUs that it runs on)
_Cut: TypeAlias = tuple[float, int, tuple[range, ...]]


def _partition(
    stages: Mapping[str, StageCost], gpus: Sequence[Device], memory_threshold: float
) -> dict[str, tuple[str, ...]]:
    """The best cut by dynamic programming over (stages placed, GPUs considered); of equals the one with fewer GPUs."""
    ms = [cost.gpu_ms or 0.0 for cost in stages.values()]
    need_mb = [cost.memory_mb for cost in stages.values()]
    room_mb = [gpu.memory_mb * memory_threshold for gpu in gpus]
    replicas = len(gpus) > len(ms)
    best: dict[tuple[int, int], _Cut] = {(0, g): (0.0, 0, ()) for g in range(len(gpus) + 1)}
    for g in range(1, len(gpus) + 1):
        for i in range(1, len(ms) + 1):
            cuts = [best[i, g - 1]] if (i, g - 1) in best else []
            for j in range(i):
                for r in range(1, g + 1 if replicas and i - j == 1 else 2):
                    before = best.get((j, g - r))
                    if before is not None and sum(need_mb[j:i]) <= min(room_mb[g - r : g]):
                        load = max(before[0], sum(ms[j:i]) / r)
                        cuts.append((load, before[1] + r, before[2] + (range(g - r, g),) * (i - j)))
            if cuts:
                best[i, g] = min(cuts, key=lambda cut: cut[:2])
    cut = best.get((len(ms), len(gpus)))
    if cut is None:
        needs = ", ".join(f"{stage} {cost.memory_mb} MB" for stage, cost in stages.items())
        have = ", ".join(f"{gpu.name} {gpu.memory_mb} MB" for gpu in gpus)
        raise DeviceError(
            f"The networks ({needs}) do not fit {memory_threshold:.0%} of the memory of {have}. "
            "Add a GPU, choose a smaller model, or use the device cpu."
        )
    return {stage: tuple(gpus[g].name for g in used) for stage, used in zip(stages, cut[2], strict=True)}


def available_devices(*, gpus: bool = True) -> tuple[Device, ...]:
    """The CPU and, with `gpus`, the GPUs that torch finds. Without a driver it is not loaded, which takes seconds."""
    found = [Device("cpu", memory_total_bytes() // _MIB)]
    if not gpus or not has_gpu_driver():
        return tuple(found)
    try:
        import torch  # an extra: not part of the default install
    except ImportError:
        return tuple(found)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found.append(Device(f"cuda:{index}", properties.total_memory // _MIB, properties.name))
    return tuple(found)


def has_gpu_driver() -> bool:
    """Whether NVIDIA's driver is installed."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def resolve(spec: str, available: Sequence[Device]) -> tuple[Device, ...]:
    """The devices that `spec` ("auto", "cpu", "cuda:0", "cuda:0,cuda:1") means; auto: all GPUs, else the CPU.

    Raises:
        DeviceError: one of them is not there, named twice, or mixed with the CPU; the message says what there is.
    """
    by_name = {device.name: device for device in available}
    gpus = tuple(device for device in available if device.is_gpu)
    names = [name.strip() for name in spec.split(",")]
    if names == ["auto"]:
        return gpus or tuple(available)
    here = ", ".join(f"{d.name} ({d.model})" if d.model else d.name for d in available)
    for name in names:
        if name not in by_name:
            hint = "" if gpus else " GPUs need an NVIDIA driver and the extra: pip install 'beavervision[gpu]'."
            raise DeviceError(f"There is no device {name!r}. Use auto or some of: {here}.{hint}")
    if len(set(names)) < len(names):
        raise DeviceError(f"{spec!r} names a device twice. Name each once, of: {here}.")
    if "cpu" in names and len(names) > 1:
        raise DeviceError(f"{spec!r} mixes the CPU with GPUs. Name the GPUs alone: the CPU does its part anyway.")
    return tuple(by_name[name] for name in names)
