"""Give the face an expression: a dense, smooth warp of the face region, on the planes, after the lips are drawn.

The points of the mesh move as the learned basis says (:mod:`beavervision.models.expression`), the head as a solid in two and a
half dimensions. The motion of samples all over the surface is laid onto a coarse grid where it arrives and made smooth there
(normalised convolution, Knutsson and Westin, 1993), so that it needs no inversion; around the face's outline it fades to
nothing. The eyes are two layers: the lids' skin, pulled over the opening, and the eyeball, which stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import ceil, cos, dist, floor, hypot, radians, sin
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from beavervision.media import F32, POINTS, U8, Clip, Picture, Region
from beavervision.models.expression import ExpressionBasis, samples
from beavervision.models.mesh import FACE_OVAL, Pose, fit_pose
from beavervision.models.warp import interpolated, places_of_cells

STILL = np.array([0, 0, 0, 0, 0, 1], np.float32)  # a head that does not move
_LEAST = 1e-4  # of a control or a head movement; less is nothing
_CELLS = 17  # of the grid, to the distance of the eyes
_SMOOTH_CELLS = 1.1
_MOVES_PX = 0.25  # cells that move less stay as they are; from twice that on they move as they should
_LEAST_FACE_PX = 4.0  # between the eyes
_AROUND = 1.0  # how much of the picture around the face is looked at, in eye distances
_ROWS = 8  # of cells, remapped together
_LEAST_GAZE_PX = 0.02
_NECK = np.array([0.0, 1.6, 1.1], np.float32)  # what the head turns about, in the pose-free frame
# How far beyond the outline, in parts of the way from its middle, the motion of the skin and that of the head reach.
_SKIN_REACH, _HEAD_REACH = 0.18, 0.3
_LEVELS = 0.06  # steps of the samples there
_BETWEEN = 3  # samples from one point of the outline to the next


class Express:
    """The express stage: does what :attr:`Clip.expression` asks for; a picture without a face or a wish passes untouched."""

    name = "express"

    def __init__(self, basis: ExpressionBasis) -> None:
        self._basis = basis

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        for clip in clips:
            yield clip if clip.expression is None or clip.track is None else self._clip(clip)

    def _clip(self, clip: Clip) -> Clip:
        assert clip.expression is not None and clip.track is not None
        pictures = list(clip.frames.pictures)
        drawn = clip.drawn or (None,) * len(clip)
        for i, (picture, face, strength, lips) in enumerate(
            zip(pictures, clip.track.faces, clip.track.strength, drawn, strict=True)
        ):
            if face is None or strength <= 0:
                continue
            points = face.points_px if lips is None else lips
            controls = clip.expression.controls[i] * strength
            head = STILL + (clip.expression.head[i] - STILL) * strength
            pictures[i] = expressed(picture, points, controls, head, self._basis)
        return replace(clip, frames=replace(clip.frames, pictures=tuple(pictures)))


def expressed(picture: Picture, points_px: F32, controls: F32, head: F32, basis: ExpressionBasis) -> Picture:
    """`picture` with the expression of the face at `points_px` (478, 3) changed; the very same one where nothing is asked for.

    Args:
        controls: (52,) offsets of the blendshapes.
        head: (6,), as in :class:`beavervision.media.Expression`.
    """
    if np.abs(controls).max() < _LEAST and np.abs(head - STILL).max() < _LEAST:
        return picture
    pose = fit_pose(points_px)
    region = Region.around(points_px, _AROUND * pose.scale_px, picture.width_px, picture.height_px)
    if region is None or pose.scale_px < _LEAST_FACE_PX:
        return picture
    face = pose.to_face(points_px)
    points = points_px[:, :2] - np.array([region.x_px, region.y_px], np.float32)
    move = basis.displacement(controls, face)
    skin_px = pose.vector_to_picture(move)[:, :2]
    head_px = _turned(face + move, head, pose) if np.abs(head - STILL).max() >= _LEAST else None
    closing = basis.closing(controls)
    eyes = [
        eye
        for side, ring in enumerate(_EYES)
        if (eye := _Eye.of(ring, points, skin_px, closing[side], pose)) is not None
    ]
    return _Warp.of(points, skin_px, head_px, pose, eyes).apply(picture, region, eyes)


def _turned(face: F32, head: F32, pose: Pose) -> F32:
    """How far the points of a pose-free face (478, 3) move in the picture with the head, (478, 2)."""
    yaw, pitch, roll = (radians(degrees) for degrees in head[:3].tolist())
    cy, sy, cp, sp, cr, sr = cos(yaw), sin(yaw), cos(pitch), sin(pitch), cos(roll), sin(roll)
    # First about the upright axis, then nodding, then in the picture's plane.
    turn = np.array(
        [
            [cr * cy + sr * sp * sy, -sr * cp, sr * sp * cy - cr * sy],
            [sr * cy - cr * sp * sy, cr * cp, -sr * sy - cr * sp * cy],
            [cp * sy, sp, cp * cy],
        ]
    )
    # Both the turn and the way into the picture are linear: one product for all points.
    to_px = (float(head[5]) * turn.T - np.eye(3)) @ pose.rotation.T[:, :2] * pose.scale_px
    width = dist(face[454].tolist(), face[234].tolist()) * pose.scale_px
    shift_px = head[3:5] * width - _NECK @ to_px
    return np.asarray(face @ to_px.astype(np.float32) + shift_px.astype(np.float32), np.float32)


def _fade(away: F32, reach: float) -> F32:
    """From 1 at the outline to 0 at `reach`, smooth at both ends."""
    t = np.clip(away / reach, 0, 1)
    return np.asarray(1 - t * t * (3 - 2 * t), np.float32)


@dataclass(frozen=True, slots=True, eq=False)
class _Surface:
    """Samples all over the face and around its outline. Each is a weighted sum of three of the points and, as the last of these
    (479), the middle of the outline."""

    corners: npt.NDArray[np.intp]  # (3, m)
    at: F32  # (3, m), the weights for its place,
    skin: F32  # for how far it moves with the skin,
    head: F32  # and with the head

    @classmethod
    def of(cls, reach: float) -> _Surface:
        """As far beyond the outline as `reach`."""
        lattice = samples()
        away = np.arange(1, round(reach / _LEVELS) + 2, dtype=np.float32)[:, None] * np.float32(_LEVELS)
        part = np.tile(np.arange(_BETWEEN, dtype=np.float32) / _BETWEEN, len(FACE_OVAL))  # from one point to the next
        ring = [np.repeat(FACE_OVAL, _BETWEEN), np.repeat(np.roll(FACE_OVAL, -1), _BETWEEN), np.full(len(part), POINTS)]

        def weights(*of_each: npt.NDArray[np.floating]) -> F32:
            outside = np.stack(np.broadcast_arrays(*of_each)).reshape(3, -1)
            return np.concatenate([lattice.weights.T, outside], axis=1).astype(np.float32)

        corners = np.concatenate([lattice.corners.T, np.tile(ring, len(away))], axis=1)
        skin, head = _fade(away, _SKIN_REACH), _fade(away, _HEAD_REACH)
        none = np.zeros_like(away)
        return cls(
            np.ascontiguousarray(corners),
            weights((1 + away) * (1 - part), (1 + away) * part, -away),
            weights(skin * (1 - part), skin * part, none),
            weights(head * (1 - part), head * part, none),
        )


_surface = cache(_Surface.of)


class _Warp:
    """For each pixel of a rectangle, which may reach beyond the region around the face, where in the region it comes from."""

    __slots__ = ("_from", "_grid", "_half", "_high", "_low", "_moves", "_step", "_x", "_y")

    def __init__(self, x: int, y: int, step: int, grid: F32) -> None:
        """`grid` (2, rows, columns): how far away each cell of `step` pixels finds its own."""
        self._x, self._y, self._step = x, y, step
        size = np.maximum(*np.abs(grid))
        self._moves = (size > _MOVES_PX).view(np.uint8)
        self._grid = grid * _unit((size - np.float32(_MOVES_PX)) * np.float32(1 / _MOVES_PX))
        self._from = places_of_cells(np.asarray(cv2.merge([*self._grid]), np.float32), step, x, y)
        self._half = _halved(self._from)
        self._low, self._high = self._from[..., 1].min(axis=1).tolist(), self._from[..., 1].max(axis=1).tolist()

    @classmethod
    def of(cls, points: F32, skin: F32, head: F32 | None, pose: Pose, eyes: list[_Eye]) -> _Warp:
        """From the points (478, 2) and how far they move with the skin and with the head, in pixels."""
        surface = _surface(_SKIN_REACH if head is None else _HEAD_REACH)
        values = np.concatenate([points, skin] if head is None else [points, skin, head], axis=1).T
        middle = values.take(FACE_OVAL, axis=1).sum(axis=1, keepdims=True) / np.float32(len(FACE_OVAL))
        values = np.concatenate([values, middle], axis=1).take(surface.corners, axis=1)
        move = np.einsum("kcm,cm->km", values[2:4], surface.skin)
        if head is not None:
            move += np.einsum("kcm,cm->km", values[4:], surface.head)
        target = np.einsum("kcm,cm->km", values[:2], surface.at) + move
        step = max(1, round(pose.scale_px / _CELLS / 2)) * 2  # even: chroma samples are whole
        moving = target.take(np.flatnonzero(np.maximum(*np.abs(move)) > _MOVES_PX), axis=1)
        boxes = [np.reshape(eye.box(eye.middle), (2, 2)).T for eye in eyes]
        reached = np.concatenate([moving if eyes or moving.size else target[:, :1], *boxes], axis=1)
        (x, right), (y, bottom) = ((floor(a.min() / step) - 3, ceil(a.max() / step) + 3) for a in reached)
        at = target * np.float32(1 / step) - np.array([[x], [y]], np.float32)
        return cls(x * step, y * step, step, _splat(at, -move, right - x, bottom - y))

    def apply(self, picture: Picture, region: Region, eyes: list[_Eye]) -> Picture:
        drawn = self._moves.copy()
        patches: list[_Patch] = []
        layers: list[tuple[int, int, _Layer]] = []
        for eye in eyes:
            x, y, right, bottom = box = self._held(_in_twos(eye.box(self._moved_at(eye.middle))), region)
            drawn[self._cells(box)] = 1
            patch = self._patch((x, y, x + (right - x) // 4 * 4, y + (bottom - y) // 4 * 4))
            if patch is not None:
                where = patch.where.copy()
                layers += [(x + layer.x, y + layer.y, layer) for layer in eye.place(where)]
                patches.append(_Patch(x, y, where, _shrunk(where), *_rows(where)))
        planes = _Planes(picture, region)
        step = self._step
        for row, first, last in _strips(drawn):
            left, top = self._x + first * step, self._y + row * step
            strip = self._patch(self._held((left, top, self._x + last * step, top + _ROWS * step), region))
            if strip is not None:
                for patch in patches:
                    strip.put(patch)
                planes.draw(strip)
        for x, y, layer in layers:
            planes.mix(x, y, layer.where, layer.alpha)
        return replace(picture, y=planes.new[0], u=planes.new[1], v=planes.new[2])

    def _held(self, box: _Box, region: Region) -> _Box:
        """A box, all even, as far as it lies within the grid and the region."""
        rows, columns = self._moves.shape
        x, y = max(box[0], self._x, 0), max(box[1], self._y, 0)
        right = min(box[2], self._x + columns * self._step, region.width_px)
        bottom = min(box[3], self._y + rows * self._step, region.height_px)
        return x, y, max(right, x), max(bottom, y)

    def _cells(self, box: _Box) -> _Cut:
        """Those that hold a box."""
        x, y, right, bottom = box[0] - self._x, box[1] - self._y, box[2] - self._x, box[3] - self._y
        step = self._step
        return slice(y // step, -(-bottom // step)), slice(x // step, -(-right // step))

    def _patch(self, box: _Box) -> _Patch | None:
        """A box as the grid moves it; None if it is empty."""
        x, y, right, bottom = box
        if right == x or bottom == y:
            return None
        rows, columns = self._cells(box)
        cells = slice(rows.start, rows.stop + 2), slice(columns.start, columns.stop + 2)
        where, half = interpolated(self._from[cells], self._step), interpolated(self._half[cells], self._step // 2)
        left, top = x - self._x - columns.start * self._step, y - self._y - rows.start * self._step
        right, bottom = left + right - x, top + bottom - y
        return _Patch(
            x, y, where[top:bottom, left:right], half[top // 2 : bottom // 2, left // 2 : right // 2],
            min(self._low[cells[0]]), max(self._high[cells[0]]),
        )  # fmt: skip

    def _moved_at(self, place: F32) -> F32:
        """Where what lies at `place` of the region is drawn, nearly."""
        _, rows, columns = self._grid.shape
        x, y = place.tolist()
        column = min(max(int((x - self._x) / self._step), 0), columns - 1)
        row = min(max(int((y - self._y) / self._step), 0), rows - 1)
        return np.asarray(place - self._grid[:, row, column], np.float32)


_Box = tuple[int, int, int, int]  # x, y, x end, y end, in pixels


def _in_twos(box: tuple[float, float, float, float]) -> _Box:
    """A box (x, y, x end, y end), grown to even pixels."""
    x, y, right, bottom = box
    return floor(x / 2) * 2, floor(y / 2) * 2, ceil(right / 2) * 2, ceil(bottom / 2) * 2


def _strips(drawn: U8) -> Iterator[tuple[int, int, int]]:
    """The first row of each strip of a grid in which something is set, and from and to which column it is."""
    strips = np.maximum.reduceat(drawn, range(0, len(drawn), _ROWS), axis=0)
    first, after = strips.argmax(axis=1), strips.shape[1] - strips[:, ::-1].argmax(axis=1)
    for strip in np.flatnonzero(strips.any(axis=1)).tolist():
        yield strip * _ROWS, int(first[strip]), int(after[strip])


@dataclass(slots=True, eq=False)
class _Patch:
    """A box to be drawn: its corner in the region, where its pixels (h, w, 2) and its chroma samples (h / 2, w / 2, 2) come from,
    and the first and the last row of that."""

    x: int
    y: int
    where: F32
    half: F32
    low: float
    high: float

    def put(self, part: _Patch) -> None:
        """Let what lies under `part`, which is no wider, come from where that does."""
        top, bottom = max(part.y, self.y), min(part.y + len(part.where), self.y + len(self.where))
        if top < bottom:
            for where, new, by in ((self.where, part.where, 1), (self.half, part.half, 2)):
                x = (part.x - self.x) // by
                rows, from_rows = (slice((top - y) // by, (bottom - y) // by) for y in (self.y, part.y))
                where[rows, x : x + new.shape[1]] = new[from_rows]
            self.low, self.high = min(self.low, part.low), max(self.high, part.high)


def _rows(where: F32) -> tuple[float, float]:
    """The first and the last row of places (h, w, 2)."""
    low, high, *_ = cv2.minMaxLoc(cv2.extractChannel(where, 1))
    return low, high


class _Planes:
    """The planes of a picture and, of a region, what is drawn from and drawn to. Luma is interpolated in floats, which is faster;
    rows become floats shortly before they are read, while they are near."""

    __slots__ = ("_chroma", "_float", "_held", "_luma", "_to", "new")

    def __init__(self, picture: Picture, region: Region) -> None:
        luma, chroma = region.slices
        self.new = (picture.y.copy(), picture.u.copy(), picture.v.copy())
        self._to = (self.new[0][luma], self.new[1][chroma], self.new[2][chroma])
        self._luma, *self._chroma = picture.planes(region)
        self._float = np.empty(self._luma.shape, np.float32)
        self._held: tuple[int, int] | None = None  # from and to which row it is filled

    def draw(self, patch: _Patch) -> None:
        luma, *chroma = self._under(patch.x, patch.y, patch.where)
        cv2.convertScaleAbs(self._cubic(patch.where, patch.low, patch.high), luma)
        for plane, to in zip(self._chroma, chroma, strict=True):
            _remap(plane, patch.half, cv2.INTER_LINEAR, to)

    def mix(self, x: int, y: int, where: F32, alpha: F32) -> None:
        """Draw what comes from `where` (h, w, 2) at (x, y), as much of it as `alpha` (h, w) says."""
        luma, *chroma = self._under(x, y, where)
        cv2.blendLinear(cv2.convertScaleAbs(self._cubic(where, *_rows(where))), luma, alpha, 1 - alpha, luma)
        half = _shrunk(where)
        alpha = np.asarray(cv2.resize(alpha, half.shape[1::-1], interpolation=cv2.INTER_AREA), np.float32)
        for plane, to in zip(self._chroma, chroma, strict=True):
            cv2.blendLinear(_remap(plane, half, cv2.INTER_LINEAR), to, alpha, 1 - alpha, to)

    def _cubic(self, where: F32, low: float, high: float) -> F32:
        """The luma at places (h, w, 2), from row `low` to `high`."""
        rows = len(self._luma)
        # Two rows to either side, and one more where a place is rounded up.
        first, end = min(max(floor(low) - 1, 0), rows - 1), min(max(floor(high) + 4, 1), rows)
        start, stop = (first, first) if self._held is None else self._held
        for part in (slice(first, start), slice(stop, end)):
            self._float[part] = self._luma[part]
        self._held = min(first, start), max(end, stop)
        luma = _remap(self._float, where, cv2.INTER_CUBIC)
        cv2.threshold(luma, 0, 0, cv2.THRESH_TOZERO, luma)  # what cubic interpolation left below black
        return luma

    def _under(self, x: int, y: int, where: F32) -> tuple[U8, U8, U8]:
        """The parts of the new planes for the places (h, w, 2) of a box with its corner at (x, y)."""
        bottom, right = y + where.shape[0], x + where.shape[1]
        luma, u, v = self._to
        half = slice(y // 2, bottom // 2), slice(x // 2, right // 2)
        return luma[y:bottom, x:right], u[half], v[half]


def _halved(where: F32) -> F32:
    """Places in the chroma planes, given places in luma's."""
    return where * np.float32(0.5) - np.float32(0.25)


