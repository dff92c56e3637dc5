"""A teacher for the motion network: a small net on the features of a frozen speech recogniser, which know phones in any voice.

    python -m training.teacher --whisper FOLDER --data work/data --weights work/weights

FOLDER has the encoder of Whisper base (Radford et al., 2022; MIT) in CTranslate2 form. The recogniser hears half a minute at once,
far too late and too costly for the product; what the teacher makes of it is what the motion network learns to foretell from
log-mel rows and a short look-ahead. Writes ``taught.npz`` into the data folder: for each train clip and each synthetic sentence
the motion and the leading components of the features; for each train clip the corrected lag of its sound.
"""

from __future__ import annotations

import argparse
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from beavervision.media import F32
from beavervision.stages.hear import RATE_HZ, FrontEnd
from training.clips import Motion, load_all
from training.lessons import COMPONENTS, Lesson, recording_name, voice_name, write_lessons
from training.motion import BASIS_SIZE, WINDOW, Readout, correct_lags, correlations, motion_loss, read_basis
from training.recordings import load as load_recordings
from training.voices import Spoken, load

WHISPER_STEP = 320  # samples; one encoder output each 20 ms
FEATURES = 512
_WINDOW_SAMPLES = 30 * RATE_HZ
_PAUSE_SAMPLES = RATE_HZ // 2  # between pieces that share a window


