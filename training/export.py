"""Trained weights to the files that ship.

    python -m training.export --weights work/weights

Writes ``beaver_motion`` and ``beaver_painter``, each for ONNX Runtime (``.onnx``) and PyTorch (``.safetensors``),
``beaver_basis.npz``, ``sync_scorer.onnx`` and ``face_between.onnx`` into the package's data and their hashes into
``SHA256.json`` and the model card, after a check that ONNX Runtime gives what PyTorch gives.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import onnx
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from beavervision.media import POINTS
from beavervision.models import between
from beavervision.models.beaver import EXTRA_ROWS, PAINT_SIZE, PHONE_FEATURES
from beavervision.models.cards import FACE_BETWEEN
from beavervision.models.nets.beaver import MEL_BINS, MotionNet, PainterNet
from beavervision.models.nets.between import BetweenNet
from beavervision.models.nets.sync import SyncScorer
from beavervision.models.runtime import OnnxNet
from beavervision.models.sync import ROWS, STEPS
from training.between import load_net as load_between_net
from training.motion import load_net
from training.painter import load_painter
from training.sync import load_scorer

OPSET = 17
TOLERANCE = 1e-4
DATA = Path(__file__).parents[1] / "src" / "beavervision" / "models" / "data"
CARD = Path(__file__).parents[1] / "docs" / "models" / "beaver.md"
_STEPS = 25


def export_motion(net: MotionNet, path: Path) -> float:
    """Inputs ``rows`` (b, 2 n + extra_rows, 64), ``state`` (b, 128), outputs ``motion`` (b, n, k), ``states`` (b, n + context,
    128); the largest difference to PyTorch."""
    rows, state = torch.randn(2, 2 * _STEPS + EXTRA_ROWS, MEL_BINS) * 3 - 5, torch.randn(2, PHONE_FEATURES).tanh()
    axes = {"rows": {0: "b", 1: "t"}, "state": {0: "b"}, "motion": {0: "b", 1: "n"}, "states": {0: "b", 1: "m"}}
    _export(net, (rows, state), path, ["rows", "state"], ["motion", "states"], axes)
    longer = torch.randn(1, 6 * _STEPS + EXTRA_ROWS, MEL_BINS) * 3 - 5
    return max(_difference(net, x, path) for x in ((rows, state), (longer, state[:1])))


def export_painter(net: PainterNet, path: Path) -> float:
    """Input ``crops`` (n, channels, h, 96), output ``painted`` (n, 3, h, 96); the largest difference to PyTorch."""
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    crops = torch.rand(2, first.in_channels, PAINT_SIZE[1], PAINT_SIZE[0])
    _export(net, (crops,), path, ["crops"], ["painted"], {"crops": {0: "n", 2: "h"}, "painted": {0: "n", 2: "h"}})
    return max(_difference(net, (x,), path) for x in (crops, crops[:1], crops[..., : PAINT_SIZE[1] // 2, :]))


def export_sync(net: SyncScorer, path: Path) -> float:
    """Inputs ``rows`` (n, ROWS, 64) and ``lips`` (n, STEPS, k), output ``scores`` (n, offsets); differs so from PyTorch."""
    first = net.see[0]
    assert isinstance(first, nn.Conv1d)
    coefficients = first.in_channels // 2
    example = (torch.randn(2, ROWS, MEL_BINS) * 3 - 5, torch.randn(2, STEPS, coefficients))
    axes = {name: {0: "n"} for name in ("rows", "lips", "scores")}
    _export(net, example, path, ["rows", "lips"], ["scores"], axes)
    return max(_difference(net, tuple(x[:n] for x in example), path) for n in (1, 2))


def export_between(net: BetweenNet, path: Path) -> float:
    """Inputs ``mouth`` and ``face`` (n, 3, h, w), ``steps`` (n, 2, 478, 3), outputs ``off`` (n, 478, 3) and ``unsure`` (n, 2)."""
    sizes = (between.MOUTH_SIZE[::-1], between.FACE_SIZE[::-1])
    example = (*(255 * torch.rand(2, 3, *size) for size in sizes), torch.randn(2, 2, POINTS, 3))
    names = ("mouth", "face", "steps", "off", "unsure")
    _export(net, example, path, [*names[:3]], [*names[3:]], {name: {0: "n"} for name in names})
    return max(_difference(net, tuple(x[:n] for x in example), path) for n in (1, 2))


def _export(
    net: nn.Module,
    example: tuple[Tensor, ...],
    path: Path,
    given: list[str],
    got: list[str],
    axes: dict[str, dict[int, str]],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    net.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        # Of checks of sizes, and of recurrent layers whose first state is not given: here it is.
        warnings.filterwarnings("ignore", "Converting a tensor to a Python boolean")
        warnings.filterwarnings("ignore", "Exporting a model to ONNX with a batch_size")
        # The tracing exporter folds batch normalisation into the convolutions.
        torch.onnx.export(
            net, example, str(path), input_names=given, output_names=got, dynamic_axes=axes,
            opset_version=OPSET, dynamo=False,
        )  # fmt: skip
    onnx.checker.check_model(str(path), full_check=True)


def _difference(net: nn.Module, example: tuple[Tensor, ...], path: Path) -> float:
    with torch.no_grad():
        told = net(*example)
    wanted = told if isinstance(told, tuple) else (told,)
    found = OnnxNet(path.read_bytes(), name=path.name)(*(x.numpy() for x in example))
    pairs = zip(found, wanted, strict=True)
    difference = max(float(np.abs(one.astype(np.float32) - other.numpy()).max()) for one, other in pairs)
    if not difference < TOLERANCE:
        raise SystemExit(f"{path.name} differs from PyTorch by {difference:.2g}, more than {TOLERANCE}.")
    return difference


def record(folder: Path, names: list[str], card: Path | None = None) -> None:
    """Write the hashes of `names` into the folder's list and the model card; other entries stay."""
    path = folder / "SHA256.json"
    hashes = json.loads(path.read_text("utf-8")) if path.exists() else {}
    found = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in names}
    path.write_text(json.dumps(dict(sorted((hashes | found).items())), indent=1) + "\n", "utf-8")
    if card is not None:
        text = card.read_text("utf-8")
        for name, value in found.items():
            text = re.sub(rf"(\| `{re.escape(name)}` \| `)[0-9a-f]{{64}}`", rf"\g<1>{value}`", text)
        card.write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=Path("work/weights"))
    parser.add_argument("--out", type=Path, default=DATA, help="the folder that gets the files")
    parser.add_argument("--motion", type=Path, help="instead of WEIGHTS/motion.pt")
    parser.add_argument("--painter", type=Path, help="instead of WEIGHTS/painter.pt")
    parser.add_argument("--only", choices=["motion", "painter", "sync", "between"], help="export this one alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    written = []
    if args.only in (None, "motion"):
        net = load_net(args.motion or args.weights / "motion.pt")
        if net.extra_rows != EXTRA_ROWS:
            raise SystemExit(f"models/beaver.py must say EXTRA_ROWS = {net.extra_rows}.")
        difference = export_motion(net, args.out / "beaver_motion.onnx")
        save_file(net.state_dict(), args.out / "beaver_motion.safetensors")
        shutil.copyfile(args.weights / "beaver_basis.npz", args.out / "beaver_basis.npz")
        written += ["beaver_motion.onnx", "beaver_motion.safetensors", "beaver_basis.npz"]
        print(f"motion: differs by {difference:.1g}")
    if args.only in (None, "painter"):
        painter = load_painter(args.painter or args.weights / "painter.pt")
        difference = export_painter(painter, args.out / "beaver_painter.onnx")
        save_file(painter.state_dict(), args.out / "beaver_painter.safetensors")
        written += ["beaver_painter.onnx", "beaver_painter.safetensors"]
        print(f"painter: differs by {difference:.1g}")
    if args.only in (None, "sync"):
        difference = export_sync(load_scorer(args.weights / "sync.pt"), args.out / "sync_scorer.onnx")
        written.append("sync_scorer.onnx")
        print(f"sync scorer: differs by {difference:.1g}")
    if args.only in (None, "between"):
        (file,) = FACE_BETWEEN.files
        difference = export_between(load_between_net(args.weights / "between.pt"), args.out / file)
        written.append(file)
        print(f"between: differs by {difference:.1g}")
    record(args.out, written, CARD if args.out == DATA else None)
    for name in written:
        print(f"{name}: {(args.out / name).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
