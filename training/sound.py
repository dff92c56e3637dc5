"""What the motion network hears with: the first layers of a published network that knows spoken words in any voice.

    python -m training.sound --embedding FOLDER --data work/data --weights work/weights

FOLDER is ``openwakeword/resources/models`` of the package openwakeword 0.4.0 from PyPI, whose ``embedding_model.onnx`` is Google's
speech embedding (Lin et al., 2020; Apache-2.0). Its 32 mel bands are told from our log-mel rows by least squares on the train
clips. Writes ``sound.pt``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from beavervision.models.nets.beaver import MEL_PER_STEP, SoundNet
from beavervision.models.runtime import OnnxNet
from training.clips import Motion, load_all, padded_rows

_LAYERS = 7
_WINDOW, _HOP = 512, 160  # samples, of its own bands
_BEFORE_ROWS = 98  # its rows begin so many of ours before the sound, at what they are centred on
_RIDGE = 1e-3


def published(folder: Path) -> SoundNet:
    """The network with the published layers, its bands not told yet.

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


def tell_bands(net: SoundNet, motions: list[Motion], bands: OnnxNet) -> float:
    """Let the network's first layer give what `bands` gives for the sound; the share of that which it explains."""
    given, wanted = [], []
    for motion in motions:
        silence = np.zeros(_HOP * (_BEFORE_ROWS + 2), np.float32)
        sound = np.concatenate([silence, motion.pcm, np.zeros(_WINDOW, np.float32)]) * 32767
        (told,) = bands(sound[None])
        rows = np.squeeze(told)[_BEFORE_ROWS:] / 10 + 2
        count = min(len(rows), len(motion.even))
        near = padded_rows(motion.even, -1, count + 2)
        given.append(np.concatenate([near[:count], near[1 : count + 1], near[2:]], axis=1)[::3])
        wanted.append(rows[:count:3])
    x, y = np.concatenate(given).astype(np.float64), np.concatenate(wanted)
    x = np.append(x, np.ones((len(x), 1)), axis=1)
    solved = np.linalg.solve(x.T @ x + _RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y)
    with torch.no_grad():
        net.bands.weight.copy_(torch.from_numpy(solved[:-1].reshape(3, -1, solved.shape[1]).transpose(2, 1, 0)))
        assert net.bands.bias is not None
        net.bands.bias.copy_(torch.from_numpy(solved[-1]))
    return float(1 - ((x @ solved - y) ** 2).mean() / y.var(axis=0).mean())


def even_out(net: SoundNet, motions: list[Motion]) -> None:
    """Bring the features of the clips' sound to a mean of 0 and a deviation of 1."""
    with torch.no_grad():
        even = [m.even[: len(m.even) // MEL_PER_STEP * MEL_PER_STEP] for m in motions]
        heard = [net.raw(torch.from_numpy(rows[None]))[0] for rows in even if len(rows) > net.extra_rows]
        every = torch.cat(heard, dim=1)
        net.mean.copy_(every.mean(dim=1, keepdim=True))
        net.spread.copy_(every.std(dim=1, keepdim=True) + 1e-3)


def load_sound(path: Path) -> SoundNet:
    net = SoundNet()
    net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embedding", type=Path, required=True, help="folder with embedding_model.onnx")
    parser.add_argument("--data", type=Path, default=Path("work/data"))
    parser.add_argument("--weights", type=Path, default=Path("work/weights"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    net = published(args.embedding)
    motions = [m for m in load_all(args.data) if m.row.split == "train"]
    bands = OnnxNet((args.embedding / "melspectrogram.onnx").read_bytes(), name="melspectrogram.onnx")
    print(f"its bands: {tell_bands(net, motions, bands):.3f} told")
    even_out(net, motions)
    args.weights.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), args.weights / "sound.pt")


if __name__ == "__main__":
    main()
