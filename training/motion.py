"""The motion network: its basis, its training, its figures.

python -m training.motion basis     the basis of mouth motion, from the packed train clips
python -m training.motion train     the network, from the clips and the synthetic voices
python -m training.motion evaluate  the figures on the validation people, as JSON
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from beavervision.media import F32
from beavervision.models.basis import MotionBasis
from beavervision.models.mesh import INNER_LIP, OUTER_LIP
from beavervision.models.nets.beaver import MEL_PER_STEP, MotionNet, MotionPair
from training.clips import SILENCE, STEP_S, Motion, learn_basis, load_all, padded_rows
from training.lessons import COMPONENTS, Lesson, read_lessons, recording_name, voice_name
from training.machine import CPU, Machine, add_options, machine_of
from training.recordings import load as load_recordings
from training.voices import Spoken, Viseme, load, rows_of

BASIS_SIZE = 16
WINDOW = 100  # steps of one example
_VISEME_WEIGHTS = (0.5, 1.5, 1.5, 1.0, 1.0, 1.0, 0.5)
_CLOSED_GAP, _BITTEN_GAP, _OPEN_GAP = -0.005, 0.035, 0.075  # wanted over the rest mouth, in eye distances


def read_basis(path: Path) -> MotionBasis:
    return MotionBasis.parse(path.read_bytes())


def write_basis(basis: MotionBasis, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez_compressed(file, points=basis.points.astype(np.int16), shapes=basis.shapes, solve=basis.solve)


@dataclass(frozen=True, slots=True)
class Readout:
    """What the losses look at, as rows over the coefficients (k,)."""

    gap: Tensor
    width: Tensor
    weight: Tensor  # of each coefficient in the plain losses

    @classmethod
    def of(cls, basis: MotionBasis) -> Readout:
        energy = (basis.shapes**2).sum(axis=(1, 2))
        weight = (energy / energy.max()) ** 0.35
        return cls(
            torch.tensor(basis.gap[:, 2:7].mean(axis=1)),
            torch.tensor(basis.width),
            torch.tensor(weight / weight.sum() * len(weight), dtype=torch.float32),
        )

    def to(self, device: torch.device) -> Readout:
        return Readout(self.gap.to(device), self.width.to(device), self.weight.to(device))


# --- examples ---------------------------------------------------------------------------------------------------------


class Examples:
    """Random windows of the train clips, of the synthetic voices and of recordings, with what the teacher says of them."""

    def __init__(
        self,
        motions: list[Motion],
        voices: dict[str, Spoken],
        recordings: dict[str, F32],
        lessons: dict[str, Lesson],
        net: MotionNet,
        rng: np.random.Generator,
    ) -> None:
        self._net, self._rng = net, rng
        self._clips = [self._clip(m, lessons[m.row.name]) for m in motions]
        self._voices = [(v, _joined(lessons[name], len(v.classes))) for name, v in voices.items()]
        self._recordings = [
            (rows, _joined(lessons[name], len(rows) // MEL_PER_STEP)) for name, rows in recordings.items()
        ]
        share = np.array([min(float(weight.sum()), 400.0) ** 0.7 for _, _, weight in self._clips])
        self._share = share / share.sum()

    @staticmethod
    def _clip(motion: Motion, lesson: Lesson) -> tuple[F32, F32, F32]:
        motion.lag_s = lesson.lag_s
        target, weight = motion.targets()
        return motion.even, np.concatenate([target, _joined(lesson, len(target))], axis=1), weight

    def _rows(self, rows: F32, step: float, tempo: float) -> F32:
        net = self._net
        first = step * MEL_PER_STEP - net.left_rows * tempo
        return padded_rows(rows, first, MEL_PER_STEP * WINDOW + net.extra_rows, tempo)

    def _steps(self, count: int) -> tuple[npt.NDArray[np.float64], float]:
        """Places (WINDOW,) in a sound of `count` steps, some beyond its ends, and how far apart."""
        tempo = float(np.exp(self._rng.uniform(-0.15, 0.15))) if self._rng.random() < 0.7 else 1.0
        start = float(self._rng.uniform(-0.3 * WINDOW, max(count - 0.7 * WINDOW * tempo, 0.3 * WINDOW)))
        return start + np.arange(WINDOW, dtype=np.float64) * tempo, tempo

    def real(self, count: int) -> Batch:
        rows, values, weights = [], [], []
        for i in self._rng.choice(len(self._clips), count, p=self._share):
            mel, value, weight = self._clips[i]
            at, tempo = self._steps(len(value))
            nearest = np.clip(np.round(at).astype(int), 0, len(value) - 1)
            rows.append(self._rows(mel, float(at[0]), tempo))
            values.append(_between(value, at))
            weights.append(weight[nearest] * _inside(at, len(value)))
        out = _stack(values)
        return Batch(_stack(rows), out[..., :BASIS_SIZE], _stack(weights), out[..., BASIS_SIZE:])

    def synthetic(self, count: int) -> tuple[Batch, Tensor]:
        """The batch has no motion of its own but the teacher's; classes are (b, n)."""
        rows, values, weights, classes = [], [], [], []
        for i in self._rng.integers(len(self._voices), size=count):
            spoken, value = self._voices[i]
            at, tempo = self._steps(len(value))
            nearest, inside = np.clip(np.round(at).astype(int), 0, len(value) - 1), _inside(at, len(value))
            rows.append(self._rows(spoken.rows, float(at[0]), tempo))
            values.append(_between(value, at))
            classes.append(np.where(inside > 0, spoken.classes[nearest], int(Viseme.SILENCE)))
            weights.append(np.where(inside > 0, spoken.centred[nearest], np.float32(1)))
        taught = _stack(values)
        batch = Batch(_stack(rows), taught[..., :BASIS_SIZE], _stack(weights), taught)
        return batch, torch.from_numpy(np.stack(classes))

    def recorded(self, count: int) -> tuple[Tensor, Tensor]:
        """Rows (b, r, 64), and what the teacher says of them (b, n, k + 64)."""
        rows, values = [], []
        for i in self._rng.integers(len(self._recordings), size=count):
            mel, value = self._recordings[i]
            at, tempo = self._steps(len(value))
            rows.append(self._rows(mel, float(at[0]), tempo))
            values.append(_between(value, at))
        return _stack(rows), _stack(values)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows (b, r, 64), coefficients (b, n, k), weights (b, n), and the teacher's coefficients and features (b, n, k + 64)."""

    rows: Tensor
    motion: Tensor
    weight: Tensor
    taught: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(v.to(device) for v in (self.rows, self.motion, self.weight, self.taught)))


