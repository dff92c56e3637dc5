"""The sync scorer, in PyTorch: how well sound and lips agree, at any offset.

Two encoders to a common space, as in SyncNet (Chung and Zisserman, 2016); trained to find the true offset among all of a window
(as Chung et al., "Perfect match", ICASSP 2019), on lip motion instead of pixels, so that it judges motion and not looks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from beavervision.models.sync import REACH, STEPS

MEL_BINS = 64
_MEL_MEAN, _MEL_SPREAD = -5.0, 4.0


class SyncScorer(nn.Module):
    """Score of each offset: input rows (b, ROWS, 64) and lips (b, STEPS, k); output (b, 2 * REACH + 1).

    lips are coefficients of the motion basis in the units of :mod:`training.clips`. Offset -REACH comes first; at offset o, lip
    step t is held against the sound of step t + o: a peak at o > 0 means that the lips come early.
    """

    def __init__(self, coefficients: int, channels: int = 96, size: int = 48, dropout: float = 0.1) -> None:
        super().__init__()
        self.hear = nn.Sequential(
            nn.Conv1d(MEL_BINS, channels, 4, stride=2, padding=1),
            *(_Block(channels, d, dropout) for d in (1, 2, 4, 8, 1)),
            nn.Conv1d(channels, size, 1),
        )
        self.see = nn.Sequential(
            nn.Conv1d(2 * coefficients, channels, 3, padding=1),
            *(_Block(channels, d, dropout) for d in (1, 2, 4, 1)),
            nn.Conv1d(channels, size, 1),
        )

    def forward(self, rows: Tensor, lips: Tensor) -> Tensor:
        return self.compare(self.sound(rows), self.motion(lips), torch.ones_like(lips[..., 0]))

    def sound(self, rows: Tensor) -> Tensor:
        """(b, size, STEPS + 2 * REACH)."""
        x: Tensor = self.hear((rows.transpose(1, 2) - _MEL_MEAN) / _MEL_SPREAD)
        return x

    def motion(self, lips: Tensor) -> Tensor:
        """(b, size, STEPS)."""
        speed = torch.cat([torch.zeros_like(lips[:, :1]), lips[:, 1:] - lips[:, :-1]], dim=1) * 5.0
        x: Tensor = self.see(torch.cat([lips, speed], dim=2).transpose(1, 2))
        return x

    @staticmethod
    def compare(sound: Tensor, motion: Tensor, weight: Tensor) -> Tensor:
        """Mean agreement (b, 2 * REACH + 1) over the steps, which count by `weight` (b, STEPS)."""
        weighted = motion * weight[:, None]
        at = [(weighted * sound[..., o : o + STEPS]).sum(dim=(1, 2)) for o in range(2 * REACH + 1)]
        return torch.stack(at, dim=1) / weight.sum(dim=1, keepdim=True).clamp(min=1.0) / motion.shape[1]


class _Block(nn.Module):
    def __init__(self, channels: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.wide = nn.Conv1d(channels, channels, 3, dilation=dilation, padding=dilation)
        self.point = nn.Conv1d(channels, channels, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.point(nn.functional.gelu(self.wide(self.dropout(nn.functional.gelu(self.norm(x))))))
        return x + y
