"""Move the pixels of a region of a picture, on its planes: piecewise affine over triangles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from beavervision.media import F32, U8, Picture, Region

_GRID = 80  # cells along the longer side of a region, in which the triangles are found
_TORN_PX = 0.3  # between the offsets of upper and lower edge: less is no tear
_REACH = 2  # cells around the mouth's opening in which its sides are told apart


@dataclass(frozen=True, slots=True, eq=False)
class Opening:
    """Where a face may tear: the points of the mouth's opening along its upper and its lower edge, from corner to corner (k,), and
    of each triangle (t,) which side it is on: 1 above, -1 below, 0 between.
    """

    upper: npt.NDArray[np.intp]
    lower: npt.NDArray[np.intp]
    side: npt.NDArray[np.int8]


def triangle_flow(
    source_px: F32, target_px: F32, triangles: npt.NDArray[np.intp], opening: Opening, size: tuple[int, int]
) -> tuple[F32, F32]:
    """For each pixel of (width, height) `size`, the place to take it from, and the soft mask of what moves.

    Args:
        source_px, target_px: (n, 2) where the points are and where they shall come to lie.
        triangles: (t, 3) into the points; of those that overlap the later covers the earlier.
        opening: of the mouth among the points.

    Returns:
        The places (h, w, 2), 0 being the middle of the first pixel, and the mask (h, w), 0 to 1.
    """
    step = max(1, round(max(size) / _GRID))
    small = (-(-size[0] // step), -(-size[1] // step))
    full = (small[0] * step, small[1] * step)
    offset_px = source_px - target_px
    moved = (np.abs(offset_px).max(axis=1) > 0.05)[triangles].any(axis=1)
    triangles = triangles[moved]
    coarse, owner = _raster(target_px[triangles] / np.float32(step), offset_px[triangles], small)
    where = places_of(coarse, step)[: size[1], : size[0]]
    if np.abs(offset_px[opening.upper] - offset_px[opening.lower]).max() > _TORN_PX:
        side = np.append(opening.side[moved], np.int8(0))[owner]
        _part(where, coarse, side, target_px[opening.upper], target_px[opening.lower], step)
    # Half cells, for an edge that does not widen with them.
    inside = cv2.resize((owner >= 0).astype(np.uint8), (2 * small[0], 2 * small[1]), interpolation=cv2.INTER_NEAREST)
    soft = cv2.GaussianBlur(cv2.erode(inside, np.ones((3, 3), np.uint8)).astype(np.float32), (0, 0), 1.5)
    mask = cv2.resize(soft, full, interpolation=cv2.INTER_LINEAR)[: size[1], : size[0]]
    return where, np.asarray(mask, np.float32)


def places_of(offsets_px: F32, step: int, left: int = 0, top: int = 0) -> F32:
    """For each pixel (h * step, w * step, 2), the place to take it from, given how far away that is from the middles of cells
    (h, w) of `step` pixels, the first with its corner at (`left`, `top`).

    Places are interpolated, not offsets: what is linear comes out exactly.
    """
    return interpolated(places_of_cells(offsets_px, step, left, top), step)


def places_of_cells(offsets_px: F32, step: int, left: int = 0, top: int = 0) -> F32:
    """The same for the middles of the cells, and for one cell more on each side, (h + 2, w + 2, 2)."""
    cells: Any = cv2.copyMakeBorder(offsets_px, 1, 1, 1, 1, cv2.BORDER_REPLICATE)  # up to the edge, not the last middle
    rows, columns = cells.shape[:2]
    cells[..., 0] += (np.arange(columns, dtype=np.float32) - np.float32(0.5)) * step + np.float32(left - 0.5)
    cells[..., 1] += ((np.arange(rows, dtype=np.float32) - np.float32(0.5)) * step + np.float32(top - 0.5))[:, None]
    return np.asarray(cells, np.float32)


def interpolated(cells: F32, step: int) -> F32:
    """For each pixel of all but the outer cells (h + 2, w + 2, 2) its place, (h * step, w * step, 2)."""
    rows, columns = cells.shape[:2]
    fine: Any = cv2.resize(cells, (columns * step, rows * step), interpolation=cv2.INTER_LINEAR)
    return np.asarray(fine[step:-step, step:-step], np.float32)


def _raster(corners: F32, offsets_px: F32, size: tuple[int, int]) -> tuple[F32, npt.NDArray[np.intp]]:
    """The offsets (h, w, 2) in the middles of (width, height) `size` cells, and the triangle that each belongs to, or -1.

    A cell belongs to the last of the triangles (t, 3, 2), whose corners are in cells, that has its middle, else to the last that
    comes within half a cell of it. All rows of all triangles are looked at together.
    """
    width, height = size
    corners = corners - np.float32(0.5)  # whole numbers are the middles of cells
    a, b, c = corners[:, 0], corners[:, 1], corners[:, 2]
    ab, ac = b - a, c - a
    area = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
    top, bottom = corners[..., 1].min(axis=1), corners[..., 1].max(axis=1)
    first = np.maximum(np.ceil(top - 0.5), 0)
    rows = np.minimum(np.floor(bottom + 0.5), height - 1) - first + 1
    seen = np.flatnonzero((rows > 0) & (np.abs(area) > 1e-4))
    rows = rows[seen].astype(np.intp)
    # Each row of each triangle: where it enters and leaves it.
    of = np.repeat(seen, rows)
    row = _counted(rows) + first[of].astype(np.intp)
    y = np.clip(row.astype(np.float32), top[of], bottom[of])
    left, right = np.full(len(of), np.inf, np.float32), np.full(len(of), -np.inf, np.float32)
    for p, q in ((a, b), (b, c), (c, a)):
        rise = q[:, 1] - p[:, 1]
        slope = (q[:, 0] - p[:, 0]) / np.where(rise == 0, np.float32(1), rise)
        down = (y - p[of, 1]) * np.sign(rise)[of]
        crosses = (down >= 0) & (down <= np.abs(rise)[of])
        x = p[of, 0] + (y - p[of, 1]) * slope[of]
        np.minimum(left, x, out=left, where=crosses)
        np.maximum(right, x, out=right, where=crosses)
    begin = np.maximum(np.ceil(left - 0.5), 0)
    cells = np.maximum(np.minimum(np.floor(right + 0.5), width - 1) - begin + 1, 0).astype(np.intp)
    at = np.repeat(np.arange(len(of)), cells)
    x = begin[at] + _counted(cells)
    held = np.clip(x, left[at], right[at])
    place = row[at] * width + x.astype(np.intp)
    inside = np.flatnonzero((held == x) & (y == row)[at])
    # Of the triangles that come near a cell the last that has its middle counts, else the last.
    which = np.full(width * height, -1, np.intp)
    which[place] = np.arange(len(place))
    which[place[inside]] = inside
    held_by = np.flatnonzero(which >= 0)
    which = which[held_by]
    at, held = at[which], held[which].astype(np.float32)
    owner = np.full(width * height, -1, np.intp)
    owner[held_by] = mine = of[at]
    # The offset is affine in a triangle: it grows by `across` along x and by `along` along y.
    e1, e2 = offsets_px[:, 1] - offsets_px[:, 0], offsets_px[:, 2] - offsets_px[:, 0]
    area = np.where(area == 0, np.float32(1), area)[:, None]
    across = (e1 * ac[:, 1:] - e2 * ab[:, 1:]) / area
    along = (e2 * ab[:, :1] - e1 * ac[:, :1]) / area
    from_a = np.stack([held, y[at]], axis=1) - a[mine]
    found = np.zeros((width * height, 2), np.float32)
    found[held_by] = offsets_px[mine, 0] + across[mine] * from_a[:, :1] + along[mine] * from_a[:, 1:]
    return found.reshape(height, width, 2), owner.reshape(height, width)


def _counted(counts: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """0 to n - 1 for each n of `counts`, one after the other."""
    return np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)


def _part(where: F32, coarse: F32, side: npt.NDArray[np.int8], upper_px: F32, lower_px: F32, step: int) -> None:
    """Let upper and lower lip each go on as they move (in place) over the opening, up to its middle: halfway between a cell of the
    one and a cell of the other pixels would be taken from what lay between the lips.
    """
    edges = np.concatenate([upper_px, lower_px[::-1]])
    low = np.clip(np.floor(edges.min(axis=0) / step).astype(int) - 2 * _REACH, 0, side.shape[::-1])
    high = np.clip(np.ceil(edges.max(axis=0) / step).astype(int) + 2 * _REACH, 0, side.shape[::-1])
    if (high - low).min() < 1:
        return
    cells = np.s_[low[1] : high[1], low[0] : high[0]]
    size = tuple(((high - low) * step).tolist())
    origin = (low * step).astype(np.float32)
    middle = (upper_px + lower_px) / 2 - origin
    along = middle[-1] - middle[0]
    down = np.array([-along[1], along[0]])
    beyond = np.stack([middle[0] - along, middle[-1] + along])
    below = filled(np.concatenate([beyond[:1], middle, beyond[1:], beyond[::-1] + 4 * down]), size[::-1])
    reach = 2 * _REACH * step + 1
    near = np.asarray(cv2.dilate(filled(edges - origin, size[::-1]), np.ones((reach, reach), np.uint8)), np.uint8)
    box = where[low[1] * step : high[1] * step, low[0] * step : high[0] * step]
    for one, here in ((1, near & ~below), (-1, near & below)):
        of_one = (side[cells] == one).astype(np.float32)
        around = cv2.blur(cv2.merge([*cv2.split(coarse[cells]), np.ones_like(of_one)]) * of_one[..., None], (5, 5))
        guess = around[..., :2] / np.maximum(around[..., 2:], np.float32(1e-6))
        whole = np.where((of_one > 0)[..., None] | (around[..., 2:] <= 0), coarse[cells], guess)
        fine = places_of(whole, step, *(low * step).tolist())[: box.shape[0], : box.shape[1]]
        cv2.copyTo(np.ascontiguousarray(fine), here[: box.shape[0], : box.shape[1]], box)


def filled(points: F32, shape: tuple[int, ...]) -> U8:
    """A mask of `shape` (h, w), 255 within the polygon of `points` (n, 2), in continuous coordinates."""
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.round((points - 0.5) * 16).astype(np.int32)], 255, lineType=cv2.LINE_8, shift=4)
    return mask


def warped(picture: Picture, region: Region, where: F32) -> tuple[U8, U8, U8]:
    """The planes of `region`, each pixel taken from its place `where` (h, w, 2) in it: y (h, w), u and v (h/2, w/2).

    Luma is interpolated cubically, chroma linearly.
    """
    y, u, v = picture.planes(region)
    edge = cv2.BORDER_REPLICATE
    # OpenCV interpolates floats faster than bytes.
    luma = cv2.remap(y.astype(np.float32), where, None, cv2.INTER_CUBIC, borderMode=edge)  # type: ignore[call-overload]
    # Chroma sample i covers pixels 2i and 2i + 1; from one to the next the offset changes by less than chroma shows.
    half = where[::2, ::2] * np.float32(0.5)
    chroma = cv2.remap(cv2.merge([u, v]), half, None, cv2.INTER_LINEAR, borderMode=edge)  # type: ignore[call-overload]
    moved_u, moved_v = cv2.split(chroma)
    rounded = cv2.add(luma, 0.0, dtype=cv2.CV_8U)  # type: ignore[call-overload]
    return np.asarray(rounded, np.uint8), np.asarray(moved_u, np.uint8), np.asarray(moved_v, np.uint8)
