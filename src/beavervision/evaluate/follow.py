"""Does the mouth follow the speech? A still of each person, or their footage in another order, driven by their own sound,
against their own video.

For each clip of a folder of talkers: a still is taken from it, or its pictures from the middle on and round again; the real
pipeline makes a real file of that and the clip's sound, the mouth is found again in that file, and its lips over time are held
against the clip's. Two controls go through the same: the clip itself as it comes back from the same encoder (what measuring
costs), and the made mouth against another clip's (what chance gives).
"""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from beavervision.errors import InputError, OutputError, UsageError
from beavervision.evaluate.plots import Dots, Panel
from beavervision.evaluate.scores import Lag, best_lag, landmark_distance, pearson
from beavervision.evaluate.sync import SyncJudge
from beavervision.evaluate.tracks import FaceTrace, face_trace, moving
from beavervision.media import F32, Clip, Frames, Picture
from beavervision.models import mesh
from beavervision.models.face import FaceNets
from beavervision.pipeline import Pipeline
from beavervision.stages.decode import Decode, probe
from beavervision.stages.encode import Encode

LEAST_S = 2.0  # shorter clips are left out: neither their sound offset nor their correlation means much
_REACH_S = 0.4  # of the lag that is searched
FOUND_S = 0.38  # a sound offset of an index from which on it lies at the end of the searched range: it was not found
CONTROLS = {"real video": "real", "another person's words": "chance"}
_BLOCK, _FOOTAGE_CRF = 8, 12  # of footage in another order: how it is written
_TURNED = 0.01  # opening (in eye distances) that a degree away from the usual turn is worth when the still is chosen

_Row = TypeVar("_Row")
_Found = TypeVar("_Found")
Told = Callable[[int, int, str], None]  # clips done, clips in all, the file at work


@dataclass(frozen=True, slots=True, eq=False)
class MouthTrace:
    """A mouth over the pictures of a video, pose-free, in eye distances; NaN where no face was found.

    times_s, opening and width are (t,); lips are its 40 points (t, 40, 2), as :func:`beavervision.evaluate.tracks.lips_of`.
    """

    times_s: npt.NDArray[np.float64]
    opening: F32
    width: F32
    lips: F32

    @classmethod
    def of(cls, faces: FaceTrace) -> MouthTrace:
        """That of faces."""
        (left, right), rings = mesh.OUTER_CORNERS, np.concatenate([mesh.OUTER_LIP, mesh.INNER_LIP])
        width = faces.points[:, right, 0] - faces.points[:, left, 0]
        return cls(faces.times_s, faces.opening, width, faces.points[:, rings, :2])

    def at(self, times_s: npt.NDArray[np.float64]) -> MouthTrace:
        """The mouth at other times; NaN outside and beside pictures without a face."""
        columns = np.column_stack([self.opening, self.width, self.lips.reshape(len(self.lips), -1)])
        moved = np.stack(
            [np.interp(times_s, self.times_s, column, left=np.nan, right=np.nan) for column in columns.T], axis=1
        ).astype(np.float32)
        return MouthTrace(times_s, moved[:, 0], moved[:, 1], moved[:, 2:].reshape(-1, *self.lips.shape[1:]))

    @property
    def mean(self) -> F32:
        """The mean mouth, (40, 2)."""
        return np.asarray(np.nanmean(self.lips, axis=0), np.float32)


@dataclass(frozen=True, slots=True)
class Control:
    """What something else than the made mouth gets by the same measures."""

    opening_r: float
    width_r: float
    in_time: bool
    lmd: float


@dataclass(frozen=True, slots=True)
class ClipFollow:
    """One clip. Lags are of the made mouth against the true one, late is positive; pictures are those of the output.

    motion is how much the made mouth opens and closes against the true one (standard deviations). lmd is the mean distance of the
    lips' points to the true ones in eye distances, pose-free; clip_mean_lmd is what the clip's own mean mouth would get, held
    still, and people_mean_lmd what the mean mouth of the other people would, None without others. real is the clip itself,
    encoded again; chance the made mouth against another person's clip, None without one. sound_late_s is how late the clip's
    sound was taken to be, offset_from who says so: "scorer" or "index".
    """

    file: str
    seconds: float
    opening_r: float
    width_r: float
    motion: float
    lag_pictures: int
    lag_ms: float
    lag_r: float
    lmd: float
    clip_mean_lmd: float
    people_mean_lmd: float | None = None
    real: Control | None = None
    chance: Control | None = None
    sound_late_s: float = 0.0
    offset_from: str = "index"

    @property
    def in_time(self) -> bool:
        """Within one picture."""
        return abs(self.lag_pictures) <= 1


