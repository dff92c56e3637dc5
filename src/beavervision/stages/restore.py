"""Run a published face restorer over the finished pictures: aligned, steadied, and blended into the mouth or the whole face.

The restorer sees the face aligned to its template by the pose of the skull, and gives it back. Only the detail that it adds is
taken: the difference without its low frequencies, so that colour and light stay those of the picture. Restorers look at each
picture anew and so flicker; the detail is therefore averaged over time, along the motion between the aligned faces (DIS optical
flow: Kroeger et al., ECCV 2016), as far as the last face, moved, looks like this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np

from beavervision.media import F32, U8, Clip, Patch, Picture, Region, between_pixels
from beavervision.models import mesh
from beavervision.models.restorers import FACE_PX, alignment

Area = Literal["mouth", "face"]

_KEEP = 0.8  # of the detail so far, where the last face fits this one
_FIT = 6.0  # 8-bit steps of luma by which it may miss
_FLOW_PX = 256
_COLOUR_PX = 24.0  # detail is what is finer, in pixels of the aligned face
_GROW_PX = {"mouth": 24, "face": -14}  # of the lips' line and the face's, outwards
_FEATHER_PX = 9.0
_RINGS = {"mouth": mesh.OUTER_LIP, "face": mesh.FACE_OVAL}
_FULL_RANGE_YUV = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32
)


@dataclass(frozen=True, slots=True, eq=False)
class _Before:
    """The last restored face of a stream, in the aligned square."""

    shot: int
    luma: F32  # (512, 512)
    detail: F32  # (512, 512, 3): Y, U, V


class Restore:
    """The restore stage. `restorer` takes and gives aligned faces, (n, 512, 512, 3) RGB; `area` is where they show."""

    name = "restore"

    def __init__(self, restorer: Callable[[U8], U8], area: Area = "mouth") -> None:
        self._restorer = restorer
        self._area: Area = area

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        before: _Before | None = None
        flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_FAST)
        for clip in clips:
            track = clip.track
            if track is None:
                raise ValueError("restoring needs tracked clips")
            pictures: list[Picture] = []
            drawn = clip.drawn or (None,) * len(clip)
            for picture, face, points, strength, shot in zip(
                clip.frames.pictures, track.faces, drawn, track.strength, track.shot, strict=True
            ):
                if face is None or strength <= 0:
                    before = None
                    pictures.append(picture)
                    continue
                points_px = face.points_px if points is None else points
                matrix = alignment(mesh.fit_pose(points_px))
                aligned = _aligned(picture, matrix)
                (restored,) = self._restorer(aligned[None])
                luma, detail = _detail(aligned, restored)
                if before is not None and before.shot == shot:
                    detail = _steadied(flow, before, luma, detail)
                before = _Before(shot, luma, detail)
                patch = _patch(picture, matrix, points_px, detail, self._area, float(strength))
                pictures.append(picture if patch is None else picture.painted((patch,)))
            yield replace(clip, frames=replace(clip.frames, pictures=tuple(pictures)))


def _aligned(picture: Picture, matrix: F32) -> U8:
    """The aligned face, (512, 512, 3) RGB; what lies beyond the picture repeats its edge."""
    corners = cv2.transform(
        np.array([[[0, 0], [FACE_PX, 0], [FACE_PX, FACE_PX], [0, FACE_PX]]], np.float32),
        cv2.invertAffineTransform(matrix),
    )[0]
    region = Region.around(corners, 4.0, picture.width_px, picture.height_px) or picture.region
    shrink = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    rgb = picture.rgb(region)
    if shrink < 0.6:
        rgb = np.asarray(cv2.GaussianBlur(rgb, (0, 0), 0.35 / shrink), np.uint8)
    local = matrix.copy()
    local[:, 2] += matrix[:, :2] @ [region.x_px, region.y_px]
    return np.asarray(
        cv2.warpAffine(
            rgb, between_pixels(local), (FACE_PX, FACE_PX), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
        ),
        np.uint8,
    )


def _detail(aligned: U8, restored: U8) -> tuple[F32, F32]:
    """The luma of the aligned face, and what the restorer adds to its Y, U and V but for the low frequencies."""
    here, there = (cv2.transform(image.astype(np.float32), _FULL_RANGE_YUV) for image in (aligned, restored))
    added = there - here
    return np.asarray(here[..., 0], np.float32), np.asarray(
        added - cv2.GaussianBlur(added, (0, 0), _COLOUR_PX), np.float32
    )


def _steadied(flow: cv2.DISOpticalFlow, before: _Before, luma: F32, detail: F32) -> F32:
    small, small_before = (
        cv2.resize(image, (_FLOW_PX, _FLOW_PX), interpolation=cv2.INTER_AREA).astype(np.uint8)
        for image in (luma, before.luma)
    )
    motion = flow.calc(small, small_before, None)  # type: ignore[call-overload]
    motion = cv2.resize(motion, (FACE_PX, FACE_PX), interpolation=cv2.INTER_LINEAR) * (FACE_PX / _FLOW_PX)
    grid = np.arange(FACE_PX, dtype=np.float32)
    x, y = motion[..., 0] + grid, motion[..., 1] + grid[:, None]
    moved = cv2.remap(before.detail, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    looked = cv2.remap(before.luma, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    miss = cv2.GaussianBlur(np.abs(looked - luma), (0, 0), 2.0)
    keep = _KEEP * np.exp(-((miss / _FIT) ** 2))[..., None]
    return np.asarray(detail + keep * (moved - detail), np.float32)


def _patch(picture: Picture, matrix: F32, points_px: F32, detail: F32, area: Area, strength: float) -> Patch | None:
    """The picture with the detail added, under the mask of the area; None outside of the picture."""
    ring = cv2.transform(points_px[None, _RINGS[area], :2].astype(np.float32), matrix)[0]
    mask = np.zeros((FACE_PX, FACE_PX), np.uint8)
    cv2.fillPoly(mask, [np.round((ring - 0.5) * 16).astype(np.int32)], 255, lineType=cv2.LINE_AA, shift=4)
    grow = _GROW_PX[area]
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * abs(grow) + 1,) * 2)
    mask = np.asarray(cv2.dilate(mask, brush) if grow > 0 else cv2.erode(mask, brush), np.uint8)
    soft = cv2.GaussianBlur(mask, (0, 0), _FEATHER_PX)
    x, y, width, height = cv2.boundingRect(soft)
    if not width:
        return None
    back = cv2.invertAffineTransform(matrix)
    corners = np.array([[[x, y], [x + width, y], [x + width, y + height], [x, y + height]]], np.float32)
    region = Region.around(cv2.transform(corners, back)[0], 2.0, picture.width_px, picture.height_px)
    if region is None:
        return None
    local = matrix.copy()
    local[:, 2] += matrix[:, :2] @ [region.x_px, region.y_px]
    gain = 1.0 if picture.color.full_range else 219 / 255, 1.0 if picture.color.full_range else 224 / 255
    luma, u, v = (
        np.clip(
            plane + gain[i > 0] * _back(np.ascontiguousarray(detail[..., i]), local, plane.shape, pixel_px) + 0.5,
            0,
            255,
        ).astype(np.uint8)
        for i, (plane, pixel_px) in enumerate(zip(picture.planes(region), (1, 2, 2), strict=True))
    )
    shown = _back(np.asarray(soft, np.uint8), local, luma.shape, 1)
    return Patch(region, luma, u, v, (shown * np.float32(min(strength, 1.0))).astype(np.uint8))


def _back(image: F32 | U8, matrix: F32, shape: tuple[int, ...], pixel_px: int) -> F32:
    """From the aligned face into a plane of `shape` whose samples are `pixel_px` wide; 0 beyond the square."""
    size = (shape[1], shape[0])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return np.asarray(
        cv2.warpAffine(
            image, between_pixels(matrix, (pixel_px, pixel_px)), size, flags=flags, borderMode=cv2.BORDER_CONSTANT
        ),
        np.float32,
    )
