"""Lip sync by the Wav2Lip generator (Prajwal et al., ACM MM 2020), cropped and fed as its published inference does.

The published face boxes come from the S3FD detector: upright boxes from the hairline to the chin, from ear to ear. Who imported
that detector's weights gets the same here; else the boxes are the bounds of the mesh's face oval, whose top lies at the hairline
and whose bottom is the chin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import floor
from typing import cast

import cv2
import numpy as np
import numpy.typing as npt

from beavervision.errors import ModelError
from beavervision.media import F32, U8, Clip, Color, Face, FaceState, Heard, Net, Patch, Picture, Region
from beavervision.models.boxes import nearest
from beavervision.models.cards import WAV2LIP
from beavervision.models.mesh import FACE_OVAL, JAW

_SIDE_PX = 96
_COLUMNS = 16  # of a mel window
_BINS = 80
_SMOOTHED = 5  # pictures
_MIN_BOX_PX = 16
_FEATHER = 0.05  # of the box's width
_KEPT_BOXES = 3000  # of a source that is played back and forth
# The part that is pasted: the jaw below the ears, closed over the cheeks below the nose.
_LOWER_FACE = np.concatenate([JAW[2:-2], [205, 2, 425]])

Box = npt.NDArray[np.int_]  # x0, y0, x1, y1 in pixels
Boxes = Callable[[U8], F32]  # the faces (n, 5) in an RGB picture: x0, y0, x1, y1 and how surely a face


@dataclass(frozen=True, slots=True)
class _Seen:
    """What smoothing needs of a picture: its box, None where nothing is drawn, and its shot."""

    box: Box | None
    shot: int


class Wav2LipSync:
    """Draws the mouth with a Wav2Lip generator.

    The published inference averages a face's box with those of the four pictures that follow, so a clip leaves when
    these are known. Its last windows of sound are stretches of silence, where the published code stops short.

    Args:
        net: takes mel (n, 1, 80, 16) and face (n, 6, 96, 96), gives faces (n, 3, 96, 96).
        batch: faces in one call of the net.
        pads: pixels added to a box: above, below, left, right.
        boxes: the face detector; where it does not see the face, and without one, the box is the mesh's.
        whole_box: paste the whole box with hard edges, as published, instead of the lower face with soft ones.
    """

    name = "lipsync"
    front_end = "wav2lip_mel"
    timing = WAV2LIP.timing

    def __init__(
        self,
        net: Net,
        batch: int = 8,
        pads: tuple[int, int, int, int] = (0, 10, 0, 0),
        *,
        boxes: Boxes | None = None,
        whole_box: bool = False,
    ) -> None:
        self._net = net
        self._batch = batch
        self._pads = pads
        self._boxes = boxes
        self._kept: dict[int, F32] = {}  # what the detector saw, by the picture's number in the source
        self._last: tuple[Picture, F32] | None = None  # and in the last picture: a still is one all the way
        self._whole_box = whole_box

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        """Yield the clips with patches; they need ``track`` and ``heard``."""
        held: list[Clip] = []
        seen: list[_Seen] = []  # of the held clips, and before them of up to four pictures
        before = 0
        for clip in clips:
            held.append(clip)
            seen += self._look(clip)
            while before + len(held[0]) + _SMOOTHED - 1 <= len(seen):
                ready = held.pop(0)
                yield self._drawn(ready, [_smoothed(seen, before + i) for i in range(len(ready))])
                drop = max(before + len(ready) - (_SMOOTHED - 1), 0)
                before += len(ready) - drop
                del seen[:drop]
                if not held:
                    break
        for ready in held:
            yield self._drawn(ready, [_smoothed(seen, before + i) for i in range(len(ready))])
            before += len(ready)

    def _look(self, clip: Clip) -> list[_Seen]:
        if clip.track is None or clip.heard is None:
            raise ValueError("wav2lip needs clips that went through detect and hear")
        track, pads = clip.track, np.array(self._pads)
        shown = clip.frames.shown or (None,) * len(clip)
        found: list[_Seen] = []
        for picture, number, face, state, strength, shot in zip(
            clip.frames.pictures, shown, track.faces, track.states, track.strength, track.shot, strict=True
        ):
            box = None
            if face is not None and state is FaceState.OK and strength > 0:
                low, high = np.maximum(self._face_box(picture, number, face), 0).astype(int).reshape(2, 2)
                size = (picture.width_px, picture.height_px)
                box = np.concatenate([np.clip(low - pads[[2, 0]], 0, size), np.clip(high + pads[[3, 1]], 0, size)])
                if (box[2:] - box[:2]).min() < _MIN_BOX_PX:
                    box = None
            found.append(_Seen(box, shot))
        return found

    def _face_box(self, picture: Picture, number: int | None, face: Face) -> F32:
        """(4,) as the detector sees the face, or as the mesh bounds it."""
        oval = face.points_px[FACE_OVAL, :2]
        box = cast(F32, np.concatenate([oval.min(axis=0), oval.max(axis=0)]))
        if self._boxes is None:
            return box
        if number is not None and number in self._kept:
            seen = self._kept[number]
        elif self._last is not None and self._last[0] is picture:
            seen = self._last[1]
        else:
            seen = self._boxes(picture.rgb())
            self._last = picture, seen
            if number is not None and len(self._kept) < _KEPT_BOXES:
                self._kept[number] = seen
        found = nearest(seen, box)
        return box if found is None else found

    def _drawn(self, clip: Clip, boxes: list[Box | None]) -> Clip:
        assert clip.track is not None
        assert clip.heard is not None
        work = [(i, box) for i, box in enumerate(boxes) if box is not None]
        patches: list[tuple[Patch, ...]] = [()] * len(clip)
        for at in range(0, len(work), self._batch):
            part = work[at : at + self._batch]
            mels = np.stack([_mel_window(clip.heard, clip.frames.start + i, clip.frames.rate) for i, _ in part])
            faces = np.stack([_net_input(clip.frames.pictures[i], box) for i, box in part])
            outputs = np.asarray(self._net(mels, faces)[0], np.float32)
            if outputs.shape != (len(part), 3, _SIDE_PX, _SIDE_PX):
                raise ModelError(
                    f"The lip-sync model gave {outputs.shape}; it is no Wav2Lip generator. Choose another."
                )
            for (i, box), output in zip(part, outputs, strict=True):
                face = clip.track.faces[i]
                assert face is not None
                points = None if self._whole_box else face.points_px
                color = clip.frames.pictures[i].color
                patches[i] = (_patch(output, box, points, float(clip.track.strength[i]), color),)
        return replace(clip, patches=tuple(patches))


def _smoothed(seen: list[_Seen], at: int) -> Box | None:
    """The mean box of the five pictures from `at` on.

    Within the last five of its stretch of one face in one shot it is the mean of these, each that comes before it in the place
    of its own box: the published code smooths in place.
    """
    if seen[at].box is None:
        return None

    def same(i: int) -> bool:
        return 0 <= i < len(seen) and seen[i].box is not None and seen[i].shot == seen[at].shot

    stop = at + 1
    while stop < at + _SMOOTHED and same(stop):
        stop += 1
    start = at
    while stop - start < _SMOOTHED and same(start - 1):
        start -= 1
    last = np.stack([s.box for s in seen[start:stop] if s.box is not None])
    for i in range(at - start + 1):
        last[i] = last.mean(axis=0)
    return cast(Box, last[at - start])


def _mel_window(heard: Heard, picture: int, rate: Fraction) -> F32:
    """(1, 80, 16): the columns from the one at the picture's start on."""
    first = floor(picture / rate / heard.hop) - heard.start
    rows = heard.rows[first : first + _COLUMNS]
    if first < 0 or rows.shape != (_COLUMNS, _BINS):
        raise ValueError(f"the features from row {heard.start} do not hold the window of picture {picture}")
    return rows.T[None]


