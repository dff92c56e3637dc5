"""The registry and the times of one run."""

from __future__ import annotations

import json
import threading

import prometheus_client
import pytest

from beavervision import metrics
from beavervision.metrics import StageTimes


def test_registry_is_our_own() -> None:
    names = {family.name for family in metrics.REGISTRY.collect()}
    assert "beavervision_stage_wall_seconds" in names
    assert all(name.startswith("beavervision_") for name in names)
    assert not names & {family.name for family in prometheus_client.REGISTRY.collect()}


def test_work_reaches_registry_and_exposition() -> None:
    before = metrics.REGISTRY.get_sample_value("beavervision_pictures_total", {"stage": "t-expo"}) or 0
    StageTimes().worked("t-expo", 0.02, 0.01, 4)
    assert metrics.REGISTRY.get_sample_value("beavervision_pictures_total", {"stage": "t-expo"}) == before + 4
    assert b'beavervision_stage_cpu_seconds_sum{stage="t-expo"} 0.01' in metrics.exposition()


def test_report_has_sums_and_medians_per_picture() -> None:
    times = StageTimes()
    times.expect("decode", "detect")
    times.worked("detect", 0.5, 0.4, 1)  # one slow clip must not move the median
    for _ in range(10):
        times.worked("detect", 0.08, 0.04, 8)
    times.worked("detect", 1.0, 1.0, 0)  # last words: in the sums only
    times.waited("detect", 0.25)
    report = times.report()
    assert list(report["stages"]) == ["decode", "detect"]
    detect = report["stages"]["detect"]
    assert detect["pictures"] == 81
    assert detect["wall_ms"] == pytest.approx(2300)
    assert detect["cpu_ms"] == pytest.approx(1800)
    assert detect["waiting_ms"] == pytest.approx(250)
    assert detect["wall_ms_per_picture"] == pytest.approx(10, rel=0.011)
    assert detect["cpu_ms_per_picture"] == pytest.approx(5, rel=0.011)
    assert report["stages"]["decode"]["wall_ms_per_picture"] is None
    assert json.loads(json.dumps(report)) == report


def test_first_picture_and_pace_come_from_what_was_delivered() -> None:
    times = StageTimes()
    assert times.report()["first_picture_ms"] is None
    times.delivered(2)
    first = times.report()["first_picture_ms"]
    times.delivered(3)
    report = times.report()
    assert report["first_picture_ms"] == first
    assert report["pictures"] == 5
    rounding = 0.0006 / report["elapsed_ms"]  # elapsed_ms has three decimals, and little passed
    assert report["pictures_per_s"] == pytest.approx(5e3 / report["elapsed_ms"], rel=rounding + 1e-6)


def test_median_needs_constant_memory() -> None:
    spread = metrics._Spread()
    for step in range(20_000):
        spread.add(0.5 + step / 1000, 1)  # 0.5 to 20.5 ms
    assert len(spread._bins) < 250
    assert spread.median() == pytest.approx(10.5, rel=0.011)
    spread.add(0.0, 1)  # a clock that did not move
    assert spread.median() is not None


def test_threads_lose_no_count() -> None:
    times = StageTimes()
    start = threading.Barrier(4)

    def work() -> None:
        start.wait()
        for _ in range(500):
            times.worked("shared", 0.001, 0.001, 1)
            times.delivered(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report = times.report()
    assert report["pictures"] == report["stages"]["shared"]["pictures"] == 2000