@dataclass(frozen=True, slots=True)
class FollowReport:
    """All clips; `left_out` has those that could not be measured, with the reason. footage says that they were drawn over their
    own footage in another order, not over a still."""

    split: str
    model: dict[str, Any]
    clips: tuple[ClipFollow, ...]
    left_out: dict[str, str]
    footage: bool = False

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
    def lmd(self) -> float:
        """The median distance of the lips' points."""
        return _median([clip.lmd for clip in self.clips])

    @property
    def lmd_of_clip_mean(self) -> float:
        """The median of lmd against that of the clip's own mean mouth."""
        return _median([clip.lmd / clip.clip_mean_lmd for clip in self.clips])

    @property
    def lmd_of_people_mean(self) -> float | None:
        """The median of lmd against that of the mean mouth of the other people."""
        shares = [clip.lmd / clip.people_mean_lmd for clip in self.clips if clip.people_mean_lmd is not None]
        return _median(shares) if shares else None

    def control(self, kind: str) -> dict[str, float] | None:
        """The medians of ``real`` or ``chance``."""
        found: list[Control] = [c for clip in self.clips if (c := getattr(clip, kind)) is not None]
        if not found:
            return None
        medians = {n: round(_median([getattr(c, n) for c in found]), 4) for n in ("opening_r", "width_r", "lmd")}
        return medians | {"share_in_time": round(sum(c.in_time for c in found) / len(found), 4)}

    @property
    def in_time(self) -> float:
        """The share of clips whose best lag is within one picture."""
        return sum(clip.in_time for clip in self.clips) / len(self.clips)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "split": self.split,
            "over": "footage" if self.footage else "still",
            "model": self.model,
            "clips": len(self.clips),
            "median_opening_r": round(self.opening_r, 4),
            "median_width_r": round(self.width_r, 4),
            "median_motion": round(self.motion, 4),
            "share_in_time": round(self.in_time, 4),
            "median_lmd": round(self.lmd, 4),
            "median_lmd_of_clip_mean": round(self.lmd_of_clip_mean, 4),
            "median_lmd_of_people_mean": None if (share := self.lmd_of_people_mean) is None else round(share, 4),
            "real": self.control("real"),
            "chance": self.control("chance"),
            "per_clip": [asdict(clip) | {"in_time": clip.in_time} for clip in self.clips],
            "left_out": self.left_out,
        }


def follow(
    folder: Path | str,
    split: str = "validate",
    *,
    limit: int | None = None,
    footage: bool = False,
    index_offsets: bool = False,
    model: str | None = None,
    device: str | None = None,
    allow_non_commercial: bool = False,
    on_progress: Told | None = None,
) -> FollowReport:
    """Measure how the mouth follows over the clips of `split` that last two seconds or more.

    Args:
        folder: videos and an ``index.tsv`` with the columns file, split, seconds, sync_lag_s (how many seconds the
            clip's sound is late; empty for 0; 0.38 and more, to either side, is taken for not found) and, where several clips are
            of one, person.
        limit: measure so many clips only, spread evenly over the index.
        footage: draw over the clip's own pictures, from its middle on and then from its beginning, not over a still.
        index_offsets: take all offsets of the sound from the index. Otherwise the sync scorer's are taken where they stand out.
        model, device: as in the settings if None.

    Raises:
        InputError: there is no such index, or no clip of the split in it could be measured.
        BeaverVisionError: the model cannot be loaded.
    """
    folder = Path(folder)
    rows = talker_rows(folder, split, limit)
    pipeline = Pipeline(model, device=device, allow_non_commercial=allow_non_commercial)
    nets = FaceNets()
    judge = None if index_offsets else SyncJudge(nets)
    facts: dict[str, Any] = {}

    def one(row: TalkerRow) -> _Seen:
        nonlocal facts
        faces = face_trace(source := folder / row.file, nets)
        late_s = None if judge is None else judge.sound_late_s(source, faces)
        if late_s is not None:
            row = replace(row, late_s=late_s, offset_from="scorer")
        with tempfile.TemporaryDirectory(prefix="beavervision-follow-") as scratch:
            seen, facts = _follow_one(pipeline, nets, source, faces, row, Path(scratch), footage)
        return seen

    seen, left_out = over_clips(f"{folder}: no clip of {split!r}", rows, one, on_progress)
    return FollowReport(split, facts, tuple(_measured(one, seen) for one in seen), left_out, footage)


