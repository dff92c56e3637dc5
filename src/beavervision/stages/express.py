"""Give the face an expression: a dense, smooth warp of the face region, on the planes, after the lips are drawn.

The points of the mesh move as the learned basis says (:mod:`beavervision.models.expression`), the head as a solid in two and a
half dimensions. The motion of samples all over the surface is laid onto a coarse grid where it arrives and made smooth there
(normalised convolution, Knutsson and Westin, 1993), so that it needs no inversion; around the face's outline it fades to
nothing. The eyes are two layers: the lids' skin, pulled over the opening, and the eyeball, which stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from math import ceil, cos, dist, floor, radians, sin

import cv2
import numpy as np
import numpy.typing as npt

from beavervision.media import F32, POINTS, U8, Clip, Picture, Region
from beavervision.models.expression import ExpressionBasis, samples
from beavervision.models.mesh import FACE_OVAL, Pose, fit_pose
from beavervision.models.warp import cubic, interpolated, places_of_cells

STILL = np.array([0, 0, 0, 0, 0, 1], np.float32)  # a head that does not move
_LEAST = 1e-4  # of a control or a head movement; less is nothing
_CELLS = 17  # of the grid, to the distance of the eyes
_SMOOTH_CELLS = 1.1
_SMOOTH_REACH = 3  # cells
_MOVES_PX = 0.25  # cells that move less stay as they are; from twice that on they move as they should
_LEAST_FACE_PX = 4.0  # between the eyes
_AROUND = 1.0  # how much of the picture around the face is looked at, in eye distances
_ROWS = 8  # of cells, remapped together
_LEAST_GAZE_PX = 0.02
_NECK = np.array([0.0, 1.6, 1.1], np.float32)  # what the head turns about, in the pose-free frame
_TURNED_DEG, _MOST_TURNED_DEG = 22.0, 40.0  # of yaw, between which a head that turns further turns less and less
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
        draws: dict[int, Callable[[], Picture]] = {}
        for i, (picture, face, strength, lips) in enumerate(
            zip(pictures, clip.track.faces, clip.track.strength, drawn, strict=True)
        ):
            if face is None or strength <= 0:
                continue
            points = face.points_px if lips is None else lips
            controls = clip.expression.controls[i] * strength
            head = STILL + (clip.expression.head[i] - STILL) * strength
            draws[i] = _planned(picture, points, controls, head, self._basis)
        # Pixels last, for all pictures: in between they would drive all else out of the processor's caches.
        for i, draw in draws.items():
            pictures[i] = draw()
        return replace(clip, frames=replace(clip.frames, pictures=tuple(pictures)))


def expressed(picture: Picture, points_px: F32, controls: F32, head: F32, basis: ExpressionBasis) -> Picture:
    """`picture` with the expression of the face at `points_px` (478, 3) changed; the very same one where nothing is asked for.

    Args:
        controls: (52,) offsets of the blendshapes.
        head: (6,), as in :class:`beavervision.media.Expression`.
    """
    return _planned(picture, points_px, controls, head, basis)()


def _planned(
    picture: Picture, points_px: F32, controls: F32, head: F32, basis: ExpressionBasis
) -> Callable[[], Picture]:
    """What makes the picture of :func:`expressed`: how points move is already known, the pixels are still to be drawn."""
    turns = cv2.norm(head, STILL, cv2.NORM_INF) >= _LEAST
    if not turns and cv2.norm(controls, cv2.NORM_INF) < _LEAST:
        return lambda: picture
    pose = fit_pose(points_px)
    region = Region.around(points_px, _AROUND * pose.scale_px, picture.width_px, picture.height_px)
    if region is None or pose.scale_px < _LEAST_FACE_PX:
        return lambda: picture
    face = pose.to_face(points_px)
    points = points_px[:, :2] - np.array([region.x_px, region.y_px], np.float32)
    move = basis.displacement(controls, face)
    skin_px = pose.vector_to_picture(move)[:, :2]
    head_px = _turned(face + move, _bearable(head, pose), pose) if turns else None
    eyes = _Eyes.of(points, skin_px, basis.closing(controls), pose)
    return partial(_Warp.of(points, skin_px, head_px, pose, eyes).apply, picture, region, eyes)


def _bearable(head: F32, pose: Pose) -> F32:
    """The motion of a head of which half is seen already: it turns less the less is seen of its far side."""
    part = min(max((_MOST_TURNED_DEG - abs(pose.yaw_deg)) / (_MOST_TURNED_DEG - _TURNED_DEG), 0.0), 1.0)
    return head * np.array([part, part, 1, 1, 1, 1], np.float32)


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
    weights: F32  # (3, 3, m), those for its place, for how far it moves with the skin, and with the head

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
        at = weights((1 + away) * (1 - part), (1 + away) * part, -away)
        with_skin, with_head = (weights(fade * (1 - part), fade * part, none) for fade in (skin, head))
        return cls(np.ascontiguousarray(corners), np.stack([at, with_skin, with_head]))


_surface = cache(_Surface.of)


class _Warp:
    """For each pixel of a rectangle, which may reach beyond the region around the face, where in the region it comes from."""

    __slots__ = ("_from", "_grid", "_half", "_moves", "_step", "_x", "_y")

    def __init__(self, x: int, y: int, step: int, grid: F32) -> None:
        """`grid` (2, rows, columns): how far away each cell of `step` pixels finds its own."""
        self._x, self._y, self._step = x, y, step
        size = np.maximum(*np.abs(grid))
        self._moves = (size > _MOVES_PX).view(np.uint8)
        self._grid = grid * _unit((size - np.float32(_MOVES_PX)) * np.float32(1 / _MOVES_PX))
        self._from = places_of_cells(self._grid, step, x, y)
        self._half = _halved(self._from)

    @classmethod
    def of(cls, points: F32, skin: F32, head: F32 | None, pose: Pose, eyes: _Eyes | None) -> _Warp:
        """From the points (478, 2) and how far they move with the skin and with the head, in pixels."""
        surface = _surface(_SKIN_REACH if head is None else _HEAD_REACH)
        told = (points, skin) if head is None else (points, skin, head)
        values = np.empty((len(told), 2, POINTS + 1), np.float32)
        for of_points, to in zip(told, values, strict=True):
            to[:, :POINTS] = of_points.T
        values[..., POINTS] = np.add.reduce(values.take(FACE_OVAL, axis=2), axis=2) / np.float32(len(FACE_OVAL))
        parts = values.take(surface.corners, axis=2)
        parts *= surface.weights[: len(told), None]
        at, *moves = np.add.reduce(parts, axis=2)
        move = moves[0] if head is None else moves[0] + moves[1]
        target = at + move
        step = max(1, round(pose.scale_px / _CELLS / 2)) * 2  # even: chroma samples are whole
        moving = target.compress(np.maximum(*np.abs(move)) > _MOVES_PX, axis=1)
        if eyes is not None:
            moving = np.concatenate([moving, eyes.boxes(eyes.middle).reshape(-1, 2).T], axis=1)
        reached = moving if moving.size else target[:, :1]
        x, y = (floor(low / step) - 3 for low in np.minimum.reduce(reached, axis=1).tolist())
        right, bottom = (ceil(high / step) + 3 for high in np.maximum.reduce(reached, axis=1).tolist())
        at = target * np.float32(1 / step) - np.array([[x], [y]], np.float32)
        return cls(x * step, y * step, step, _splat(at, -move, right - x, bottom - y))

    def apply(self, picture: Picture, region: Region, eyes: _Eyes | None) -> Picture:
        drawn = self._moves.copy()
        boxes: list[_Box] = []
        if eyes is not None:
            boxes = [self._held(_in_twos(box), region) for box in eyes.boxes(self._moved_at(eyes.middle)).tolist()]
        for box in boxes:
            drawn[self._cells(box)] = 1
        column, row, columns, rows = cv2.boundingRect(drawn)
        step = self._step
        cells_x, cells_y = self._x + column * step, self._y + row * step
        x, y, right, bottom = box = self._held(
            (cells_x, cells_y, cells_x + columns * step, cells_y + rows * step), region
        )
        if right == x or bottom == y:
            return picture
        shown = slice(y - cells_y, bottom - cells_y), slice(x - cells_x, right - cells_x)
        cells = slice(row, row + rows + 2), slice(column, column + columns + 2)
        where = interpolated(self._from[:, *cells], step)[:, *shown]
        half = interpolated(self._half[:, *cells], step // 2)[:, *_halves(shown)]
        corners: list[tuple[int, int]] = []
        layers: list[_Layer] = []
        if eyes is not None:
            # All of one size, so that they are counted together.
            width = min(max(-(-(box[2] - box[0]) // 4) for box in boxes), (right - x) // 4) * 4
            height = min(max(-(-(box[3] - box[1]) // 4) for box in boxes), (bottom - y) // 4) * 4
            corners = [
                (max(min(eye_x, right - width) - x, 0), max(min(eye_y, bottom - height) - y, 0))
                for eye_x, eye_y, *_ in boxes
            ]
            cuts = [(slice(top, top + height), slice(left, left + width)) for left, top in corners]
            if width and height:
                layers = eyes.draw(where, half, cuts)
        planes = _Planes(picture, region, box)
        for cut in _strips(drawn[row : row + rows, column : column + columns], step, shown):
            planes.draw(cut, where, half)
        for layer in layers:
            planes.mix(layer, corners)
        return Picture(*planes.new, picture.color)

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

    def _moved_at(self, places: F32) -> F32:
        """Where what lies at `places` (n, 2) of the region is drawn, nearly."""
        _, rows, columns = self._grid.shape
        moved = places.copy()
        for (x, y), at in zip(places.tolist(), moved, strict=True):
            column = min(max(int((x - self._x) / self._step), 0), columns - 1)
            row = min(max(int((y - self._y) / self._step), 0), rows - 1)
            at -= self._grid[:, row, column]
        return moved


_Box = tuple[int, int, int, int]  # x, y, x end, y end, in pixels
_Cut = tuple[slice, slice]  # rows and columns


def _in_twos(box: tuple[float, float, float, float]) -> _Box:
    """A box (x, y, x end, y end), grown to even pixels."""
    x, y, right, bottom = box
    return floor(x / 2) * 2, floor(y / 2) * 2, ceil(right / 2) * 2, ceil(bottom / 2) * 2


def _strips(drawn: U8, step: int, shown: _Cut) -> Iterator[_Cut]:
    """Of what is shown of a grid, strips that hold all that is drawn."""
    y, x = (part.start for part in shown)
    height, width = (part.stop - part.start for part in shown)
    for row in range(0, len(drawn), _ROWS):
        column, _, columns, _ = cv2.boundingRect(drawn[row : row + _ROWS])
        top, left = max(row * step - y, 0), max(column * step - x, 0)
        bottom, right = min((row + _ROWS) * step - y, height), min((column + columns) * step - x, width)
        if top < bottom and left < right:
            yield slice(top, bottom), slice(left, right)


def _halves(cut: _Cut) -> _Cut:
    """The chroma samples of a cut of pixels, all even."""
    rows, columns = cut
    return slice(rows.start // 2, rows.stop // 2), slice(columns.start // 2, columns.stop // 2)


class _Planes:
    """The planes of a picture and, of a box of a region, what is drawn from and drawn to. Rows of luma become floats
    shortly before they are read, while they are near."""

    __slots__ = ("_chroma", "_float", "_held", "_luma", "_to", "new")

    def __init__(self, picture: Picture, region: Region, box: _Box) -> None:
        x, y, right, bottom = box
        luma, chroma = Region(region.x_px + x, region.y_px + y, right - x, bottom - y).slices
        self.new = (picture.y.copy(), picture.u.copy(), picture.v.copy())
        self._to = (self.new[0][luma], self.new[1][chroma], self.new[2][chroma])
        self._luma, *self._chroma = picture.planes(region)
        self._float = np.empty(self._luma.shape, np.float32)
        self._held: tuple[int, int] | None = None  # from and to which row it is filled

    def draw(self, cut: _Cut, where: F32, half: F32) -> None:
        """Draw a cut of the box, of which `where` (2, h, w) tells where its pixels, and `half` (2, h / 2, w / 2) where its chroma
        samples come from."""
        luma, u, v = self._to
        self._cubic(where[:, *cut], luma[cut])
        cut = _halves(cut)
        for plane, to in zip(self._chroma, (u, v), strict=True):
            _linear(plane, half[:, *cut], to[cut])

    def mix(self, layer: _Layer, corners: list[tuple[int, int]]) -> None:
        """Draw a layer over eyes whose cuts of the box have their `corners` (x, y) there."""
        height, width = layer.alpha.shape[1:]
        where = layer.where.reshape(2, -1, width)  # one eye below the other
        half = _halved(_shrunk(where))
        alphas = layer.alpha, _shrunk(layer.alpha)
        made = [self._cubic(where), *(_linear(plane, half) for plane in self._chroma)]
        if layer.bright is not None:
            luma = made[0].reshape(2, *layer.bright.shape)
            np.minimum(luma, np.maximum(np.minimum(luma[0], luma[1]), layer.bright), out=luma)
        rests = [1 - alpha for alpha in alphas]
        for plane, to, by in zip(made, self._to, (1, 2, 2), strict=True):
            alpha, rest = alphas[by - 1], rests[by - 1]
            new = plane.reshape(alpha.shape)
            for i, (x, y) in enumerate(corners * (len(alpha) // len(corners))):
                top, left = (y + layer.y) // by, (x + layer.x) // by
                under = to[top : top + height // by, left : left + width // by]
                cv2.blendLinear(new[i], under, alpha[i], rest[i], under)

    def _cubic(self, where: F32, to: U8 | None = None) -> U8:
        """The luma at places (2, h, w); onto `to` where it is given."""
        low, high, *_ = cv2.minMaxLoc(where[1])
        rows = len(self._luma)
        # Two rows to either side, and one more where a place is rounded up.
        first, end = min(max(floor(low) - 1, 0), rows - 1), min(max(floor(high) + 4, 1), rows)
        start, stop = (first, first) if self._held is None else self._held
        for part in (slice(first, start), slice(stop, end)):
            self._float[part] = self._luma[part]
        self._held = min(first, start), max(end, stop)
        return cubic(self._float, where[0], where[1], to)


def _halved(where: F32) -> F32:
    """Places in the chroma planes, given places in luma's."""
    return where * np.float32(0.5) - np.float32(0.25)


