"""The Wav2Lip stage: crops, windows and paste against a plain restatement of the published inference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from beavervision.errors import ModelError
from beavervision.media import (
    BLENDSHAPES,
    F32,
    U8,
    Audio,
    Clip,
    Face,
    FaceState,
    FaceTrack,
    Frames,
    Heard,
    Picture,
    Region,
)
from beavervision.models.mesh import FACE_OVAL, INNER_LIP, OUTER_LIP, Pose, canonical
from beavervision.stages.lipsync_wav2lip import Wav2LipSync

SIZE = (240, 320)


class Recorder:
    """A net that keeps its inputs and returns the reference half of the face, inverted."""

    def __init__(self) -> None:
        self.mels: list[F32] = []
        self.faces: list[F32] = []
        self.batches: list[int] = []

    def __call__(self, *inputs: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]:
        mel, face = (np.asarray(x, np.float32) for x in inputs)
        self.mels += list(mel)
        self.faces += list(face)
        self.batches.append(len(face))
        return (1 - face[:, 3:],)


def picture(seed: int) -> Picture:
    rng = np.random.default_rng(seed)
    smooth = cv2.GaussianBlur(rng.integers(0, 256, SIZE).astype(np.float32), (0, 0), 6)
    y = np.interp(smooth, [smooth.min(), smooth.max()], [40, 210]).astype(np.uint8)
    u, v = (rng.integers(110, 146, (SIZE[0] // 2, SIZE[1] // 2)).astype(np.uint8) for _ in range(2))
    return Picture(y, u, v)


def face(x_px: float, y_px: float = 120.0) -> Face:
    pose = Pose(np.eye(3, dtype=np.float32), 48.0, np.array([x_px, y_px, 0], np.float32))
    points = np.pad(canonical()[:468], ((0, 10), (0, 0)))  # the irises, which nothing here reads, at the centre
    return Face(pose.to_picture(points), np.zeros(BLENDSHAPES, np.float32), 1.0)


def stream(faces: Sequence[Face | None], rate: Fraction, size: int, shots: list[int] | None = None) -> Iterator[Clip]:
    rows = np.random.default_rng(7).standard_normal((1000, 80)).astype(np.float32)
    shots = shots or [0] * len(faces)
    for start in range(0, len(faces), size):
        part = faces[start : start + size]
        n = len(part)
        states = tuple(FaceState.OK if f else FaceState.LOST for f in part)
        strength = np.array([1.0 if f else 0.0 for f in part], np.float32)
        yield Clip(
            Frames(tuple(picture(start + i) for i in range(n)), start, rate),
            FaceTrack(tuple(part), states, strength, tuple(shots[start : start + n])),
            Audio(np.zeros((1, n), np.float32), 16_000),
            Heard(rows, 0, Fraction(1, 80), *[np.ones(n, np.float32)] * 2),
        )


def published_boxes(faces: list[Face]) -> list[tuple[int, int, int, int]]:
    """Whole pixels throughout, and smoothed in place, so that the last ones run on from those before them."""
    rows = []
    for points in (f.points_px[FACE_OVAL, :2] for f in faces):
        x0, y0, x1, y1 = (int(v) for v in (*points.min(axis=0), *points.max(axis=0)))
        rows.append([x0, y0, x1, min(y1 + 10, SIZE[0])])
    boxes = np.array(rows)
    for i in range(len(boxes)):
        boxes[i] = boxes[max(min(i, len(boxes) - 5), 0) :][:5].mean(axis=0)
    return [tuple(int(v) for v in box) for box in boxes]  # type: ignore[misc]


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30_000, 1001)])
@pytest.mark.parametrize("size", [1, 4, 64])
def test_inputs_and_paste_are_the_published_ones(rate: Fraction, size: int) -> None:
    faces = [face(120 + 3 * i) for i in range(13)]
    net = Recorder()
    out = list(Wav2LipSync(net, batch=5, whole_box=True)(stream(faces, rate, size)))
    assert [len(c) for c in out] == [len(c) for c in stream(faces, rate, size)]
    assert max(net.batches) <= 5 and sum(net.batches) == 13
    rows = next(stream(faces, rate, 64)).heard
    assert rows is not None
    pictures = [p for clip in out for p in clip.frames.pictures]
    patches = [p for clip in out for p in clip.patches]
    for i, (x0, y0, x1, y1) in enumerate(published_boxes(faces)):
        bgr = np.ascontiguousarray(pictures[i].rgb()[..., ::-1])
        small = cv2.resize(bgr[y0:y1, x0:x1], (96, 96))
        masked = small.copy()
        masked[48:] = 0
        want = np.concatenate([masked, small], axis=2).transpose(2, 0, 1) / 255.0
        np.testing.assert_allclose(net.faces[i], want, atol=1e-6)
        start = int(80.0 * i / float(rate))
        np.testing.assert_array_equal(net.mels[i][0], rows.rows[start : start + 16].T)
        (patch,) = patches[i]
        drawn = cv2.resize(((1 - net.faces[i][3:]) * 255).astype(np.uint8).transpose(1, 2, 0), (x1 - x0, y1 - y0))
        y, x = y0 - patch.region.y_px, x0 - patch.region.x_px
        inside = slice(y, y + y1 - y0), slice(x, x + x1 - x0)
        luma = cv2.transform(drawn[..., ::-1], pictures[i].color.to_yuv())[..., 0]
        np.testing.assert_array_equal(patch.y[inside], luma)
        assert (patch.mask[inside] == 255).all() and patch.mask.sum() == 255 * (x1 - x0) * (y1 - y0)


def test_only_the_lower_face_is_pasted_softly() -> None:
    faces: list[Face | None] = [face(160.0)] * 6
    (clip,) = Wav2LipSync(Recorder())(stream(faces, Fraction(25), 6))
    (patch,) = clip.patches[0]
    mask = np.zeros(SIZE, np.uint8)
    r = patch.region
    mask[r.y_px : r.y_px + r.height_px, r.x_px : r.x_px + r.width_px] = patch.mask
    points = faces[0].points_px if faces[0] else np.zeros((478, 3), np.float32)

    def at(indices: npt.ArrayLike) -> U8:
        x, y = np.round(points[np.asarray(indices), :2]).astype(int).T
        return np.asarray(mask[y, x], np.uint8)

    assert at(OUTER_LIP).min() == 255 and at(INNER_LIP).min() == 255
    assert at([1, 4, 33, 263, 10, 6, 168]).max() < 8  # tip and bridge of the nose, eyes, forehead
    assert not patch.mask[0].any() and not patch.mask[:, 0].any() and not patch.mask[-1].any()
    assert np.abs(np.diff(patch.mask.astype(int), axis=1)).max() < 90  # no hard edge
    painted = clip.frames.pictures[0].painted(clip.patches[0])
    untouched = mask == 0
    np.testing.assert_array_equal(painted.y[untouched], clip.frames.pictures[0].y[untouched])
    assert not np.array_equal(painted.y, clip.frames.pictures[0].y)


def test_lost_faces_pass_and_ramps_fade() -> None:
    faces: list[Face | None] = [face(150.0), face(150.0), None, None, face(170.0), face(170.0)]
    (clip,) = stream(faces, Fraction(25), 6)
    assert clip.track is not None
    strength = np.array([1, 0.5, 0, 0, 0.5, 1], np.float32)
    net = Recorder()
    (out,) = Wav2LipSync(net)(iter([replace(clip, track=replace(clip.track, strength=strength))]))
    assert [len(p) for p in out.patches] == [1, 1, 0, 0, 1, 1]
    assert [int(p[0].mask.max()) for p in out.patches if p] == [255, 128, 128, 255]


def test_boxes_do_not_mix_across_a_cut() -> None:
    faces: list[Face | None] = [*[face(110.0)] * 4, *[face(200.0)] * 4]
    out = list(Wav2LipSync(Recorder())(stream(faces, Fraction(25), 2, shots=[0] * 4 + [1] * 4)))
    regions = [p[0].region for clip in out for p in clip.patches]
    assert len(set(regions[:4])) == 1 and len(set(regions[4:])) == 1 and regions[0].x_px + 90 == regions[4].x_px


def test_a_face_at_the_edge_is_cut_by_the_picture() -> None:
    faces: list[Face | None] = [face(5.0, 200.0)] * 5
    (clip,) = Wav2LipSync(Recorder())(stream(faces, Fraction(25), 5))
    region = clip.patches[0][0].region
    assert region.x_px == 0 and region.y_px + region.height_px == SIZE[0]


def test_the_detectors_box_of_the_same_face_is_drawn_in() -> None:
    """Pictures that are shown again are not looked at again; where it misses the face, the mesh's box takes its place."""
    asked: list[U8] = []

    def boxes(rgb: U8) -> F32:
        asked.append(rgb)
        missed = len(asked) > 10
        return np.array([[10, 10, 60, 60, 0.99], *([] if missed else [[100.9, 60.2, 215.7, 190.8, 0.8]])], np.float32)

    faces: list[Face | None] = [face(160.0)] * 25
    clips = [
        replace(
            c,
            frames=replace(
                c.frames,
                shown=tuple(range(c.frames.start, c.frames.stop))
                if c.frames.start < 10
                else tuple(range(9, 4, -1))
                if c.frames.start == 10
                else (),
            ),
        )
        for c in stream(faces, Fraction(25), 5)
    ]
    out = list(Wav2LipSync(Recorder(), boxes=boxes, whole_box=True)(iter(clips)))
    regions = [p[0].region for clip in out for p in clip.patches]
    assert set(regions[:11]) == {Region(100, 60, 116, 140)}
    assert len(asked) == 10 + 10
    for rgb, picture in zip(asked[:10], (p for c in clips[:2] for p in c.frames.pictures), strict=True):
        np.testing.assert_array_equal(rgb, picture.rgb())
    without = list(Wav2LipSync(Recorder(), whole_box=True)(stream(faces, Fraction(25), 5)))
    assert regions[-5:] == [p[0].region for clip in without for p in clip.patches][-5:]


def test_a_still_is_looked_at_once() -> None:
    asked = 0

    def boxes(rgb: U8) -> F32:
        nonlocal asked
        asked += 1
        return np.array([[100, 60, 216, 190, 0.8]], np.float32)

    faces: list[Face | None] = [face(160.0)] * 10
    (clip,) = stream(faces, Fraction(25), 10)
    still = replace(clip, frames=replace(clip.frames, pictures=(clip.frames.pictures[0],) * 10))
    (out,) = Wav2LipSync(Recorder(), boxes=boxes)(iter([still]))
    assert asked == 1
    assert all(len(p) == 1 for p in out.patches)


def test_another_network_is_refused() -> None:
    def wrong(*inputs: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]:
        return (np.zeros((len(inputs[0]), 3, 64, 64), np.float32),)

    with pytest.raises(ModelError, match="no Wav2Lip generator"):
        list(Wav2LipSync(wrong)(stream([face(150.0)] * 5, Fraction(25), 5)))
