"""The topology of the 478-point face mesh, and the pose-free face frame.

The pose-free frame is that of the canonical face of MediaPipe's face geometry (Apache-2.0): origin between the eyes, x to the
right of the picture, y down, z away from the viewer; its unit is the distance of the eye centres. A face in a picture is the
pose-free face turned, scaled and moved (weak perspective); :func:`fit_pose` finds that motion from points that speech
does not move.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from io import BytesIO

import cv2
import numpy as np
import numpy.typing as npt

from beavervision.media import F32

IndexArray = npt.NDArray[np.intp]


def _index(*values: int) -> IndexArray:
    return np.array(values, np.intp)


# Rings run from the picture's left mouth corner over the upper lip to the right corner and back over the lower lip.
OUTER_LIP = _index(61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291, 375, 321, 405, 314, 17, 84, 181, 91, 146)
INNER_LIP = _index(78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308, 324, 318, 402, 317, 14, 87, 178, 88, 95)
INNER_UPPER = INNER_LIP[1:10]
INNER_LOWER = INNER_LIP[:10:-1]  # the point below each of INNER_UPPER
INNER_CORNERS = _index(78, 308)
OUTER_CORNERS = _index(61, 291)
FACE_OVAL = _index(
    *(10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377),
    *(152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109),
)
JAW = _index(454, 323, 361, 288, 397, 365, 379, 378, 400, 377, 152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234)
EYE_CORNERS = _index(33, 133, 362, 263)
# Points that neither speech nor smiling moves: eye corners, bridge of the nose, forehead, temples.
STABLE = _index(33, 133, 362, 263, 168, 6, 197, 195, 5, 4, 10, 67, 297, 54, 284, 127, 356, 162, 389, 143, 372, 21, 251)
# Skin that speech hardly moves: forehead, bridge of the nose, upper cheeks, temples.
UPPER_SKIN = _index(151, 9, 108, 337, 69, 299, 6, 197, 117, 346, 118, 347, 50, 280, 101, 330, 123, 352, 143, 372)


@dataclass(frozen=True, slots=True, eq=False)
class Pose:
    """How the pose-free frame lies in a picture: ``points_px = scale_px * points @ rotation.T + shift_px``."""

    rotation: F32  # (3, 3)
    scale_px: float  # the distance of the eye centres if seen from the front
    shift_px: F32  # (3,)

    def to_picture(self, points: F32) -> F32:
        """Pose-free points (..., 3) to picture pixels (..., 3)."""
        return np.asarray(self.scale_px * (points @ self.rotation.T) + self.shift_px, np.float32)

    def to_face(self, points_px: F32) -> F32:
        """Picture pixels (..., 3) to pose-free points (..., 3)."""
        return np.asarray((points_px - self.shift_px) @ self.rotation / self.scale_px, np.float32)

    def vector_to_picture(self, vectors: F32) -> F32:
        """Displacements in the pose-free frame (..., 3) to displacements in pixels (..., 3)."""
        return np.asarray(self.scale_px * (vectors @ self.rotation.T), np.float32)

    @property
    def yaw_deg(self) -> float:
        """How far the head is turned to the side; 0 is frontal."""
        return float(np.degrees(np.arctan2(self.rotation[0, 2], self.rotation[2, 2])))

    @property
    def pitch_deg(self) -> float:
        """How far the head is nodded; 0 is frontal."""
        return float(np.degrees(np.arcsin(np.clip(self.rotation[1, 2], -1, 1))))


@cache
def _data() -> tuple[F32, IndexArray]:
    raw = np.load(BytesIO(files("beavervision.models").joinpath("data/face_mesh.npz").read_bytes()))
    return raw["vertices"].astype(np.float32), raw["triangles"].astype(np.intp)


def canonical() -> F32:
    """The average face, (468, 3), in the pose-free frame (the iris points have no canonical place)."""
    return _data()[0]


def triangles() -> IndexArray:
    """The mesh's triangles, (898, 3) point indices; 18 of them span the mouth's opening."""
    return _data()[1]


@cache
def _stable() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
    """The stable points of the average face (n, 3) about their middle (3,), that middle, and the sum of their squares."""
    source = canonical()[STABLE].astype(np.float64)
    mean = source.mean(axis=0)
    return source - mean, mean, float(((source - mean) ** 2).sum())


def fit_pose(points_px: F32) -> Pose:
    """The pose of a face with `points_px` (478, 3): least squares over :data:`STABLE` (Umeyama, 1991)."""
    target = points_px[STABLE].astype(np.float64)
    mean_t = np.add.reduce(target) / len(STABLE)
    s, mean_s, spread = _stable()
    # OpenCV's functions for small matrices are several times as fast as NumPy's.
    d, u, vt = cv2.SVDecomp((target - mean_t).T @ s)
    d = d.ravel().tolist()
    if cv2.determinant(u @ vt) < 0:
        u[:, 2] *= -1
        d[2] *= -1
    rotation = u @ vt
    scale = sum(d) / spread
    shift = mean_t - scale * (rotation @ mean_s)
    return Pose(rotation.astype(np.float32), scale, shift.astype(np.float32))


def gaps(points: F32) -> F32:
    """The inner lip gaps (...) of pose-free faces (..., 478, 3): means over the middle of the mouth, in eye distances."""
    apart = points[..., INNER_LOWER[2:7], 1] - points[..., INNER_UPPER[2:7], 1]
    return np.asarray(apart.mean(axis=-1), np.float32)


def openings(points: F32) -> F32:
    """The inner lip gaps (n,) of faces (n, 478, 3), any frame: means over the middle of the mouth, in mouth widths."""
    gaps = points[:, INNER_UPPER[2:7], :2] - points[:, INNER_LOWER[2:7], :2]
    widths = points[:, OUTER_CORNERS[0]] - points[:, OUTER_CORNERS[1]]
    gap, width = np.sqrt((gaps**2).sum(axis=-1)).mean(axis=-1), np.sqrt((widths**2).sum(axis=-1))
    return np.asarray(gap / np.maximum(width, 1e-6), np.float32)


def opening(points: F32) -> float:
    """The inner lip gap of one face (478, 3), as :func:`openings`."""
    return float(openings(points[None])[0])