def _shrunk(values: F32) -> F32:
    """The means (..., h / 2, w / 2) of every two by two of values (..., h, w), h and w even."""
    *count, height, width = values.shape
    half = np.empty((*count, height // 2, width // 2), np.float32)
    rows = half.reshape(-1, width // 2)
    cv2.resize(values.reshape(-1, width), rows.shape[::-1], rows, interpolation=cv2.INTER_AREA)
    return half


def _linear(plane: U8, where: F32, to: U8 | None = None) -> U8:
    """A chroma plane at places (2, h, w); onto `to` where it is given."""
    return np.asarray(cv2.remap(plane, where[0], where[1], cv2.INTER_LINEAR, to, cv2.BORDER_REPLICATE), np.uint8)


def _splat(at: F32, values: F32, width: int, height: int) -> F32:
    """Values (2, m) at places (2, m), in cells, onto a grid (2, height, width): smooth, and 0 far from all of them."""
    at = np.subtract(at, 0.5, dtype=np.float64)  # what is counted with is
    x, y = at
    inside = ((np.minimum(x, y) >= 0) & (x < width - 1) & (y < height - 1)).nonzero()[0]
    at = at.take(inside, axis=1)
    cell = at.astype(np.intp)
    to_x, to_y = to = at - cell
    from_x, from_y = 1 - to
    share = np.array([from_x * from_y, to_x * from_y, from_x * to_y, to_x * to_y])
    index = (cell[1] * width + cell[0] + np.array([[0], [1], [width], [width + 1]])).ravel()
    # The sums of the weights and those of the values, one below the other and so far apart that they do not mix.
    all_rows = height + _SMOOTH_REACH
    counted = (share, *(share * value for value in values.take(inside, axis=1)))
    sums = np.array([np.bincount(index, of.ravel(), all_rows * width) for of in counted], np.float32)
    size = 2 * _SMOOTH_REACH + 1
    smooth = cv2.GaussianBlur(
        sums.reshape(3 * all_rows, width), (size, size), _SMOOTH_CELLS, borderType=cv2.BORDER_CONSTANT
    ).reshape(3, all_rows, width)[:, :height]
    return np.asarray(smooth[1:] / (smooth[0] + np.float32(0.01)), np.float32)


# Eyes ---------------------------------------------------------------------------------------------


def _ring(upper: tuple[int, ...], lower: tuple[int, ...], brow: tuple[int, ...], iris: int) -> tuple[int, ...]:
    """The points of one eye: from the corner at the picture's left to the other, over the upper and over the lower lid; three of
    the brow's lower edge; and of the iris the middle, then four points of its rim."""
    return *upper, *lower, *brow, *range(iris, iris + 5)


_EYES = np.array((
    _ring((33, 246, 161, 160, 159, 158, 157, 173, 133), (33, 7, 163, 144, 145, 153, 154, 155, 133), (53, 52, 65), 468),
    _ring((362, 398, 384, 385, 386, 387, 388, 466, 263), (362, 382, 381, 380, 374, 373, 390, 249, 263), (295, 282, 283), 473),
))  # fmt: skip
_OUTWARD = np.array([-1, 1], np.float32)
_LID, _BROW, _IRIS = 9, slice(18, 21), 21  # points of a lid, where the brow's are, and from where on the iris's
_MARGIN = 0.018  # of the lid that the opening shows, lashes and all, in eye distances: it moves with the lid
_LASH = 0.08  # how far above the opening lashes reach, in eye distances,
_LASH_SHARE = 0.6  # and at most, of the skin that moves
_SWEEP = np.float32(0.5)  # how far outwards they stand, to each pixel upwards
_SHADE = 0.045  # how far the upper lid shades the eyeball, in eye distances: what is bared is not taken from there
_REACH = 0.6  # of the way from the upper lid to the brow, how far its skin moves: a crease higher up, or a frame of glasses, stays
_BARES_PX = 1.0  # how far a lid must be drawn back for what it bares to be made up
_FINE_PX = 64.0  # eyes shorter than that have the lids' curves in every pixel, others in every fourth
_MEETS = 0.5  # of the gap, from where on the lids may meet
_PARTS = 256  # of an eye's length, for each of which the lids' heights are told
_PART = np.linspace(0, 1, _PARTS + 1)[None, None]
_BELOW = 0.24  # how far below the lower lid its skin moves, in eye distances


@dataclass(frozen=True, slots=True, eq=False)
class _Eyes:
    """How eyes (n) open or close, each in its own frame: x from corner to corner, 0 to 1; y down in pixels."""

    corner: F32  # (2, n, 1, 1)
    across: F32  # (2, n, 1, 1), of length 1, from corner to corner
    down: F32  # (2, n, 1, 1), of length 1
    span_px: F32  # (n, 1, 1), from corner to corner
    lids: F32  # (n, 2, 2, 9): of the upper and the lower lid, x rising and y
    closes: F32  # (2, n, 1, 1), upper and lower, of the gap
    above_px: F32  # (n, 1, 1), from the upper lid to the brow
    lash_px: F32  # (n, 1, 1), how high lashes stand above it
    scale_px: float
    iris: F32  # (2, n, 1, 1), its middle in the picture
    radius_px: F32  # (n, 1, 1), of 1 or more
    gaze_px: F32  # (2, n, 1, 1)
    outward: F32  # (n, 1, 1), -1 where the outer corner is the first one, else 1
    reach_px: F32  # (n, 4), how far from its middle each moves the skin: left and up, both below 0, right and down

    @classmethod
    def of(cls, points: F32, skin: F32, closing: F32, pose: Pose) -> _Eyes | None:
        """Those that have something to do; None if neither has."""
        rings = points[_EYES]
        corner, gaze = rings[:, 0], skin[_EYES[:, _IRIS]]
        across = rings[:, _LID - 1] - corner
        span = np.hypot(across[:, 0], across[:, 1])
        acts = (np.abs(closing) >= _LEAST) | (np.abs(gaze) >= _LEAST_GAZE_PX)
        used = acts.any(axis=1) & (span >= _LEAST_FACE_PX)
        outward = _OUTWARD
        # How far the brow is drawn further from the eye than it is.
        moves = skin[_EYES]
        draws = moves[:, _BROW] - (moves[:, :1] + moves[:, _LID - 1 : _LID]) / 2
        if not used.all():
            if not used.any():
                return None
            rings, corner, gaze, across, span, closing, outward, draws = (
                of_each[used] for of_each in (rings, corner, gaze, across, span, closing, outward, draws)
            )
        frame = np.empty((len(span), 2, 2), np.float32)
        frame[:, 0] = frame[:, 1, ::-1] = across / span[:, None]
        frame[:, 1, 0] *= -1
        local = (rings - corner[:, None]) @ frame.transpose(0, 2, 1)
        local[..., 0] /= span[:, None]
        lids = local[:, : 2 * _LID].reshape(-1, 2, _LID, 2).transpose(0, 1, 3, 2).copy()
        np.maximum.accumulate(np.minimum(lids[:, :, 0], 1), axis=2, out=lids[:, :, 0])
        rises = -(draws @ frame[:, 1, :, None])[..., 0]
        # The skin moves up to so far above the lid as it will be.
        upper, lower = lids[:, 0, 1], lids[:, 1, 1]
        fall = np.maximum(lower - upper, 0) * closing[:, :1]
        above = (upper[:, 3:6].sum(axis=1) - local[:, _BROW, 1].sum(axis=1)) * np.float32(_REACH / 3)
        above = np.maximum(above, np.float32(0.12 * pose.scale_px))
        highest = (upper + fall).min(axis=1)
        up = above + np.maximum(np.float32(0.26) * span, np.maximum(fall.max(axis=1), 0) - highest + 2)
        up += rises.max(axis=1).clip(0)
        side = np.float32(0.53) * span + 2
        low = np.float32(_BELOW * pose.scale_px) + np.float32(0.2) * span
        iris = rings[:, _IRIS]
        rim = rings[:, _IRIS + 1 :] - iris[:, None]
        radius = np.hypot(rim[..., 0], rim[..., 1]).sum(axis=1) / 4
        radius = np.maximum(radius, 1)
        lash = np.minimum(np.float32(_LASH * pose.scale_px), np.float32(_LASH_SHARE) * above)
        swept = _SWEEP * lash * outward
        reach = np.array([np.minimum(swept, 0) - side, -up, side + np.maximum(swept, 0), low]).T
        corner, across, down, closes, iris, gaze = (
            pairs.T[..., None, None] for pairs in (corner, frame[:, 0], frame[:, 1], closing, iris, gaze)
        )
        span, above, lash, radius, outward = (values[:, None, None] for values in (span, above, lash, radius, outward))
        return cls(
            corner, across, down, span, lids, closes, above, lash, pose.scale_px, iris, radius, gaze, outward, reach
        )

    @property
    def middle(self) -> F32:
        """Where they are, (n, 2)."""
        return np.asarray((self.corner + self.across * (self.span_px / 2))[..., 0, 0].T, np.float32)

    def boxes(self, middle: F32) -> F32:
        """What the eyes move if they are drawn around `middle` (n, 2): x, y, x end, y end, (n, 4)."""
        return np.concatenate([middle, middle], axis=1) + self.reach_px

    def draw(self, where: F32, half: F32, cuts: list[_Cut]) -> list[_Layer]:
        """Let the lids' skin come from where the lids are, in places of the pixels (2, h, w) and of the chroma samples
        (2, h / 2, w / 2): in a cut of the pixels for each eye, all of one size and in fours. As :meth:`place`."""
        places = np.array([[plane[cut] for cut in cuts] for plane in where])
        layers = self.place(places)
        halves = _halved(_shrunk(places))
        for i, cut in enumerate(cuts):
            where[:, *cut] = places[:, i]
            half[:, *_halves(cut)] = halves[:, i]
        return layers

    def place(self, source: F32) -> list[_Layer]:
        """Let the lids' skin come from where the lids are.

        Args:
            source: (2, n, h, w), h and w in fours, places in the region as it is, so that all is found in each eye's own frame
                there; changed.

        Returns:
            The line along which shut lids meet, and the eyeball, to be drawn over it.
        """
        y, fall, rise, seam, swept, widest = self._lids(source)
        margin = np.float32(_MARGIN * self.scale_px)
        close_upper, close_lower = self.closes
        most = np.maximum(widest * close_upper, np.float32(1e-3))
        # The lashes go along as they are and what is above them is stretched, evenly: their dark line would cover the whole lid.
        up = 1 / (self.above_px - self.lash_px + most)
        room = seam - y
        above = swept * (y * -up - (self.lash_px * up + 1)).clip(-1, 0)
        below = rise * _unit(room * np.float32(1 / (_BELOW * self.scale_px)) + 1)
        apart = _unit(seam - margin)
        # Beneath the eyeball's soft lower edge is the lower lid, not what is drawn back above.
        upper = room > np.float32(0.5) * apart
        alpha = _unit(np.minimum(y - margin, room) + np.float32(0.5))
        meets = close_upper + close_lower > _MEETS
        if meets.any():  # they may be less than a pixel apart
            alpha = np.minimum(alpha, np.where(meets, apart, 1))
        opens = -widest * self.closes
        # How much of what is seen a lid shades that is drawn back so far; 0 for one that bares nothing.
        over, under = np.where(opens > _BARES_PX, np.minimum(np.float32(_SHADE * self.scale_px), opens), np.float32(0))
        shown = _within(alpha > 0)
        layers: list[_Layer] = []
        if shown is not None:
            at = (slice(None), *shown)
            y_shown, room_shown = y[at], room[at]
            ball = self._looking(source[:, *at].copy(), y_shown, seam[at])
            layers = [_Layer(shown[1].start, shown[0].start, ball, alpha[at])]
            bares = (over > 0) | (under > 0)
            if bares.any():
                # What lies above the upper lid as it is or in its shade, and below the lower one.
                hidden = ((y_shown + fall[at] < over) | (room_shown + rise[at] < under)) & bares
                layers = self._bared(layers[0], hidden, over, under)
        if meets.any():
            # Where the lids meet, the pixels that both of them cover show both.
            both = _unit(np.minimum(np.float32(0.5) - np.abs(room), np.float32(1) + margin - seam)) * meets
            met = _within(both > 0)
            if met is not None:
                at = (slice(None), *met)
                other = np.where(upper[at], below[at], above[at]) * self.down
                layers.insert(0, _Layer(met[1].start, met[0].start, source[:, *at] + other, both[at]))
        source += np.where(upper, above, below) * self.down
        return layers

    def _lids(self, source: F32) -> tuple[F32, F32, F32, F32, F32, F32]:
        """For places (2, n, h, w), all (n, h, w): y against the new upper lid, how far the lids move towards each other, where
        the lower one's skin begins, and how far the lashes above the upper one move; and the widest gaps (n, 1, 1). h and w are
        multiples of four: in large eyes the lids' curves are interpolated between every fourth pixel."""
        small = float(self.span_px.min()) < _FINE_PX
        coarse = source if small else (source[..., 1::4, 1::4] + source[..., 2::4, 2::4]) * np.float32(0.5)
        at_x, at_y = coarse - (self.corner - np.float32(0.5))
        (across_x, across_y), (down_x, down_y) = self.across, self.down
        x = (at_x * across_x + at_y * across_y) / self.span_px
        upper, lower = self._curves(x)
        gap = np.maximum(lower - upper, 0)
        fall, rise = gap * self.closes
        margin = np.minimum(gap * np.float32(0.25), np.float32(_MARGIN * self.scale_px))
        seam = np.maximum(gap - fall - rise - margin * np.float32(0.5), margin)
        y = at_x * down_x + at_y * down_y - upper - fall
        widest = gap.max(axis=(1, 2), keepdims=True)
        swept = fall
        if (self.closes[0] > 0).any():
            # Lashes go with the lid where they are rooted, further inwards.
            root = x - (-y).clip(0, self.lash_px) * (self.outward * _SWEEP / self.span_px)
            upper, lower = self._curves(root)
            swept = np.maximum(lower - upper, gap) * self.closes[0]
        if small:
            return y, fall, rise, seam, swept, widest
        fine = np.empty((5, *source.shape[1:]), np.float32)
        for planes, to in zip((y, fall, rise, seam, swept), fine, strict=True):
            for plane, whole in zip(planes, to, strict=True):
                cv2.resize(plane, whole.shape[::-1], whole, interpolation=cv2.INTER_LINEAR)
        y, fall, rise, seam, swept = fine
        return y, fall, rise, seam, swept, widest

    def _curves(self, x: F32) -> tuple[F32, F32]:
        """Of the upper and the lower lid at places (n, h, w) from corner to corner, each (n, h, w)."""
        heights = _heights(self.lids, x.reshape(len(x), 1, -1)).reshape(-1, 2, *x.shape[1:])
        return heights[:, 0], heights[:, 1]

    def _looking(self, source: F32, y: F32, room: F32) -> F32:
        """Places (2, n, h, w) of the eyeballs, drawn along by the gaze (in place)."""
        if np.abs(self.gaze_px).max() < _LEAST_GAZE_PX:
            return source
        part = y / np.maximum(room, np.float32(1e-3))
        x, y = source - (self.iris + self.gaze_px - np.float32(0.5))
        far = np.sqrt(x * x + y * y) / self.radius_px
        near = _unit((np.float32(2.6) - far) * np.float32(1 / 1.6)) * _unit(5 * np.minimum(part, 1 - part))
        source -= near * self.gaze_px
        return source

    def _bared(self, ball: _Layer, hidden: npt.NDArray[np.bool_], over: F32, under: F32) -> list[_Layer]:
        """Where to take what an eye that opens further shows and never showed: iris and white are the same all around the pupil, so
        it lies as far from it, at the edge of what is seen.

        Args:
            ball: the eyeballs as they are.
            hidden: (n, h, w) which of its pixels lie under the lids, or in their shade.
            over, under: (n, 1, 1) how many pixels of what is seen the upper and the lower lid shade.

        Returns:
            The eyeballs with what is hidden taken from the left of the iris and, once more, from its right, to be mixed in: (2n).
        """
        bared = _within(hidden)
        if bared is None:
            return [ball]
        rows, columns = bared
        hidden, source = hidden[:, rows, columns], ball.where[..., rows, columns]
        # All in the eye's frame and, from here on, about the pupil.
        frame = np.array([self.across, self.down])
        pupil = self.iris - np.float32(0.5)
        at_x, at_y = source - pupil
        dx, dy = frame[:, 0] * at_x + frame[:, 1] * at_y
        to_x, to_y = self.iris - self.corner
        cx, cy = frame[:, 0] * to_x + frame[:, 1] * to_y
        upper, lower = (_heights(self.lids, _PART) - cy).transpose(1, 0, 2)[..., None]
        middle = (upper + lower) * np.float32(0.5)
        top, low = np.minimum(upper + over, middle), np.maximum(lower - np.float32(0.6) * under, middle)
        # How high a circle around the pupil meets the lid; the lids are nearly level there. What lies nearer to the pupil's level,
        # as towards the corners, stays as far to the side as it is: on the circle it would come into the iris.
        to_part = _PARTS / self.span_px
        first = np.arange(len(top))[:, None, None] * (_PARTS + 1)
        index = (cx * to_part).clip(0, _PARTS).astype(np.intp) + first
        level = np.where(dy < 0, top.take(index), low.take(index))
        reach = np.sqrt(dx * dx + np.maximum(dy * dy - level * level, 0))
        far = dx / self.radius_px
        aside = _unit(np.abs(far) - 1)  # far from the iris all is white, and there is no further
        left, right = np.float32(0.1) * self.span_px - cx, np.float32(0.9) * self.span_px - cx
        to = np.array([-reach, reach]).clip(left, right)
        to += (dx - to) * aside
        index = ((to + cx) * to_part).clip(0, _PARTS).astype(np.intp) + first
        height = np.minimum(np.maximum(dy, top.take(index)), low.take(index))
        across, down = frame[:, :, None]
        new = across * to + down * height + pupil[:, None]
        share = _unit(far + np.float32(0.5))
        share = share * share * (3 - 2 * share) * hidden.any(axis=(1, 2), keepdims=True)
        where = np.stack([ball.where, ball.where], axis=1)  # from the left and from the right, (2, 2, n, h, w)
        np.copyto(where[..., rows, columns], new, where=hidden)
        alpha = np.stack([ball.alpha, np.zeros_like(ball.alpha)])
        whole = ball.alpha[:, rows, columns]
        alpha[1, :, rows, columns] = right = whole * share
        # At the lids' soft edges, too, the one shows as much less of itself as the other shows.
        alpha[0, :, rows, columns] = (whole - right) / np.maximum(1 - right, np.float32(1e-6))
        # What shines in the iris shines on one side of it, and would become a ring.
        round_it = np.sqrt(dx * dx + dy * dy) / self.radius_px
        bright = np.full(ball.alpha.shape, 255, np.uint8)
        bright[:, rows, columns] = np.where(hidden & (dy < 0), _unit(5 * round_it - np.float32(3.5)) * 255, 255)
        height, width = ball.alpha.shape[1:]
        return [_Layer(ball.x, ball.y, where.reshape(2, -1, height, width), alpha.reshape(-1, height, width), bright)]


def _heights(lids: F32, x: npt.NDArray[np.floating]) -> F32:
    """Of upper and lower lid (n, 2, 2, 9) at places between the corners (n or 1, 1, k): (n, 2, k)."""
    # All curves one after the other, two apart.
    first = 2 * np.arange(2 * len(lids)).reshape(-1, 2, 1)
    heights = np.interp(x.clip(0, 1) + first, (lids[:, :, 0] + first).ravel(), lids[:, :, 1].ravel())
    return np.asarray(heights, np.float32)


def _within(masks: npt.NDArray[np.bool_]) -> _Cut | None:
    """Rows and columns, from and to even ones, around what is set in any of the masks (n, h, w); None where nothing is."""
    x, y, width, height = cv2.boundingRect(np.bitwise_or.reduce(masks, axis=0).view(np.uint8))
    if not width:
        return None
    return slice(y // 2 * 2, -(-(y + height) // 2) * 2), slice(x // 2 * 2, -(-(x + width) // 2) * 2)


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """What is drawn over eyes (n), once or several times: its place in their cuts, where it comes from (2, m, h, w), and how much
    of it shows (m, h, w), all eyes' first, then all their second and so on."""

    x: int
    y: int
    where: F32
    alpha: F32
    bright: U8 | None = None  # (n, h, w), up to what luma either of two shows more light than the other; None: any


def _unit(values: F32) -> F32:
    return values.clip(0, 1)
