"""Put the drawn mouths into the pictures: matched to what surrounds them, under their masks, nothing else touched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from beavervision.media import F32, Clip, Patch, Picture
from beavervision.models.detail import MouthDetail

_EVERY = 3  # one in so many pictures is measured
_PACE = 0.4  # of the running means, for each that is: corrections must not flicker
_MAX_SHIFT = 24.0  # 8-bit steps of colour
_MAX_SHARPEN = 1.5
_RING_LOW, _RING_HIGH = 8, 200  # mask values that count as the seam


@dataclass(frozen=True, slots=True, eq=False)
class _Match:
    """What makes a patch look like its surroundings."""

    shift: F32  # (3,), added to Y, U, V
    sharpen: float  # gain of the luma's detail

    def toward(self, other: _Match) -> _Match:
        shift = self.shift + _PACE * (other.shift - self.shift)
        return _Match(shift, self.sharpen + _PACE * (other.sharpen - self.sharpen))


class Render:
    """The render stage. `match` corrects colour and sharpness at the seam, `detail` that of drawn lips and what lies between
    them; both run on over the pictures and start anew with each shot.
    """

    name = "render"

    def __init__(self, *, match: bool = True, detail: bool = True) -> None:
        self._match = match
        self._detail = detail

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        running: _Match | None = None
        mouth = MouthDetail()
        shot, seen = -1, 0
        for clip in clips:
            pictures = []
            nothing = (None,) * len(clip)
            shots, faces = (
                (clip.track.shot, clip.track.faces) if clip.track is not None else ((0,) * len(clip), nothing)
            )
            for picture, patches, now, face, drawn in zip(
                clip.frames.pictures,
                clip.patches or ((),) * len(clip),
                shots,
                faces,
                clip.drawn or nothing,
                strict=True,
            ):
                if now != shot:
                    running, mouth, shot, seen = None, MouthDetail(), now, 0
                if self._match and patches:
                    found = _match_of(picture, patches[0]) if seen % _EVERY == 0 else None
                    seen += 1
                    if found is not None:
                        running = running.toward(found) if running is not None else found
                    if running is not None:
                        patches = tuple(_matched(patch, running) for patch in patches)
                if self._detail and patches and face is not None and drawn is not None:
                    patches = (mouth.matched(picture, patches[0], face.points_px, drawn), *patches[1:])
                pictures.append(picture.painted(patches))
            yield replace(clip, frames=replace(clip.frames, pictures=tuple(pictures)), patches=())


def _match_of(picture: Picture, patch: Patch) -> _Match | None:
    """Compare the patch with the picture where the mask passes from one to the other."""
    ring = cv2.inRange(patch.mask, _RING_LOW + 1, _RING_HIGH - 1)
    if cv2.countNonZero(ring) < 32:
        return None
    source, ring_c = picture.planes(patch.region), np.ascontiguousarray(ring[::2, ::2])
    shift = np.zeros(3, np.float32)
    for i, (there, here) in enumerate(zip(source, (patch.y, patch.u, patch.v), strict=True)):
        at = ring if i == 0 else ring_c
        shift[i] = _mean(there, at) - _mean(here, at)
    wide = cv2.dilate(ring, np.ones((5, 5), np.uint8))
    has, wants = (_mean(np.abs(cv2.Laplacian(p, cv2.CV_16S)), wide) for p in (patch.y, source[0]))
    sharpen = float(np.clip(wants / max(has, 0.25) - 1, 0, _MAX_SHARPEN)) if wants > has * 1.1 else 0.0
    return _Match(np.clip(shift, -_MAX_SHIFT, _MAX_SHIFT), sharpen)


def _mean(values: npt.NDArray[Any], mask: npt.NDArray[Any]) -> float:
    """Where the mask is set; 0 where it nowhere is. OpenCV's own masked mean takes twenty times as long."""
    return cv2.sumElems(cv2.copyTo(values, mask))[0] / max(cv2.countNonZero(mask), 1)


def _matched(patch: Patch, match: _Match) -> Patch:
    if float(np.abs(match.shift).max()) < 0.5 and match.sharpen < 0.05:
        return patch
    planes = [p.astype(np.float32) + shift for p, shift in zip((patch.y, patch.u, patch.v), match.shift, strict=True)]
    if match.sharpen >= 0.05:
        planes[0] += match.sharpen * (planes[0] - cv2.GaussianBlur(planes[0], (0, 0), 1.2))
    y, u, v = (np.clip(p + 0.5, 0, 255).astype(np.uint8) for p in planes)
    return replace(patch, y=y, u=u, v=v)
