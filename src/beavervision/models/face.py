"""The face nets of the bundled MediaPipe task (Apache-2.0) on LiteRT: detector, mesh, blendshapes."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from io import BytesIO
from typing import Any

import cv2
import numpy as np

from beavervision.errors import ModelError
from beavervision.media import BLENDSHAPES, F32, POINTS, Face, Picture
from beavervision.models.cards import load_data

_DETECT_PX = 128
MESH_PX = 256
_MIN_SCORE = 0.5
_NEAR_SCALE = 1.6  # of what is searched around a crop of a mesh
_MESH_SCALE = 1.5  # the mesh's crop against the face's box
# The detector finds faces that are upside down too, but as upright or lying ones, and the mesh fits them so. Hardly any of them has
# a score above `_SURE_SCORE`, or `_SURE_CLOSE_SCORE` in a closer look at `_CLOSE_SCALE` of its crop. Of all turns of that look the
# right one has the best, above `_UPRIGHT_SCORE`; of a face that is blurred or half hidden all have less, which tells nothing.
_SURE_SCORE, _SURE_CLOSE_SCORE, _UPRIGHT_SCORE = 0.9, 0.87, 0.8
_CLOSE_SCALE = 1.3
_QUARTER = np.pi / 2
# The points that the blendshape net reads, in its order (MediaPipe's face_blendshapes_graph).
# fmt: off
_BLENDSHAPE_POINTS = np.array([
    0, 1, 4, 5, 6, 7, 8, 10, 13, 14, 17, 21, 33, 37, 39, 40, 46, 52, 53, 54, 55, 58, 61, 63, 65, 66, 67, 70, 78, 80,
    81, 82, 84, 87, 88, 91, 93, 95, 103, 105, 107, 109, 127, 132, 133, 136, 144, 145, 146, 148, 149, 150, 152, 153,
    154, 155, 157, 158, 159, 160, 161, 162, 163, 168, 172, 173, 176, 178, 181, 185, 191, 195, 197, 234, 246, 249,
    251, 263, 267, 269, 270, 276, 282, 283, 284, 285, 288, 291, 293, 295, 296, 297, 300, 308, 310, 311, 312, 314,
    317, 318, 321, 323, 324, 332, 334, 336, 338, 356, 361, 362, 365, 373, 374, 375, 377, 378, 379, 380, 381, 382,
    384, 385, 386, 387, 388, 389, 390, 397, 398, 400, 402, 405, 409, 415, 454, 466,
    *range(468, 478),
], np.intp)
# fmt: on


@dataclass(frozen=True, slots=True)
class Crop:
    """A turned square of a picture: its centre, side and clockwise angle."""

    x_px: float
    y_px: float
    side_px: float
    angle_rad: float = 0.0

    def matrix(self, size_px: int) -> F32:
        """(2, 3): picture pixels to pixels of the crop resized to `size_px`."""
        scale = size_px / self.side_px
        cos, sin = np.cos(self.angle_rad) * scale, np.sin(self.angle_rad) * scale
        turn = np.array([[cos, sin], [-sin, cos]])
        shift = size_px / 2 - turn @ [self.x_px, self.y_px]
        return np.hstack([turn, shift[:, None]]).astype(np.float32)

    def overlap(self, other: Crop) -> float:
        """Intersection over union of the two squares, not minding their angle."""
        reach = (self.side_px + other.side_px) / 2
        least = min(self.side_px, other.side_px)
        width = min(max(reach - abs(self.x_px - other.x_px), 0.0), least)
        height = min(max(reach - abs(self.y_px - other.y_px), 0.0), least)
        both = width * height
        return both / (self.side_px**2 + other.side_px**2 - both)

    @classmethod
    def of_points(cls, points_px: F32) -> Crop:
        """The crop the mesh wants next, from the points (478, 2+) it found last."""
        low, high = points_px[:, :2].min(axis=0), points_px[:, :2].max(axis=0)
        dx, dy = points_px[263, :2] - points_px[33, :2]
        x, y = (low + high) / 2
        return cls(float(x), float(y), float((high - low).max()) * _MESH_SCALE, float(np.arctan2(dy, dx)))


@dataclass(frozen=True, slots=True)
class Detection:
    """A face found: the crop for its mesh, and the detector's score."""

    crop: Crop
    score: float


