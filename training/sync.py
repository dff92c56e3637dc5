"""The sync scorer: learned from the real clips alone, by finding the true offset among all of a window.

    python -m training.sync train --data work/data --weights work/weights      (13 minutes of one core; --smoke: seconds)
    python -m training.sync evaluate --data work/data --weights work/weights

It shares no weights and no loss with the motion networks, so that it can judge them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from beavervision.models.nets.sync import SyncScorer
from beavervision.models.sync import REACH, ROWS, STEPS
from training.clips import Motion, load_all, padded_rows
from training.lessons import read_lessons
from training.machine import CPU, Machine, add_options, machine_of
from training.motion import augment, read_basis

RIGHT_STEPS = 2  # one picture at 25 a second
SHIFTED_STEPS = (-25, -20, -15, -10, -6, 6, 10, 15, 20, 25)  # three pictures and more
_BATCH = 48
_RATE = 3e-3
_LONGEST_S = 8.0  # longer clips are not drawn more often


@dataclass(frozen=True, slots=True)
class Figures:
    """right: share of windows whose best offset is the true one within a picture; auc: in sync against shifted.

    None where no clip is long enough for a window.
    """

    clips: int
    windows: int
    right: float | None
    auc: float | None


class Windows:
    """Random windows of the clips, with augmented sound and lips."""

    def __init__(self, motions: list[Motion], seed: int) -> None:
        self._motions = motions
        self._targets = [m.targets() for m in motions]
        self._rng = np.random.default_rng(seed)
        share = np.array([min(m.row.seconds, _LONGEST_S) + 0.5 for m in motions])
        self._share = share / share.sum()

    def take(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """rows (count, ROWS, 64), lips (count, STEPS, k), and how much each step counts (count, STEPS)."""
        rng = self._rng
        rows, lips, weights = [], [], []
        for i in rng.choice(len(self._motions), count, p=self._share):
            values, weight = self._targets[i]
            tempo = float(np.exp(rng.uniform(-0.12, 0.12))) if rng.random() < 0.5 else 1.0
            first, last = REACH * tempo, len(values) - (STEPS + REACH) * tempo
            # Where the clip is long enough, its ends stay out of the window: they would give the offset away.
            middle = (len(values) - STEPS * tempo) / 2 + rng.uniform(-5, 5)
            at = (rng.uniform(first, last) if last > first else middle) + np.arange(STEPS) * tempo
            low = np.clip(np.floor(at).astype(int), 0, len(values) - 1)
            high, part = np.minimum(low + 1, len(values) - 1), (at - np.floor(at))[:, None]
            lips.append((values[low] * (1 - part) + values[high] * part).astype(np.float32))
            weights.append((weight[low] * ((at >= 0) & (at <= len(values) - 1))).astype(np.float32))
            rows.append(padded_rows(self._motions[i].rows, 2 * (at[0] - REACH * tempo), ROWS, tempo))
        v, w = torch.from_numpy(np.stack(lips)), torch.from_numpy(np.stack(weights))
        v = v * torch.exp(torch.randn(count, 1, 1) * 0.25) + torch.randn(count, 1, v.shape[2]) * 0.15
        v = v + torch.randn_like(v) * 0.08 * torch.rand(count, 1, 1)
        if rng.random() < 0.3:
            v[..., 4:] = 0
        hidden = functional.interpolate((torch.rand(count, 1, 10) > 0.15).float(), STEPS).squeeze(1)
        return augment(torch.from_numpy(np.stack(rows)), rng), v, w * hidden


def train(motions: list[Motion], iterations: int, seed: int = 0, machine: Machine = CPU) -> SyncScorer:
    """The mean over the iterations of the network's weights."""
    torch.manual_seed(seed)
    windows = Windows(motions, seed)
    coefficients = motions[0].coefficients.shape[1]
    device = machine.device
    net, average = SyncScorer(coefficients).to(device), SyncScorer(coefficients).to(device)
    average.load_state_dict(net.state_dict())
    scale = nn.Parameter(torch.tensor(3.0, device=device))
    optimiser = torch.optim.AdamW([*net.parameters(), scale], _RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, max(iterations, 2))
    near = torch.exp(-0.5 * torch.arange(-REACH, REACH + 1, dtype=torch.float32) ** 2)
    near = (near / near.sum()).to(device)
    for iteration in range(iterations):
        rows, lips, weight = (v.to(device) for v in windows.take(_BATCH))
        with machine.precision():
            sound, motion = net.sound(rows), net.motion(lips)
        sound, motion = sound.float(), motion.float()
        known = (weight.sum(dim=1) > STEPS / 4).float()
        offsets = net.compare(sound, motion, weight) * scale.exp()
        loss = -((near * functional.log_softmax(offsets, dim=1)).sum(dim=1) * known).sum() / known.sum().clamp(min=1)
        # Other people's sound is no better than one's own at a wrong time: the score means the same for all.
        now = sound[..., REACH : REACH + STEPS]
        others = torch.einsum("bdt,cdt->bc", motion * weight[:, None], now) / motion.shape[1]
        others = others / weight.sum(dim=1, keepdim=True).clamp(min=1) * scale.exp()
        loss = loss + 0.3 * functional.cross_entropy(others, torch.arange(_BATCH, device=device))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        keep = min(0.995, iteration / (iteration + 20))
        with torch.no_grad():
            for mean, value in zip(average.state_dict().values(), net.state_dict().values(), strict=True):
                mean.copy_(mean * keep + value * (1 - keep) if mean.is_floating_point() else value)
        if (iteration + 1) % 100 == 0:
            print(f"{iteration + 1}: loss {loss.detach():.3f}", flush=True)
    return average.eval().cpu()


