"""Is something before the mouth? The look of the lower face, followed point by point along the mesh.

The mesh goes on finding a mouth behind a hand or a microphone. But its points sit on the same spots of the skin in every picture,
however the head turns and the mouth speaks, so each has a colour of its own that changes slowly. :class:`Appearance` keeps the
running mean and spread of these colours, relative to the upper face so that a change of light does not count, and says how
little a picture fits: how far the colours around the mouth are off where they are off most, and how much of the pattern of
lips, skin and shadows is gone, which tells a hand of the same colour as the face.
"""

from __future__ import annotations

from functools import cache

import cv2
import numpy as np
import numpy.typing as npt

from beavervision.media import F32, Picture
from beavervision.models import mesh
from beavervision.models.mesh import Pose

_FACE_PX = 54.0  # the greater side of the face in the reduced picture
_NEIGHBOURS = 10  # points of one spot
_SPOTS_EYES, _PATTERN_EYES = 0.18, 0.3  # how far from the lips spots and pattern reach, in eye distances
_FLOOR = np.array([8.0, 2.5, 2.5], np.float32)  # of the spread, for light of 100: noise and a little play
_MOST = 4.0  # spreads that a point may be off at most
_PATTERN_FLOOR = 20.0  # variance of a pattern that is too faint to go by
# Chosen on people that speak, with occluders pasted before them: what is too much of either, and of the two together.
_WORST, _GONE, _TOGETHER = 1.8, 0.3, 1.5
_TURNED_DEG = 25.0  # of turn that halve the misfit
_FAST, _SLOW = 0.05, 0.006  # of the running means: where the picture fits, and where it does not
_SETTLED = 5  # pictures before which nothing is said


@cache
def _points() -> tuple[npt.NDArray[np.intp], F32, npt.NDArray[np.intp]]:
    """The points of the lower face, the averages of spots at the mouth (spots, points), and which points make the pattern."""
    shape = mesh.canonical()[:, :2]
    left_out = np.isin(np.arange(len(shape)), np.concatenate([mesh.FACE_OVAL, mesh.INNER_LIP]))
    low = np.flatnonzero((shape[:, 1] > 0.62) & (shape[:, 1] < 1.75) & (np.abs(shape[:, 0]) < 0.75) & ~left_out)
    ring = shape[mesh.OUTER_LIP].astype(np.float32)
    away = np.array([-cv2.pointPolygonTest(ring, (float(x), float(y)), True) for x, y in shape[low]])
    apart = np.linalg.norm(shape[low][:, None] - shape[low][None], axis=-1)
    near = np.argsort(apart, axis=1)[away < _SPOTS_EYES, :_NEIGHBOURS]
    spots = np.zeros((len(near), len(low)), np.float32)
    np.put_along_axis(spots, near, 1 / _NEIGHBOURS, axis=1)
    return low, spots, np.flatnonzero(away < _PATTERN_EYES)


def colours(picture: Picture, points_px: F32) -> F32:
    """The Y, U, V of the lower face's points, (n, 3): Y as if the upper face had 100, U and V less those of the upper face."""
    low, _, _ = _points()
    which = np.concatenate([low, mesh.UPPER_SKIN])
    at = points_px[which, :2]
    extent = float(np.ptp(points_px[:, :2], axis=0).max())
    margin = 0.06 * extent
    size = (picture.width_px, picture.height_px)
    low_px = np.clip((at.min(axis=0) - margin).astype(int) // 2 * 2, 0, np.array(size) - 4)
    high_px = np.clip(-(-(at.max(axis=0) + margin).astype(int) // 2) * 2, low_px + 4, size)
    side = high_px - low_px
    small = tuple(int(max(2, round(s * _FACE_PX / extent))) for s in side)
    planes = []
    for plane, step in ((picture.y, 1), (picture.u, 2), (picture.v, 2)):
        (x0, y0), (x1, y1) = low_px // step, high_px // step
        # Of a large face every second or third pixel will do: the mean over all of them is what would cost most here.
        skip = max(1, int((x1 - x0) / (2 * small[0])))
        part = plane[y0 + skip // 2 : y1 : skip, x0 + skip // 2 : x1 : skip]
        planes.append(cv2.resize(part, small, interpolation=cv2.INTER_AREA))
    image = cv2.GaussianBlur(cv2.merge(planes), (0, 0), 1.0)
    grid = ((at - low_px) * (np.array(small) / side) - 0.5).astype(np.float32)
    seen = cv2.remap(image, grid[None, :, 0], grid[None, :, 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    found: F32 = seen[0].astype(np.float32)
    upper = np.median(found[len(low) :], axis=0)
    black = 0.0 if picture.color.full_range else 16.0
    found[:, 0] = (found[:, 0] - black) * (100 / max(float(upper[0]) - black, 8.0))
    found[:, 1:] -= upper[1:]
    return found[: len(low)]


class Appearance:
    """The running look of one person's lower face; the state of a stream."""

    def __init__(self) -> None:
        self._mean = np.zeros(0, np.float32)
        self._spread = np.zeros(0, np.float32)  # variances
        self._turn = np.zeros(2)  # yaw and pitch that the look was learned at
        self._seen = 0

    def covered(self, seen: F32, pose: Pose) -> bool:
        """Whether something is before the mouth in a picture with `seen`, of :func:`colours`; it is learned from as well.

        What does not fit is learned slowly, so that a lasting change is believed after some seconds.
        """
        turn = np.array([pose.yaw_deg, pose.pitch_deg])
        covered = self._seen >= _SETTLED and self.misfit(seen, turn) > 1
        self._seen += 1
        if self._seen == 1:
            self._mean, self._spread, self._turn = seen.copy(), np.zeros_like(seen), turn
            return False
        rate = _SLOW if covered else max(_FAST, 1 / self._seen)
        away = seen - self._mean
        held = np.minimum(away**2, (3 * np.sqrt(self._spread) + _FLOOR) ** 2)
        self._mean = self._mean + np.float32(rate) * away
        self._spread = self._spread + np.float32(rate) * (held - self._spread)
        if not covered:
            self._turn = self._turn + rate * (turn - self._turn)
        return covered

    def misfit(self, seen: F32, turn: npt.NDArray[np.float64]) -> float:
        """How little `seen` fits, 1 being too little; less is made of it while the head is turned (yaw, pitch) elsewhere."""
        _, spots, pattern = _points()
        off = np.sqrt(((seen - self._mean) ** 2 / (self._spread + _FLOOR**2)).mean(axis=1))
        worst = float((spots @ np.minimum(off, _MOST)).max()) / _WORST
        now, before = (x[pattern, 0] - x[pattern, 0].mean() for x in (seen, self._mean))
        floor = _PATTERN_FLOOR * len(pattern)
        alike = (now @ before + floor) / np.sqrt((now @ now + floor) * (before @ before + floor))
        gone = (1 - float(alike)) / _GONE
        turned = float(((turn - self._turn) ** 2).sum()) / _TURNED_DEG**2
        return max(worst, gone, (worst + gone) / _TOGETHER) / (1 + turned)