def _joined(lesson: Lesson, steps: int) -> F32:
    """Motion and features (steps, k + 64), the last step repeated where the lesson ends early."""
    both = np.concatenate([lesson.motion, lesson.features], axis=1)
    return both[np.minimum(np.arange(steps), len(both) - 1)]


def _between(values: F32, at: npt.NDArray[np.float64]) -> F32:
    low = np.clip(np.floor(at).astype(int), 0, len(values) - 2)
    part = np.clip(at - low, 0, 1)[:, None].astype(np.float32)
    return np.asarray(values[low] * (1 - part) + values[low + 1] * part, np.float32)


def _inside(at: npt.NDArray[np.float64], count: int) -> F32:
    return ((at >= 0) & (at <= count - 1)).astype(np.float32)


def _stack(arrays: list[F32]) -> Tensor:
    return torch.from_numpy(np.stack(arrays).astype(np.float32))


def augment(rows: Tensor, rng: np.random.Generator) -> Tensor:
    """Other throats, rooms, microphones and levels, in the log-mel domain; parts are hidden (Park et al., 2019)."""
    (batch, length, bins), device = rows.shape, rows.device

    def uniform(*shape: int) -> Tensor:
        return _uniform(rng, *shape).to(device)

    def normal(*shape: int) -> Tensor:
        return _normal(rng, *shape).to(device)

    warp = torch.where(
        uniform(batch, 1) < 0.75, torch.exp((uniform(batch, 1) * 2 - 1) * 0.16), torch.ones((), device=device)
    )
    place = (torch.arange(bins, device=device) * warp).clamp(0, bins - 1)
    low = place.floor().long().clamp(max=bins - 2)
    part = (place - low)[:, None]
    spread = (batch, length, bins)
    x = (
        rows.gather(2, low[:, None].expand(spread)) * (1 - part)
        + rows.gather(2, low[:, None].expand(spread) + 1) * part
    )
    line = torch.linspace(-1, 1, bins, device=device)
    wave = torch.linspace(0, 2 * np.pi, bins, device=device)
    x = x + normal(batch, 1, 1) * 0.9 * line
    x = x + normal(batch, 1, 1) * 0.5 * torch.cos(wave + uniform(batch, 1, 1) * 2 * np.pi)
    if rng.random() < 0.5:  # an echo: each row holds on to some of the last
        for shift, loss in ((6, 1.5), (12, 3.0)):
            late = functional.pad(x, (0, 0, shift, 0), value=float(SILENCE))[:, :length]
            quiet = loss + uniform(batch, 1, 1) * 6
            x = torch.logaddexp(x, late - quiet)
    noise = -11 + uniform(batch, 1, 1) * 9.5 + normal(batch, 1, 1) * 1.2 * -line
    noise = noise + normal(batch, 1, bins) * 0.3 + torch.randn(spread, device=device) * 0.6
    noise = torch.where(uniform(batch, 1, 1) < 0.7, noise, torch.full((), -20.0, device=device))
    x = torch.logaddexp(x, noise) + uniform(batch, 1, 1) * 6.5 - 3
    x = x.clamp(min=float(SILENCE))
    for b in range(batch):
        if rng.random() < 0.5:
            size = int(rng.integers(2, 12))
            first = int(rng.integers(0, bins - size))
            x[b, :, first : first + size] = x[b].mean()
        if rng.random() < 0.3:
            size = int(rng.integers(3, 12))
            first = int(rng.integers(0, length - size))
            x[b, first : first + size] = x[b].mean()
    return x


