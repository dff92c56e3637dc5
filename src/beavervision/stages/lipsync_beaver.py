"""The default model: hear the speech as mouth motion, then draw that motion onto this face.

Motion: a temporal network maps log-mel rows to coefficients of a learned basis of lower-face motion. Drawing: the face's own pixels
are warped from where the points are to where they should be, at the picture's own sharpness; only the opening of the mouth is
painted, by a small network that sees the warped surroundings and a reference mouth of the same person, never the old opening.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache

import cv2
import numpy as np
import numpy.typing as npt

from beavervision.media import (
    F32,
    U8,
    Clip,
    Color,
    Face,
    Heard,
    Net,
    Patch,
    Picture,
    Profile,
    Reference,
    Region,
    between_pixels,
    to_planes,
)
from beavervision.models import mesh
from beavervision.models.basis import GAP_STD, REST_SHARE, MotionBasis
from beavervision.models.beaver import (
    CONTEXT_STEPS,
    EXTRA_ROWS,
    LAST_ROW_MS,
    PAINT_SIZE,
    PHONE_FEATURES,
    Equaliser,
    painted_rows,
)
from beavervision.models.inside import inside
from beavervision.models.likeness import likeness, unlike
from beavervision.models.mesh import Pose, fit_pose
from beavervision.models.visemes import Lead, speaking
from beavervision.models.warp import Opening, triangle_flows, warped

_ROW_S = Fraction(1, 200)  # from one row of the sound to the next
_DENSE = 2  # of them to each row of the motion net
_ROWS_PER_STEP = 2  # of the motion net
_STEP = _DENSE * _ROWS_PER_STEP
_AMPLITUDES = (0.75, 1.35)
# Of motion, too small to be seen: how many steps the network is given at once shows in the last bits of what it tells, and
# would now and then move a pixel.
_GRAINS = np.float32(1024)  # to a coefficient of 1
_UNMET_GAIN = 1.15  # motion heard from strangers comes out that much too small (85 % of the truth's spread on them)
_FRONTAL_DEG = 35.0
_MOST_OTHERS = 8  # people beside the profile's that are remembered
_LEAST_SHOWN = 0.08  # gap of the most open mouth, in eye distances, from which it serves as reference
_IMAGINED_GAP = 0.16  # of one that stands in for it
_GATE_OPEN_S, _GATE_CLOSE_S = 0.06, 0.16  # how fast the mouth may come alive and settle
_RING = 1.28  # how far around the mouth's centre the still frame of the warp lies, against the jaw line
_MARGIN_PX = 4.0  # around what the warp may move
_PAINT_SCALE = 100.0  # pixels of the painter's crop to the distance of the eyes
_PAINT_CENTRE = np.array([0.0, 1.2, -0.28], np.float32)
_LOWER_MIDDLE, _CORNERS = slice(14, 17), [0, 10]  # of mesh.INNER_LIP
_SPARE = 1.06  # by how much a mouth may be wider than that of the reference
_DARK_AT = np.array([0.45, 0.55], np.float32)  # of the upper and of the lower lip, in an imagined mouth
_KEPT = 0.55  # of the reference's opening to either side: as wide in a wider mouth, for front teeth are
_MIN_HOLE_PX = 6.0  # area of the opening, in painter pixels, from which it is painted


class _Ear:
    """What one stream hears, clip by clip, as mouth motion: each row is equalised once, however far clips overlap in what they
    hear, and the network goes on from where it was.

    The network's steps lie 20 ms apart. Where pictures do not lie whole steps apart there are a few series of such steps, each
    with a state of its own, so that every picture is near a step.
    """

    def __init__(self, motion: Net, rate: Fraction) -> None:
        self._motion = motion
        self._equalisers = [Equaliser() for _ in range(_DENSE)]
        self._rows: F32 | None = None
        self._stop = 0
        self._period = Fraction(1) / rate / _ROW_S  # rows from one picture to the next
        self._series = np.unique([self._time(i) % _STEP for i in range(_STEP * self._period.denominator)])
        self._states = np.zeros((len(self._series), PHONE_FEATURES), np.float32)
        self._next = 0  # the picture that the states are those before

    def __call__(self, heard: Heard, start: int, count: int) -> F32:
        """The coefficients (count, k) at the times of the pictures from number `start` on, to within half a row."""
        rows = self._equalised(heard)
        if start != self._next:
            self._states[:] = 0
        times = np.array([self._time(start + i) for i in range(count)])
        begin, after = self._first_steps(times[0]), self._first_steps(self._time(start + count))
        gone = (after - begin) // _STEP
        steps = max(int(times[-1] - times[0]) // _STEP + 1, int(gone.max()) - CONTEXT_STEPS)
        last = begin[:, None] + round(Fraction(LAST_ROW_MS, 1000) / _ROW_S) - heard.start
        wanted = last + _DENSE * np.arange(1 - _ROWS_PER_STEP - EXTRA_ROWS, _ROWS_PER_STEP * (steps - 1) + 1)
        told, states = self._motion(rows[np.clip(wanted, 0, len(rows) - 1)], self._states)
        known = np.concatenate([self._states[:, None], states], axis=1)
        self._states, self._next = known[np.arange(len(gone)), gone], start + count
        which = np.searchsorted(self._series, times % _STEP)
        return np.asarray(told[which, (times - begin[which]) // _STEP], np.float32)

    def _time(self, picture: int) -> int:
        """The row that is nearest to it."""
        return round(picture * self._period)

    def _first_steps(self, time: int) -> npt.NDArray[np.intp]:
        """Of each series, the first from `time` on."""
        return time + (self._series - time) % _STEP

    def _equalised(self, heard: Heard) -> F32:
        first = heard.start if self._rows is None else max(self._stop, heard.start)
        fresh = heard.rows[first - heard.start :].copy()
        for i in range(_DENSE):
            fresh[i::_DENSE] = self._equalisers[(first + i) % _DENSE].push(fresh[i::_DENSE])
        rows = fresh if self._rows is None else np.concatenate([self._rows, fresh])[-len(heard.rows) :]
        self._rows, self._stop = rows, heard.start + len(rows)
        return rows


class BeaverSync:
    """The lip-sync stage of the default model for one source.

    motion takes log-mel rows (b, t, 64) and a state (b, 128) and gives coefficients (b, n, k) and states (b, m, 128); painter
    takes (n, 12, h, 96) and gives (n, 3, h, 96); both as in :mod:`beavervision.models.nets.beaver`.
    """

    name = "lipsync"

    def __init__(
        self, motion: Net, painter: Net, basis: MotionBasis, profile: Profile, amplitude: float | None = None
    ) -> None:
        """`amplitude` is that of :func:`profile_of` for other people whom cuts bring."""
        self._motion = motion
        self._painter = painter
        self._basis = basis
        self._lead = Lead(basis)
        self._amplitude = amplitude
        self._person = _Person.of(profile)

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        gate, ear, cast = 0.0, None, _Cast(self._person, self._basis, self._amplitude)
        for clip in clips:
            if clip.heard is None or clip.track is None:
                raise ValueError("lip sync needs clips that were heard and tracked")
            rate, start, phones = clip.frames.rate, clip.frames.start, clip.heard.phones
            gates = np.empty(len(clip), np.float32)
            for i, speaks in enumerate((clip.heard.coming > 0.5) | speaking(phones, start, rate, len(clip))):
                pace = _GATE_OPEN_S if speaks else _GATE_CLOSE_S
                gate += (float(speaks) - gate) * min(1.0, 1 / float(rate) / pace)
                gates[i] = gate
            ear = ear or _Ear(self._motion, rate)
            told = np.round(ear(clip.heard, start, len(clip)) * _GRAINS) / _GRAINS
            people = cast(clip)
            gates *= [person.profile.amplitude for person in people]
            motion = np.asarray(told * gates[:, None], np.float32)
            yield self._draw(clip, self._lead(motion, start, rate, phones), people)

    def draw(self, clip: Clip, motion: F32) -> Clip:
        """The tracked clip with patches that give its faces, all of the profile's person, the mouth of `motion` (n, k),
        coefficients of the basis."""
        return self._draw(clip, motion, [self._person] * len(clip))

    def _draw(self, clip: Clip, motion: F32, people: Sequence[_Person]) -> Clip:
        assert clip.track is not None
        track = clip.track
        drawings: list[_Drawing | None] = [None] * len(clip)
        opening = np.zeros(len(clip), np.float32)
        faces = [(i, face) for i, face in enumerate(track.faces) if face is not None and track.strength[i] > 0]
        if faces:
            at, points = [i for i, _ in faces], np.stack([face.points_px for _, face in faces])
            poses = [fit_pose(face_px) for face_px in points]
            rests = [people[i].profile.rest for i in at]
            targets = self._targets(points, poses, rests, motion[at], track.strength[at])
            pictures = [clip.frames.pictures[i] for i in at]
            drawn = _drawn(pictures, points, targets, poses, track.strength[at])
            for i, drawing, opens in zip(at, drawn, mesh.openings(targets), strict=True):
                if drawing is not None:
                    drawings[i], opening[i] = drawing, opens
        self._paint([(d, person.reference) for d, person in zip(drawings, people, strict=True) if d is not None])
        return replace(
            clip,
            patches=tuple((d.patch(),) if d is not None else () for d in drawings),
            opening=opening,
            drawn=tuple(d.target if d is not None else None for d in drawings),
        )

    def shown(self, clip: Clip) -> F32:
        """The motion (n, k) that the mouths of a tracked clip show themselves; 0 where there is no face."""
        assert clip.track is not None
        nothing = np.zeros(len(self._basis.shapes), np.float32)
        points = [None if face is None else face.points_px for face in clip.track.faces]
        rest = self._person.profile.rest
        return np.stack([nothing if p is None else self._has(p, fit_pose(p), rest) for p in points])

    def _has(self, points_px: F32, pose: Pose, rest: F32) -> F32:
        """The motion (k,) that the mouth of a face (478, 3) shows against its `rest`."""
        points = self._basis.points
        return self._basis.coefficients(pose.to_face(points_px[points]) - rest[points])

    def _targets(self, points_px: F32, poses: Sequence[Pose], rests: Sequence[F32], wanted: F32, strength: F32) -> F32:
        """Where the points (n, 478, 3) shall come to lie, for the motion `wanted` (n, k) at a `strength` (n,)."""
        targets = points_px.copy()
        # Face by face: a product of matrices rounds differently for other numbers of them.
        for target, pose, rest, motion, share in zip(targets, poses, rests, wanted, strength, strict=True):
            move = self._basis.displacement((motion - self._has(target, pose, rest)) * share)
            target[self._basis.points] += pose.vector_to_picture(move)
        _part_lips(targets)
        return targets

    def _paint(self, drawings: Sequence[tuple[_Drawing, _ReferenceMouth]]) -> None:
        shown = [(d, *d.shown(reference)) for d, reference in drawings if d.hole_area() > _MIN_HOLE_PX]
        for height in {layers.shape[1] for _, layers, _ in shown}:
            alike = [s for s in shown if s[1].shape[1] == height]
            (painted,) = self._painter(np.stack([layers for _, layers, _ in alike]))
            for (drawing, _, top), rgb in zip(alike, painted, strict=True):
                drawing.fill(np.asarray(rgb, np.float32), top)


@dataclass(frozen=True, slots=True, eq=False)
class _Person:
    profile: Profile
    reference: _ReferenceMouth

    @classmethod
    def of(cls, profile: Profile) -> _Person:
        return cls(profile, _ReferenceMouth.of(profile.references))


class _Cast:
    """Who is seen in a stream, shot by shot. A face like none that was seen before has no mouth but its own: it gets a profile
    of the first picture of its shot that shows it from the front. Up to that one it is taken for the first person's."""

    def __init__(self, person: _Person, basis: MotionBasis, amplitude: float | None) -> None:
        self._basis, self._amplitude = basis, amplitude
        self._known = [person]
        self._now = person
        self._shot: int | None = None

    def __call__(self, clip: Clip) -> list[_Person]:
        """Of each picture of a tracked clip."""
        assert clip.track is not None
        people: list[_Person] = []
        for picture, face, shot in zip(clip.frames.pictures, clip.track.faces, clip.track.shot, strict=True):
            if face is not None and shot != self._shot:
                pose = fit_pose(face.points_px)
                if abs(pose.yaw_deg) < _FRONTAL_DEG:
                    self._shot = shot
                    self._now = self._who(picture, face, pose)
            people.append(self._now if shot == self._shot else self._known[0])
        return people

    def _who(self, picture: Picture, face: Face, pose: Pose) -> _Person:
        region = Region.around(face.points_px, 0.0, picture.width_px, picture.height_px)
        if region is None or self._known[0].profile.looks is None:
            return self._known[0]
        seen = Reference(region, picture.rgb(region), face)
        look = likeness(seen.rgb, region, face.points_px, pose)
        apart = [np.inf if (looks := one.profile.looks) is None else unlike(look, looks) for one in self._known]
        if min(apart) < 1:
            return self._known[int(np.argmin(apart))]
        new = _Person.of(profile_of([seen], self._basis, self._amplitude))
        self._known = [self._known[0], *self._known[1:][-_MOST_OTHERS + 1 :], new]
        return new


