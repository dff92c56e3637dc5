"""Find the chosen face in every picture and follow it: never an error for a picture, always a state.

Tracking re-crops the mesh from its own last points and looks for the face anew only when it is lost or the shot changes.
Points are smoothed over five pictures by a symmetric polynomial fit, which takes out jitter without lag, at
the price of a short look-ahead; the same look-ahead lets the drawing fade out before the face goes. Where the face goes on
evenly, which most do that wait, listen or are a portrait, the mesh looks at one picture in two or in four; of a face that speaks
at one in two, as long as a smaller network is sure of what is between them. A picture that is shown again, as a source that is
shorter than the speech is played back and forth, is not looked at.
"""

from __future__ import annotations

import enum
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from beavervision.errors import UsageError
from beavervision.media import F32, Clip, Face, FaceState, FaceTrack, Picture, Reference, Region
from beavervision.models.between import Between
from beavervision.models.cover import Appearance, colours
from beavervision.models.face import Crop, FaceNets
from beavervision.models.likeness import likeness, unlike
from beavervision.models.mesh import INNER_LIP, OUTER_LIP, fit_pose, opening

LOOK_AHEAD = 4  # pictures seen before one is let go
KEPT_PICTURES = 3000  # of a source whose faces are kept, 6 kB each, for when they are shown again
_SAVGOL = np.array([-3, 12, 17, 12, -3], np.float32) / 35  # Savitzky and Golay (1964): quadratic, five points
_MAX_YAW_DEG = 48.0
_MAX_PITCH_DEG = 38.0
_RETRY = 5  # a lost face is searched for in one of so many pictures,
_RETRY_TILES = 20  # and a small one elsewhere than where it was in one of so many
_CUT_LEVEL = 22.0  # mean difference of luma thumbnails that makes a cut, if it also stands out of the last ones
_CUT_RATIO = 4.0
# Pictures between two others are spared where their points would be off the line between those by less than this, in crop
# sides, and where no part of the face looks other than the mean of theirs by as much, in levels of luma.
_UNEVEN = 0.001
_UNLIKE = 6.0
# Of a picture between its neighbours it is enough if the smaller network expects lips and face to be off by less, in pixels of the
# mesh's crop.
_SURE_LIPS_PX, _SURE_PX = 0.7, 0.7
_NEAR, _FAR = 2, 4  # from one picture that is looked at to the next; the farther where the nearer was good enough
_LIPS = np.concatenate([INNER_LIP, OUTER_LIP])
_PARTS = 32  # of the face's height and width that are compared,
_LIP_PARTS = 12  # and of that of its lips


@dataclass(frozen=True, slots=True)
class FaceChoice:
    """Which face to use: the largest, the n-th from the left, the nearest to a place, or the one that speaks."""

    index: int | None = None  # 0 is the leftmost
    place: tuple[float, float] | None = None  # 0..1 of width and height
    speaker: bool = False

    @classmethod
    def parse(cls, text: str) -> FaceChoice:
        """From the command line: ``largest``, ``speaker``, ``left``, ``right``, ``center``, an index, or ``x,y`` in 0..1.

        Raises:
            UsageError: anything else.
        """
        named = {
            "largest": cls(),
            "speaker": cls(speaker=True),
            "left": cls(place=(0.0, 0.5)),
            "right": cls(place=(1.0, 0.5)),
            "center": cls(place=(0.5, 0.5)),
        }
        if text in named:
            return named[text]
        try:
            if "," in text:
                x, y = (float(part) for part in text.split(","))
                if 0 <= x <= 1 and 0 <= y <= 1:
                    return cls(place=(x, y))
            elif int(text) >= 0:
                return cls(index=int(text))
        except ValueError:
            pass
        raise UsageError(
            f"The face {text!r} is unknown: give an index (0 is the leftmost), a place 'x,y' between 0 and 1, or one of "
            f"{', '.join(named)}."
        )

    def pick(self, faces: Sequence[Face], width_px: int, height_px: int) -> Face | None:
        """The chosen one of `faces`; for a speaker, who must be known from a survey, the largest."""
        crops = [Crop.of_points(face.points_px) for face in faces]
        order = range(len(faces))
        if self.index is not None:
            ordered = sorted(order, key=lambda i: crops[i].x_px)
            return faces[ordered[self.index]] if self.index < len(ordered) else None
        if not faces:
            return None
        if self.place is not None:
            x, y = self.place[0] * width_px, self.place[1] * height_px
            return faces[min(order, key=lambda i: float(np.hypot(crops[i].x_px - x, crops[i].y_px - y)))]
        return faces[max(order, key=lambda i: crops[i].side_px)]


