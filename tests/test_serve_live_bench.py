"""The bench of live sessions, with a real Chromium and a WebRTC viewer on loopback."""

from __future__ import annotations

import shutil

import pytest

pytest.importorskip("aiortc", reason="live sessions need the extra live")
pytest.importorskip("playwright.async_api", reason="needs the extra browser")

from beavervision.evaluate.samples import portrait
from beavervision.serve.live.bench import measure
from beavervision.settings import Settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_bench_times_what_a_browser_hears_and_sees() -> None:
    with portrait() as face:
        report = measure(
            face, Settings(device="cpu"), size_px=256, times=1, interruptions=1, minutes=0.05, browser=True
        )
    assert report.say_to_browser_ms is not None and report.say_to_browser_ms.count == 1
    assert report.say_to_browser_ms.p50 > 50, "no sooner than the work takes"
    assert report.soak is not None
    for skew_ms in (report.soak.skew_start_ms, report.soak.skew_end_ms):
        assert abs(skew_ms) <= 240, "the beep nearest to a flash is its own: flashes are 480 ms apart"
    if (report.soak.stolen_percent or 0) < 20:  # a browser whose processor is taken away lets pictures wait
        assert abs(report.soak.skew_end_ms - report.soak.skew_start_ms) < 60
    assert any("Chromium" in line for line in report.lines())