def _net_input(picture: Picture, box: npt.NDArray[np.int_]) -> F32:
    """(6, 96, 96): the face with its lower half black, and the whole face; BGR, 0 to 1."""
    # Two pixels more on each side, where the picture has them, make the colours those of the whole picture's RGB.
    size = np.array([picture.width_px, picture.height_px])
    region = _region(np.concatenate([np.maximum(box[:2] - 2, 0), np.minimum(box[2:] + 2, size)]))
    x, y = box[0] - region.x_px, box[1] - region.y_px
    crop = picture.rgb(region)[y : y + box[3] - box[1], x : x + box[2] - box[0], ::-1]
    face = cv2.resize(np.ascontiguousarray(crop), (_SIDE_PX, _SIDE_PX)).transpose(2, 0, 1)
    hidden = face.copy()
    hidden[:, _SIDE_PX // 2 :] = 0
    return np.concatenate([hidden, face]).astype(np.float32) / np.float32(255)


def _region(box: npt.NDArray[np.int_]) -> Region:
    """The smallest region that holds `box`; within the picture if the box is, as its sides are even."""
    x0, y0 = (int(v) // 2 * 2 for v in box[:2])
    x1, y1 = (-(-int(v) // 2) * 2 for v in box[2:])
    return Region(x0, y0, x1 - x0, y1 - y0)


def _patch(output: F32, box: npt.NDArray[np.int_], points_px: F32 | None, strength: float, color: Color) -> Patch:
    """`output` (3, 96, 96) BGR laid onto its box: all of it, or the lower face of the mesh `points_px`."""
    width, height = int(box[2] - box[0]), int(box[3] - box[1])
    small = (np.clip(output, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)[..., ::-1]
    drawn = cv2.resize(np.ascontiguousarray(small), (width, height))
    mask = np.full((height, width), strength, np.float32)
    if points_px is not None:
        mask *= _lower_face(points_px[:, :2] - box[:2], width, height)
    region = _region(box)
    x, y = int(box[0]) - region.x_px, int(box[1]) - region.y_px
    right, below = region.width_px - width - x, region.height_px - height - y
    edges = (y, below, x, right)
    rgb = cv2.copyMakeBorder(drawn, *edges, cv2.BORDER_REPLICATE)
    alpha = cv2.copyMakeBorder((mask * 255 + 0.5).astype(np.uint8), *edges, cv2.BORDER_CONSTANT, value=0)
    return Patch.of_rgb(region, cast(U8, rgb), cast(U8, alpha), color)


def _lower_face(points_px: F32, width: int, height: int) -> F32:
    """(height, width), 0 to 1: the lower face, soft at its border and 0 at the box's."""
    feather = max(_FEATHER * width, 1.0)
    inside = np.zeros((height, width), np.uint8)
    cv2.fillPoly(inside, [np.round(points_px[_LOWER_FACE]).astype(np.int32)], 255)
    soft = cv2.GaussianBlur(inside, (0, 0), feather / 2).astype(np.float32) / 255
    across = np.minimum(np.arange(width), np.arange(width)[::-1])
    down = np.minimum(np.arange(height), np.arange(height)[::-1])
    edge = np.minimum(across[None], down[:, None]).astype(np.float32) / np.float32(feather)
    return cast(F32, soft * np.minimum(edge, 1))