def still(count: int, steps: int, extra: int, rng: np.random.Generator) -> Tensor:
    """Rows (b, r, 64) in which nobody speaks: noise of any level and colour."""
    shape = (count, MEL_PER_STEP * steps + extra, 64)
    line = torch.linspace(1, -1, 64)
    level = float(SILENCE) + _uniform(rng, count, 1, 1) * 6 + _normal(rng, count, 1, 1) * line
    return (level + torch.randn(shape) * 0.6 * _uniform(rng, count, 1, 1)).clamp(min=float(SILENCE))


def _uniform(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.random(shape, np.float32))


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, np.float32))


# --- losses -----------------------------------------------------------------------------------------------------------


def correlation(a: Tensor, b: Tensor, weight: Tensor) -> Tensor:
    """Of each row (b, n) of `a` with that of `b`: (b,)."""
    total = weight.sum(1, keepdim=True).clamp(min=1)
    a = (a - (a * weight).sum(1, keepdim=True) / total) * weight
    b = (b - (b * weight).sum(1, keepdim=True) / total) * weight
    return (a * b).sum(1) / ((a * a).sum(1) * (b * b).sum(1) + 1e-6).sqrt()


def motion_loss(out: Tensor, target: Tensor, weight: Tensor, readout: Readout) -> Tensor:
    """L1 of values and of velocities, and what the opening and the width lack of correlation."""
    w = weight[..., None]
    steps = w.sum().clamp(min=1) * out.shape[-1]
    value = ((out - target).abs() * readout.weight * w).sum() / steps
    fast = ((out[:, 2:] - out[:, :-2]) - (target[:, 2:] - target[:, :-2])).abs()
    velocity = (fast * readout.weight * w[:, 1:-1]).sum() / steps
    gap, width = target @ readout.gap, target @ readout.width
    told = ((weight.sum(1) > 0.25 * WINDOW) & (gap.std(1) > 0.01)).float()
    lack = (1 - correlation(out @ readout.gap, gap, weight)) + 0.6 * (
        1 - correlation(out @ readout.width, width, weight)
    )
    return value + velocity + 0.5 * (lack * told).sum() / told.sum().clamp(min=1)


def articulation_loss(out: Tensor, classes: Tensor, weight: Tensor, readout: Readout) -> Tensor:
    """Lips closed at p b m, nearly so at f v, open at a; at rest in silence."""
    gap = out @ readout.gap / 0.07

    def mean(lack: Tensor, viseme: Viseme) -> Tensor:
        w = weight * (classes == viseme)
        return (lack * w).sum() / w.sum().clamp(min=1)

    centred = weight > 0.6
    middle = torch.where(centred, gap, torch.full_like(gap, _CLOSED_GAP / 0.07))
    return (
        mean((middle - _CLOSED_GAP / 0.07).relu(), Viseme.CLOSED)
        + 0.5 * mean((gap - _BITTEN_GAP / 0.07).relu(), Viseme.LIP_TEETH)
        + 0.3 * mean((_OPEN_GAP / 0.07 - gap).relu(), Viseme.OPEN)
        + 0.3 * mean(out.abs().mean(-1), Viseme.SILENCE)
    )


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Options:
    iterations: int = 1700
    batch: int = 12
    synthetic: int = 8
    recorded: int = 0
    channels: int = 160
    hidden: int | None = None
    dropout: float = 0.1
    rate: float = 2e-3
    decay: float = 0.05
    articulation: float = 0.25
    taught: float = 1.0  # how much the teacher counts; 0 learns from the clips alone
    seed: int = 0


