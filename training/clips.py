"""Packed clips (:mod:`training.pack`) as mouth motion over time, and the basis of that motion."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from beavervision.evaluate.follow import FOUND_S
from beavervision.media import F32, U8
from beavervision.models import mesh
from beavervision.models.basis import AMPLITUDES, GAP_STD, REST_SHARE, MotionBasis
from beavervision.models.beaver import LAST_ROW_MS, Equaliser
from beavervision.models.sync import SOUND_RMS
from beavervision.stages.hear import LOG_MEL, LOG_MEL_DENSE

STEP_S = 0.02
LATE_MS = 5  # rows that the motion network hears are centred so much after the times that they are counted by
AHEAD_ROWS = (LAST_ROW_MS - LATE_MS) // 10  # from a step's own row to the last that it hears
CROP_PX = 160
CROP_UNIT_PX = 100.0  # pixels of a crop to the distance of the eyes
CROP_CENTRE = np.array([0.0, 1.2, -0.28], np.float32)  # of the mouth, in the pose-free frame
LOWER = np.flatnonzero(mesh.canonical()[:, 1] > 0.55)  # the points that speech moves
KEPT = np.union1d(LOWER, mesh.STABLE)  # the points that a packed clip has
SILENCE = np.float32(np.log(1e-5))  # a log-mel row of digital silence
_FRONTAL_DEG = 35.0
_MAX_GAP_S = 0.08  # a step further than this from any tracked picture teaches nothing

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the talkers' index."""

    file: str
    split: str
    person: str
    seconds: float
    face_px: float
    lag_s: float

    @property
    def name(self) -> str:
        return Path(self.file).stem

    @classmethod
    def parse(cls, line: dict[str, str]) -> Row:
        seconds, lag, r = float(line["seconds"]), float(line["sync_lag_s"] or 0), float(line["sync_r"] or 0)
        known = (seconds >= 2 or r > 0.5) and abs(lag) < FOUND_S
        return cls(line["file"], line["split"], line["person"], seconds, float(line["face_px"]), lag if known else 0.0)


def read_index(folder: Path) -> list[Row]:
    with (folder / "index.tsv").open(encoding="utf-8", newline="") as file:
        return [Row.parse(line) for line in csv.DictReader(file, delimiter="\t")]


