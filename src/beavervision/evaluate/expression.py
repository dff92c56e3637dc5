"""Does the face express what is asked for, and does it still speak? Measured on real clips, each face found again in the result.

- *Controls*: on one quiet picture of each person a control is asked for at 0.5. Its group's blendshapes must rise, those of the
  other groups stay (:data:`GROUPS`; medians over the people), and a control of 0 must give the very same picture. The gaze is
  no group: a net that sees a lid come down cannot tell it from a look down.
- *Speech*: a talking clip is drawn with each preset at 0.6. The opening of the lips over time is held against that of the clip
  as it was, and so are its closures: the times at which the gap is in the lowest 15 % of its range, from the 5th to the 95th
  percentile. (Each clip's own range: where brows and eyes differ, the net reads the very same lips a little differently.)
- *Phones*: the quiet pictures of the same people, as stills, speak two sentences rich in p, b and m whose phones have exact
  times. The lips, drawn with and without each preset, are held against them (``closed`` of
  :mod:`beavervision.evaluate.articulation`) and against each other.
- *Flicker* of what the presets move, against the same pixels of the source; and whether anything beyond the face and its
  margin changed.
- *Cost*: CPU time of one picture of 720p, at a face of 400 pixels, one thread.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from beavervision.errors import BeaverVisionError, InputError, UsageError
from beavervision.evaluate.articulation import judged, spoken
from beavervision.evaluate.follow import one_each, talker_rows
from beavervision.evaluate.scores import flicker, pearson
from beavervision.evaluate.tracks import NO_LIPS, LipTrack, lips_of
from beavervision.expression.controls import PRESETS, look_of
from beavervision.media import (
    BLENDSHAPES,
    F32,
    U8,
    Clip,
    Expression,
    Face,
    FaceState,
    FaceTrack,
    Frames,
    Picture,
    Region,
)
from beavervision.models import mesh
from beavervision.models.expression import load_basis
from beavervision.models.face import Crop, FaceNets, blendshape_names
from beavervision.pipeline import Pipeline
from beavervision.speech import Phone
from beavervision.stages.decode import Decode
from beavervision.stages.detect import Detect
from beavervision.stages.express import STILL, Express, expressed

# The blendshapes of one movement, by what ends on them.
GROUPS: dict[str, tuple[str, ...]] = {
    "smile": ("mouthSmile",),
    "frown": ("mouthFrown",),
    "brow raise": ("browInnerUp", "browOuterUp"),
    "brow down": ("browDown",),
    "blink": ("eyeBlink",),
    "eye wide": ("eyeWide",),
    "squint": ("eyeSquint",),
    "jaw": ("jawOpen",),
    "pucker": ("mouthPucker", "mouthFunnel"),
    "nose and cheeks": ("noseSneer", "cheekSquint", "cheekPuff"),
}
ASKED = ("smile", "brow raise", "eye wide", "blink", "frown")
AT, PRESET_AT = 0.5, 0.6
WITH_HEAD = {"headYaw": 0.25, "headPitch": 0.2}  # for the cost
_FACE_PX, _PICTURE_PX = 400, (1280, 720)  # for the cost
_LOOKED_AT = 24  # pictures, of which the quietest is taken
_LEAST_FACE_PX = 120
_TALKING = 75  # pictures of a clip with presets
_RATE = Fraction(25)  # of the stills that speak
SENTENCES = (
    "My baby brother Bob may buy a brown puppy, maybe on Monday.",
    "Pam, please put both plump apples back by the top of the map.",
)
_CLOSED_SHARE, _RANGE = 0.15, (0.05, 0.95)
_BEYOND = 0.75  # face widths around the face beyond which nothing may change
_CLIP = 8  # pictures, as in the pipeline's
_RUNS = 40
_KEPT = 2  # clips that a run keeps, as those under way are: else each one's memory is given back and asked for again

Told = Callable[[int, int, str], None]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Rise:
    """What asking for one group at 0.5 did, medians over the people: its own rise, and the moves of the other groups.

    gaze is the largest move of a look. reached counts the people on whom it rose by 0.2 or more.
    """

    rise: float
    others: dict[str, float]
    gaze: float
    reached: int

    @property
    def most_other(self) -> float:
        return max(abs(value) for value in self.others.values())


@dataclass(frozen=True, slots=True)
class Speech:
    """A preset on talking clips, medians: correlation of the opening with the clip's own, and the share of its closures kept.

    closures counts them; flicker is the ratio to the source's.
    """

    opening_r: float
    closures_kept: float
    closures: int
    flicker: float


@dataclass(frozen=True, slots=True)
class Spoken:
    """A preset on synthetic speech, summed over the faces: closed at so many of the p, b and m, and at so many without the preset;
    opening_r is the median correlation of the opening with that without it."""

    closed: int
    closed_plain: int
    of: int
    opening_r: float

    @property
    def kept(self) -> float:
        return self.closed / self.closed_plain if self.closed_plain else 1.0


@dataclass(frozen=True, slots=True)
class ExpressionReport:
    """As the module describes. same: a control of 0 gave the same picture for all; outside: the share of the pixels
    beyond the face that changed; ms: CPU time by what was asked for."""

    people: tuple[str, ...]
    rises: dict[str, Rise]
    same: bool
    speech: dict[str, Speech]
    phones: dict[str, Spoken]
    outside: float
    ms: dict[str, float]
    left_out: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        plain: dict[str, Any] = _rounded(asdict(self))
        return plain


def evaluate_expression(
    folder: Path,
    split: str = "validate",
    *,
    people: int = 12,
    talking: int = 4,
    sentences: Sequence[str] = SENTENCES,
    on_progress: Told | None = None,
) -> ExpressionReport:
    """Measure the expression stage on the clips of a folder of talkers with its index.

    Args:
        people: how many to ask for controls.
        talking: how many of them to give the presets while they talk.
        sentences: what those speak as stills.

    Raises:
        InputError, UsageError: the index cannot be used, or shows too few faces.
    """
    if people < 1 or talking < 1:
        raise UsageError("Ask for at least one of people and talking.")
    nets = FaceNets()
    faces: dict[str, tuple[Picture, Face]] = {}
    left_out: dict[str, str] = {}
    rows = talker_rows(folder, split)
    for row in one_each(rows, people):
        if len(faces) >= people:
            break
        try:
            found = quiet_face(folder / row.file, nets)
        except BeaverVisionError as error:
            left_out[row.file] = str(error)
            continue
        if found is None:
            left_out[row.file] = "no frontal face of 120 pixels or more"
            continue
        faces[row.file] = found
        _told(on_progress, len(faces), people + talking, row.file)
    if not faces:
        raise InputError(f"{folder}: no clip of the split {split!r} shows a frontal face of {_LEAST_FACE_PX} pixels.")
    seen = list(faces.values())
    rises = {name: _rise(name, seen, nets) for name in ASKED}
    basis = load_basis()
    none = np.zeros(BLENDSHAPES, np.float32)
    same = all(expressed(picture, face.points_px, none, STILL, basis) is picture for picture, face in seen)
    of: dict[str, list[_Spoken]] = {}
    # The larger a face, the surer is what is read from its lips.
    largest = sorted(faces, key=lambda file: -float(np.ptp(faces[file][1].points_px[:, 0])))[:talking]
    for i, file in enumerate(largest):
        _told(on_progress, people + i + 1, people + talking, file)
        for name, one in _talk(folder / file, nets):
            of.setdefault(name, []).append(one)
    speech = {name: _summed(all_spoken) for name, all_spoken in of.items()}
    outside = max((s.outside for all_spoken in of.values() for s in all_spoken), default=0.0)
    phones = spoken_phones([faces[file][0] for file in largest], sentences, nets)
    return ExpressionReport(tuple(faces), rises, same, speech, phones, outside, cost(*seen[0]), left_out)


def quiet_face(path: Path, nets: FaceNets) -> tuple[Picture, Face] | None:
    """Of the first pictures of a clip the one whose face is most like their median; None without a frontal face."""
    seen: list[tuple[Picture, Face]] = []
    for clip in islice(Detect(nets)(Decode(extend="none")(path)), -(-_LOOKED_AT // 8)):
        assert clip.track is not None
        for picture, face, state in zip(clip.frames.pictures, clip.track.faces, clip.track.states, strict=True):
            if face is not None and state is FaceState.OK and abs(mesh.fit_pose(face.points_px).yaw_deg) < 20:
                seen.append((picture, face))
    if not seen or np.ptp(seen[0][1].points_px[:, 0]) < _LEAST_FACE_PX:
        return None
    shapes = np.array([face.blendshapes for _, face in seen])
    return seen[int(np.argmin(np.abs(shapes - np.median(shapes, axis=0)).sum(axis=1)))]


def members(group: str) -> list[int]:
    """The indices of a group's blendshapes."""
    kinds = GROUPS[group]
    return [i for i, name in enumerate(blendshape_names()) if name.removesuffix("Left").removesuffix("Right") in kinds]