class Student(nn.Module):
    """The network with two more heads, for training alone: one names the viseme, one the recogniser's features."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self.net = MotionNet(BASIS_SIZE, channels=options.channels, dropout=options.dropout, hidden=options.hidden)
        self.viseme = nn.Conv1d(options.channels, len(Viseme), 1)
        self.features = nn.Conv1d(options.channels, COMPONENTS, 1)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heard = self.net.listen(rows)
        return self.net.head(heard).transpose(1, 2), self.viseme(heard), self.features(heard).transpose(1, 2)


def train(
    motions: list[Motion],
    voices: dict[str, Spoken],
    lessons: dict[str, Lesson],
    basis: MotionBasis,
    options: Options,
    save: Path,
    start: Path | None = None,
    machine: Machine = CPU,
    recordings: dict[str, F32] | None = None,
) -> MotionNet:
    """Train on `motions` (their lags become those of the lessons), `voices` and `recordings` (their equalised rows), from the
    weights `start` if given.

    `save` has the averaged weights.
    """
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    device = machine.device
    readout = Readout.of(basis).to(device)
    student, average = Student(options).to(device), Student(options).to(device)
    if start is not None:
        known = torch.load(start, map_location="cpu", weights_only=True)
        student.net.load_state_dict(known if options.hidden is None else narrowed(known, options.hidden))
    average.load_state_dict(student.state_dict())
    average.eval()
    examples = Examples(motions, voices, recordings or {}, lessons, student.net, rng)
    optimiser = torch.optim.AdamW(student.parameters(), options.rate, weight_decay=options.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, options.rate, total_steps=options.iterations, pct_start=0.1
    )
    classes_weight = torch.tensor(_VISEME_WEIGHTS, device=device)
    began = time.monotonic()
    for step in range(options.iterations):
        real = examples.real(options.batch).to(device)
        said, classes = examples.synthetic(options.synthetic)
        said, classes = said.to(device), classes.to(device)
        nobody = still(max(options.batch // 12, 1), WINDOW, student.net.extra_rows, rng).to(device)
        heard, taught = [real.rows, said.rows], [real.taught, said.taught]
        if options.recorded:
            for to, more in zip((heard, taught), examples.recorded(options.recorded), strict=True):
                to.append(more.to(device))
        rows = torch.cat([augment(torch.cat(heard), rng), nobody])
        with machine.precision():
            told = student(rows)
        out, named, features = (t.float() for t in told)
        first, last = options.batch, options.batch + options.synthetic
        spoken, lesson = out[first:last], torch.cat(taught)
        known = len(lesson)  # windows that the teacher speaks of
        name = functional.cross_entropy(named[first:last], classes, classes_weight, reduction="none")
        loss = (
            0.6 * motion_loss(out[:first], real.motion, real.weight, readout)
            + options.taught
            * 0.6
            * motion_loss(out[:known], lesson[..., :BASIS_SIZE], torch.ones_like(lesson[..., 0]), readout)
            + options.taught * 0.5 * functional.smooth_l1_loss(features[:known], lesson[..., BASIS_SIZE:])
            + options.articulation * articulation_loss(spoken, classes, said.weight, readout)
            + 0.2 * (name * said.weight).mean()
            + 0.05 * out[known:].abs().mean()
        )
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        follow(average, student, min(0.996, step / (step + 50)))
        if (step + 1) % 250 == 0 or step + 1 == options.iterations:
            save.parent.mkdir(parents=True, exist_ok=True)
            torch.save(average.net.state_dict(), save)
            print(f"{step + 1}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    return average.net.cpu()


def narrowed(state: dict[str, Tensor], hidden: int) -> dict[str, Tensor]:
    """The weights of a network with only the `hidden` strongest channels within each block."""
    out = dict(state)
    for block in (k.removesuffix("wide.bias") for k in state if k.endswith("wide.bias")):
        wide, point = state[f"{block}wide.weight"], state[f"{block}point.weight"]
        strength = wide.flatten(1).norm(dim=1) * point[:, :, 0].norm(dim=0)
        kept = strength.argsort(descending=True)[:hidden].sort().values
        out |= {f"{block}wide.weight": wide[kept], f"{block}wide.bias": state[f"{block}wide.bias"][kept]}
        out[f"{block}point.weight"] = point[:, kept]
    return out


def middle(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean of two networks' weights."""
    return {k: (v + other[k]) / 2 if v.dtype.is_floating_point else v for k, v in one.items()}


