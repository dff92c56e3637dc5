"""The Wav2Lip generator (Prajwal et al., "A Lip Sync Expert Is All You Need", ACM MM 2020), tensor for tensor.

A mel window and a face whose lower half is hidden go in, the whole face comes out. Tensors bear the published names, so
published checkpoints load unchanged. Inputs mel (n, 1, 80, 16) and face (n, 6, 96, 96): the hidden face, then a
reference face, BGR, 0 to 1. Output (n, 3, 96, 96) BGR, 0 to 1.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from beavervision.models.nets.blocks import Conv, Up

INPUTS = {"mel": (1, 80, 16), "face": (6, 96, 96)}
OUTPUTS = ("face_out",)


def audio_encoder() -> list[Conv]:
    """The layers that turn a mel window (n, 1, 80, 16) into (n, 512, 1, 1)."""
    same = {"residual": True}
    return [
        Conv(1, 32, 3, 1, 1),
        *(Conv(32, 32, 3, 1, 1, **same) for _ in range(2)),
        Conv(32, 64, 3, (3, 1), 1),
        *(Conv(64, 64, 3, 1, 1, **same) for _ in range(2)),
        Conv(64, 128, 3, 3, 1),
        *(Conv(128, 128, 3, 1, 1, **same) for _ in range(2)),
        Conv(128, 256, 3, (3, 2), 1),
        Conv(256, 256, 3, 1, 1, **same),
        Conv(256, 512, 3, 1, 0),
        Conv(512, 512, 1, 1, 0),
    ]


def _down(inputs: int, outputs: int, residuals: int) -> nn.Sequential:
    same = (Conv(outputs, outputs, 3, 1, 1, residual=True) for _ in range(residuals))
    return nn.Sequential(Conv(inputs, outputs, 3, 2, 1), *same)


def _up(inputs: int, outputs: int, residuals: int = 2) -> nn.Sequential:
    same = (Conv(outputs, outputs, 3, 1, 1, residual=True) for _ in range(residuals))
    return nn.Sequential(Up(inputs, outputs, 3, 2, 1, 1), *same)


class Wav2Lip(nn.Module):
    """36.3 million parameters, 7.9 GFLOP a face."""

    def __init__(self) -> None:
        super().__init__()
        self.face_encoder_blocks = nn.ModuleList(
            [
                nn.Sequential(Conv(6, 16, 7, 1, 3)),
                _down(16, 32, 2),
                _down(32, 64, 3),
                _down(64, 128, 2),
                _down(128, 256, 2),
                _down(256, 512, 1),
                nn.Sequential(Conv(512, 512, 3, 1, 0), Conv(512, 512, 1, 1, 0)),
            ]
        )
        self.audio_encoder = nn.Sequential(*audio_encoder())
        self.face_decoder_blocks = nn.ModuleList(
            [
                nn.Sequential(Conv(512, 512, 1, 1, 0)),
                nn.Sequential(Up(1024, 512, 3, 1, 0, 0), Conv(512, 512, 3, 1, 1, residual=True)),
                _up(1024, 512),
                _up(768, 384),
                _up(512, 256),
                _up(320, 128),
                _up(160, 64),
            ]
        )
        self.output_block = nn.Sequential(Conv(80, 32, 3, 1, 1), nn.Conv2d(32, 3, 1, 1, 0), nn.Sigmoid())

    def forward(self, mel: Tensor, face: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for down in self.face_encoder_blocks:
            face = down(face)
            skips.append(face)
        x = cast(Tensor, self.audio_encoder(mel))
        for up in self.face_decoder_blocks:
            x = torch.cat([up(x), skips.pop()], dim=1)
        return cast(Tensor, self.output_block(x))
