"""Move the pixels of a region of a picture, on its planes: piecewise affine over triangles."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from beavervision.media import F32, U8, Picture, Region

_GRID = 128  # cells along the longer side of a region, in which the triangles are found
_TORN = 0.5  # cells between the offsets of a cell and that below it: more than by any smooth motion


def triangle_flow(
    source_px: F32, target_px: F32, triangles: npt.NDArray[np.intp], size: tuple[int, int]
) -> tuple[F32, F32]:
    """For each pixel of (width, height) `size`, where to take it from, and the soft mask of what moves.

    Args:
        source_px, target_px: (n, 2) where the points are and where they shall come to lie.
        triangles: (t, 3) into the points; of those that overlap the later covers the earlier.

    Returns:
        The offsets (h, w, 2) from a pixel to its source, and the mask (h, w), 0 to 1.
    """
    step = max(1, round(max(size) / _GRID))
    small = (-(-size[0] // step), -(-size[1] // step))
    moved = np.abs(source_px - target_px).max(axis=1) > 0.05
    triangles = triangles[moved[triangles].any(axis=1)]
    corners = target_px[triangles]
    a, b, c = (corners[:, i].astype(np.float64) for i in range(3))
    area = (b[:, 0] - a[:, 0]) * (c[:, 1] - a[:, 1]) - (b[:, 1] - a[:, 1]) * (c[:, 0] - a[:, 0])
    kept = np.abs(area) > 1e-3
    number = np.zeros((small[1], small[0]), np.int32)
    fixed = np.round(corners[kept] * (16 / step) - 8).astype(np.int32)
    for i, triangle in enumerate(fixed, 1):
        cv2.fillConvexPoly(number, triangle, i, lineType=cv2.LINE_8, shift=4)
    # Affine offset of each triangle: offset(x, y) = gradient @ (x, y) + start, exact at its corners. Slivers have steep
    # gradients, so that a pixel a little outside of one is held within the offsets of its corners.
    a, b, c, area = a[kept], b[kept], c[kept], area[kept, None]
    offset = (source_px - target_px).astype(np.float64)[triangles[kept]]
    e1, e2 = offset[:, 1] - offset[:, 0], offset[:, 2] - offset[:, 0]
    gx = (e1 * (c - a)[:, 1:] - e2 * (b - a)[:, 1:]) / area
    gy = (e2 * (b - a)[:, :1] - e1 * (c - a)[:, :1]) / area
    start = offset[:, 0] - gx * a[:, :1] - gy * a[:, 1:]
    table = np.zeros((len(fixed) + 1, 10), np.float32)
    table[1:] = np.concatenate([gx, gy, start, offset.min(axis=1), offset.max(axis=1)], axis=1)
    x = ((np.arange(small[0], dtype=np.float32) + 0.5) * step)[:, None]
    y = ((np.arange(small[1], dtype=np.float32) + 0.5) * step)[:, None, None]
    coarse = _offsets(table.take(number, axis=0), x, y)
    inside = (number > 0).astype(np.float32)
    full = (small[0] * step, small[1] * step)
    flow: Any = cv2.resize(coarse, full, interpolation=cv2.INTER_LINEAR)[: size[1], : size[0]]
    if step > 1:
        _mend(flow, coarse, corners[kept], table, step)
    soft = cv2.GaussianBlur(cv2.erode(inside, np.ones((3, 3), np.uint8)), (0, 0), 1.5)
    mask = cv2.resize(soft, full, interpolation=cv2.INTER_LINEAR)[: size[1], : size[0]]
    return np.asarray(flow, np.float32), np.asarray(mask, np.float32)


def _offsets(row: F32, x: F32, y: F32) -> F32:
    return np.clip(row[..., 0:2] * x + row[..., 2:4] * y + row[..., 4:6], row[..., 6:8], row[..., 8:10])


def _mend(flow: F32, coarse: F32, corners_px: F32, table: F32, step: int) -> None:
    """Find the triangles to the pixel (in place) where a cell and the one below come from afar, as upper and lower lip do: between
    them pixels would be taken from what lay between the lips.
    """
    torn = np.zeros(coarse.shape[:2], np.uint8)
    apart = np.abs(coarse[1:, :, 1] - coarse[:-1, :, 1]) > _TORN * step
    torn[1:][apart] = 1
    torn[:-1][apart] = 1
    torn = np.asarray(cv2.dilate(torn, np.ones((1, 3), np.uint8)), np.uint8)
    x, y, width, height = cv2.boundingRect(torn)
    if not width:
        return
    here = np.s_[y : y + height, x : x + width]
    number = np.zeros((height * step, width * step), np.int32)
    origin = np.array([x, y], np.float32) * step
    # Only the triangles that have torn cells in their bounds.
    count = cv2.integral(torn)
    cells = np.array(torn.shape[::-1])
    x0, y0 = np.clip(np.floor(corners_px.min(axis=1) / step).astype(int), 0, cells).T
    x1, y1 = np.clip(np.ceil(corners_px.max(axis=1) / step).astype(int), 0, cells).T
    near = np.flatnonzero(count[y1, x1] - count[y0, x1] - count[y1, x0] + count[y0, x0])
    fixed = np.round((corners_px[near] - origin) * 16 - 8).astype(np.int32)
    for i, triangle in zip(near, fixed, strict=True):
        cv2.fillConvexPoly(number, triangle, int(i) + 1, lineType=cv2.LINE_8, shift=4)
    box = flow[y * step : (y + height) * step, x * step : (x + width) * step]
    fine = cv2.resize(torn[here], number.shape[::-1], interpolation=cv2.INTER_NEAREST)
    rows, columns = np.nonzero(
        (fine[: box.shape[0], : box.shape[1]] > 0) & (number[: box.shape[0], : box.shape[1]] > 0)
    )
    at = np.stack([columns, rows], axis=1).astype(np.float32) + origin + np.float32(0.5)
    box[rows, columns] = _offsets(table[number[rows, columns]], at[:, :1], at[:, 1:])


def warped(picture: Picture, region: Region, flow: F32) -> tuple[U8, U8, U8]:
    """The planes of `region`, each pixel taken from `flow` (h, w, 2) beside it: y (h, w), u and v (h/2, w/2).

    Luma is interpolated cubically, chroma linearly.
    """
    y, u, v = picture.planes(region)
    size = (region.width_px, region.height_px)
    where = cv2.add(flow, _grid(*size))
    edge = cv2.BORDER_REPLICATE
    luma = cv2.remap(y, where, None, cv2.INTER_CUBIC, borderMode=edge)  # type: ignore[call-overload]
    # The middle of 2 x 2 pixels; chroma sample i covers pixels 2i and 2i + 1, so it lies at 2i + 0.5.
    half = cv2.resize(where, (size[0] // 2, size[1] // 2), interpolation=cv2.INTER_AREA)
    half = cv2.addWeighted(half, 0.5, half, 0.0, -0.25)
    chroma = [cv2.remap(p, half, None, cv2.INTER_LINEAR, borderMode=edge) for p in (u, v)]  # type: ignore[call-overload]
    return np.asarray(luma, np.uint8), np.asarray(chroma[0], np.uint8), np.asarray(chroma[1], np.uint8)


@lru_cache(maxsize=8)
def _grid(width: int, height: int) -> F32:
    """(height, width, 2): the index of each pixel."""
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return np.dstack([x, y])
