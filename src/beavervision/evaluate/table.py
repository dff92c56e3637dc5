"""The table of quality scores: each talker's own footage dubbed with their own sound, real video beside it.

The pictures are the person's own, so that heads and light are the same and the pixels pair with the truth's; the mouth is drawn
anew from the sound alone. The control is the same clip as it comes back from the same encoder, undrawn: it shows which score a
perfect mouth would get by these measures. Articulation is measured once, on the sample portrait: real clips have no times
of phones.
"""

from __future__ import annotations

import tempfile
import wave
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from beavervision.errors import InputError
from beavervision.evaluate.articulation import ArticulationReport, articulation
from beavervision.evaluate.follow import TalkerRow, Told, encode_again, over_clips, talker_rows
from beavervision.evaluate.plots import Dots, Panel
from beavervision.evaluate.quality import Comparison, compare, quality
from beavervision.evaluate.samples import portrait
from beavervision.evaluate.sync import SyncJudge
from beavervision.pipeline import Pipeline
from beavervision.stages.decode import read_audio

ROWS = {"made": "beaver", "real": "real video"}
_RATE_HZ = 48_000
_FIGURES = {  # field of Scored: its name, how it is written, the goal
    "quality": ("quality", "{:.3f}", None),
    "opening_r": ("opening r", "{:.2f}", 0.65),
    "width_r": ("width r", "{:.2f}", 0.5),
    "lag_ms": ("lag ms", "{:+.0f}", 0.0),
    "lmd": ("LMD", "{:.3f}", None),
    "psnr_db": ("PSNR dB", "{:.1f}", None),
    "ssim": ("SSIM", "{:.3f}", None),
    "sharpness": ("sharpness", "{:.2f}", 1.0),
    "flicker": ("flicker", "{:.2f}", 1.3),
    "flicker_inside": ("of lips", "{:.2f}", None),
    "flicker_ring": ("of ring", "{:.2f}", None),
    "sync_offset_ms": ("scorer ms", "{:+.0f}", 0.0),
    "sync_confidence": ("confidence", "{:.2f}", None),
}


@dataclass(frozen=True, slots=True)
class Scored:
    """The measures of :mod:`beavervision.evaluate.quality` and the sync scorer's; None where one could not be taken."""

    quality: float
    opening_r: float | None
    width_r: float | None
    lag_ms: float | None
    lmd: float
    psnr_db: float | None
    ssim: float | None
    sharpness: float | None
    flicker: float | None
    flicker_inside: float | None
    flicker_ring: float | None
    sync_offset_ms: float | None
    sync_confidence: float | None


@dataclass(frozen=True, slots=True)
class ClipScored:
    """One clip: its own footage with the mouth made from its sound, and as it is."""

    file: str
    made: Scored
    real: Scored


@dataclass(frozen=True, slots=True)
class TableReport:
    """All clips; `left_out` has those that could not be measured, with the reason."""

    split: str
    model: dict[str, Any]
    clips: tuple[ClipScored, ...]
    articulation: ArticulationReport
    left_out: dict[str, str]

    def median(self, kind: str, figure: str) -> float | None:
        """Over the clips that have it, of ``made`` or ``real``."""
        values = [v for clip in self.clips if (v := getattr(getattr(clip, kind), figure)) is not None]
        return round(median(values), 4) if values else None

    @property
    def articulated(self) -> float:
        """The score of the median clip with the articulation in it; `median` has the one without."""
        return quality(self._median_clip(), self.articulation).score

    def _median_clip(self) -> Comparison:
        o, w, lag, lmd, sharp, flicker = (
            self.median("made", name) for name in ("opening_r", "width_r", "lag_ms", "lmd", "sharpness", "flicker")
        )
        return Comparison(o, w, None, lag, lmd or 0.0, None, None, sharp, flicker, len(self.clips))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "split": self.split,
            "model": self.model,
            "clips": len(self.clips),
            **{f"median_{kind}": {name: self.median(kind, name) for name in _FIGURES} for kind in ROWS},
            "quality_with_articulation": round(self.articulated, 4),
            "articulation": self.articulation.as_dict(),
            "per_clip": [asdict(clip) for clip in self.clips],
            "left_out": self.left_out,
        }


