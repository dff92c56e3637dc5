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
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from beavervision.media import F32, U8, Clip, Picture, Region
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
    yaw, pitch, roll = np.radians(head[:3].astype(np.float64))
    cy, sy, cp, sp, cr, sr = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch), np.cos(roll), np.sin(roll)
    turn = (
        np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        @ np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
        @ np.array([[cy, 0, -sy], [0, 1, 0], [sy, 0, cy]])
    )
    moved = (face - _NECK) @ (float(head[5]) * turn.T).astype(np.float32) + _NECK - face
    width = float(np.linalg.norm(face[454] - face[234])) * pose.scale_px
    return np.asarray(pose.vector_to_picture(moved)[:, :2] + head[3:5] * width, np.float32)


@cache
def _outline() -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], F32]:
    """Samples along the face's outline: between which two points each lies, and how near to the second."""
    after = np.roll(FACE_OVAL, -1)
    part = np.tile(np.arange(_BETWEEN, dtype=np.float32) / _BETWEEN, len(FACE_OVAL))[:, None]
    return np.repeat(FACE_OVAL, _BETWEEN), np.repeat(after, _BETWEEN), part.astype(np.float32)


def _fade(away: F32, reach: float) -> F32:
    """From 1 at the outline to 0 at `reach`, smooth at both ends."""
    t = np.clip(away / reach, 0, 1)
    return np.asarray(1 - t * t * (3 - 2 * t), np.float32)


