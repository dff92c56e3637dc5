"""Give a drawn mouth the detail that the person's own has: neither softer nor sharper than the face around it, and as grainy.

Warping blurs, and what is painted is smooth. How much detail lips and open mouths have against the skin around them differs from
person to person and from lens to lens, so it is measured on the pictures as they come, before drawing: energy of the luma's
Laplacian in the lips, and in the opening, over that of a ring around the mouth. The drawn mouth is measured in the same way, and
a slow control sharpens (or softens) the two parts and adds grain, taken from the chin of the same picture, until they agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from beavervision.media import F32, U8, Patch, Picture
from beavervision.models import mesh

_RING_EYES = (0.15, 0.5)  # from the outer lip line to the ring's edges, in eye distances
_FEATHER_EYES = 0.03
_OPEN = 0.06  # inner lip gap in mouth widths, from which there is an opening to look at
_LEAST_PX = 16
_EVERY = 3  # one in so many pictures is measured
_PACE = 0.25  # of the controls, for each that is
_OWN_PACE = 0.05  # of the running mean of the person's own detail
_SOFTEN, _SHARPEN, _GRAIN = -0.9, 2.0, 1.5  # least and most of a control; most grain, against that of the skin
_TRIES = 6  # on the first picture
_FINE_PX, _FINE_EYES = 0.9, 0.006  # reach of the detail that is sharpened
_GRAIN_EYES = 0.32  # side of the chin's patch
_CHIN = (18, 200)  # the mesh points between which it lies


@dataclass(frozen=True, slots=True)
class _Detail:
    """The log of the energy against the ring's, None where there is too little to see."""

    lips: float | None
    opening: float | None

    @property
    def parts(self) -> tuple[float | None, float | None]:
        return self.lips, self.opening


