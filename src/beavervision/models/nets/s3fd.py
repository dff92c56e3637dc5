"""S3FD, the face detector of the published Wav2Lip and SyncNet scripts, tensor for tensor.

Zhang et al., "S3FD: Single Shot Scale-invariant Face Detector", ICCV 2017: VGG-16 and six heads, each of which looks for faces
of one size at every place of its map. Two forms were published. They hold the same tensors, and differ in the widest layer of the
trunk: one (Wav2Lip's) pads it by three cells, so that its map is four cells larger than the picture's; the other (SyncNet's)
spreads its kernel over thirteen cells.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

_TRUNK = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # the channels and layers of each stage, halved after each
_TAPS = {3: "conv3_3", 4: "conv4_3", 5: "conv5_3"}  # by stage: whose last map a head looks at, normalised
_EXTRAS = (("conv6_1", 1024, 256, 1), ("conv6_2", 256, 512, 2), ("conv7_1", 512, 128, 1), ("conv7_2", 128, 256, 2))
_HEADS = (
    ("conv3_3_norm", 256, 4),  # three guesses of what is no face, of which the strongest counts
    ("conv4_3_norm", 512, 2),
    ("conv5_3_norm", 512, 2),
    ("fc7", 1024, 2),
    ("conv6_2", 512, 2),
    ("conv7_2", 256, 2),
)
_FIRST_STRIDE_PX = 4  # of the first head's map; twice as many for each further head
_SIDE_STRIDES = 4  # the side of a head's faces
_SHIFT, _GROW = 0.1, 0.2  # the scales of what is told of a box: its middle, in sides, and the logarithm of its size
_LEAST_NORM = 1e-10


class _Norm(nn.Module):
    """Each place's channels to unit length, then each channel by its own factor."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        length = x.pow(2).sum(dim=1, keepdim=True).sqrt() + _LEAST_NORM
        return x / length * self.weight.view(1, -1, 1, 1)


class S3FD(nn.Module):
    """RGB less its means, (n, 3, height, width), to all candidates, (n, m, 5): x0, y0, x1, y1 in pixels, and 0 to 1 how surely
    a face. Wav2Lip's form.
    """

    wide = (3, 1)  # the padding of the layer fc6, and how far apart its kernel's cells are
    third_up = False  # whether the third halving rounds up

    def __init__(self) -> None:
        super().__init__()
        inputs = 3
        for stage, (channels, layers) in enumerate(_TRUNK, 1):
            for layer in range(1, layers + 1):
                self.add_module(f"conv{stage}_{layer}", nn.Conv2d(inputs, channels, 3, padding=1))
                inputs = channels
        padding, dilation = self.wide
        self.fc6 = nn.Conv2d(512, 1024, 3, padding=padding, dilation=dilation)
        self.fc7 = nn.Conv2d(1024, 1024, 1)
        for name, inputs, channels, stride in _EXTRAS:
            kernel = 1 if stride == 1 else 3
            self.add_module(name, nn.Conv2d(inputs, channels, kernel, stride, kernel // 2))
        for name, channels, classes in _HEADS:
            if name.endswith("_norm"):
                self.add_module(name, _Norm(channels))
            self.add_module(f"{name}_mbox_conf", nn.Conv2d(channels, classes, 3, padding=1))
            self.add_module(f"{name}_mbox_loc", nn.Conv2d(channels, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        maps = []
        for stage, (_, layers) in enumerate(_TRUNK, 1):
            for layer in range(1, layers + 1):
                x = self._layer(f"conv{stage}_{layer}", x)
            if stage in _TAPS:
                maps.append(self.get_submodule(f"{_TAPS[stage]}_norm")(x))
            x = functional.max_pool2d(x, 2, 2, ceil_mode=stage == 3 and self.third_up)
        x = self._layer("fc7", self._layer("fc6", x))
        maps.append(x)
        for name, _, _, stride in _EXTRAS:
            x = self._layer(name, x)
            if stride == 2:
                maps.append(x)
        found = [
            self._candidates(name, _FIRST_STRIDE_PX << k, x)
            for k, ((name, _, _), x) in enumerate(zip(_HEADS, maps, strict=True))
        ]
        return torch.cat(found, dim=1)

    def _layer(self, name: str, x: Tensor) -> Tensor:
        return torch.relu_(self.get_submodule(name)(x))

    def _candidates(self, head: str, stride_px: int, x: Tensor) -> Tensor:
        told, place = (self.get_submodule(f"{head}_mbox_{kind}")(x) for kind in ("conf", "loc"))
        other = told[:, :-1].amax(dim=1)
        sure = torch.sigmoid(told[:, -1] - other)  # the softmax of the two
        height, width = x.shape[2:]
        across = (torch.arange(width, device=x.device) + 0.5) * stride_px
        down = (torch.arange(height, device=x.device) + 0.5) * stride_px
        side_px = float(_SIDE_STRIDES * stride_px)
        middle_x = across[None, None, :] + place[:, 0] * _SHIFT * side_px
        middle_y = down[None, :, None] + place[:, 1] * _SHIFT * side_px
        half = side_px * torch.exp(place[:, 2:] * _GROW) / 2
        box = (middle_x - half[:, 0], middle_y - half[:, 1], middle_x + half[:, 0], middle_y + half[:, 1], sure)
        return torch.stack(box, dim=-1).flatten(1, 2)


class SpreadS3FD(S3FD):
    """SyncNet's form."""

    wide = (6, 6)
    third_up = True


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of SyncNet's ``sfd_face.pth`` by the names that :class:`S3FD` has for them; other names stay."""
    names: dict[str, str] = {}
    at = 0  # in the published list of layers, where each is followed by its rectifier, and each stage by its pooling
    for stage, (_, layers) in enumerate(_TRUNK, 1):
        for layer in range(1, layers + 1):
            names[f"vgg.{at}"] = f"conv{stage}_{layer}"
            at += 2
        at += 1
    names |= {f"vgg.{at}": "fc6", f"vgg.{at + 2}": "fc7"}
    names |= {f"extras.{i}": name for i, (name, *_) in enumerate(_EXTRAS)}
    names |= {f"L2Norm{tap[4:]}": f"{tap}_norm" for tap in _TAPS.values()}
    for i, (head, *_) in enumerate(_HEADS):
        names |= {f"loc.{i}": f"{head}_mbox_loc", f"conf.{i}": f"{head}_mbox_conf"}
    split = {name: name.rpartition(".") for name in state}
    return {f"{names.get(base, base)}.{kind}": state[name] for name, (base, _, kind) in split.items()}