def follow(average: nn.Module, student: nn.Module, keep: float) -> None:
    """Move the weights of `average` towards those of `student`, of which it keeps the share `keep` of its own."""
    with torch.no_grad():
        for a, s in zip(average.state_dict().values(), student.state_dict().values(), strict=True):
            if a.dtype.is_floating_point:
                a.mul_(keep).add_(s, alpha=1 - keep)
            else:
                a.copy_(s)


def predict(net: MotionNet | MotionPair, rows: F32) -> F32:
    """Coefficients (n, k) for each 20 ms of all the rows of a clip."""
    steps = len(rows) // MEL_PER_STEP
    context = padded_rows(rows, -net.left_rows, steps * MEL_PER_STEP + net.extra_rows)
    with torch.no_grad():
        return np.asarray(net(torch.from_numpy(context[None]))[0, :steps].numpy(), np.float32)


def correlations(out: F32, target: F32, weight: F32, reach: int) -> F32:
    """Of `out` (n,) delayed by -reach to reach steps with `target` (n,)."""
    found = np.full(2 * reach + 1, -1, np.float32)
    for i, shift in enumerate(range(-reach, reach + 1)):
        a, b = max(shift, 0), min(len(out), len(out) + shift)
        used = weight[a:b] > 0.1
        if used.sum() > 10:
            found[i] = np.corrcoef(out[a - shift : b - shift][used], target[a:b][used])[0, 1]
    return np.nan_to_num(found, nan=-1.0)


def correct_lags(told: dict[str, F32], motions: list[Motion], readout: Readout, reach: int = 15) -> int:
    """Move each clip's sound to where the motion `told` for it agrees with its mouth best, if that peak is clear.

    Returns how many moved. Clips of one recording share their setup, so a short clip takes the median of its person's clear ones.
    """
    gap = readout.gap.numpy()
    clear: dict[str, list[float]] = {}
    unclear: list[Motion] = []
    before = [m.lag_s for m in motions]
    for motion in motions:
        target, weight = motion.targets()
        steps = min(len(target), len(told[motion.row.name]))
        found = correlations(told[motion.row.name][:steps] @ gap, target[:steps] @ gap, weight[:steps], reach)
        best = int(np.argmax(found))
        far = np.abs(np.arange(len(found)) - best) > 5
        if motion.row.seconds > 1.5 and 0 < best < 2 * reach and found[best] > max(0.35, found[far].max() + 0.08):
            motion.lag_s += (reach - best) * STEP_S
            clear.setdefault(motion.row.person, []).append(motion.lag_s)
        else:
            unclear.append(motion)
    for motion in unclear:
        if motion.row.person in clear:
            motion.lag_s = float(np.median(clear[motion.row.person]))
    return sum(abs(m.lag_s - b) > 0.01 for m, b in zip(motions, before, strict=True))


def gain(net: MotionNet, motions: list[Motion], readout: Readout) -> float:
    """What to multiply the motion with so that its opening varies as much as that of the clips."""
    ratios = []
    for motion in motions:
        target, weight = motion.targets()
        used = weight > 0.1
        if used.sum() > 50:
            out = predict(net, motion.even)[used] @ readout.gap.numpy()
            ratios.append(float((target[used] @ readout.gap.numpy()).std() / max(out.std(), 1e-6)))
    return float(np.clip(np.median(ratios), 1.0, 1.6)) if ratios else 1.0


