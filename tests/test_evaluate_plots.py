"""Measures drawn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beavervision.errors import OutputError
from beavervision.evaluate.plots import Dots, Line, Panel, draw, write_plot

BLUE, GOAL = (31, 95, 168), (45, 125, 70)


def columns(image: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a colour is, from left to right."""
    return np.flatnonzero((np.asarray(image) == colour).all(axis=2).any(axis=0))


def test_dots_stand_at_their_values_with_a_bar_at_the_median_and_a_line_at_the_goal() -> None:
    image = draw([Panel("share", [Dots("made", [0.0, 0.5, 1.0])], goal=0.25)])
    blue, goal = columns(image, BLUE), columns(image, GOAL)
    left, right = blue.min() + 3, blue.max() - 3
    assert goal.mean() == pytest.approx(left + (right - left) / 4, abs=2)
    pixels = (np.asarray(image) == BLUE).all(axis=2)
    bar = np.flatnonzero(pixels.sum(axis=0) > 20)
    assert bar.mean() == pytest.approx((left + right) / 2, abs=2)


def test_lines_have_gaps_where_nothing_is_known() -> None:
    y = [0.0, 0.0, float("nan"), 1.0, 1.0]
    blue = columns(draw([Panel("opening", [Line("", range(5), y)], x_name="seconds")]), BLUE)
    assert np.diff(blue).max() > 100


@pytest.mark.parametrize("values", [[], [3.0], [2.0, 2.0], [float("nan")], [-1e6, 1e-6]])
def test_odd_values_are_drawn(values: list[float]) -> None:
    for row in (Dots("a", values), Line("a", range(len(values)), values)):
        image = draw([Panel("a", [row])])  # type: ignore[list-item]
        assert image.width == 1000 and image.height > 60


def test_a_plot_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_plot([Panel("a", [Dots("a", [1.0, 2.0])]), Panel("b", [Dots("b", [3.0], control=True)])], path)
    with Image.open(path) as image:
        assert image.format == "PNG"
    with pytest.raises(OutputError, match="missing"):
        write_plot([Panel("a", [Dots("a", [1.0])])], tmp_path / "missing" / "a.png")
    with pytest.raises(ValueError, match="nothing to draw"):
        Panel("a", [])
