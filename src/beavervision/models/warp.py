"""Move the pixels of a region of a picture, on its planes: piecewise affine over triangles."""

from __future__ import annotations

import math
from collections.abc import Iterator
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


def triangle_flow(source_px: F32, target_px: F32, triangles: _Indices, opening: Opening, size: tuple[int, int]) -> Flow:
    """The flow over a region of (width, height) `size`, whose points (n, 2) shall come from `source_px` to `target_px`.

    Args:
        triangles: (t, 3) into the points; of those that overlap the later covers the earlier.
        opening: of the mouth among the points.
    """
    step = max(1, round(max(size) / _GRID))
    columns, rows = (-(-side // step) for side in size)
    target, offset = np.ascontiguousarray(target_px.T), np.ascontiguousarray((source_px - target_px).T)
    moved = (np.maximum(*np.abs(offset)) > _MOVED_PX)[triangles.T].any(axis=0)
    offsets, owner = _raster(target / np.float32(step), offset, triangles[moved], (columns, rows))
    luma, chroma = (
        interpolated(places_of_cells(offsets, step, pixel_px=pixel_px), step, pixel_px)[
            :, : size[1] // pixel_px, : size[0] // pixel_px
        ]
        for pixel_px in (1, 2)
    )
    moving = np.maximum(*np.abs(offsets)) > _STILL_PX
    if np.abs(offset[:, opening.upper] - offset[:, opening.lower]).max() > _TORN_PX:
        side = np.concatenate([opening.side[moved], _BETWEEN])[owner]
        cells = _part(luma, offsets, side, target_px[opening.upper], target_px[opening.lower], step)
        moving[cells] = True
        box = (slice(None), *(slice(c.start * step // 2, c.stop * step // 2) for c in cells))
        np.multiply(luma[:, ::2, ::2][box], np.float32(0.5), out=chroma[box])
    moving = cv2.dilate(moving.view(np.uint8), _NEXT) > 0  # places are interpolated
    # Half cells, for an edge that does not widen with them.
    owned = (owner >= 0).view(np.uint8) * np.uint8(255)
    inside = cv2.resize(owned, (2 * columns, 2 * rows), interpolation=cv2.INTER_NEAREST)
    soft = cv2.sepFilter2D(cv2.erode(inside, _NEXT), cv2.CV_32F, _SOFT, _SOFT)
    mask = cv2.resize(soft.astype(np.uint8), (columns * step, rows * step), interpolation=cv2.INTER_LINEAR)
    mask = mask[: size[1], : size[0]]
    return Flow(luma, chroma, tuple(_boxes(moving, step)), np.asarray(mask, np.uint8))


def _boxes(moving: npt.NDArray[np.bool_], step: int) -> Iterator[_Box]:
    """Few boxes of pixels that together hold the `moving` cells (h, w), of `step` pixels, and little else."""
    rows, columns = moving.shape
    high = max(1, round(_STRIP_PX / step))
    strips = np.zeros((-(-rows // high) * high, columns + 2), np.uint8)
    strips[:rows, 1:-1] = moving
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


def _raster(points: F32, offsets_px: F32, triangles: _Indices, size: tuple[int, int]) -> tuple[F32, _Indices]:
    """The offsets (2, h, w) in the middles of (width, height) `size` cells, and the triangle of each, or -1.

    A cell belongs to the last of the `triangles` (t, 3) between the points (2, n), in cells, that has its middle, else
    to the last that comes within half a cell of it. All rows of all triangles are looked at together.
    """
    width, height = size
    # The points from the highest to the lowest, so that the numbers of a triangle's tell which is its highest.
    order = np.argsort(points[1])
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    px, py = (along[order] - np.float32(0.5) for along in points)  # whole numbers are the middles of cells
    one, two, three = number[triangles.T]
    a, c = np.minimum(np.minimum(one, two), three), np.maximum(np.maximum(one, two), three)
    b = one + two + three - a - c
    ax, ay, bx, by, cy = px[a], py[a], px[b], py[b], py[c]
    abx, aby, acx, acy = bx - ax, by - ay, px[c] - ax, cy - ay
    area = abx * acy - aby * acx
    first, rows = _reached(ay, cy, height)
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
    begin, cells = _reached(left, right, width)
    at = np.repeat(np.arange(len(of)), cells)
    x = _counted(begin, cells, at)
    place = x + (row * width)[at]
    enter, leave = np.ceil(left).astype(np.intp), np.floor(right).astype(np.intp)
    leave[y != middle] = -1
    inside = np.flatnonzero((x >= enter[at]) & (x <= leave[at]))
    # Of the triangles that come near a cell the last that has its middle counts, else the last.
    which = np.full(width * height, -1, np.intp)
    which[place] = np.arange(len(place))
    which[place[inside]] = inside
    held = np.flatnonzero(which >= 0)
    which = which[held]
    at = at[which]
    owner = np.full(width * height, -1, np.intp)
    owner[held] = mine = of[at]
    # The offset is affine in a triangle: it grows by `across` along x and by `along` along y.
    from_x = np.minimum(np.maximum(x[which].astype(np.float32), left[at]), right[at]) - ax[mine]
    from_y = below_a[at]
    offset = offsets_px.take(order, axis=1)
    start = offset.take(a, axis=1)
    to_b, to_c = offset.take(b, axis=1) - start, offset.take(c, axis=1) - start
    across, along = (to_b * acy - to_c * aby) / over[3], (to_c * abx - to_b * acx) / over[3]
    start, across, along = np.array([start, across, along]).take(mine, axis=2)
    found = np.zeros((2, width * height), np.float32)
    for values, told in zip(found, start + across * from_x + along * from_y, strict=True):
        values[held] = told
    return found.reshape(2, height, width), owner.reshape(height, width)


def _reached(low: F32, high: F32, most: int) -> tuple[_Indices, _Indices]:
    """The first of the whole numbers from 0 to `most` that come within a half of what lies between, and how many do."""
    half = np.float32(0.5)
    first = np.maximum(np.ceil(low - half), 0).astype(np.intp)
    return first, np.maximum(np.minimum(np.floor(high + half).astype(np.intp) + 1, most) - first, 0)


def _counted(first: _Indices, counts: _Indices, of: _Indices) -> _Indices:
    """From each `first` on so many whole numbers, one after the other; `of` tells to which each belongs."""
    return np.arange(len(of)) + (first - np.cumsum(counts) + counts)[of]


def _part(places: F32, offsets_px: F32, side: npt.NDArray[np.int8], upper_px: F32, lower_px: F32, step: int) -> _Box:
    """Let upper and lower lip each go on as they move (in place) over the opening, up to its middle: halfway between a cell of the
    one and a cell of the other pixels would be taken from what lay between the lips.

    Returns the cells that this may have changed.
    """
    edges = np.concatenate([upper_px, lower_px[::-1]])
    left, top = (max(math.floor(low / step) - 2 * _REACH, 0) for low in edges.min(axis=0).tolist())
    right, bottom = (math.ceil(high / step) + 2 * _REACH for high in edges.max(axis=0).tolist())
    right, bottom = min(right, side.shape[1]), min(bottom, side.shape[0])
    cells = np.s_[top:bottom, left:right]
    if left >= right or top >= bottom:
        return cells
    shape = ((bottom - top) * step, (right - left) * step)
    origin = np.array([left * step, top * step], np.float32)
    middle = (upper_px + lower_px) / 2 - origin
    along = middle[-1] - middle[0]
    down = np.array([-along[1], along[0]])
    beyond = np.stack([middle[0] - along, middle[-1] + along])
    below = filled(np.concatenate([beyond[:1], middle, beyond[1:], beyond[::-1] + 4 * down]), shape)
    reach = 2 * _REACH * step + 1
    near = np.asarray(cv2.dilate(filled(edges - origin, shape), np.ones((reach, reach), np.uint8)), np.uint8)
    boxes = places[:, top * step : bottom * step, left * step : right * step]
    rows, columns = boxes.shape[1:]
    offsets = offsets_px[:, *cells]
    for one, here in ((1, near & ~below), (-1, near & below)):
        of_one = (side[cells] == one).astype(np.float32)
        share = cv2.blur(of_one, (5, 5))
        own = (of_one > 0) | (share <= 0)
        share = np.maximum(share, np.float32(1e-6))
        near_one = np.array([cv2.blur(of * of_one, (5, 5)) for of in offsets])
        whole = np.where(own, offsets, near_one / share)
        fine = interpolated(places_of_cells(whole, step, left * step, top * step), step)
        for moved, box in zip(fine, boxes, strict=True):
            cv2.copyTo(moved[:rows, :columns], here[:rows, :columns], box)
    return cells


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
