"""Published face restorers: told by their tensors, built by spandrel (MIT), run on PyTorch.

None is bundled: a user imports a checkpoint (``beavervision models add``). All take and give faces aligned to the template of
FFHQ at 512 pixels, which :func:`alignment` finds from the mesh.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from beavervision.errors import DeviceError, ModelError
from beavervision.media import F32, U8
from beavervision.models import mesh
from beavervision.models.cards import CODEFORMER, GFPGAN, RESTOREFORMER, ModelCard
from beavervision.models.mesh import Pose

if TYPE_CHECKING:
    from torch import Tensor

INSTALL_RESTORE = "It needs spandrel: pip install 'beavervision[restore]'"
FACE_PX = 512
# Eyes, tip of the nose and corners of the mouth of the mean face of FFHQ, in the square of FACE_PX.
_TEMPLATE = FACE_PX * np.array(
    [[0.37692, 0.46865], [0.62286, 0.46913], [0.50124, 0.61332], [0.39309, 0.72541], [0.61150, 0.72490]]
)


@dataclass(frozen=True, slots=True)
class _Kind:
    """One architecture: the tensors that tell it, the class of spandrel's that builds it, and how it is called."""

    card: ModelCard
    marks: tuple[str, ...]
    module: str
    builder: str
    call: Mapping[str, Any]


_KINDS = (
    _Kind(
        GFPGAN,
        ("toRGB.0.weight", "stylegan_decoder.style_mlp.1.weight"),
        "spandrel.architectures.GFPGAN",
        "GFPGANArch",
        {"return_rgb": False, "randomize_noise": False},  # new noise for each picture would flicker
    ),
    _Kind(
        RESTOREFORMER,
        ("quantize.embedding.weight", "quant_conv.weight", "encoder.down.0.block.0.norm1.weight"),
        "spandrel.architectures.RestoreFormer",
        "RestoreFormerArch",
        {},
    ),
    _Kind(
        CODEFORMER,
        ("position_emb", "quantize.embedding.weight", "ft_layers.0.self_attn.in_proj_weight"),
        "spandrel_extra_arches.architectures.CodeFormer",
        "CodeFormerArch",
        {"weight": 0.7},  # towards fidelity: the person must stay the person
    ),
)
RESTORERS = {kind.card.name: kind.card for kind in _KINDS}


def restorer_card(state: Mapping[str, Any]) -> ModelCard | None:
    """The card of the restorer that has the tensors `state`, None if they are of something else."""
    kind = next((kind for kind in _KINDS if all(mark in state for mark in kind.marks)), None)
    return None if kind is None else kind.card


class Restorer:
    """A face restorer with its weights. Safe to call from several threads.

    Args:
        card: which one, of :data:`RESTORERS`.
        state: its tensors by name.
        device: ``"cpu"`` or ``"cuda:N"``; computes in single precision on both, since half overflows these networks.
        threads: CPU threads, of the whole process (a limit of PyTorch); used on the CPU only.

    Raises:
        ModelError: spandrel is not installed, or the tensors do not fit the architecture.
        DeviceError: the device is not there, or its memory does not suffice.
    """

    def __init__(self, card: ModelCard, state: Mapping[str, Tensor], *, device: str = "cpu", threads: int = 1) -> None:
        kind = next(kind for kind in _KINDS if kind.card.name == card.name)
        self.card = card
        self._call = kind.call
        self._lock = threading.Lock()
        try:
            import torch

            with _spandrel_importable():
                builder = getattr(import_module(kind.module), kind.builder)()
        except ImportError as error:
            package = kind.module.partition(".")[0]
            how = INSTALL_RESTORE if package == "spandrel" else f"It needs {package}: pip install {package}"
            raise ModelError(f"{card.name} cannot run. {how}") from error
        self._torch = torch
        try:
            module = builder.load(dict(state)).model
        except (RuntimeError, KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"The tensors are those of {card.name}, but of a version that spandrel does not know ({reason}). "
                "Use the checkpoint that the publisher names for it."
            ) from error
        try:
            self._device = torch.device(device)
            if self._device.type == "cpu":
                torch.set_num_threads(threads)
            self._module = module.float().eval().requires_grad_(False).to(self._device)
        except (RuntimeError, AssertionError) as error:
            raise DeviceError(f"{card.name} cannot be put on {device}: {error}. Choose another device.") from error

    def __call__(self, faces: U8) -> U8:
        """Restore aligned faces, (n, 512, 512, 3) RGB, one after another: a batch gains nothing at this size."""
        return np.stack([self._restored(face) for face in faces])

    def _restored(self, face: U8) -> U8:
        torch = self._torch
        try:
            with self._lock, torch.inference_mode():
                x = torch.from_numpy(np.ascontiguousarray(face)).to(self._device).permute(2, 0, 1)[None].float()
                out = self._module(x / 127.5 - 1, **self._call)[0]
                rgb = ((out[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise DeviceError(f"{self.card.name} ran out of memory on {self._device}. Use another device.") from error
        except (RuntimeError, TypeError) as error:
            raise ModelError(f"{self.card.name} failed: {error}") from error
        return np.asarray(rgb, np.uint8)


def alignment(pose: Pose) -> F32:
    """(2, 3): from picture pixels to the aligned face. It hangs on the skull alone, so that speech does not shake it.

    The least-squares similarity (Umeyama, 1991) of the canonical face's eyes, nose and resting mouth to FFHQ's.
    """
    canonical = mesh.canonical()
    eyes = [canonical[mesh.EYE_CORNERS[:2]].mean(axis=0), canonical[mesh.EYE_CORNERS[2:]].mean(axis=0)]
    points = np.stack([*eyes, canonical[4], canonical[mesh.OUTER_CORNERS[0]], canonical[mesh.OUTER_CORNERS[1]]])
    source = pose.to_picture(points)[:, :2].astype(np.float64)
    mean_s, mean_t = source.mean(axis=0), _TEMPLATE.mean(axis=0)
    s, t = source - mean_s, _TEMPLATE - mean_t
    u, d, vt = np.linalg.svd(t.T @ s)
    sign = np.array([1.0, np.sign(np.linalg.det(u @ vt))])
    linear = (u * sign) @ vt * ((d * sign).sum() / (s**2).sum())
    return np.hstack([linear, (mean_t - linear @ mean_s)[:, None]]).astype(np.float32)


@contextmanager
def _spandrel_importable() -> Iterator[None]:
    """Let spandrel be imported where torchvision is missing or does not fit the installed PyTorch.

    It takes three names of it, for an inpainting network and for a normalisation that is done here instead; they stand in while
    it is imported, and nobody else ever sees them.
    """
    if "spandrel" in sys.modules:
        yield
        return
    before = set(sys.modules)
    try:
        import_module("torchvision.transforms.functional")
    except (ImportError, RuntimeError, OSError):
        _forget_torchvision(before)
    else:
        yield
        return
    functional = ModuleType("torchvision.transforms.functional")
    functional.normalize = functional.rotate = functional.InterpolationMode = None  # type: ignore[attr-defined]
    for name in ("torchvision", "torchvision.transforms"):
        sys.modules[name] = ModuleType(name)
    sys.modules[functional.__name__] = functional
    try:
        yield
    finally:
        _forget_torchvision(before)


def _forget_torchvision(before: set[str]) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision" and n not in before]:
        del sys.modules[name]