def over_clips(
    where: str, rows: Sequence[TalkerRow], measure: Callable[[TalkerRow], _Found], on_progress: Told | None
) -> tuple[list[_Found], dict[str, str]]:
    """What `measure` finds in each clip, and why the others were left out: for these it raises InputError. `where` begins the
    message if it finds nothing.

    Raises:
        InputError: no clip could be measured.
    """
    found: list[_Found] = []
    left_out: dict[str, str] = {}
    for number, row in enumerate(rows):
        if on_progress is not None:
            on_progress(number, len(rows), row.file)
        try:
            found.append(measure(row))
        except InputError as error:
            left_out[row.file] = str(error)
    if not found:
        raise InputError(f"{where} could be measured ({next(iter(left_out.values()))}).")
    return found, left_out


def mouth_trace(path: Path | str, nets: FaceNets) -> MouthTrace:
    """The mouth of the largest face over a video.

    Raises:
        MediaError: the file cannot be read, or is a still.
    """
    return MouthTrace.of(face_trace(path, nets))


def still_of(faces: FaceTrace) -> int | None:
    """The picture in which the mouth is closed and the head held as it usually is; None where no face is clear.

    Pose-free points err with the pose, each person's in another way: in another one the mouth would lie elsewhere in the face.
    """
    clear = np.flatnonzero(faces.clear & faces.seen)
    if not len(clear):
        return None
    turned = sum(np.abs(deg[clear] - np.median(deg[clear])) for deg in (faces.yaw_deg, faces.pitch_deg))
    return int(clear[np.argmin(faces.opening[clear] + _TURNED * turned)])


def format_table(report: FollowReport) -> RenderableType:
    """The report for a terminal."""
    over = "their footage, shifted" if report.footage else "a still"
    table = Table(title=f"{len(report.clips)} clips of {report.split}, driven by their own sound over {over}")
    table.add_column("clip")
    for heading in ("s", "opening r", "width r", "motion", "lag ms", "r there", "LMD", "of clip's mean", "of people's"):
        table.add_column(heading, justify="right")
    for c in report.clips:
        figures = (f"{c.opening_r:.2f}", f"{c.width_r:.2f}", f"{c.motion:.2f}", f"{c.lag_ms:+.0f}", f"{c.lag_r:.2f}")
        people = None if c.people_mean_lmd is None else c.lmd / c.people_mean_lmd
        away = (f"{c.lmd:.3f}", f"{c.lmd / c.clip_mean_lmd:.2f}", _shown(people))
        table.add_row(c.file, f"{c.seconds:.1f}", *figures, *away, style="" if c.in_time else "yellow")
    table.add_section()
    medians = (f"{report.opening_r:.3f}", f"{report.width_r:.3f}", f"{report.motion:.2f}")
    away = (f"{report.lmd:.3f}", f"{report.lmd_of_clip_mean:.2f}", _shown(report.lmd_of_people_mean))
    table.add_row("median", "", *medians, f"{report.in_time:.0%} within a picture", "", *away, style="bold")
    for name, kind in CONTROLS.items():
        if (control := report.control(kind)) is not None:
            correlations = (f"{control['opening_r']:.3f}", f"{control['width_r']:.3f}")
            in_time = f"{control['share_in_time']:.0%} within a picture"
            table.add_row(name, "", *correlations, "", in_time, "", f"{control['lmd']:.3f}", "", "")
    return Group(table, *(Text(f"left out: {file} ({reason})") for file, reason in report.left_out.items()))