class _Warp:
    """For each pixel of a rectangle, which may reach beyond the region around the face, where in the region it comes from."""

    __slots__ = ("_from", "_grid", "_moves", "_step", "_x", "_y")

    def __init__(self, x: int, y: int, step: int, grid: F32) -> None:
        """`grid` (rows, columns, 2): how far away each cell of `step` pixels finds its own."""
        self._x, self._y, self._step = x, y, step
        size = np.maximum(np.abs(grid[..., 0]), np.abs(grid[..., 1]))
        self._moves = (size > _MOVES_PX).astype(np.uint8)
        self._grid = grid * _unit((size - np.float32(_MOVES_PX)) * np.float32(1 / _MOVES_PX))[..., None]
        self._from = places_of_cells(self._grid, step, x, y)

    @classmethod
    def of(cls, points: F32, skin: F32, head: F32 | None, pose: Pose, eyes: list[_Eye]) -> _Warp:
        """From the points (478, 2) and how far they move with the skin and with the head, in pixels."""
        lattice = samples()
        every = skin if head is None else skin + head
        first, second, part = _outline()
        ring = np.concatenate([points, skin, every - skin], axis=1)
        ring = ring[first] * (1 - part) + ring[second] * part
        reach = _SKIN_REACH if head is None else _HEAD_REACH
        away = np.arange(1, round(reach / _LEVELS) + 2, dtype=np.float32)[:, None, None] * np.float32(_LEVELS)
        outside = ring[:, :2] + (ring[:, :2] - points[FACE_OVAL].mean(axis=0)) * away
        moved = ring[:, 2:4] * _fade(away, _SKIN_REACH) + ring[:, 4:] * _fade(away, _HEAD_REACH)
        inside = lattice.of(np.concatenate([points, every], axis=1))
        move = np.concatenate([inside[:, 2:], moved.reshape(-1, 2)])
        target = np.concatenate([inside[:, :2], outside.reshape(-1, 2)]) + move
        step = max(1, round(pose.scale_px / _CELLS / 2)) * 2  # even: chroma samples are whole
        moving = target[np.maximum(np.abs(move[:, 0]), np.abs(move[:, 1])) > _MOVES_PX]
        reached = np.concatenate(
            [moving if eyes or len(moving) else target[:1], *(eye.box(eye.middle).reshape(2, 2) for eye in eyes)]
        )
        lowest, highest = (np.array([f(reached[:, 0]), f(reached[:, 1])]) / step for f in (np.min, np.max))
        low = np.floor(lowest).astype(int) - 3
        size = np.ceil(highest).astype(int) + 3 - low
        grid = _splat(target * np.float32(1 / step) - low.astype(np.float32), -move, int(size[0]), int(size[1]))
        return cls(int(low[0]) * step, int(low[1]) * step, step, grid)

    def apply(self, picture: Picture, region: Region, eyes: list[_Eye]) -> Picture:
        drawn = self._moves.copy()
        moved: list[tuple[int, int, F32]] = []
        layers: list[tuple[int, int, _Layer]] = []
        for eye in eyes:
            x, y, right, bottom = box = self._held(_in_twos(eye.box(self._moved_at(eye.middle))), region)
            drawn[self._cells(box)] = 1
            where = self._places((x, y, x + (right - x) // 4 * 4, y + (bottom - y) // 4 * 4)).copy()
            if where.size:
                layers += [(x + layer.x, y + layer.y, layer) for layer in eye.place(where)]
                moved.append((x, y, where))
        planes = _Planes.of(picture, region)
        step = self._step
        for row in range(0, len(drawn), _ROWS):
            used = np.flatnonzero(drawn[row : row + _ROWS].max(axis=0))
            if used.size:
                left, top = self._x + int(used[0]) * step, self._y + row * step
                box = self._held((left, top, self._x + (int(used[-1]) + 1) * step, top + _ROWS * step), region)
                where = self._places(box)
                for x, y, eye_where in moved:
                    _paste(eye_where, where, x - box[0], y - box[1])
                planes.draw(*box[:2], where)
        for x, y, layer in layers:
            planes.draw(x, y, layer.where, layer.alpha)
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

    def _places(self, box: _Box) -> F32:
        """Where the pixels (h, w, 2) of a box come from."""
        x, y, right, bottom = box
        if right == x or bottom == y:
            return np.zeros((0, 0, 2), np.float32)
        rows, columns = self._cells(box)
        where = interpolated(self._from[rows.start : rows.stop + 2, columns.start : columns.stop + 2], self._step)
        left, top = self._x + columns.start * self._step, self._y + rows.start * self._step
        return where[y - top : bottom - top, x - left : right - left]

    def _moved_at(self, place: F32) -> F32:
        """Where what lies at `place` of the region is drawn, nearly."""
        cell = np.clip(
            ((place - [self._x, self._y]) / self._step).astype(int), 0, np.array(self._moves.shape[::-1]) - 1
        )
        return np.asarray(place - self._grid[cell[1], cell[0]], np.float32)


_Box = tuple[int, int, int, int]  # x, y, x end, y end, in pixels


def _in_twos(box: F32) -> _Box:
    """A box (x, y, x end, y end), grown to even pixels."""
    x, y = (int(np.floor(v / 2)) * 2 for v in box[:2])
    right, bottom = (int(np.ceil(v / 2)) * 2 for v in box[2:])
    return x, y, right, bottom


def _paste(part: F32, onto: F32, x: int, y: int) -> None:
    """Write `part` over what of `onto` lies under it, its corner at (x, y) there; in x it lies within."""
    top, bottom = max(y, 0), min(y + part.shape[0], onto.shape[0])
    if top < bottom:
        onto[top:bottom, x : x + part.shape[1]] = part[top - y : bottom - y]


@dataclass(frozen=True, slots=True, eq=False)
class _Planes:
    """The planes of a picture and, of a region, what is drawn from and drawn to. Luma is interpolated in floats: that is faster."""

    new: tuple[U8, U8, U8]
    luma: F32  # (h, w), as it was
    chroma: tuple[U8, U8]  # (h / 2, w / 2)
    to: tuple[U8, U8, U8]  # views of `new`

    @classmethod
    def of(cls, picture: Picture, region: Region) -> _Planes:
        luma, u, v = picture.planes(region)
        new = (picture.y.copy(), picture.u.copy(), picture.v.copy())
        rows, columns = region.slices
        return cls(new, luma.astype(np.float32), (u, v), (new[0][rows], new[1][columns], new[2][columns]))

    def draw(self, x: int, y: int, where: F32, alpha: F32 | None = None) -> None:
        """Draw what comes from `where` with its corner at (x, y), all even; `alpha` mixes it in."""
        if not where.size:
            return
        rows, columns = where.shape[:2]
        to = self.to[0][y : y + rows, x : x + columns]
        luma = _remap(self.luma, where, cv2.INTER_CUBIC)
        cv2.threshold(luma, 0, 0, cv2.THRESH_TOZERO, luma)  # what cubic interpolation left below black
        cv2.convertScaleAbs(luma if alpha is None else _mixed(to, luma, alpha), to)
        half = _halved(where)
        part = None if alpha is None else cv2.resize(alpha, half.shape[1::-1], interpolation=cv2.INTER_AREA)
        for plane, new in zip(self.chroma, self.to[1:], strict=True):
            to = new[y // 2 : (y + rows) // 2, x // 2 : (x + columns) // 2]
            if part is None:
                _remap(plane, half, cv2.INTER_LINEAR, to)
            else:
                cv2.convertScaleAbs(_mixed(to, _remap(plane, half, cv2.INTER_LINEAR), part), to)


def _mixed(to: U8, new: npt.NDArray[Any], alpha: npt.NDArray[Any]) -> F32:
    return np.asarray(to + np.subtract(new, to, dtype=np.float32) * alpha, np.float32)


def _halved(where: F32) -> F32:
    """Where chroma samples come from, given where the pixels do, an even number of them."""
    # Chroma sample i covers pixels 2i and 2i + 1; from one to the next the offset changes by less than chroma shows.
    half = cv2.resize(where, (where.shape[1] // 2, where.shape[0] // 2), interpolation=cv2.INTER_NEAREST)
    return np.multiply(half, np.float32(0.5), out=half)


def _remap(plane: npt.NDArray[Any], where: F32, how: int, to: U8 | None = None) -> npt.NDArray[Any]:
    """Onto `to` where it is given."""
    made: npt.NDArray[Any] = cv2.remap(plane, where, None, how, to, cv2.BORDER_REPLICATE)  # type: ignore[call-overload]
    return made


def _splat(at: F32, values: F32, width: int, height: int) -> F32:
    """Values (m, 2) at places (m, 2), in cells, onto a grid (height, width, 2): smooth, and 0 far from all of them."""
    x, y = at[:, 0] - np.float32(0.5), at[:, 1] - np.float32(0.5)
    inside = np.flatnonzero((x >= 0) & (y >= 0) & (x < width - 1) & (y < height - 1))
    x, y, values = x[inside], y[inside], values[inside]
    column, row = x.astype(np.intp), y.astype(np.intp)
    index = row * width + column
    fx, fy = x - column, y - row
    cells = np.concatenate([index, index + 1, index + width, index + width + 1])
    share = np.concatenate([(1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy])
    grid = np.empty((height, width, 3), np.float32)
    for layer, weight in enumerate((share, share * np.tile(values[:, 0], 4), share * np.tile(values[:, 1], 4))):
        grid[..., layer] = np.bincount(cells, weight, minlength=width * height).reshape(height, width)
    smooth = np.asarray(cv2.GaussianBlur(grid, (7, 7), _SMOOTH_CELLS, borderType=cv2.BORDER_CONSTANT), np.float32)
    return np.ascontiguousarray(smooth[..., 1:] / (smooth[..., :1] + np.float32(0.01)))


# Eyes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Ring:
    """The points of one eye: from the corner at the picture's left to the other, over the upper and over the lower lid."""

    upper: npt.NDArray[np.intp]
    lower: npt.NDArray[np.intp]
    brow: npt.NDArray[np.intp]  # its lower edge
    iris: npt.NDArray[np.intp]  # the middle, then four points of its rim


def _ring(upper: tuple[int, ...], lower: tuple[int, ...], brow: tuple[int, ...], iris: int) -> _Ring:
    return _Ring(np.array(upper), np.array(lower), np.array(brow), np.arange(iris, iris + 5))


_EYES = (
    _ring((33, 246, 161, 160, 159, 158, 157, 173, 133), (33, 7, 163, 144, 145, 153, 154, 155, 133), (53, 52, 65), 468),
    _ring((362, 398, 384, 385, 386, 387, 388, 466, 263), (362, 382, 381, 380, 374, 373, 390, 249, 263), (295, 282, 283), 473),
)  # fmt: skip
_MARGIN = 0.018  # of the lid that the opening shows, lashes and all, in eye distances: it moves with the lid
_LASH = 0.08  # how far above the opening lashes reach, in eye distances,
_LASH_SHARE = 0.6  # and at most, of the skin that moves
_SHADE = 0.045  # how far the upper lid shades the eyeball, in eye distances: what is bared is not taken from there
_REACH = 0.6  # of the way from the upper lid to the brow, how far its skin moves: a crease higher up, or a frame of glasses, stays
_BARES_PX = 1.0  # how far a lid must be drawn back for what it bares to be made up
_FINE_PX = 64.0  # eyes shorter than that have the lids' curves in every pixel, others in every fourth
_MEETS = 0.5  # of the gap, from where on the lids may meet
_PARTS = 256  # of an eye's length, for each of which the lids' heights are told
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

    @classmethod
    def of(cls, ring: _Ring, points: F32, skin: F32, closing: F32, pose: Pose) -> _Eye | None:
        """None where the eye has nothing to do."""
        corner, other = points[ring.upper[0]], points[ring.upper[-1]]
        span = float(np.hypot(*(other - corner)))
        gaze = skin[ring.iris[0]]
        if (np.abs(closing).max() < _LEAST and np.abs(gaze).max() < _LEAST_GAZE_PX) or span < _LEAST_FACE_PX:
            return None
        across = (other - corner) / np.float32(span)
        down = np.array([-across[1], across[0]], np.float32)
        local = points[np.stack([ring.upper, ring.lower])] - corner
        x = np.maximum.accumulate(local @ across / np.float32(span), axis=1)
        above = float((points[ring.upper[3:6]].mean(axis=0) - points[ring.brow].mean(axis=0)) @ down)
        rim = points[ring.iris] - points[ring.iris[0]]
        return cls(
            corner, across, down, span, np.stack([x, local @ down], axis=1).astype(np.float32),
            float(closing[0]), float(closing[1]), max(_REACH * above, 0.12 * pose.scale_px), pose.scale_px,
            points[ring.iris[0]], float(np.hypot(rim[1:, 0], rim[1:, 1]).mean()), gaze,
        )  # fmt: skip

    @property
    def middle(self) -> F32:
        return np.asarray(self.corner + self.across * np.float32(self.span_px / 2), np.float32)

    def box(self, middle: F32) -> F32:
        """What the eye moves if it is drawn around `middle`: x, y, x end, y end."""
        (x, upper), (x_lower, lower) = self.lids
        fall = np.maximum(np.interp(x, x_lower, lower) - upper, 0) * self.close_upper
        # The skin moves up to so far above the lid as it will be.
        reach = float(max(fall.max(), 0.0) - (upper + fall).min())
        side, up = 0.53 * self.span_px + 2, self.above_px + max(0.26 * self.span_px, reach + 2)
        low = _BELOW * self.scale_px + 0.2 * self.span_px
        return np.array([middle[0] - side, middle[1] - up, middle[0] + side, middle[1] + low], np.float32)

    def place(self, source: F32) -> tuple[_Layer, ...]:
        """Let the lids' skin come from where the lids are.

        Args:
            source: (h, w, 2), both in fours, places in the region as it is, so that all is found in the eye's own frame there;
                changed.

        Returns:
            The line along which shut lids meet, and the eyeball, to be drawn over it.
        """
        y, fall, rise, seam = self._lids(source)
        margin = np.float32(_MARGIN * self.scale_px)
        most = max(float(fall.max()), 1e-3)
        # The lashes go along as they are and what is above them is stretched, evenly: their dark line would cover the whole lid.
        lash = np.float32(min(_LASH * self.scale_px, _LASH_SHARE * self.above_px))
        over = _unit((y + lash) * np.float32(1 / (self.above_px - lash + most)) + 1)
        under = _unit((seam - y) * np.float32(1 / (_BELOW * self.scale_px)) + 1)
        lids = (-fall * over, rise * under)
        skin = np.where(y < seam, *lids)
        alpha = _unit(np.minimum(y - margin, seam - y) + np.float32(0.5))
        meets = self.close_upper + self.close_lower > _MEETS
        if meets:  # they may be less than a pixel apart
            alpha = np.minimum(alpha, _unit(seam - margin))
        shown = _within(alpha > 0)
        layers = (
            ()
            if shown is None
            else self._ball(shown, *(plane[shown] for plane in (source, y, fall, rise, seam, alpha)))
        )
        if meets:
            # Where the lids meet, the pixels that both of them cover show both.
            both = _unit(np.minimum(np.float32(0.5) - np.abs(y - seam), np.float32(1) + margin - seam))
            met = _within(both > 0)
            if met is not None:
                other = np.where(y[met] < seam[met], lids[1][met], lids[0][met])[..., None] * self.down
                layers = (_Layer.of(met, np.asarray(source[met] + other, np.float32), both[met]), *layers)
        source[..., 0] += skin * self.down[0]
        source[..., 1] += skin * self.down[1]
        return layers

    def _lids(self, source: F32) -> tuple[F32, F32, F32, F32]:
        """For places (h, w, 2), all (h, w): y against the new upper lid, how far the lids move towards each other, and where the
        lower one's skin begins. h and w are multiples of four: in large eyes the lids' curves are interpolated between every
        fourth pixel."""
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
        if not small:
            fine = cv2.resize(cv2.merge([y, fall, rise, seam]), source.shape[1::-1], interpolation=cv2.INTER_LINEAR)
            y, fall, rise, seam = (np.asarray(plane, np.float32) for plane in cv2.split(fine))
        return y, fall, rise, seam

    def _ball(self, cut: _Cut, source: F32, y: F32, fall: F32, rise: F32, room: F32, alpha: F32) -> tuple[_Layer, ...]:
        """The eyeball's pixels, a cut out of the eye's box, come from their own place, drawn along by the gaze."""
        if np.abs(self.gaze_px).max() >= _LEAST_GAZE_PX:
            t = _unit((y / np.maximum(room, np.float32(1e-3))).astype(np.float32))
            away = source - (self.iris + self.gaze_px - np.float32(0.5))
            far = (np.hypot(away[..., 0], away[..., 1]) / max(self.radius_px, 1.0)).astype(np.float32)
            near = _unit((np.float32(2.6) - far) / np.float32(1.6)) * _unit(5 * t) * _unit(5 - 5 * t)
            source = source - near[..., None] * self.gaze_px
        over, under = (self._shaded_px(moved) for moved in (fall, rise))
        # How deep it lies below the upper lid as it is, and above the lower one.
        hidden = (y + fall < over) | (room - y + rise < under)
        bared = _within(hidden) if over or under else None
        if bared is None:
            return (_Layer.of(cut, source, alpha),)
        left, right, share = self._bared(source[bared], hidden[bared], over, under)
        source = source.copy()
        source[bared] = left
        return _Layer.of(cut, source, alpha), _Layer.of(cut, right, alpha[bared] * share, bared)

    def _shaded_px(self, moved: F32) -> np.float32:
        """How much of what is seen a lid shades that moves so (positive closes); 0 for one that bares nothing."""
        most = -float(moved.min())
        return np.float32(min(_SHADE * self.scale_px, most) if most > _BARES_PX else 0)

    def _bared(
        self, source: F32, hidden: npt.NDArray[np.bool_], over: np.float32, under: np.float32
    ) -> tuple[F32, F32, F32]:
        """Where to take what an eye that opens further shows and never showed: iris and white are the same all around the pupil, so
        it lies as far from it, at the edge of what is seen.

        Args:
            source: (h, w, 2) places in the region.
            hidden: (h, w) which of them lie under the lids, or in their shade.
            over, under: how many pixels of what is seen the upper and the lower lid shade.

        Returns:
            The places to the left and to the right of the iris, and the share (h, w) of the latter.
        """
        origin = self.corner - np.float32(0.5)
        at_x, at_y = source[..., 0] - origin[0], source[..., 1] - origin[1]
        x = at_x * self.across[0] + at_y * self.across[1]
        y = at_x * self.down[0] + at_y * self.down[1]
        iris = self.iris - self.corner
        cx, cy = np.float32(iris @ self.across), np.float32(iris @ self.down)
        part = np.linspace(0, 1, _PARTS + 1)
        upper, lower = (np.interp(part, *lid).astype(np.float32) for lid in self.lids)
        middle = (upper + lower) * np.float32(0.5)
        top, low = np.minimum(upper + over, middle), np.maximum(lower - np.float32(0.6) * under, middle)
        to_part = np.float32(_PARTS / self.span_px)
        # How high a circle around the pupil meets the lid; the lids are nearly level there.
        at = int(np.clip(cx * to_part, 0, _PARTS))
        dx, dy = x - cx, y - cy
        level = np.where(dy < 0, top[at] - cy, low[at] - cy)
        reach = np.sqrt(np.maximum(dx * dx + dy * dy - level * level, 0))
        radius = np.float32(max(self.radius_px, 1.0))
        aside = _unit(np.abs(dx) / radius - 1)  # far from the iris all is white, and there is no further
        places = []
        for turned in (cx - reach, cx + reach):
            to = np.minimum(np.maximum(turned, np.float32(0.1 * self.span_px)), np.float32(0.9 * self.span_px))
            to += (x - to) * aside
            index = (to * to_part).astype(np.intp).clip(0, _PARTS)
            height = np.minimum(np.maximum(y, top.take(index)), low.take(index))
            place = source.copy()
            for axis in (0, 1):
                new = origin[axis] + to * self.across[axis] + height * self.down[axis]
                np.copyto(place[..., axis], new, where=hidden)
            places.append(place)
        right = _unit(dx / radius + np.float32(0.5))
        return places[0], places[1], right * right * (3 - 2 * right)


_Cut = tuple[slice, slice]


def _within(mask: npt.NDArray[np.bool_]) -> _Cut | None:
    """Rows and columns, from and to even ones, around what is set; None where nothing is."""
    x, y, width, height = cv2.boundingRect(mask.astype(np.uint8))
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
    def of(cls, cut: _Cut, where: F32, alpha: F32, part: _Cut = (slice(0, None), slice(0, None))) -> _Layer:
        """Of a cut out of the eye's box a part."""
        rows, columns = part
        return cls(cut[1].start + columns.start, cut[0].start + rows.start, where[part], alpha[part])


def _unit(values: F32) -> F32:
    return np.minimum(np.maximum(values, np.float32(0)), np.float32(1))
