"""Measures as pictures: dots on a value axis, and lines over time. Drawn with Pillow, which is installed in any case."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from beavervision.stages.watch import write_png

_WIDTH = 1000
_LEFT, _RIGHT = 300, 40  # of the axes
_ROW, _TITLE, _FOOT = 34, 34, 34  # heights of a row of dots, and of what stands above and below an axis
_CHART = 190  # height of an axis with lines
_INK, _FAINT, _GOAL = "#1b1f24", "#d0d5db", "#2d7d46"
_COLOURS = ("#1f5fa8", "#c2551d", "#6a4c93", "#2d7d46")
_CONTROL = "#8a929b"
_TICKS = 6


@dataclass(frozen=True, slots=True)
class Dots:
    """A row: a dot for each value and a bar at the median; a control is drawn in grey."""

    name: str
    values: Sequence[float]
    control: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """A curve: y over x; a NaN leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    control: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One axis with rows of dots, or with lines. `goal` is marked on the values' axis; x_name is of lines alone."""

    title: str
    rows: Sequence[Dots] | Sequence[Line]
    goal: float | None = None
    x_name: str = ""

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError(f"nothing to draw in {self.title!r}")

    @property
    def height(self) -> int:
        inner = _CHART if isinstance(self.rows[0], Line) else _ROW * len(self.rows)
        return _TITLE + inner + _FOOT


def write_plot(panels: Sequence[Panel], path: Path) -> None:
    """Draw the panels below one another into a PNG file.

    Raises:
        OutputError: it cannot be written.
    """
    write_png(path, np.asarray(draw(panels)))


def draw(panels: Sequence[Panel]) -> Image.Image:
    """The panels below one another."""
    image = Image.new("RGB", (_WIDTH, sum(panel.height for panel in panels) + 10), "white")
    canvas = _Canvas(ImageDraw.Draw(image))
    top = 5
    for panel in panels:
        canvas.text(16, top + 8, panel.title, size=15)
        if isinstance(panel.rows[0], Line):
            canvas.lines(panel, top + _TITLE)
        else:
            canvas.dots(panel, top + _TITLE)
        top += panel.height
    return image


@dataclass(frozen=True, slots=True)
class _Scale:
    """A value's place between two pixels."""

    low: float
    high: float
    start_px: float
    stop_px: float

    @classmethod
    def of(cls, values: Sequence[float], goal: float | None, start_px: float, stop_px: float) -> _Scale:
        known = [v for v in values if math.isfinite(v)] + ([] if goal is None else [goal])
        low, high = min(known, default=0.0), max(known, default=1.0)
        margin = 0.04 * (high - low) or 0.5
        return cls(low - margin, high + margin, start_px, stop_px)

    def __call__(self, value: float) -> float:
        return self.start_px + (value - self.low) / (self.high - self.low) * (self.stop_px - self.start_px)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """Round values and how they are written."""
        rough = (self.high - self.low) / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        for k in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            yield k * step, f"{k * step:.{digits}f}"


class _Canvas:
    def __init__(self, pen: ImageDraw.ImageDraw) -> None:
        self._pen = pen

    def text(self, x: float, y: float, text: str, *, size: int = 13, fill: str = _INK, anchor: str = "la") -> None:
        self._pen.text((x, y), text, fill=fill, font=ImageFont.load_default(size), anchor=anchor)

    def dots(self, panel: Panel, top: int) -> None:
        rows = [row for row in panel.rows if isinstance(row, Dots)]
        stop = top + _ROW * len(rows)
        scale = _Scale.of([v for row in rows for v in row.values], panel.goal, _LEFT, _WIDTH - _RIGHT)
        for value, label in scale.ticks():
            self._pen.line([(scale(value), top), (scale(value), stop)], fill=_FAINT)
            self.text(scale(value), stop + 4, label, anchor="ma")
        if panel.goal is not None:
            self._pen.line([(scale(panel.goal), top - 4), (scale(panel.goal), stop + 2)], fill=_GOAL, width=2)
        for number, row in enumerate(rows):
            middle = top + _ROW * number + _ROW / 2
            known = sorted(v for v in row.values if math.isfinite(v))
            colour = _CONTROL if row.control else _COLOURS[0]
            for k, value in enumerate(known):
                y = middle + (-5, 0, 5)[k % 3]  # so that neighbours are told apart
                self._pen.ellipse([scale(value) - 3, y - 3, scale(value) + 3, y + 3], outline=colour)
            label = row.name
            if known:
                median = (known[(len(known) - 1) // 2] + known[len(known) // 2]) / 2
                self._pen.line([(scale(median), middle - 12), (scale(median), middle + 12)], fill=colour, width=4)
                label += f"  {median:.3g}"
            self.text(_LEFT - 12, middle, label, anchor="rm")

    def lines(self, panel: Panel, top: int) -> None:
        rows = [row for row in panel.rows if isinstance(row, Line)]
        stop = top + _CHART
        across = _Scale.of([v for row in rows for v in row.x], None, _LEFT, _WIDTH - _RIGHT)
        up = _Scale.of([v for row in rows for v in row.y], panel.goal, stop, top)
        for value, label in across.ticks():
            self._pen.line([(across(value), top), (across(value), stop)], fill=_FAINT)
            self.text(across(value), stop + 4, label, anchor="ma")
        for value, label in up.ticks():
            self._pen.line([(_LEFT, up(value)), (_WIDTH - _RIGHT, up(value))], fill=_FAINT)
            self.text(_LEFT - 8, up(value), label, anchor="rm")
        if panel.goal is not None:
            self._pen.line([(_LEFT, up(panel.goal)), (_WIDTH - _RIGHT, up(panel.goal))], fill=_GOAL, width=2)
        coloured = iter(_COLOURS)
        for number, row in enumerate(rows):
            colour = _CONTROL if row.control else next(coloured, _INK)
            for stretch in _known(row):
                self._pen.line([(across(x), up(y)) for x, y in stretch], fill=colour, width=2)
            self.text(16, top + 4 + 22 * number, row.name, fill=colour)
        self.text(_LEFT - 12, stop + 4, panel.x_name, anchor="ra")


def _known(row: Line) -> Iterator[list[tuple[float, float]]]:
    """The stretches of a line between its gaps."""
    stretch: list[tuple[float, float]] = []
    for x, y in zip(row.x, row.y, strict=True):
        if math.isfinite(y):
            stretch.append((x, y))
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch
