"""A video against its truth, and the score that is made of the measures."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from beavervision.errors import InputError
from beavervision.evaluate.articulation import ArticulationReport, Share
from beavervision.evaluate.quality import Comparison, compare, panels, quality
from beavervision.media import Picture
from beavervision.stages.decode import from_rgb
from tests.conftest import Ran
from tests.faces import empty, make_video, moved, portrait_rgb

RATE = Fraction(25)
COUNT = 36
PERFECT = Comparison(1.0, 1.0, 0, 0.0, 0.0, 100.0, 1.0, 1.0, 1.0, 50)


def articulated(right: int) -> ArticulationReport:
    share = Share(right, 10, 0.5)
    return ArticulationReport(*[share] * 5, Share(0, 0, None), None, 0.2, 5.0, 1.0, {})


def mouthing(pull_px: float, blur: float = 0.0) -> Picture:
    """The portrait with its lower lip pulled down."""
    y, x = np.mgrid[0:512, 0:512].astype(np.float32)
    weight = np.exp(-(((x - 223) / 26) ** 2) - ((y - 160) / 16) ** 2)
    rgb = cv2.remap(portrait_rgb(), x, (y - pull_px * weight).astype(np.float32), cv2.INTER_LINEAR)
    if blur:
        rgb = cv2.GaussianBlur(rgb, (0, 0), blur)
    return from_rgb(np.asarray(rgb, np.uint8))


def pulls(late: int = 0) -> np.ndarray:
    t = np.arange(COUNT) - late
    return 5 + 3 * np.sin(t / 2.1) + 2 * np.sin(t / 3.7 + 1)


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("truth") / "truth.mp4"
    return make_video(path, [mouthing(pull) for pull in pulls()], RATE)


def test_the_score_is_the_weighted_geometric_mean_of_what_was_measured() -> None:
    assert quality(PERFECT, articulated(10), changed_outside=0.0).score == 1
    found = quality(replace(PERFECT, opening_r=0.6, width_r=0.4, sharpness=1.25), articulated(8), changed_outside=0.1)
    assert found.parts == pytest.approx(
        {"follow": 0.5, "sharpness": 0.8, "flicker": 1.0, "articulation": 0.8, "untouched": 0.9}
    )
    assert found.score == pytest.approx((0.5**3 * 0.8**3 * 0.8**2 * 0.9) ** 0.1)
    assert not found.missing


def test_parts_that_were_not_measured_are_left_out_and_named() -> None:
    found = quality(articulation=articulated(9))
    assert (found.score, found.missing) == (pytest.approx(0.9), ("follow", "sharpness", "flicker", "untouched"))
    pixels = quality(replace(PERFECT, opening_r=None, sharpness=0.5, flicker=0.7))
    assert pixels.parts == {"sharpness": 0.5, "flicker": 1.0}
    assert pixels.score == pytest.approx(0.5 ** (2 / 3))
    with pytest.raises(InputError, match="no score"):
        quality()


@pytest.mark.parametrize(
    "worse",
    [{"opening_r": 0.5}, {"width_r": -0.5}, {"lag_ms": 120.0}, {"lag_ms": -120.0}, {"sharpness": 0.6},
     {"sharpness": 1.6}, {"flicker": 2.0}],
)  # fmt: skip
def test_each_fault_lowers_the_score(worse: dict[str, float]) -> None:
    assert 0 < quality(replace(PERFECT, **worse)).score < 0.97


def test_a_contrary_mouth_scores_nothing() -> None:
    assert quality(replace(PERFECT, opening_r=-0.2, width_r=-0.9)).score == 0


def test_the_truth_against_itself_is_perfect(cli: Callable[..., Ran], truth: Path) -> None:
    ran = cli("evaluate", "compare", truth, truth, "--json", "--quiet")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["opening_r"] == found["width_r"] == found["ssim"] == found["sharpness"] == found["flicker"] == 1
    assert found["flicker_inside"] == found["flicker_ring"] == 1
    assert (found["lag_pictures"], found["lmd"], found["psnr_db"], found["pictures"]) == (0, 0, 100, COUNT)
    assert found["quality"]["score"] == 1 and found["quality"]["missing"] == ["articulation", "untouched"]
    human = cli("evaluate", "compare", truth, truth, "--quiet")
    assert "quality" in human.out and "1.000" in human.out


def test_a_late_blurred_mouth_is_measured_as_such(truth: Path, tmp_path: Path) -> None:
    made = make_video(tmp_path / "made.mp4", [mouthing(pull, blur=1.5) for pull in pulls(late=2)], RATE)
    found = compare(made, truth)
    assert found.lag_pictures == 2
    assert found.lag_ms == pytest.approx(80, abs=15)
    assert found.opening_r is not None and found.opening_r < 0.9
    assert found.sharpness is not None and found.sharpness < 0.5
    assert found.psnr_db is not None and 15 < found.psnr_db < 40
    assert 0.005 < found.lmd < 0.1
    assert not found.notes


@pytest.mark.parametrize(("at_px", "where"), [((223, 150), "inside"), ((223, 136), "ring")])
def test_flicker_is_told_apart_by_place(truth: Path, tmp_path: Path, at_px: tuple[int, int], where: str) -> None:
    """A spot of seven pixels changes from picture to picture, on the lips or on the skin above them."""
    y, x = np.mgrid[0:512, 0:512]
    spot = (x - at_px[0]) ** 2 + (y - at_px[1]) ** 2 < 9
    shaken = []
    for number, picture in enumerate(mouthing(pull) for pull in pulls()):
        light = picture.y.astype(int).clip(12, 243) + (12 if number % 2 else -12)
        shaken.append(replace(picture, y=np.where(spot, light, picture.y).astype(np.uint8)))
    found = compare(make_video(tmp_path / "made.mp4", shaken, RATE), truth)
    ratios = {"inside": found.flicker_inside or 0, "ring": found.flicker_ring or 0}
    assert ratios.pop(where) > 1.15
    assert ratios.popitem()[1] < 1.1
    titles = [panel.title.partition(",")[0] for panel in panels(found)]
    assert titles == ["opening", "width", "distance of the lip points"]


def test_other_rates_compare_in_time_and_other_places_without_pixels(truth: Path, tmp_path: Path) -> None:
    twice = make_video(tmp_path / "twice.mp4", [mouthing(p) for p in pulls() for _ in range(2)], 2 * RATE)
    found = compare(twice, truth)
    assert found.psnr_db is None and found.ssim is None and found.sharpness is None and found.flicker is None
    assert found.opening_r is not None and found.opening_r > 0.95
    assert any("rate or size" in note for note in found.notes)
    away = compare(make_video(tmp_path / "away.mp4", [moved(dx=40)] * COUNT, RATE), truth)
    assert away.psnr_db is None and any("different places" in note for note in away.notes)
    assert away.pictures == COUNT


def test_videos_without_a_common_face_and_stills_are_refused(truth: Path, tmp_path: Path, portrait: Path) -> None:
    with pytest.raises(InputError, match="same time"):
        compare(make_video(tmp_path / "empty.mp4", [empty()] * 12, RATE), truth)
    with pytest.raises(InputError, match="still"):
        compare(portrait, truth)
