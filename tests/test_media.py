from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from beavervision.media import Color, Frames, Matrix, Patch, Picture, Region, pictures_for, sample_at
from tests.faces import portrait

RATES = [Fraction(24), Fraction(24000, 1001), Fraction(25), Fraction(30000, 1001), Fraction(50), Fraction(60000, 1001)]


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("rate_hz", [16000, 44100, 48000])
def test_samples_of_an_hour_are_shared_out_without_gap_or_drift(rate: Fraction, rate_hz: int) -> None:
    pictures = int(3600 * rate)
    starts = [sample_at(i, rate, rate_hz) for i in (0, 1, pictures - 1, pictures)]
    assert starts[0] == 0
    assert abs(starts[-1] - pictures * rate_hz / rate) < 1
    assert pictures_for(starts[-1], rate, rate_hz) == pictures
    assert pictures_for(starts[-1] + rate_hz // 100, rate, rate_hz) == pictures + 1


@pytest.mark.parametrize("matrix", list(Matrix))
@pytest.mark.parametrize("full_range", [False, True])
def test_colour_maps_are_inverse_and_grey_stays_grey(matrix: Matrix, full_range: bool) -> None:
    color = Color(matrix, full_range)
    forward, back = (np.vstack([m, [0, 0, 0, 1]]) for m in (color.to_rgb(), color.to_yuv()))
    assert np.allclose(forward @ back, np.eye(4), atol=1e-4)
    black, white = (0, 255) if full_range else (16, 235)
    assert np.allclose(color.to_rgb() @ [black, 128, 128, 1], 0, atol=1e-3)
    assert np.allclose(color.to_rgb() @ [white, 128, 128, 1], 255, atol=1e-3)


def test_red_is_red_in_bt601() -> None:
    y, u, v = (np.full(s, value, np.uint8) for s, value in (((4, 4), 81), ((2, 2), 90), ((2, 2), 240)))
    red, green, blue = Picture(y, u, v, Color(Matrix.BT601)).rgb()[1, 1]
    assert red > 250
    assert max(green, blue) < 5


def test_painting_changes_nothing_outside_the_mask() -> None:
    picture = portrait()
    region = Region(200, 150, 60, 40)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 20:40] = 255
    patch = Patch.of_rgb(region, np.zeros((40, 60, 3), np.uint8), mask, picture.color)
    painted = picture.painted((patch,))
    changed = painted.y != picture.y
    assert changed[160:180, 220:240].mean() > 0.95
    changed[160:180, 220:240] = False
    assert not changed.any()
    for before, after in ((picture.u, painted.u), (picture.v, painted.v)):
        differs = before != after
        differs[80:90, 110:120] = False
        assert not differs.any()
    assert picture.y[170, 230] != painted.y[170, 230], "the source picture must not have been written to"


def test_painting_back_what_was_read_is_nearly_lossless() -> None:
    picture = portrait()
    region = Region(180, 60, 100, 130)
    patch = Patch.of_rgb(region, picture.rgb(region), np.full((130, 100), 255, np.uint8), picture.color)
    error = picture.painted((patch,)).y.astype(int) - picture.y
    assert np.abs(error).mean() < 0.6
    assert np.abs(error).max() <= 4


def test_a_view_lands_where_its_matrix_says() -> None:
    picture = portrait()
    matrix = np.array([[0.5, 0, -20], [0, 0.5, 10]], np.float32)
    view = picture.warped_rgb(matrix, 128).astype(float)
    source = picture.rgb().astype(float)
    # View pixel centre (40.5, 60.5) is picture point (121, 101): between pixels 120 and 121, 100 and 101.
    expected = source[100:102, 120:122].mean(axis=(0, 1))
    assert np.abs(view[60, 40] - expected).max() < 6


@pytest.mark.parametrize("shapes", [((4, 4), (2, 2), (2, 1)), ((5, 4), (2, 2), (2, 2)), ((4, 4), (4, 4), (4, 4))])
def test_planes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match="4:2:0"):
        Picture(*(np.zeros(s, np.uint8) for s in shapes))


def test_regions_stay_within_the_picture_and_even() -> None:
    points = np.array([[-5.0, 3.0], [7.3, 11.2]], np.float32)
    assert Region.around(points, 1.0, 100, 12) == Region(0, 2, 10, 10)
    assert Region.around(points + 500, 1.0, 100, 12) is None
    with pytest.raises(ValueError, match="even"):
        Region(1, 0, 2, 2)


def test_frames_need_pictures() -> None:
    with pytest.raises(ValueError, match="0 pictures"):
        Frames((), 0, Fraction(25))
