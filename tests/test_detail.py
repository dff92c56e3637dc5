from __future__ import annotations

import time
from fractions import Fraction
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest

from beavervision.errors import InputError
from beavervision.evaluate.scores import flicker
from beavervision.evaluate.sharpness import sharpness
from beavervision.media import F32, Audio, Clip, Frames, Patch, Picture, Region
from beavervision.models import mesh
from beavervision.models.detail import MouthDetail
from beavervision.models.face import FaceNets
from beavervision.pipeline import Pipeline
from beavervision.stages.detect import Detect
from tests.faces import make_video, portrait


@cache
def grainy(seed: int) -> Picture:
    """The portrait as a noisy camera sees it."""
    picture = portrait()
    noise = np.random.default_rng(seed).normal(0, 5, picture.y.shape)
    return Picture(np.clip(picture.y + noise, 0, 255).astype(np.uint8), picture.u, picture.v, picture.color)


@cache
def points_px() -> F32:
    (clip,) = Detect(FaceNets())(iter([Clip(Frames((portrait(),), 0, Fraction(25)))]))
    assert clip.track is not None and clip.track.faces[0] is not None
    return clip.track.faces[0].points_px


@cache
def region() -> Region:
    found = Region.around(points_px()[mesh.OUTER_LIP], 30, 512, 512)
    assert found is not None
    return found


def drawn(picture: Picture, sigma: float, gain: float = 0.0) -> Patch:
    """A mouth drawn too soft (blurred), or too sharp (`gain`)."""
    y, u, v = (np.ascontiguousarray(plane) for plane in picture.planes(region()))
    soft = cv2.GaussianBlur(y, (0, 0), sigma).astype(np.float32)
    y = np.clip(soft + gain * (y - soft), 0, 255).astype(np.uint8)
    r = region()
    lips = cv2.dilate(inside(mesh.OUTER_LIP, 0).astype(np.uint8) * 255, np.ones((9, 9), np.uint8))
    return Patch(r, y, u, v, np.asarray(lips[r.y_px : r.y_px + r.height_px, r.x_px : r.x_px + r.width_px], np.uint8))


def inside(ring: np.ndarray, shrink_px: int) -> np.ndarray:
    mask = np.zeros((512, 512), np.uint8)
    cv2.fillPoly(mask, [np.round(points_px()[ring, :2]).astype(np.int32)], 1)
    return cv2.erode(mask, np.ones((2 * shrink_px + 1,) * 2, np.uint8)) > 0


def energy(picture: Picture) -> float:
    lips = inside(mesh.OUTER_LIP, 0)
    return float((cv2.Laplacian(picture.y, cv2.CV_32F) ** 2)[lips].mean())


@pytest.mark.parametrize(("sigma", "gain"), [(0.7, 0.0), (1.0, 2.5)])
def test_a_mouth_too_soft_or_too_sharp_gets_the_detail_of_the_persons_own(sigma: float, gain: float) -> None:
    control = MouthDetail()
    before, after = [], []
    for i in range(24):
        picture = grainy(i)
        patch = drawn(picture, sigma, gain)
        made = control.matched(picture, patch, points_px(), points_px())
        before.append(energy(picture.painted((patch,))) / energy(picture))
        after.append(energy(picture.painted((made,))) / energy(picture))
    wrong, right = float(np.median(before)), float(np.median(after[8:]))
    assert not 0.7 < wrong < 1.7
    assert 0.85 < right < 1.15


def test_only_the_mouth_changes() -> None:
    picture = grainy(0)
    patch = drawn(picture, 1.0)
    made = MouthDetail().matched(picture, patch, points_px(), points_px())
    assert (made.u == patch.u).all() and (made.v == patch.v).all() and (made.mask == patch.mask).all()
    r = region()
    far = cv2.dilate(inside(mesh.OUTER_LIP, 0).astype(np.uint8), np.ones((21, 21), np.uint8)) == 0
    far = far[r.y_px : r.y_px + r.height_px, r.x_px : r.x_px + r.width_px]
    assert (made.y[far] == patch.y[far]).all()
    assert (made.y != patch.y).mean() > 0.02


def test_grain_is_that_of_the_picture_and_changes_with_it() -> None:
    control = MouthDetail()
    residuals = []
    for i in range(10):
        picture = grainy(i)
        patch = drawn(picture, 6.0)  # nothing of the own detail is left
        made = control.matched(picture, patch, points_px(), points_px())
        residuals.append(made.y.astype(np.float32) - cv2.GaussianBlur(made.y.astype(np.float32), (0, 0), 1.0))
    r = region()
    opening = inside(mesh.INNER_LIP, 1)[r.y_px : r.y_px + r.height_px, r.x_px : r.x_px + r.width_px]
    one, two = residuals[-1][opening], residuals[-2][opening]
    assert 1.5 < one.std() < 8
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.35


def test_a_still_does_not_begin_to_crawl() -> None:
    picture, control = grainy(0), MouthDetail()
    patch = drawn(picture, 1.0)
    made = [control.matched(picture, patch, points_px(), points_px()).y for _ in range(24)]
    assert flicker(np.stack(made[6:])) < 0.25


def test_it_costs_little() -> None:
    """At a face of 160 px; under a twentieth of the mesh's 8 ms for each tenth of a megapixel."""
    picture, control = grainy(0), MouthDetail()
    patch = drawn(picture, 1.0)
    control.matched(picture, patch, points_px(), points_px())
    began = time.process_time()
    for _ in range(20):
        control.matched(picture, patch, points_px(), points_px())
    assert (time.process_time() - began) / 20 < 3e-3


def test_the_measure_tells_soft_mouths_from_sharp_ones(tmp_path: Path) -> None:
    """A clip of the portrait, driven by a tone: the figure is near 1, and there is one for each size that the face allows."""
    sound = Audio((0.2 * np.sin(np.arange(48_000) / 9))[None].astype(np.float32), 48_000)
    make_video(tmp_path / "one.mp4", [grainy(i % 4) for i in range(10)], Fraction(25), sound)
    (tmp_path / "index.tsv").write_text("file\tsplit\tseconds\tface_px\none.mp4\tvalidate\t2\t160\n", encoding="utf-8")
    report = sharpness(tmp_path, faces_px=(120, 500), pictures=8, pipeline=Pipeline(device="cpu"))
    assert report.sizes == (120,)
    (clip,) = report.clips
    assert clip.pictures >= 5
    assert 0.5 < clip.mouth < 1.6
    with pytest.raises(InputError, match="no clip"):
        sharpness(tmp_path, faces_px=(500,))
    with pytest.raises(InputError, match=r"index\.tsv"):
        sharpness(tmp_path / "nowhere")
