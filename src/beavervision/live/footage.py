"""Where the pictures of a session come from: a prepared avatar, or a camera."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

from beavervision.errors import UsageError
from beavervision.live.avatar import Avatar
from beavervision.media import F32, Clip, Frames, Picture, Reference
from beavervision.models.face import FaceNets
from beavervision.stages.detect import Detect, FaceChoice, Survey, survey

_LOOK_AHEAD = 2  # pictures of a camera that the tracking sees before it lets one go
_DETECT_S = 0.02  # to find the face in a picture, at most
_HELD = 24  # pictures of a camera
_LOOKS = 8  # at a camera's face, to know its mouth,
_LOOK_EVERY_S = (0.4, 5.0)  # at least and, while there is none, at most so far apart


class Footage(Protocol):
    """Times are seconds of the session, indices those of its pictures."""

    size_px: tuple[int, int]
    own_mouth: bool  # between drawings the face's own mouth shows, not one at rest

    def idle(self, index: int) -> Picture:
        """What shows while nothing is drawn."""
        ...

    def ready_s(self, index: int) -> float:
        """From when on picture `index` can be drawn."""
        ...

    def survey(self) -> Survey | None:
        """Whose face it is; None while that is not known."""
        ...

    def rest_px(self, index: int) -> F32 | None:
        """Where the face's points (478, 3) are with the lips at rest; None where that is not known."""
        ...

    def clips(self, base: int, asked: Callable[[], range], late: Callable[[int], bool]) -> Iterator[Clip]:
        """Tracked clips, of the pictures that `asked` tells then; their numbers count from `base`. `late` ones stay undrawn."""
        ...

    def look(self, now_s: float) -> Callable[[], None] | None:
        """What must be done to know the face; None for nothing, now."""
        ...


class Loop:
    """An avatar's own pictures, back and forth."""

    own_mouth = False

    def __init__(self, avatar: Avatar, rate: Fraction) -> None:
        self.size_px = avatar.size_px
        self._avatar = avatar
        self._rate = rate

    def idle(self, index: int) -> Picture:
        return self._avatar.idle(index, self._rate)

    def ready_s(self, index: int) -> float:
        return 0.0

    def survey(self) -> Survey | None:
        return self._avatar.survey

    def rest_px(self, index: int) -> F32 | None:
        return self._avatar.rest_points(index, self._rate)

    def clips(self, base: int, asked: Callable[[], range], late: Callable[[int], bool]) -> Iterator[Clip]:
        while True:
            indices = asked()
            yield self._avatar.clip(indices, indices.start - base, self._rate)

    def look(self, now_s: float) -> Callable[[], None] | None:
        return None


@dataclass(frozen=True, slots=True)
class Camera:
    """A camera as the face of a session: its pictures come by :meth:`~beavervision.live.LiveSession.push_picture`."""

    width_px: int = 512
    height_px: int = 512
    face: str = "largest"  # as FaceChoice.parse

    def __post_init__(self) -> None:
        if any(v % 2 or not 64 <= v <= 4096 for v in (self.width_px, self.height_px)):
            raise UsageError(
                f"A camera's sides are even and 64 to 4096 pixels, not {self.width_px} x {self.height_px}."
            )
        FaceChoice.parse(self.face)


class CameraFootage:
    """A camera's pictures, each shown a constant time after it came."""

    own_mouth = True

    def __init__(self, camera: Camera, rate: Fraction, work_s: float) -> None:
        self.size_px = (camera.width_px, camera.height_px)
        self.delay_s = float(_LOOK_AHEAD / rate) + work_s + _DETECT_S
        self._rate = rate
        self._choice = FaceChoice.parse(camera.face)
        self._pictures: deque[tuple[float, Picture]] = deque(maxlen=_HELD)
        self._nothing = _grey(*self.size_px)
        self._nets: FaceNets | None = None
        self._seen: tuple[Reference, ...] = ()
        self._people = 0
        self._looked_s = -1.0
        self._every_s = _LOOK_EVERY_S[0]

    def push(self, picture: Picture, now_s: float) -> None:
        """Raises UsageError if its size is not the session's."""
        size = (picture.width_px, picture.height_px)
        if size != self.size_px:
            raise UsageError(f"This session's pictures have {self.size_px} pixels, not {size}. Scale them first.")
        self._pictures.append((now_s, picture))

    def idle(self, index: int) -> Picture:
        until_s = float(index / self._rate) - self.delay_s
        pictures = tuple(self._pictures)  # others push meanwhile
        oldest = pictures[0][1] if pictures else self._nothing
        return next((p for at_s, p in reversed(pictures) if at_s <= until_s), oldest)

    def ready_s(self, index: int) -> float:
        return float((index + _LOOK_AHEAD) / self._rate) - self.delay_s

    def survey(self) -> Survey | None:
        return Survey(self._choice, self._seen, self._people) if self._seen else None

    def rest_px(self, index: int) -> F32 | None:
        return None

    def clips(self, base: int, asked: Callable[[], range], late: Callable[[int], bool]) -> Iterator[Clip]:
        assert self._nets is not None
        tracked = Detect(self._nets, self._choice, look_ahead=_LOOK_AHEAD, tiles=False)
        return tracked(self._untracked(base, asked, late))

    def look(self, now_s: float) -> Callable[[], None] | None:
        if not self._pictures or len(self._seen) >= _LOOKS or now_s - self._looked_s < self._every_s:
            return None
        self._looked_s = now_s
        picture = self._pictures[-1][1]
        return lambda: self._look(picture)

    def _look(self, picture: Picture) -> None:
        self._nets = self._nets or FaceNets()
        seen = survey([picture], self._nets, self._choice)
        if seen.references:
            self._seen, self._people = (*self._seen, seen.references[0]), seen.faces_seen
            self._every_s = _LOOK_EVERY_S[0]
        else:
            self._every_s = min(2 * self._every_s, _LOOK_EVERY_S[1])

    def _untracked(self, base: int, asked: Callable[[], range], late: Callable[[int], bool]) -> Iterator[Clip]:
        index = asked().start
        picture: Picture | None = None
        while True:
            # The same picture again needs no tracking.
            picture = self.idle(index) if picture is None or not late(index) else picture
            yield Clip(Frames((picture,), index - base, self._rate))
            index += 1


def _grey(width_px: int, height_px: int) -> Picture:
    chroma = np.full((height_px // 2, width_px // 2), 128, np.uint8)
    return Picture(np.full((height_px, width_px), 40, np.uint8), chroma, chroma)
