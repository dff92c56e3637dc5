"""The motion network: its basis, its training, its figures.

python -m training.motion basis     the basis of mouth motion, from the packed train clips
python -m training.motion train     the network, from the clips and the synthetic voices
python -m training.motion evaluate  the figures on the validation people, as JSON
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
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
from beavervision.models.nets.beaver import (
    MEL_BINS,
    MEL_PER_STEP,
    MotionHead,
    MotionNet,
    SoundNet,
    beginning,
)
from training.clips import AHEAD_ROWS, SILENCE, STEP_S, Motion, heard_rows, learn_basis, load_all, padded_rows
from training.lessons import COMPONENTS, Lesson, read_lessons, recording_name, voice_name
from training.machine import CPU, Machine, add_options, machine_of
from training.recordings import load as load_recordings
from training.sound import load_sound
from training.voices import Spoken, Viseme, load

BASIS_SIZE = 16
WINDOW = 100  # steps of one example
_VISEME_WEIGHTS = (0.5, 1.5, 1.5, 1.0, 1.0, 1.0, 0.5)
# Wanted over the rest mouth, in eye distances.
_CLOSED_GAP, _BITTEN_GAP, _OPEN_GAP, _ROUND_WIDTH = -0.005, 0.035, 0.075, -0.05


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
            torch.tensor(basis.opening),
            torch.tensor(basis.width),
            torch.tensor(weight / weight.sum() * len(weight), dtype=torch.float32),
        )

    def to(self, device: torch.device) -> Readout:
        return Readout(self.gap.to(device), self.width.to(device), self.weight.to(device))


# --- examples ---------------------------------------------------------------------------------------------------------

_BEFORE_STEPS = 20  # of silence that is heard before and after each sound
_PIECE = 250  # steps that are varied alike
_PLAIN = 0.15  # how often a sound is taken as it is
_STILL_WINDOWS = 64


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """Features (m, 640) of one sound, in half precision; the last row that each is told from is at `first` + i * `tempo` steps."""

    features: npt.NDArray[np.float16]
    first: float
    tempo: float


class Hearing:
    """What the sound net, which does not learn, makes of sounds: once as they are and `variants` times varied."""

    def __init__(self, sound: SoundNet, variants: int, seed: int) -> None:
        self._sound, self._variants, self._seed = sound, variants, seed

    def of(self, rows: F32, index: int) -> list[Heard]:
        """Of equalised rows (r, 64), as they are first; `index` tells one sound's variants from another's."""
        return [self.once(rows)] + [
            self._varied(rows, np.random.default_rng([self._seed, index, i])) for i in range(self._variants)
        ]

    def once(self, rows: F32) -> Heard:
        """As it is."""
        first = -_BEFORE_STEPS
        given = self._rows(rows, first, len(rows) // MEL_PER_STEP + 2 * _BEFORE_STEPS, 1.0)
        return Heard(self._hear(given), first, 1.0)

    def _varied(self, rows: F32, rng: np.random.Generator) -> Heard:
        tempo = float(np.exp(rng.uniform(-0.15, 0.15))) if rng.random() < 0.6 else 1.0
        first = -_BEFORE_STEPS - 0.5 * float(rng.integers(2))
        count = int((len(rows) // MEL_PER_STEP + 2 * _BEFORE_STEPS) / tempo)
        given = self._rows(rows, first, count, tempo)
        pieces = []
        for at in range(0, count, _PIECE):
            end = min(at + _PIECE, count)
            piece = given[:, MEL_PER_STEP * at : MEL_PER_STEP * end + self._sound.extra_rows]
            pieces.append(self._hear(augment(piece.clone(), rng)))
        return Heard(np.concatenate(pieces), first, tempo)

    def _rows(self, rows: F32, first: float, count: int, tempo: float) -> Tensor:
        context = self._sound.extra_rows
        before = first * MEL_PER_STEP - (context + 1) * tempo
        return torch.from_numpy(padded_rows(rows, before, MEL_PER_STEP * count + context, tempo)[None])

    def _hear(self, rows: Tensor) -> npt.NDArray[np.float16]:
        with torch.no_grad():
            features, _ = self._sound(rows, beginning(len(rows)))
        return np.asarray(features[0].T.numpy(), np.float16)


@dataclass(frozen=True, slots=True, eq=False)
class Sound:
    """One sound to learn from: how it is heard, what belongs to each of its steps (n, columns), and how far that counts (n,);
    synthetic speech also says what each step is, a :class:`Viseme` (n,)."""

    heard: list[Heard]
    values: F32
    weight: F32
    classes: npt.NDArray[np.int64]
    beyond: float = 0.0  # how far silence before and after it counts
    kokoro: bool = False


class Examples:
    """Random windows of sounds with what belongs to them."""

    def __init__(self, sounds: list[Sound], rng: np.random.Generator, *, by_length: bool, plain: float) -> None:
        """`by_length`: longer sounds are taken more often; `plain`: how often one is taken as it is."""
        self._sounds, self._rng, self._plain = sounds, rng, plain
        known = [min(float(s.weight.sum()), 400.0) ** 0.7 if by_length else 1.0 for s in sounds]
        self._share = np.array(known) / sum(known)

    def take(self, count: int) -> Taken:
        taken = [self._window(self._sounds[i]) for i in self._rng.choice(len(self._sounds), count, p=self._share)]
        features, values, weight, classes = zip(*taken, strict=True)
        return Taken(_stack(features), _stack(values), _stack(weight), torch.from_numpy(np.stack(classes)))

    def _window(self, sound: Sound) -> tuple[F32, F32, F32, npt.NDArray[np.int64]]:
        rng = self._rng
        varied = len(sound.heard) > 1 and rng.random() >= self._plain
        heard = sound.heard[int(rng.integers(1, len(sound.heard)))] if varied else sound.heard[0]
        length, half = len(heard.features), MotionHead.context_steps // 2
        at = int(rng.integers(-WINDOW // 4, max(length - WINDOW // 2 - 2 * half, 1)))
        features = heard.features[np.clip(at + np.arange(WINDOW + 2 * half), 0, length - 1)]
        steps = heard.first + (at + half + np.arange(WINDOW) - _ahead(half)) * heard.tempo
        last = len(sound.values) - 1
        inside = (steps >= 0) & (steps <= last)
        near = np.clip(np.round(steps).astype(int), 0, last)
        weight = np.where(inside, sound.weight[near], np.float32(sound.beyond))
        classes = np.where(inside, sound.classes[near], int(Viseme.SILENCE))
        return features.T.astype(np.float32), _between(sound.values, steps), weight, classes


@dataclass(frozen=True, slots=True, eq=False)
class Taken:
    """Features (b, 640, WINDOW + context), values (b, WINDOW, columns), weights and classes (b, WINDOW)."""

    features: Tensor
    values: Tensor
    weight: Tensor
    classes: Tensor

    def to(self, device: torch.device) -> Taken:
        return Taken(*(v.to(device) for v in (self.features, self.values, self.weight, self.classes)))


def _ahead(half: int) -> float:
    """How many steps after an output the last row lies that the middle of its features is told from."""
    return AHEAD_ROWS / MEL_PER_STEP - half


def clip_sound(motion: Motion, lesson: Lesson, heard: list[Heard]) -> Sound:
    """Columns: the clip's own motion, then the lesson. The clip's lag becomes that of the lesson."""
    motion.lag_s = lesson.lag_s
    target, weight = motion.targets()
    values = np.concatenate([target, _joined(lesson, len(target))], axis=1)
    return Sound(heard, values, weight, np.zeros(len(values), np.int64))


def said_sound(spoken: Spoken, lesson: Lesson, heard: list[Heard]) -> Sound:
    """Columns: the lesson, at rest in silence, of which the teacher knows nothing. Before and after it there is silence, which
    counts."""
    values = _joined(lesson, len(spoken.classes))
    speaks = (spoken.classes != Viseme.SILENCE).astype(np.float32)
    values[:, :BASIS_SIZE] *= np.convolve(np.pad(speaks, 2, mode="edge"), np.full(5, 0.2), "valid")[:, None]
    return Sound(heard, values, spoken.centred, spoken.classes, beyond=1.0, kokoro=spoken.kokoro)


def recorded_sound(rows: F32, lesson: Lesson, heard: list[Heard]) -> Sound:
    """Columns: the lesson."""
    values = _joined(lesson, len(rows) // MEL_PER_STEP)
    return Sound(heard, values, np.ones(len(values), np.float32), np.zeros(len(values), np.int64))


def _joined(lesson: Lesson, steps: int) -> F32:
    """Motion and features (steps, k + 64), the last step repeated where the lesson ends early."""
    both = np.concatenate([lesson.motion, lesson.features], axis=1)
    return both[np.minimum(np.arange(steps), len(both) - 1)]


def _between(values: F32, at: npt.NDArray[np.floating]) -> F32:
    low = np.clip(np.floor(at).astype(int), 0, len(values) - 2)
    part = np.clip(at - low, 0, 1)[:, None].astype(np.float32)
    return np.asarray(values[low] * (1 - part) + values[low + 1] * part, np.float32)


def _stack(arrays: Sequence[F32]) -> Tensor:
    return torch.from_numpy(np.stack(list(arrays)).astype(np.float32))


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


def still(count: int, rows: int, rng: np.random.Generator) -> Tensor:
    """Log-mel rows (count, rows, 64) in which nobody speaks: noise of any level and colour."""
    line = torch.linspace(1, -1, MEL_BINS)
    level = float(SILENCE) + _uniform(rng, count, 1, 1) * 6 + _normal(rng, count, 1, 1) * line
    return (level + torch.randn(count, rows, MEL_BINS) * 0.6 * _uniform(rng, count, 1, 1)).clamp(min=float(SILENCE))


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
    """Lips closed at p b m, nearly so at f v, open at a, narrow at w u o; at rest in silence."""
    gap, width = out @ readout.gap / 0.07, out @ readout.width / 0.07

    def mean(lack: Tensor, viseme: Viseme) -> Tensor:
        w = weight * (classes == viseme)
        return (lack * w).sum() / w.sum().clamp(min=1)

    centred = weight > 0.6
    middle = torch.where(centred, gap, torch.full_like(gap, _CLOSED_GAP / 0.07))
    return (
        mean((middle - _CLOSED_GAP / 0.07).relu(), Viseme.CLOSED)
        + 0.5 * mean((gap - _BITTEN_GAP / 0.07).relu(), Viseme.LIP_TEETH)
        + 0.3 * mean((_OPEN_GAP / 0.07 - gap).relu(), Viseme.OPEN)
        + 0.3 * mean((width - _ROUND_WIDTH / 0.07).relu(), Viseme.ROUND)
        + 0.6 * mean(out.abs().mean(-1), Viseme.SILENCE)
    )


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Kind:
    """One head: what it hears, of :data:`beavervision.models.nets.beaver.HEARS`; whether it takes every sound as it is; whether it
    also learns from the voices of Kokoro; and how much it counts in the opening of the mouth and in all else."""

    hears: str
    plain: bool = False
    kokoro: bool = True
    opening: float = 1.0
    rest: float = 1.0

    def learned_from(self, said: list[Sound]) -> list[Sound]:
        """Those of the synthetic sentences that it learns from; all, where all are Kokoro's."""
        return [sound for sound in said if self.kokoro or not sound.kokoro] or said


