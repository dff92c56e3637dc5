"""The network that tells a face's points between two pictures: learned from the mesh, which looked at all three.

    python -m training.between scan --talkers ../shared/talkers --data work/data          (8 minutes of one core)
    python -m training.between train --data work/data --weights work/weights              (15 minutes of one core)
    python -m training.between evaluate --data work/data --weights work/weights

``scan`` writes ``between_train.npz`` and ``between_validate.npz``: what is seen of each picture and its two neighbours, and
where the mesh found the points in them, see :class:`Triples`. ``train`` writes ``between.pt``. Each takes ``--smoke``: a few
clips, a few iterations.
"""

from __future__ import annotations

import argparse
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from beavervision.errors import BeaverVisionError
from beavervision.media import F32, POINTS, U8, FaceState
from beavervision.models import between
from beavervision.models.face import Crop, FaceNets
from beavervision.models.mesh import INNER_LIP, OUTER_LIP
from beavervision.models.nets.between import BetweenNet
from beavervision.stages.decode import Decode, probe
from beavervision.stages.detect import Detect
from training.clips import Row, read_index
from training.expression import mirrored_points

SIZE = 24  # directions of motion
SURE_PX = 0.7  # below what the lips are expected to be off by a picture counts as spared, as in the product
_LIPS = np.concatenate([INNER_LIP, OUTER_LIP])
_LIPS_COUNT = 5.0  # times as much as other points
_DEPTH_COUNTS = 0.5
_MIN_RATE = 23  # pictures a second; fewer lie too far apart
_LONGEST = 500  # pictures of a clip
_BATCH, _RATE, _DECAY = 192, 2e-3, 0.02
_FORGETS = 0.15  # of the examples, without the step before


@dataclass(frozen=True, slots=True, eq=False)
class Triples:
    """Pictures and their neighbours: mouth (t, 3, 60, 72) and face (t, 3, 56, 56) as the network sees them; steps
    (t, 2, 478, 3) and off (t, 478, 3) in pixels of the mesh's crop, half precision; clip (t,), whose pictures they are.
    """

    mouth: U8
    face: U8
    steps: npt.NDArray[np.float16]
    off: npt.NDArray[np.float16]
    clip: npt.NDArray[np.int32]

    @classmethod
    def read(cls, path: Path) -> Triples:
        with np.load(path) as raw:
            return cls(*(raw[f.name] for f in fields(cls)))


@dataclass(frozen=True, slots=True)
class Figures:
    """How far the points are off those of the mesh, in pixels of its crop: 50th, 90th and 99th percentile."""

    pictures: int
    line_lips: tuple[float, ...]  # halfway between the neighbours
    lips: tuple[float, ...]
    line_all: tuple[float, ...]
    all: tuple[float, ...]
    sure: float  # share of pictures of which it is sure enough,
    sure_lips: tuple[float, ...]  # and these


def triples_of(path: Path, nets: FaceNets) -> Iterator[tuple[F32, F32, F32, F32]]:
    """mouth, face, steps and off of each picture of a clip whose neighbours the mesh found well."""
    last: deque[tuple[U8, F32, int] | None] = deque(maxlen=5)
    seen = 0
    for clip in Detect(nets, look_ahead=0, shapes=False)(Decode(8, extend="none")(path)):
        assert clip.track is not None
        track = clip.track
        for picture, face, state, shot in zip(clip.frames.pictures, track.faces, track.states, track.shot, strict=True):
            well = face is not None and state is FaceState.OK
            last.append((picture.y, face.points_px, shot) if well and face is not None else None)
            five = [one for one in last if one is not None]
            if len(five) < 5 or len({shot for *_, shot in five}) > 1:
                continue
            (_, before, _), _, (luma, one, _), (luma_between, true, _), (luma_after, other, _) = five
            line = between.halfway(one, other)
            crop = Crop.of_points(line)
            seen_at = ((luma, one), (luma_between, line), (luma_after, other))
            mouths, faces = zip(*(between.views(*at) for at in seen_at), strict=True)
            yield (
                np.stack(mouths),
                np.stack(faces),
                between.steps(one, other, before, crop),
                between.to_crop(np.asarray(true - line, np.float32), crop),
            )
        seen += len(clip)
        if seen >= _LONGEST:
            return


