from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import cv2
import numpy as np

from beavervision.media import Clip, FaceState, FaceTrack, Frames, Patch, Picture, Region
from beavervision.stages.render import Render
from tests.faces import portrait

REGION = Region(180, 120, 96, 64)


def soft_mask() -> np.ndarray:
    mask = np.zeros((64, 96), np.uint8)
    cv2.ellipse(mask, (48, 32), (34, 20), 0, 0, 360, 255, -1)
    return np.asarray(cv2.GaussianBlur(mask, (0, 0), 4), np.uint8)


def run(
    pictures: list[Picture], patches: list[tuple[Patch, ...]], shots: list[int] | None = None, match: bool = True
) -> list[Picture]:
    n = len(pictures)
    track = FaceTrack((None,) * n, (FaceState.OK,) * n, np.ones(n, np.float32), tuple(shots or [0] * n))

    def clips() -> Iterator[Clip]:
        yield Clip(Frames(tuple(pictures), 0, Fraction(25)), track, patches=tuple(patches))

    (clip,) = Render(match=match)(clips())
    assert clip.patches == ()
    return list(clip.frames.pictures)


def test_without_patches_every_plane_is_the_source() -> None:
    picture = portrait()
    (out,) = run([picture], [()])
    assert out is picture


def test_only_samples_under_the_mask_change() -> None:
    picture = portrait()
    mask = soft_mask()
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3), dtype=np.uint8)
    (out,) = run([picture], [(Patch.of_rgb(REGION, noise, mask, picture.color),)])
    outside = np.ones(picture.y.shape, bool)
    outside[120:184, 180:276] = mask == 0
    assert (out.y[outside] == picture.y[outside]).all()
    outside_c = outside.reshape(256, 2, 256, 2).all(axis=(1, 3))
    assert (out.u[outside_c] == picture.u[outside_c]).all()
    assert (out.v[outside_c] == picture.v[outside_c]).all()
    assert (out.y[140:160, 220:240] != picture.y[140:160, 220:240]).mean() > 0.8


def test_a_patch_of_wrong_colour_is_brought_to_its_surroundings() -> None:
    picture = portrait()
    source = picture.rgb(REGION)
    tinted = np.clip(source.astype(int) + np.array([14, -10, 8]), 0, 255).astype(np.uint8)
    patch = Patch.of_rgb(REGION, tinted, soft_mask(), picture.color)
    (matched,) = run([picture], [(patch,)])
    (plain,) = run([picture], [(patch,)], match=False)
    middle = Region(216, 140, 24, 20)
    wanted = picture.rgb(middle).astype(float)
    assert np.abs(matched.rgb(middle) - wanted).mean() < 0.35 * np.abs(plain.rgb(middle) - wanted).mean()


def test_a_blurred_patch_is_sharpened_towards_its_surroundings() -> None:
    rng = np.random.default_rng(1)
    base = portrait()
    grain = Picture(
        np.clip(base.y + rng.normal(0, 8, base.y.shape), 0, 255).astype(np.uint8), base.u, base.v, base.color
    )
    blurred = np.asarray(cv2.GaussianBlur(grain.rgb(REGION), (0, 0), 1.0), np.uint8)
    patch = Patch.of_rgb(REGION, blurred, soft_mask(), grain.color)

    def detail(picture: Picture) -> float:
        return float(np.abs(cv2.Laplacian(picture.rgb(Region(216, 140, 24, 20))[..., 1], cv2.CV_32F)).mean())

    (matched,) = run([grain], [(patch,)])
    (plain,) = run([grain], [(patch,)], match=False)
    assert detail(plain) < 0.5 * detail(grain)
    assert detail(matched) > 1.3 * detail(plain)


def test_a_seam_between_the_chroma_samples_leaves_the_colours_as_they_are() -> None:
    picture = portrait()
    source = picture.rgb(REGION)
    mask = np.zeros((64, 96), np.uint8)
    mask[31, 20:70] = 100  # an odd row: no chroma sample has it
    dark = np.clip(source.astype(int) - 30, 0, 255).astype(np.uint8)
    patch = Patch.of_rgb(REGION, dark, mask, picture.color)
    (matched,) = run([picture], [(patch,)])
    (plain,) = run([picture], [(patch,)], match=False)
    assert (matched.u == plain.u).all()
    assert (matched.v == plain.v).all()
    row = np.s_[151, 200:250]
    assert (
        np.abs(matched.y[row] - picture.y[row].astype(int)).mean()
        < np.abs(plain.y[row] - picture.y[row].astype(int)).mean()
    )


def test_the_correction_does_not_flicker_and_starts_anew_with_a_shot() -> None:
    picture = portrait()
    source = picture.rgb(REGION).astype(int)
    shifts = [0, 20, 0, 20, 0, 20, 0, 20]
    drawn = [np.clip(source + s, 0, 255).astype(np.uint8) for s in shifts]
    patches = [(Patch.of_rgb(REGION, rgb, soft_mask(), picture.color),) for rgb in drawn]
    spot = np.s_[145:155, 220:235]
    steady = [float(p.y[spot].mean()) for p in run([picture] * 8, patches)]
    # The patches jump by 20 levels; the correction must not follow each of them.
    assert np.abs(np.diff(steady)).max() > 8
    anew = [float(p.y[spot].mean()) for p in run([picture] * 8, patches, shots=list(range(8)))]
    assert np.ptp(anew) < 3
