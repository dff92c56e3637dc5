"""Models that the user brought: imported once from a checkpoint, kept under the data folder, opened by name.

``<data folder>/models/<name>/`` holds ``weights.safetensors`` (for PyTorch), of a lip-sync model ``model.onnx`` too (for ONNX
Runtime), and ``card.json`` (where it came from, its licence, all hashes). A folder is renamed into place when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import tempfile
import warnings
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beavervision.errors import LicenceError, ModelError
from beavervision.media import Net
from beavervision.models.boxes import FaceBoxes, is_s3fd, is_syncnets, load_boxes
from beavervision.models.cards import CARDS, S3FD, WAV2LIP, Kind, ModelCard
from beavervision.models.restorers import INSTALL_RESTORE, RESTORERS, Restorer, restorer_card
from beavervision.models.runtime import OnnxNet
from beavervision.models.torch_runtime import INSTALL_TORCH, TorchNet

if TYPE_CHECKING:
    from torch import Tensor

_ONNX = "model.onnx"
_WEIGHTS = "weights.safetensors"
_CARD = "card.json"
_INSIDE = ("state_dict", "params_ema", "params")  # where publishers put the tensors
_DAMAGED = "{} is no PyTorch checkpoint, or is damaged. Get it again."
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_KNOWN = {WAV2LIP.name: WAV2LIP, S3FD.name: S3FD, **RESTORERS}
_USE = {"lipsync": "--model", "restore": "--restore", "boxes": "--boxes"}
_TAKEN = {card.name for card in CARDS} - set(_KNOWN)


@dataclass(frozen=True, slots=True)
class StoredModel:
    """An imported model. card.sha256 is the checkpoint's; `hashes` are those of the converted files, by name."""

    card: ModelCard
    folder: Path
    imported: str  # date and time, ISO 8601, UTC
    checkpoint: str  # the file's name when it was imported
    hashes: dict[str, str]


def use_of(card: ModelCard) -> str:
    """The option of the command line that uses an imported model."""
    return f"{_USE[card.kind]} {card.name}"


