"""Two networks that tell how well lips and sound belong together: measures, and teachers in training.

``SyncNet`` is the one behind the LSE-C and LSE-D figures (Chung and Zisserman, "Out of Time", ACCV 2016 workshops);
``ColorSyncNet`` is the expert that trained Wav2Lip (Prajwal et al., ACM MM 2020). Tensors bear the published names.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import normalize

from beavervision.models.nets.blocks import Conv
from beavervision.models.nets.wav2lip import audio_encoder


def _norm_relu(outputs: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(outputs), nn.ReLU()]


def _norm_relu_3d(outputs: int) -> list[nn.Module]:
    return [nn.BatchNorm3d(outputs), nn.ReLU()]


def _head() -> nn.Sequential:
    return nn.Sequential(nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 1024))


class SyncNet(nn.Module):
    """Embeddings (n, 1024) of 0.2 s of sound and of the five pictures shown meanwhile.

    Sound is mfcc (n, 1, 13, 20); pictures are (n, 3, 5, 224, 224) BGR, 0 to 255.
    """

    def __init__(self) -> None:
        super().__init__()
        self.netcnnaud = nn.Sequential(
            nn.Conv2d(1, 64, 3, 1, 1),
            *_norm_relu(64),
            nn.MaxPool2d((1, 1), (1, 1)),
            nn.Conv2d(64, 192, 3, 1, 1),
            *_norm_relu(192),
            nn.MaxPool2d((3, 3), (1, 2)),
            nn.Conv2d(192, 384, 3, 1, 1),
            *_norm_relu(384),
            nn.Conv2d(384, 256, 3, 1, 1),
            *_norm_relu(256),
            nn.Conv2d(256, 256, 3, 1, 1),
            *_norm_relu(256),
            nn.MaxPool2d((3, 3), (2, 2)),
            nn.Conv2d(256, 512, (5, 4), 1, 0),
            *_norm_relu(512),
        )
        self.netfcaud = _head()
        self.netfclip = _head()
        self.netcnnlip = nn.Sequential(
            nn.Conv3d(3, 96, (5, 7, 7), (1, 2, 2), 0),
            *_norm_relu_3d(96),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            nn.Conv3d(96, 256, (1, 5, 5), (1, 2, 2), (0, 1, 1)),
            *_norm_relu_3d(256),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            nn.Conv3d(256, 256, (1, 3, 3), 1, (0, 1, 1)),
            *_norm_relu_3d(256),
            nn.Conv3d(256, 256, (1, 3, 3), 1, (0, 1, 1)),
            *_norm_relu_3d(256),
            nn.Conv3d(256, 256, (1, 3, 3), 1, (0, 1, 1)),
            *_norm_relu_3d(256),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            nn.Conv3d(256, 512, (1, 6, 6), 1, 0),
            *_norm_relu_3d(512),
        )

    def audio(self, mfcc: Tensor) -> Tensor:
        return cast(Tensor, self.netfcaud(self.netcnnaud(mfcc).flatten(1)))

    def video(self, pictures: Tensor) -> Tensor:
        return cast(Tensor, self.netfclip(self.netcnnlip(pictures).flatten(1)))

    def forward(self, mfcc: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        return self.audio(mfcc), self.video(pictures)


class ColorSyncNet(nn.Module):
    """Embeddings (n, 512) of length 1 of a mel window (n, 1, 80, 16) and of the lower halves of five faces.

    Faces are (n, 15, 48, 96): five pictures of BGR, 0 to 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.face_encoder = nn.Sequential(
            Conv(15, 32, 7, 1, 3),
            Conv(32, 64, 5, (1, 2), 1),
            *(Conv(64, 64, 3, 1, 1, residual=True) for _ in range(2)),
            Conv(64, 128, 3, 2, 1),
            *(Conv(128, 128, 3, 1, 1, residual=True) for _ in range(3)),
            Conv(128, 256, 3, 2, 1),
            *(Conv(256, 256, 3, 1, 1, residual=True) for _ in range(2)),
            Conv(256, 512, 3, 2, 1),
            *(Conv(512, 512, 3, 1, 1, residual=True) for _ in range(2)),
            Conv(512, 512, 3, 2, 1),
            Conv(512, 512, 3, 1, 0),
            Conv(512, 512, 1, 1, 0),
        )
        layers = audio_encoder()
        layers.insert(11, Conv(256, 256, 3, 1, 1, residual=True))
        self.audio_encoder = nn.Sequential(*layers)

    def forward(self, mel: Tensor, faces: Tensor) -> tuple[Tensor, Tensor]:
        audio, face = self.audio_encoder(mel), self.face_encoder(faces)
        return normalize(audio.flatten(1)), normalize(face.flatten(1))