def _rise(group: str, seen: Sequence[tuple[Picture, Face]], nets: FaceNets) -> Rise:
    controls = np.zeros(BLENDSHAPES, np.float32)
    controls[members(group)] = AT
    moves = []
    for picture, face in seen:
        crop = Crop.of_points(face.points_px)
        made = expressed(picture, face.points_px, controls, STILL, load_basis())
        before, after = (nets.face(p, crop, settle=1) for p in (picture, made))
        if before is not None and after is not None:
            moves.append(after.blendshapes - before.blendshapes)
    all_moves = np.array(moves, np.float32).reshape(-1, BLENDSHAPES)
    of_group = {name: all_moves[:, members(name)].mean(axis=1) for name in GROUPS}
    looks = [i for i, name in enumerate(blendshape_names()) if name.startswith("eyeLook")]
    own = of_group.pop(group)
    return Rise(
        rise=float(np.median(own)),
        others={name: float(np.median(values)) for name, values in of_group.items()},
        gaze=float(np.abs(np.median(all_moves[:, looks], axis=0)).max()),
        reached=int((own >= 0.2).sum()),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Spoken:
    gap: F32  # (t,), of the source
    made: F32
    flicker: float
    outside: float


def _talk(path: Path, nets: FaceNets) -> Iterator[tuple[str, _Spoken]]:
    """Each preset on the first pictures of a clip."""
    pictures: list[Picture] = []
    faces: list[Face] = []
    for clip in islice(Detect(nets)(Decode(extend="none")(path)), -(-_TALKING // 8)):
        assert clip.track is not None
        for picture, face, state in zip(clip.frames.pictures, clip.track.faces, clip.track.states, strict=True):
            if face is not None and state is FaceState.OK:
                pictures.append(picture)
                faces.append(face)
    gap = np.array([_gap(picture, face, nets) for picture, face in zip(pictures, faces, strict=True)], np.float32)
    for name in PRESETS:
        look = look_of({name: PRESET_AT})
        if not look.any():
            continue
        head = STILL + look[BLENDSHAPES:]
        made = [
            expressed(picture, face.points_px, look[:BLENDSHAPES], head, load_basis())
            for picture, face in zip(pictures, faces, strict=True)
        ]
        opening = np.array([_gap(picture, face, nets) for picture, face in zip(made, faces, strict=True)], np.float32)
        yield name, _Spoken(gap, opening, _flicker_ratio(pictures, made), _changed(pictures, made, faces))


def _gap(picture: Picture, face: Face, nets: FaceNets) -> float:
    """The lips' gap of the face near `face`, pose-free; NaN if it is not found."""
    found = nets.face(picture, Crop.of_points(face.points_px))
    if found is None:
        return float("nan")
    return float(mesh.gaps(mesh.fit_pose(found.points_px).to_face(found.points_px)))


def _summed(spoken: Sequence[_Spoken]) -> Speech:
    closures, kept = 0, 0
    for one in spoken:
        was, now = (_closed(gap) for gap in (one.gap, one.made))
        starts = np.flatnonzero(np.diff(was.astype(int), prepend=0) == 1)
        ends = np.flatnonzero(np.diff(was.astype(int), append=0) == -1) + 1
        closures += len(starts)
        # As for phones, a picture to either side counts: contacts are brief.
        kept += sum(bool(now[max(start - 1, 0) : end + 1].any()) for start, end in zip(starts, ends, strict=True))
    return Speech(
        opening_r=float(np.nanmedian([pearson(one.made, one.gap) for one in spoken])),
        closures_kept=kept / closures if closures else 1.0,
        closures=closures,
        flicker=float(np.nanmedian([one.flicker for one in spoken])),
    )


def spoken_phones(stills: Sequence[Picture], sentences: Sequence[str], nets: FaceNets) -> dict[str, Spoken]:
    """Let each still speak the sentences, plain and with each preset."""
    pipeline = Pipeline(device="cpu")
    phones: list[Phone] = []
    chunks = list(spoken(pipeline, sentences, None, 0, phones))
    by_preset: dict[str, list[Spoken]] = {}
    for still in stills:
        frames = (Frames((still,) * 8, start, _RATE) for start in itertools.count(0, 8))
        clips = list(pipeline.clips(map(Clip, frames), (chunk.audio for chunk in chunks)))
        plain = _lips(clips, nets)
        closed_plain = judged(plain, phones).closed.right
        for name in PRESETS:
            look = look_of({name: PRESET_AT})
            if look.any():
                wished = (replace(clip, expression=_constant(look, len(clip))) for clip in clips)
                made = _lips(Express(load_basis())(wished), nets)
                closed = judged(made, phones).closed
                one = Spoken(closed.right, closed_plain, closed.of, pearson(made.gap, plain.gap))
                by_preset.setdefault(name, []).append(one)
    return {
        name: Spoken(
            sum(one.closed for one in ones),
            sum(one.closed_plain for one in ones),
            sum(one.of for one in ones),
            float(np.median([one.opening_r for one in ones])),
        )
        for name, ones in by_preset.items()
    }


def _constant(look: F32, pictures: int) -> Expression:
    return Expression(np.tile(look[:BLENDSHAPES], (pictures, 1)), np.tile(STILL + look[BLENDSHAPES:], (pictures, 1)))


def _lips(clips: Iterable[Clip], nets: FaceNets) -> LipTrack:
    """The lips found again in what was drawn."""
    rows = []
    for clip in clips:
        assert clip.track is not None
        for picture, face in zip(clip.frames.pictures, clip.track.faces, strict=True):
            found = None if face is None else nets.face(picture, Crop.of_points(face.points_px), shapes=False)
            rows.append(NO_LIPS if found is None else lips_of(found, mesh.fit_pose(found.points_px)))
    return LipTrack(np.array(rows, np.float32), _RATE)


def _closed(gap: F32) -> Mask:
    low, high = np.nanquantile(gap, _RANGE)
    return np.asarray(gap < low + _CLOSED_SHARE * (high - low))


def _flicker_ratio(pictures: Sequence[Picture], made: Sequence[Picture]) -> float:
    """Of the pixels that differ in all pictures of a few, made to source."""
    few = slice(0, 16)
    old, new = (np.stack([p.y for p in all_pictures[few]]) for all_pictures in (pictures, made))
    moved = (old != new).any(axis=0)
    closed = cv2.morphologyEx(moved.astype(np.uint8), cv2.MORPH_CLOSE, np.ones((7, 7), np.uint8))
    moved = cv2.erode(closed, np.ones((3, 3), np.uint8)) > 0
    source = flicker(old, moved) if moved.any() and len(old) > 2 else 0.0
    return flicker(new, moved) / source if source > 0 else float("nan")


def _changed(pictures: Sequence[Picture], made: Sequence[Picture], faces: Sequence[Face]) -> float:
    """The share of pixels beyond the faces that differ."""
    changed, all_pixels = 0, 0
    for old, new, face in zip(pictures, made, faces, strict=True):
        width = float(np.ptp(face.points_px[:, 0]))
        region = Region.around(face.points_px, _BEYOND * width, old.width_px, old.height_px)
        for a, b, half in ((old.y, new.y, 1), (old.u, new.u, 2), (old.v, new.v, 2)):
            differs = a != b
            if region is not None:
                rows = slice(region.y_px // half, (region.y_px + region.height_px) // half)
                differs[rows, region.x_px // half : (region.x_px + region.width_px) // half] = False
            changed += int(differs.sum())
            all_pixels += differs.size
    return changed / all_pixels if all_pixels else 0.0


def cost(picture: Picture, face: Face) -> dict[str, float]:
    """CPU milliseconds for each picture of a clip of 720p with the face brought to 400 pixels, the least of some runs: by preset,
    and with nothing asked for."""
    zoom = _FACE_PX / float(np.ptp(face.points_px[:, 0]))
    # The picture that shows the face in its middle: what lies beyond the source's edge is its edge.
    shift = np.array(_PICTURE_PX) / 2 - face.points_px[:, :2].mean(axis=0) * zoom

    def shown(plane: U8, part: int) -> U8:
        matrix = np.array([[zoom, 0, shift[0] / part], [0, zoom, shift[1] / part]])
        size = (_PICTURE_PX[0] // part, _PICTURE_PX[1] // part)
        return np.asarray(cv2.warpAffine(plane, matrix, size, borderMode=cv2.BORDER_REPLICATE), np.uint8)

    large = Picture(shown(picture.y, 1), shown(picture.u, 2), shown(picture.v, 2), picture.color)
    points = (face.points_px * zoom + [*shift, 0]).astype(np.float32)
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        asked = {name: {name: PRESET_AT} for name in PRESETS} | {"happy, head": {"happy": PRESET_AT, **WITH_HEAD}}
        return {name: _ms(large, replace(face, points_px=points), look_of(look)) for name, look in asked.items()}
    finally:
        cv2.setNumThreads(threads)


def _ms(picture: Picture, face: Face, look: F32) -> float:
    """What :func:`cost` tells of one look."""
    track = FaceTrack((face,) * _CLIP, (FaceState.OK,) * _CLIP, np.ones(_CLIP, np.float32), (0,) * _CLIP)
    controls, head = (np.tile(values, (_CLIP, 1)) for values in (look[:BLENDSHAPES], STILL + look[BLENDSHAPES:]))
    clip = Clip(Frames((picture,) * _CLIP, 0, _RATE), track, expression=Expression(controls, head))
    stage = Express(load_basis())
    took = []
    made: deque[Clip] = deque(maxlen=_KEPT)
    for _ in range(_RUNS):
        start = time.thread_time()
        made.extend(stage(iter([clip])))
        took.append(time.thread_time() - start)
    return min(took) * 1000 / _CLIP


def format_table(report: ExpressionReport) -> RenderableType:
    """The report for a terminal."""
    rises = Table(title=f"asked for at {AT:g} on {len(report.people)} faces")
    for heading in ("what", "rises by", "0.2 reached", "most of the others", "gaze"):
        rises.add_column(heading, justify="left" if heading == "what" else "right")
    for name, rise in report.rises.items():
        other = max(rise.others, key=lambda n: abs(rise.others[n]))
        rises.add_row(
            name,
            f"{rise.rise:+.2f}",
            f"{rise.reached} of {len(report.people)}",
            f"{rise.others[other]:+.2f} {other}",
            f"{rise.gaze:.2f}",
        )
    speech = Table(title=f"presets at {PRESET_AT:g}")
    for heading in (
        "preset",
        "opening kept, r",
        "closures kept",
        "flicker",
        "phones: r",
        "p b m closed",
        "plain",
        "CPU ms",
    ):
        speech.add_column(heading, justify="left" if heading == "preset" else "right")
    for name, ms in report.ms.items():
        said = report.speech.get(name)
        figures = (
            ("-",) * 3
            if said is None
            else (f"{said.opening_r:.3f}", f"{said.closures_kept:.0%}", f"{said.flicker:.2f}")
        )
        phone = report.phones.get(name)
        spoken_ones = (
            ("-",) * 3
            if phone is None
            else (f"{phone.opening_r:.3f}", f"{phone.closed} of {phone.of}", f"{phone.closed_plain}")
        )
        speech.add_row(name, *figures, *spoken_ones, f"{ms:.1f}")
    return Group(
        rises,
        speech,
        Text(f"Nothing asked for leaves the picture the same: {'yes' if report.same else 'NO'}."),
        Text(f"Pixels beyond the face that changed: {report.outside:.4%}."),
        *(Text(f"left out: {file} ({reason})") for file, reason in report.left_out.items()),
    )


def _told(on_progress: Told | None, done: int, total: int, file: str) -> None:
    if on_progress is not None:
        on_progress(done, total, file)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value