class MouthDetail:
    """The control over one shot; the state of a stream."""

    def __init__(self) -> None:
        self._own: list[float | None] = [None, None]  # of lips and opening, running means
        self._controls = [0.0, 0.0]
        self._count = 0
        self._grain_of: tuple[Picture, int] | None = None

    def matched(self, picture: Picture, patch: Patch, tracked_px: F32, drawn_px: F32) -> Patch:
        """`patch`, for `picture` whose face lies at `tracked_px`, drawn with `drawn_px` (478, 3), with the right detail."""
        look = self._count % _EVERY == 0
        first = self._count == 0
        self._count += 1
        if look:
            for i, seen in enumerate(_detail(picture, tracked_px).parts):
                own = self._own[i]
                if seen is not None:
                    self._own[i] = seen if own is None else own + _OWN_PACE * (seen - own)
        made = self._with_detail(picture, patch, drawn_px)
        for _ in range(_TRIES if first else 1 if look else 0):
            self._control(_detail(picture.painted((made,)), drawn_px), 1.0 if first else _PACE)
            if first:
                made = self._with_detail(picture, patch, drawn_px)
        return made

    def _control(self, made: _Detail, pace: float) -> None:
        for i, seen in enumerate(made.parts):
            # An opening that was never seen shall be as the skin is.
            own = self._own[i] if self._own[i] is not None or i == 0 else 0.0
            if seen is None or own is None:
                continue
            now = self._controls[i]
            step = (
                pace * (1 + now) / 2 * float(np.clip(own - seen, -1.5, 1.5))
            )  # energy goes with (1 + control) squared
            self._controls[i] = float(np.clip(now + step, _SOFTEN, _SHARPEN))

    def _with_detail(self, picture: Picture, patch: Patch, points_px: F32) -> Patch:
        lips, opening = self._controls
        eyes_px = mesh.fit_pose(points_px).scale_px
        box = _box(points_px, 0.12 * eyes_px, patch)
        if box is None:
            return patch
        rows, columns = box
        at = patch.y[rows, columns]
        origin = np.array([patch.region.x_px + columns.start, patch.region.y_px + rows.start], np.float32)
        feather = max(0.6, _FEATHER_EYES * eyes_px)
        inside, outside = (
            cv2.GaussianBlur(_filled(points_px[ring, :2] - origin, at.shape), (0, 0), feather).astype(np.float32) / 255
            for ring in (mesh.INNER_LIP, mesh.OUTER_LIP)
        )
        outside = np.maximum(outside - inside, 0)
        values = at.astype(np.float32)
        fine = values - cv2.GaussianBlur(values, (0, 0), max(_FINE_PX, _FINE_EYES * eyes_px))
        values += fine * (lips * outside + opening * inside)
        grain = min(max(lips, 0.0), _GRAIN) * outside * 0.5 + min(max(opening, 0.0), _GRAIN) * inside
        if grain.max() > 0.02:
            values += grain * self._grain(picture, points_px, eyes_px, at.shape)
        y = patch.y.copy()
        y[rows, columns] = np.clip(values + 0.5, 0, 255).astype(np.uint8)
        return replace(patch, y=y)

    def _grain(self, picture: Picture, points_px: F32, eyes_px: float, shape: tuple[int, ...]) -> F32:
        """Grain like the chin's, (h, w): its finest residual, tiled by reflection from a place that changes with the picture."""
        if self._grain_of is None or self._grain_of[0] is not picture:
            self._grain_of = picture, self._count  # a still keeps its grain
        half = max(4, round(_GRAIN_EYES * eyes_px / 2))
        x, y = points_px[list(_CHIN), :2].mean(axis=0).astype(int)
        x, y = (int(np.clip(v, half, size - half)) for v, size in ((x, picture.width_px), (y, picture.height_px)))
        skin = picture.y[max(y - half, 0) : y + half, max(x - half, 0) : x + half].astype(np.float32)
        residual = skin - cv2.GaussianBlur(skin, (0, 0), 1.0)
        most = 2.5 * float(np.median(np.abs(residual))) / 0.6745  # what stands out is a hair or an edge, no grain
        residual = np.clip(residual, -most, most)
        rng = np.random.default_rng(self._grain_of[1])
        tiles = [-(-n // m) + 1 for n, m in zip(shape, residual.shape, strict=True)]
        tile = np.block([[residual, residual[:, ::-1]], [residual[::-1], residual[::-1, ::-1]]])
        whole = np.tile(tile, (tiles[0] // 2 + 1, tiles[1] // 2 + 1))
        dy, dx = (int(rng.integers(0, a - b + 1)) for a, b in zip(whole.shape, shape, strict=True))
        return np.asarray(whole[dy : dy + shape[0], dx : dx + shape[1]], np.float32)


def _detail(picture: Picture, points_px: F32) -> _Detail:
    eyes_px = mesh.fit_pose(points_px).scale_px
    lips = points_px[mesh.OUTER_LIP, :2]
    reach = _RING_EYES[1] * eyes_px + 2
    x0, y0 = np.maximum(np.floor(lips.min(axis=0) - reach).astype(int), 0)
    x1, y1 = np.ceil(lips.max(axis=0) + reach).astype(int)
    luma = picture.y[y0:y1, x0:x1]
    if min(luma.shape) < 8:
        return _Detail(None, None)
    energy = cv2.Laplacian(luma, cv2.CV_32F)
    energy *= energy
    local = lips - np.array([x0, y0], np.float32)
    mouth = _filled(local, luma.shape)
    inside = _filled(points_px[mesh.INNER_LIP, :2] - np.array([x0, y0], np.float32), luma.shape)
    ring = _filled(_grown(local, _RING_EYES[1] * eyes_px), luma.shape)
    ring[_filled(_grown(local, _RING_EYES[0] * eyes_px), luma.shape) > 0] = 0
    if not ring.any():
        return _Detail(None, None)
    mouth[inside > 0] = 0
    around = cv2.mean(energy, ring)[0] + 1e-2

    def against_ring(mask: U8) -> float | None:
        seen = cv2.mean(energy, mask)[0] if cv2.countNonZero(mask) >= _LEAST_PX else 0.0
        return float(np.log(seen / around)) if seen > 0 else None

    is_open = mesh.opening(points_px) > _OPEN
    return _Detail(against_ring(mouth), against_ring(inside) if is_open else None)


def _grown(points: F32, by_px: float) -> F32:
    outward = points - points.mean(axis=0)
    return np.asarray(points + by_px * outward / (np.linalg.norm(outward, axis=1, keepdims=True) + 1e-6), np.float32)


def _filled(points: F32, shape: tuple[int, ...]) -> U8:
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.round((points - 0.5) * 16).astype(np.int32)], 255, lineType=cv2.LINE_8, shift=4)
    return mask


def _box(points_px: F32, margin_px: float, patch: Patch) -> tuple[slice, slice] | None:
    """The lips within the patch; None where they lie outside."""
    lips = points_px[mesh.OUTER_LIP, :2] - np.array([patch.region.x_px, patch.region.y_px], np.float32)
    x0, y0 = np.maximum(np.floor(lips.min(axis=0) - margin_px).astype(int), 0)
    x1, y1 = np.minimum(np.ceil(lips.max(axis=0) + margin_px).astype(int), patch.y.shape[::-1])
    return (slice(int(y0), int(y1)), slice(int(x0), int(x1))) if min(x1 - x0, y1 - y0) >= 8 else None
