"""The expression stage: what it moves, what it must leave alone."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import cv2
import numpy as np
import pytest

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
from beavervision.stages.express import STILL, Express, expressed
from tests.faces import moved, portrait
from training.expression import assembled, mirrored_names, mirrored_points

NAMES = blendshape_names()
RATE = Fraction(25)


@cache
def nets() -> FaceNets:
    return FaceNets()


@cache
def face() -> Face:
    found = nets().face(portrait(), nets().detect(portrait())[0].crop, settle=2)
    assert found is not None
    return found


def look(**controls: float) -> F32:
    """Controls by name; both sides where none is given."""
    values = np.zeros(BLENDSHAPES, np.float32)
    for name, value in controls.items():
        found = [i for i, full in enumerate(NAMES) if full in (name, f"{name}Left", f"{name}Right")]
        assert found, name
        values[found] = value
    return values


def head(**given: float) -> F32:
    values = STILL.copy()
    for name, value in given.items():
        values[["yaw", "pitch", "roll", "right", "down", "scale"].index(name)] = value
    return values


def made(controls: F32 | None = None, turn: F32 = STILL, picture: Picture | None = None) -> Picture:
    values = np.zeros(BLENDSHAPES, np.float32) if controls is None else controls
    return expressed(picture or portrait(), face().points_px, values, turn, load_basis())


def seen(picture: Picture) -> Face:
    found = nets().face(picture, Crop.of_points(face().points_px), settle=1)
    assert found is not None
    return found


def rise(picture: Picture, kind: str) -> float:
    index = [i for i, name in enumerate(NAMES) if name.removesuffix("Left").removesuffix("Right") == kind]
    return float((seen(picture).blendshapes - seen(portrait()).blendshapes)[index].mean())


def clip(picture: Picture, controls: F32, **track: object) -> Clip:
    given = {"faces": (face(),), "states": (FaceState.OK,), "strength": np.ones(1, np.float32), "shot": (0,)} | track
    expression = Expression(controls[None], STILL[None])
    return Clip(Frames((picture,), 0, RATE), track=FaceTrack(**given), expression=expression)  # type: ignore[arg-type]


def run(one: Clip) -> Picture:
    (out,) = Express(load_basis())(iter([one]))
    return out.frames.pictures[0]


# What is asked for is what is seen -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("control", "least"),
    [("eyeBlink", 0.15), ("browInnerUp", 0.2), ("browOuterUp", 0.2), ("browDown", 0.15)],
)
def test_the_face_found_again_shows_it(control: str, least: float) -> None:
    assert rise(made(look(**{control: 0.7})), control) > least


def test_one_side_alone() -> None:
    left = made(look(eyeBlinkLeft=0.7))
    gained = seen(left).blendshapes - seen(portrait()).blendshapes
    assert gained[NAMES.index("eyeBlinkLeft")] > 0.1
    middle = round(float(face().points_px[168, 0])) // 2 * 2
    assert (left.y[:, :middle] == portrait().y[:, :middle]).all()


def test_a_blink_shuts_the_eyes() -> None:
    def gap(picture: Picture) -> float:
        points = seen(picture).points_px
        return float((points[[145, 374], 1] - points[[159, 386], 1]).mean())

    assert gap(made(look(eyeBlink=1.0))) < 0.5 * gap(portrait())


def test_a_small_blink_is_a_large_one_made_small() -> None:
    def sized(picture: Picture, by: float, how: int) -> Picture:
        y, u, v = (
            np.asarray(cv2.resize(plane, None, fx=by, fy=by, interpolation=how), np.uint8)
            for plane in (picture.y, picture.u, picture.v)
        )
        return Picture(y, u, v, picture.color)

    shut, points = look(eyeBlink=1.0), face().points_px
    large = sized(portrait(), 4, cv2.INTER_CUBIC)
    smooth = sized(expressed(large, points * np.float32(4), shut, STILL, load_basis()), 0.25, cv2.INTER_AREA)
    difference = made(shut).y.astype(np.float32) - smooth.y
    for corners in ((33, 133), (362, 263)):
        (left, top), (right, bottom) = np.round(points[list(corners), :2]).astype(int)
        lids = difference[min(top, bottom) - 4 : max(top, bottom) + 8, left:right]
        assert np.sqrt((lids**2).mean()) < 5.0, "a lash line in steps"


def test_a_blink_leaves_what_is_above_the_brows_and_on_the_cheeks() -> None:
    noise = np.random.default_rng(3).integers(0, 255, portrait().y.shape, np.uint8)
    source = Picture(noise, portrait().u, portrait().v)
    rows = np.flatnonzero((made(look(eyeBlink=1.0), picture=source).y != source.y).any(axis=1))
    brows, cheeks = face().points_px[[105, 107, 334, 336], 1].min(), face().points_px[[50, 280], 1].max()
    assert brows < rows.min() < rows.max() < cheeks


def test_a_blink_is_no_squint() -> None:
    half = made(look(eyeBlink=0.5))
    assert rise(half, "eyeBlink") > 0.12
    assert rise(half, "eyeSquint") < 0.27


def enlarged(picture: Picture, by: int) -> Picture:
    y, u, v = (
        cv2.resize(p, None, fx=by, fy=by, interpolation=cv2.INTER_CUBIC) for p in (picture.y, picture.u, picture.v)
    )
    return Picture(np.asarray(y, np.uint8), np.asarray(u, np.uint8), np.asarray(v, np.uint8), picture.color)


@pytest.mark.parametrize("corner", [33, 263])
def test_outer_lashes_go_down_with_the_lid_that_they_are_rooted_in(corner: int) -> None:
    points, large = face().points_px * 4, enlarged(portrait(), 4)
    eyes_px = mesh.fit_pose(points).scale_px
    x, y = (round(float(v)) for v in points[corner, :2] - [0, 0.06 * eyes_px])
    luma = large.y.copy()
    cv2.circle(luma, (x, y), round(0.02 * eyes_px), 0, -1)
    dotted = Picture(luma, large.u, large.v, large.color)
    shut, plain = (
        expressed(p, points, look(eyeBlink=1.0), STILL, load_basis()).y.astype(float) for p in (dotted, large)
    )
    dot = (plain - shut).sum(axis=1)
    lowered_px = np.average(np.arange(len(dot)), weights=dot) - y
    assert lowered_px > 0.02 * eyes_px  # the corner itself stays


def test_lids_that_close_leave_the_eyeball_where_it_is() -> None:
    points, large = face().points_px * 4, enlarged(portrait(), 4)
    squint = expressed(large, points, look(eyeSquint=0.6), STILL, load_basis())
    for iris in (468, 473):
        x, y = points[iris, :2]
        radius = np.hypot(*(points[iris + 1, :2] - points[iris, :2]))
        pupil = np.s_[int(y - 0.4 * radius) : int(y + 0.4 * radius), int(x - 0.6 * radius) : int(x + 0.6 * radius)]
        assert np.median(np.abs(squint.y[pupil].astype(int) - large.y[pupil])) <= 1


def test_wide_eyes_bare_the_white_and_leave_the_iris_round() -> None:
    def gap(picture: Picture) -> float:
        points = seen(picture).points_px
        return float((points[[145, 374], 1] - points[[159, 386], 1]).mean())

    wide = made(look(eyeWide=0.8))
    assert gap(wide) > 1.15 * gap(portrait())
    assert rise(wide, "eyeBlink") < 0
    for middle, rim in ((468, slice(469, 473)), (473, slice(474, 478))):
        (x, y), radius = face().points_px[middle, :2], np.ptp(face().points_px[rim, 0]) / 2
        rows, columns = np.mgrid[round(y - 0.6 * radius) : round(y + radius), round(x - radius) : round(x + radius)]
        ball = np.hypot(columns - x, rows - y) < 0.7 * radius
        difference = np.abs(wide.y[rows, columns][ball].astype(int) - portrait().y[rows, columns][ball])
        assert difference.mean() < 8, "what was seen of the eyeball stays where it is"


def even(luma: U8) -> Picture:
    grey = np.full((luma.shape[0] // 2, luma.shape[1] // 2), 128, np.uint8)
    return Picture(luma, grey, grey)


UPPER_LID, LOWER_LID = [246, 161, 160, 159, 158, 157, 173], [7, 163, 144, 145, 153, 154, 155]


def test_no_dots_of_the_eyeball_lie_along_the_lower_lid() -> None:
    points = face().points_px * 4
    upper, lower = points[UPPER_LID, :2], points[LOWER_LID, :2]
    luma = np.full([4 * side for side in portrait().y.shape], 200, np.uint8)
    band = np.concatenate([upper + (lower - upper) * 0.3, (upper + (lower - upper) * 0.7)[::-1]])
    cv2.fillPoly(luma, [np.round(band).astype(np.int32)], 20, cv2.LINE_AA)
    drawn = expressed(even(luma), points, look(eyeBlink=0.3), STILL, load_basis()).y
    left, right = (round(float(v)) for v in points[[160, 158], 0])
    rows, columns = np.nonzero(drawn[:, left:right] < 150)
    below = np.interp(columns + left, band[7:, 0][::-1], band[7:, 1][::-1])
    assert (rows - below).max() < 2


def test_an_eye_that_opens_shows_nothing_of_its_other_side_along_the_lids() -> None:
    points = face().points_px * 4
    (x, _), radius = points[468, :2], float(np.ptp(points[469:473, 0])) / 2
    luma = np.full([4 * side for side in portrait().y.shape], 200, np.uint8)
    luma[:, : round(float(x))] = 20
    drawn = expressed(even(luma), points, look(eyeWide=0.6), STILL, load_basis()).y
    assert drawn[:, round(float(x + 1.1 * radius)) : round(float(points[133, 0]))].min() > 190


def narrowed(points_px: F32) -> F32:
    """A face whose upper lid comes down to the pupil."""
    points = points_px.copy()
    points[UPPER_LID] += (points[LOWER_LID] - points[UPPER_LID]) * np.float32(0.4)
    return points


def test_what_wide_eyes_bare_beside_the_iris_is_white() -> None:
    points = narrowed(face().points_px * 4)
    (x, y), radius = points[468, :2], float(np.ptp(points[469:473, 0])) / 2
    luma = np.full([4 * side for side in portrait().y.shape], 200, np.uint8)
    cv2.circle(luma, (round(float(x)), round(float(y))), round(0.6 * radius), 20, -1)
    drawn = expressed(even(luma), points, look(eyeWide=0.6), STILL, load_basis()).y
    rows, columns = np.nonzero(drawn < 150)
    assert np.abs(columns - x)[np.abs(rows - y) < 0.5 * radius].max() < 0.7 * radius


def test_a_light_in_the_iris_becomes_no_ring_where_the_eye_opens() -> None:
    points = face().points_px * 4
    (x, y), radius = points[468, :2], float(np.ptp(points[469:473, 0])) / 2
    light = x + 0.4 * radius, points[159, 1] + 0.05 * mesh.fit_pose(points).scale_px + 0.15 * radius
    luma = np.full([4 * side for side in portrait().y.shape], 120, np.uint8)
    cv2.circle(luma, (round(float(light[0])), round(float(light[1]))), round(0.15 * radius), 250, -1)
    drawn = expressed(even(luma), points, look(eyeWide=0.8), STILL, load_basis()).y
    near = np.s_[round(y - radius) : round(y + radius), round(x - 0.6 * radius) : round(x + 0.6 * radius)]
    assert (drawn[near] > 180).sum() <= 1.1 * (luma[near] > 180).sum()


@pytest.mark.parametrize(("control", "most"), [("eyeWide", 8), ("eyeBlink", 4)])
def test_no_edge_is_drawn_above_a_lid_that_moves_under_a_raised_brow(control: str, most: float) -> None:
    picture, points = enlarged(portrait(), 2), face().points_px * 2
    left, right = int(points[33, 0]), int(points[133, 0])
    height, width = picture.y.shape
    ramp = np.clip((np.arange(height) - points[33, 1]) * 2 + 128, 0, 255).astype(np.uint8)
    slope = Picture(np.repeat(ramp[:, None], width, axis=1), picture.u, picture.v, picture.color)
    raised = look(browInnerUp=1.0, browOuterUp=1.0, **{control: 1.0})
    drawn = expressed(slope, points, raised, STILL, load_basis()).y.astype(int)
    above = slice(int(points[52, 1] - 0.35 * (right - left)), int(points[159, 1] - 0.1 * (right - left)))
    assert np.abs(np.diff(drawn[above, left:right], 2, axis=0)).max() < most


def test_a_smile_widens_and_a_frown_lowers_the_mouth() -> None:
    rest = seen(portrait()).points_px[mesh.OUTER_CORNERS]
    smile = seen(made(look(mouthSmile=0.6))).points_px[mesh.OUTER_CORNERS]
    frown = seen(made(look(mouthFrown=0.6))).points_px[mesh.OUTER_CORNERS]
    assert np.ptp(smile[:, 0]) > np.ptp(rest[:, 0]) + 2
    assert frown[:, 1].mean() > rest[:, 1].mean() + 1 > smile[:, 1].mean()


def test_the_head_turns_as_its_signs_say() -> None:
    nose, chin, brow = 1, 152, 10
    at = face().points_px
    assert seen(made(turn=head(yaw=5))).points_px[nose, 0] > at[nose, 0] + 1.5
    assert seen(made(turn=head(pitch=5))).points_px[nose, 1] > at[nose, 1] + 1.5
    rolled = seen(made(turn=head(roll=4))).points_px
    assert rolled[brow, 0] - rolled[chin, 0] > at[brow, 0] - at[chin, 0] + 3
    shifted = seen(made(turn=head(right=0.02, down=0.02))).points_px
    assert (shifted[nose, :2] - at[nose, :2] > 1).all()
    assert np.ptp(seen(made(turn=head(scale=1.05))).points_px[:, 1]) > np.ptp(at[:, 1]) + 3


# What must stay --------------------------------------------------------------------------------------


def test_a_head_that_is_turned_already_turns_less() -> None:
    def changed(by_deg: float) -> float:
        by = np.radians(by_deg)
        turn = np.array([[np.cos(by), 0, np.sin(by)], [0, 1, 0], [-np.sin(by), 0, np.cos(by)]], np.float32)
        middle = face().points_px.mean(axis=0)
        turned = (face().points_px - middle) @ turn.T + middle
        controls = np.zeros(BLENDSHAPES, np.float32)
        drawn = expressed(portrait(), turned.astype(np.float32), controls, head(yaw=10, pitch=8), load_basis())
        return float(np.abs(drawn.y.astype(int) - portrait().y).mean())

    front, side, far = changed(0), changed(32), changed(50)
    assert far == 0
    assert 0 < side < 0.7 * front


def test_nothing_asked_for_is_the_very_same_picture() -> None:
    picture = portrait()
    assert made(picture=picture) is picture
    assert run(clip(picture, np.zeros(BLENDSHAPES, np.float32))) is picture


def test_a_clip_without_a_wish_passes() -> None:
    plain = Clip(Frames((portrait(),), 0, RATE))
    (out,) = Express(load_basis())(iter([plain]))
    assert out is plain


@pytest.mark.parametrize(
    "track",
    [{"faces": (None,), "states": (FaceState.LOST,)}, {"strength": np.zeros(1, np.float32)}],
)
def test_a_picture_without_a_face_to_draw_on_passes(track: dict[str, object]) -> None:
    picture = portrait()
    assert run(clip(picture, look(mouthSmile=1), **track)) is picture


def test_the_background_stays_exactly() -> None:
    picture = portrait()
    new = made(look(mouthSmile=1, eyeBlink=1, browInnerUp=1, jawOpen=1), head(yaw=4, pitch=3, scale=1.02))
    width = float(np.ptp(face().points_px[:, 0]))
    region = Region.around(face().points_px, 0.45 * width, 512, 512)
    assert region is not None
    for old, now, half in ((picture.y, new.y, 1), (picture.u, new.u, 2), (picture.v, new.v, 2)):
        changed = old != now
        rows = slice(region.y_px // half, (region.y_px + region.height_px) // half)
        assert changed[rows].any()
        changed[rows, region.x_px // half : (region.x_px + region.width_px) // half] = False
        assert not changed.any()


def test_the_source_picture_is_not_written_to() -> None:
    picture = portrait()
    before = picture.y.copy(), picture.u.copy(), picture.v.copy()
    made(look(mouthSmile=1, eyeBlink=0.5), head(yaw=3), picture)
    assert all((a == b).all() for a, b in zip(before, (picture.y, picture.u, picture.v), strict=True))


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_no_control_parts_closed_lips(name: str, value: float) -> None:
    points = mesh.fit_pose(face().points_px).to_face(face().points_px)
    middle = (points[mesh.INNER_UPPER] + points[mesh.INNER_LOWER]) / 2
    points[mesh.INNER_UPPER] = points[mesh.INNER_LOWER] = middle
    controls = np.zeros(BLENDSHAPES, np.float32)
    controls[NAMES.index(name)] = value
    after = points + load_basis().displacement(controls, points)
    gaps = after[mesh.INNER_LOWER, 1] - after[mesh.INNER_UPPER, 1]
    assert np.abs(gaps).max() < 0.003


def test_the_jaw_opens_open_lips_by_a_factor() -> None:
    points = mesh.fit_pose(face().points_px).to_face(face().points_px)

    def gap(p: F32) -> float:
        return float((p[mesh.INNER_LOWER[2:7], 1] - p[mesh.INNER_UPPER[2:7], 1]).mean())

    for value in (0.5, -0.5):
        after = points + load_basis().displacement(look(jawOpen=value), points)
        assert gap(after) / gap(points) == pytest.approx(1 + value, abs=0.1)


def test_an_eye_never_closes_further_than_shut() -> None:
    closing = load_basis().closing(look(eyeBlink=1, eyeSquint=1, eyeLookDown=1))
    assert closing.sum(axis=1) == pytest.approx(1.0, abs=1e-5)


# How it is done --------------------------------------------------------------------------------------


def test_strength_fades_it() -> None:
    def change(strength: float) -> float:
        picture = run(clip(portrait(), look(mouthSmile=1), strength=np.full(1, strength, np.float32)))
        return float(np.abs(picture.y.astype(int) - portrait().y).mean())

    assert 0 < change(0.3) < change(1.0)


def test_it_follows_the_lips_as_drawn() -> None:
    lips = face().points_px.copy()
    lips[:, 1] += 6
    asked = clip(portrait(), look(mouthSmile=1))
    drawn = Clip(asked.frames, track=asked.track, expression=asked.expression, drawn=(lips,))
    expected = expressed(portrait(), lips, look(mouthSmile=1), STILL, load_basis())
    assert (run(drawn).y == expected.y).all()
    assert (run(drawn).y != run(asked).y).any()


def test_each_picture_of_a_clip_has_its_own_expression() -> None:
    pictures = portrait(), moved(3, 0), portrait()
    controls = np.stack([look(mouthSmile=1), look(mouthSmile=1), look(eyeBlink=1)])
    states = FaceState.OK, FaceState.LOST, FaceState.OK
    track = FaceTrack((face(), None, face()), states, np.ones(3, np.float32), (0, 0, 0))
    asked = Clip(Frames(pictures, 0, RATE), track=track, expression=Expression(controls, np.stack([STILL] * 3)))
    ((first, second, third),) = (clip.frames.pictures for clip in Express(load_basis())(iter([asked])))
    assert (first.y == made(controls[0]).y).all()
    assert second is pictures[1]
    assert (third.y == made(controls[2]).y).all()


@pytest.mark.parametrize("shift", [(-200, 0), (250, 0), (0, -110), (0, 330), (-180, 320)])
def test_a_face_at_the_edge_of_the_picture(shift: tuple[int, int]) -> None:
    points = face().points_px + np.array([*shift, 0], np.float32)
    controls = look(mouthSmile=0.5, eyeBlink=0.5, eyeWideLeft=0.5, browInnerUp=0.5)
    new = expressed(moved(*shift), points, controls, head(yaw=3, scale=1.03), load_basis())
    assert (new.y != moved(*shift).y).any()


@pytest.mark.parametrize("zoom", [0.02, 0.1, 0.33])
def test_faces_of_any_size(zoom: float) -> None:
    points = (face().points_px * zoom + [256, 256, 0]).astype(np.float32)
    new = expressed(
        portrait(), points, look(mouthSmile=0.5, eyeBlink=0.5, eyeLookInLeft=0.5), head(yaw=2), load_basis()
    )
    assert new.y.shape == (512, 512)


def test_steady_controls_do_not_make_a_still_flicker() -> None:
    first, second = (made(look(mouthSmile=0.5, eyeBlink=0.3), head(yaw=1)) for _ in range(2))
    assert (first.y == second.y).all()
    assert (first.u == second.u).all()


def test_the_recipe_makes_a_symmetric_basis_that_never_parts_the_lips() -> None:
    other = mirrored_points()
    rng = np.random.default_rng(0)
    motion = rng.normal(0, 0.02, (BLENDSHAPES, 478, 3))
    motion[:, mesh.INNER_LOWER, 1] += 0.1
    motion = (motion + motion[mirrored_names()][:, other] * [-1, 1, 1]) / 2
    points = mesh.fit_pose(face().points_px).to_face(face().points_px).astype(np.float64)
    points = (points + points[other] * [-1, 1, 1]) / 2
    basis = assembled(motion, points, {"mouthSmile": 2.0})
    assert np.allclose(basis.moves[mirrored_names()][:, other] * [-1, 1, 1], basis.moves, atol=1e-5)
    gaps = basis.moves[:, mesh.INNER_LOWER, 1:] - basis.moves[:, mesh.INNER_UPPER, 1:]
    assert np.abs(gaps).max() < 1e-5
    assert (basis.lids[mirrored_names()][:, ::-1] == basis.lids).all()