def profile_of(references: Sequence[Reference], basis: MotionBasis, amplitude: float | None = None) -> Profile:
    """The profile of a person from some of their faces (one is enough).

    The rest mouth is the mean of the most closed ones, closed; a moving source also tells the amplitude. The reference is
    the most open frontal mouth, or where no mouth is open enough to tell what it looks like inside, an imagined one.
    `amplitude`, that of another speaker (1 is average), replaces the person's own.
    """
    if not references:
        raise ValueError("a profile needs at least one face")
    poses = [fit_pose(r.face.points_px) for r in references]
    frontal = [i for i, p in enumerate(poses) if abs(p.yaw_deg) < _FRONTAL_DEG] or list(range(len(poses)))
    faces = np.stack([poses[i].to_face(references[i].face.points_px) for i in frontal])
    gaps = mesh.gaps(faces)
    rest = faces[gaps <= np.quantile(gaps, REST_SHARE)].mean(axis=0)
    rest[basis.points] += basis.displacement(basis.closing(rest))
    moves = len(frontal) >= 8 and gaps.std() > 0.25 * GAP_STD
    if amplitude is None:
        amplitude = float(np.clip(gaps.std() / GAP_STD, *_AMPLITUDES)) if moves else 1.0
    most_open = references[frontal[int(np.argmax(gaps))]]
    shown = most_open if gaps.max() > _LEAST_SHOWN else _imagined(most_open, basis)
    looks = np.stack([likeness(r.rgb, r.region, r.face.points_px, p) for r, p in zip(references, poses, strict=True)])
    return Profile(rest.astype(np.float32), _UNMET_GAIN * amplitude, () if shown is None else (shown,), looks)