def _shrunk(where: F32) -> F32:
    """Where chroma samples come from, given where the pixels do, an even number of them."""
    size = where.shape[1] // 2, where.shape[0] // 2
    return _halved(np.asarray(cv2.resize(where, size, interpolation=cv2.INTER_AREA), np.float32))


def _remap(plane: npt.NDArray[Any], where: F32, how: int, to: U8 | None = None) -> npt.NDArray[Any]:
    """Onto `to` where it is given."""
    made: npt.NDArray[Any] = cv2.remap(plane, where, None, how, to, cv2.BORDER_REPLICATE)  # type: ignore[call-overload]
    return made


def _splat(at: F32, values: F32, width: int, height: int) -> F32:
    """Values (2, m) at places (2, m), in cells, onto a grid (2, height, width): smooth, and 0 far from all of them."""
    x, y = at = np.subtract(at, 0.5, dtype=np.float64)  # what is counted with is
    inside = np.flatnonzero((x >= 0) & (y >= 0) & (x < width - 1) & (y < height - 1))
    at, values = at.take(inside, axis=1), values.take(inside, axis=1)
    cell = at.astype(np.intp)
    to_x, to_y = at - cell
    from_x, from_y = 1 - to_x, 1 - to_y
    index = (cell[1] * width + cell[0] + np.array([[0], [1], [width], [width + 1]])).ravel()
    share = np.stack([from_x * from_y, to_x * from_y, from_x * to_y, to_x * to_y])

    def smooth(weights: F32) -> F32:
        grid = np.bincount(index, weights.ravel(), minlength=width * height).astype(np.float32).reshape(height, width)
        return np.asarray(cv2.GaussianBlur(grid, (7, 7), _SMOOTH_CELLS, borderType=cv2.BORDER_CONSTANT), np.float32)

    return np.stack([smooth(share * value) for value in values]) / (smooth(share) + np.float32(0.01))


