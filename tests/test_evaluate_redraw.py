"""Real mouths redrawn: measured on real clips where they are at hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from beavervision.errors import InputError
from beavervision.evaluate.redraw import ROWS, panels, redraw

TALKERS = Path(__file__).parents[2] / "shared" / "talkers"


@pytest.mark.shared
@pytest.mark.skipif(not (TALKERS / "index.tsv").is_file(), reason="the clips of talkers are not here")
def test_the_renderer_gives_a_closed_mouth_its_real_shape_back() -> None:
    report = redraw(TALKERS, limit=2)
    made, closed = report.median("redrawn"), report.median("closed")
    assert made.psnr_db > closed.psnr_db + 4
    assert made.psnr_db > 28 and made.ssim > 0.9
    assert 0.7 < made.sharpness < 1.3 and made.flicker < 1.3
    encoded = report.median("encoded")
    assert encoded.psnr_db > made.psnr_db and encoded.ssim > made.ssim
    assert encoded.flicker_ring == pytest.approx(1, abs=0.1)
    assert made.flicker_inside < 1.3 and made.flicker_ring < 1.3
    assert report.as_dict()["most_changed_outside"] == 0
    assert {row.name for panel in panels(report) for row in panel.rows} == set(ROWS)
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["clips"] == len(report.clips)


def test_a_folder_without_talkers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"index\.tsv"):
        redraw(tmp_path)