def figures(net: SyncScorer, motions: list[Motion]) -> Figures:
    """Over windows that begin each half second, the whole range of offsets within the clip's own sound."""
    net.eval()
    right: list[bool] = []
    true: list[float] = []
    shifted: list[float] = []
    clips = 0
    for motion in motions:
        values, weight = motion.targets()
        before = len(right)
        for first in range(REACH, len(values) - STEPS - REACH + 1, 25):
            seen = (weight[first : first + STEPS] > 0).astype(np.float32)
            if seen.mean() < 0.5:
                continue
            rows = torch.from_numpy(padded_rows(motion.rows, 2 * (first - REACH), ROWS))[None]
            lips = torch.from_numpy(values[first : first + STEPS])[None]
            with torch.no_grad():
                sound, moved = net.sound(rows), net.motion(lips)
                scores = net.compare(sound, moved, torch.from_numpy(seen)[None])[0].numpy()
            right.append(abs(int(np.argmax(scores)) - REACH) <= RIGHT_STEPS)
            true.append(scores[REACH])
            shifted += [scores[REACH + step] for step in SHIFTED_STEPS]
        clips += len(right) > before
    if not right:
        return Figures(0, 0, None, None)
    auc = float((np.array(true)[:, None] > np.array(shifted)[None]).mean())
    return Figures(clips, len(right), round(float(np.mean(right)), 4), round(auc, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "evaluate"])
    parser.add_argument("--data", type=Path, default=Path("work/data"))
    parser.add_argument("--weights", type=Path, default=Path("work/weights"), help="needs beaver_basis.npz")
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--smoke", action="store_true", help="three iterations, to see that it runs")
    add_options(parser)
    args = parser.parse_args()
    machine = machine_of(args)
    torch.set_num_threads(1)
    motions = load_all(args.data, read_basis(args.weights / "beaver_basis.npz"))
    path = args.weights / "sync.pt"
    if args.what == "train":
        learned = [m for m in motions if m.row.split == "train" and m.targets()[1].sum() > 10]
        if (args.data / "taught.npz").exists():
            lessons = read_lessons(args.data / "taught.npz")
            for motion in learned:
                motion.lag_s = lessons[motion.row.name].lag_s
        net = train(learned, 3 if args.smoke else args.iterations, machine=machine)
        torch.save(net.state_dict(), path)
    net = load_scorer(path)
    unmet = [m for m in motions if m.row.split == "validate" and m.targets()[1].sum() > 25]
    print(json.dumps(asdict(figures(net, unmet))))


def load_scorer(path: Path) -> SyncScorer:
    state = torch.load(path, map_location="cpu", weights_only=True)
    net = SyncScorer(state["see.0.weight"].shape[1] // 2)
    net.load_state_dict(state)
    return net.eval()


if __name__ == "__main__":
    main()
