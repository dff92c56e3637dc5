"""Give a drawn mouth the detail that the person's own has: neither softer nor sharper than the face around it, and as grainy.

Warping blurs, and what is painted is smooth. How much detail lips and open mouths have against the skin around them differs from
person to person and from lens to lens, so it is measured on the pictures as they come, before drawing: energy of the luma's
Laplacian in the lips, and in the opening, over that of a ring around the mouth. The drawn mouth is measured in the same way, and
a control sharpens (or softens) the two parts and adds grain, taken from the chin of the same picture, until they agree.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from beavervision.media import F32, U8, Patch, Picture, mixed
from beavervision.models import mesh
from beavervision.models.warp import filled

_RING_EYES = (0.15, 0.5)  # from the outer lip line to the ring's edges, in eye distances
_FEATHER_EYES, _LINE_EYES = 0.03, 0.03
_OPEN = 0.06  # inner lip gap in mouth widths, from which there is an opening to look at
_LEAST_PX = 16
_EVERY = 4  # one in so many pictures is measured, at most
_EVERY_PX = 54.0  # of eye distance, for each of them: what is small is quickly measured, and jumps more
_PACE = 0.8  # of the controls, for each that is
_OWN_PACE = 0.6  # of the running mean of the person's own detail, which goes with what the mouth does
_GLIDE = 0.85  # of the way to where the controls shall be, for each picture: they must not be seen to step
_SOFTEN, _SHARPEN, _SHARPEN_LIPS = -0.9, 2.5, 1.6  # least and most of the controls
_HELP = 0.8
_GRAIN = 1.5  # most, against that of the skin
_TRIES = 6  # on the first picture, and on the first where own and drawn mouth are known open
_FINE_PX, _FINE_EYES = 0.9, 0.006  # reach of the detail that is sharpened
_GRAIN_EYES = 0.32  # side of the chin's patch
_STEPS = (73, 151)  # by which the grain moves from picture to picture, prime
_CHIN = (18, 200)  # the mesh points between which it lies


@dataclass(frozen=True, slots=True)
class _Detail:
    """The log of the energy against the ring's, None where there is too little to see: of the lips without the line between
    them, of the opening, and of the whole mouth.
    """

    lips: float | None = None
    opening: float | None = None
    mouth: float | None = None

    def toward(self, other: _Detail, pace: float) -> _Detail:
        """The running mean, with what is seen in `other`."""

        def mean(a: float | None, b: float | None) -> float | None:
            return b if a is None else a if b is None else a + pace * (b - a)

        return _Detail(mean(self.lips, other.lips), mean(self.opening, other.opening), mean(self.mouth, other.mouth))


class MouthDetail:
    """The control over one shot; the state of a stream."""

    def __init__(self) -> None:
        self._own = _Detail()  # the person's, a running mean
        self._lips = self._opening = 0.0  # the controls
        self._lips_to = self._opening_to = 0.0  # and where they glide to
        self._count = 0
        self._opened = False  # whether a drawn mouth was open since the person's own was
        self._grain_of: tuple[Picture, int] | None = None

    def matched(self, picture: Picture, patch: Patch, tracked_px: F32, drawn_px: F32) -> Patch:
        """`patch`, for `picture` whose face lies at `tracked_px`, drawn with `drawn_px` (478, 3), with the right detail."""
        first = self._count == 0
        every = int(np.clip(round(_eyes(tracked_px) / _EVERY_PX), 1, _EVERY))
        look = self._count % every == 0
        self._count += 1
        if look:
            pace = max(_OWN_PACE, every / (every + self._count))
            self._own = self._own.toward(_detail(picture, None, tracked_px), pace)
        opens = not self._opened and self._own.opening is not None and mesh.opening(drawn_px) > _OPEN
        self._opened |= opens
        look |= opens
        self._lips += _GLIDE * (self._lips_to - self._lips)
        self._opening += _GLIDE * (self._opening_to - self._opening)
        made = self._with_detail(picture, patch, drawn_px)
        for _ in range(_TRIES if first or opens else 1 if look else 0):
            self._control(_detail(picture, made, drawn_px), 1.0 if first else _PACE, 1.0 if opens else _PACE)
            if first or opens:
                self._lips, self._opening = self._lips_to, self._opening_to
                made = self._with_detail(picture, patch, drawn_px)
        return made

    def _control(self, made: _Detail, lips_pace: float, opening_pace: float) -> None:
        # An opening that was never seen shall have no less than the skin.
        unknown = self._own.opening is None
        opening = max(_missing(0.0, made.opening), 0.0) if unknown else _missing(self._own.opening, made.opening)
        lips, mouth = _missing(self._own.lips, made.lips), _missing(self._own.mouth, made.mouth)
        # Sharp lips are softened only if the mouth as a whole is too sharp, and help out where it is still too soft; an opening
        # that is seen helps out too, and is softened no more than the whole is too sharp.
        lips = min(lips, mouth) if mouth < 0 else max(lips, _HELP * mouth)
        opening = max(opening, mouth) if made.opening is not None else opening
        self._opening_to = _stepped(self._opening, opening_pace * opening, _SHARPEN)
        self._lips_to = _stepped(self._lips, lips_pace * lips, _SHARPEN_LIPS)

    def _with_detail(self, picture: Picture, patch: Patch, points_px: F32) -> Patch:
        lips, opening = self._lips, self._opening
        eyes_px = _eyes(points_px)
        box = _box(points_px, 0.12 * eyes_px, patch)
        if box is None:
            return patch
        rows, columns = box
        at = patch.y[rows, columns]
        origin = np.array([patch.region.x_px + columns.start, patch.region.y_px + rows.start], np.float32)
        feather = (2 * max(round(_FEATHER_EYES * eyes_px), 1) + 1,) * 2
        inside, outside = (
            cv2.blur(filled(points_px[ring, :2] - origin, at.shape), feather).astype(np.float32) * np.float32(1 / 255)
            for ring in (mesh.INNER_LIP, mesh.OUTER_LIP)
        )
        outside = np.maximum(outside - inside, 0)
        values = at.astype(np.float32)
        fine = values - cv2.GaussianBlur(values, (0, 0), max(_FINE_PX, _FINE_EYES * eyes_px))
        values += fine * (lips * outside + opening * inside)
        grain = min(max(lips, 0.0), _GRAIN) * outside + min(max(opening, 0.0), _GRAIN) * inside
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
        # What stands out is a hair or an edge, no grain.
        most = 2.5 * float(np.median(np.abs(residual[::2, ::2]))) / 0.6745
        residual = np.clip(residual, -most, most)
        down, right = (self._grain_of[1] * step % (2 * side) for step, side in zip(_STEPS, residual.shape, strict=True))
        below, beside = (max(n - m, 0) for n, m in zip(shape, residual.shape, strict=True))
        whole = cv2.copyMakeBorder(residual, down, below, right, beside, cv2.BORDER_REFLECT)
        return np.asarray(whole[: shape[0], : shape[1]], np.float32)


def _missing(own: float | None, made: float | None) -> float:
    return 0.0 if own is None or made is None else float(np.clip(own - made, -1.5, 1.5))


def _stepped(control: float, missing: float, most: float) -> float:
    """The energy goes with (1 + control) squared."""
    return float(np.clip(control + (1 + control) / 2 * missing, _SOFTEN, most))


def _eyes(points_px: F32) -> float:
    corners = points_px[mesh.EYE_CORNERS, :2]
    return float(np.linalg.norm(corners[:2].mean(axis=0) - corners[2:].mean(axis=0)))


def _shown(picture: Picture, patch: Patch, x0: int, y0: int, x1: int, y1: int) -> U8:
    """The luma of a box of the picture, painted with the patch."""
    luma = picture.y[y0:y1, x0:x1].copy()
    r = patch.region
    left, top = max(r.x_px, x0), max(r.y_px, y0)
    right, bottom = min(r.x_px + r.width_px, x1), min(r.y_px + r.height_px, y1)
    if right > left and bottom > top:
        there = np.s_[top - y0 : bottom - y0, left - x0 : right - x0]
        here = np.s_[top - r.y_px : bottom - r.y_px, left - r.x_px : right - r.x_px]
        luma[there] = mixed(luma[there], patch.y[here], patch.mask[here])
    return luma


def _detail(picture: Picture, patch: Patch | None, points_px: F32) -> _Detail:
    """Of the picture, with the patch painted in if there is one; the mouth lies at `points_px`."""
    eyes_px = _eyes(points_px)
    lips = points_px[mesh.OUTER_LIP, :2]
    reach = _RING_EYES[1] * eyes_px + 2
    x0, y0 = (max(int(v), 0) for v in np.floor(lips.min(axis=0) - reach))
    x1, y1 = (min(int(v), n) for v, n in zip(np.ceil(lips.max(axis=0) + reach), picture.y.shape[::-1], strict=True))
    if min(x1 - x0, y1 - y0) < 8:
        return _Detail()
    luma = picture.y[y0:y1, x0:x1] if patch is None else _shown(picture, patch, x0, y0, x1, y1)
    detail = np.asarray(cv2.Laplacian(luma, cv2.CV_32F), np.float32)
    local = lips - np.array([x0, y0], np.float32)
    inner, outer = (filled(_grown(local, reach * eyes_px), luma.shape) for reach in _RING_EYES)
    ring = np.asarray(cv2.subtract(outer, inner), np.uint8)
    if not ring.any():
        return _Detail()
    around = _energy(detail, ring) + 1e-2
    # The rest lies within the ring's inner edge.
    x, y, width, height = cv2.boundingRect(inner)
    detail = detail[y : y + height, x : x + width]
    origin = np.array([x0 + x, y0 + y], np.float32)
    mouth, inside = (filled(points_px[line, :2] - origin, detail.shape) for line in (mesh.OUTER_LIP, mesh.INNER_LIP))
    line = max(2, 2 * round(_LINE_EYES * eyes_px) + 1)
    only_lips = np.asarray(cv2.subtract(mouth, cv2.dilate(inside, np.ones((line, line), np.uint8))), np.uint8)

    def against_ring(mask: U8) -> float | None:
        seen = _energy(detail, mask) if cv2.countNonZero(mask) >= _LEAST_PX else 0.0
        return float(np.log(seen / around)) if seen > 0 else None

    is_open = mesh.opening(points_px) > _OPEN
    return _Detail(against_ring(only_lips), against_ring(inside) if is_open else None, against_ring(mouth))


def _energy(detail: F32, mask: U8) -> float:
    """The mean square where the mask is set."""
    return float(cv2.norm(detail, cv2.NORM_L2SQR, mask)) / cv2.countNonZero(mask)


def _grown(points: F32, by_px: float) -> F32:
    outward = points - points.mean(axis=0)
    return np.asarray(points + by_px * outward / (np.linalg.norm(outward, axis=1, keepdims=True) + 1e-6), np.float32)


def _box(points_px: F32, margin_px: float, patch: Patch) -> tuple[slice, slice] | None:
    """The lips within the patch; None where they lie outside."""
    lips = points_px[mesh.OUTER_LIP, :2] - np.array([patch.region.x_px, patch.region.y_px], np.float32)
    x0, y0 = np.maximum(np.floor(lips.min(axis=0) - margin_px).astype(int), 0)
    x1, y1 = np.minimum(np.ceil(lips.max(axis=0) + margin_px).astype(int), patch.y.shape[::-1])
    return (slice(int(y0), int(y1)), slice(int(x0), int(x1))) if min(x1 - x0, y1 - y0) >= 8 else None
