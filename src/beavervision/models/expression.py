"""How faces express: for each blendshape the way the mesh moves, learned from real clips in the pose-free frame.

What opens and closes is kept apart from what moves. A control never opens or closes lips or lids by a length: it makes a gap
larger or smaller by a factor, so that lips which speech closes stay closed, and a blink is whole for narrow and for wide eyes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from io import BytesIO

import numpy as np

from beavervision.media import BLENDSHAPES, F32, POINTS
from beavervision.models.cards import load_data
from beavervision.models.mesh import INNER_LOWER, INNER_UPPER, canonical, triangles

FILE = "expression_basis.npz"
_SPACING = 0.065  # of the samples, in eye distances


@dataclass(frozen=True, slots=True, eq=False)
class ExpressionBasis:
    """The motion of the 478 points for a control of 1, in the pose-free frame.

    moves (52, 478, 3) leave the gaps of lips and lids as they are; of the iris points they are the gaze. opens (52, 478, 3) is what
    belongs to a mouth that opens, for each eye distance that it is open already. lids (52, 2, 2) are by how much of its gap the
    upper and the lower lid (last axis, positive closes) of the picture's left and right eye move.
    """

    moves: F32
    opens: F32
    lids: F32

    def __post_init__(self) -> None:
        shape = (BLENDSHAPES, POINTS, 3)
        if self.moves.shape != shape or self.opens.shape != shape or self.lids.shape != (BLENDSHAPES, 2, 2):
            raise ValueError(f"a basis of {self.moves.shape}, {self.opens.shape}, {self.lids.shape}")

    @classmethod
    def parse(cls, data: bytes) -> ExpressionBasis:
        """From the bytes of the shipped ``.npz``, which leaves out the rows of zeros."""
        raw = np.load(BytesIO(data))
        full = {}
        for name in ("moves", "opens"):
            full[name] = np.zeros((BLENDSHAPES, POINTS, 3), np.float32)
            full[name][raw[f"{name}_of"].astype(np.intp)] = raw[name]
        return cls(full["moves"], full["opens"], raw["lids"].astype(np.float32))

    def pack(self) -> dict[str, np.ndarray]:
        """The arrays of the shipped ``.npz``."""
        packed: dict[str, np.ndarray] = {"lids": self.lids.astype(np.float16)}
        for name, shapes in (("moves", self.moves), ("opens", self.opens)):
            used = np.flatnonzero(np.abs(shapes).max(axis=(1, 2)) > 0)
            packed |= {name: shapes[used].astype(np.float16), f"{name}_of": used.astype(np.uint8)}
        return packed

    def displacement(self, controls: F32, face: F32) -> F32:
        """How the points of a pose-free `face` (478, 3) move for `controls` (52,), lids apart."""
        controls = _eased(controls)
        (used,) = controls.nonzero()
        before = face[INNER_LOWER, 1] - face[INNER_UPPER, 1]
        gap = float(before[2:7].sum()) / 5
        weights = controls[used]
        moves, opens = (shapes.take(used, axis=0).reshape(-1, 3 * POINTS) for shapes in (self.moves, self.opens))
        move = (weights @ moves).reshape(POINTS, 3)
        if gap > 0:
            move += ((weights * np.float32(gap)) @ opens).reshape(POINTS, 3)
            # Lips may meet, never cross further than they do.
            after = before + move[INNER_LOWER, 1] - move[INNER_UPPER, 1]
            over = np.maximum(np.minimum(before, 0) - after, 0) / 2
            move[INNER_LOWER, 1] += over
            move[INNER_UPPER, 1] -= over
        return np.asarray(move, np.float32)

    def closing(self, controls: F32) -> F32:
        """By how much of its gap each lid moves, (2, 2) as :attr:`lids`; no eye closes further than shut."""
        eased = _eased(controls, 7 / 15)  # an eye half shut looks like a squint
        closes = (eased @ self.lids.reshape(BLENDSHAPES, -1)).tolist()
        for upper in (0, 2):
            lids = closes[upper : upper + 2]
            total = sum(lids)
            closes[upper : upper + 2] = [lid / total if total > 1 else max(lid, -_MAX_WIDE) for lid in lids]
        return np.array(closes, np.float32).reshape(2, 2)


_MAX_WIDE = 0.7  # of its gap, how far a lid may be raised


def _eased(controls: F32, half: float = 0.5) -> F32:
    """Controls so that small ones count for more and large ones for less: 0.5 becomes `half`, and 1 two thirds."""
    return np.asarray(
        controls * (np.float32(4 * half - 2 / 3) - np.float32(4 * half - 4 / 3) * np.abs(controls)), np.float32
    )


@cache
def load_basis() -> ExpressionBasis:
    """The shipped basis.

    Raises:
        ModelError: the file is missing or damaged.
    """
    return ExpressionBasis.parse(load_data(FILE))


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Points spread evenly over the face's surface: sample i lies at ``weights[i] @ points[corners[i]]``."""

    corners: np.ndarray  # (m, 3)
    weights: F32  # (m, 3)

    def of(self, values: F32) -> F32:
        """The values (468+, k) of the mesh's points at the samples, (m, k)."""
        a, b, c = (values[self.corners[:, i]] * self.weights[:, i : i + 1] for i in range(3))
        return np.asarray(a + b + c, np.float32)


@cache
def samples() -> Samples:
    """A square lattice on the canonical face as seen from the front."""
    points = canonical()[:, :2].astype(np.float64)
    corners, weights = [], []
    for triangle in triangles():
        a, b, c = points[triangle]
        low = np.ceil(np.minimum(np.minimum(a, b), c) / _SPACING)
        high = np.floor(np.maximum(np.maximum(a, b), c) / _SPACING)
        area = (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
        if (high < low).any() or abs(area) < 1e-9:
            continue
        xs, ys = np.meshgrid(np.arange(low[0], high[0] + 1) * _SPACING, np.arange(low[1], high[1] + 1) * _SPACING)
        x, y = xs.ravel(), ys.ravel()
        wb = ((x - a[0]) * (c[1] - a[1]) - (y - a[1]) * (c[0] - a[0])) / area
        wc = ((b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0])) / area
        w = np.stack([1 - wb - wc, wb, wc], axis=1)
        w = w[(w >= -1e-9).all(axis=1)]
        corners.append(np.repeat(triangle[None], len(w), axis=0))
        weights.append(w)
    return Samples(np.concatenate(corners), np.concatenate(weights).astype(np.float32))
