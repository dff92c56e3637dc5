"""How mouths move: a linear basis of lower-face motion in the pose-free frame, learned from real clips."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

import numpy as np

from beavervision.media import F32
from beavervision.models.mesh import INNER_LOWER, INNER_UPPER, OUTER_CORNERS, IndexArray

# The units of motion: what is common to how people open their mouths.
GAP_STD = 0.07  # inner lip gap of an average speaker, standard deviation, in eye distances
AMPLITUDES = (0.5, 2.0)  # least and most of a person's, against that
REST_SHARE = 0.15  # of a clip's pictures, the most closed, that make its rest mouth


@dataclass(frozen=True, slots=True, eq=False)
class MotionBasis:
    """k directions in which the n points of the lower face move together.

    A coefficient of 1 is one standard deviation of that direction in ordinary speech. points (n,) are mesh indices,
    shapes (k, n, 3) displacements in the pose-free frame, solve (k, n, 3) the weights that read coefficients from displacements.
    """

    points: IndexArray
    shapes: F32
    solve: F32

    @classmethod
    def parse(cls, data: bytes) -> MotionBasis:
        """From the bytes of the shipped ``.npz``."""
        raw = np.load(BytesIO(data))
        return cls(raw["points"].astype(np.intp), raw["shapes"].astype(np.float32), raw["solve"].astype(np.float32))

    def displacement(self, coefficients: F32) -> F32:
        """Coefficients (..., k) to displacements (..., n, 3)."""
        _, *shape = self.shapes.shape
        moved = coefficients @ self.shapes.reshape(len(self.shapes), -1)
        return np.asarray(moved.reshape(*coefficients.shape[:-1], *shape), np.float32)

    def coefficients(self, displacement: F32) -> F32:
        """Displacements (..., n, 3) to coefficients (..., k): the nearest motion of the basis."""
        flat = displacement.reshape(*displacement.shape[:-2], -1)
        return np.asarray(flat @ self.solve.reshape(len(self.solve), -1).T, np.float32)

    def _row(self, above: IndexArray, below: IndexArray, axis: int) -> F32:
        where = {int(p): i for i, p in enumerate(self.points)}
        a, b = [where[int(p)] for p in above], [where[int(p)] for p in below]
        return np.asarray(self.shapes[:, b, axis] - self.shapes[:, a, axis], np.float32)

    @property
    def gap(self) -> F32:
        """(k, 9): how each coefficient opens the nine pairs of inner lip points."""
        return self._row(INNER_UPPER, INNER_LOWER, 1)

    @property
    def opening(self) -> F32:
        """(k,): how each coefficient opens the mouth, the mean of its middle five gaps."""
        return np.asarray(self.gap[:, 2:7].mean(axis=1), np.float32)

    @property
    def width(self) -> F32:
        """(k,): how each coefficient widens the mouth."""
        return np.asarray(self._row(OUTER_CORNERS[:1], OUTER_CORNERS[1:], 0)[:, 0], np.float32)

    def closing(self, face: F32) -> F32:
        """The smallest coefficients (k,) that close the lips of a pose-free face (478, 3)."""
        gaps = face[INNER_LOWER, 1] - face[INNER_UPPER, 1]
        rows = np.concatenate([self.gap.T / 0.004, np.eye(len(self.shapes), dtype=np.float32)])
        wanted = np.concatenate([-gaps / 0.004, np.zeros(len(self.shapes), np.float32)])
        return np.asarray(np.linalg.lstsq(rows, wanted, rcond=None)[0], np.float32)