# Those that learn from Kokoro close the lips more often, those that do not follow people better. Who hears phones and plain rows
# follows the width of a mouth better than others do, and its opening worse.
HEADS = (
    Kind("words+phones", opening=2),
    Kind("words+phones", plain=True, opening=2),
    Kind("words", kokoro=False),
    Kind("phones+rows", plain=True, kokoro=False, opening=0, rest=2),
)


@dataclass(frozen=True, slots=True)
class Options:
    heads: tuple[Kind, ...] = HEADS
    iterations: int = 1000
    batch: int = 12
    synthetic: int = 8
    recorded: int = 12
    variants: int = 8  # of each clip; of synthetic speech half as many, of recordings a quarter
    channels: int = 128
    dropout: float = 0.3
    feature_dropout: float = 0.2
    rate: float = 2e-3
    decay: float = 0.1
    articulation: float = 0.25
    taught: float = 0.6  # how much the teacher counts
    seed: int = 0


class Student(nn.Module):
    """A head with two more ends, for training alone: one names the viseme, one the recogniser's features."""

    def __init__(self, options: Options, hears: str) -> None:
        super().__init__()
        self.head = MotionHead(
            BASIS_SIZE,
            options.channels,
            dropout=options.dropout,
            feature_dropout=options.feature_dropout,
            hears=hears,
        )
        self.viseme = nn.Conv1d(options.channels, len(Viseme), 1)
        self.features = nn.Conv1d(options.channels, COMPONENTS, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heard = self.head.listen(features)
        told: Tensor = self.head.leave(heard)
        return told.transpose(1, 2), self.viseme(heard), self.features(heard).transpose(1, 2)


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """All that is learned from."""

    clips: list[Sound]
    said: list[Sound]
    recorded: list[Sound]
    noise: Tensor  # features (b, 640, WINDOW + context) of sound in which nobody speaks

    @classmethod
    def of(
        cls,
        motions: list[Motion],
        voices: dict[str, Spoken],
        recordings: dict[str, F32],
        lessons: dict[str, Lesson],
        sound: SoundNet,
        options: Options,
    ) -> Material:
        """From clips (their lags become those of the lessons), synthetic speech, and the equalised rows of recordings."""
        clip, voice, record = (
            Hearing(sound, max(options.variants // part, 1), options.seed + part) for part in (1, 2, 4)
        )
        rng = np.random.default_rng(options.seed)
        rows = MEL_PER_STEP * (WINDOW + MotionHead.context_steps) + sound.extra_rows
        with torch.no_grad():
            noise, _ = sound(still(_STILL_WINDOWS, rows, rng), beginning(_STILL_WINDOWS))
        return cls(
            [clip_sound(m, lessons[m.row.name], clip.of(m.even, i)) for i, m in enumerate(motions)],
            [said_sound(v, lessons[n], voice.of(v.rows, i)) for i, (n, v) in enumerate(voices.items())],
            [recorded_sound(r, lessons[n], record.of(r, i)) for i, (n, r) in enumerate(recordings.items())],
            noise,
        )


def train_head(
    material: Material, readout: Readout, options: Options, index: int, machine: Machine = CPU
) -> MotionHead:
    """One of the heads; `index` sets its seed too."""
    seed = options.seed + index
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    device = machine.device
    readout = readout.to(device)
    kind = options.heads[index]
    plain = 1.0 if kind.plain else _PLAIN
    student = Student(options, kind.hears).to(device)
    said_sounds = kind.learned_from(material.said)
    sources = [
        (Examples(sounds, rng, by_length=sounds is material.clips, plain=plain), count)
        for sounds, count in (
            (material.clips, options.batch), (said_sounds, options.synthetic), (material.recorded, options.recorded)
        )
        if count
    ]  # fmt: skip
    optimiser = torch.optim.AdamW(student.parameters(), options.rate, weight_decay=options.decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, options.rate, total_steps=options.iterations, pct_start=0.1
    )
    classes_weight = torch.tensor(_VISEME_WEIGHTS, device=device)
    said = slice(options.batch, options.batch + options.synthetic)
    began = time.monotonic()
    for step in range(options.iterations):
        taken = [source.take(count).to(device) for source, count in sources]
        own = taken[0].values[..., :BASIS_SIZE]
        lesson = torch.cat([taken[0].values[..., BASIS_SIZE:], *(t.values for t in taken[1:])])
        noise = material.noise[torch.from_numpy(rng.integers(len(material.noise), size=2))].to(device)
        known = sum(len(t.features) for t in taken)  # windows that the teacher speaks of
        with machine.precision():
            told = student(torch.cat([*(t.features for t in taken), noise]))
        out, named, features = (t.float() for t in told)
        ones = torch.ones_like(out[:known, :, 0])
        loss = (
            0.6 * motion_loss(out[: options.batch], own, taken[0].weight, readout)
            + options.taught * motion_loss(out[:known], lesson[..., :BASIS_SIZE], ones, readout)
            + 0.5 * options.taught * functional.smooth_l1_loss(features[:known], lesson[..., BASIS_SIZE:])
            + 0.1 * out[known:].abs().mean()
        )
        if options.synthetic:
            spoken = taken[1]
            name = functional.cross_entropy(named[said], spoken.classes, classes_weight, reduction="none")
            loss = loss + 0.2 * (name * spoken.weight).mean()
            loss = loss + options.articulation * articulation_loss(out[said], spoken.classes, spoken.weight, readout)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if (step + 1) % 250 == 0 or step + 1 == options.iterations:
            print(f"{step + 1}: loss {loss.item():.3f}, {time.monotonic() - began:.0f} s", flush=True)
    return student.head.cpu().eval()


def train(
    motions: list[Motion],
    material: Material,
    sound: SoundNet,
    readout: Readout,
    options: Options,
    machine: Machine = CPU,
) -> MotionNet:
    """The heads, which learn apart and tell what they follow well; what they say together is brought to the size of the clips'
    motion."""
    heads = [train_head(material, readout, options, i, machine) for i in range(len(options.heads))]
    share_out(heads, options.heads, readout)
    net = MotionNet(sound, heads).eval()
    amount = gain(net, motions, readout)
    with torch.no_grad():
        for head in heads:
            for tensor in head.leave.parameters():
                tensor.mul_(amount)
    print(f"gain {amount:.2f}")
    return net


def share_out(heads: Sequence[MotionHead], kinds: Sequence[Kind], readout: Readout) -> None:
    """Weight the last layers (in place) so that the mean over all heads has of each what its kind says that it counts."""
    # Of a motion, the part that opens the mouth, and all else.
    opening = torch.outer(readout.gap, readout.gap) / readout.gap.square().sum()
    rest = torch.eye(len(opening)) - opening
    openings, rests = sum(kind.opening for kind in kinds), sum(kind.rest for kind in kinds)
    with torch.no_grad():
        for head, kind in zip(heads, kinds, strict=True):
            tells = len(heads) * (kind.opening / openings * opening + kind.rest / rests * rest)
            for tensor in head.leave.parameters():
                tensor.copy_(torch.tensordot(tells, tensor, dims=1))


def predict(net: MotionNet, rows: F32) -> F32:
    """Coefficients (n, k) for each 20 ms of all the rows of a clip."""
    steps = len(rows) // MEL_PER_STEP
    first = AHEAD_ROWS + 1 - MEL_PER_STEP - net.extra_rows
    context = padded_rows(rows, first, steps * MEL_PER_STEP + net.extra_rows)
    with torch.no_grad():
        told, _ = net(torch.from_numpy(context[None]), beginning(1))
    return np.asarray(told[0, :steps].numpy(), np.float32)


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


def figures(net: MotionNet, motions: list[Motion], voices: list[Spoken], basis: MotionBasis, usual: F32) -> Figures:
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


def _articulation(net: MotionNet, voices: list[Spoken], readout: Readout) -> tuple[float, float, float]:
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
    parser.add_argument("--data", type=Path, default=Path("work/data"), help="packed clips, voices and recordings")
    parser.add_argument("--weights", type=Path, default=Path("work/weights"), help="has sound.pt and the basis")
    parser.add_argument("--name", default="motion", help="of the weights file")
    parser.add_argument("--iterations", type=int, default=usual.iterations, help="of each head")
    parser.add_argument("--rate", type=float, default=usual.rate, help="of learning, at its highest")
    parser.add_argument("--decay", type=float, default=usual.decay, help="of the weights")
    parser.add_argument("--channels", type=int, default=usual.channels)
    parser.add_argument("--dropout", type=float, default=usual.dropout)
    parser.add_argument("--articulation", type=float, default=usual.articulation)
    parser.add_argument("--taught", type=float, default=usual.taught, help="how much the teacher counts")
    parser.add_argument("--batch", type=int, default=usual.batch, help="windows of clips")
    parser.add_argument("--synthetic", type=int, default=usual.synthetic, help="windows of synthetic speech")
    parser.add_argument("--recorded", type=int, default=usual.recorded, help="windows of recorded speech")
    parser.add_argument("--variants", type=int, default=usual.variants, help="of each clip's sound")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="two small heads, a few iterations")
    add_options(parser)
    args = parser.parse_args()
    machine = machine_of(args)
    torch.set_num_threads(args.threads)
    basis_path, weights_path = args.weights / "beaver_basis.npz", args.weights / f"{args.name}.pt"
    if args.step == "basis":
        write_basis(learn_basis(load_all(args.data), BASIS_SIZE), basis_path)
        return
    basis = read_basis(basis_path)
    readout = Readout.of(basis)
    motions, voices = load_all(args.data, basis), load(args.data / "voices.npz")
    held = max(len(voices) // 10, 1)  # sentences that measure
    trained = [m for m in motions if m.row.split == "train" and m.targets()[1].sum() > 10]
    if args.step == "train":
        options = Options(
            heads=HEADS[-2:] if args.smoke else HEADS,
            iterations=6 if args.smoke else args.iterations,
            batch=args.batch,
            synthetic=args.synthetic,
            recorded=args.recorded,
            variants=1 if args.smoke else args.variants,
            channels=16 if args.smoke else args.channels,
            dropout=args.dropout,
            rate=args.rate,
            decay=args.decay,
            articulation=args.articulation,
            taught=args.taught,
            seed=args.seed,
        )
        lessons = read_lessons(args.data / "taught.npz")
        recordings = load_recordings(args.data / "recordings.npz") if options.recorded else []
        if options.recorded and recording_name(len(recordings) - 1) not in lessons:
            parser.error(
                f"{args.data} has no recordings, or none in taught.npz: run training.recordings, then the teacher, or "
                "give --recorded 0."
            )
        sound = load_sound(args.weights / "sound.pt")
        material = Material.of(
            trained,
            {voice_name(i): v for i, v in enumerate(voices) if i >= held},
            {recording_name(i): heard_rows(pcm) for i, pcm in enumerate(recordings)},
            lessons,
            sound,
            options,
        )
        net = train(trained, material, sound, readout, options, machine)
        torch.save(net.state_dict(), weights_path)
    unmet = [m for m in motions if m.row.split == "validate" and m.row.seconds > 2 and m.targets()[1].sum() > 25]
    result = asdict(figures(load_net(weights_path), unmet, voices[:held], basis, usual_mouth(trained)))
    print(json.dumps({k: round(v, 3) if np.isfinite(v) else None for k, v in result.items()}))


def load_net(path: Path) -> MotionNet:
    """The network of a weights file, of the size that its tensors tell."""
    return MotionNet.of(torch.load(path, map_location="cpu", weights_only=True)).eval()


if __name__ == "__main__":
    main()
