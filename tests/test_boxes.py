"""The face boxes of the published scripts: S3FD's tensors and candidates, and how each script asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from beavervision.errors import LicenceError, ModelError, UsageError
from beavervision.media import F32, U8
from beavervision.models.boxes import SYNCNET_ASKS, WAV2LIP_ASKS, Asking, FaceBoxes, load_syncnet_boxes, nearest
from beavervision.models.store import ModelStore
from beavervision.pipeline import Pipeline
from beavervision.settings import Settings
from beavervision.stages.decode import Decode
from tests.conftest import Ran

if TYPE_CHECKING:
    from torch import Tensor

# Channels in and out, and the side of the kernel, by the published names.
CONVOLUTIONS = {
    "conv1_1": (3, 64, 3), "conv1_2": (64, 64, 3), "conv2_1": (64, 128, 3), "conv2_2": (128, 128, 3),
    "conv3_1": (128, 256, 3), "conv3_2": (256, 256, 3), "conv3_3": (256, 256, 3),
    "conv4_1": (256, 512, 3), "conv4_2": (512, 512, 3), "conv4_3": (512, 512, 3),
    "conv5_1": (512, 512, 3), "conv5_2": (512, 512, 3), "conv5_3": (512, 512, 3),
    "fc6": (512, 1024, 3), "fc7": (1024, 1024, 1),
    "conv6_1": (1024, 256, 1), "conv6_2": (256, 512, 3), "conv7_1": (512, 128, 1), "conv7_2": (128, 256, 3),
    "conv3_3_norm_mbox_conf": (256, 4, 3), "conv3_3_norm_mbox_loc": (256, 4, 3),
    "conv4_3_norm_mbox_conf": (512, 2, 3), "conv4_3_norm_mbox_loc": (512, 4, 3),
    "conv5_3_norm_mbox_conf": (512, 2, 3), "conv5_3_norm_mbox_loc": (512, 4, 3),
    "fc7_mbox_conf": (1024, 2, 3), "fc7_mbox_loc": (1024, 4, 3),
    "conv6_2_mbox_conf": (512, 2, 3), "conv6_2_mbox_loc": (512, 4, 3),
    "conv7_2_mbox_conf": (256, 2, 3), "conv7_2_mbox_loc": (256, 4, 3),
}  # fmt: skip
NORMS = {"conv3_3_norm": 256, "conv4_3_norm": 512, "conv5_3_norm": 512}
HEADS = ("conv3_3_norm", "conv4_3_norm", "conv5_3_norm", "fc7", "conv6_2", "conv7_2")


def tensors() -> dict[str, tuple[int, ...]]:
    wanted: dict[str, tuple[int, ...]] = {f"{name}.weight": (n,) for name, n in NORMS.items()}
    for name, (inputs, outputs, side) in CONVOLUTIONS.items():
        wanted |= {f"{name}.weight": (outputs, inputs, side, side), f"{name}.bias": (outputs,)}
    return wanted


def random_state(seed: int = 0) -> dict[str, Tensor]:
    """Weights that keep the size of what passes through; one candidate in some hundred is a face."""
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    torch.manual_seed(seed)
    state = {}
    for name, shape in tensors().items():
        if name in {f"{norm}.weight" for norm in NORMS}:
            state[name] = torch.full(shape, 10.0)
        elif len(shape) == 4:
            state[name] = torch.randn(shape) * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        else:
            state[name] = 0.1 * torch.randn(shape)
        if name.endswith("conf.bias"):
            state[name][-1] -= 3.0
    return state


def as_syncnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors by the names of SyncNet's checkpoint."""
    trunk = [f"conv{s}_{k}" for s, n in enumerate((2, 2, 3, 3, 3), 1) for k in range(1, n + 1)]
    places = dict(
        zip(
            [*trunk, "fc6", "fc7"],
            (f"vgg.{i}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28, 31, 33)),
            strict=True,
        )
    )
    places |= {name: f"extras.{i}" for i, name in enumerate(("conv6_1", "conv6_2", "conv7_1", "conv7_2"))}
    places |= {norm: f"L2Norm{norm[4:7]}" for norm in NORMS}
    places |= {f"{head}_mbox_{kind}": f"{kind}.{i}" for i, head in enumerate(HEADS) for kind in ("loc", "conf")}
    return {f"{places[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": t for name, t in state.items()}


def restated(state: Mapping[str, Tensor], image: F32, spread: bool) -> F32:
    """The candidates of (3, h, w), (m, 5): the published forward pass and decoding, cell by cell."""
    import torch
    from torch.nn import functional as f

    def layer(name: str, x: Tensor, relu: bool = True, **how: Any) -> Tensor:
        y = f.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **how)
        return y.clamp(min=0) if relu else y

    x = torch.from_numpy(image)[None]
    maps: dict[str, Tensor] = {}
    for stage, layers in enumerate((2, 2, 3, 3, 3), 1):
        for k in range(1, layers + 1):
            x = layer(f"conv{stage}_{k}", x, padding=1)
        if stage >= 3:
            norm = f"conv{stage}_3_norm"
            maps[norm] = f.normalize(x, dim=1) * state[f"{norm}.weight"][None, :, None, None]
        x = f.max_pool2d(x, 2, 2, ceil_mode=spread and stage == 3)
    x = layer("fc6", x, **({"padding": 6, "dilation": 6} if spread else {"padding": 3}))
    maps["fc7"] = x = layer("fc7", x)
    maps["conv6_2"] = x = layer("conv6_2", layer("conv6_1", x), stride=2, padding=1)
    maps["conv7_2"] = layer("conv7_2", layer("conv7_1", x), stride=2, padding=1)
    rows = []
    for k, head in enumerate(HEADS):
        stride, side = 4 * 2**k, 16 * 2**k
        told = layer(f"{head}_mbox_conf", maps[head], relu=False, padding=1)[0]
        told = torch.stack([told[:-1].max(dim=0).values, told[-1]])
        sure = torch.softmax(told, dim=0)[1].numpy()
        place = layer(f"{head}_mbox_loc", maps[head], relu=False, padding=1)[0].numpy()
        for i, j in np.ndindex(sure.shape):
            dx, dy, dw, dh = place[:, i, j]
            cx, cy = stride / 2 + j * stride + 0.1 * dx * side, stride / 2 + i * stride + 0.1 * dy * side
            w, h = side * np.exp(0.2 * dw), side * np.exp(0.2 * dh)
            rows.append([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2, sure[i, j]])
    return np.array(rows, np.float32)