# --- figures ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians over clips, but for the shares. The control hears another clip's sound."""

    clips: int
    gap: float
    width: float
    lag_within_frame: float
    spread: float  # deviation of the opening against the truth's
    lip_distance: float  # mean lip point distance against that of the clip's own mean mouth
    lip_distance_usual: float  # the same against the mean mouth of the people learned from
    control_gap: float
    control_width: float
    closed: float  # share of synthetic p b m with a gap under 15 % of the clip's range within the phone +- 40 ms
    open_above_closed: float  # share of synthetic open vowels that open wider than the clip's median
    silence: float  # motion in silence against that in speech


def usual_mouth(motions: list[Motion]) -> F32:
    """The mean coefficients (k,) of all clips, each counting alike."""
    told = [m.targets() for m in motions]
    return np.asarray(np.mean([(t * w[:, None]).sum(axis=0) / w.sum() for t, w in told], axis=0), np.float32)


def figures(
    net: MotionNet | MotionPair, motions: list[Motion], voices: list[Spoken], basis: MotionBasis, usual: F32
) -> Figures:
    """`usual` (k,) is the mean mouth of the people learned from."""
    readout = Readout.of(basis)
    rows = readout.gap.numpy(), readout.width.numpy()
    where = {int(p): i for i, p in enumerate(basis.points)}
    lips = basis.shapes[:, [where[int(p)] for p in np.concatenate([INNER_LIP, OUTER_LIP])], :2]
    outs = [predict(net, m.even) for m in motions]
    found: dict[str, list[float]] = {
        k: [] for k in ("gap", "width", "lag", "spread", "lip", "lip_usual", "c_gap", "c_width")
    }
    for i, motion in enumerate(motions):
        target, weight = motion.targets()
        used = weight > 0.1
        out, other = outs[i], np.resize(outs[(i + 7) % len(outs)], outs[i].shape)
        for key, value in (("gap", rows[0]), ("width", rows[1])):
            found[key].append(float(np.corrcoef((out @ value)[used], (target @ value)[used])[0, 1]))
            found[f"c_{key}"].append(float(np.corrcoef((other @ value)[used], (target @ value)[used])[0, 1]))
        found["lag"].append(float(np.argmax(correlations(out @ rows[0], target @ rows[0], weight, 20)) - 20))
        found["spread"].append(float((out @ rows[0])[used].std() / (target @ rows[0])[used].std()))
        miss, own_miss, usual_miss = (
            np.linalg.norm(np.tensordot(told - target[used], lips, axes=1), axis=-1).mean()
            for told in (out[used], target[used].mean(axis=0), usual)
        )
        found["lip"].append(float(miss / own_miss))
        found["lip_usual"].append(float(miss / usual_miss))
    closed, opened, quiet = _articulation(net, voices, readout)
    middle = {k: float(np.nanmedian(v)) for k, v in found.items()}
    return Figures(
        len(motions), middle["gap"], middle["width"], float(np.mean(np.abs(found["lag"]) <= 2)), middle["spread"],
        middle["lip"], middle["lip_usual"], middle["c_gap"], middle["c_width"], closed, opened, quiet,
    )  # fmt: skip


def _articulation(net: MotionNet | MotionPair, voices: list[Spoken], readout: Readout) -> tuple[float, float, float]:
    closed, opened, quiet = [], [], []
    for spoken in voices:
        out = predict(net, spoken.rows)
        gap = np.maximum(out @ readout.gap.numpy(), 0)[: len(spoken.classes)]
        speech = spoken.classes != Viseme.SILENCE
        top = float(np.quantile(gap[speech], 0.95)) if speech.any() else 0.0
        for first, last in _runs(spoken.classes == Viseme.CLOSED):
            closed.append(gap[max(first - 2, 0) : last + 2].min() < 0.15 * top)
        for first, last in _runs(spoken.classes == Viseme.OPEN):
            opened.append(gap[first:last].max() > np.median(gap[speech]))
        for first, last in _runs(~speech):
            if last - first > 20:
                quiet.append(float(out[first + 10 : last - 5].std(axis=0).mean() / out[speech].std(axis=0).mean()))
    return tuple(float(np.mean(v)) if v else float("nan") for v in (closed, opened, quiet))  # type: ignore[return-value]


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


# --- commands ---------------------------------------------------------------------------------------------------------