def _imagined(reference: Reference, basis: MotionBasis) -> Reference | None:
    """The same picture with an open mouth; None where the mouth is not in it."""
    region = reference.region
    picture = Picture(*to_planes(reference.rgb, Color()))
    origin = np.array([region.x_px, region.y_px, 0], np.float32)
    source = reference.face.points_px - origin
    pose = fit_pose(source)
    opens = basis.opening * np.float32(_IMAGINED_GAP / (basis.opening @ basis.opening))
    target = source.copy()
    target[basis.points] += pose.vector_to_picture(basis.displacement(basis.closing(pose.to_face(source)) + opens))
    (drawing,) = _drawn([picture], source[None], target[None], [pose], np.ones(1, np.float32))
    if drawing is None:
        return None
    drawing.imagine()
    opened = picture.painted((drawing.patch(),)).rgb(Region(0, 0, region.width_px, region.height_px))
    return Reference(region, opened, replace(reference.face, points_px=target + origin), imagined=True)


def _part_lips(points_px: F32) -> None:
    """Where the lower lip of faces (n, 478, 3) came above the upper, let them meet halfway (in place)."""
    upper, lower = points_px[:, mesh.INNER_UPPER], points_px[:, mesh.INNER_LOWER]
    down = points_px[:, 152, :2] - points_px[:, 1, :2]
    crossed = ((lower - upper)[..., :2] @ down[..., None]) < 0
    middle = (upper + lower) / 2
    points_px[:, mesh.INNER_UPPER] = np.where(crossed, middle, upper)
    points_px[:, mesh.INNER_LOWER] = np.where(crossed, middle, lower)