@pytest.mark.torch
@pytest.mark.parametrize("spread", [False, True])
def test_the_detector_is_the_published_one(spread: bool) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    from beavervision.models.nets import blocks, s3fd

    kind = s3fd.SpreadS3FD if spread else s3fd.S3FD
    assert blocks.shapes(kind) == tensors()
    state = random_state()
    image = (
        np.random.default_rng(1).uniform(-120, 140, (3, 84, 108)).astype(np.float32)
    )  # the third halving is of 21 rows
    with torch.inference_mode():
        (found,) = blocks.loaded(kind, state)(torch.from_numpy(image)[None]).numpy()
    want = restated(state, image, spread)
    assert found.shape == want.shape
    np.testing.assert_allclose(found, want, rtol=1e-3, atol=2e-2)
    assert 5 < (want[:, 4] > 0.5).sum() < len(want) / 5  # some are faces, and most are not


@pytest.mark.torch
def test_syncnets_names_are_those_of_the_same_layers() -> None:
    pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    from beavervision.models.nets.s3fd import renamed

    state = random_state()
    found = renamed(as_syncnet(state))
    assert found.keys() == state.keys()
    assert all(found[name] is state[name] for name in state)


class Told:
    """In place of the network: gives what it is told, and keeps what it was shown."""

    def __init__(self, candidates: npt.ArrayLike) -> None:
        self.candidates = np.array(candidates, np.float32).reshape(-1, 5)
        self.shown: list[npt.NDArray[np.generic]] = []

    def __call__(self, *inputs: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]:
        self.shown += inputs
        return (self.candidates[None],)


def gradient(height: int = 40, width: int = 64) -> U8:
    return np.stack(np.broadcast_arrays(*np.ogrid[0:height, 0:width], 7), axis=-1).astype(np.uint8)