def table(
    folder: Path | str,
    split: str = "validate",
    *,
    limit: int | None = None,
    model: str | None = None,
    device: str | None = None,
    allow_non_commercial: bool = False,
    on_progress: Told | None = None,
) -> TableReport:
    """Score the clips of `split` that last two seconds or more; arguments and errors as
    :func:`beavervision.evaluate.follow.follow`.
    """
    folder = Path(folder)
    rows = talker_rows(folder, split, limit)
    pipeline = Pipeline(model, device=device, allow_non_commercial=allow_non_commercial)
    judge = SyncJudge()
    facts: dict[str, Any] = {}

    def one(row: TalkerRow) -> ClipScored:
        nonlocal facts
        source = folder / row.file
        with tempfile.TemporaryDirectory(prefix="beavervision-quality-") as scratch:
            sound, made, real = (Path(scratch) / name for name in ("sound.wav", "made.mp4", "real.mp4"))
            _write_sound(source, row.late_s, sound)
            facts = pipeline.lipsync(source, made, audio=sound, fit="trim").model
            encode_again(source, real, pipeline)
            scored = _scored(made, source, made, judge), _scored(real, source, source, judge, row.late_s)
        return ClipScored(row.file, *scored)

    clips, left_out = over_clips(f"{folder}: no clip of {split!r}", rows, one, on_progress)
    with portrait() as face:
        spoken = articulation(pipeline, face, by_ear=True)
    return TableReport(split, facts, tuple(clips), spoken, left_out)


def _scored(made: Path, truth: Path, heard: Path, judge: SyncJudge, late_s: float = 0.0) -> Scored:
    """`made` against `truth`; `heard` is what the sync scorer is given, whose sound is `late_s` late."""
    compared = compare(made, truth)
    offset_ms: float | None = None
    confidence: float | None = None
    with suppress(InputError):  # too short for the scorer
        sync = judge.judge(heard)
        offset_ms, confidence = sync.offset_ms + late_s * 1e3, sync.confidence
    found: dict[str, Any] = {name: getattr(compared, name) for name in _FIGURES if hasattr(compared, name)}
    found |= {"quality": quality(compared).score, "sync_offset_ms": offset_ms, "sync_confidence": confidence}
    rounded: dict[str, Any] = {name: None if value is None else round(value, 4) for name, value in found.items()}
    return Scored(**rounded)


def _write_sound(source: Path, late_s: float, path: Path) -> None:
    """The sound of a clip as a WAV file of one channel, moved so that it is not late."""
    blocks = [block.pcm.mean(axis=0) for block in read_audio(source, _RATE_HZ)]
    pcm = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    late = round(late_s * _RATE_HZ)
    pcm = pcm[late:] if late >= 0 else np.concatenate([np.zeros(-late, np.float32), pcm])
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE_HZ)
        file.writeframes(np.round(np.clip(pcm, -1, 1) * 32767).astype("<i2").tobytes())


def format_table(report: TableReport) -> RenderableType:
    """The report for a terminal."""
    drawn = Table(title=f"{len(report.clips)} clips of {report.split}, their own footage dubbed with their own sound")
    drawn.add_column("clip")
    for heading, _, _ in _FIGURES.values():
        drawn.add_column(heading, justify="right")

    def told(name: str, value: float | None) -> str:
        return "-" if value is None else _FIGURES[name][1].format(value)

    for clip in report.clips:
        drawn.add_row(clip.file, *(told(name, getattr(clip.made, name)) for name in _FIGURES))
    drawn.add_section()
    for kind, label in ROWS.items():
        figures = (told(name, report.median(kind, name)) for name in _FIGURES)
        drawn.add_row(f"median, {label}", *figures, style="bold" if kind == "made" else "")
    right = ", ".join(
        f"{name} {share.share:.0%}" for name, share in report.articulation.shares.items() if share.share is not None
    )
    return Group(
        drawn,
        Text(f"With the articulation of the sample portrait ({right}): quality {report.articulated:.3f}."),
        *(Text(f"left out: {file} ({reason})") for file, reason in report.left_out.items()),
    )


def panels(report: TableReport) -> list[Panel]:
    """The report to be drawn: a dot for each clip."""
    drawn = []
    for figure, (title, _, goal) in _FIGURES.items():
        rows = []
        for kind, label in ROWS.items():
            values = [v for clip in report.clips if (v := getattr(getattr(clip, kind), figure)) is not None]
            rows += [Dots(label, values, control=kind == "real")] if values else []
        if rows:
            drawn.append(Panel(title, rows, goal=goal))
    return drawn