@cache
def blendshape_names() -> tuple[str, ...]:
    """The ARKit names of the 52 blendshapes, in the net's order."""
    raw = files("beavervision.models").joinpath("data/blendshape_names.json").read_text(encoding="utf-8")
    return tuple(json.loads(raw))


@cache
def _anchors() -> F32:
    """(896, 2) anchor centres of BlazeFace short range, in 0..1: two per cell of 16 x 16, six per cell of 8 x 8."""
    grids = []
    for cells, per_cell in ((16, 2), (8, 6)):
        y, x = np.mgrid[0:cells, 0:cells]
        centres = (np.stack([x.ravel(), y.ravel()], axis=1) + 0.5) / cells
        grids.append(np.repeat(centres, per_cell, axis=0))
    return np.concatenate(grids).astype(np.float32)


class _Net:
    """One of the nets: an array in, arrays out. Looking its tensors up for each picture would cost more than it seems."""

    def __init__(self, interpreter: Any) -> None:
        self._interpreter = interpreter
        self._input = interpreter.get_input_details()[0]["index"]
        self._outputs = [o["index"] for o in interpreter.get_output_details()]

    def __call__(self, value: F32) -> list[Any]:
        self._interpreter.set_tensor(self._input, np.ascontiguousarray(value, np.float32))
        self._interpreter.invoke()
        return [self._interpreter.get_tensor(index) for index in self._outputs]


