"""The network that tells where a face's points are between two pictures (:mod:`beavervision.models.between`)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from beavervision.media import POINTS

_MOUTH_CHANNELS = (3, 16, 32, 64)
_FACE_CHANNELS = (3, 16, 24, 48)
_MOUTH_CELLS, _FACE_CELLS = 9 * 8, 7 * 7  # of the last maps
_LEAST_CONTRAST = 8.0


class BetweenNet(nn.Module):
    """mouth (n, 3, 60, 72) and face (n, 3, 56, 56), 0 to 255, of three pictures, and steps (n, 2, 478, 3) to off (n, 478, 3) and
    unsure (n, 2), all in pixels of the mesh's crop.

    Steps come in and what is off goes out along `size` directions in which such points move: `reads` and `writes` (size, 478 * 3),
    which no training changes.
    """

    reads: Tensor
    writes: Tensor
    usual_step: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("reads", torch.zeros(size, POINTS * 3))
        self.register_buffer("writes", torch.zeros(size, POINTS * 3))
        self.register_buffer("usual_step", torch.ones(size))
        self.see_mouth = nn.Sequential(*_halvings(_MOUTH_CHANNELS), nn.Flatten(), nn.Linear(64 * _MOUTH_CELLS, 64))
        self.see_face = nn.Sequential(*_halvings(_FACE_CHANNELS), nn.Flatten(), nn.Linear(48 * _FACE_CELLS, 48))
        self.join = nn.Linear(64 + 48 + 2 * size, 96)
        self.tell = nn.Linear(96, size)
        self.doubt = nn.Linear(96, 2)
        nn.init.zeros_(self.tell.weight)
        nn.init.zeros_(self.tell.bias)

    def forward(self, mouth: Tensor, face: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        along = (steps.flatten(2) @ self.reads.T) / self.usual_step
        seen = torch.cat([self.see_mouth(_evened(mouth)), self.see_face(_evened(face))], dim=1)
        joined = torch.relu(self.join(torch.cat([torch.relu(seen), along.flatten(1)], dim=1)))
        off = (self.tell(joined) @ self.writes).unflatten(1, (POINTS, 3))
        return off, torch.exp(self.doubt(joined))


def _halvings(channels: tuple[int, ...]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(channels):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return layers


def _evened(views: Tensor) -> Tensor:
    """The light taken out: that of all three pictures together, so that what changes between them stays."""
    flat = views.flatten(1)
    mean = flat.mean(dim=1)[:, None, None, None]
    spread = flat.std(dim=1, correction=0)[:, None, None, None]
    return (views - mean) / (spread + _LEAST_CONTRAST)
