"""The default lip-sync model's files, loaded: the motion net, the painter and the motion basis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from beavervision.errors import ModelError
from beavervision.media import F32, U8, Net
from beavervision.models.basis import MotionBasis
from beavervision.models.cards import BEAVER, Timing, load_data
from beavervision.models.runtime import OnnxNet
from beavervision.models.torch_runtime import INSTALL_TORCH, TorchNet

# The motion net takes two log-mel rows, 10 ms apart, for each step of 20 ms, and EXTRA_ROWS before them. The last row that a step
# hears is centred LAST_ROW_MS after it. Of the rows before it hears CONTEXT_STEPS anew each time; what lies farther back is in its
# state.
EXTRA_ROWS, LAST_ROW_MS, CONTEXT_STEPS, PHONE_FEATURES = 46, 145, 16, 128
SILENT_ROW = float(np.log(1e-5))  # a log-mel row of digital silence


PAINT_SIZE = (96, 80)  # width, height of the painter's crop, 100 px to the distance of the eyes
# A mouth is seldom open so far that the painter needs all rows: half of them cost half as much. They begin at multiples of what its
# layers reduce by, so that it sees them as it would see all.
_LOW_ROWS, _LOW_EVERY = 40, 8
_LOW_MARGIN = 3  # rows around the opening, at least


def painted_rows(hole: U8) -> slice:
    """The rows of the painter's crop that it needs to see for the opening `hole` (80, 96)."""
    rows = np.flatnonzero(hole.any(axis=1))
    if not len(rows):
        return slice(0, PAINT_SIZE[1])
    first, last = max(int(rows[0]) - _LOW_MARGIN, 0), min(int(rows[-1]) + _LOW_MARGIN, PAINT_SIZE[1] - 1)
    tops = [t for t in range(0, PAINT_SIZE[1] - _LOW_ROWS + 1, _LOW_EVERY) if t <= first and last < t + _LOW_ROWS]
    if not tops:
        return slice(0, PAINT_SIZE[1])
    top = min(tops, key=lambda t: abs(2 * t + _LOW_ROWS - first - last))
    return slice(top, top + _LOW_ROWS)


# The long-time spectrum of speech that the motion net expects, at some of the 64 bins, and how it is estimated.
_USUAL_BINS, _USUAL = (0, 12, 20, 28, 48, 56, 63), (-0.9, -1.5, -3.7, -4.4, -4.4, -5.5, -6.6)
_LOUD_BELOW = 2.0  # a row counts if its mean lies less than about so far below the usual one
_SILENT = 1e-3  # weight of a row below which it does not count
_TRUST_ROWS = 100.0  # for how many rows the usual spectrum counts itself
_SMOOTH_BINS = 6.0


class Equaliser:
    """Takes the colour and level of a microphone and a room out of log-mel rows, as far as the past tells them.

    What the loud rows so far differ by from the usual spectrum of speech, smoothed over the bins, is subtracted. Each row
    depends on itself and those before it alone, so the sound may come in any pieces.
    """

    def __init__(self, bins: int = 64) -> None:
        self._usual = np.interp(np.arange(bins), _USUAL_BINS, _USUAL)
        away = np.subtract.outer(np.arange(bins), np.arange(bins))
        spread = np.exp(-0.5 * (away / _SMOOTH_BINS) ** 2)
        self._smooth = spread / spread.sum(axis=1, keepdims=True)
        self._sum, self._count = np.zeros(bins), _TRUST_ROWS

    def push(self, rows: F32) -> F32:
        """The next rows (t, bins), equalised."""
        loud = rows.mean(axis=1) - (self._usual.mean() - _LOUD_BELOW)
        weight = 1 / (1 + np.exp(-2 * loud.astype(np.float64)))[:, None]
        weight[weight < _SILENT] = 0  # so that it does not matter how much silence went before
        # Each sum goes on from the last, so that not even its rounding depends on how the sound was cut.
        total = np.cumsum(np.vstack([self._sum, (rows - self._usual) * weight]), axis=0)[1:]
        count = np.cumsum(np.append(self._count, weight))[1:]
        if len(rows):
            self._sum, self._count = total[-1], float(count[-1])
        even = rows - (total / count[:, None]) @ self._smooth.T
        return np.asarray(np.maximum(even, SILENT_ROW), np.float32)


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

        from beavervision.models.nets.beaver import MotionNet, PainterNet
    except ImportError as error:
        raise ModelError(f"beaver cannot run on {device}. {INSTALL_TORCH}") from error
    state = tensors(load_data(f"beaver_{name}.safetensors"))
    if name == "motion":
        module: Module = MotionNet.of(state)
    else:
        module = PainterNet()
        module.load_state_dict(state)
    return TorchNet(module, device=device, threads=threads, name=f"beaver {name}")
