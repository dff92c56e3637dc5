"""What the published networks are made of, and their way from named tensors to ONNX bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from beavervision.errors import ModelError

OPSET = 17


class Conv(nn.Module):
    """Convolution, batch norm, the input added if `residual`, ReLU."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int | tuple[int, int],
        padding: int,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.BatchNorm2d(outputs))
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        out = cast(Tensor, self.conv_block(x))
        return torch.relu(out + x if self.residual else out)


class Up(nn.Module):
    """Transposed convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, padding: int, extra: int) -> None:
        super().__init__()
        self.conv_block = nn.Sequential(
            nn.ConvTranspose2d(inputs, outputs, kernel, stride, padding, extra), nn.BatchNorm2d(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv_block(x))


def shapes(kind: type[nn.Module]) -> dict[str, tuple[int, ...]]:
    """The name and shape of each tensor of a network, without allocating one."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in kind().state_dict().items()}


def fitted(kind: type[nn.Module], found: Mapping[str, Tensor], file: str, what: str) -> dict[str, Tensor]:
    """The tensors `found` in `file`, in single precision, if they are those of `kind`: all of them, and no other.

    Old checkpoints do not count the batches that a batch norm has seen; the counts are added, as nothing needs them.

    Raises:
        ModelError: `file` is no `what`.
    """
    found = dict(found)
    wanted = shapes(kind)
    for name, shape in wanted.items():
        if name.endswith("num_batches_tracked"):
            found.setdefault(name, torch.zeros((), dtype=torch.int64))
        if name not in found or tuple(found[name].shape) != shape:
            have = f"has shape {tuple(found[name].shape)}" if name in found else "is missing"
            raise ModelError(f"{file} is no {what}: tensor {name} {have}; {shape} is needed.")
    if extra := sorted(set(found) - set(wanted)):
        raise ModelError(f"{file} is no {what}: it has an unknown tensor {extra[0]}.")
    return {name: (t.float() if t.is_floating_point() else t).contiguous().clone() for name, t in found.items()}


def loaded(kind: type[nn.Module], state: Mapping[str, Tensor]) -> nn.Module:
    """The network in evaluation mode, with the tensors of `state` and its batch norms folded into the convolutions."""
    with torch.device("meta"):
        net = kind()
    net.load_state_dict(dict(state), assign=True, strict=True)
    net.requires_grad_(False).eval()
    for block in net.modules():
        if isinstance(block, Conv | Up):
            convolution, norm = block.conv_block[0], block.conv_block[1]
            assert isinstance(convolution, nn.Conv2d | nn.ConvTranspose2d)
            assert isinstance(norm, nn.BatchNorm2d)
            block.conv_block = nn.Sequential(fuse_conv_bn_eval(convolution, norm, isinstance(block, Up)))
    return net


def onnx_bytes(net: nn.Module, inputs: Mapping[str, tuple[int, ...]], outputs: Sequence[str]) -> bytes:
    """`net` as an ONNX file; `inputs` names each input with its shape, a free batch axis comes before each."""
    examples = tuple(torch.zeros(2, *shape) for shape in inputs.values())
    axes = {name: {0: "batch"} for name in (*inputs, *outputs)}
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the TorchScript exporter, which needs no onnxscript, announces its retirement
        torch.onnx.export(
            net,
            examples,
            cast(Any, buffer),  # its annotation knows only paths
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    return buffer.getvalue()
