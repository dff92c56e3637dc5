from __future__ import annotations

import sys
import wave
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from beavervision.errors import LicenceError, ModelError, UsageError
from beavervision.evaluate.scores import flicker
from beavervision.media import U8, Clip, Face, FaceState, FaceTrack, Frames, Picture
from beavervision.models import mesh
from beavervision.models.face import FaceNets
from beavervision.models.mesh import fit_pose
from beavervision.models.restorers import FACE_PX, alignment
from beavervision.models.store import ModelStore
from beavervision.pipeline import Pipeline
from beavervision.settings import Settings
from beavervision.stages.decode import Decode
from beavervision.stages.detect import Detect
from beavervision.stages.restore import Area, Restore
from tests.faces import moved, portrait


@cache
def nets() -> FaceNets:
    return FaceNets()


@cache
def face_at(dx: float = 0.0) -> tuple[Picture, Face]:
    picture = moved(dx=dx) if dx else portrait()
    (clip,) = Detect(nets())(iter([Clip(Frames((picture,), 0, Fraction(25)))]))
    assert clip.track is not None
    face = clip.track.faces[0]
    assert face is not None
    return picture, face


def run(
    restorer: Callable[[U8], U8],
    shown: list[tuple[Picture, Face | None]],
    area: Area = "mouth",
    strength: float = 1.0,
    shots: list[int] | None = None,
) -> list[Picture]:
    n = len(shown)
    track = FaceTrack(
        tuple(face for _, face in shown),
        (FaceState.OK,) * n,
        np.full(n, strength, np.float32),
        tuple(shots or [0] * n),
    )
    clip = Clip(Frames(tuple(picture for picture, _ in shown), 0, Fraction(25)), track)
    (out,) = Restore(restorer, area)(iter([clip]))
    return list(out.frames.pictures)


def stripes(faces: U8) -> U8:
    """A restorer that adds fine stripes and much light."""
    pattern = np.where(np.arange(FACE_PX) // 4 % 2, 40, 0)[:, None, None]
    return np.clip(faces.astype(int) + pattern, 0, 255).astype(np.uint8)


def changed(before: Picture, after: Picture) -> np.ndarray:
    return before.y != after.y


def test_the_face_is_aligned_to_the_template() -> None:
    _, face = face_at()
    matrix = alignment(fit_pose(face.points_px))
    eyes = np.stack([face.points_px[[33, 133], :2].mean(axis=0), face.points_px[[362, 263], :2].mean(axis=0)])
    found = cv2.transform(eyes[None], matrix)[0]
    assert np.abs(found - [[193, 240], [319, 240]]).max() < 9
    (nose,) = cv2.transform(face.points_px[None, [4], :2], matrix)[0]
    assert np.abs(nose - [256.6, 314]).max() < 14
    ratio = np.hypot(*matrix[:, 0]) / np.hypot(*matrix[:, 1])
    assert ratio == pytest.approx(1, abs=1e-4)  # a similarity: nothing is sheared


@pytest.mark.parametrize("area", ["mouth", "face"])
def test_only_the_area_changes(area: Area) -> None:
    picture, face = face_at()
    (out,) = run(stripes, [(picture, face)], area)
    ring = mesh.OUTER_LIP if area == "mouth" else mesh.FACE_OVAL
    inside = np.zeros(picture.y.shape, np.uint8)
    cv2.fillPoly(inside, [np.round(face.points_px[ring, :2]).astype(np.int32)], 1)
    reach = round((0.42 if area == "mouth" else 0.15) * fit_pose(face.points_px).scale_px)
    near = cv2.dilate(inside, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1,) * 2)) > 0
    changes = changed(picture, out)
    assert not changes[~near].any()
    assert changes[inside > 0].mean() > 0.6
    if area == "mouth":
        eyes = np.round(face.points_px[mesh.EYE_CORNERS, :2]).astype(int)
        assert not changes[eyes[:, 1], eyes[:, 0]].any()


def test_colour_and_light_stay_those_of_the_picture() -> None:
    """A restorer that darkens the mouth by 13 steps and tints it: hardly a step of that may be left."""
    picture, face = face_at()
    (out,) = run(
        lambda faces: np.clip(faces.astype(int) * 0.8 + [20, 0, 12], 0, 255).astype(np.uint8), [(picture, face)]
    )
    inside = np.zeros(picture.y.shape, np.uint8)
    cv2.fillPoly(inside, [np.round(face.points_px[mesh.OUTER_LIP, :2]).astype(np.int32)], 1)
    before, after = (p.y[inside > 0].astype(float).mean() for p in (picture, out))
    assert abs(before - after) < 1.8


def test_strength_fades_and_nothing_happens_without_a_face() -> None:
    picture, face = face_at()
    full, half = (run(stripes, [(picture, face)], strength=s)[0].y.astype(int) - picture.y for s in (1.0, 0.5))
    strong = np.abs(full) > 12
    assert np.abs(half[strong] / full[strong] - 0.5).max() < 0.13
    assert run(stripes, [(picture, face)], strength=0.0) == [picture]
    assert run(stripes, [(picture, None)]) == [picture]


def flickering(seed: int) -> Callable[[U8], U8]:
    rng = np.random.default_rng(seed)

    def restorer(faces: U8) -> U8:
        noise = cv2.GaussianBlur(rng.normal(0, 60, (FACE_PX, FACE_PX, 1)).astype(np.float32), (0, 0), 1.5)
        return np.clip(faces + noise[None, ..., None], 0, 255).astype(np.uint8)

    return restorer