def test_wav2lips_script_takes_blues_mean_off_red() -> None:
    net = Told([])
    assert FaceBoxes(net)(gradient()).shape == (0, 5)
    (x,) = net.shown
    assert x.shape == (1, 3, 40, 64) and x.dtype == np.float32
    np.testing.assert_array_equal(x[0, :, 30, 50], np.array([30 - 104, 50 - 117, 7 - 123], np.float32))


def test_syncnets_script_looks_at_a_quarter() -> None:
    net = Told([[2, 3, 8, 9, 0.95]])
    (box,) = FaceBoxes(net, SYNCNET_ASKS)(gradient())
    np.testing.assert_allclose(box, [8, 12, 32, 36, 0.95])
    (x,) = net.shown
    assert x.shape == (1, 3, 10, 16)
    np.testing.assert_allclose(x[0, :, 5, 8], [21.5 - 123, 33.5 - 117, 7 - 104], atol=0.51)


@pytest.mark.parametrize(
    ("asking", "kept"),
    [
        # Of the first three boxes the second shares 0.43 with the first, and the third 0.25; the fourth lies apart.
        (WAV2LIP_ASKS, [0.97, 0.6, 0.55]),
        (Asking((0, 0, 0), 1.0, (0.3,), 0.0, 0.9), [0.97]),
        (Asking((0, 0, 0), 1.0, (0.3, 0.1), 0.0, 0.5), [0.97, 0.6]),
        (Asking((0, 0, 0), 1.0, (0.5,), 0.0, 0.5), [0.97, 0.93, 0.6, 0.55]),
    ],
)
def test_the_surest_of_boxes_that_overlap_is_kept(asking: Asking, kept: list[float]) -> None:
    candidates = [
        [100, 0, 140, 40, 0.6],
        [0, 0, 40, 40, 0.97],
        [16, 0, 56, 40, 0.93],
        [0, 24, 40, 64, 0.55],
        [200, 0, 240, 40, 0.2],
        [300, 0, 340, 40, 0.04],
    ]
    found = FaceBoxes(Told(candidates), asking)(gradient())
    assert found[:, 4].tolist() == pytest.approx(kept)


def test_a_pixel_at_the_edge_counts_for_wav2lips_script_alone() -> None:
    """Boxes of 9 x 9 that share 4 columns: 36 of 126, or 50 of 150 with a pixel more on each side."""
    candidates = [[0, 0, 9, 9, 0.95], [5, 0, 14, 9, 0.92]]
    assert len(FaceBoxes(Told(candidates))(gradient())) == 1
    assert len(FaceBoxes(Told(candidates), Asking((0, 0, 0), 1.0, (0.3,), 0.0, 0.5))(gradient())) == 2


def test_the_nearest_box_is_that_of_the_same_face() -> None:
    boxes = np.array([[0, 0, 50, 50, 0.99], [100, 0, 160, 70, 0.6]], np.float32)
    np.testing.assert_array_equal(nearest(boxes, np.array([105, 5, 155, 60], np.float32), 0.2), boxes[1, :4])
    assert nearest(boxes, np.array([45, 45, 95, 95], np.float32), 0.2) is None
    assert nearest(boxes[:0], np.array([45, 45, 95, 95], np.float32), 0.2) is None


# --- a checkpoint, all the way ----------------------------------------------------------------------------------------


