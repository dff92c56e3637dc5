"""Cores and memory under control groups of both versions, read from a made-up /proc and /sys."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from beavervision.engine import host

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and /sys")


def _write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return root


@pytest.fixture(autouse=True)
def _sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))


V1 = "3:cpuset:/\n2:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n1:name=systemd:/"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16),
        ({"proc/self/cgroup": "0::/"}, 16),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 16),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/cpu.max": "250000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "400000 100000"}, 4),
        ({"proc/self/cgroup": "0::/hidden", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/unified/cpu.max": "300000 100000"}, 3),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "9900000 100000"}, 16),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "500000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            5,
        ),
    ],
)
def test_cores(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert host.cores(_write(tmp_path, files)) == expected


def test_affinity_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert host.cores(tmp_path) == 2


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/memory.max": "1048576"}, 1 << 20),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/memory.max": "2097152"}, 2 << 20),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes": "3145728"}, 3 << 20),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "max"}, None),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ({}, None),
    ],
)
def test_memory_limit(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host.memory_total_bytes(_write(tmp_path, files)) == (expected or machine)


def test_resident_memory_follows_use() -> None:
    before = host.rss_bytes()
    array = np.ones(256 << 20, np.uint8)  # more than any heap keeps free
    after = host.rss_bytes()
    assert after - before > 192 << 20
    assert host.peak_rss_bytes() >= after - (4 << 20)
    del array


def test_time_that_the_host_took_is_told_of_what_was_wanted(tmp_path: Path) -> None:
    assert host.Stolen(tmp_path).percent() is None
    _write(tmp_path, {"proc/stat": "cpu  100 0 50 900 5 0 0 10 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"})
    stolen = host.Stolen(tmp_path)
    assert stolen.percent() == 0
    _write(tmp_path, {"proc/stat": "cpu  160 0 70 1900 5 0 0 30 0 0\n"})
    assert stolen.percent() == 20.0
