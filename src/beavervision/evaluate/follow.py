"""Does the mouth follow the speech? A still of each person, driven by their own sound, against their own video.

For each clip of a folder of talkers: a still is taken from it, the real pipeline makes a real file of the still and the
clip's sound, the mouth is found again in that file, and its opening and width over time are held against the clip's.
"""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from beavervision.errors import InputError, OutputError, UsageError
from beavervision.evaluate.scores import best_lag, pearson
from beavervision.media import F32, FaceState, Picture
from beavervision.models import mesh
from beavervision.models.face import FaceNets
from beavervision.pipeline import Pipeline
from beavervision.stages.decode import Decode, probe
from beavervision.stages.detect import Detect

LEAST_S = 2.0  # shorter clips are left out: neither their sound offset nor their correlation means much
_REACH_S = 0.4  # of the lag that is searched
_TURNED = 0.01  # opening (in eye distances) that a degree of turn is worth when the still is chosen

_Row = TypeVar("_Row")
Told = Callable[[int, int, str], None]  # clips done, clips in all, the file at work


@dataclass(frozen=True, slots=True, eq=False)
class MouthTrace:
    """A mouth over the pictures of a video, pose-free, in eye distances; NaN where no face was found. All (t,)."""

    times_s: npt.NDArray[np.float64]
    opening: F32
    width: F32

    def at(self, times_s: npt.NDArray[np.float64]) -> tuple[F32, F32]:
        """Opening and width at other times; NaN outside and beside pictures without a face."""
        o, w = (
            np.interp(times_s, self.times_s, v, left=np.nan, right=np.nan).astype(np.float32)
            for v in (self.opening, self.width)
        )
        return o, w


@dataclass(frozen=True, slots=True)
class ClipFollow:
    """One clip. Lags are of the made mouth against the true one, late is positive; pictures are those of the output.

    motion is how much the made mouth opens and closes against the true one (standard deviations).
    """

    file: str
    seconds: float
    opening_r: float
    width_r: float
    motion: float
    lag_pictures: int
    lag_ms: float
    lag_r: float

    @property
    def in_time(self) -> bool:
        """Within one picture."""
        return abs(self.lag_pictures) <= 1


@dataclass(frozen=True, slots=True)
class FollowReport:
    """All clips; `left_out` has those that could not be measured, with the reason."""

    split: str
    model: dict[str, Any]
    clips: tuple[ClipFollow, ...]
    left_out: dict[str, str]

    @property
    def opening_r(self) -> float:
        """The median correlation of mouth opening."""
        return _median([clip.opening_r for clip in self.clips])

    @property
    def width_r(self) -> float:
        """The median correlation of mouth width."""
        return _median([clip.width_r for clip in self.clips])

    @property
    def motion(self) -> float:
        return _median([clip.motion for clip in self.clips])

    @property
    def in_time(self) -> float:
        """The share of clips whose best lag is within one picture."""
        return sum(clip.in_time for clip in self.clips) / len(self.clips)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "split": self.split,
            "model": self.model,
            "clips": len(self.clips),
            "median_opening_r": round(self.opening_r, 4),
            "median_width_r": round(self.width_r, 4),
            "median_motion": round(self.motion, 4),
            "share_in_time": round(self.in_time, 4),
            "per_clip": [asdict(clip) | {"in_time": clip.in_time} for clip in self.clips],
            "left_out": self.left_out,
        }


def follow(
    folder: Path | str,
    split: str = "validate",
    *,
    limit: int | None = None,
    model: str | None = None,
    device: str | None = None,
    allow_non_commercial: bool = False,
    on_progress: Told | None = None,
) -> FollowReport:
    """Measure how the mouth follows over the clips of `split` that last two seconds or more.

    Args:
        folder: videos and an ``index.tsv`` with the columns file, split, seconds and sync_lag_s (how many seconds the
            clip's sound is late; empty for 0).
        limit: measure so many clips only, spread evenly over the index.
        model, device: as in the settings if None.

    Raises:
        InputError: there is no such index, or no clip of the split in it could be measured.
        BeaverVisionError: the model cannot be loaded.
    """
    folder = Path(folder)
    rows = talker_rows(folder, split, limit)
    pipeline = Pipeline(model, device=device, allow_non_commercial=allow_non_commercial)
    nets = FaceNets()
    clips: list[ClipFollow] = []
    left_out: dict[str, str] = {}
    facts: dict[str, Any] = {}
    for number, row in enumerate(rows):
        if on_progress is not None:
            on_progress(number, len(rows), row.file)
        try:
            with tempfile.TemporaryDirectory(prefix="beavervision-follow-") as scratch:
                clip, facts = _follow_one(pipeline, nets, folder / row.file, row, Path(scratch))
            clips.append(clip)
        except InputError as error:
            left_out[row.file] = str(error)
    if not clips:
        raise InputError(f"{folder}: no clip of {split!r} could be measured ({next(iter(left_out.values()))}).")
    return FollowReport(split, facts, tuple(clips), left_out)


