"""What this process may use of its machine: cores and memory, with the limits of its control group counted in."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def cores(root: Path = _ROOT) -> int:
    """CPUs that this process may keep busy: its affinity, or the CPU quota of its control group (rounded down) if less.

    `root` is where /proc and /sys are looked for.
    """
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    for text in _limits(root, "cpu", "cpu.max"):
        quota, _, period = text.partition(" ")
        if quota.isdigit() and period.isdigit():
            usable = min(usable, int(quota) // int(period))
    for quota, period in zip(
        _limits(root, "cpu", "cpu.cfs_quota_us"), _limits(root, "cpu", "cpu.cfs_period_us"), strict=False
    ):
        if quota.isdigit() and period.isdigit():  # -1: no quota
            usable = min(usable, int(quota) // int(period))
    return max(usable, 1)


class Stolen:
    """How much of the CPU time that was wanted since it was made the host of a virtual machine gave to others."""

    def __init__(self, root: Path = _ROOT) -> None:
        self._root = root
        self._before = _cpu_times(root)

    def percent(self) -> float | None:
        """None where the system does not tell."""
        now = _cpu_times(self._root)
        if now is None or self._before is None:
            return None
        stolen, wanted = (a - b for a, b in zip(now, self._before, strict=True))
        return round(100 * stolen / max(wanted, 1), 1)


def _cpu_times(root: Path) -> tuple[int, int] | None:
    """Of all CPUs since the start: what was stolen, and all that was not idle (proc_stat(5))."""
    try:
        line = (root / "proc/stat").read_text().split("\n", 1)[0]
        user, nice, system, _, _, irq, softirq, stolen = (int(n) for n in line.split()[1:9])
    except (OSError, ValueError):
        return None
    return stolen, user + nice + system + irq + softirq + stolen


def memory_total_bytes(root: Path = _ROOT) -> int:
    """The machine's memory, or the limit of this process's control group if less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory.limit_in_bytes"):
        total = min([total, *(int(text) for text in _limits(root, "memory", name) if text.isdigit())])
    return total


def rss_bytes() -> int:
    """Memory of this process now (its peak where /proc is missing)."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_rss_bytes()


def peak_rss_bytes() -> int:
    """The most memory this process has had."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):  # ru_maxrss also counts the parent that this process was forked from
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _limits(root: Path, controller: str, name: str) -> Iterator[str]:
    """What the files `name` say, from the process's control group up to the top; both versions of control groups.

    Inside a container the group's path may not be visible, but what counts is then at the top of the mount.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in groups:
        _, names, path = line.split(":", 2)
        if names == "":
            tops = [mount, mount / "unified"]
        elif controller in names.split(","):
            tops = [mount / names, mount / controller]
        else:
            continue
        for top in dict.fromkeys(tops):
            place = top / path.lstrip("/")
            for folder in (place, *place.parents):
                if not folder.is_relative_to(top):
                    break
                try:
                    yield (folder / name).read_text().strip()
                except OSError:
                    continue