@dataclass(frozen=True, slots=True, eq=False)
class Survey:
    """A first look at a source: the faces of the chosen person, and the choice made fast for the run that follows."""

    choice: FaceChoice
    references: tuple[Reference, ...]
    faces_seen: int  # people, the chosen one included


def survey(pictures: Iterable[Picture], nets: FaceNets, choice: FaceChoice, every: int = 1) -> Survey:
    """Look at some pictures of a source, `every` so many (a few a second), and tell who the chosen one is.

    The speaker is the one whose mouth opening varies most. After a cut people are known by their looks, else by where they were.
    With no face in any of `pictures` the survey has no references.
    """
    people: list[list[Reference]] = []
    looks: list[list[F32]] = []
    last: list[Crop | None] = []
    size = (1, 1)
    cuts = _Cuts()
    for number, picture in enumerate(pictures):
        if cuts(picture):
            last = [None] * len(last)
        if number % every:
            continue
        size = (picture.width_px, picture.height_px)
        known = [
            face
            for crop in last
            if crop is not None and (face := nets.face(picture, crop, settle=1)) is not None and _near(face, crop)
        ]
        away = [who for who, crop in enumerate(last) if crop is None]
        # Tiles find small faces, at twenty times the cost: only while there is nobody.
        for face in faces_in(picture, nets, known, tiles=not known):
            crop = Crop.of_points(face.points_px)
            region = Region.around(face.points_px, 0.12 * crop.side_px, *size)
            if region is None:
                continue
            seen = Reference(region, picture.rgb(region), face)
            look = likeness(seen.rgb, region, face.points_px, fit_pose(face.points_px))
            overlaps = [0.0 if other is None else crop.overlap(other) for other in last]
            who = int(np.argmax(overlaps)) if overlaps and max(overlaps) > 0.2 else len(people)
            if who == len(people) and away:
                apart, nearest = min((unlike(look, np.stack(looks[i])), i) for i in away)
                if apart < 1:
                    who = nearest
                    away.remove(who)
            if who == len(people):
                people.append([])
                looks.append([])
                last.append(None)
            people[who].append(seen)
            looks[who].append(look)
            last[who] = crop
    if not people:
        return Survey(choice, (), 0)
    if choice.speaker:
        moves = [float(np.std([opening(s.face.points_px) for s in p])) if len(p) > 2 else 0.0 for p in people]
        chosen = people[int(np.argmax(moves))]
        x, y = np.median([s.face.points_px[:, :2].mean(axis=0) for s in chosen], axis=0)
        choice = FaceChoice(place=(float(x) / size[0], float(y) / size[1]))
    else:
        firsts = [p[0].face for p in people]
        best = choice.pick(firsts, *size)
        chosen = people[firsts.index(best)] if best is not None else []
    return Survey(choice, tuple(chosen), len(people))


def faces_in(
    picture: Picture, nets: FaceNets, known: Sequence[Face] = (), *, tiles: bool = True, near: Crop | None = None
) -> tuple[Face, ...]:
    """All faces of a picture that the mesh confirms, each once, the `known` ones first; `tiles` and `near` as for the detector."""
    faces: list[Face] = []

    def is_new(crop: Crop) -> bool:
        return all(crop.overlap(Crop.of_points(face.points_px)) < 0.3 for face in faces)

    faces += [face for face in known if is_new(Crop.of_points(face.points_px))]
    for detection in nets.detect(picture, tiles=tiles, near=near):
        if not is_new(detection.crop):
            continue
        face = nets.face(picture, nets.upright(picture, detection).crop, settle=2)
        if face is not None and is_new(Crop.of_points(face.points_px)):
            faces.append(face)
    return tuple(faces)


def joined(tracks: Sequence[FaceTrack]) -> FaceTrack:
    """Consecutive tracks as one."""
    return FaceTrack(
        tuple(face for track in tracks for face in track.faces),
        tuple(state for track in tracks for state in track.states),
        np.concatenate([track.strength for track in tracks]),
        tuple(shot for track in tracks for shot in track.shot),
    )