@dataclass(frozen=True, slots=True, eq=False)
class _Topology:
    """The triangles that the warp moves: the lower face, and a ring from the jaw line to a frame that stays."""

    triangles: npt.NDArray[np.intp]  # (t, 3), into the mesh's points followed by the frame's
    opening: Opening
    jaw: npt.NDArray[np.intp]
    used: npt.NDArray[np.intp]  # the points that the triangles have
    normals: F32  # (t, 3), of the average face's triangles, in the pose-free frame; 0 for the ring's

    def framed(self, source_px: F32, target_px: F32) -> tuple[F32, F32, F32]:
        """Where the points of the triangles are and shall come to lie (n, p, 2), of faces (n, 478, 3), and the corners
        of the boxes that hold them (n, 2, 2).
        """
        centre = source_px[:, mesh.OUTER_CORNERS, :2].mean(axis=1, keepdims=True)
        frame = centre + _RING * (source_px[:, self.jaw, :2] - centre)
        source, target = (np.concatenate([points[..., :2], frame], axis=1) for points in (source_px, target_px))
        both = np.concatenate([source[:, self.used], target[:, self.used]], axis=1)
        return source, target, np.stack([both.min(axis=1), both.max(axis=1)], axis=1)

    def facing(self, pose: Pose) -> npt.NDArray[np.bool_]:
        """Which triangles (t,) a head so turned shows: the others would cover what is before them with pixels from afar.

        The average face tells, for in the face's own the lips fold over themselves whenever they close.
        """
        return np.asarray((self.normals @ pose.rotation[2] <= 0) | (self.normals[:, 2] >= 0), np.bool_)