# Eyes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Ring:
    """The points of one eye: from the corner at the picture's left to the other, over the upper and over the lower lid."""

    upper: npt.NDArray[np.intp]
    lower: npt.NDArray[np.intp]
    brow: npt.NDArray[np.intp]  # three of its lower edge
    iris: npt.NDArray[np.intp]  # the middle, then four points of its rim
    all: npt.NDArray[np.intp]  # one after the other


def _ring(upper: tuple[int, ...], lower: tuple[int, ...], brow: tuple[int, ...], iris: int) -> _Ring:
    parts = np.array(upper), np.array(lower), np.array(brow), np.arange(iris, iris + 5)
    return _Ring(*parts, np.concatenate(parts))


_EYES = (
    _ring((33, 246, 161, 160, 159, 158, 157, 173, 133), (33, 7, 163, 144, 145, 153, 154, 155, 133), (53, 52, 65), 468),
    _ring((362, 398, 384, 385, 386, 387, 388, 466, 263), (362, 382, 381, 380, 374, 373, 390, 249, 263), (295, 282, 283), 473),
)  # fmt: skip
_NO_LIDS = 3 + 5  # points of a ring that are those of brow and iris
_MARGIN = 0.018  # of the lid that the opening shows, lashes and all, in eye distances: it moves with the lid
_LASH = 0.08  # how far above the opening lashes reach, in eye distances,
_LASH_SHARE = 0.6  # and at most, of the skin that moves
_SHADE = 0.045  # how far the upper lid shades the eyeball, in eye distances: what is bared is not taken from there
_REACH = 0.6  # of the way from the upper lid to the brow, how far its skin moves: a crease higher up, or a frame of glasses, stays
_BARES_PX = 1.0  # how far a lid must be drawn back for what it bares to be made up
_FINE_PX = 64.0  # eyes shorter than that have the lids' curves in every pixel, others in every fourth
_MEETS = 0.5  # of the gap, from where on the lids may meet
_PARTS = 256  # of an eye's length, for each of which the lids' heights are told
_PART = np.linspace(0, 1, _PARTS + 1)
_BELOW = 0.24  # how far below the lower lid its skin moves, in eye distances


