"""Where the points of a face are in a picture between two in which the mesh found them.

The mesh is what following a face costs most. Points between two pictures lie about halfway; a small network, which sees mouth and
face in all three pictures, each at its own points, tells how far off that is, and how sure it is of the lips and of the
whole. It learned from the mesh itself on real clips (``training/between.py``).
"""

from __future__ import annotations

import cv2
import numpy as np

from beavervision.media import F32, U8, Face, Net, Picture, between_pixels
from beavervision.models.cards import FACE_BETWEEN, load_data
from beavervision.models.face import MESH_PX, Crop
from beavervision.models.mesh import OUTER_LIP
from beavervision.models.runtime import OnnxNet

MOUTH_SIZE = (72, 60)  # width and height of what is seen of the mouth,
FACE_SIZE = (56, 56)  # and of the face
_MOUTH_SCALE = 0.9  # of its pixels to those of the mesh's crop
_FACE_SHARE = 0.72  # of the side of the mesh's crop that is seen
_MIDDLE = np.array([33, 263, 61, 291, 1])  # corners of eyes and mouth, tip of the nose


class Between:
    """Tells the points in between. `net` takes mouth (1, 3, 60, 72), face (1, 3, 56, 56) and steps (1, 2, 478, 3); it gives
    off (1, 478, 3) and unsure (1, 2), as :class:`beavervision.models.nets.between.BetweenNet`. For one stream at a time.
    """

    def __init__(self, net: Net) -> None:
        self._net = net
        self._last: tuple[Face, tuple[F32, F32]] | None = (
            None  # the face on the other side, as it was seen: next on the one
        )

    def __call__(
        self, one: tuple[Picture, Face], picture: Picture, other: tuple[Picture, Face], before_px: F32
    ) -> tuple[F32, float, float]:
        """The points (478, 3) of the face in `picture`, the middle of two, given those two steps before it, `before_px`; and by how
        much those of the lips and all are expected to be off on average, in pixels of the mesh's crop.
        """
        line = halfway(one[1].points_px, other[1].points_px)
        crop = Crop.of_points(line)
        known = self._last[1] if self._last is not None and self._last[0] is one[1] else None
        first = known or views(one[0].y, one[1].points_px)
        last = views(other[0].y, other[1].points_px)
        self._last = other[1], last
        mouths, faces = zip(first, views(picture.y, line, crop), last, strict=True)
        moved = steps(one[1].points_px, other[1].points_px, before_px, crop)
        off, unsure = self._net(np.stack(mouths)[None], np.stack(faces)[None], moved[None])
        lips, whole = np.asarray(unsure, np.float32)[0]
        points = line + from_crop(np.asarray(off, np.float32)[0], crop)
        return points.astype(np.float32), float(lips), float(whole)


def load_between() -> Between:
    """The bundled network, on ONNX Runtime; raises ModelError where its file is missing or damaged."""
    return Between(OnnxNet(load_data(FACE_BETWEEN.files[0]), name=FACE_BETWEEN.name))


def halfway(one_px: F32, other_px: F32) -> F32:
    """The line between two sets of points, where those of the picture in between would lie if all went on evenly."""
    return np.asarray((one_px + other_px) / 2, np.float32)


def views(luma: U8, points_px: F32, crop: Crop | None = None) -> tuple[F32, F32]:
    """What is seen of the mouth (60, 72) and of the face (56, 56), upright. `crop` is that of the points, if known."""
    crop = crop or Crop.of_points(points_px)
    lips, middle = points_px[OUTER_LIP, :2].mean(axis=0), points_px[_MIDDLE, :2].mean(axis=0)
    mouth = _view(luma, lips, _MOUTH_SCALE * MESH_PX / crop.side_px, crop.angle_rad, MOUTH_SIZE)
    return mouth, _view(luma, middle, FACE_SIZE[0] / (_FACE_SHARE * crop.side_px), crop.angle_rad, FACE_SIZE)


def steps(one_px: F32, other_px: F32, before_px: F32, crop: Crop) -> F32:
    """How the points went on from the first picture to the last, and to the first from two before it, (2, 478, 3) in the crop."""
    return np.stack([to_crop(other_px - one_px, crop), to_crop(one_px - before_px, crop)])


def to_crop(offsets_px: F32, crop: Crop) -> F32:
    """Offsets (478, 3) in pixels of the picture as offsets in those of the mesh's crop."""
    turned = np.hstack([offsets_px[:, :2] @ _turn(crop).T, offsets_px[:, 2:]])
    return np.asarray(turned * np.float32(MESH_PX / crop.side_px), np.float32)


def from_crop(offsets: F32, crop: Crop) -> F32:
    """The other way round."""
    turned = np.hstack([offsets[:, :2] @ _turn(crop), offsets[:, 2:]])
    return np.asarray(turned * np.float32(crop.side_px / MESH_PX), np.float32)


def _turn(crop: Crop) -> F32:
    cos, sin = np.cos(crop.angle_rad), np.sin(crop.angle_rad)
    return np.array([[cos, sin], [-sin, cos]], np.float32)


def _view(luma: U8, middle: F32, scale: float, angle_rad: float, size: tuple[int, int]) -> F32:
    """(h, w): `luma` around `middle`, turned upright; strong reductions are averaged first."""
    width, height = size
    reduce = max(1, int(1 / scale))
    cos, sin = np.cos(angle_rad) * scale, np.sin(angle_rad) * scale
    linear = np.array([[cos, sin], [-sin, cos]])
    # The part of the picture that is seen, in whole blocks of what is averaged.
    reach = np.abs(linear.T) @ [width / 2, height / 2] / scale**2 + 2 * reduce
    size_px = np.array(luma.shape[::-1])
    low = np.clip(np.floor(middle - reach), 0, size_px - reduce).astype(int)
    count = np.maximum((np.clip(np.ceil(middle + reach), low + reduce, size_px).astype(int) - low) // reduce, 1)
    box = luma[low[1] : low[1] + count[1] * reduce, low[0] : low[0] + count[0] * reduce]
    if reduce > 1:
        box = np.asarray(cv2.resize(box, count.tolist(), interpolation=cv2.INTER_AREA), np.uint8)
    shift = np.array([width / 2, height / 2]) + linear @ (low - middle)
    matrix = between_pixels(np.hstack([linear, shift[:, None]]), (reduce, reduce))
    return np.asarray(
        cv2.warpAffine(box, matrix, size, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.float32
    )
