"""Plans for no, one, two and many GPUs, as a pure function; and what a device specification means."""

from __future__ import annotations

import itertools
import random
import sys
from types import ModuleType, SimpleNamespace

import pytest

from beavervision.engine.placement import Device, StageCost, available_devices, plan, resolve
from beavervision.errors import DeviceError

CPU = Device("cpu", 16_000)


def gpus(count: int, memory_mb: int = 16_000) -> list[Device]:
    return [Device(f"cuda:{n}", memory_mb, "Tesla T4") for n in range(count)]


CHAIN = {
    "decode": StageCost(3, max_threads=4),
    "detect": StageCost(10, 2.0, 300),
    "hear": StageCost(0.5),
    "lipsync": StageCost(60, 9.0, 900),
    "enhance": StageCost(30, 6.0, 800),
    "render": StageCost(2),
    "encode": StageCost(15, max_threads=8),
}


def test_two_cores_without_a_gpu_give_one_thread_each_but_where_the_work_is() -> None:
    costs = {
        "decode": StageCost(3, 1.0),
        "detect": StageCost(10, 1.0),
        "lipsync": StageCost(8, 1.0),
        "encode": StageCost(14),
    }
    result = plan([CPU], costs, cores=2)
    assert {p.stage: (p.devices, p.threads) for p in result.placements} == dict.fromkeys(costs, (("cpu",), 1))
    assert dict(result.load_ms) == {"cpu": pytest.approx(35 / 2)}
    assert result.bottleneck_ms == pytest.approx(17.5)


def test_more_cores_go_where_the_work_is() -> None:
    costs = {
        "decode": StageCost(3, max_threads=4),
        "lipsync": StageCost(8, max_threads=4),
        "encode": StageCost(47, max_threads=16),
    }
    threads = {p.stage: p.threads for p in plan([CPU], costs, cores=8).placements}
    assert threads == {"decode": 1, "lipsync": 1, "encode": 6}
    assert plan([CPU], costs, cores=8).bottleneck_ms == pytest.approx(8)


def test_a_stage_gets_no_more_threads_than_it_gains_from() -> None:
    result = plan([CPU], {"encode": StageCost(40, max_threads=3)}, cores=16)
    assert result["encode"].threads == 3
    assert result.bottleneck_ms == pytest.approx(40 / 3)


def test_one_gpu_takes_every_network() -> None:
    result = plan(gpus(1), CHAIN, cores=4)
    for stage, cost in CHAIN.items():
        assert result[stage].devices == (("cpu",) if cost.gpu_ms is None else ("cuda:0",))
    assert dict(result.load_ms)["cuda:0"] == pytest.approx(17)


def test_two_gpus_give_the_papers_split() -> None:
    costs = {"detect": StageCost(10, 4.0, 300), "lipsync": StageCost(60, 9.0, 900), "enhance": StageCost(9, 4.0, 500)}
    result = plan(gpus(2), costs, cores=2)
    assert (result["detect"].devices, result["lipsync"].devices) == (("cuda:0",), ("cuda:1",))
    assert plan(gpus(2), {**costs, "enhance": StageCost(9, 1.0)}, 2).bottleneck_ms == pytest.approx(10)
    # what follows goes to where there is room
    heavy = plan(gpus(2), CHAIN, cores=4)
    assert [heavy[s].devices for s in ("detect", "lipsync", "enhance")] == [("cuda:0",), ("cuda:0",), ("cuda:1",)]
    assert dict(heavy.load_ms)["cuda:0"] == pytest.approx(11)


def test_as_many_gpus_as_networks() -> None:
    result = plan(gpus(3), CHAIN, cores=4)
    assert [result[s].devices for s in ("detect", "lipsync", "enhance")] == [("cuda:0",), ("cuda:1",), ("cuda:2",)]
    assert max(ms for name, ms in result.load_ms if name != "cpu") == pytest.approx(9)


def test_more_gpus_than_networks_become_replicas_of_the_slowest() -> None:
    result = plan(gpus(6), CHAIN, cores=4)
    assert [len(result[s].devices) for s in ("detect", "lipsync", "enhance")] == [1, 3, 2]
    used = [name for s in ("detect", "lipsync", "enhance") for name in result[s].devices]
    assert len(set(used)) == len(used), "replicas share no GPU"
    assert max(ms for name, ms in result.load_ms if name != "cpu") == pytest.approx(3)


def test_of_equal_cuts_the_one_with_fewer_gpus() -> None:
    costs = {"a": StageCost(1, 5.0), "b": StageCost(1, 0.0)}
    assert {plan(gpus(2), costs, 2)[s].devices for s in costs} == {("cuda:0",)}


def test_memory_moves_the_cut() -> None:
    costs = {"detect": StageCost(1, 1.0, 500), "lipsync": StageCost(1, 1.0, 500), "enhance": StageCost(1, 8.0, 700)}
    assert plan(gpus(2, 2000), costs, 2)["lipsync"].devices == ("cuda:0",)
    assert plan(gpus(2, 1500), costs, 2)["lipsync"].devices == ("cuda:0",)
    small_first = [Device("cuda:0", 700), Device("cuda:1", 2000)]
    assert plan(small_first, costs, 2)["lipsync"].devices == ("cuda:1",)
    too_small_first = [Device("cuda:0", 100), Device("cuda:1", 2000)]
    assert {p.devices for p in plan(too_small_first, costs, 2).placements} == {("cuda:1",)}