def mouth_trace(path: Path | str, nets: FaceNets) -> tuple[MouthTrace, Picture | None]:
    """The mouth of the largest face over a video, and its picture that is most frontal and closed (None without one).

    Raises:
        MediaError: the file cannot be read.
    """
    info = probe(path)
    opening: list[float] = []
    width: list[float] = []
    best: tuple[float, Picture | None] = (math.inf, None)
    for clip in Detect(nets)(Decode(extend="none")(info)):
        assert clip.track is not None
        for picture, face, state in zip(clip.frames.pictures, clip.track.faces, clip.track.states, strict=True):
            if face is None:
                opening.append(math.nan)
                width.append(math.nan)
                continue
            pose = mesh.fit_pose(face.points_px)
            points = pose.to_face(face.points_px)
            opening.append(float((points[mesh.INNER_LOWER[2:7], 1] - points[mesh.INNER_UPPER[2:7], 1]).mean()))
            width.append(float(points[mesh.OUTER_CORNERS[1], 0] - points[mesh.OUTER_CORNERS[0], 0]))
            cost = opening[-1] + _TURNED * (abs(pose.yaw_deg) + abs(pose.pitch_deg))
            if state is FaceState.OK and cost < best[0]:
                best = (cost, picture)
    times_s = np.arange(len(opening)) / float(info.rate)
    return MouthTrace(times_s, np.array(opening, np.float32), np.array(width, np.float32)), best[1]


def format_table(report: FollowReport) -> RenderableType:
    """The report for a terminal."""
    table = Table(title=f"{len(report.clips)} clips of {report.split}, driven by their own sound over a still")
    table.add_column("clip")
    for heading in ("s", "opening r", "width r", "motion", "lag ms", "r there"):
        table.add_column(heading, justify="right")
    for c in report.clips:
        figures = (f"{c.opening_r:.2f}", f"{c.width_r:.2f}", f"{c.motion:.2f}", f"{c.lag_ms:+.0f}", f"{c.lag_r:.2f}")
        table.add_row(c.file, f"{c.seconds:.1f}", *figures, style="" if c.in_time else "yellow")
    table.add_section()
    medians = (f"{report.opening_r:.3f}", f"{report.width_r:.3f}", f"{report.motion:.2f}")
    table.add_row("median", "", *medians, f"{report.in_time:.0%} within a picture", "", style="bold")
    return Group(table, *(Text(f"left out: {file} ({reason})") for file, reason in report.left_out.items()))


@dataclass(frozen=True, slots=True)
class TalkerRow:
    """A clip of an index; its sound is `late_s` late."""

    file: str
    seconds: float
    late_s: float


def read_index(folder: Path, split: str, row: Callable[[dict[str, str]], _Row], column: str) -> list[_Row]:
    """What `row` makes of the lines of `split` in a folder's ``index.tsv``; `column` is what it needs beside the usual ones.

    Raises:
        InputError: there is no index, or it lacks a column or a number.
    """
    path = folder / "index.tsv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [row(line) for line in csv.DictReader(file, delimiter="\t") if line["split"] == split]
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}. Name a folder of talkers with its index."
        ) from error
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} is no index of talkers ({error!r}): it needs file, split, seconds, {column}."
        ) from error


def talker_rows(folder: Path, split: str, limit: int | None = None) -> list[TalkerRow]:
    """The clips of `split` that last two seconds or more; `limit` of them, spread evenly over the index.

    Raises:
        InputError, UsageError: there is no such index, no such clip in it, or `limit` is none.
    """

    def row(line: dict[str, str]) -> TalkerRow:
        return TalkerRow(line["file"], float(line["seconds"]), float(line["sync_lag_s"] or 0))

    rows = [r for r in read_index(folder, split, row, "sync_lag_s") if r.seconds >= LEAST_S]
    if not rows:
        raise InputError(f"{folder / 'index.tsv'} has no clip of {LEAST_S:g} seconds or more in the split {split!r}.")
    if limit is None:
        return rows
    if limit < 1:
        raise UsageError("limit must be at least 1.")
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, limit).astype(int))]


def _follow_one(
    pipeline: Pipeline, nets: FaceNets, source: Path, row: TalkerRow, scratch: Path
) -> tuple[ClipFollow, dict[str, Any]]:
    truth, picture = mouth_trace(source, nets)
    if picture is None:
        raise InputError("no picture of it shows a face from the front")
    still, out = scratch / "still.png", scratch / "out.mp4"
    if not cv2.imwrite(str(still), cv2.cvtColor(picture.rgb(), cv2.COLOR_RGB2BGR)):
        raise OutputError(f"{still} cannot be written. Make room in the folder for temporary files.")
    report = pipeline.lipsync(still, out, audio=source, alive=False)
    made, _ = mouth_trace(out, nets)
    opening, width = truth.at(made.times_s - row.late_s)
    step_s = float(made.times_s[1] - made.times_s[0])
    lag = best_lag(made.opening, opening, round(_REACH_S / step_s))
    if lag is None:
        raise InputError("its mouth was seen too seldom, or does not move")
    known = np.isfinite(made.opening) & np.isfinite(opening)
    width_r = pearson(made.width, width)
    if not math.isfinite(width_r):
        raise InputError("its mouth was seen too seldom, or does not move")
    clip = ClipFollow(
        file=row.file,
        seconds=row.seconds,
        opening_r=round(pearson(made.opening, opening), 4),
        width_r=round(width_r, 4),
        motion=round(float(made.opening[known].std() / opening[known].std()), 4),
        lag_pictures=lag.pictures,
        lag_ms=round(lag.fine * step_s * 1e3, 1),
        lag_r=round(lag.r, 4),
    )
    return clip, report.model


def _median(values: list[float]) -> float:
    return float(np.median(values))