class Retrace:
    """The detect stage for a source whose pictures were all tracked before: it looks at nothing.

    track: of the source's pictures, first to last. Pictures that come after the last are taken for it.
    """

    name = "detect"

    def __init__(self, track: FaceTrack) -> None:
        self._track = track

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        last = len(self._track.faces) - 1
        for clip in clips:
            yield replace(clip, track=self._track.at([min(number, last) for number in clip.frames.shown]))


class _Cuts:
    """Finds cuts: called with each picture of a stream, whether it differs from the last far more than those before did."""

    def __init__(self) -> None:
        self._thumbnail: F32 | None = None
        self._change = 1.0  # running mean of the thumbnails' difference

    def __call__(self, picture: Picture) -> bool:
        rows = picture.y[:: max(1, picture.height_px // 144)]  # reading all of them is what would cost most
        small = cv2.resize(rows, (64, 36), interpolation=cv2.INTER_AREA).astype(np.float32)
        before, self._thumbnail = self._thumbnail, small
        if before is None:
            return False
        change = float(np.abs(small - before).mean())
        cut = change > _CUT_LEVEL and change > _CUT_RATIO * self._change
        self._change += 0.2 * (min(change, _CUT_LEVEL) - self._change)
        return cut


@dataclass(slots=True)
class _Seen:
    """One picture on its way through the look-ahead."""

    face: Face | None
    state: FaceState
    shot: int


class Detect:
    """The detect stage. `look_ahead` pictures of delay; 0 turns smoothing and early fading off. Without `tiles` small faces are
    not searched for, which would hold up a live picture; without `shapes` faces that are followed come without blendshapes.
    With `sparing` a picture may get what lies between the faces found before and after it, which needs up to three more of delay;
    with `between` more of them do.
    """

    name = "detect"

    def __init__(
        self,
        nets: FaceNets,
        choice: FaceChoice | None = None,
        *,
        look_ahead: int = LOOK_AHEAD,
        tiles: bool = True,
        shapes: bool = True,
        sparing: bool = False,
        between: Between | None = None,
    ) -> None:
        self._nets = nets
        self._between = between
        self._choice = choice or FaceChoice()
        self._look_ahead = look_ahead
        self._tiles = tiles
        self._shapes = shapes
        self._sparing = sparing

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        tracker = _Tracker(self._nets, self._choice, self._tiles, self._shapes, self._sparing, self._between)
        waiting: deque[Clip] = deque()
        seen: deque[_Seen] = deque()  # of the pictures of `waiting`, and before them up to `look_ahead` already let go
        passed = 0  # how many of `seen` were let go
        told = _Told()
        for clip in itertools.chain(clips, (None,)):  # None: no more will come, so nothing waits for what is ahead
            if clip is not None:
                waiting.append(clip)
                if all(told.knows(one) for one in waiting):  # then the whole source was told, and the tracker is done
                    while waiting:
                        yield told.again(waiting.popleft())
                    continue
                for picture in clip.frames.pictures:
                    seen.extend(tracker.look(picture))
            elif waiting:
                seen.extend(tracker.end())
            ahead = self._look_ahead if clip is not None else 0
            while waiting and len(seen) - passed >= len(waiting[0]) + ahead:
                first = self._tracked(waiting.popleft(), seen, passed)
                told.keep(first)
                yield first
                passed = self._forget(seen, passed + len(first))

    def _forget(self, seen: deque[_Seen], passed: int) -> int:
        while passed > self._look_ahead:
            seen.popleft()
            passed -= 1
        return passed

    def _tracked(self, clip: Clip, seen: deque[_Seen], passed: int) -> Clip:
        window = list(seen)
        span = range(passed, passed + len(clip))
        track = FaceTrack(
            faces=tuple(self._smoothed(window, i) for i in span),
            states=tuple(window[i].state for i in span),
            strength=np.array([self._strength(window, i) for i in span], np.float32),
            shot=tuple(window[i].shot for i in span),
        )
        return replace(clip, track=track)

    def _smoothed(self, window: list[_Seen], i: int) -> Face | None:
        face = window[i].face
        around = window[max(i - 2, 0) : i + 3]
        if face is None or self._look_ahead < 2 or len(around) < 5 or i < 2:
            return face
        faces = [s.face for s in around if s.face is not None and s.shot == window[i].shot]
        if len(faces) < 5 or all(f is face for f in faces):
            return face
        points = np.tensordot(_SAVGOL, np.stack([f.points_px for f in faces]), axes=1)
        return replace(face, points_px=points.astype(np.float32))

    def _strength(self, window: list[_Seen], i: int) -> float:
        """1 where all is well, falling to 0 over the look-ahead towards a picture that must not be drawn on."""
        if window[i].state is not FaceState.OK:
            return 0.0
        reach = self._look_ahead + 1
        strength = 1.0
        for step in range(1, reach):
            for j in (i - step, i + step):
                if 0 <= j < len(window) and window[j].shot == window[i].shot and window[j].state is not FaceState.OK:
                    strength = min(strength, step / reach)
        return strength


class _Told:
    """What was told of the pictures of a source, which comes to be played back and forth: of all of them, or of none if they are
    more than `KEPT_PICTURES`."""

    def __init__(self) -> None:
        self._of: dict[int, tuple[Face | None, FaceState, np.float32, int]] = {}
        self._keeps = True

    def keep(self, clip: Clip) -> None:
        track = clip.track
        assert track is not None
        if self._keeps and clip.frames.shown:
            told = zip(track.faces, track.states, track.strength, track.shot, strict=True)
            self._of |= zip(clip.frames.shown, told, strict=True)
        if len(self._of) > KEPT_PICTURES:
            self._of, self._keeps = {}, False

    def knows(self, clip: Clip) -> bool:
        return bool(clip.frames.shown) and self._of.keys() >= set(clip.frames.shown)

    def again(self, clip: Clip) -> Clip:
        faces, states, strength, shot = zip(*(self._of[i] for i in clip.frames.shown), strict=True)
        return replace(clip, track=FaceTrack(faces, states, np.array(strength, np.float32), shot))


class _How(enum.Enum):
    """How the face of a picture that waited was found."""

    LINE = enum.auto()  # between its neighbours
    TOLD = enum.auto()  # by the smaller network
    LOOKED = enum.auto()  # by the mesh


class _Tracker:
    """Follows one face from picture to picture; the state of one stream."""

    def __init__(
        self,
        nets: FaceNets,
        choice: FaceChoice,
        tiles: bool,
        shapes: bool,
        sparing: bool,
        between: Between | None,
    ) -> None:
        self._nets = nets
        self._tween = between
        self._choice = choice
        self._tiles = tiles
        self._shapes = shapes
        self._sparing = sparing
        self._crop: Crop | None = None
        self._lost: Crop | None = None  # where the face was before it was lost
        self._last: tuple[Picture, _Seen] | None = None
        self._is_cut = _Cuts()
        self._shot = 0
        self._missed = 0
        self._look = Appearance()
        # The last points of the shot; None where not all was well.
        self._trail: deque[F32 | None] = deque(maxlen=_FAR + 1)
        self._held: list[Picture] = []  # pictures that wait to be spared
        self._span = _NEAR  # to the next picture to be looked at

    def look(self, picture: Picture) -> list[_Seen]:
        """What is to be seen in `picture`, or nothing as long as it waits for the next; before it, what had been waiting."""
        if self._held and self._held[-1] is picture:
            return [*(seen := self.end()), seen[-1]]
        if not self._held and self._last is not None and self._last[0] is picture:
            return [self._last[1]]
        if self._is_cut(picture):
            return [*self.end(), self._seen(picture, True)]
        if len(self._held) + 1 < self._reach():
            self._held.append(picture)
            return []
        held, self._held = self._held, []
        if held and (spared := self._spare(held, picture)) is not None:
            return spared
        return [self._seen(one, False) for one in (*held, picture)]

    def end(self) -> list[_Seen]:
        """What is to be seen in the pictures that wait, if any do."""
        held, self._held = self._held, []
        if len(held) > 1 and (spared := self._spare(held[:-1], held[-1])) is not None:
            return spared
        return [self._seen(one, False) for one in held]

    def _reach(self) -> int:
        """How far the next picture to be looked at may be: as far back all must have been well too."""
        if not self._sparing or len(self._trail) <= _NEAR or any(points is None for points in self._trail):
            return 1
        return self._span if len(self._trail) > self._span else _NEAR

    def _seen(self, picture: Picture, cut: bool) -> _Seen:
        if cut:
            self._shot += 1
            self._crop, self._lost, self._missed, self._look = None, None, 0, Appearance()
            self._trail.clear()
            self._span = _NEAR
        face = self._find(picture)
        missing = FaceState.CUT if cut else FaceState.LOST
        state = self._judge(picture, face) if face is not None else missing
        return self._followed(picture, face, state)

    def _followed(self, picture: Picture, face: Face | None, state: FaceState) -> _Seen:
        seen = _Seen(face, state, self._shot)
        self._last = (picture, seen)
        self._trail.append(face.points_px if face is not None and state is FaceState.OK else None)
        return seen

    def _spare(self, held: list[Picture], picture: Picture) -> list[_Seen] | None:
        """What is to be seen in all of them, if the face goes on so evenly that those `held` need no look of their own; None where
        it is not found again."""
        assert self._crop is not None
        assert self._last is not None
        (earlier, seen), crop = self._last, self._crop
        face = self._nets.face(picture, crop, shapes=self._shapes)
        if face is None or seen.face is None or not _near(face, crop):
            return None
        between = self._between((earlier, seen.face), held, (picture, face), list(self._trail))
        if between is None:
            return None
        self._crop = Crop.of_points(face.points_px)
        self._span = _FAR if all(how is _How.LINE for _, how in between) else _NEAR
        out: list[_Seen] = []
        # The last face is judged after those before it, unless all may be taken to be as it is.
        state = None if any(how is _How.LOOKED for _, how in between) else self._judge(picture, face)
        for one, (found, _) in zip(held, between, strict=True):
            out.append(self._followed(one, found, state if state is FaceState.OK else self._judge(one, found)))
        return [*out, self._followed(picture, face, state or self._judge(picture, face))]

    def _between(
        self, one: tuple[Picture, Face], held: list[Picture], other: tuple[Picture, Face], before: list[F32 | None]
    ) -> list[tuple[Face, _How]] | None:
        """The faces of the pictures `held` between two others, and how each was found; None where one is lost.

        `before` has the points of the pictures up to `one`.
        """
        if not held:
            return []
        span = len(held) + 1
        lines = [_mean(one[1], other[1], (i + 1) / span) for i in range(len(held))]
        if self._is_even(before[-1 - span], one[1].points_px, other[1].points_px) and all(
            _is_like(picture, face.points_px, (one, other), lips=span > _NEAR)
            for picture, face in zip(held, lines, strict=True)
        ):
            return [(face, _How.LINE) for face in lines]
        if span == _NEAR and (told := self._told(one, held[0], other, before[-1 - span])) is not None:
            return [(told, _How.TOLD)]
        # The faces on both sides are known already: those in between are looked for from a better guess than they had.
        half = span // 2
        picture, guess = held[half - 1], Crop.of_points(lines[half - 1].points_px)
        found = self._nets.face(picture, guess, shapes=self._shapes)
        if found is None or not _near(found, guess):
            return None
        first = self._between(one, held[: half - 1], (picture, found), before)
        if first is None:
            return None
        passed = [*before, *(face.points_px for face, _ in first), found.points_px]
        second = self._between((picture, found), held[half:], other, passed)
        return None if second is None else [*first, (found, _How.LOOKED), *second]

    def _told(
        self, one: tuple[Picture, Face], picture: Picture, other: tuple[Picture, Face], before_px: F32 | None
    ) -> Face | None:
        """The face in the middle of two as the smaller network tells it; None where it is not sure."""
        if self._tween is None or before_px is None:
            return None
        points_px, lips_px, all_px = self._tween(one, picture, other, before_px)
        if lips_px > _SURE_LIPS_PX or all_px > _SURE_PX:
            return None
        shapes = self._nets.blendshapes(points_px) if self._shapes else None
        return Face(points_px, shapes, min(one[1].confidence, other[1].confidence))

    def _is_even(self, first: F32 | None, second: F32, third: F32) -> bool:
        """Whether the points go on from the second to the third as they did from the first to the second."""
        if first is None:
            return False
        assert self._crop is not None
        # Of an even acceleration the middle of two pictures is off by an eighth of this.
        off = np.linalg.norm((third - 2 * second + first)[:, :2], axis=1) / (8 * self._crop.side_px)
        return bool((off < _UNEVEN).mean() > 0.95 and off[_LIPS].mean() < _UNEVEN)

    def _find(self, picture: Picture) -> Face | None:
        if self._crop is not None:
            face = self._nets.face(picture, self._crop, shapes=self._shapes)
            if face is not None and _near(face, self._crop):
                self._crop = Crop.of_points(face.points_px)
                return face
            self._crop, self._lost, self._missed = None, self._crop, 0
        self._missed += 1
        if self._missed % _RETRY != 1:
            return None
        tiles = self._tiles and self._missed % _RETRY_TILES == 1
        faces = faces_in(picture, self._nets, tiles=tiles, near=self._lost)
        face = self._choice.pick(faces, picture.width_px, picture.height_px)
        if face is not None:
            self._crop, self._missed = Crop.of_points(face.points_px), 0
        return face

    def _judge(self, picture: Picture, face: Face) -> FaceState:
        pose = fit_pose(face.points_px)
        if abs(pose.yaw_deg) > _MAX_YAW_DEG or abs(pose.pitch_deg) > _MAX_PITCH_DEG:
            return FaceState.PROFILE
        covered = self._look.covered(colours(picture, face.points_px), pose)
        return FaceState.OCCLUDED if covered else FaceState.OK


def _mean(one: Face, other: Face, part: float) -> Face:
    """The face at `part` of the way from one to the other."""
    near, far = np.float32(1 - part), np.float32(part)
    shapes = None if one.shapes is None or other.shapes is None else one.shapes * near + other.shapes * far
    return Face(one.points_px * near + other.points_px * far, shapes, min(one.confidence, other.confidence))


def _is_like(picture: Picture, points_px: F32, neighbours: Sequence[tuple[Picture, Face]], lips: bool) -> bool:
    """Whether the face in `picture`, at about `points_px`, looks like the mean of the same face in two pictures around it; with
    `lips` what it says must, too."""
    around = [(of, face.points_px) for of, face in neighbours]
    if (_unlike(picture, points_px, around, _PARTS) < _UNLIKE).mean() <= 0.98:
        return False
    around = [(of, points[_LIPS]) for of, points in around]
    return not lips or bool((_unlike(picture, points_px[_LIPS], around, _LIP_PARTS) < _UNLIKE).mean() > 0.95)


def _unlike(picture: Picture, points_px: F32, neighbours: Sequence[tuple[Picture, F32]], count: int) -> F32:
    """By how many levels each of about `count` x `count` parts of what is at `points_px` differs from the mean of the others."""
    size = np.array([picture.width_px, picture.height_px])
    low = np.clip(points_px[:, :2].min(axis=0), 0, size - 2).astype(int)
    wide, high = np.clip(np.ceil(points_px[:, :2].max(axis=0)), low + 2, size).astype(int) - low
    skip = max(1, int(high) // (4 * count))  # a quarter of each part's rows tells enough
    part = max(1, int(wide) // count), max(1, int(high) // skip // count)  # whole pixels are averaged fast
    parts = int(wide) // part[0], int(high) // skip // part[1]
    wide, high = parts[0] * part[0], parts[1] * part[1] * skip

    def seen(of: Picture, shift: F32) -> F32:
        x, y = np.clip(low + shift, 0, size - (wide, high)).astype(int)
        box = of.y[y : y + high : skip, x : x + wide]
        return np.asarray(cv2.resize(box, parts, interpolation=cv2.INTER_AREA), np.float32)

    centre = points_px[:, :2].mean(axis=0)
    usual = np.mean([seen(of, np.rint(points[:, :2].mean(axis=0) - centre)) for of, points in neighbours], axis=0)
    return np.asarray(np.abs(seen(picture, np.zeros(2, np.float32)) - usual), np.float32)


def _near(face: Face, crop: Crop) -> bool:
    """Whether a face is still about where its crop was: a farther jump is another face."""
    dx, dy = face.points_px[:, :2].mean(axis=0) - (crop.x_px, crop.y_px)
    return float(np.hypot(dx, dy)) < 0.35 * crop.side_px
