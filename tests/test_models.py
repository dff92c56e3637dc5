"""Model cards, bundled files, the two runtimes, the networks and the import of checkpoints."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beavervision.errors import DeviceError, LicenceError, ModelError
from beavervision.models import cards
from beavervision.models.cards import CARDS, data_hashes, load_data
from beavervision.models.runtime import OnnxNet
from beavervision.models.store import ModelStore, wav2lip_session

REFERENCE = Path(__file__).parents[2] / "shared" / "reference"
shared = pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs ../shared/reference: published tensors and outputs")


def synthetic(model: str) -> dict[str, Any]:
    """The reference weights of a published network, as torch tensors."""
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    spec = spec_from_file_location("synthetic_weights", REFERENCE / "synthetic_weights.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    state: dict[str, Any] = {k: torch.from_numpy(v) for k, v in module.synthetic_state(model).items()}
    return state


# --- cards ------------------------------------------------------------------------------------------------------------


def test_cards_name_their_licences_and_restrict_wav2lip() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)
    assert {card.name for card in CARDS if card.non_commercial} == {"wav2lip", "s3fd", "restoreformer", "codeformer"}
    assert all(card.licence_code and card.licence_weights and card.source for card in CARDS)
    assert not cards.WAV2LIP.files


def test_pinned_hashes_are_those_of_the_bundled_files() -> None:
    assert data_hashes()["face_landmarker.task"] == cards.FACE_LANDMARKER.sha256
    assert data_hashes()["silero_vad.onnx"] == cards.SILERO_VAD.sha256
    assert len(load_data("face_landmarker.task")) == 3_758_596


def test_damaged_and_missing_bundled_files_say_reinstall(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "data_hashes", lambda: {"blendshape_names.json": "0" * 64})
    with pytest.raises(ModelError, match=r"damaged.*Reinstall"):
        load_data("blendshape_names.json")
    with pytest.raises(ModelError, match=r"missing.*Reinstall"):
        load_data("nothing.onnx")


def test_models_import_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import beavervision.models.cards, beavervision.models.store, beavervision.models.torch_runtime\n"
        "from pathlib import Path\n"
        "from beavervision.errors import ModelError\n"
        "try: beavervision.models.store.ModelStore(Path('nowhere')).add(Path(sys.argv[1]), 'x')\n"
        "except ModelError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, __file__], capture_output=True, text=True, env={**os.environ})
    assert "pip install 'beavervision[gpu]'" in done.stdout, done.stderr


# --- runtimes ---------------------------------------------------------------------------------------------------------


def test_onnx_runs_and_translates_errors() -> None:
    net = OnnxNet(load_data("silero_vad.onnx"), name="vad")
    inputs = np.zeros((1, 576), np.float32), np.zeros((2, 1, 128), np.float32), np.array(16000, np.int64)
    probability, state = net(*inputs)
    assert probability.shape == (1, 1) and state.shape == (2, 1, 128)
    with pytest.raises(ModelError, match="vad takes 3 inputs"):
        net(inputs[0])
    with pytest.raises(ModelError, match="vad failed"):
        net(inputs[0].astype(np.float64), *inputs[1:])
    with pytest.raises(ModelError, match="bad is not a usable ONNX model"):
        OnnxNet(b"no model", name="bad")


@pytest.mark.torch
def test_torch_runs_and_translates_errors() -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    from beavervision.models.torch_runtime import TorchNet

    net = TorchNet(torch.nn.Linear(3, 2), name="linear")
    (out,) = net(np.ones((5, 3), np.float32))
    assert out.shape == (5, 2) and out.dtype == np.float32
    with pytest.raises(ModelError, match="linear failed"):
        net(np.ones((5, 4), np.float32))
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="cuda:0"):
            TorchNet(torch.nn.Linear(3, 2), device="cuda:0")


@pytest.mark.torch
def test_cuda_graphs_give_the_same_results_at_every_batch() -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from beavervision.models.torch_runtime import TorchNet

    module = torch.nn.Linear(8, 4)
    weight, bias = module.weight.detach().numpy().copy(), module.bias.detach().numpy().copy()
    net = TorchNet(module, device="cuda:0", batch_sizes=(1, 4))
    for count in (1, 3, 4, 9):
        x = np.random.default_rng(count).standard_normal((count, 8)).astype(np.float32)
        np.testing.assert_allclose(np.asarray(net(x)[0], np.float32), x @ weight.T + bias, atol=2e-2)


# --- networks ---------------------------------------------------------------------------------------------------------


@shared
@pytest.mark.shared
@pytest.mark.torch
@pytest.mark.parametrize(
    ("model", "kind", "tolerance"),
    [("wav2lip", "Wav2Lip", 1e-4), ("syncnet_color", "ColorSyncNet", 1e-3), ("syncnet_lse", "SyncNet", 1e-3)],
)
def test_network_is_the_published_one(model: str, kind: str, tolerance: float) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    from beavervision.models.nets import blocks, syncnet, wav2lip

    network = getattr(wav2lip if model == "wav2lip" else syncnet, kind)
    published = json.loads((REFERENCE / f"{model}_tensors.json").read_text())
    assert blocks.shapes(network) == {name: tuple(shape) for name, shape in published.items()}
    arrays = dict(np.load(REFERENCE / f"{model}_io.npz"))
    inputs, expected = list(arrays.values())[:2], list(arrays.values())[2:]
    net = blocks.loaded(network, synthetic(model))
    with torch.inference_mode():
        outputs = net(*(torch.from_numpy(x.astype(np.float32)) for x in inputs))
    for output, want in zip(outputs if isinstance(outputs, tuple) else (outputs,), expected, strict=True):
        assert np.abs(output.numpy() - want).max() < tolerance


# --- store ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelStore, dict[str, Any]]:
    """A store with the synthetic checkpoint in it, saved as the published ones are; and its tensors."""
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    if not REFERENCE.is_dir():
        pytest.skip("needs ../shared/reference: published tensors and outputs")
    folder = tmp_path_factory.mktemp("store")
    state = synthetic("wav2lip")
    published = {"state_dict": {f"module.{k}": v for k, v in state.items()}, "optimizer": None, "global_step": 7}
    torch.save(published, folder / "wav2lip_gan.pth", _use_new_zipfile_serialization=False)
    store = ModelStore(folder / "data")
    store.add(folder / "wav2lip_gan.pth")
    return store, state


@pytest.mark.shared
@pytest.mark.torch
def test_imported_checkpoint_gives_the_published_output(imported: tuple[ModelStore, dict[str, Any]]) -> None:
    store, _ = imported
    stored = store.get("wav2lip-gan")
    assert [s.card.name for s in store.list()] == ["wav2lip-gan"]
    assert stored.checkpoint == "wav2lip_gan.pth" and len(stored.card.sha256 or "") == 64 and stored.imported
    assert sorted(p.name for p in stored.folder.iterdir()) == ["card.json", "model.onnx", "weights.safetensors"]
    assert [p.name for p in stored.folder.parent.iterdir()] == ["wav2lip-gan"]  # nothing half made is left
    io = np.load(REFERENCE / "wav2lip_io.npz")
    net = store.open("wav2lip-gan", allow_non_commercial=True)
    assert np.abs(net(io["mel"], io["face"])[0] - io["out"]).max() < 1e-4
    one = net(io["mel"][1:], io["face"][1:])[0]
    assert np.abs(one - io["out"][1:]).max() < 1e-4


@pytest.mark.shared
@pytest.mark.torch
def test_restricted_weights_need_the_flag(imported: tuple[ModelStore, dict[str, Any]]) -> None:
    with pytest.raises(LicenceError, match="--allow-non-commercial"):
        imported[0].open("wav2lip-gan")


@pytest.mark.shared
@pytest.mark.torch
def test_a_taken_name_is_refused_and_a_damaged_file_found(
    imported: tuple[ModelStore, dict[str, Any]], tmp_path: Path
) -> None:
    import shutil

    folder = imported[0].get("wav2lip-gan").folder
    checkpoint = folder.parents[2] / "wav2lip_gan.pth"
    with pytest.raises(ModelError, match="already"):
        imported[0].add(checkpoint)
    with pytest.raises(ModelError, match="already"):
        imported[0].add(checkpoint, "beaver")
    shutil.copytree(folder, tmp_path / "models" / "copy")
    with (tmp_path / "models" / "copy" / "model.onnx").open("r+b") as file:
        file.seek(1000)
        file.write(b"\0\0\0\0")
    store = ModelStore(tmp_path)
    with pytest.raises(ModelError, match="damaged"):
        store.open("copy", allow_non_commercial=True)
    store.remove("copy")
    assert store.list() == ()
    with pytest.raises(ModelError, match="no model 'copy'"):
        store.get("copy")


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.target}",)


@pytest.mark.torch
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Evil(tmp_path / "pwned")))
    with pytest.raises(ModelError, match="refused"):
        ModelStore(tmp_path / "data").add(tmp_path / "plain.pth")
    for modern in (True, False):
        torch.save(
            {"state_dict": Evil(tmp_path / "pwned")}, tmp_path / "evil.pth", _use_new_zipfile_serialization=modern
        )
        with pytest.raises(ModelError, match="refused"):
            ModelStore(tmp_path / "data").add(tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "data").exists()


@pytest.mark.torch
def test_other_files_are_refused_with_the_first_difference(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs PyTorch (extra gpu)")
    from beavervision.models.nets.wav2lip import Wav2Lip

    store = ModelStore(tmp_path / "data")
    first = "face_encoder_blocks.0.0.conv_block.0.weight"
    with torch.device("meta"):
        state = {k: torch.empty(v.shape, dtype=v.dtype, device="cpu") for k, v in Wav2Lip().state_dict().items()}
    checkpoint = tmp_path / "other.pth"
    for change, message in (
        ({k: v for k, v in state.items() if k != first}, f"{first} is missing"),
        ({**state, first: torch.zeros(1, 2)}, rf"{first} has shape \(1, 2\)"),
        ({**state, "zzz": torch.zeros(1)}, "unknown tensor zzz"),
        ({"a": 1}, "no tensors by name"),
    ):
        torch.save(change, checkpoint)
        with pytest.raises(ModelError, match=message):
            store.add(checkpoint)
    for junk in (b"not a checkpoint", b"a\n", b"\x80\x02.", b"PK\x03\x04" + bytes(60), b"\x80\x04\x8c\xff"):
        checkpoint.write_bytes(junk)
        with pytest.raises(ModelError, match="no PyTorch checkpoint"):
            store.add(checkpoint)
    with pytest.raises(ModelError, match="cannot be read"):
        store.add(tmp_path / "nowhere.pth")
    with pytest.raises(ModelError, match="no model name"):
        store.add(checkpoint, "../escape")


def test_session_refuses_another_network() -> None:
    with pytest.raises(ModelError, match="no Wav2Lip generator"):
        wav2lip_session(load_data("silero_vad.onnx"))