@cache
def _topology(points: tuple[int, ...]) -> _Topology:
    lower = np.zeros(mesh.canonical().shape[0], bool)
    lower[list(points)] = True
    inner = np.isin(mesh.triangles(), mesh.INNER_LIP).all(axis=1)
    of_mesh = mesh.triangles()[lower[mesh.triangles()].any(axis=1) & ~inner]
    opening = mesh.triangles()[inner]
    jaw = mesh.JAW
    first = mesh.canonical().shape[0] + 10  # after the iris points
    ring = []
    for i in range(len(jaw) - 1):
        a, b, c, d = int(jaw[i]), int(jaw[i + 1]), first + i, first + i + 1
        ring += [(a, b, c), (b, d, c)]
    # The frame first and the opening before the lips, so that where triangles overlap the face covers the frame.
    triangles = np.concatenate([np.array(ring, np.intp), opening, of_mesh])
    lip_y = mesh.canonical()[mesh.INNER_CORNERS, 1].mean()
    lower = mesh.canonical()[of_mesh, 1].mean(axis=1) > lip_y
    side = np.concatenate([np.full(len(ring), -1), np.zeros(len(opening)), np.where(lower, -1, 1)])
    lips = Opening(mesh.INNER_LIP[:11], mesh.INNER_LIP[[0, *range(19, 9, -1)]], side.astype(np.int8))
    a, b, c = (mesh.canonical()[triangles[len(ring) :, i]] for i in range(3))
    normals = np.concatenate([np.zeros((len(ring), 3)), np.cross(b - a, c - a)]).astype(np.float32)
    return _Topology(triangles, lips, jaw, np.unique(triangles), normals)