def panels(report: FollowReport) -> list[Panel]:
    """The report to be drawn: a dot for each clip."""
    clips = report.clips

    def dots(name: str, goal: float | None = None) -> Panel:
        key = f"{name}_r"
        controls = {
            label: [getattr(c, key) for clip in clips if (c := getattr(clip, kind)) is not None]
            for label, kind in CONTROLS.items()
        }
        rows = [Dots("made", [getattr(clip, key) for clip in clips])]
        rows += [Dots(label, values, control=True) for label, values in controls.items() if values]
        return Panel(f"correlation of the mouth's {name}", rows, goal=goal)

    people = [clip.lmd / clip.people_mean_lmd for clip in clips if clip.people_mean_lmd is not None]
    lmd = [Dots("of the clip's own mean mouth", [clip.lmd / clip.clip_mean_lmd for clip in clips])]
    lmd += [Dots("of other people's mean mouth", people)] if people else []
    return [
        dots("opening", 0.65),
        dots("width", 0.5),
        Panel("lips late by, ms", [Dots("made", [clip.lag_ms for clip in clips])], goal=0),
        Panel("distance of the lip points, share", lmd, goal=0.6),
        Panel("motion, made to true", [Dots("made", [clip.motion for clip in clips])], goal=1),
    ]


@dataclass(frozen=True, slots=True)
class TalkerRow:
    """A clip of an index; its sound is `late_s` late, as `offset_from` says. person is the file's name where the index has
    none."""

    file: str
    seconds: float
    late_s: float
    person: str
    offset_from: str = "index"


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
        late_s = float(line["sync_lag_s"] or 0)
        known_s = late_s if abs(late_s) < FOUND_S else 0.0
        return TalkerRow(line["file"], float(line["seconds"]), known_s, line.get("person") or line["file"])

    rows = [r for r in read_index(folder, split, row, "sync_lag_s") if r.seconds >= LEAST_S]
    if not rows:
        raise InputError(f"{folder / 'index.tsv'} has no clip of {LEAST_S:g} seconds or more in the split {split!r}.")
    if limit is None:
        return rows
    if limit < 1:
        raise UsageError("limit must be at least 1.")
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, limit).astype(int))]