def _whisper_scale(power: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.log10(np.maximum(power, 1e-10))


_WHISPER_MEL = FrontEnd("whisper_mel", 80, 160, 400, 400, 0, RATE_HZ / 2, 0.0, 2, True, _whisper_scale)


class Recogniser:
    """The encoder of Whisper; features (n, 512) each 20 ms."""

    def __init__(self, folder: Path, threads: int) -> None:
        try:
            ctranslate2 = import_module("ctranslate2")
        except ImportError as error:
            raise SystemExit("The teacher needs CTranslate2: pip install ctranslate2") from error
        self._storage = ctranslate2.StorageView
        self._net: Any = ctranslate2.models.Whisper(
            str(folder), device="cpu", compute_type="int8_float32", intra_threads=threads, inter_threads=1
        )

    def _encode(self, pcm: F32) -> F32:
        rows = _WHISPER_MEL.rows(pcm)[: _WINDOW_SAMPLES // 160]
        rows = (np.maximum(rows, rows.max() - 8) + 4) / 4
        view = self._storage.from_array(np.ascontiguousarray(rows.T[None], np.float32))
        return np.asarray(np.asarray(self._net.encode(view))[0], np.float32)

    def features(self, sounds: dict[str, F32]) -> dict[str, F32]:
        """Of each sound (samples,); short ones share a window, long ones are cut."""
        out: dict[str, list[F32]] = {name: [] for name in sounds}
        shared: list[tuple[str, int, F32]] = []
        end = 0

        def flush() -> None:
            window = np.zeros(_WINDOW_SAMPLES, np.float32)
            for _, at, pcm in shared:
                window[at : at + len(pcm)] = pcm
            heard = self._encode(window)
            for name, at, pcm in shared:
                first = at // WHISPER_STEP
                out[name].append(heard[first : first - (-len(pcm) // WHISPER_STEP)])
            shared.clear()

        for name, sound in sounds.items():
            for first in range(0, len(sound), 28 * RATE_HZ):
                piece = sound[first : first + 28 * RATE_HZ]
                if end + len(piece) > _WINDOW_SAMPLES:
                    flush()
                    end = 0
                shared.append((name, end, piece))
                end -= -(len(piece) + _PAUSE_SAMPLES) // WHISPER_STEP * WHISPER_STEP
        if shared:
            flush()
        return {name: np.concatenate(parts) for name, parts in out.items()}


class TeacherNet(nn.Module):
    """Features (batch, n, 512) to coefficients (batch, n, k), both each 20 ms; hears 0.18 s to either side beyond its features."""

    def __init__(self, channels: int = 128, dropout: float = 0.3) -> None:
        super().__init__()
        self.hidden = nn.Dropout(0.2)
        self.enter = nn.Conv1d(FEATURES, channels, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm1d(channels), nn.GELU(), nn.Dropout(dropout),
                nn.Conv1d(channels, channels, 3, padding=d, dilation=d), nn.GELU(), nn.Conv1d(channels, channels, 1),
            )
            for d in (1, 2, 4, 1)
        )  # fmt: skip
        self.leave = nn.Conv1d(channels, BASIS_SIZE, 1)

    def forward(self, features: Tensor) -> Tensor:
        x: Tensor = self.enter(self.hidden(features.transpose(1, 2)))
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.leave(x).transpose(1, 2)
        return out

    def tell(self, features: F32) -> F32:
        """Coefficients (n, k) of one sound."""
        with torch.no_grad():
            return np.asarray(self(torch.from_numpy(features[None]))[0].numpy(), np.float32)


def train(motions: list[Motion], heard: dict[str, F32], readout: Readout, iterations: int, seed: int) -> TeacherNet:
    """Train on `motions`, whose lags are corrected in place two fifths of the way."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    net = TeacherNet()
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=iterations, pct_start=0.1)
    targets = [m.targets() for m in motions]
    share = np.array([min(float(w.sum()), 400.0) ** 0.7 for _, w in targets])
    share /= share.sum()
    for step in range(iterations):
        features, wanted, weights = [], [], []
        for i in rng.choice(len(motions), 24, p=share):
            known, (target, weight) = heard[motions[i].row.name], targets[i]
            steps = min(len(known), len(target))
            at = int(rng.integers(-20, max(steps - 70, 1))) + np.arange(WINDOW)
            near = np.clip(at, 0, steps - 1)
            features.append(known[near])
            wanted.append(target[near])
            weights.append((weight[near] * ((at >= 0) & (at < steps))).astype(np.float32))
        given, target_batch, weight_batch = (torch.from_numpy(np.stack(v)) for v in (features, wanted, weights))
        loss = motion_loss(net(given), target_batch, weight_batch, readout)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step + 1 == int(iterations * 0.4):
            net.eval()
            told = {m.row.name: net.tell(heard[m.row.name]) for m in motions}
            net.train()
            moved = correct_lags(told, motions, readout)
            targets = [m.targets() for m in motions]
            print(f"{step + 1}: {moved} of {len(motions)} clips have another lag", flush=True)
    return net.eval()


def figures(net: TeacherNet, motions: list[Motion], heard: dict[str, F32], readout: Readout) -> str:
    """Median correlations and the share of lags within a frame."""
    rows = []
    for motion in motions:
        (target, weight), out = motion.targets(), net.tell(heard[motion.row.name])
        steps = min(len(out), len(target))
        out, target, weight = out[:steps], target[:steps], weight[:steps]
        gap, width = readout.gap.numpy(), readout.width.numpy()
        found = correlations(out @ gap, target @ gap, weight, 20)
        rows.append(
            (found[20], correlations(out @ width, target @ width, weight, 0)[0], abs(int(found.argmax()) - 20) <= 2)
        )
    gap_r, width_r, lag = np.array(rows, np.float64).T
    return f"gap {np.median(gap_r):.3f}, width {np.median(width_r):.3f}, lag within a frame {lag.mean():.2f}"


def sounds_of(motions: list[Motion], voices: list[Spoken], recordings: list[F32]) -> dict[str, F32]:
    return (
        {m.row.name: m.pcm for m in motions}
        | {voice_name(i): v.pcm for i, v in enumerate(voices)}
        | {recording_name(i): sound for i, sound in enumerate(recordings)}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whisper", type=Path, required=True, help="folder of Whisper base in CTranslate2 form")
    parser.add_argument("--data", type=Path, default=Path("work/data"))
    parser.add_argument("--weights", type=Path, default=Path("work/weights"), help="has the basis")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a few iterations")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    basis = read_basis(args.weights / "beaver_basis.npz")
    readout = Readout.of(basis)
    motions, voices = load_all(args.data, basis), load(args.data / "voices.npz")
    began = time.monotonic()
    raw = Recogniser(args.whisper, args.threads).features(
        sounds_of(motions, voices, load_recordings(args.data / "recordings.npz"))
    )
    print(f"{len(raw)} sounds heard, {time.monotonic() - began:.0f} s", flush=True)
    teach(raw, motions, readout, 6 if args.smoke else args.iterations, args.seed, args.data / "taught.npz")


def teach(raw: dict[str, F32], motions: list[Motion], readout: Readout, iterations: int, seed: int, path: Path) -> None:
    """From features (n, 512) of each sound to the lessons."""
    trained = [m for m in motions if m.row.split == "train" and m.targets()[1].sum() > 10]
    unmet = [m for m in motions if m.row.split == "validate" and m.row.seconds > 2 and m.targets()[1].sum() > 25]
    known = np.concatenate([raw[m.row.name] for m in trained])
    mean, spread = known.mean(axis=0), known.std(axis=0) + 1e-3
    heard = {name: ((x - mean) / spread).astype(np.float32) for name, x in raw.items()}
    net = train(trained, heard, readout, iterations, seed)
    if unmet:
        print(f"unmet people: {figures(net, unmet, heard, readout)}", flush=True)
    values, vectors = np.linalg.eigh(np.cov(((known - mean) / spread).T))
    leading = (vectors[:, ::-1][:, :COMPONENTS] / np.sqrt(values[::-1][:COMPONENTS].mean())).astype(np.float32)
    lags = {m.row.name: m.lag_s for m in trained}
    unseen = {m.row.name for m in motions} - set(lags)
    write_lessons(
        {n: Lesson(net.tell(x), x @ leading, lags.get(n, 0.0)) for n, x in heard.items() if n not in unseen}, path
    )


if __name__ == "__main__":
    main()