@dataclass(slots=True, eq=False)
class Motion:
    """The lower face of one clip in the pose-free frame, against the mouth at rest.

    times_s (t,) is the pictures' own clock; sound of the moment is heard `lag_s` later. moved (t, n, 3) are
    displacements of :data:`LOWER`. pcm (samples,) is the sound at 16 kHz, rows (r, 64) its log-mel,
    even (r, 64) what :func:`heard_rows` makes of it.
    """

    row: Row
    times_s: npt.NDArray[np.float64]
    tracked: BoolArray
    frontal: bool
    rest: F32
    moved: F32
    gap: F32
    pcm: F32
    rows: F32
    even: F32
    lag_s: float
    coefficients: F32 = field(default_factory=lambda: np.zeros((0, 0), np.float32))

    @property
    def amplitude(self) -> float:
        """How much this person opens the mouth, against an average speaker."""
        return float(np.clip(self.gap[self.tracked].std() / GAP_STD, *AMPLITUDES))

    def targets(self) -> tuple[F32, F32]:
        """Coefficients (n, k) of unit amplitude each 20 ms of the sound, and how far each step counts (n,)."""
        steps = np.arange(len(self.rows) // 2) * STEP_S
        times = self.times_s[self.tracked] + self.lag_s
        values = self.coefficients[self.tracked] / self.amplitude
        out = np.stack([np.interp(steps, times, v) for v in values.T], axis=1).astype(np.float32)
        after = np.clip(np.searchsorted(times, steps), 0, len(times) - 1)
        away = np.minimum(np.abs(times[after] - steps), np.abs(times[np.maximum(after - 1, 0)] - steps))
        return out, (away < _MAX_GAP_S).astype(np.float32) * (1.0 if self.frontal else 0.3)


def load_motion(row: Row, data: Path) -> Motion | None:
    """None where the face was lost too often or the clip is too short to tell its rest mouth."""
    with np.load(data / f"{row.name}.npz") as raw:
        tracked = raw["presence"] > 0.5
        if tracked.mean() < 0.8 or tracked.sum() < 15:
            return None
        points, times, pcm = read_points(raw["points"]), raw["times_s"], raw["pcm"].astype(np.float32) / 32768
    faces = np.zeros((len(points), len(LOWER), 3), np.float32)
    yaw = np.zeros(len(points), np.float32)
    for i in np.flatnonzero(tracked):
        face = unpack_points(points[i])
        pose = mesh.fit_pose(face)
        faces[i], yaw[i] = pose.to_face(face[LOWER]), pose.yaw_deg
    gap = (faces[:, _where(mesh.INNER_LOWER[2:7]), 1] - faces[:, _where(mesh.INNER_UPPER[2:7]), 1]).mean(axis=1)
    usable = tracked & (np.abs(yaw) < _FRONTAL_DEG)
    if usable.sum() < 10:
        return None
    rest = faces[usable & (gap <= np.quantile(gap[usable], REST_SHARE))].mean(axis=0)
    pcm *= SOUND_RMS / max(float(np.sqrt(np.mean(pcm**2))), 1e-4)
    frontal = abs(float(np.median(yaw[tracked]))) <= _FRONTAL_DEG
    rows, even = LOG_MEL.rows(pcm), heard_rows(pcm)
    return Motion(row, times, tracked, frontal, rest, faces - rest, gap, pcm, rows, even, row.lag_s)


def load_all(data: Path, basis: MotionBasis | None = None) -> list[Motion]:
    """All packed clips of the index, with their coefficients if a basis is given."""
    found = (load_motion(row, data) for row in read_index(data) if (data / f"{row.name}.npz").exists())
    motions = [m for m in found if m is not None]
    if basis is not None:
        for motion in motions:
            motion.coefficients = basis.coefficients(motion.moved)
    return motions


def heard_rows(pcm: F32) -> F32:
    """The equalised log-mel rows (r, 64) of sound (samples,) at 16 kHz as the motion network hears them, 10 ms apart, the first one
    centred at :data:`LATE_MS`."""
    after = np.zeros(LOG_MEL_DENSE.hop_samples, np.float32)
    return Equaliser().push(LOG_MEL_DENSE.rows(np.append(pcm, after))[1::2])


def write_points(points: npt.NDArray[np.float16]) -> U8:
    """Points (t, n, 3) as a packed clip has them, (2, n, 3, t): their lower and their upper bytes apart, time last, which a third
    less is left of once it is compressed.
    """
    along = np.ascontiguousarray(points.transpose(1, 2, 0)).astype("<f2")
    return np.ascontiguousarray(np.moveaxis(along.view(np.uint8).reshape(*along.shape, 2), -1, 0))


def read_points(packed: U8) -> F32:
    """The points (t, n, 3) of a packed clip."""
    along = np.ascontiguousarray(np.moveaxis(packed, 0, -1)).view("<f2")[..., 0]
    return np.ascontiguousarray(along.transpose(2, 0, 1), np.float32)


def unpack_points(points: F32) -> F32:
    """The kept points (n, 3) at their places among the mesh's (468, 3); the others are 0."""
    face = np.zeros((len(mesh.canonical()), 3), np.float32)
    face[KEPT] = points
    return face


def learn_basis(motions: list[Motion], size: int) -> MotionBasis:
    """Weighted principal components of the train split's motion and its mirror image, each of unit variance.

    Points count less the farther they are from the mouth, and depth less than the other axes.
    """
    canonical = mesh.canonical()
    flipped = np.array([int(np.argmin(((canonical * [-1, 1, 1] - p) ** 2).sum(axis=1))) for p in canonical[LOWER]])
    mirror = _where(flipped)
    away = np.linalg.norm((canonical[LOWER] - canonical[[13, 14]].mean(axis=0)) * [1, 1, 0.5], axis=1)
    weight = np.repeat(np.clip(1.25 - away, 0.15, 1)[:, None], 3, axis=1) * [1, 1, 0.5]
    total, count = np.zeros((weight.size, weight.size)), 0.0
    for motion in motions:
        if motion.row.split != "train":
            continue
        moved = motion.moved[motion.tracked]
        share = 1 / np.sqrt(len(moved))
        for x in (moved, moved[:, mirror] * np.array([-1, 1, 1], np.float32)):
            flat = (x * weight).reshape(len(x), -1) * share
            total += flat.T @ flat
            count += len(x) * share**2
    values, vectors = np.linalg.eigh(total / count)
    deviation = np.sqrt(values[::-1][:size])[:, None]
    directions = vectors[:, ::-1][:, :size].T
    shapes = (directions * deviation).reshape(size, len(LOWER), 3) / weight
    solve = (directions / deviation).reshape(size, len(LOWER), 3) * weight
    basis = MotionBasis(LOWER.astype(np.intp), shapes.astype(np.float32), solve.astype(np.float32))
    sign = np.where(basis.gap.mean(axis=1) < 0, -1, 1)[:, None, None].astype(np.float32)
    return MotionBasis(basis.points, basis.shapes * sign, basis.solve * sign)


def padded_rows(rows: F32, first: float, count: int, tempo: float = 1.0) -> F32:
    """`count` rows from row `first` on, `tempo` apart; silence beyond the ends."""
    wanted = np.round(first + np.arange(count) * tempo).astype(int)
    inside = (wanted >= 0) & (wanted < len(rows))
    return np.where(inside[:, None], rows[np.clip(wanted, 0, len(rows) - 1)], SILENCE).astype(np.float32)


def _where(points: npt.NDArray[np.integer]) -> npt.NDArray[np.intp]:
    return np.searchsorted(LOWER, points)