def one_each(rows: list[TalkerRow], count: int) -> list[TalkerRow]:
    """One clip of each person, in an order whose first `count` are spread over the index."""
    people = list({row.person: row for row in reversed(rows)}.values())[::-1]
    step = max(1, len(people) // count)
    return [row for start in range(step) for row in people[start::step]]


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """The mouths of one clip on the clock of the made video: made from its sound, true, and true but encoded again."""

    row: TalkerRow
    made: MouthTrace
    truth: MouthTrace
    real: MouthTrace
    lag: Lag
    step_s: float


def _follow_one(
    pipeline: Pipeline, nets: FaceNets, source: Path, faces: FaceTrace, row: TalkerRow, scratch: Path, footage: bool
) -> tuple[_Seen, dict[str, Any]]:
    number, truth = still_of(faces), MouthTrace.of(faces)
    if number is None:
        raise InputError("no picture of it shows a face from the front")
    out, again = scratch / "out.mp4", scratch / "again.mp4"
    if footage:
        face = _shifted(source, scratch / "shifted.mp4", len(truth.times_s))
    else:
        face = _kept(source, number, scratch / "still.png")
    report = pipeline.lipsync(face, out, audio=source, alive=False)
    made = mouth_trace(out, nets)
    encode_again(source, again, pipeline)
    times_s = made.times_s - row.late_s
    true, real = truth.at(times_s), mouth_trace(again, nets).at(times_s)
    step_s = float(made.times_s[1] - made.times_s[0])
    lag = best_lag(made.opening, true.opening, round(_REACH_S / step_s))
    if lag is None or not math.isfinite(pearson(made.width, true.width)):
        raise InputError("its mouth was seen too seldom, or does not move")
    return _Seen(row, made, true, real, lag, step_s), report.model


def _kept(source: Path, number: int, still: Path) -> Path:
    """A picture of `source`, written to `still`."""
    picture = next(islice(_pictures(source), number, None))
    if not cv2.imwrite(str(still), cv2.cvtColor(picture.rgb(), cv2.COLOR_RGB2BGR)):
        raise OutputError(f"{still} cannot be written. Make room in the folder for temporary files.")
    return still


def _pictures(source: Path) -> Iterator[Picture]:
    return chain.from_iterable(clip.frames.pictures for clip in Decode(extend="none")(source))


def _shifted(source: Path, out: Path, pictures: int) -> Path:
    """A silent video of the `pictures` of `source`: those from the middle on, then those from the beginning on."""

    def clips() -> Iterator[Clip]:
        order = chain(islice(_pictures(source), pictures // 2, None), islice(_pictures(source), pictures // 2))
        for start in range(0, pictures, _BLOCK):
            yield Clip(Frames(tuple(islice(order, _BLOCK)), start, rate))

    rate = probe(source).rate
    for _ in Encode(crf=_FOOTAGE_CRF).to(out)(clips()):
        pass
    return out


def encode_again(source: Path, out: Path, pipeline: Pipeline) -> None:
    """The pictures of a video through the encoder that `pipeline` writes with, nothing drawn: what is a control's."""
    encode = Encode(pipeline.settings.preset, pipeline.settings.crf).to(out)
    with closing(encode(Decode(extend="none")(moving(source)))) as clips:  # type: ignore[type-var]
        for _ in clips:
            pass


def _measured(one: _Seen, all_seen: list[_Seen]) -> ClipFollow:
    made, truth, row = one.made, one.truth, one.row
    others = [other for other in all_seen if other.row.person != row.person]
    known = np.isfinite(made.opening) & np.isfinite(truth.opening)
    return ClipFollow(
        file=row.file,
        seconds=row.seconds,
        opening_r=round(pearson(made.opening, truth.opening), 4),
        width_r=round(pearson(made.width, truth.width), 4),
        motion=round(float(made.opening[known].std() / truth.opening[known].std()), 4),
        lag_pictures=one.lag.pictures,
        lag_ms=round(one.lag.fine * one.step_s * 1e3, 1),
        lag_r=round(one.lag.r, 4),
        lmd=_lmd(made.lips, truth.lips),
        clip_mean_lmd=_lmd(np.broadcast_to(truth.mean, truth.lips.shape), truth.lips),
        people_mean_lmd=_lmd(np.broadcast_to(_mean_mouth(others), truth.lips.shape), truth.lips) if others else None,
        real=_control(one.real, truth, one.step_s),
        chance=_chance(one, others),
        sound_late_s=row.late_s,
        offset_from=row.offset_from,
    )


def _mean_mouth(clips: list[_Seen]) -> F32:
    """The mean of the people's mean mouths, (40, 2): each counts alike, however many clips are of one."""
    by_person: dict[str, list[F32]] = {}
    for clip in clips:
        by_person.setdefault(clip.row.person, []).append(clip.truth.mean)
    return np.asarray(np.mean([np.mean(means, axis=0) for means in by_person.values()], axis=0), np.float32)


def _chance(one: _Seen, others: list[_Seen]) -> Control | None:
    """The made mouth against the true one of the next clip that is long enough and of somebody else."""
    later = sorted(others, key=lambda other: (other.row.file < one.row.file, other.row.file))
    other = next((other for other in later if other.row.seconds >= one.row.seconds), None)
    if other is None:
        return None
    truth = MouthTrace(other.made.times_s, other.truth.opening, other.truth.width, other.truth.lips)
    return _control(one.made, truth.at(one.made.times_s), one.step_s)


def _control(mouth: MouthTrace, truth: MouthTrace, step_s: float) -> Control | None:
    """None where the two are not seen together, or do not move."""
    lag = best_lag(mouth.opening, truth.opening, round(_REACH_S / step_s))
    width_r = pearson(mouth.width, truth.width)
    opening_r = pearson(mouth.opening, truth.opening)
    if lag is None or not (math.isfinite(width_r) and math.isfinite(opening_r)):
        return None
    lmd = _lmd(mouth.lips, truth.lips)
    return Control(round(opening_r, 4), round(width_r, 4), abs(lag.pictures) <= 1, lmd)


def _lmd(made: F32, truth: F32) -> float:
    known = np.isfinite(made[:, 0, 0]) & np.isfinite(truth[:, 0, 0])
    return round(landmark_distance(made[known], truth[known], np.ones(int(known.sum()), np.float32)), 5)


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _median(values: list[float]) -> float:
    return float(np.median(values))