def scan(talkers: Path, rows: list[Row]) -> Triples:
    nets = FaceNets()
    found: list[tuple[F32, F32, F32, F32]] = []
    clips: list[int] = []
    for number, row in enumerate(rows):
        path = talkers / row.file
        try:
            if probe(path).rate < _MIN_RATE:
                continue
            found += triples_of(path, nets)
        except BeaverVisionError as error:
            print(f"{row.file}: {error}")
        clips += [number] * (len(found) - len(clips))
    mouth, face, steps, off = (np.stack(part) for part in zip(*found, strict=True))
    return Triples(
        np.rint(mouth).astype(np.uint8),
        np.rint(face).astype(np.uint8),
        steps.astype(np.float16),
        off.astype(np.float16),
        np.array(clips, np.int32),
    )


def directions(off: F32, size: int) -> tuple[F32, F32]:
    """What reads and what writes points (t, 478, 3) along the leading directions of what is off, (size, 478 * 3) each.

    Lips count more, and large errors no more than in proportion.
    """
    counts = np.ones(POINTS, np.float32)
    counts[_LIPS] = _LIPS_COUNT
    scale = (np.sqrt(counts)[:, None] * np.array([1, 1, _DEPTH_COUNTS], np.float32)).ravel()
    scaled = off.reshape(len(off), -1) * scale
    scaled /= np.sqrt(np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1.0))
    _, vectors = np.linalg.eigh(scaled.T @ scaled)
    leading = vectors[:, : -size - 1 : -1].T
    return (leading * scale).astype(np.float32), (leading / scale).astype(np.float32)


def train(triples: Triples, iterations: int, seed: int = 0) -> BetweenNet:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = BetweenNet(SIZE)
    off = triples.off.astype(np.float32)
    reads, writes = directions(off, SIZE)
    net.reads.copy_(torch.from_numpy(reads))
    net.writes.copy_(torch.from_numpy(writes))
    usual = torch.from_numpy((triples.steps[:, 0].astype(np.float32).reshape(len(off), -1) @ reads.T).std(axis=0))
    net.usual_step.copy_(usual + 1e-3)
    counts = torch.ones(POINTS)
    counts[_LIPS] = _LIPS_COUNT
    counts /= counts.sum()
    of_clip = np.bincount(triples.clip)[triples.clip]
    share = 1 / np.sqrt(of_clip)
    share /= share.sum()
    optimizer = torch.optim.AdamW(net.parameters(), _RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, iterations, pct_start=0.1)
    net.train()
    for iteration in range(iterations):
        chosen = rng.choice(len(off), min(_BATCH, len(off)), p=share)
        mouth, face, steps, true = varied(*example(triples, chosen))
        told, unsure = net(mouth, face, steps)
        away = ((told - true)[..., :2].pow(2).sum(dim=2) + 0.01).sqrt()
        depth = (told - true)[..., 2].abs()
        # The scale of a Laplace distribution of the mean distance.
        means = torch.stack([away[:, _LIPS].mean(dim=1), away.mean(dim=1)], dim=1).detach()
        doubt = (unsure.log() + means / unsure).sum(dim=1).mean()
        loss = (away * counts).sum(dim=1).mean() + 0.3 * (depth * counts).sum(dim=1).mean() + 0.1 * doubt
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if iteration % 100 == 99:
            print(f"{iteration + 1} of {iterations}: {float(away[:, _LIPS].mean().detach()):.3f} px", flush=True)
    return net.eval()