class FaceNets:
    """The three nets of the task file. Not for use by two threads at once."""

    def __init__(self, threads: int = 1) -> None:
        """Raises ModelError where LiteRT is missing or the bundle is damaged."""
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError as error:
            raise ModelError("the package ai-edge-litert is missing or broken: reinstall beavervision.") from error
        with zipfile.ZipFile(BytesIO(load_data("face_landmarker.task"))) as bundle:

            def load(name: str) -> _Net:
                net = Interpreter(model_content=bundle.read(name), num_threads=threads)
                net.allocate_tensors()
                return _Net(net)

            self._detector = load("face_detector.tflite")
            self._mesh = load("face_landmarks_detector.tflite")
            self._shapes = load("face_blendshapes.tflite")

    def detect(self, picture: Picture, *, tiles: bool = True, near: Crop | None = None) -> tuple[Detection, ...]:
        """All faces of a picture, best first; with `tiles` small ones too, down to about 1/20 of the height, and upside down where
        none is found otherwise; with `near` those about where that crop of a mesh was, the same way up.
        """
        found: list[Detection] = []
        whole, *parts = _search(picture.width_px, picture.height_px)
        for crop in (whole, *parts) if tiles else (whole,):
            found += self._detect_in(picture, crop)
        if near is not None:
            turn = round(near.angle_rad / _QUARTER) * _QUARTER
            found += self._detect_in(picture, replace(near, side_px=near.side_px * _NEAR_SCALE, angle_rad=turn))
        if tiles and not found:
            found += self._detect_in(picture, replace(whole, angle_rad=np.pi))
        kept: list[Detection] = []
        for detection in sorted(found, key=lambda d: -d.score):
            if all(k.crop.overlap(detection.crop) < 0.3 for k in kept):
                kept.append(detection)
        return tuple(kept)

    def upright(self, picture: Picture, detection: Detection) -> Detection:
        """The same face with its crop the right way up, should `detection` have it upside down or lying."""
        if detection.score > _SURE_SCORE:
            return detection
        close = replace(detection.crop, side_px=detection.crop.side_px * _CLOSE_SCALE)
        seen = [detection]
        for turn in range(4):
            found = self._detect_in(picture, replace(close, angle_rad=close.angle_rad + turn * _QUARTER))
            seen += [d for d in found if d.score > _UPRIGHT_SCORE and d.crop.overlap(detection.crop) > 0.1]
            if turn == 0 and any(d.score > _SURE_CLOSE_SCORE for d in seen[1:]):
                break
        return max(seen, key=lambda d: d.score)

    def _detect_in(self, picture: Picture, crop: Crop) -> list[Detection]:
        """The faces in `crop`, which may be turned, best first."""
        matrix = crop.matrix(_DETECT_PX)
        image = picture.warped_rgb(matrix, _DETECT_PX).astype(np.float32) / 127.5 - 1
        boxes, scores = self._detector(image[None])
        score = 1 / (1 + np.exp(-np.clip(scores[0, :, 0], -50, 50)))
        order = np.argsort(-score)
        order = order[score[order] > _MIN_SCORE]
        raw = boxes[0] / _DETECT_PX
        raw[:, [0, 4, 6, 8, 10, 12, 14]] += _anchors()[:, :1]
        raw[:, [1, 5, 7, 9, 11, 13, 15]] += _anchors()[:, 1:]
        found: list[Detection] = []
        while order.size:
            best = Detection(_crop_of(raw[order[0]], crop), float(score[order[0]]))
            others = [best.crop.overlap(_crop_of(raw[i], crop)) > 0.3 for i in order]
            group = order[np.array(others)]
            mean = np.average(raw[group], axis=0, weights=score[group])
            found.append(Detection(_crop_of(mean, crop), best.score))
            order = order[~np.array(others)]
        return found

    def mesh(self, picture: Picture, crop: Crop) -> tuple[F32, float]:
        """The points (478, 3) in pixels of the face in `crop`, and the probability that there is one."""
        matrix = crop.matrix(MESH_PX)
        image = np.multiply(picture.warped_rgb(matrix, MESH_PX), np.float32(1 / 255))
        points, presence, _ = self._mesh(image[None])
        points = points.reshape(POINTS, 3)
        inverse = cv2.invertAffineTransform(matrix)
        xy = points[:, :2] @ inverse[:, :2].T + inverse[:, 2]
        z = points[:, 2:] * (crop.side_px / MESH_PX)
        return np.hstack([xy, z]).astype(np.float32), float(1 / (1 + np.exp(-presence.ravel()[0])))

    def blendshapes(self, points_px: F32) -> F32:
        """The 52 blendshape weights, 0 to 1, of a face with `points_px` (478, 3)."""
        (shapes,) = self._shapes(points_px[None, _BLENDSHAPE_POINTS, :2])
        return np.asarray(shapes, np.float32).reshape(BLENDSHAPES)

    def face(self, picture: Picture, crop: Crop, *, settle: int = 0, shapes: bool = True) -> Face | None:
        """The face in `crop`, re-cropped from its own points `settle` times; None if there is none. `shapes`: with blendshapes."""
        points, presence = self.mesh(picture, crop)
        for _ in range(settle):
            if presence < _MIN_SCORE:
                return None
            points, presence = self.mesh(picture, Crop.of_points(points))
        if presence < _MIN_SCORE:
            return None
        return Face(points, self.blendshapes(points) if shapes else None, presence)


def _search(width_px: int, height_px: int) -> Iterable[Crop]:
    """Square crops that together show a face of any size to the detector: the whole picture, then tiles."""
    side = max(width_px, height_px)
    yield Crop(width_px / 2, height_px / 2, side)
    short = min(width_px, height_px)
    for tile in (short, short / 2):
        if tile < _DETECT_PX / 2 or tile > side * 0.9:
            continue
        columns, rows = (max(1, int(np.ceil((full - tile) / (tile * 0.6))) + 1) for full in (width_px, height_px))
        for y in np.linspace(tile / 2, height_px - tile / 2, rows):
            for x in np.linspace(tile / 2, width_px - tile / 2, columns):
                yield Crop(float(x), float(y), float(tile))


def _crop_of(raw: F32, seen: Crop) -> Crop:
    """The mesh's crop for one row of the detector, which looked at `seen`: x, y, w, h, then six key points, the eyes first."""
    angle = float(np.arctan2(raw[7] - raw[5], raw[6] - raw[4]))
    side = float(max(raw[2], raw[3])) * seen.side_px * _MESH_SCALE
    x, y = (float(part - 0.5) * seen.side_px for part in raw[:2])
    cos, sin = float(np.cos(seen.angle_rad)), float(np.sin(seen.angle_rad))
    return Crop(seen.x_px + cos * x - sin * y, seen.y_px + sin * x + cos * y, max(side, 1.0), seen.angle_rad + angle)
