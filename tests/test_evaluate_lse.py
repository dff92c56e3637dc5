"""SyncNet's protocol: windows, pairing, distances, and the restricted reading of its checkpoint."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from beavervision.errors import InputError, MediaError, ModelError, NoAudioError
from beavervision.evaluate import lse as module
from beavervision.evaluate.lse import crop, load, lse, sync_of
from beavervision.evaluate.scores import best_lag
from beavervision.media import Audio, Clip, Frames, sample_at
from beavervision.models.face import FaceNets
from beavervision.stages.decode import from_rgb
from beavervision.stages.detect import Detect
from tests.conftest import Ran
from tests.faces import empty, make_video, portrait, portrait_rgb
from tests.test_models import REFERENCE, shared, synthetic

RATE = Fraction(25)


def embeddings(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 64)).astype(np.float32)


@pytest.mark.parametrize("late", [-7, 0, 3])
def test_offset_and_confidence_of_known_embeddings(late: int) -> None:
    """Sound that is `late` pictures late: the picture's embedding comes again so much later in the sound."""
    faces = embeddings(120)
    noise = 0.1 * embeddings(120, seed=1)
    found = sync_of(faces, np.roll(faces, late, axis=0) + noise)
    assert found.offset == -late
    # Strangers are sqrt(2 * 64) apart, partners as far as the noise; the ends are paired with zeros or wrapped.
    assert found.distance == pytest.approx(0.8, abs=0.9)
    assert found.distance + found.confidence == pytest.approx(np.sqrt(128), rel=0.05)


def test_without_a_common_offset_there_is_no_confidence() -> None:
    found = sync_of(embeddings(200), embeddings(200, seed=2))
    assert found.confidence < 0.3


def test_embeddings_must_pair() -> None:
    with pytest.raises(ValueError, match="do not pair"):
        sync_of(embeddings(5), embeddings(6))


@pytest.mark.torch
def test_the_figures_are_those_of_the_published_pairing() -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    faces, sounds = (torch.from_numpy(embeddings(40, seed)) for seed in (3, 4))
    sounds[4:] += faces[:-4]
    padded = torch.nn.functional.pad(sounds, (0, 0, 15, 15))
    rows = [
        torch.nn.functional.pairwise_distance(face.expand(31, -1), padded[i : i + 31]) for i, face in enumerate(faces)
    ]
    means = torch.stack(rows, 1).mean(1)
    least, place = means.min(0)
    found = sync_of(faces.numpy(), sounds.numpy())
    assert found.distance == pytest.approx(float(least), abs=1e-5)
    assert found.confidence == pytest.approx(float(means.median() - least), abs=1e-5)
    assert found.offset == 15 - int(place) == -4