class ModelStore:
    """The imported models under `data_dir`. Every failure is a :class:`~beavervision.errors.ModelError`."""

    def __init__(self, data_dir: Path) -> None:
        self._root = data_dir / "models"

    def list(self) -> tuple[StoredModel, ...]:
        """All imported models, by name."""
        if not self._root.is_dir():
            return ()
        names = sorted(path.parent.name for path in self._root.glob(f"*/{_CARD}"))
        return tuple(self.get(name) for name in names if _NAME.fullmatch(name))

    def get(self, name: str) -> StoredModel:
        """The imported model `name`."""
        folder = self._folder(name)
        try:
            stored = json.loads((folder / _CARD).read_text("utf-8"))
            known = _KNOWN[stored["model"]]
            summary = f"{known.summary.partition('. ')[0]}, from {stored['checkpoint']}."
            card = replace(known, name=name, sha256=stored["sha256"], summary=summary)
            return StoredModel(card, folder, stored["imported"], stored["checkpoint"], dict(stored["hashes"]))
        except FileNotFoundError as error:
            raise ModelError(
                f"There is no model {name!r}. `beavervision models` lists those there are; "
                "`beavervision models add CHECKPOINT` imports one."
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"The card of model {name!r} is damaged ({folder / _CARD}). Remove it with "
                f"`beavervision models remove {name}` and import it again."
            ) from error

    def open(self, name: str, *, allow_non_commercial: bool = False, device: str = "cpu", threads: int = 1) -> Net:
        """The network, ready to run: ONNX Runtime on ``"cpu"``, PyTorch on ``"cuda:N"``.

        Raises:
            LicenceError: its licence forbids commercial use and `allow_non_commercial` is not set.
            ModelError: it is missing, or its file differs from the recorded hash.
        """
        stored = self._allowed(name, "lipsync", allow_non_commercial)
        if device == "cpu":
            return wav2lip_session(self._checked(stored, _ONNX), threads=threads, name=name)
        try:
            import torch  # noqa: F401  (the first import, for its message)
            from safetensors.torch import load

            from beavervision.models.nets.blocks import loaded
            from beavervision.models.nets.wav2lip import Wav2Lip
        except ImportError as error:
            raise ModelError(f"{name} cannot run on {device}. {INSTALL_TORCH}") from error
        module = loaded(Wav2Lip, load(self._checked(stored, _WEIGHTS)))
        return TorchNet(module, device=device, threads=threads, name=name)

    def open_restorer(
        self, name: str, *, allow_non_commercial: bool = False, device: str = "cpu", threads: int = 1
    ) -> Restorer:
        """The face restorer, ready to run on PyTorch; raises as :meth:`open`."""
        stored = self._allowed(name, "restore", allow_non_commercial)
        try:
            from safetensors.torch import load
        except ImportError as error:
            raise ModelError(f"{name} cannot run. {INSTALL_RESTORE}") from error
        card = restorer_card(state := load(self._checked(stored, _WEIGHTS)))
        assert card is not None  # it was when it was imported, and the file is the same
        return Restorer(card, state, device=device, threads=threads)

    def open_boxes(
        self, name: str, *, allow_non_commercial: bool = False, device: str = "cpu", threads: int = 1
    ) -> FaceBoxes:
        """Wav2Lip's face detector, ready to run on PyTorch; raises as :meth:`open`."""
        stored = self._allowed(name, "boxes", allow_non_commercial)
        try:
            from safetensors.torch import load
        except ImportError as error:
            raise ModelError(f"{name} cannot run. {INSTALL_TORCH}") from error
        return load_boxes(load(self._checked(stored, _WEIGHTS)), device=device, threads=threads, name=name)

    def add(self, path: Path, name: str | None = None) -> StoredModel:
        """Import a checkpoint as it was published, or plain tensors by name: of Wav2Lip, its face detector or a face restorer.

        A pickle is read without running any code of it; safetensors are taken as well. `name` defaults to the file's.

        Raises:
            ModelError: no such file, no safe or no fitting checkpoint, the name is taken, or PyTorch is not installed (for a
                restorer: or spandrel).
        """
        name = name or re.sub(r"[^a-z0-9.]+", "-", path.stem.lower()).strip("-.")
        folder = self._folder(name)
        if name in _TAKEN or folder.exists():
            raise ModelError(
                f"There is a model {name!r} already. Give another --name, or `beavervision models remove {name}` first."
            )
        source_hash = _sha256(path)
        state = read_checkpoint(path)
        if is_syncnets(state):
            raise ModelError(
                f"{path.name} is the form of S3FD that SyncNet's scripts use: give it to `beavervision evaluate lse --s3fd`. "
                "Wav2Lip's is imported."
            )
        card = S3FD if is_s3fd(state) else restorer_card(state) or WAV2LIP
        if card.kind == "restore":
            files = _restorer_files(state, card)
        else:
            files = _s3fd_files(state, path.name) if card is S3FD else _wav2lip_files(state, path.name)
        self._keep(files, folder, card, {"checkpoint": path.name, "sha256": source_hash})
        return self.get(name)

    def remove(self, name: str) -> None:
        """Delete the imported model `name`."""
        folder = self._folder(name)
        if not folder.is_dir():
            raise ModelError(f"There is no imported model {name!r}. `beavervision models` lists those there are.")
        try:
            shutil.rmtree(folder)
        except OSError as error:
            raise ModelError(f"{folder} cannot be removed: {error.strerror}.") from error

    def _allowed(self, name: str, kind: Kind, allow_non_commercial: bool) -> StoredModel:
        stored = self.get(name)
        if stored.card.kind != kind:
            raise ModelError(f"{name!r} does something else: use it with {use_of(stored.card)}.")
        if stored.card.non_commercial and not allow_non_commercial:
            raise LicenceError(
                f"The weights of {name!r} are not for commercial use: {stored.card.licence_weights} "
                f"({stored.card.source}). If your use is not commercial, say so with --allow-non-commercial."
            )
        return stored

    def _folder(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ModelError(f"{name!r} is no model name: use small letters, digits, dots and hyphens.")
        return self._root / name

    def _checked(self, stored: StoredModel, file: str) -> bytes:
        try:
            data = (stored.folder / file).read_bytes()
        except OSError as error:
            raise ModelError(f"{stored.folder / file} cannot be read: {error.strerror}.") from error
        if hashlib.sha256(data).hexdigest() != stored.hashes.get(file):
            name = stored.card.name
            raise ModelError(
                f"{stored.folder / file} is damaged: its hash is wrong. Remove it with "
                f"`beavervision models remove {name}` and import it again."
            )
        return data

    def _keep(self, files: dict[str, bytes], folder: Path, card: ModelCard, facts: dict[str, str]) -> None:
        written: dict[str, Any] = {
            "model": card.name,
            **facts,
            "imported": datetime.now(UTC).isoformat(timespec="seconds"),
            "licence_weights": card.licence_weights,
            "hashes": {file: hashlib.sha256(data).hexdigest() for file, data in files.items()},
        }
        files = {**files, _CARD: json.dumps(written, indent=1).encode()}
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".importing-", dir=self._root) as scratch:
                whole = Path(scratch) / "model"
                whole.mkdir()
                for file, data in files.items():
                    (whole / file).write_bytes(data)
                whole.rename(folder)
        except OSError as error:
            raise ModelError(f"The model cannot be stored in {self._root}: {error.strerror}.") from error


