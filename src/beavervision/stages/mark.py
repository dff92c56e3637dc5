"""Say visibly, in a corner of every picture, that it is synthetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import cv2
import numpy as np

from beavervision.media import F32, U8, Clip, Picture, Region

_TEXT = "AI GENERATED"
_HEIGHT = 0.032  # of the letters, as a share of the picture's shorter side,
_LEAST_PX = 9
_WIDEST = 0.9  # and of its width
_STRENGTH = 0.75
_WHITE, _DARK = 235, 16  # luma


class Mark:
    """The mark stage: white letters with a dark rim at the lower right, in all planes and in no other sample."""

    name = "mark"

    def __init__(self, text: str = _TEXT) -> None:
        self._text = text

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        stamp: _Stamp | None = None
        before: tuple[Picture, Picture] | None = None  # a still repeats one picture
        for clip in clips:
            pictures = []
            for picture in clip.frames.pictures:
                if stamp is None or stamp.size_px != (picture.width_px, picture.height_px):
                    stamp = _Stamp.of(self._text, picture.width_px, picture.height_px)
                if before is None or before[0] is not picture:
                    before = picture, stamp.on(picture)
                pictures.append(before[1])
            yield replace(clip, frames=replace(clip.frames, pictures=tuple(pictures)))


@dataclass(frozen=True, slots=True, eq=False)
class _Stamp:
    """Letters for pictures of one size: for each sample of the region how much of it, and which luma."""

    size_px: tuple[int, int]
    region: Region
    alpha: F32
    luma: U8
    alpha_chroma: F32

    @classmethod
    def of(cls, text: str, width_px: int, height_px: int) -> _Stamp:
        font = cv2.FONT_HERSHEY_SIMPLEX
        wanted_px = max(_LEAST_PX, _HEIGHT * min(width_px, height_px))
        (w, h), _ = cv2.getTextSize(text, font, 10.0, 1)
        scale = 10.0 * min(wanted_px / h, _WIDEST * width_px / w)
        thickness = max(1, round(wanted_px / 12))
        rim = 2 * thickness + 2
        (w, h), below = cv2.getTextSize(text, font, scale, thickness)
        w, h = (min(v + v % 2, most) for v, most in ((w + 2 * rim, width_px), (h + below + 2 * rim, height_px)))
        gap = round(wanted_px / 2) // 2 * 2
        x, y = max(0, width_px - w - gap) // 2 * 2, max(0, height_px - h - gap) // 2 * 2
        letters, around = np.zeros((h, w), np.uint8), np.zeros((h, w), np.uint8)
        at = (rim, h - rim - below // 2)
        cv2.putText(letters, text, at, font, scale, (255,), thickness, cv2.LINE_AA)
        cv2.putText(around, text, at, font, scale, (255,), thickness + rim, cv2.LINE_AA)
        alpha = np.maximum(letters, around).astype(np.float32) * np.float32(_STRENGTH / 255)
        luma = _DARK + (letters.astype(np.float32) / 255) * (_WHITE - _DARK)
        chroma = cv2.resize(alpha, (w // 2, h // 2), interpolation=cv2.INTER_AREA)
        return cls(
            (width_px, height_px), Region(x, y, w, h), alpha, luma.astype(np.uint8), np.asarray(chroma, np.float32)
        )

    def on(self, picture: Picture) -> Picture:
        r = self.region
        ys, xs = slice(r.y_px, r.y_px + r.height_px), slice(r.x_px, r.x_px + r.width_px)
        yc, xc = slice(ys.start // 2, ys.stop // 2), slice(xs.start // 2, xs.stop // 2)
        y, u, v = picture.y.copy(), picture.u.copy(), picture.v.copy()
        for plane, rows, columns, new, alpha in (
            (y, ys, xs, self.luma, self.alpha),
            (u, yc, xc, 128, self.alpha_chroma),
            (v, yc, xc, 128, self.alpha_chroma),
        ):
            plane[rows, columns] = np.rint(plane[rows, columns] * (1 - alpha) + new * alpha).astype(np.uint8)
        return replace(picture, y=y, u=u, v=v)
