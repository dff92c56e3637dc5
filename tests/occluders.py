"""Things to hold before a face: drawn, shaded, and pasted into a picture's planes."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from beavervision.media import F32, U8, Picture
from beavervision.models import mesh

_CHEEKS = [50, 280, 101, 330, 36, 266]


@dataclass(frozen=True, slots=True, eq=False)
class Occluder:
    """mask and shade, both (s, s): shade is added to the luma of `colour` (Y, U, V)."""

    mask: U8
    shade: F32
    colour: F32

    def before(self, picture: Picture, centre_px: F32) -> tuple[Picture, U8]:
        """The picture with it in front, and where it is (h, w)."""
        side = self.mask.shape[0]
        move = np.array([[1, 0, centre_px[0] - side / 2], [0, 1, centre_px[1] - side / 2]])
        size = (picture.width_px, picture.height_px)
        where = np.asarray(cv2.warpAffine(self.mask, move, size), np.uint8)
        alpha = cv2.GaussianBlur(where, (0, 0), max(0.7, side / 200)).astype(np.float32) / 255
        half = cv2.resize(alpha, (size[0] // 2, size[1] // 2), interpolation=cv2.INTER_AREA)
        luma = np.clip(self.colour[0] + cv2.warpAffine(self.shade, move, size), 16, 235)
        y, u, v = (
            np.clip(plane * (1 - a) + new * a + 0.5, 0, 255).astype(np.uint8)
            for plane, a, new in (
                (picture.y, alpha, luma),
                (picture.u, half, self.colour[1]),
                (picture.v, half, self.colour[2]),
            )
        )
        return Picture(y, u, v, picture.color), where


def hand(face_px: float, colour: F32, seed: int = 0) -> Occluder:
    """A hand with spread fingers, its palm a third of the face wide."""
    rng = np.random.default_rng(seed)
    size = 0.34 * face_px
    side = int(4 * size)
    c = side / 2
    mask, lines = np.zeros((side, side), np.uint8), np.zeros((side, side), np.uint8)
    cv2.ellipse(mask, (int(c), int(c + 0.55 * size)), (int(0.85 * size), int(0.95 * size)), 0, 0, 360, 255, -1)
    cv2.rectangle(mask, (int(c - size / 2), int(c + size)), (int(c + size / 2), side), 255, -1)
    for i, (turn, reach) in enumerate(zip((-0.32, -0.1, 0.1, 0.32), (1.25, 1.5, 1.45, 1.1), strict=True)):
        x = c + (i - 1.5) * 0.42 * size
        tip = x + np.sin(turn) * 1.2 * size, c - np.cos(turn) * reach * size
        cv2.line(mask, (int(x), int(c)), (int(tip[0]), int(tip[1])), 255, int(0.38 * size))
        if i:
            left = x - 0.21 * size
            end = (int((x + tip[0]) / 2 - 0.21 * size), int((c + tip[1]) / 2))
            cv2.line(lines, (int(left), int(c + 0.3 * size)), end, 255, max(1, int(0.05 * size)))
    across, down = (axis / side - 0.5 for axis in np.mgrid[0:side, 0:side][::-1])
    edge = np.clip(cv2.distanceTransform(mask, cv2.DIST_L2, 5) / (0.35 * size), 0, 1)
    creases = cv2.GaussianBlur(lines, (0, 0), 0.03 * size + 0.5) / 255
    skin = cv2.GaussianBlur(rng.normal(0, 14, mask.shape).astype(np.float32), (0, 0), max(1, 0.06 * size))
    shade = 18 * edge - 14 + 10 * across + 8 * down - 22 * creases + skin + rng.normal(0, 1.5, mask.shape)
    return Occluder(mask, shade.astype(np.float32), colour)


def microphone(face_px: float) -> Occluder:
    """A dark one on a stick, half as wide as the mouth and more."""
    size = 0.26 * face_px
    side = int(4 * size)
    c = side / 2
    mask = np.zeros((side, side), np.uint8)
    cv2.circle(mask, (int(c), int(c)), int(0.75 * size), 255, -1)
    cv2.line(mask, (int(c), int(c)), (int(c + 0.3 * size), side), 255, int(0.7 * size))
    y, x = np.mgrid[0:side, 0:side]
    shine = np.exp(-((x - c + 0.3 * size) ** 2 + (y - c + 0.3 * size) ** 2) / (0.35 * size) ** 2)
    shade = 12 * np.sin(x / size * 22) * np.sin(y / size * 22) + 25 * shine
    return Occluder(mask, shade.astype(np.float32), np.array([38, 128, 128], np.float32))


def skin_of(picture: Picture, points_px: F32) -> F32:
    """The Y, U, V of the cheeks."""
    x, y = points_px[_CHEEKS, :2].astype(int).T
    x, y = np.clip(x, 0, picture.width_px - 1), np.clip(y, 0, picture.height_px - 1)
    planes = (picture.y[y, x], picture.u[y // 2, x // 2], picture.v[y // 2, x // 2])
    return np.array([np.median(plane) for plane in planes], np.float32)


def in_and_out(share: float, *, begin: float = 0.35, end: float = 0.75, takes: float = 0.1) -> float:
    """How far away an occluder is at `share` of the time: 1 away, 0 before the mouth."""
    return float(np.interp(share, [0, begin, begin + takes, end, end + takes, 1], [1, 1, 0, 0, 1, 1]))


def before_mouth(
    picture: Picture, points_px: F32, occluder: Occluder, away: float, side: float = 1.0
) -> tuple[Picture, float]:
    """The picture with the occluder `away` from the mouth (see :func:`in_and_out`), and the share of the lips it covers."""
    face_px = float(np.ptp(points_px[:, 0]))
    lips = points_px[mesh.OUTER_LIP, :2]
    centre = lips.mean(axis=0) + face_px * np.array([1.15 * side * away, 1.7 * away + 0.05])
    made, where = occluder.before(picture, centre)
    inside = np.zeros(picture.y.shape, np.uint8)
    cv2.fillPoly(inside, [np.round(lips).astype(np.int32)], 1)
    return made, float((where[inside > 0] > 127).mean())