class _Drawing:
    """One picture's lower face on its way: warped, then filled, then a patch."""

    __slots__ = ("_color", "_hole", "_hole_in", "_mask", "_planes", "_region", "_soft", "_to_crop", "target")

    def __init__(
        self, region: Region, planes: tuple[U8, U8, U8], color: Color, mask: U8, target: F32, pose: Pose
    ) -> None:
        self._region, self._planes, self._color, self._mask = region, planes, color, mask
        self.target = target
        self._to_crop = _crop_matrix(pose)
        # The opening, where in the region it lies, and room for its edge to be softened.
        self._soft = max(0.6, pose.scale_px / 110)
        lips = target[mesh.INNER_LIP, :2] - np.array([region.x_px, region.y_px], np.float32)
        reach = round(3 * self._soft) + 1
        self._hole_in = Region.around(lips, reach, region.width_px, region.height_px) or Region(0, 0, 2, 2)
        corner = np.array([self._hole_in.x_px, self._hole_in.y_px], np.float32)
        self._hole = _polygon(lips - corner, (self._hole_in.width_px, self._hole_in.height_px))

    def hole_area(self) -> float:
        """Of the opening, in pixels of the painter's crop."""
        return cv2.sumElems(self._hole)[0] / 255 * float((self._to_crop[0, :2] ** 2).sum())

    def shown(self, reference: _ReferenceMouth) -> tuple[F32, int]:
        """What the painter has to see, (12, h, 96): the blanked crop, the opening, the reference, and that moved with the jaw; and
        which row of the crop it begins at.
        """
        lips = _apply(self._to_crop, self.target[mesh.INNER_LIP, :2])
        hole = _polygon(lips, PAINT_SIZE, grow_px=0.8)
        rows = painted_rows(hole)
        hole = hole[rows]
        layers = np.empty((12, *hole.shape), np.float32)
        to_crop = _seen_from(self._to_crop, self._region.x_px, self._region.y_px, rows.start)
        _view(self._planes, self._color, to_crop, layers[:3])
        layers[:3] *= cv2.dilate(hole, np.ones((3, 3), np.uint8)) <= 2
        np.multiply(hole, np.float32(1 / 255), out=layers[3])
        reference.show(lips, rows, layers[4:8], layers[8:])
        return layers, rows.start

    def fill(self, painted: F32, top: int) -> None:
        """Lay what was painted, (3, h, 96) from the crop's row `top` on, into the opening."""
        alpha = cv2.GaussianBlur(self._hole.astype(np.float32) * np.float32(1 / 255), (0, 0), self._soft)
        alpha_c = cv2.resize(alpha, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        _, to_yuv = _color_maps(self._color)
        yuv = (255 * to_yuv[:, :3]) @ painted.reshape(3, -1) + to_yuv[:, 3:]
        x, y = self._region.x_px + self._hole_in.x_px, self._region.y_px + self._hole_in.y_px
        to_crop = _seen_from(self._to_crop, x, y, top)
        (luma, chroma), half = self._hole_in.slices, between_pixels(to_crop, (2, 2))
        flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
        for plane, box, values, share, matrix in zip(
            self._planes,
            (luma, chroma, chroma),
            yuv.reshape(painted.shape),
            (alpha, alpha_c, alpha_c),
            (between_pixels(to_crop), half, half),
            strict=True,
        ):
            inside = cv2.warpAffine(values, matrix, share.shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)
            change = (inside - plane[box]) * share
            cv2.add(plane[box], change, dst=plane[box], dtype=cv2.CV_8U)

    def imagine(self) -> None:
        """Lay into the opening what it may look like."""
        lips = _apply(self._to_crop, self.target[mesh.INNER_LIP, :2])
        rgb = np.empty((3, *PAINT_SIZE[::-1]), np.float32)
        _view(self._planes, self._color, _seen_from(self._to_crop, self._region.x_px, self._region.y_px, 0), rgb)
        self.fill(inside(lips, rgb, _polygon(lips, PAINT_SIZE)), 0)

    def patch(self) -> Patch:
        return Patch(self._region, *self._planes, self._mask)


def _drawn(
    pictures: Sequence[Picture], source_px: F32, target_px: F32, poses: Sequence[Pose], strength: F32
) -> list[_Drawing | None]:
    """Warp each of n pictures so that its face comes from `source_px` to lie at `target_px` (n, 478, 3), at a `strength` (n,); None
    where a face is outside of its picture.
    """
    topology = _topology(_LOWER_POINTS)
    framed_source_px, framed_target_px, corners_px = topology.framed(source_px, target_px)
    regions = [
        Region.around(corners, _MARGIN_PX, picture.width_px, picture.height_px)
        for corners, picture in zip(corners_px, pictures, strict=True)
    ]
    within = [(i, region) for i, region in enumerate(regions) if region is not None]
    drawings: list[_Drawing | None] = [None] * len(pictures)
    if not within:
        return drawings
    at = [i for i, _ in within]
    origins = np.array([[region.x_px, region.y_px] for _, region in within], np.float32)[:, None]
    flows = triangle_flows(
        framed_source_px[at] - origins,
        framed_target_px[at] - origins,
        topology.triangles,
        np.stack([topology.facing(poses[i]) for i in at]),
        topology.opening,
        [(region.width_px, region.height_px) for _, region in within],
    )
    # All warps first: what each of the small steps after them needs then stays in the CPU's caches.
    warps = [(warped(pictures[i], region, flow), flow.mask) for (i, region), flow in zip(within, flows, strict=True)]
    for (i, region), (planes, mask) in zip(within, warps, strict=True):
        share = float(strength[i])
        mask = mask if share >= 1 else np.asarray(cv2.convertScaleAbs(mask, alpha=share), np.uint8)
        drawings[i] = _Drawing(region, planes, pictures[i].color, mask, target_px[i], poses[i])
    return drawings


def _polygon(points: F32, size: tuple[int, int], grow_px: float = 0.0) -> U8:
    """Coverage 0..255 (h, w) of a polygon given in continuous coordinates, moved outwards by `grow_px`."""
    if grow_px:
        outward = points - points.mean(axis=0)
        points = points + grow_px * outward / (np.sqrt((outward * outward).sum(axis=1, keepdims=True)) + 1e-6)
    mask = np.zeros((size[1], size[0]), np.uint8)
    cv2.fillPoly(mask, [np.round((points - 0.5) * 16).astype(np.int32)], 255, lineType=cv2.LINE_AA, shift=4)
    return mask


def _crop_matrix(pose: Pose) -> F32:
    """(2, 3): picture pixels to the painter's crop, upright and at a fixed scale."""
    turn = math.atan2(pose.rotation[1, 0], pose.rotation[0, 0])
    scale = _PAINT_SCALE / pose.scale_px
    cos, sin = math.cos(turn) * scale, math.sin(turn) * scale
    x, y, _ = pose.to_picture(_PAINT_CENTRE).tolist()
    right, down = PAINT_SIZE[0] / 2 - cos * x - sin * y, PAINT_SIZE[1] / 2 + sin * x - cos * y
    return np.array([[cos, sin, right], [-sin, cos, down]], np.float32)


def _seen_from(to_crop: F32, x_px: int, y_px: int, top: int) -> F32:
    """A crop's matrix (2, 3) for pixels of a box with its corner at (x_px, y_px), to the crop from its row `top` on."""
    seen = to_crop.copy()
    seen[:, 2] = to_crop @ np.array([x_px, y_px, 1], np.float32)
    seen[1, 2] -= top
    return seen


def _apply(matrix: F32, points: F32) -> F32:
    return np.asarray(points @ matrix[:, :2].T + matrix[:, 2], np.float32)


def _view(planes: tuple[U8, U8, U8], color: Color, matrix: F32, rgb: F32) -> None:
    """Fill `rgb` (3, h, w), 0..1, with a region's planes through `matrix` (continuous coordinates)."""
    shrink = math.hypot(matrix[0, 0], matrix[1, 0])
    size, edge = rgb.shape[:0:-1], cv2.BORDER_REPLICATE
    views, half = [], between_pixels(matrix, (2, 2))
    for plane, pixel_px, to_crop in zip(planes, (1, 2, 2), (between_pixels(matrix), half, half), strict=True):
        if shrink * pixel_px < 0.6:
            plane, to_crop = _smoothed(plane, to_crop, size, 0.35 / (shrink * pixel_px))
        views.append(cv2.warpAffine(plane, to_crop, size, flags=cv2.INTER_LINEAR, borderMode=edge))
    to_rgb, _ = _color_maps(color)
    for layer, values in zip(rgb, cv2.split(cv2.transform(cv2.merge(views), to_rgb)), strict=True):
        np.multiply(values, np.float32(1 / 255), out=layer)


def _smoothed(plane: U8, to_crop: F32, size: tuple[int, ...], sigma: float) -> tuple[U8, F32]:
    """What a crop of (width, height) `size` shows of a plane, blurred, and its matrix, made from that of the plane."""
    corners = np.array([[0, size[0], 0, size[0]], [0, 0, size[1], size[1]], [1, 1, 1, 1]], np.float32)
    x, y = cv2.invertAffineTransform(to_crop) @ corners
    reach = 4 * sigma + 2
    (left, right), (top, bottom) = (
        [min(max(int(edge), 0), side - 1) for edge in (along.min() - reach, along.max() + reach)]
        for along, side in zip((x, y), plane.shape[::-1], strict=True)
    )
    part = plane[top : bottom + 1, left : right + 1]
    return np.asarray(cv2.GaussianBlur(part, (0, 0), sigma), np.uint8), _seen_from(to_crop, left, top, 0)


@cache
def _color_maps(color: Color) -> tuple[F32, F32]:
    """To RGB and back."""
    return color.to_rgb(), color.to_yuv()


@dataclass(frozen=True, slots=True, eq=False)
class _ReferenceMouth:
    """The most open mouth known of the person: layers (4, 80, 96), the painter's crop and its opening; 0 without one."""

    layers: F32
    lips: F32  # (20, 2), mesh.INNER_LIP in the crop
    imagined: bool = False

    @classmethod
    def of(cls, references: Sequence[Reference]) -> _ReferenceMouth:
        layers = np.zeros((4, PAINT_SIZE[1], PAINT_SIZE[0]), np.float32)
        if not references:
            return cls(layers, np.zeros((len(mesh.INNER_LIP), 2), np.float32))
        reference = max(references, key=lambda r: mesh.opening(r.face.points_px))
        matrix = _crop_matrix(fit_pose(reference.face.points_px))
        lips = _apply(matrix, reference.face.points_px[mesh.INNER_LIP, :2])
        local = matrix.copy()
        local[:, 2] += matrix[:, :2] @ [reference.region.x_px, reference.region.y_px]
        _view(to_planes(reference.rgb, Color()), Color(), local, layers[:3])
        np.multiply(_polygon(lips, PAINT_SIZE), np.float32(1 / 255), out=layers[3])
        return cls(layers, lips, reference.imagined)

    def show(self, lips: F32, rows: slice, skull: F32, jaw: F32) -> None:
        """Put the `rows` of the layers into `skull` as they are, and into `jaw` moved so that the lower lip's middle comes to that
        of `lips`; drawn out at the sides where these are wider, and an imagined one where they open further."""
        layers = self.layers
        if not layers[3].any():
            skull[:] = jaw[:] = layers[:, rows]
            return
        columns = self._columns(lips)
        dx, dy = (lips - self.lips)[_LOWER_MIDDLE].mean(axis=0)
        more = max(dy, 0) if self.imagined else 0
        if columns is not None or more > 0:
            # An imagined mouth is drawn out between teeth and tongue: else its upper teeth would show once more, on the jaw.
            middle = _DARK_AT @ self.lips[[5, 15], 1]
            y = np.arange(PAINT_SIZE[1], dtype=np.float32)
            y = np.where(y > middle, np.maximum(y - more, middle), y).astype(np.float32)
            places = np.meshgrid(np.arange(PAINT_SIZE[0], dtype=np.float32) if columns is None else columns, y)
            edge = cv2.BORDER_REPLICATE
            layers = np.stack([cv2.remap(layer, *places, cv2.INTER_LINEAR, borderMode=edge) for layer in layers])
        skull[:] = layers[:, rows]
        shift = np.array([[1, 0, dx], [0, 1, dy - more - rows.start]], np.float32)
        size = jaw.shape[:0:-1]
        for layer, moved, edge in zip(layers, jaw, (*(cv2.BORDER_REPLICATE,) * 3, cv2.BORDER_CONSTANT), strict=True):
            cv2.warpAffine(layer, shift, size, dst=moved, borderMode=edge)

    def _columns(self, lips: F32) -> F32 | None:
        """Which column to take for each, that the corners come to those of wider `lips`; None where they are no wider.

        What shows at the corners would else be no mouth of theirs, and there the painter fills the opening with dark red.
        """
        middle = self.lips[_CORNERS, 0].mean()
        left, right = self.lips[_CORNERS, 0] - middle
        to_left, to_right = (lips[_CORNERS, 0] - middle) / _SPARE
        to_left, to_right = min(to_left, left), max(to_right, right)
        if to_left == left and to_right == right:
            return None
        far = 2 * PAINT_SIZE[0]
        at = [to_left - far, to_left, _KEPT * left, _KEPT * right, to_right, to_right + far]
        taken = [left - far, left, _KEPT * left, _KEPT * right, right, right + far]
        columns = np.arange(PAINT_SIZE[0]) - middle
        return np.asarray(np.interp(columns, at, taken) + middle, np.float32)


# The points that the warp may move: everything below the nose in the canonical face.
_LOWER_POINTS = tuple(int(i) for i in np.flatnonzero(mesh.canonical()[:, 1] > 0.55))
