"""Do sound and lips agree, and at which offset? The project's own scorer, for videos without a truth to compare with."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table

from beavervision.errors import InputError
from beavervision.evaluate.plots import Dots, Line, Panel
from beavervision.evaluate.scores import off_the_step
from beavervision.evaluate.tracks import FaceTrace, face_trace
from beavervision.media import F32
from beavervision.models.basis import AMPLITUDES, GAP_STD, REST_SHARE, MotionBasis
from beavervision.models.cards import SYNC_SCORER, load_data
from beavervision.models.face import FaceNets
from beavervision.models.mesh import gaps
from beavervision.models.runtime import OnnxNet
from beavervision.models.sync import REACH, ROWS, SOUND_RMS, STEPS
from beavervision.stages.decode import read_audio
from beavervision.stages.hear import LOG_MEL

STEP_S = 0.02
_HOP, _FINE_HOP = 25, 5  # steps between windows
_CLEAR, _AWAY = 0.5, 5  # how far an offset must stand out among those at least so many steps away
_SPEECH_HZ = 16_000
_SEEN = 0.8  # of a window's pictures must show the face


@dataclass(frozen=True, slots=True)
class SyncWindow:
    """Three seconds from `start_s` on; offset_ms is positive where the lips are late."""

    start_s: float
    offset_ms: float
    confidence: float


@dataclass(frozen=True, slots=True)
class SyncReport:
    """offset_ms and confidence are those of `scores`: for each offset of `offsets_ms`, the mean over all windows.

    confidence is the best score less the median one over all offsets; agreement is the score at offset 0 less the same.
    """

    offset_ms: float
    confidence: float
    agreement: float
    windows: tuple[SyncWindow, ...]
    scores: tuple[float, ...]

    @property
    def offsets_ms(self) -> list[float]:
        """Of `scores`: how late the lips would be."""
        return [round((REACH - i) * STEP_S * 1e3, 1) for i in range(len(self.scores))]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"offsets_ms": self.offsets_ms}


class SyncJudge:
    """The scorer, loaded."""

    def __init__(self, nets: FaceNets | None = None) -> None:
        """`nets` are those that find faces, loaded anew if None. Raises ModelError where a shipped file is damaged."""
        self._net = OnnxNet(load_data(SYNC_SCORER.files[0]), name=SYNC_SCORER.name)
        self._basis = MotionBasis.parse(load_data("beaver_basis.npz"))
        self._faces = nets or FaceNets()

    def judge(self, video: Path | str) -> SyncReport:
        """The agreement of sound and lips in a video of one speaker, up to ±0.6 s.

        Raises:
            InputError: it has no sound, or no three seconds in which a face is seen and sound surrounds it.
            MediaError: it cannot be read, or is a still.
        """
        scores, starts = self._windows(Path(video), face_trace(video, self._faces))
        if not scores:
            needed = (STEPS + 2 * REACH) * STEP_S
            raise InputError(f"{video}: there are no {needed:g} seconds of one face and sound. Give a longer video.")
        offset_ms, confidence = _peak(mean := np.mean(scores, axis=0))
        return SyncReport(
            offset_ms,
            confidence,
            round(float(mean[REACH] - np.median(mean)), 4),
            tuple(SyncWindow(round(s, 3), *_peak(score)) for s, score in zip(starts, scores, strict=True)),
            tuple(round(float(score), 4) for score in mean),
        )

    def sound_late_s(self, video: Path | str, faces: FaceTrace) -> float | None:
        """How late the sound of a real clip of two seconds or more is, in seconds; None where no offset stands out. `faces` are
        those of the clip.

        Raises:
            InputError: a face is seen too seldom.
            MediaError: it cannot be read.
        """
        scores, _ = self._windows(Path(video), faces, around=STEPS // 2 + REACH, hop=_FINE_HOP)
        if not scores:
            return None
        mean = np.mean(scores, axis=0)
        best = int(np.argmax(mean))
        away = np.abs(np.arange(len(mean)) - best) >= _AWAY
        if mean[best] - mean[away].max() < _CLEAR:
            return None
        return round((best + off_the_step(mean, best) - REACH) * STEP_S, 3)

    def _windows(
        self, video: Path, faces: FaceTrace, around: int = 0, hop: int = _HOP
    ) -> tuple[list[F32], list[float]]:
        """The scores (offsets,) of each window of `video`, and when it starts, in seconds; there are `around` steps of silence
        before and after it, and in a clip that is shorter than a window all of it may count."""
        times_s, points = faces.times_s[faces.seen], faces.points[faces.seen]
        if len(times_s) < 15:
            raise InputError(f"{video}: a face is seen too seldom to judge its lips.")
        lips = self._motion(points)
        silence = np.zeros(round(around * STEP_S * _SPEECH_HZ), np.float32)
        rows = LOG_MEL.rows(np.concatenate([silence, _sound(video), silence]))
        steps = (np.arange(len(rows) // 2) - around) * STEP_S
        values = np.stack([np.interp(steps, times_s, column) for column in lips.T], axis=1).astype(np.float32)
        after = np.clip(np.searchsorted(times_s, steps), 1, len(times_s) - 1)
        away_s = np.minimum(np.abs(times_s[after] - steps), np.abs(times_s[after - 1] - steps))
        seen = away_s < 2 * (faces.times_s[1] - faces.times_s[0])
        least = _SEEN * (min(float(seen.sum() / STEPS), 1.0) if around else 1.0)
        scores, starts = [], []
        for first in range(REACH, len(values) - STEPS - REACH + 1, hop):
            if seen[first : first + STEPS].mean() < least:
                continue
            nearby = rows[2 * (first - REACH) :][:ROWS]
            (out,) = self._net(nearby[None], values[None, first : first + STEPS])
            scores.append(np.asarray(out[0], np.float32))
            starts.append((first - around) * STEP_S)
        return scores, starts

    def _motion(self, points: F32) -> F32:
        """Coefficients (t, k) against the person's own resting mouth, in units of an average speaker's motion."""
        gap = gaps(points)
        rest = points[gap <= np.quantile(gap, REST_SHARE)].mean(axis=0)
        amplitude = float(np.clip(gap.std() / GAP_STD, *AMPLITUDES))
        return self._basis.coefficients((points - rest)[:, self._basis.points]) / np.float32(amplitude)


def _sound(video: Path) -> F32:
    blocks = [block.pcm.mean(axis=0) for block in read_audio(video, _SPEECH_HZ)]
    pcm = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    level = float(np.sqrt(np.mean(pcm**2))) if pcm.size else 0.0
    return np.asarray(pcm * (SOUND_RMS / max(level, 1e-4)), np.float32)


def _peak(scores: F32) -> tuple[float, float]:
    """The best offset in ms, positive where the lips are late, and how far it stands out."""
    best = int(np.argmax(scores))
    # A step o of sound after the lips' own fits them best: they come early by that much.
    return round((REACH - best) * STEP_S * 1e3, 1), round(float(scores[best] - np.median(scores)), 4)


def format_table(report: SyncReport) -> RenderableType:
    """The report for a terminal."""
    table = Table()
    for name in ("from s", "lips late ms", "confidence"):
        table.add_column(name, justify="right")
    for window in report.windows:
        table.add_row(f"{window.start_s:.1f}", f"{window.offset_ms:+.0f}", f"{window.confidence:.2f}")
    table.add_section()
    table.add_row("all", f"{report.offset_ms:+.0f}", f"{report.confidence:.2f}", style="bold")
    return Group(table, f"agreement as it is: {report.agreement:.2f}")


def panels(report: SyncReport) -> list[Panel]:
    """The report to be drawn."""
    score = Line("mean of all windows", report.offsets_ms, report.scores)
    windows = report.windows
    return [
        Panel("score for each offset, lips late by ms", [score], x_name="ms"),
        Panel("best offset of each window, lips late by ms", [Dots("windows", [w.offset_ms for w in windows])], goal=0),
        Panel("its confidence", [Dots("windows", [w.confidence for w in windows])]),
    ]
