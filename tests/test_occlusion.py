from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from beavervision.media import F32, Clip, FaceState, FaceTrack, Frames, Picture
from beavervision.models.face import FaceNets
from beavervision.stages.decode import Decode
from beavervision.stages.detect import Detect
from beavervision.stages.watch import Watch
from tests.faces import moved, portrait
from tests.occluders import Occluder, before_mouth, hand, in_and_out, microphone, skin_of

COVERED = 0.3  # share of the lips from which a picture must not be drawn on


@cache
def nets() -> FaceNets:
    return FaceNets()


def clips(pictures: Sequence[Picture]) -> Iterator[Clip]:
    for start in range(0, len(pictures), 8):
        yield Clip(Frames(tuple(pictures[start : start + 8]), start, Fraction(25)))


def track(pictures: Sequence[Picture]) -> FaceTrack:
    tracks = [clip.track for clip in Detect(nets())(clips(pictures)) if clip.track is not None]
    return FaceTrack(
        tuple(face for t in tracks for face in t.faces),
        tuple(state for t in tracks for state in t.states),
        np.concatenate([t.strength for t in tracks]),
        tuple(shot for t in tracks for shot in t.shot),
    )


@cache
def swaying() -> tuple[Picture, ...]:
    """A head that sways, nods towards the camera and tilts: 50 pictures, no two the same."""
    return tuple(
        moved(6 * np.sin(i / 6), 3 * np.sin(i / 9), 1 + 0.03 * np.sin(i / 11), 4 * np.sin(i / 13)) for i in range(50)
    )


@cache
def places() -> tuple[F32, ...]:
    faces = track(swaying()).faces
    assert all(face is not None for face in faces)
    return tuple(face.points_px for face in faces if face is not None)


def with_before(occluder: Occluder, side: float) -> tuple[list[Picture], list[float]]:
    made = [
        before_mouth(picture, points, occluder, in_and_out(i / 50), side)
        for i, (picture, points) in enumerate(zip(swaying(), places(), strict=True))
    ]
    return [picture for picture, _ in made], [share for _, share in made]


@pytest.mark.parametrize("side", [-1.0, 1.0])
@pytest.mark.parametrize("kind", ["hand", "microphone"])
def test_what_comes_before_the_mouth_is_not_painted_over(kind: str, side: float) -> None:
    points = places()[0]
    face_px = float(np.ptp(points[:, 0]))
    occluder = hand(face_px, skin_of(portrait(), points)) if kind == "hand" else microphone(face_px)
    pictures, covers = with_before(occluder, side)
    found = track(pictures)
    covered = [i for i, share in enumerate(covers) if share > COVERED]
    assert 12 < len(covered) < 30
    assert all(found.states[i] is not FaceState.OK for i in covered)
    assert (found.strength[covered] == 0).all()
    # Away from the face it is none of our business, and it is over soon after it has gone.
    assert all(state is FaceState.OK for state in found.states[: covered[0] - 5])
    assert all(state is FaceState.OK for state in found.states[covered[-1] + 6 :])
    assert found.strength[0] == found.strength[-1] == 1
    # The drawn mouth fades before the thing arrives.
    assert 0 < found.strength[found.states.index(FaceState.OCCLUDED) - 1] < 0.5


def test_the_report_says_so() -> None:
    pictures, _ = with_before(microphone(float(np.ptp(places()[0][:, 0]))), 1.0)
    watch = Watch(Fraction(25))
    for _ in watch(Detect(nets())(clips(pictures))):
        pass
    assert "occluded" in str(watch.facts())


def test_light_and_motion_are_no_occlusion() -> None:
    assert set(track(swaying()).states) == {FaceState.OK}
    dimmed = [
        Picture((16 + (p.y - 16.0) * (1 - 0.4 * np.sin(i / 8) ** 2)).astype(np.uint8), p.u, p.v, p.color)
        for i, p in enumerate(swaying())
    ]
    assert set(track(dimmed).states) == {FaceState.OK}


def test_a_lasting_change_is_believed_at_last() -> None:
    """Make-up, say: a tint of the lower face that stays is no occlusion for ever."""
    tinted = []
    for picture, points in zip(swaying(), places(), strict=True):
        y, x = int(points[4, 1]), int(points[4, 0])
        luma = picture.y.copy()
        luma[y + 8 : y + 60, x - 40 : x + 40] = np.clip(luma[y + 8 : y + 60, x - 40 : x + 40] * 0.75, 16, 235)
        tinted.append(Picture(luma, picture.u, picture.v, picture.color))
    states = track([*swaying(), *tinted * 4]).states
    assert FaceState.OCCLUDED in states[50:60]
    assert set(states[-30:]) == {FaceState.OK}


TALKERS = Path(__file__).parents[2] / "shared" / "talkers"


@pytest.mark.shared
@pytest.mark.skipif(not TALKERS.is_dir(), reason="the clips of talkers are not here")
def test_real_people_with_and_without() -> None:
    """Three strangers, one of whom turns her head. No clean picture is lost, nearly every covered one found."""
    files = (
        "lrs3_jcp5vvxtEaU_01.webm",
        "talkvid_Language_kr_01.mp4",
        "grid_s02x_01.mpg",
    )
    with (TALKERS / "index.tsv").open(encoding="utf-8") as index:
        known = {row["file"]: row["split"] for row in csv.DictReader(index, delimiter="\t")}
    clean = alarms = covered = found = 0
    for file in files:
        assert known[file] == "validate"
        pictures = list(islice((p for c in Decode(extend="none")(TALKERS / file) for p in c.frames.pictures), 40))
        seen = track(pictures)
        clean += len(pictures)
        alarms += sum(state is FaceState.OCCLUDED for state in seen.states)
        first = next(face for face in seen.faces if face is not None).points_px
        face_px = float(np.ptp(first[:, 0]))
        for occluder in (hand(face_px, skin_of(pictures[0], first)), microphone(face_px)):
            made = [
                before_mouth(picture, face.points_px, occluder, in_and_out(i / 40))
                for i, (picture, face) in enumerate(zip(pictures, seen.faces, strict=True))
                if face is not None
            ]
            states = track([picture for picture, _ in made]).states
            over = [share > COVERED for _, share in made]
            covered += sum(over)
            found += sum(state is not FaceState.OK for state, is_over in zip(states, over, strict=True) if is_over)
    assert alarms <= 0.01 * clean
    assert covered > 60
    assert found > 0.93 * covered