def example(triples: Triples, chosen: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mouth, face, steps and off of some triples, single precision."""
    parts = (triples.mouth, triples.face, triples.steps, triples.off)
    mouth, face, steps, off = (torch.from_numpy(part[chosen].astype(np.float32)) for part in parts)
    return mouth, face, steps, off


def varied(mouth: Tensor, face: Tensor, steps: Tensor, off: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same in other light, with noise; half of them seen in a mirror, half of them backwards in time."""
    count = len(mouth)
    mirror = torch.rand(count) < 0.5
    other, sign = torch.from_numpy(mirrored_points()), torch.tensor([-1.0, 1.0, 1.0])
    mouth, face = (torch.where(mirror[:, None, None, None], views.flip(-1), views) for views in (mouth, face))
    steps = torch.where(mirror[:, None, None, None], steps[:, :, other] * sign, steps)
    off = torch.where(mirror[:, None, None], off[:, other] * sign, off)
    back = torch.rand(count) < 0.5
    mouth, face = (torch.where(back[:, None, None, None], views.flip(1), views) for views in (mouth, face))
    across = torch.where(back[:, None, None], -steps[:, 0], steps[:, 0])
    known = ~back & (torch.rand(count) > _FORGETS)  # what comes after is not known
    steps = torch.stack([across, steps[:, 1] * known[:, None, None]], dim=1)
    gain = 1 + 0.15 * torch.randn(count, 1, 1, 1)
    mouth, face = (views * gain + 1.5 * torch.randn(views.shape) for views in (mouth, face))
    return mouth, face, steps, off


def measure(net: BetweenNet, triples: Triples) -> Figures:
    away, line, unsure = [], [], []
    with torch.inference_mode():
        for at in range(0, len(triples.off), 512):
            mouth, face, steps, off = example(triples, np.arange(at, min(at + 512, len(triples.off))))
            told, doubt = net(mouth, face, steps)
            away.append((told - off)[..., :2].norm(dim=2).numpy())
            line.append(off[..., :2].norm(dim=2).numpy())
            unsure.append(doubt.numpy())
    off_px, line_px, doubts = np.concatenate(away), np.concatenate(line), np.concatenate(unsure)
    sure = doubts[:, 0] < SURE_PX

    def spread(values: F32) -> tuple[float, ...]:
        return tuple(round(float(v), 3) for v in np.percentile(values, [50, 90, 99])) if values.size else ()

    return Figures(
        len(off_px),
        spread(line_px[:, _LIPS]),
        spread(off_px[:, _LIPS]),
        spread(line_px),
        spread(off_px),
        round(float(sure.mean()), 3),
        spread(off_px[sure][:, _LIPS]),
    )


def load_net(path: Path) -> BetweenNet:
    state = torch.load(path, map_location="cpu", weights_only=True)
    net = BetweenNet(len(state["usual_step"]))
    net.load_state_dict(state)
    return net.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scan", "train", "evaluate"])
    parser.add_argument("--talkers", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--iterations", type=int, default=1600)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    args.data.mkdir(parents=True, exist_ok=True)
    if args.what == "scan":
        if args.talkers is None:
            parser.error("scan needs --talkers")
        rows = read_index(args.talkers)
        for split in ("train", "validate"):
            of_split = [row for row in rows if row.split == split]
            found = scan(args.talkers, of_split[:2] if args.smoke else of_split)
            np.savez_compressed(
                args.data / f"between_{split}.npz", **{f.name: getattr(found, f.name) for f in fields(found)}
            )
            print(f"{split}: {len(found.off)} pictures")
        return
    if args.weights is None:
        parser.error(f"{args.what} needs --weights")
    path = args.weights / "between.pt"
    if args.what == "train":
        args.weights.mkdir(parents=True, exist_ok=True)
        net = train(Triples.read(args.data / "between_train.npz"), 20 if args.smoke else args.iterations)
        torch.save(net.state_dict(), path)
    print(json.dumps(asdict(measure(load_net(path), Triples.read(args.data / "between_validate.npz"))), indent=1))


if __name__ == "__main__":
    main()