def main() -> None:
    usual = Options()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["basis", "train", "evaluate"])
    parser.add_argument("--data", type=Path, default=Path("work/data"), help="packed clips and voices")
    parser.add_argument("--weights", type=Path, default=Path("work/weights"))
    parser.add_argument("--name", default="motion", help="of the weights file")
    parser.add_argument("--second", help="evaluate: the weights file to hear with it as a pair")
    parser.add_argument("--start", type=Path, help="weights to go on from")
    parser.add_argument(
        "--middle", action="store_true", help="save the mean of the weights of --start and of those learned"
    )
    parser.add_argument("--iterations", type=int, default=usual.iterations)
    parser.add_argument("--rate", type=float, default=usual.rate, help="of learning, at its highest")
    parser.add_argument("--decay", type=float, default=usual.decay, help="of the weights")
    parser.add_argument("--channels", type=int, default=usual.channels)
    parser.add_argument("--hidden", type=int, help="channels within a block, if not as many")
    parser.add_argument("--dropout", type=float, default=usual.dropout)
    parser.add_argument("--articulation", type=float, default=usual.articulation)
    parser.add_argument("--taught", type=float, default=usual.taught, help="how much the teacher counts")
    parser.add_argument("--batch", type=int, default=usual.batch, help="windows of clips")
    parser.add_argument("--synthetic", type=int, default=usual.synthetic, help="windows of synthetic speech")
    parser.add_argument("--recorded", type=int, default=usual.recorded, help="windows of recorded speech")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="a small network, a few iterations")
    add_options(parser)
    args = parser.parse_args()
    machine = machine_of(args)
    if args.middle and args.start is None:
        parser.error("--middle needs --start, the other weights of the mean.")
    torch.set_num_threads(args.threads)
    basis_path, weights_path = args.weights / "beaver_basis.npz", args.weights / f"{args.name}.pt"
    if args.step == "basis":
        write_basis(learn_basis(load_all(args.data), BASIS_SIZE), basis_path)
        return
    basis = read_basis(basis_path)
    motions, voices = load_all(args.data, basis), load(args.data / "voices.npz")
    held = max(len(voices) // 10, 1)  # sentences that measure
    trained = [m for m in motions if m.row.split == "train" and m.targets()[1].sum() > 10]
    if args.step == "train":
        options = Options(
            iterations=6 if args.smoke else args.iterations,
            channels=32 if args.smoke and args.start is None else args.channels,
            hidden=args.hidden,
            dropout=args.dropout,
            articulation=args.articulation,
            taught=args.taught,
            batch=args.batch,
            synthetic=args.synthetic,
            recorded=args.recorded,
            rate=args.rate,
            decay=args.decay,
            seed=args.seed,
        )
        lessons = read_lessons(args.data / "taught.npz")
        heard = {voice_name(i): v for i, v in enumerate(voices) if i >= held}
        recordings = load_recordings(args.data / "recordings.npz") if options.recorded else []
        if options.recorded and recording_name(len(recordings) - 1) not in lessons:
            parser.error(
                f"{args.data} has no recordings, or none in taught.npz: run training.recordings, then the teacher."
            )
        recorded = {recording_name(i): rows_of(sound) for i, sound in enumerate(recordings)}
        net = train(trained, heard, lessons, basis, options, weights_path, args.start, machine, recorded)
        amount = gain(net, trained, Readout.of(basis))
        state = net.state_dict()
        for key in ("head.2.weight", "head.2.bias"):
            state[key].mul_(amount)
        if args.middle:
            known = torch.load(args.start, map_location="cpu", weights_only=True)
            state = middle(state, known if args.hidden is None else narrowed(known, args.hidden))
        torch.save(state, weights_path)
        print(f"gain {amount:.2f}")
    heard_net: MotionNet | MotionPair = load_net(weights_path)
    if args.second is not None:
        second = load_net(args.weights / f"{args.second}.pt")
        heard_net = MotionPair(load_net(weights_path), second, Readout.of(basis).gap).eval()
    unmet = [m for m in motions if m.row.split == "validate" and m.row.seconds > 2 and m.targets()[1].sum() > 25]
    result = asdict(figures(heard_net, unmet, voices[:held], basis, usual_mouth(trained)))
    print(json.dumps({k: round(v, 3) if np.isfinite(v) else None for k, v in result.items()}))


def load_net(path: Path) -> MotionNet:
    """The network of a weights file, of the size that its tensors tell."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    return MotionNet.of(state).eval()


if __name__ == "__main__":
    main()