def wav2lip_session(model: bytes | Path, threads: int = 1, name: str = WAV2LIP.name) -> OnnxNet:
    """The Wav2Lip generator from its ONNX form; takes mel (n, 1, 80, 16) and face (n, 6, 96, 96), float32."""
    net = OnnxNet(model, threads=threads, name=name)
    if net.inputs != ("mel", "face"):
        raise ModelError(f"{name} is no Wav2Lip generator: its inputs are {', '.join(net.inputs)}.")
    return net


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}. Give the path of a checkpoint.") from error


def _load_checkpoint(path: Path) -> Any:
    """What a PyTorch checkpoint holds, read without running code of it.

    Raises:
        ModelError: it holds more than tensors, or is damaged.
        ImportError: PyTorch is not installed.
    """
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's age: nothing a user could mend
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path.name} is refused: it holds more than tensors, or is no PyTorch checkpoint. "
            "Get it from its publisher again; do not load it with other tools."
        ) from error
    except Exception as error:  # the unpickler meets whatever bytes there are, and fails in many ways
        raise ModelError(_DAMAGED.format(path.name)) from error


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their published names.

    Raises:
        ModelError: it holds anything else, is damaged or missing, or PyTorch is not installed.
    """
    if not path.exists():
        raise ModelError(f"{path} does not exist. Give the path of a checkpoint.")
    try:
        import safetensors.torch
        import torch
    except ImportError as error:
        raise ModelError(f"{path.name} cannot be imported. {INSTALL_TORCH}") from error
    if path.suffix.lower() == ".safetensors":
        try:
            content: Any = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(_DAMAGED.format(path.name)) from error
    else:
        content = _load_checkpoint(path)
    inside = (content[key] for key in _INSIDE if isinstance(content, dict) and isinstance(content.get(key), dict))
    content = next(inside, content)
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ModelError(f"{path.name} holds no tensors by name; give the checkpoint of a network.")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def _restorer_files(state: dict[str, Tensor], card: ModelCard) -> dict[str, bytes]:
    from safetensors.torch import save

    Restorer(card, state)  # fails where it could not be run
    return {_WEIGHTS: save({name: tensor.contiguous().clone() for name, tensor in state.items()})}


def _s3fd_files(state: dict[str, Tensor], file: str) -> dict[str, bytes]:
    from safetensors.torch import save

    from beavervision.models.nets import s3fd
    from beavervision.models.nets.blocks import fitted

    return {_WEIGHTS: save(fitted(s3fd.S3FD, state, file, "S3FD face detector"))}


def _wav2lip_files(found: dict[str, Tensor], file: str) -> dict[str, bytes]:
    """Its two forms: float32, all tensors of the generator and no other."""
    try:
        import onnx  # noqa: F401  (before any work: PyTorch's exporter needs it)
        from safetensors.torch import save
    except ImportError as error:
        raise ModelError(f"{file} cannot be imported. {INSTALL_TORCH}") from error
    from beavervision.models.nets import wav2lip
    from beavervision.models.nets.blocks import fitted, loaded, onnx_bytes

    state = fitted(wav2lip.Wav2Lip, found, file, "Wav2Lip generator")
    model = onnx_bytes(loaded(wav2lip.Wav2Lip, state), wav2lip.INPUTS, wav2lip.OUTPUTS)
    return {_WEIGHTS: save(state), _ONNX: model}
