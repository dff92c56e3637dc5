"""The inside of a mouth that no picture shows: teeth, tongue and dark, drawn by rule.

It stands in for a reference where a person's lips are never seen apart. The painter makes of it what suits the light and the
opening; with nothing to go by it would fill the opening with the mean of all mouths, which looks like skin.
"""

from __future__ import annotations

from itertools import accumulate

import cv2
import numpy as np

from beavervision.media import F32, U8

# Colours and brightness against the brightest skin around: medians of open mouths of 59 people of the train split, but the tongue
# and teeth that are seen whole there.
_DARK, _TONGUE, _TEETH = (0.36, 0.13, 0.11), (0.78, 0.42, 0.38), 0.86
_CAST = 0.7  # how much of the skin's colour the teeth take
_TEETH_PX = 7.0  # that the upper lip leaves to be seen of the front ones, at 100 px to the distance of the eyes
_WIDTHS_PX = (13.0, 11.0, 9.0, 7.0)  # as seen from the front, from the middle tooth to the side
_TONGUE_FROM = 0.62  # of the way down the opening
_BRIGHT = 0.9  # quantile of the skin
_AROUND_PX = 12  # of the opening are lips, not skin
_FINE = 4  # it is drawn in so much finer pixels


def inside(lips: F32, rgb: F32, hole: U8) -> F32:
    """What an opening may show, (3, h, w), 0..1, for the whole crop; only what lies in the opening is meant.

    Args:
        lips: (20, 2) the opening's rim in pixels, 100 to the distance of the eyes: from the left corner over the upper lip to the
            right one, and back.
        rgb: (3, h, w), 0..1, the face around it.
        hole: (h, w), 0..255, the opening.
    """
    around = np.ones((2 * _AROUND_PX + 1,) * 2, np.uint8)
    skin = rgb[:, cv2.dilate(hole, around) == 0]
    if not skin.size:
        skin = rgb.reshape(3, -1)
    light = float(np.quantile(skin.mean(axis=0), _BRIGHT))
    middle = np.median(skin, axis=1)
    cast = middle / max(float(middle.mean()), 1e-3)
    height, width = hole.shape
    y, x = (np.mgrid[: height * _FINE, : width * _FINE].astype(np.float32) + np.float32(0.5)) / _FINE
    x = x - lips[[5, 15], 0].mean()
    side = x / max(float(np.ptp(lips[[0, 10], 0])) / 2, 1.0)  # -1 to 1 between the corners
    top, gap = lips[5, 1], max(float(lips[15, 1] - lips[5, 1]), 1.0)
    tongue = np.clip((y - top - _TONGUE_FROM * gap) / (0.25 * gap), 0, 1) * np.clip(1 - (side / 0.62) ** 4, 0, 1)
    seen = np.clip(top + _TEETH_PX * (1 - 0.6 * side**2) - y, 0, 1) * np.clip((0.86 - np.abs(side)) / 0.12, 0, 1)
    edges = np.array([0.0, *accumulate(_WIDTHS_PX)], np.float32)
    off = np.abs(np.abs(x)[..., None] - edges).min(axis=-1)
    shade = (0.72 + 0.28 * np.clip((y - top) / 5, 0, 1)) * (1 - 0.45 * side**2)
    shade *= 1 - 0.16 * np.exp(-((off / 0.8) ** 2))
    shown = np.asarray(_DARK) + 0.75 * tongue[..., None] * (np.asarray(_TONGUE) - np.asarray(_DARK))
    shown += seen[..., None] * (_TEETH * cast**_CAST * shade[..., None] - shown)
    soft = cv2.GaussianBlur((light * shown).astype(np.float32), (0, 0), 0.7 * _FINE)
    return np.ascontiguousarray(cv2.resize(soft, (width, height), interpolation=cv2.INTER_AREA).transpose(2, 0, 1))
