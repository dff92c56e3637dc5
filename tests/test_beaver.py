from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cache

import numpy as np
import pytest

from beavervision.media import Clip, Face, FaceState, FaceTrack, Frames, Heard, Picture, Profile, Reference
from beavervision.models import mesh
from beavervision.models.beaver import (
    CONTEXT_STEPS,
    EXTRA_ROWS,
    LAST_ROW_MS,
    Beaver,
    Equaliser,
    load,
    onnx_net,
    painted_rows,
    torch_net,
)
from beavervision.models.cards import BEAVER
from beavervision.models.face import FaceNets
from beavervision.models.inside import inside
from beavervision.models.mesh import Pose
from beavervision.models.warp import filled, interpolated, places_of_cells
from beavervision.speech import speak
from beavervision.stages import lipsync_beaver
from beavervision.stages.detect import FaceChoice, survey
from beavervision.stages.hear import LOG_MEL_DENSE, Resampler
from beavervision.stages.lipsync_beaver import (
    _LOWER_POINTS,
    BeaverSync,
    _Ear,
    _ReferenceMouth,
    _topology,
    profile_of,
)
from tests.faces import portrait, somebody_else

RATE = Fraction(25)
SILENCE = np.log(1e-5)


@cache
def files() -> Beaver:
    return load()


@cache
def seen() -> tuple[Picture, Face, Profile, tuple[Reference, ...]]:
    picture = portrait()
    found = survey([picture], FaceNets(), FaceChoice())
    return picture, found.references[0].face, profile_of(found.references, files().basis), found.references


@cache
def speech_rows() -> np.ndarray:
    """Log-mel rows of a sentence, row 0 at time 0."""
    (chunk,) = speak("Papa may move away, baby.")
    ear = Resampler(chunk.audio.rate_hz)
    pcm = np.concatenate([ear.push(chunk.audio.pcm), ear.end()])
    return LOG_MEL_DENSE.rows(pcm)


def clips(rows: np.ndarray, count: int, voice: float = 1.0, strength: float = 1.0, block: int = 8) -> Iterator[Clip]:
    picture, face, _, _ = seen()
    pad = np.full((400, rows.shape[1]), SILENCE, np.float32)
    around = np.concatenate([pad, rows, pad]).astype(np.float32)
    for start in range(0, count, block):
        n = min(block, count - start)
        track = FaceTrack((face,) * n, (FaceState.OK,) * n, np.full(n, strength, np.float32), (0,) * n)
        heard = Heard(around, -400, Fraction(1, 200), *[np.full(n, voice, np.float32)] * 2)
        yield Clip(Frames((picture,) * n, start, RATE), track, None, heard)


def shut_points(face: Face) -> np.ndarray:
    """The face's points with its lips closed."""
    basis, points = files().basis, face.points_px.copy()
    pose = mesh.fit_pose(points)
    points[basis.points] += pose.vector_to_picture(basis.displacement(basis.closing(pose.to_face(points))))
    return points


def draw(clips_in: Iterator[Clip], profile: Profile | None = None) -> tuple[list[Clip], np.ndarray]:
    f = files()
    stage = BeaverSync(f.motion, f.painter, f.basis, profile or seen()[2])
    out = list(stage(clips_in))
    return out, np.concatenate([c.opening for c in out if c.opening is not None])


def test_the_declared_context_covers_what_the_nets_hear() -> None:
    timing = BEAVER.timing
    assert timing is not None
    assert timing.look_ahead_ms <= 160
    assert timing.look_ahead_ms >= LAST_ROW_MS + 2.5 + 12.5, "half a row to the nearest, half the window of the last"
    assert timing.left_context_ms >= 10 * (EXTRA_ROWS + 1) - LAST_ROW_MS + 2.5


def test_speech_moves_the_mouth_and_silence_closes_it() -> None:
    rows = speech_rows()
    count = len(rows) * 25 // 200
    _, speaking = draw(clips(rows, count))
    assert speaking.max() > 0.08
    assert speaking.std() > 0.02
    _, silent = draw(clips(np.full((400, 64), SILENCE, np.float32), 50, voice=0.0))
    assert silent[10:].max() < 0.03
    assert silent[10:].std() < 0.004