def test_crop_is_widened_as_published() -> None:
    y, x = np.mgrid[0:400, 0:400]
    picture = np.stack([x // 2, y // 2, 0 * x], axis=-1).astype(np.uint8)
    view = crop(picture, np.array([200, 150, 50], np.float32))
    assert view.shape == (224, 224, 3)
    assert (view[0, 0, 0], view[0, 0, 1]) == pytest.approx((65, 50), abs=1)  # 70 to the left, 50 above
    assert (view[-1, -1, 0], view[-1, -1, 1]) == pytest.approx((135, 120), abs=1)  # 70 to the right, 90 below
    beyond = crop(picture, np.array([10, 150, 50], np.float32))
    assert (beyond[:, 0] == 110).all()


class Noting:
    """In place of SyncNet: notes brightness of the pictures and loudness of the sound in each window."""

    def __init__(self) -> None:
        self.light: list[float] = []
        self.loud: list[float] = []

    def __call__(self, mfcc: np.ndarray, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert mfcc.shape[1:] == (1, 13, 20) and pictures.shape[1:] == (3, 5, 224, 224)
        self.light += pictures.mean(axis=(1, 2, 3, 4)).tolist()
        self.loud += mfcc[:, 0, 0].mean(axis=1).tolist()
        return np.ones((len(mfcc), 4), np.float32), np.zeros((len(mfcc), 4), np.float32)


def flickering(count: int, late: int) -> tuple[list[np.ndarray], Audio]:
    """The portrait in changing light, and noise that is as loud as it is light, `late` pictures later."""
    rng = np.random.default_rng(5)
    light = np.convolve(rng.uniform(-1, 1, count + 6), np.ones(4) / 4, "same")[3:-3]
    pictures = [np.clip(portrait_rgb() * (0.8 + 0.3 * b), 0, 255).astype(np.uint8) for b in light]
    loud = np.roll(light, late)
    gain = np.concatenate(
        [np.full(sample_at(i + 1, RATE, 48000) - sample_at(i, RATE, 48000), b) for i, b in enumerate(loud)]
    )
    pcm = 0.05 * np.exp(1.5 * gain) * rng.uniform(-1, 1, len(gain))
    return pictures, Audio(pcm[None].astype(np.float32), 48000)


@pytest.mark.parametrize("late", [0, 4])
def test_windows_pair_pictures_with_their_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: int) -> None:
    net = Noting()
    monkeypatch.setattr(module, "load", lambda path, threads: net)
    pictures, sound = flickering(60, late)
    blank = 3  # pictures without a face come first
    video = make_video(
        tmp_path / "talk.mp4", [empty()] * blank + [from_rgb(p) for p in pictures], RATE,
        Audio(np.pad(sound.pcm, ((0, 0), (blank * 1920, 0))), 48000),
    )  # fmt: skip
    told: list[tuple[int, int | None]] = []
    report = lse(video, "weights", on_progress=lambda done, total: told.append((done, total)))
    assert report.start_s == pytest.approx(blank / 25, abs=0.21)  # a face is looked for now and then
    assert report.pictures == 63 - round(report.start_s * 25)
    assert told[-1] == (report.pictures - 5, report.pictures - 5)
    assert len(net.light) == report.pictures - 5
    lag = best_lag(np.array(net.loud), np.array(net.light), 10)
    assert lag is not None and lag.r > 0.9
    assert lag.fine == pytest.approx(late, abs=0.4)


def test_what_cannot_be_measured_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load", lambda path, threads: Noting())
    pictures, sound = flickering(20, 0)
    few = [from_rgb(p) for p in pictures]
    with pytest.raises(InputError, match="less than a second"):
        lse(make_video(tmp_path / "short.mp4", few, RATE, sound), "weights")
    with pytest.raises(NoAudioError):
        lse(make_video(tmp_path / "mute.mp4", few, RATE), "weights")
    Image.fromarray(portrait_rgb()).save(tmp_path / "still.png")
    with pytest.raises(MediaError, match="is a still"):
        lse(tmp_path / "still.png", "weights")
    with pytest.raises(InputError, match="no face"):
        lse(make_video(tmp_path / "empty.mp4", [empty()] * 20, RATE, sound), "weights")


def test_the_published_detectors_boxes_are_cropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sees another face, which is surer, and this one too, but in no picture of the first half."""
    (clip,) = Detect(FaceNets())(iter([Clip(Frames((portrait(),), 0, RATE))]))
    assert clip.track is not None and clip.track.faces[0] is not None
    middle = clip.track.faces[0].points_px[:, :2].mean(axis=0)
    half = np.array([50, 60])
    asked: list[tuple[int, ...]] = []

    def detector(rgb: np.ndarray) -> np.ndarray:
        asked.append(rgb.shape)
        this = [*(middle - half), *(middle + half), 0.91]
        return np.array([[0, 0, 60, 60, 0.99], *([this] if len(asked) > 30 else [])], np.float32)

    boxes: list[np.ndarray] = []
    monkeypatch.setattr(module, "load", lambda path, threads: Noting())
    monkeypatch.setattr(module, "load_detector", lambda path, threads: detector)
    monkeypatch.setattr(module, "crop", lambda bgr, box: boxes.append(box) or np.zeros((224, 224, 3), np.uint8))
    pictures, sound = flickering(70, 0)
    video = make_video(tmp_path / "talk.mp4", [from_rgb(p) for p in pictures], RATE, sound)
    report = lse(video, "weights", "detector")
    assert (report.boxes, report.pictures) == ("s3fd", 40)
    assert report.start_s == pytest.approx(30 / 25, abs=0.05)
    assert len(asked) == 70 and set(asked) == {(*portrait_rgb().shape,)}
    np.testing.assert_allclose(boxes[20], [*middle, 60], atol=0.01)
    monkeypatch.setattr(module, "load_detector", lambda path, threads: lambda rgb: np.zeros((0, 5), np.float32))
    with pytest.raises(InputError, match="no face"):
        lse(video, "weights", "detector")


@shared
@pytest.mark.shared
@pytest.mark.torch
def test_checkpoint_is_read_and_gives_the_published_embeddings(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    path = tmp_path / "syncnet_v2.model"
    state = synthetic("syncnet_lse")
    torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)  # as old files are
    io = np.load(REFERENCE / "syncnet_lse_io.npz")
    sound, face = load(path)(io["mfcc"], io["video"].astype(np.float32))
    assert np.abs(sound - io["audio_embedding"]).max() < 1e-3
    assert np.abs(face - io["video_embedding"]).max() < 1e-3
    name = next(iter(state))
    torch.save({**state, "spare": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="unknown tensor spare"):
        load(path)
    torch.save({**state, name: torch.zeros(2, 2)}, path)
    with pytest.raises(ModelError, match=rf"tensor {name} has shape \(2, 2\)"):
        load(path)


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("run",))


@pytest.mark.torch
def test_checkpoints_with_code_or_none_are_refused(
    cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    torch.save({"a": Trap()}, tmp_path / "trap.model")
    with pytest.raises(ModelError, match="refused"):
        load(tmp_path / "trap.model")
    torch.save([1, 2], tmp_path / "list.model")
    with pytest.raises(ModelError, match="no tensors by name"):
        load(tmp_path / "list.model")
    (tmp_path / "text.model").write_text("weights")
    with pytest.raises(ModelError, match="PyTorch checkpoint"):
        load(tmp_path / "text.model")
    ran = cli("evaluate", "lse", tmp_path / "video.mp4", "--syncnet", tmp_path / "nowhere.model", "--json")
    assert ran.code == 5
    assert "does not exist" in json.loads(ran.out)["error"]["message"]
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModelError, match=r"pip install 'beavervision\[gpu\]'"):
        load(tmp_path / "trap.model")