def test_what_does_not_fit_is_an_error_with_numbers() -> None:
    with pytest.raises(DeviceError, match=r"lipsync 900 MB.*85% of the memory of cuda:0 1000 MB.*cpu"):
        plan(gpus(1, 1000), CHAIN, cores=2)
    assert plan(gpus(1, 1000), {"lipsync": CHAIN["lipsync"]}, cores=2, memory_threshold=0.9)


def test_no_stage_and_no_such_stage() -> None:
    assert plan([CPU], {}, 2).bottleneck_ms == 0
    with pytest.raises(KeyError):
        plan([CPU], CHAIN, 2)["nonsense"]
    with pytest.raises(ValueError, match="cores"):
        plan([CPU], CHAIN, 0)


def _chain(rng: random.Random) -> dict[str, StageCost]:
    return {
        f"s{n}": StageCost(
            rng.uniform(0, 50),
            rng.choice([None, rng.uniform(0, 20)]),
            rng.randrange(0, 1000),
            rng.randrange(1, 9),
        )
        for n in range(rng.randrange(1, 8))
    }


def _gpu_load(devices: list[Device], costs: dict[str, StageCost]) -> float:
    return max((ms for name, ms in plan(devices, costs, 4).load_ms if name != "cpu"), default=0.0)


@pytest.mark.parametrize("seed", range(60))
def test_properties_of_any_plan(seed: int) -> None:
    rng = random.Random(seed)
    costs, count, cores = _chain(rng), rng.randrange(0, 9), rng.randrange(1, 33)
    devices = gpus(count)
    result = plan(devices or [CPU], costs, cores)
    networks = [s for s, cost in costs.items() if cost.gpu_ms is not None]

    assert [p.stage for p in result.placements] == list(costs), "every stage is placed, in order"
    known = {"cpu"} | {d.name for d in devices}
    for p in result.placements:
        assert p.devices
        assert set(p.devices) <= known
        assert ("cpu" in p.devices) == (not devices or p.stage not in networks)
        assert 1 <= p.threads <= min(max(cores, 1), costs[p.stage].max_threads if "cpu" in p.devices else 1)
    several = [p.threads for p in result.placements if p.threads > 1]
    assert sum(several) <= cores + len(several) / 2, "the busy threads come to about the cores"

    if devices:
        placed = [result[s].devices for s in networks]
        order = [int(name.removeprefix("cuda:")) for names in placed for name in names]
        assert order == sorted(order), "contiguous parts, in the order of the GPUs"
        assert all(len(names) == 1 for names in placed) or count > len(networks)
        loads = [_gpu_load(gpus(n), costs) for n in range(1, count + 1)]
        assert all(b <= a + 1e-9 for a, b in itertools.pairwise(loads)), "one more GPU never slows it down"
        used = {name: sum(costs[s].memory_mb for s in networks if name in result[s].devices) for name in known}
        assert all(mb <= 0.85 * 16_000 for mb in used.values())


@pytest.mark.parametrize("seed", range(20))
def test_the_cut_is_the_best_there_is(seed: int) -> None:
    """Against trying every contiguous cut."""
    rng = random.Random(seed)
    ms = [rng.uniform(0.1, 20) for _ in range(rng.randrange(2, 7))]
    count = rng.randrange(1, len(ms) + 1)
    costs = {f"s{n}": StageCost(1, value) for n, value in enumerate(ms)}
    best = min(
        max(sum(ms[a:b]) for a, b in itertools.pairwise((0, *cuts, len(ms))))
        for cuts in itertools.combinations_with_replacement(range(len(ms) + 1), count - 1)
    )
    assert _gpu_load(gpus(count), costs) == pytest.approx(best)


def test_resolve_auto() -> None:
    assert resolve("auto", [CPU]) == (CPU,)
    assert resolve("auto", [CPU, *gpus(2)]) == tuple(gpus(2))


def test_resolve_names() -> None:
    here = [CPU, *gpus(2)]
    assert resolve("cpu", here) == (CPU,)
    assert resolve("cuda:1", here) == (here[2],)
    assert resolve("cuda:1, cuda:0", here) == (here[2], here[1])


@pytest.mark.parametrize(
    ("spec", "count", "message"),
    [
        ("cuda:0", 0, r"no device 'cuda:0'.*auto or some of: cpu\..*beavervision\[gpu\]"),
        ("cuda:3", 2, r"no device 'cuda:3'.*cuda:1 \(Tesla T4\)\.$"),
        ("", 0, "no device ''"),
        ("tpu", 1, "no device 'tpu'"),
        ("auto,cuda:0", 1, "no device 'auto'"),
        ("cuda:0,cuda:0", 1, "twice"),
        ("cpu,cuda:0", 1, "mixes"),
    ],
)
def test_resolve_says_what_there_is(spec: str, count: int, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        resolve(spec, [CPU, *gpus(count)])


def test_without_a_driver_torch_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("ctypes.CDLL", no_driver)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())  # asking it anything would fail
    assert [device.name for device in available_devices()] == ["cpu"]


def test_without_torch_there_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    (device,) = available_devices()
    assert device.name == "cpu"
    assert device.memory_mb > 100


def test_gpus_are_found_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda name: None)
    torch = ModuleType("torch")
    torch.cuda = SimpleNamespace(  # type: ignore[attr-defined]
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_properties=lambda index: SimpleNamespace(total_memory=(15 + index) << 30, name="Tesla T4"),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert available_devices()[1:] == (Device("cuda:0", 15 * 1024, "Tesla T4"), Device("cuda:1", 16 * 1024, "Tesla T4"))
    torch.cuda.is_available = lambda: False
    assert [device.name for device in available_devices()] == ["cpu"]