def test_detail_is_steady_though_the_restorer_flickers() -> None:
    """The face moves: the average must follow it. Cuts forget it, so that they show how much the restorer flickers."""
    shown: list[tuple[Picture, Face | None]] = [face_at(1.5 * i) for i in range(12)]

    def mouths(pictures: list[Picture]) -> U8:
        tiles = []
        for picture, (source, face) in zip(pictures, shown, strict=True):
            assert face is not None
            added = picture.y.astype(np.int16) - source.y
            x, y = np.round(face.points_px[mesh.OUTER_LIP, :2].mean(axis=0)).astype(int)
            tiles.append(np.clip(added[y - 12 : y + 12, x - 20 : x + 20] + 128, 0, 255).astype(np.uint8))
        return np.stack(tiles[4:])

    steady = flicker(mouths(run(flickering(0), shown)))
    jumpy = flicker(mouths(run(flickering(0), shown, shots=list(range(12)))))
    assert steady < 0.5 * jumpy
    # What the restorer adds every time is not averaged away, but moves with the face.
    kept = mouths(run(stripes, shown)).astype(float).std()
    alone = mouths(run(stripes, shown, shots=list(range(12)))).astype(float).std()
    assert kept > 0.85 * alone


# --- a checkpoint, all the way -----------------------------------------------------------------------------------------


def checkpoint(path: Path) -> Path:
    """A RestoreFormer of half a million random weights: the smallest restorer that spandrel tells by its tensors."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    from beavervision.models.restorers import _spandrel_importable

    with _spandrel_importable():
        pytest.importorskip("spandrel")
        from spandrel.architectures.RestoreFormer import RestoreFormer
    torch.manual_seed(0)
    net = RestoreFormer(
        n_embed=16, embed_dim=32, ch=32, ch_mult=(1,) * 6, num_res_blocks=1, attn_resolutions=(16,), z_channels=32
    )
    torch.save({"params": net.state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with that checkpoint in it, as the model `tiny`."""
    folder = tmp_path_factory.mktemp("restorers")
    stored = ModelStore(folder).add(checkpoint(folder / "RestoreFormer.pth"), "tiny")
    assert stored.card.kind == "restore"
    assert stored.card.licence_weights
    assert stored.card.sha256
    assert set(stored.hashes) == {"weights.safetensors"}
    return folder


def planes_of(path: Path) -> list[Picture]:
    return [picture for clip in Decode(extend="none")(path) for picture in clip.frames.pictures]


@pytest.mark.torch
def test_a_checkpoint_goes_through_the_whole_path(store: Path, portrait: Path, tmp_path: Path) -> None:
    wav = tmp_path / "words.wav"
    with wave.open(str(wav), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16_000)
        file.writeframes((9000 * np.sin(np.arange(1920) / 12)).astype("<i2").tobytes())
    settings = Settings(data_dir=store, crf=0, preset="ultrafast")  # lossless
    pipeline = Pipeline(device="cpu", allow_non_commercial=True, settings=settings)
    plain, restored = tmp_path / "plain.mp4", tmp_path / "restored.mp4"
    pipeline.lipsync(portrait, plain, audio=wav)
    report = pipeline.lipsync(portrait, restored, audio=wav, restore="tiny", restore_area="mouth")
    assert report.model["restore"] == "tiny"
    before, after = planes_of(plain), planes_of(restored)
    assert len(before) == len(after) == 3
    _, face = face_at()
    x, y = face.points_px[mesh.OUTER_LIP, :2].mean(axis=0)
    eyes_px = fit_pose(face.points_px).scale_px
    for one, two in zip(before, after, strict=True):
        rows, columns = np.nonzero(changed(one, two))
        assert rows.size > 300
        assert np.abs(rows - y).max() < eyes_px
        assert np.abs(columns - x).max() < eyes_px


@pytest.mark.torch
def test_its_licence_and_its_use_are_held(store: Path) -> None:
    models = ModelStore(store)
    with pytest.raises(LicenceError, match="allow-non-commercial"):
        models.open_restorer("tiny")
    with pytest.raises(ModelError, match="--restore tiny"):
        models.open("tiny", allow_non_commercial=True)
    with pytest.raises(UsageError, match="restore_area"):
        Pipeline(device="cpu").lipsync("a.png", "b.mp4", text="Hi.", restore_area="nose")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="There is no model 'gfpgan'"):
        Pipeline(device="cpu").lipsync("a.png", "b.mp4", text="Hi.", restore="gfpgan")


@pytest.mark.torch
def test_tensors_of_another_version_are_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    from beavervision.models.restorers import _spandrel_importable

    with _spandrel_importable():
        pytest.importorskip("spandrel", reason="needs the extra restore")
    marks: dict[str, Any] = {"toRGB.0.weight": torch.zeros(3), "stylegan_decoder.style_mlp.1.weight": torch.zeros(3)}
    torch.save({"params_ema": marks}, tmp_path / "GFPGAN.pth")
    with pytest.raises(ModelError, match=r"gfpgan.*version"):
        ModelStore(tmp_path).add(tmp_path / "GFPGAN.pth")
    assert ModelStore(tmp_path).list() == ()


@pytest.mark.torch
def test_spandrel_needs_no_torchvision_and_leaves_none_behind(store: Path) -> None:
    ModelStore(store).open_restorer("tiny", allow_non_commercial=True)
    stand_in = sys.modules.get("torchvision")
    assert stand_in is None or getattr(stand_in, "__file__", None)