def sees_everywhere() -> dict[str, Tensor]:
    """A detector that says of each cell of the second head, 8 pixels apart, that a face of 128 x 128 pixels is there."""
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    state = {name: torch.zeros(shape) for name, shape in tensors().items()}
    for head in HEADS:
        state[f"{head}_mbox_conf.bias"][-1] = 6.0 if head == "conv4_3_norm" else -6.0
    state["conv4_3_norm_mbox_loc.bias"][2:] = 5 * np.log(4.0)
    return state


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with that detector, as `everywhere`, and a Wav2Lip generator of random weights, as `lips`."""
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    from beavervision.models.nets.wav2lip import Wav2Lip

    folder = tmp_path_factory.mktemp("boxes")
    torch.save(sees_everywhere(), folder / "s3fd.pth")
    torch.manual_seed(0)
    torch.save({"state_dict": Wav2Lip().state_dict()}, folder / "lips.pth")
    models = ModelStore(folder)
    stored = models.add(folder / "s3fd.pth", "everywhere")
    assert (stored.card.kind, stored.card.non_commercial) == ("boxes", True)
    assert set(stored.hashes) == {"weights.safetensors"}
    models.add(folder / "lips.pth", "lips")
    for file in folder.glob("*.pth"):
        file.unlink()
    return folder


@pytest.mark.torch
def test_an_imported_detector_gives_the_box_that_is_drawn_in(store: Path, portrait: Path, tmp_path: Path) -> None:
    from tests.test_pipeline import pictures

    settings = Settings(data_dir=store, crf=0, preset="ultrafast")  # lossless
    pipeline = Pipeline("lips", device="cpu", settings=settings, allow_non_commercial=True)
    told = {"text": "Hi.", "alive": False}
    pipeline.lipsync(portrait, tmp_path / "mesh.mp4", whole_box=True, **told)
    report = pipeline.lipsync(portrait, tmp_path / "s3fd.mp4", boxes="everywhere", whole_box=True, **told)
    assert (report.model["boxes"], report.model["whole_box"]) == ("everywhere", True)

    (source,) = next(iter(Decode(1)(portrait))).frames.pictures

    def drawn(path: Path) -> tuple[int, int, int, int]:
        rows, columns = np.nonzero(pictures(path)[8].y != source.y)
        return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1

    x0, y0, x1, y1 = drawn(tmp_path / "s3fd.mp4")
    assert (x1 - x0, y1 - y0) == pytest.approx((128, 138), abs=2)  # ten pixels more below
    assert ((x0 + x1) // 2 % 8, (y0 + y1 - 10) // 2 % 8) == (4, 4)  # the middle of a cell
    mesh = drawn(tmp_path / "mesh.mp4")
    assert abs(mesh[0] - x0) < 40 and abs(mesh[1] - y0) < 40
    assert mesh != (x0, y0, x1, y1)


@pytest.mark.torch
def test_its_licence_and_its_use_are_held(store: Path, cli: Callable[..., Ran], tmp_path: Path) -> None:
    models = ModelStore(store)
    with pytest.raises(LicenceError, match="allow-non-commercial"):
        models.open_boxes("everywhere")
    with pytest.raises(ModelError, match="--boxes everywhere"):
        models.open("everywhere", allow_non_commercial=True)
    with pytest.raises(ModelError, match="--model lips"):
        models.open_boxes("lips", allow_non_commercial=True)
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    torch.save({**sees_everywhere(), "spare": torch.zeros(1)}, tmp_path / "s3fd.pth")
    ran = cli("models", "add", tmp_path / "s3fd.pth")
    assert ran.code == 5
    assert "no S3FD face detector: it has an unknown tensor spare" in ran.err


def test_beaver_draws_without_boxes(tmp_path: Path) -> None:
    for options in ({"boxes": "s3fd"}, {"whole_box": True}):
        with pytest.raises(UsageError, match="Wav2Lip"):
            Pipeline(device="cpu").lipsync("a.png", tmp_path / "b.mp4", text="Hi.", **options)  # type: ignore[arg-type]


@pytest.mark.torch
def test_syncnets_checkpoint_is_read(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    state = as_syncnet(sees_everywhere())
    boxes = load_syncnet_boxes(state, "sfd_face.pth")(np.zeros((1024, 2048, 3), np.uint8))
    assert len(boxes) > 4
    np.testing.assert_allclose(boxes[:, 2:4] - boxes[:, :2], 512, atol=0.5)  # 128 of a quarter's pixels
    with pytest.raises(ModelError, match="Wav2Lip's form"):
        load_syncnet_boxes(sees_everywhere(), "s3fd.pth")
    torch.save(state, tmp_path / "sfd_face.pth")
    with pytest.raises(ModelError, match="evaluate lse --s3fd"):
        ModelStore(tmp_path).add(tmp_path / "sfd_face.pth")
    with pytest.raises(ModelError, match=r"sfd_face.pth is no S3FD face detector: tensor conv1_1.weight is missing"):
        load_syncnet_boxes({"a": torch.zeros(1)}, "sfd_face.pth")
