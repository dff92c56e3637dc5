"""The metrics of the server and of all its workers as one page, the workers' with a label of their own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prometheus_client import Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from beavervision import metrics
from beavervision.serve.schema import MemoryOut

_USED, _BUDGET = "beavervision_device_memory_used_bytes", "beavervision_device_memory_budget_bytes"
_BUSY = "beavervision_device_utilisation_ratio"


class _Joined(Collector):
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        families = {family.name: family for family in metrics.REGISTRY.collect()}
        for family in families.values():
            # The text format has no place for when a series began: it would be a family of its own, in each process.
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        for path in sorted(self._folder.glob("*.prom")):
            try:
                text = path.read_text(encoding="utf-8")
            except FileNotFoundError:  # the worker ended this moment
                continue
            for family in text_string_to_metric_families(text):
                if family.name.endswith("_created"):
                    continue
                joined = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    joined.samples.append(sample._replace(labels={**sample.labels, "worker": path.stem}))
        return families.values()


def page(folder: Path) -> bytes:
    """What `/metrics` answers; `folder` has the files of the workers."""
    return generate_latest(_Joined(folder))


def memory(folder: Path) -> list[MemoryOut]:
    """What each process measured of its devices: the workers, and the server for its live sessions."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for family in _Joined(folder).collect():
        for sample in family.samples:
            if family.name in (_USED, _BUDGET, _BUSY):
                key = (sample.labels.get("worker", "server"), sample.labels["device"])
                found.setdefault(key, {})[family.name] = sample.value
    return [
        MemoryOut(
            worker=worker,
            device=device,
            used_bytes=int(had[_USED]),
            budget_bytes=int(had[_BUDGET]),
            utilisation=had.get(_BUSY),
        )
        for (worker, device), had in sorted(found.items())
        if _USED in had and _BUDGET in had
    ]