@dataclass(frozen=True, slots=True, eq=False)
class _Eye:
    """How one eye opens or closes, in its own frame: x from corner to corner, 0 to 1; y down in pixels."""

    corner: F32  # (2,)
    across: F32  # (2,), of length 1, from corner to corner
    down: F32  # (2,), of length 1
    span_px: float  # from corner to corner
    lids: F32  # (2, 2, 9): of the upper and the lower lid, x rising and y
    close_upper: float  # of the gap
    close_lower: float
    above_px: float  # from the upper lid to the brow
    scale_px: float
    iris: F32  # (2,), its middle in the picture
    radius_px: float
    gaze_px: F32  # (2,)
    reach_px: tuple[float, float, float]  # how far from its middle it moves the skin: to the sides, up and down

    @classmethod
    def of(cls, ring: _Ring, points: F32, skin: F32, closing: F32, pose: Pose) -> _Eye | None:
        """None where the eye has nothing to do."""
        corner, other = points[ring.upper[0]], points[ring.upper[-1]]
        (x, y), gaze = (other - corner).tolist(), skin[ring.iris[0]]
        span = hypot(x, y)
        if (np.abs(closing).max() < _LEAST and np.abs(gaze).max() < _LEAST_GAZE_PX) or span < _LEAST_FACE_PX:
            return None
        across, down = frame = np.array([[x, y], [-y, x]], np.float32) / np.float32(span)
        local = (points[ring.all] - corner) @ (frame.T * np.array([1 / span, 1], np.float32))
        lids = local[:-_NO_LIDS].reshape(2, -1, 2).transpose(0, 2, 1).copy()
        np.maximum.accumulate(lids[:, 0], axis=1, out=lids[:, 0])
        # The skin moves up to so far above the lid as it will be.
        (at, upper), (at_lower, lower) = lids
        fall = np.maximum(np.interp(at, at_lower, lower) - upper, 0) * closing[0]
        above = float(upper[3:6].sum() - local[-_NO_LIDS:-5, 1].sum()) / 3
        above = max(_REACH * above, 0.12 * pose.scale_px)
        up = above + max(0.26 * span, float(max(fall.max(), 0.0) - (upper + fall).min()) + 2)
        rim = points[ring.iris] - points[ring.iris[0]]
        return cls(
            corner, across, down, span, lids, float(closing[0]), float(closing[1]), above, pose.scale_px,
            points[ring.iris[0]], float(np.hypot(rim[1:, 0], rim[1:, 1]).sum()) / 4, gaze,
            (0.53 * span + 2, up, _BELOW * pose.scale_px + 0.2 * span),
        )  # fmt: skip

    @property
    def middle(self) -> F32:
        return np.asarray(self.corner + self.across * np.float32(self.span_px / 2), np.float32)

    def box(self, middle: F32) -> tuple[float, float, float, float]:
        """What the eye moves if it is drawn around `middle`: x, y, x end, y end."""
        (x, y), (side, up, low) = middle.tolist(), self.reach_px
        return x - side, y - up, x + side, y + low

    def place(self, source: F32) -> tuple[_Layer, ...]:
        """Let the lids' skin come from where the lids are.

        Args:
            source: (h, w, 2), both in fours, places in the region as it is, so that all is found in the eye's own frame there;
                changed.

        Returns:
            The line along which shut lids meet, and the eyeball, to be drawn over it.
        """
        y, fall, rise, seam, widest = self._lids(source)
        margin = np.float32(_MARGIN * self.scale_px)
        most = max(widest * self.close_upper, 1e-3)
        # The lashes go along as they are and what is above them is stretched, evenly: their dark line would cover the whole lid.
        lash = np.float32(min(_LASH * self.scale_px, _LASH_SHARE * self.above_px))
        above = fall * -_unit((y + lash) * np.float32(1 / (self.above_px - lash + most)) + 1)
        below = rise * _unit((seam - y) * np.float32(1 / (_BELOW * self.scale_px)) + 1)
        upper = y < seam
        alpha = _unit(np.minimum(y - margin, seam - y) + np.float32(0.5))
        meets = self.close_upper + self.close_lower > _MEETS
        if meets:  # they may be less than a pixel apart
            alpha = np.minimum(alpha, _unit(seam - margin))
        over, under = (self._shaded_px(-widest * closes) for closes in (self.close_upper, self.close_lower))
        shown = _within(alpha > 0)
        layers: tuple[_Layer, ...] = ()
        if shown is not None:
            layers = (_Layer.of(shown, self._looking(source[shown].copy(), y[shown], seam[shown]), alpha[shown]),)
            if over or under:
                # What lies above the upper lid as it is or in its shade, and below the lower one.
                hidden = (y + fall < over) | (seam - y + rise < under)
                layers = self._bared(layers[0], hidden[shown], over, under)
        if meets:
            # Where the lids meet, the pixels that both of them cover show both.
            both = _unit(np.minimum(np.float32(0.5) - np.abs(y - seam), np.float32(1) + margin - seam))
            met = _within(both > 0)
            if met is not None:
                other = np.where(upper[met], below[met], above[met])[..., None] * self.down
                layers = (_Layer.of(met, np.asarray(source[met] + other, np.float32), both[met]), *layers)
        skin = cv2.copyTo(above, upper.view(np.uint8), below)
        source[..., 0] += skin * self.down[0]
        source[..., 1] += skin * self.down[1]
        return layers

    def _lids(self, source: F32) -> tuple[F32, F32, F32, F32, float]:
        """For places (h, w, 2), all (h, w): y against the new upper lid, how far the lids move towards each other, and where the
        lower one's skin begins; and the widest gap. h and w are multiples of four: in large eyes the lids' curves are interpolated
        between every fourth pixel."""
        small = self.span_px < _FINE_PX
        coarse = source if small else (source[1::4, 1::4] + source[2::4, 2::4]) * np.float32(0.5)
        coarse = coarse - (self.corner - np.float32(0.5))
        x = coarse @ (self.across / np.float32(self.span_px))
        upper, lower = (np.interp(x, lid[0], lid[1], left=0.0, right=0.0).astype(np.float32) for lid in self.lids)
        gap = np.maximum(lower - upper, 0)
        fall, rise = gap * np.float32(self.close_upper), gap * np.float32(self.close_lower)
        margin = np.minimum(gap * np.float32(0.25), np.float32(_MARGIN * self.scale_px))
        seam = np.maximum(gap - fall - rise - margin * np.float32(0.5), margin)
        y = np.asarray(coarse @ self.down - upper - fall, np.float32)
        widest = float(gap.max())
        if not small:
            size = source.shape[1::-1]
            y, fall, rise, seam = (
                np.asarray(cv2.resize(plane, size, interpolation=cv2.INTER_LINEAR), np.float32)
                for plane in (y, fall, rise, seam)
            )
        return y, fall, rise, seam, widest

    def _looking(self, source: F32, y: F32, room: F32) -> F32:
        """Places (h, w, 2) of the eyeball, drawn along by the gaze (in place)."""
        if np.abs(self.gaze_px).max() < _LEAST_GAZE_PX:
            return source
        part = y / np.maximum(room, np.float32(1e-3))
        x, y = self.iris + self.gaze_px - np.float32(0.5)
        far = np.hypot(source[..., 0] - x, source[..., 1] - y) * np.float32(1 / max(self.radius_px, 1.0))
        near = _unit((np.float32(2.6) - far) / np.float32(1.6)) * _unit(5 * np.minimum(part, 1 - part))
        source[..., 0] -= near * self.gaze_px[0]
        source[..., 1] -= near * self.gaze_px[1]
        return source

    def _shaded_px(self, opens_px: float) -> np.float32:
        """How much of what is seen a lid shades that is drawn back so far; 0 for one that bares nothing."""
        return np.float32(min(_SHADE * self.scale_px, opens_px) if opens_px > _BARES_PX else 0)

    def _bared(
        self, ball: _Layer, hidden: npt.NDArray[np.bool_], over: np.float32, under: np.float32
    ) -> tuple[_Layer, ...]:
        """Where to take what an eye that opens further shows and never showed: iris and white are the same all around the pupil, so
        it lies as far from it, at the edge of what is seen.

        Args:
            ball: the eyeball as it is.
            hidden: (h, w) which of its pixels lie under the lids, or in their shade.
            over, under: how many pixels of what is seen the upper and the lower lid shade.

        Returns:
            The eyeball with what is hidden taken from the left of the iris and, to be mixed in, what comes from the right.
        """
        bared = _within(hidden)
        if bared is None:
            return (ball,)
        hidden, source = np.ascontiguousarray(hidden[bared]), ball.where[bared]
        origin = self.corner - np.float32(0.5)
        at_x, at_y = source[..., 0] - origin[0], source[..., 1] - origin[1]
        x = at_x * self.across[0] + at_y * self.across[1]
        y = at_x * self.down[0] + at_y * self.down[1]
        iris = self.iris - self.corner
        cx, cy = np.float32(iris @ self.across), np.float32(iris @ self.down)
        upper, lower = (np.interp(_PART, *lid).astype(np.float32) for lid in self.lids)
        middle = (upper + lower) * np.float32(0.5)
        top, low = np.minimum(upper + over, middle), np.maximum(lower - np.float32(0.6) * under, middle)
        to_part = np.float32(_PARTS / self.span_px)
        # How high a circle around the pupil meets the lid; the lids are nearly level there.
        at = min(max(int(cx * to_part), 0), _PARTS)
        dx, dy = x - cx, y - cy
        level = np.where(dy < 0, top[at] - cy, low[at] - cy)
        reach = np.sqrt(np.maximum(dx * dx + dy * dy - level * level, 0))
        radius = np.float32(max(self.radius_px, 1.0))
        aside = _unit(np.abs(dx) / radius - 1)  # far from the iris all is white, and there is no further
        to = np.stack([cx - reach, cx + reach]).clip(np.float32(0.1 * self.span_px), np.float32(0.9 * self.span_px))
        to += (x - to) * aside
        index = (to * to_part).astype(np.intp)
        height = np.minimum(np.maximum(y, top.take(index, mode="clip")), low.take(index, mode="clip"))
        new_x, new_y = (origin[axis] + to * self.across[axis] + height * self.down[axis] for axis in (0, 1))
        where, right = ball.where.copy(), source.copy()
        for places, axes in zip((where[bared], right), zip(new_x, new_y, strict=True), strict=True):
            cv2.copyTo(cv2.merge(axes), hidden.view(np.uint8), places)
        share = _unit(dx / radius + np.float32(0.5))
        share = ball.alpha[bared] * share * share * (3 - 2 * share)
        rows, columns = bared
        return replace(ball, where=where), _Layer(ball.x + columns.start, ball.y + rows.start, right, share)


_Cut = tuple[slice, slice]


def _within(mask: npt.NDArray[np.bool_]) -> _Cut | None:
    """Rows and columns, from and to even ones, around what is set; None where nothing is."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    if not width:
        return None
    return slice(y // 2 * 2, -(-(y + height) // 2) * 2), slice(x // 2 * 2, -(-(x + width) // 2) * 2)


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """What is drawn over an eye: its place in the eye's box, where it comes from, and how much of it shows."""

    x: int
    y: int
    where: F32
    alpha: F32

    @classmethod
    def of(cls, cut: _Cut, where: F32, alpha: F32) -> _Layer:
        """Of a cut out of the eye's box."""
        return cls(cut[1].start, cut[0].start, where, alpha)


def _unit(values: F32) -> F32:
    return values.clip(0, 1)
