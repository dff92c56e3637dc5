"""The face boxes of the published scripts of Wav2Lip and SyncNet: those that S3FD sees, as each of the two asks it.

Neither checkpoint is bundled: a user imports Wav2Lip's (``beavervision models add``), and names the file of SyncNet's. Both need
PyTorch. The network looks at every picture whole: on a CPU that takes seconds for each of 720 lines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from beavervision.errors import ModelError
from beavervision.media import F32, U8, Net
from beavervision.models.torch_runtime import TorchNet

if TYPE_CHECKING:
    from torch import Tensor

_CANDIDATE = 0.05  # how surely a face it must be to be looked at all
_SAME_FACE = 0.2  # of what two boxes of one face cover, that they must share
_MARK = "conv3_3_norm_mbox_conf.weight"
_SYNCNETS_MARK = "L2Norm3_3.weight"


@dataclass(frozen=True, slots=True)
class Asking:
    """How a published script asks the detector.

    `means` are taken off red, green and blue (Wav2Lip's script takes those of blue, green and red off them), after the picture was
    scaled by `scale`. Of boxes that share more than each of `overlaps` the surest is kept, as wide as `edge_px` more than
    their sides say; faces are those surer than `sure`.
    """

    means: tuple[float, float, float]
    scale: float
    overlaps: tuple[float, ...]
    edge_px: float
    sure: float


WAV2LIP_ASKS = Asking((104.0, 117.0, 123.0), 1.0, (0.3,), 1.0, 0.5)
SYNCNET_ASKS = Asking((123.0, 117.0, 104.0), 0.25, (0.3, 0.1), 0.0, 0.9)


class FaceBoxes:
    """The faces of a picture. `net` takes (1, 3, height, width) and gives (1, m, 5), as :class:`..nets.s3fd.S3FD`."""

    def __init__(self, net: Net, asking: Asking = WAV2LIP_ASKS) -> None:
        self._net = net
        self._asking = asking

    def __call__(self, rgb: U8) -> F32:
        """Boxes (n, 5) in pixels of the picture (height, width, 3), x0, y0, x1, y1 and how surely a face; the surest first."""
        ask = self._asking
        scaled = rgb if ask.scale == 1 else cv2.resize(rgb, (0, 0), fx=ask.scale, fy=ask.scale)
        x = (scaled.astype(np.float32) - np.array(ask.means, np.float32)).transpose(2, 0, 1)
        found = np.asarray(self._net(np.ascontiguousarray(x[None]))[0], np.float32)[0]
        found = found[found[:, 4] > _CANDIDATE]
        found = found[np.argsort(-found[:, 4], kind="stable")]
        for overlap in ask.overlaps:
            found = _surest(found, overlap, ask.edge_px)
        scale = np.array([rgb.shape[1] / scaled.shape[1], rgb.shape[0] / scaled.shape[0]] * 2 + [1.0], np.float32)
        return np.asarray(found[found[:, 4] > ask.sure] * scale, np.float32)


def _surest(found: F32, overlap: float, edge_px: float) -> F32:
    """Of boxes (n, 5), the surest first, those that share no more than `overlap` with a surer one that is kept."""
    kept = []
    while len(found):
        kept.append(found[0])
        found = found[1:][shared(found[0], found[1:], edge_px) <= overlap]
    return np.array(kept, np.float32).reshape(-1, 5)


def shared(box: F32, others: F32, edge_px: float = 0.0) -> F32:
    """How much of the area that `box` (4,) covers with each of `others` (n, 4) they share, (n,) 0 to 1."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:4], others[:, 2:4])
    both = np.maximum(high - low + edge_px, 0).prod(axis=1)
    sizes = (others[:, 2:4] - others[:, :2] + edge_px).prod(axis=1)
    return np.asarray(both / ((box[2:4] - box[:2] + edge_px).prod() + sizes - both), np.float32)


def nearest(boxes: F32, box: F32, least: float = _SAME_FACE) -> F32 | None:
    """That of `boxes` (n, 5) which shares most with `box` (4,), (4,); None where none shares more than `least`."""
    if not len(boxes):
        return None
    share = shared(box, boxes)
    best = int(share.argmax())
    return np.asarray(boxes[best, :4], np.float32) if share[best] > least else None


def load_boxes(state: Mapping[str, Tensor], *, device: str = "cpu", threads: int = 1, name: str = "s3fd") -> FaceBoxes:
    """Wav2Lip's detector with the tensors `state`, which are its own."""
    from beavervision.models.nets.blocks import loaded
    from beavervision.models.nets.s3fd import S3FD

    return FaceBoxes(TorchNet(loaded(S3FD, state), device=device, threads=threads, half=False, name=name))


def load_syncnet_boxes(state: Mapping[str, Tensor], file: str, *, threads: int = 1) -> FaceBoxes:
    """SyncNet's detector with the tensors of a checkpoint, ``sfd_face.pth``.

    Raises:
        ModelError: they are not its own, or of Wav2Lip's form, which has other layers under the same shapes.
    """
    from beavervision.models.nets.blocks import fitted, loaded
    from beavervision.models.nets.s3fd import SpreadS3FD, renamed

    if is_s3fd(state):
        raise ModelError(f"{file} is Wav2Lip's form of the detector; SyncNet's, sfd_face.pth, is needed.")
    net = loaded(SpreadS3FD, fitted(SpreadS3FD, renamed(state), file, "S3FD face detector"))
    return FaceBoxes(TorchNet(net, threads=threads, half=False, name="s3fd"), SYNCNET_ASKS)


def is_s3fd(state: Mapping[str, Tensor]) -> bool:
    """Whether these are tensors of Wav2Lip's form of it."""
    return _MARK in state


def is_syncnets(state: Mapping[str, Tensor]) -> bool:
    """Whether these are tensors of SyncNet's form of it."""
    return _SYNCNETS_MARK in state