def test_without_voice_activity_the_mouth_stays_shut_whatever_the_sound() -> None:
    rows = speech_rows()
    _, gated = draw(clips(rows, len(rows) * 25 // 200, voice=0.0))
    assert gated.max() < 0.03


def test_the_same_motion_however_the_clips_are_cut() -> None:
    rows = speech_rows()
    _, eights = draw(clips(rows, 40))
    _, threes = draw(clips(rows, 40, block=3))
    assert np.allclose(eights, threes, atol=1e-4)


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30), Fraction(24000, 1001), Fraction(60)])
def test_each_picture_hears_its_own_moment_and_no_further_than_declared(
    rate: Fraction, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def own_rows(rows: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A network that tells the time of the last row that a step hears."""
        ran.append(rows)
        steps = (rows.shape[1] - EXTRA_ROWS) // 2
        return rows[:, EXTRA_ROWS + 1 :: 2, :1], np.zeros((len(rows), steps + CONTEXT_STEPS, 128), np.float32)

    rows_ms = np.arange(-1000, 3000, 5, dtype=np.float32)[:, None]
    monkeypatch.setattr(Equaliser, "push", lambda _, rows: rows)
    heard = Heard(rows_ms, -200, Fraction(1, 200), *[np.ones(7, np.float32)] * 2)
    told = _Ear(own_rows, rate)(heard, 10, 7)[:, 0]
    times_ms = 1000 * (10 + np.arange(7)) / float(rate)
    assert np.abs(told - times_ms - LAST_ROW_MS).max() <= (0 if rate == 25 else 2.5)
    assert len(ran[0]) == {25: 1, 30: 3}.get(rate, 4), "pictures whole steps apart are heard together"
    assert (np.diff(ran[0][..., 0]) == 10).all()

    declared = BEAVER.timing
    assert declared is not None
    for i, time_ms in enumerate(times_ms):
        # Half the window of the last row comes on top.
        known = replace(heard, rows=np.where(rows_ms + 12.5 <= time_ms + declared.look_ahead_ms, rows_ms, np.nan))
        assert _Ear(own_rows, rate)(known, 10 + i, 1) == told[i]


@pytest.mark.parametrize("rate", [Fraction(2), Fraction(25), Fraction(30), Fraction(24000, 1001), Fraction(60)])
def test_the_network_goes_on_from_the_step_before(rate: Fraction, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def counts(rows: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A network whose state after a step is the time of the last row of that."""
        ends_ms = rows[:, EXTRA_ROWS - 2 * CONTEXT_STEPS + 1 :: 2]
        given.append((state[:, 0], ends_ms[:, 0, 0] - 20))
        return ends_ms[:, CONTEXT_STEPS:], np.repeat(ends_ms, 128, axis=2)

    monkeypatch.setattr(Equaliser, "push", lambda _, rows: rows)
    rows_ms = np.arange(-1000, 30_000, 5, dtype=np.float32)[:, None]
    heard = Heard(rows_ms, -200, Fraction(1, 200), *[np.ones(7, np.float32)] * 2)
    ear, picture = _Ear(counts, rate), 0
    for count in (8, 1, 3, 1, 8, 8, 2):
        ear(heard, picture, count)
        picture += count
    assert not given[0][0].any()
    assert all(np.array_equal(state, due) for state, due in given[1:])
    ear(heard, picture + 1, 1)
    assert not given[-1][0].any(), "after a gap it begins anew"


def test_the_same_motion_whether_clips_hear_all_of_the_sound_or_their_own_surroundings() -> None:
    rows = speech_rows()

    def surroundings() -> Iterator[Clip]:
        for clip in clips(rows, 40):
            assert clip.heard is not None
            first, stop = 8 * clip.frames.start - 68, 8 * clip.frames.stop + 32
            heard = clip.heard
            yield replace(
                clip, heard=replace(heard, rows=heard.rows[first - heard.start : stop - heard.start], start=first)
            )

    _, all_of_it = draw(clips(rows, 40))
    _, near = draw(surroundings())
    assert np.allclose(all_of_it, near, atol=1e-4)


def test_the_equaliser_takes_out_what_a_microphone_adds() -> None:
    rows = np.tile(speech_rows(), (4, 1))
    colour = np.linspace(1.5, -2.5, rows.shape[1]).astype(np.float32)
    even, uneven = Equaliser().push(rows), Equaliser().push(np.maximum(rows + colour, SILENCE))
    late, loud = slice(3 * len(rows) // 4, None), rows.min(axis=1)[3 * len(rows) // 4 :] > SILENCE + 3
    before, after = np.abs(colour).mean(), np.abs(uneven[late][loud] - even[late][loud]).mean()
    assert after < 0.5 * before
    silence = np.full((50, 64), SILENCE, np.float32)
    assert np.allclose(Equaliser().push(silence), silence, atol=1e-3)


def test_the_equaliser_does_not_mind_how_rows_come() -> None:
    rows, ear = speech_rows(), Equaliser()
    parts = np.concatenate([ear.push(rows[:7]), ear.push(rows[7:7]), ear.push(rows[7:])])
    assert np.allclose(parts, Equaliser().push(rows), atol=1e-5)


def test_a_face_of_no_strength_is_left_alone() -> None:
    out, _ = draw(clips(speech_rows(), 8, strength=0.0))
    assert [c.patches for c in out] == [((),) * 8]


def test_drawing_stays_between_the_eyes_and_the_neck() -> None:
    picture, face, _, _ = seen()
    out, opening = draw(clips(speech_rows(), 24))
    widest = int(np.argmax(opening))
    (patch,) = [p for c in out for p in c.patches][widest]
    changed = np.abs(picture.painted((patch,)).y.astype(int) - picture.y) > 2
    rows = np.flatnonzero(changed.any(axis=1))
    nose, chin, eyelid = (face.points_px[i, 1] for i in (4, 152, 145))
    assert rows.min() > eyelid
    assert rows.max() < chin + 0.5 * (chin - nose)
    assert changed.sum() > 300


def test_the_rest_mouth_of_a_smile_is_closed() -> None:
    _, face, profile, _ = seen()
    assert mesh.opening(face.points_px) > 0.12
    assert mesh.opening(profile.rest) < 0.03


def test_a_moving_source_tells_its_amplitude() -> None:
    _, face, _, references = seen()
    basis = files().basis
    pose = mesh.fit_pose(face.points_px)

    def opened(by: float) -> Reference:
        points = face.points_px.copy()
        move = basis.displacement(basis.closing(pose.to_face(face.points_px)) * (1 - by))
        points[basis.points] += pose.vector_to_picture(move)
        return Reference(references[0].region, references[0].rgb, Face(points, face.blendshapes, 1.0))

    wild = profile_of([opened(by) for by in np.tile([0.0, 2.2], 5)], basis)
    calm = profile_of([opened(by) for by in np.tile([0.0, 0.45], 5)], basis)
    assert wild.amplitude > 1.1
    assert calm.amplitude < 1.0
    assert mesh.opening(wild.rest) < 0.03


def drawn_open(profile: Profile, gap: float) -> tuple[Picture, np.ndarray]:
    """The portrait with lips so far apart, in eye distances, and where its points then are."""
    f = files()
    stage = BeaverSync(f.motion, f.painter, f.basis, profile)
    opens = f.basis.opening * (gap / (f.basis.opening @ f.basis.opening))
    (clip,) = clips(speech_rows(), 1)
    drawn = stage.draw(clip, opens[None].astype(np.float32))
    (points,) = drawn.drawn
    assert points is not None
    return clip.frames.pictures[0].painted(drawn.patches[0]), points


def test_lips_that_were_never_seen_apart_show_teeth_and_dark() -> None:
    _, face, profile, references = seen()
    basis, region = files().basis, references[0].region
    assert profile.references[0].face is references[0].face  # the smile shows what is between its lips
    shut, points = drawn_open(profile, 0.0)
    of_shut = profile_of([Reference(region, shut.rgb(region), Face(points, face.blendshapes, 1.0))], basis)
    (imagined,) = of_shut.references
    pose = mesh.fit_pose(imagined.face.points_px)
    at = pose.to_face(imagined.face.points_px)
    gap = (at[mesh.INNER_LOWER[2:7], 1] - at[mesh.INNER_UPPER[2:7], 1]).mean()
    assert gap == pytest.approx(0.16, abs=0.02)

    def between_lips(brightness: np.ndarray, points: np.ndarray) -> np.ndarray:
        cheek = brightness[filled(points[[50, 205, 187], :2], brightness.shape) > 0]
        return brightness[filled(points[mesh.INNER_LIP, :2], brightness.shape) > 0] / np.median(cheek)

    def painted(profile: Profile) -> np.ndarray:
        picture, points = drawn_open(profile, 0.16)
        return between_lips(picture.y, points)

    local = imagined.face.points_px - np.array([region.x_px, region.y_px, 0], np.float32)
    dark, teeth = np.quantile(between_lips(imagined.rgb.mean(axis=2), local), [0.1, 0.9])
    assert dark < 0.4 and teeth > 0.65
    with_it, without = painted(of_shut), painted(replace(of_shut, references=()))
    for share in (0.1, 0.5):
        assert np.quantile(with_it, share) < np.quantile(without, share) - 0.05


def test_a_mouth_that_fills_the_crop_is_imagined_too() -> None:
    hole = np.full((80, 96), 255, np.uint8)
    angles = np.linspace(np.pi, 3 * np.pi, 20, endpoint=False)  # from the left corner over the upper lip
    lips = np.stack([48 + 47 * np.cos(angles), 40 + 39 * np.sin(angles)], axis=1).astype(np.float32)
    shown = inside(lips, np.full((3, 80, 96), 0.5, np.float32), hole)
    assert shown.shape == (3, 80, 96)
    assert 0 < shown.min() < 0.2 < shown.max() < 0.6


def test_no_mouth_is_imagined_where_none_is_in_the_picture() -> None:
    _, face, _, references = seen()
    away = replace(face, points_px=shut_points(face) + np.float32(5000))
    assert profile_of([replace(references[0], face=away)], files().basis).references == ()


def test_a_profile_needs_a_face() -> None:
    with pytest.raises(ValueError, match="at least one"):
        profile_of([], files().basis)


def test_basis_reads_back_what_it_moves() -> None:
    basis = files().basis
    rng = np.random.default_rng(1)
    coefficients = rng.normal(size=(5, len(basis.shapes))).astype(np.float32)
    assert np.allclose(basis.coefficients(basis.displacement(coefficients)), coefficients, atol=1e-2)


@pytest.mark.torch
def test_both_engines_compute_the_same() -> None:
    pytest.importorskip("torch", reason="the PyTorch engine needs the gpu extra")
    rng = np.random.default_rng(0)
    rows = rng.normal(-5, 3, (2, EXTRA_ROWS + 20, 64)).astype(np.float32)
    crops = rng.random((3, 12, 80, 96)).astype(np.float32)
    state = rng.uniform(-1, 1, (2, 128)).astype(np.float32)
    for name, given in (("motion", (rows, state)), ("painter", (crops,)), ("painter", (crops[:, :, 16:56],))):
        ones, others = (net(name, "cpu", 1)(*given) for net in (onnx_net, torch_net))
        for one, other in zip(ones, others, strict=True):
            assert np.abs(one - other).max() < 1e-4
        if name == "motion":
            assert [out.shape[1] for out in ones] == [10, 10 + CONTEXT_STEPS]


@pytest.mark.parametrize(
    ("first", "last", "rows"), [(0, 10, 0), (30, 45, 16), (60, 70, 40), (20, 53, None), (0, 79, None)]
)
def test_the_painter_sees_the_rows_that_hold_the_opening(first: int, last: int, rows: int | None) -> None:
    hole = np.zeros((80, 96), np.uint8)
    hole[first : last + 1, 40:50] = 255
    found = painted_rows(hole)
    assert (found.start, found.stop) == ((0, 80) if rows is None else (rows, rows + 40))
    assert (found.start == 0 or found.start <= first - 3) and (found.stop == 80 or last + 3 < found.stop)


def test_what_is_painted_from_some_rows_lies_where_it_does_from_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a painter that copies its reference, which rows it sees must not show."""
    seen_rows: list[int] = []

    def copies(*inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        (layers,) = inputs
        seen_rows.append(layers.shape[2])
        return (layers[:, 8:11],)

    f = files()
    stage = BeaverSync(f.motion, copies, f.basis, seen()[2])
    rows = speech_rows()
    low = [p for c in stage(clips(rows, 24)) for p in c.patches]
    assert seen_rows.count(40) > seen_rows.count(80)
    seen_rows.clear()
    monkeypatch.setattr(lipsync_beaver, "painted_rows", lambda hole: slice(0, 80))
    whole = [p for c in stage(clips(rows, 24)) for p in c.patches]
    assert set(seen_rows) == {80}
    for (one,), (other,) in zip(low, whole, strict=True):
        assert np.abs(one.y.astype(int) - other.y).max() <= 1


@pytest.mark.parametrize("wider", [0.8, 1.0, 1.3])
def test_the_reference_has_its_corners_where_those_of_a_wider_mouth_are(wider: float) -> None:
    turn = np.linspace(np.pi, 3 * np.pi, 20, endpoint=False)
    lips = np.stack([48 + 25 * np.cos(turn), 36 + 12 * np.sin(turn)], axis=1).astype(np.float32)
    layers = np.zeros((4, 80, 96), np.float32)
    layers[0] = np.arange(96)
    layers[3] = filled(lips, (80, 96)) / np.float32(255)
    wanted = lips.copy()
    wanted[:, 0] += (lips[:, 0] - 48) * np.float32(wider - 1)
    skull, jaw = np.empty((2, 4, 80, 96), np.float32)
    _ReferenceMouth(layers, lips).show(wanted, slice(0, 80), skull, jaw)
    assert (skull[0, :, 38:58] == layers[0, :, 38:58]).all(), "front teeth keep their width"
    if wider <= 1:
        assert (skull == layers).all()
        return
    across = np.flatnonzero(skull[3, 36] > 0.5)
    assert np.ptp(across) == pytest.approx(50 * wider / 1.06, abs=2)
    np.testing.assert_allclose(jaw, skull, atol=1e-3)


def test_an_imagined_mouth_that_opens_further_shows_its_upper_teeth_once() -> None:
    turn = np.linspace(np.pi, 3 * np.pi, 20, endpoint=False)
    lips = np.stack([48 + 25 * np.cos(turn), 36 + 8 * np.sin(turn)], axis=1).astype(np.float32)
    layers = np.zeros((4, 80, 96), np.float32)
    layers[3] = filled(lips, (80, 96)) / np.float32(255)
    layers[:3, 28:34] = 1  # teeth
    wider = lips.copy()
    wider[11:, 1] += 10
    skull, jaw = np.empty((2, 4, 80, 96), np.float32)
    _ReferenceMouth(layers, lips, imagined=True).show(wider, slice(0, 80), skull, jaw)
    for shown in (skull, jaw):
        assert (shown[0, 28:34, 48] == 1).all() and (shown[0, 35:, 48] == 0).all()
        assert np.ptp(np.flatnonzero(shown[3, :, 48])) == pytest.approx(26, abs=2)
    _ReferenceMouth(layers, lips).show(wider, slice(0, 80), skull, jaw)
    assert (skull == layers).all() and jaw[0, 41, 48] == 1, "what was seen hangs on the jaw as it is"


@pytest.mark.parametrize("yaw_deg", [0, 30, 60])
def test_no_triangle_that_a_turned_head_hides_is_drawn(yaw_deg: float) -> None:
    """On the far side of a turned head the mesh folds over itself: there the nearer of two triangles must be the one drawn."""
    topology = _topology(_LOWER_POINTS)
    turn = np.radians(yaw_deg)
    rotation = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
    head = mesh.canonical() @ rotation.T * 100
    shown = topology.facing(Pose(rotation.astype(np.float32), 100.0, np.zeros(3, np.float32)))
    drawn = topology.triangles[shown]
    of_mesh = drawn[(drawn < len(head)).all(axis=1)]
    a, b, c = (head[of_mesh[:, i]] for i in range(3))
    away = (np.cross(b - a, c - a)[:, 2] > 0).sum()
    assert away < 15, "a triangle looks away from the camera"
    hidden = len(topology.triangles) - len(drawn)
    assert hidden == 0 if yaw_deg == 0 else hidden > 30
    assert len(topology.opening.side) == len(shown)


def test_pixels_find_their_places_between_cells() -> None:
    """To the edge where nothing moves, and between the middles of cells where they move evenly."""
    y, x = np.mgrid[0:42, 0:30].astype(np.float32)
    still = interpolated(places_of_cells(np.zeros((2, 7, 5), np.float32), 6, left=-4, top=10), 6)
    assert np.abs(still - np.stack([x - 4, y + 10])).max() < 1e-4
    middles = np.stack(np.meshgrid(np.arange(5), np.arange(7))).astype(np.float32) * 6 + 2.5
    places = interpolated(places_of_cells(middles * np.float32(0.25), 6), 6)
    inside = np.s_[:, 3:-3, 3:-3]
    assert np.abs(places - np.stack([x, y]) * 1.25)[inside].max() < 1e-4


# --- people whom cuts bring -------------------------------------------------------------------------------------------


@cache
def other_face() -> Face:
    return survey([somebody_else()], FaceNets(), FaceChoice()).references[0].face


def shots(people: str, rows: np.ndarray, block: int = 8) -> Iterator[Clip]:
    """Clips in which each letter is a shot of eight pictures, of the sample portrait (a) or of the other face (b)."""
    known = {"a": (seen()[0], seen()[1]), "b": (somebody_else(), other_face())}
    all_pictures = [(*known[who], shot) for shot, who in enumerate(people) for _ in range(8)]
    pad = np.full((400, rows.shape[1]), SILENCE, np.float32)
    around = np.concatenate([pad, rows, pad]).astype(np.float32)
    for start in range(0, len(all_pictures), block):
        pictures, faces, numbers = zip(*all_pictures[start : start + block], strict=True)
        n = len(pictures)
        track = FaceTrack(faces, (FaceState.OK,) * n, np.ones(n, np.float32), numbers)
        heard = Heard(around, -400, Fraction(1, 200), *[np.ones(n, np.float32)] * 2)
        yield Clip(Frames(pictures, start, RATE), track, None, heard)


def drawn_planes(out: list[Clip]) -> list[tuple[np.ndarray, ...]]:
    pairs = [pair for clip in out for pair in zip(clip.frames.pictures, clip.patches or (), strict=True)]
    return [(made.y, made.u, made.v) for made in (picture.painted(patches) for picture, patches in pairs)]


def test_a_face_that_is_not_seen_from_the_front_is_not_taken_for_the_one_before_the_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mine = lipsync_beaver._Person.of(seen()[2])
    cast = lipsync_beaver._Cast(mine, files().basis, None)
    first, second, third = shots("aba", speech_rows())
    assert set(cast(first)) == {mine}
    assert mine not in cast(second)
    monkeypatch.setattr(lipsync_beaver, "_FRONTAL_DEG", 0.0)
    assert set(cast(third)) == {mine}


@pytest.mark.parametrize("block", [8, 5])
def test_a_person_whom_a_cut_brings_has_a_mouth_of_their_own(block: int) -> None:
    rows = speech_rows()
    both = drawn_planes(draw(shots("abab", rows, block))[0])
    mine, theirs = seen()[2], profile_of(survey([somebody_else()], FaceNets(), FaceChoice()).references, files().basis)
    alone = drawn_planes(draw(shots("aaaa", rows), mine)[0]), drawn_planes(draw(shots("bbbb", rows), theirs)[0])
    strangers = drawn_planes(draw(shots("bbbb", rows), replace(mine, looks=None))[0])
    for i in range(32):
        who = i // 8 % 2
        for plane, right in zip(both[i], alone[who][i], strict=True):
            np.testing.assert_array_equal(plane, right)
    assert any((a[0] != b[0]).any() for a, b in zip(alone[1], strangers, strict=True))
