"""The facts that the report draws its charts from."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest

from beavervision.media import Audio, Clip, FaceState, FaceTrack, Frames, Picture, sample_at
from beavervision.stages.watch import Watch

RATE = Fraction(30000, 1001)
HZ = 16_000
GRAY = Picture(np.full((4, 4), 100, np.uint8), *(np.full((2, 2), 128, np.uint8) for _ in range(2)))


def clips(opening: list[float], loud: list[float], length: int) -> list[Clip]:
    """Clips of `length` pictures; each picture has its opening, and sound of a constant level."""
    made = []
    for first in range(0, len(opening), length):
        n = len(opening[first : first + length])
        edges = [sample_at(first + i, RATE, HZ) for i in range(n + 1)]
        pcm = np.concatenate(
            [np.full((1, b - a), loud[first + i], np.float32) for i, (a, b) in enumerate(itertools.pairwise(edges))],
            axis=1,
        )
        track = FaceTrack((None,) * n, (FaceState.OK,) * n, np.ones(n, np.float32), (0,) * n)
        made.append(
            Clip(
                Frames((GRAY,) * n, first, RATE),
                track=track,
                audio=Audio(pcm, HZ, edges[0]),
                opening=np.array(opening[first : first + n], np.float32),
            )
        )
    return made


def test_each_picture_has_its_opening_and_the_loudness_heard_meanwhile() -> None:
    watch = Watch(RATE)
    list(watch(iter(clips([0.1, 0.2, 0.3, 0.0, 0.5], [1.0, 0.1, 0.01, 0.0, 0.5], 2))))
    series = watch.facts()["series"]
    assert series["step_s"] == pytest.approx(1001 / 30000, abs=1e-6)
    assert series["opening"] == [0.1, 0.2, 0.3, 0.0, 0.5]
    assert series["loudness_db"] == pytest.approx([0, -20, -40, -100, -6], abs=0.1)


def test_the_curves_stay_short_however_long_the_stream() -> None:
    pictures = 4001
    watch = Watch(RATE)
    list(watch(iter(clips([i / pictures for i in range(pictures)], [0.1] * pictures, 8))))
    series = watch.facts()["series"]
    opening = np.array(series["opening"])
    stride = round(series["step_s"] * float(RATE))
    assert 300 <= len(opening) == len(series["loudness_db"]) <= 600
    assert len(opening) == -(-pictures // stride)
    means = [np.mean(np.arange(i, min(i + stride, pictures))) / pictures for i in range(0, pictures, stride)]
    assert np.abs(opening - means).max() < 1e-3
    assert set(series["loudness_db"]) == {-20.0}


def test_without_sound_it_is_silent() -> None:
    watch = Watch(RATE)
    quiet = [Clip(c.frames, track=c.track, opening=c.opening) for c in clips([0.1, 0.2], [1, 1], 1)]
    list(watch(iter(quiet)))
    assert watch.facts()["series"]["loudness_db"] == [-100.0, -100.0]


def test_without_a_sheet_no_picture_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    with_sheet = Watch(RATE)
    list(with_sheet(iter(clips([0.1, 0.2, 0.3], [1.0, 0.1, 0.01], 2))))
    monkeypatch.delattr(Picture, "planes")
    without = Watch(RATE, sheet=False)
    list(without(iter(clips([0.1, 0.2, 0.3], [1.0, 0.1, 0.01], 2))))
    assert without.facts() == with_sheet.facts()
