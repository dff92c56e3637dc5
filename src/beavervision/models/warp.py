"""Move the pixels of a region of a picture, on its planes: piecewise affine over triangles."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from beavervision.media import F32, U8, Picture, Region

_GRID = 80  # cells along the longer side of a region, in which the triangles are found
_MOVED_PX = 0.05  # less is no motion
_STILL_PX = 1 / 64  # to which OpenCV rounds places
_TORN_PX = 0.3  # between the offsets of upper and lower edge: less is no tear
_REACH = 2  # cells around the mouth's opening in which its sides are told apart
_STRIP_PX = 48  # height of the boxes in which pixels are moved, about
_NEXT = np.ones((3, 3), np.uint8)  # a cell and those next to it
_SOFT = cv2.getGaussianKernel(13, 1.5, cv2.CV_32F)
_BETWEEN = np.zeros(1, np.int8)  # the side of no triangle

_Indices = npt.NDArray[np.intp]
_Box = tuple[slice, slice]  # rows and columns


@dataclass(frozen=True, slots=True, eq=False)
class Opening:
    """Where a face may tear: the points of the mouth's opening along its upper and its lower edge, from corner to corner (k,), and
    of each triangle (t,) which side it is on: 1 above, -1 below, 0 between.
    """

    upper: npt.NDArray[np.intp]
    lower: npt.NDArray[np.intp]
    side: npt.NDArray[np.int8]


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """Where the samples of a region (h, w) come from.

    luma (2, h, w) and chroma (2, h/2, w/2) are the places to take them from, along x and along y, 0 being the middle of
    the first. Luma outside of the boxes `moving` stays as it is. mask (h, w), 0 to 255, is soft around what moves.
    """

    luma: F32
    chroma: F32
    moving: tuple[_Box, ...]
    mask: U8


@dataclass(frozen=True, slots=True, eq=False)
class _Parted:
    """How the lips go on over the mouth's opening, in some of the cells (h, w) of a region: of the upper and of the lower lip the
    offsets (2, h, w) as if it were alone, and which pixels are its (255, else 0).
    """

    cells: _Box
    lips: tuple[tuple[F32, U8], tuple[F32, U8]]


@dataclass(frozen=True, slots=True, eq=False)
class _Coarse:
    """What the cells of a region (h, w), each of `step` pixels, tell of its flow: their offsets (2, h, w), and how they part."""

    size: tuple[int, int]  # width, height
    step: int
    offsets_px: F32
    parted: _Parted | None
    moving: tuple[_Box, ...]
    mask: U8


def triangle_flows(
    source_px: F32,
    target_px: F32,
    triangles: _Indices,
    shown: npt.NDArray[np.bool_],
    opening: Opening,
    sizes: Sequence[tuple[int, int]],
) -> Iterator[Flow]:
    """The flows over regions of (width, height) `sizes`, whose points (n, p, 2) shall come from `source_px` to `target_px`.

    What is small is found for all of them before the first comes: it then stays in the CPU's caches.

    Args:
        triangles: (t, 3) into the points; of those that overlap the later covers the earlier.
        shown: (n, t), which of them each region has.
        opening: of the mouth among the points.
    """
    steps = [max(1, round(max(size) / _GRID)) for size in sizes]
    grids = [(-(-width // step), -(-height // step)) for (width, height), step in zip(sizes, steps, strict=True)]
    offset_px = np.ascontiguousarray((source_px - target_px).transpose(2, 0, 1))
    moved = (np.maximum(*np.abs(offset_px)) > _MOVED_PX)[:, triangles.T].any(axis=1)
    target = target_px.transpose(2, 0, 1) / np.array(steps, np.float32)[:, None]
    offsets_px, owner = _raster(target, offset_px, triangles, shown & moved, grids)
    moving = np.maximum(*np.abs(offsets_px)) > _STILL_PX
    side = np.concatenate([opening.side, _BETWEEN])[owner]
    upper_px, lower_px = target_px[:, opening.upper], target_px[:, opening.lower]
    torn = np.abs(offset_px[..., opening.upper] - offset_px[..., opening.lower]).max(axis=(0, 2)) > _TORN_PX
    coarse, end = [], 0
    for i, (columns, rows) in enumerate(grids):
        begin, end = end, end + columns * rows
        shape, step = (rows, columns), steps[i]
        offsets, moves = offsets_px[:, begin:end].reshape(2, *shape), moving[begin:end].reshape(shape)
        sides = side[begin:end].reshape(shape)
        parted = _parted(offsets, sides, upper_px[i], lower_px[i], step) if torn[i] else None
        if parted is not None:
            moves[parted.cells] = True
        mask = _mask(owner[begin:end].reshape(shape) >= 0, step)
        coarse.append(_Coarse(sizes[i], step, offsets, parted, tuple(_boxes(moves, step)), mask))
    return map(_flow, coarse)


def _flow(coarse: _Coarse) -> Flow:
    """The flow over a region, whose cells are known."""
    (width, height), step = coarse.size, coarse.step
    luma, chroma = (
        interpolated(places_of_cells(coarse.offsets_px, step, pixel_px=pixel_px), step, pixel_px)[
            :, : height // pixel_px, : width // pixel_px
        ]
        for pixel_px in (1, 2)
    )
    if coarse.parted is not None:
        _part(luma[_samples(coarse.parted.cells, step)], coarse.parted, step)
        box = _samples(coarse.parted.cells, step, pixel_px=2)
        np.multiply(luma[:, ::2, ::2][box], np.float32(0.5), out=chroma[box])
    return Flow(luma, chroma, coarse.moving, coarse.mask[:height, :width])


def _samples(cells: _Box, step: int, pixel_px: int = 1) -> tuple[slice, slice, slice]:
    """Where the samples of `cells` lie in places (2, h, w); a sample is `pixel_px` pixels wide and high."""
    rows, columns = (slice(along.start * step // pixel_px, along.stop * step // pixel_px) for along in cells)
    return slice(None), rows, columns


def _mask(owned: npt.NDArray[np.bool_], step: int) -> U8:
    """For each pixel of the cells (h, w) of `step` pixels, 255 if they are `owned` and 0 else: 0 to 255, softly."""
    rows, columns = owned.shape
    # Half cells, for an edge that does not widen with them.
    whole = owned.view(np.uint8) * np.uint8(255)
    halves = cv2.resize(whole, (2 * columns, 2 * rows), interpolation=cv2.INTER_NEAREST)
    soft = cv2.sepFilter2D(cv2.erode(halves, _NEXT), cv2.CV_32F, _SOFT, _SOFT).astype(np.uint8)
    return np.asarray(cv2.resize(soft, (columns * step, rows * step), interpolation=cv2.INTER_LINEAR), np.uint8)


def _boxes(moving: npt.NDArray[np.bool_], step: int) -> Iterator[_Box]:
    """Few boxes of pixels that together hold the `moving` cells (h, w), of `step` pixels, with those next to them, between which
    places are interpolated, and little else.
    """
    rows, columns = moving.shape
    high = max(1, round(_STRIP_PX / step))
    strips = np.zeros((-(-rows // high) * high, columns + 2), np.uint8)
    strips[:rows, 1:-1] = cv2.dilate(moving.view(np.uint8), _NEXT)
    strips = strips.reshape(-1, high, columns + 2).max(axis=1)
    of, edges = (found.tolist() for found in np.nonzero(strips[:, 1:] != strips[:, :-1]))
    for strip, first, end in zip(of[::2], edges[::2], edges[1::2], strict=True):
        yield np.s_[strip * high * step : (strip + 1) * high * step, first * step : end * step]


def places_of_cells(offsets_px: F32, step: int, left: int = 0, top: int = 0, pixel_px: int = 1) -> F32:
    """The places (along x and along y) to take the middles of cells (2, h, w) of `step` pixels from, given how far away those are,
    the first cell with its corner at (`left`, `top`); in samples of `pixel_px` pixels, 1 or 2, and of as many cells more on each
    side, (2, h + 2, w + 2) or more: whole samples.

    Places are to be interpolated, not offsets: what is linear comes out exactly.
    """
    _, rows, columns = offsets_px.shape
    below, right = pixel_px + rows % pixel_px, pixel_px + columns % pixel_px
    cells = np.empty((2, pixel_px + rows + below, pixel_px + columns + right), np.float32)
    for offsets, padded in zip(offsets_px, cells, strict=True):  # up to the edge, not the last middle
        cv2.copyMakeBorder(offsets, pixel_px, below, pixel_px, right, cv2.BORDER_REPLICATE, padded)
    if pixel_px > 1:
        cells *= np.float32(1 / pixel_px)
    # The middles of the cells, of which `pixel_px` lie before the corner.
    _, rows, columns = cells.shape
    at = np.arange(max(rows, columns), dtype=np.float32) * np.float32(step / pixel_px)
    x, y = (((0.5 - pixel_px) * step + corner) / pixel_px - 0.5 for corner in (left, top))
    cells[0] += at[:columns] + np.float32(x)
    cells[1] += (at[:rows] + np.float32(y))[:, None]
    return cells


def interpolated(cells: F32, step: int, pixel_px: int = 1) -> F32:
    """For each sample of all but the outer cells of :func:`places_of_cells` its place, (2, h * step, w * step) for pixels."""
    _, rows, columns = cells.shape
    places = np.empty((2, rows * step // pixel_px, columns * step // pixel_px), np.float32)
    for coarse, fine in zip(cells, places, strict=True):  # remapping with x and y apart is faster
        cv2.resize(coarse, fine.shape[::-1], fine, interpolation=cv2.INTER_LINEAR)
    return places[:, step:-step, step:-step]


def _raster(
    points: F32, offsets_px: F32, triangles: _Indices, shown: npt.NDArray[np.bool_], sizes: Sequence[tuple[int, int]]
) -> tuple[F32, _Indices]:
    """The offsets (2, m) in the middles of the cells of n grids of (width, height) `sizes`, one grid after the other, and the
    triangle of each cell, or -1.

    A cell belongs to the last of the `triangles` (t, 3) between the points (2, n, p), in cells, that is `shown` (n, t) in its grid
    and has its middle, else to the last that comes within half a cell of it. All rows of all triangles of all grids are looked at
    together.
    """
    width, height = np.array(sizes).T
    ends = np.cumsum(width * height)
    # The points of a grid from the highest to the lowest, so that the numbers of a triangle's tell which is its highest.
    _, grids, count = points.shape
    order = (np.argsort(points[1], axis=1) + count * np.arange(grids)[:, None]).ravel()
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    px, py = points.reshape(2, -1).take(order, axis=1) - np.float32(0.5)  # whole numbers are the middles of cells
    offset = offsets_px.reshape(2, -1).take(order, axis=1)
    one, two, three = (number.reshape(grids, count).take(corner, axis=1)[shown] for corner in triangles.T)
    grid, triangle = np.nonzero(shown)
    a, c = np.minimum(np.minimum(one, two), three), np.maximum(np.maximum(one, two), three)
    b = one + two + three - a - c
    ax, ay, bx, by, cy = px[a], py[a], px[b], py[b], py[c]
    abx, aby, acx, acy = bx - ax, by - ay, px[c] - ax, cy - ay
    area = abx * acy - aby * acx
    first, rows = _reached(ay, cy, height[grid])
    rows[np.abs(area) <= 1e-4] = 0
    over = np.array([aby, acy - aby, acy, area])  # to divide by
    over[over == 0] = 1
    upper, lower, longest = np.array([abx, acx - abx, acx]) / over[:3]
    # Each row of each triangle: where it enters and leaves it, on the edge from top to bottom and on one of the others.
    of = np.repeat(np.arange(len(rows)), rows)
    row = _counted(first, rows, of)
    middle = row.astype(np.float32)
    ax_of, ay_of, bx_of, by_of, cy_of, upper, lower, longest = np.array(
        [ax, ay, bx, by, cy, upper, lower, longest]
    ).take(of, axis=1)
    y = np.minimum(np.maximum(middle, ay_of), cy_of)
    below_a, below_b = y - ay_of, y - by_of
    edge = ax_of + below_a * longest
    other = bx_of + below_b * np.where(below_b < 0, upper, lower)
    left, right = np.minimum(edge, other), np.maximum(edge, other)
    wide = width[grid][of]
    begin, cells = _reached(left, right, wide)
    enter, leave = np.ceil(left).astype(np.intp), np.floor(right).astype(np.intp)
    leave[y != middle] = -1
    at = np.repeat(np.arange(len(of)), cells)
    corner = row * wide + (ends - width * height)[grid][of]  # the row's first cell
    place = _counted(corner + begin, cells, at)
    inside = np.flatnonzero((place >= (corner + enter)[at]) & (place <= (corner + leave)[at]))
    # Of the triangles that come near a cell the last that has its middle counts, else the last.
    which = np.full(ends[-1], -1, np.intp)
    which[place] = np.arange(len(place))
    which[place[inside]] = inside
    held = np.flatnonzero(which >= 0)
    which = which[held]
    at = at[which]
    mine = of[at]
    owner = np.full(ends[-1], -1, np.intp)
    owner[held] = triangle[mine]
    # The offset is affine in a triangle: it grows by `across` along x and by `along` along y.
    x = (held - corner[at]).astype(np.float32)
    from_x = np.minimum(np.maximum(x, left[at]), right[at]) - ax[mine]
    from_y = below_a[at]
    start = offset.take(a, axis=1)
    to_b, to_c = offset.take(b, axis=1) - start, offset.take(c, axis=1) - start
    across, along = (to_b * acy - to_c * aby) / over[3], (to_c * abx - to_b * acx) / over[3]
    start, across, along = np.array([start, across, along]).take(mine, axis=2)
    found = np.zeros((2, ends[-1]), np.float32)
    for values, told in zip(found, start + across * from_x + along * from_y, strict=True):
        values[held] = told
    return found, owner


def _reached(low: F32, high: F32, most: _Indices) -> tuple[_Indices, _Indices]:
    """The first of the whole numbers from 0 to `most` (n,) that come within a half of what lies between, and how many do."""
    half = np.float32(0.5)
    first = np.maximum(np.ceil(low - half), 0).astype(np.intp)
    return first, np.maximum(np.minimum(np.floor(high + half).astype(np.intp) + 1, most) - first, 0)


def _counted(first: _Indices, counts: _Indices, of: _Indices) -> _Indices:
    """From each `first` on so many whole numbers, one after the other; `of` tells to which each belongs."""
    return np.arange(len(of)) + (first - np.cumsum(counts) + counts)[of]


def _parted(offsets_px: F32, side: npt.NDArray[np.int8], upper_px: F32, lower_px: F32, step: int) -> _Parted | None:
    """How the lips go on over the opening, up to its middle, given the `side` (h, w) of the cells and the points (k, 2) of its
    edges; None where that is outside of the cells.

    Halfway between a cell of the one and a cell of the other pixels would be taken from what lay between the lips.
    """
    edges = np.concatenate([upper_px, lower_px[::-1]])
    left, top = (max(math.floor(low / step) - 2 * _REACH, 0) for low in edges.min(axis=0).tolist())
    right, bottom = (math.ceil(high / step) + 2 * _REACH for high in edges.max(axis=0).tolist())
    right, bottom = min(right, side.shape[1]), min(bottom, side.shape[0])
    if left >= right or top >= bottom:
        return None
    cells = np.s_[top:bottom, left:right]
    shape = ((bottom - top) * step, (right - left) * step)
    origin = np.array([left * step, top * step], np.float32)
    middle = (upper_px + lower_px) / 2 - origin
    along = middle[-1] - middle[0]
    first, last, down = middle[0] - along, middle[-1] + along, 4 * np.array([-along[1], along[0]])
    below = filled(np.array([first, *middle, last, last + down, first + down]), shape)
    reach = 2 * _REACH * step + 1
    near = np.asarray(cv2.dilate(filled(edges - origin, shape), np.ones((reach, reach), np.uint8)), np.uint8)
    offsets = offsets_px[:, *cells]
    upper, lower = (_continued(offsets, side[cells] == one) for one in (1, -1))
    return _Parted(cells, ((upper, near & ~below), (lower, near & below)))


def _continued(offsets_px: F32, known: npt.NDArray[np.bool_]) -> F32:
    """The offsets (2, h, w) of cells, those that are not `known` (h, w) being the mean of the known that are near, if any."""
    of_one = known.astype(np.float32)
    share = cv2.blur(of_one, (5, 5))
    near = np.array([cv2.blur(of * of_one, (5, 5)) for of in offsets_px])
    return np.where(known | (share <= 0), offsets_px, near / np.maximum(share, np.float32(1e-6)))


def _part(places: F32, parted: _Parted, step: int) -> None:
    """Let upper and lower lip each go on as they move, in the `places` (2, h, w) of the pixels of cells that part (in place)."""
    rows, columns = places.shape[1:]
    top, left = (along.start * step for along in parted.cells)
    for offsets_px, here in parted.lips:
        fine = interpolated(places_of_cells(offsets_px, step, left, top), step)
        for moved, onto in zip(fine, places, strict=True):
            cv2.copyTo(moved[:rows, :columns], here[:rows, :columns], onto)


def filled(points: F32, shape: tuple[int, ...]) -> U8:
    """A mask of `shape` (h, w), 255 within the polygon of `points` (n, 2), in continuous coordinates."""
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.round((points - 0.5) * 16).astype(np.int32)], 255, lineType=cv2.LINE_8, shift=4)
    return mask


def cubic(plane: F32, x_px: F32, y_px: F32, to: U8 | None = None) -> U8:
    """The levels of a plane at places (h, w), interpolated cubically; onto `to` where it is given. Floats are interpolated faster
    than bytes."""
    levels = cv2.remap(plane, x_px, y_px, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    cv2.threshold(levels, 0, 0, cv2.THRESH_TOZERO, levels)  # what cubic interpolation left below black
    return np.asarray(cv2.convertScaleAbs(levels, to), np.uint8)


def _floats(plane: U8) -> F32:
    """The levels of a plane, as interpolation is faster with; converted as a whole, not row by row."""
    return np.ascontiguousarray(plane).astype(np.float32)


def warped(picture: Picture, region: Region, flow: Flow) -> tuple[U8, U8, U8]:
    """The planes of `region`, each pixel taken from its place in it: y (h, w), u and v (h/2, w/2).

    Luma is interpolated cubically, chroma linearly.
    """
    y, u, v = picture.planes(region)
    luma = y.copy()
    floats = _floats(luma)
    x_px, y_px = flow.luma
    for box in flow.moving:
        cubic(floats, x_px[box], y_px[box], luma[box])
    x_px, y_px = flow.chroma
    edge = cv2.BORDER_REPLICATE
    moved_u, moved_v = (
        cv2.convertScaleAbs(cv2.remap(_floats(plane), x_px, y_px, cv2.INTER_LINEAR, borderMode=edge))
        for plane in (u, v)
    )
    return luma, np.asarray(moved_u, np.uint8), np.asarray(moved_v, np.uint8)
