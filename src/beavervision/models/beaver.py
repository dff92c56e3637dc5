"""The default lip-sync model's files, loaded: the motion net, the painter and the motion basis."""

from __future__ import annotations

from dataclasses import dataclass

from beavervision.errors import ModelError
from beavervision.media import Net
from beavervision.models.basis import MotionBasis
from beavervision.models.cards import BEAVER, Timing, load_data
from beavervision.models.runtime import OnnxNet
from beavervision.models.torch_runtime import INSTALL_TORCH, TorchNet

# The motion net's context, in log-mel rows: before a step's own row, and all rows beyond two for each step.
LEFT_ROWS, EXTRA_ROWS = 79, 90


@dataclass(frozen=True, slots=True)
class Beaver:
    """See :mod:`beavervision.stages.lipsync_beaver` for what the nets take and give."""

    motion: Net
    painter: Net
    basis: MotionBasis
    timing: Timing


def load(device: str = "cpu", threads: int = 1) -> Beaver:
    """Read the shipped files: ONNX Runtime on ``"cpu"``, PyTorch on ``"cuda:N"``.

    Raises:
        ModelError: one is missing or damaged, or PyTorch is not installed.
    """
    assert BEAVER.timing is not None
    net = onnx_net if device == "cpu" else torch_net
    motion, painter = (net(name, device, threads) for name in ("motion", "painter"))
    return Beaver(motion, painter, MotionBasis.parse(load_data("beaver_basis.npz")), BEAVER.timing)


def onnx_net(name: str, device: str, threads: int) -> Net:
    """``motion`` or ``painter`` on ONNX Runtime; device is ``"cpu"``."""
    return OnnxNet(load_data(f"beaver_{name}.onnx"), threads=threads, name=f"beaver {name}")


def torch_net(name: str, device: str, threads: int) -> Net:
    """The same on PyTorch, in half precision on a GPU."""
    try:
        from safetensors.torch import load as tensors
        from torch.nn import Module

        from beavervision.models.nets.beaver import MotionPair, PainterNet
    except ImportError as error:
        raise ModelError(f"beaver cannot run on {device}. {INSTALL_TORCH}") from error
    state = tensors(load_data(f"beaver_{name}.safetensors"))
    if name == "motion":
        module: Module = MotionPair.of(state)
    else:
        module = PainterNet()
        module.load_state_dict(state)
    return TorchNet(module, device=device, threads=threads, name=f"beaver {name}")
