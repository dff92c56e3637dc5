"""A video against its truth, and one score between 0 and 1 out of the measures there are.

The score is the weighted geometric mean of its parts, each between 0 and 1, so that no strength hides a failure:

    Q = (follow^3 * articulation^3 * sharpness^2 * flicker * untouched) ^ (1 / 10)

    follow        the mean of the correlations of mouth opening and width with the truth, each no less than 0, times
                  2 ^ -(lag / 80 ms)^2
    articulation  the mean share of closed, lip-to-teeth, rounded, open, parted and still (see articulation.py)
    sharpness     r if the mouth is blurrier than the truth, 1 / r if it is sharper (r: ratio of Laplacian energy)
    flicker       1 where it is at most that of the truth, else truth / made
    untouched     1 less the share of pixels that changed outside of the mask

A part that was not measured is left out with its weight, and named: only scores of the same parts compare. Each part is 1 for
the truth held against itself. The control row of a table is therefore not 1 by definition but the truth as it comes back
from the same encoder: ``compare(encoded_truth, truth)``.
"""

from __future__ import annotations

import math
from collections import deque
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from beavervision.errors import InputError
from beavervision.evaluate import scores
from beavervision.evaluate.articulation import ArticulationReport
from beavervision.evaluate.plots import Line, Panel
from beavervision.evaluate.scores import Lag, Signal
from beavervision.evaluate.tracks import LipTrack, lips_of, watched
from beavervision.media import F32, Face, Picture
from beavervision.models import mesh
from beavervision.models.face import FaceNets
from beavervision.pipeline import Progress
from beavervision.stages.decode import SourceInfo, probe

WEIGHTS = {"follow": 3, "articulation": 3, "sharpness": 2, "flicker": 1, "untouched": 1}
_LAG_MS = 80.0
_EQUAL_DB = 100.0  # PSNR of equal pictures
_REACH_S = 0.4  # of the lag that is searched
_CROP_EYES = 1.3  # side of the mouth crop, in eye distances
_CROP_PX = (32, 512)  # its least and greatest side
_RING_EYES = 0.2  # how far the ring reaches beyond the lips, in eye distances
_APART = 0.15  # eye distances between the two heads, beyond which pixels do not pair
_LEAST = 10  # pictures that both must show


@dataclass(frozen=True, slots=True)
class QualityScore:
    """The score with its parts; `missing` are those that were not measured."""

    score: float
    parts: dict[str, float]
    missing: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        parts = {name: round(part, 4) for name, part in self.parts.items()}
        return {"score": round(self.score, 4), "parts": parts, "missing": list(self.missing)}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A made video against the truth. None: it could not be measured, and `notes` say why.

    Correlations are of the lips' opening and width over time; lag is how late the made lips are; lmd is the mean distance
    of the lip points in eye distances, pose-free; psnr_db and ssim are of the mouth crop; sharpness and flicker are ratios,
    made to truth: flicker of the whole crop, flicker_inside of what the true lips enclose, lips included, flicker_ring of the
    skin around them. pictures counts those in which both show the face.
    """

    opening_r: float | None
    width_r: float | None
    lag_pictures: int | None
    lag_ms: float | None
    lmd: float
    psnr_db: float | None
    ssim: float | None
    sharpness: float | None
    flicker: float | None
    pictures: int
    notes: tuple[str, ...] = ()
    flicker_inside: float | None = None
    flicker_ring: float | None = None
    lips: tuple[LipTrack, LipTrack] | None = None  # made and true, on the clock of the made ones

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON; without the lips."""
        figures = asdict(replace(self, lips=None))
        del figures["lips"]
        return {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()} | {"notes": list(self.notes)}


def quality(
    comparison: Comparison | None = None,
    articulation: ArticulationReport | None = None,
    *,
    changed_outside: float | None = None,
) -> QualityScore:
    """The score out of what was measured; the formula is at the top of this module.

    Args:
        changed_outside: the share of pixels outside of the mask that differ from the source before encoding.

    Raises:
        InputError: none of the parts was measured.
    """
    parts: dict[str, float] = {}
    if comparison is not None:
        c = comparison
        if c.opening_r is not None and c.width_r is not None and c.lag_ms is not None:
            together = (max(c.opening_r, 0.0) + max(c.width_r, 0.0)) / 2
            parts["follow"] = together * 2.0 ** -((c.lag_ms / _LAG_MS) ** 2)
        if c.sharpness is not None:
            parts["sharpness"] = min(c.sharpness, 1 / c.sharpness) if c.sharpness > 0 else 0.0
        if c.flicker is not None:
            parts["flicker"] = min(1.0, 1 / c.flicker) if c.flicker > 0 else 1.0
    if articulation is not None:
        shares = [share.share for share in articulation.shares.values() if share.share is not None]
        if shares:
            parts["articulation"] = sum(shares) / len(shares)
    if changed_outside is not None:
        parts["untouched"] = 1 - changed_outside
    if not parts:
        raise InputError("Nothing of the mouth could be measured, so there is no score. Use videos that show it speak.")
    total = sum(WEIGHTS[name] for name in parts)
    score = math.prod(part ** (WEIGHTS[name] / total) for name, part in parts.items())
    return QualityScore(score, parts, tuple(name for name in WEIGHTS if name not in parts))


def compare(made: Path | str, truth: Path | str, *, on_progress: Progress | None = None) -> Comparison:
    """Measure the mouth of `made` against that of `truth`: two videos of the same words from the same start.

    How the mouth moves is compared in time, whatever the two rates are. The pixel measures need two videos of the same rate
    and size in which the head is at the same place; they pair picture by picture.

    Raises:
        MediaError: one of them cannot be read.
        InputError: the face is not seen in both at the same time.
    """
    infos = probe(made), probe(truth)
    notes: list[str] = []
    if any(info.kind == "still" for info in infos):
        raise InputError("A still has no motion to compare. Give two videos.")
    pixels = MouthPixels() if _alike(*infos) else None
    if pixels is None:
        notes.append("The videos differ in rate or size: their pixels were not compared.")
    rows: tuple[list[F32], list[F32]] = ([], [])
    blank = np.full((len(mesh.OUTER_LIP) + len(mesh.INNER_LIP), 2), np.nan, np.float32)
    with ExitStack() as stack:
        pair = [stack.enter_context(closing(watched(info.path, FaceNets()))) for info in infos]
        for count, both in enumerate(zip_longest(*pair), start=1):
            poses = [None if s is None or s[1] is None else mesh.fit_pose(s[1].points_px) for s in both]
            for seen, pose, row in zip(both, poses, rows, strict=True):
                if seen is not None:
                    row.append(blank if seen[1] is None or pose is None else lips_of(seen[1], pose))
            if pixels is not None and both[0] is not None and both[1] is not None:
                pixels.take(both[0][0], both[1][0], poses[0], poses[1], both[1][1])
            if on_progress is not None:
                on_progress(count, infos[0].frames)
    made_lips, true_lips = (LipTrack(np.stack(row), info.rate) for row, info in zip(rows, infos, strict=True))
    if pixels is not None and pixels.apart > _APART:
        pixels = None
        notes.append("The heads are at different places: the pixels were not compared.")
    return _compared(made_lips, true_lips, pixels, notes)


def format_table(comparison: Comparison, score: QualityScore) -> RenderableType:
    """Both for a terminal."""
    table = Table(title=f"{comparison.pictures} pictures against the truth")
    table.add_column("measure")
    table.add_column("value", justify="right")
    c = comparison
    for name, value, form in (
        ("correlation of opening", c.opening_r, "{:.3f}"),
        ("correlation of width", c.width_r, "{:.3f}"),
        ("lips late by, ms", c.lag_ms, "{:+.0f}"),
        ("distance of lip points, eye distances", c.lmd, "{:.4f}"),
        ("PSNR of the mouth, dB", c.psnr_db, "{:.1f}"),
        ("SSIM of the mouth", c.ssim, "{:.3f}"),
        ("sharpness, made to truth", c.sharpness, "{:.2f}"),
        ("flicker, made to truth", c.flicker, "{:.2f}"),
        ("  of the lips and what is between them", c.flicker_inside, "{:.2f}"),
        ("  of the ring around them", c.flicker_ring, "{:.2f}"),
    ):
        table.add_row(name, "-" if value is None else form.format(value))
    table.add_section()
    table.add_row(f"quality, of {', '.join(score.parts)}", f"{score.score:.3f}", style="bold")
    return Group(table, *(Text(f"Note: {note}") for note in comparison.notes))


def panels(comparison: Comparison) -> list[Panel]:
    """The lips of both over time, to be drawn."""
    if comparison.lips is None:
        return []
    made, true = comparison.lips
    times_s = (np.arange(len(made)) / float(made.rate)).tolist()

    def over_time(title: str, one: F32, two: F32) -> Panel:
        lines = [Line("made", times_s, one.tolist()), Line("true", times_s, two.tolist(), control=True)]
        return Panel(f"{title}, eye distances", lines, x_name="seconds")

    away = np.linalg.norm(made.points - true.points, axis=-1).mean(axis=-1)
    return [
        over_time("opening", made.gap, true.gap),
        over_time("width", made.width, true.width),
        Panel("distance of the lip points, eye distances", [Line("", times_s, away.tolist())], x_name="seconds"),
    ]


class MouthPixels:
    """The mouth crops of two videos, picture by picture; the crop is that of the true mouth, in both."""

    def __init__(self) -> None:
        self._last: deque[tuple[Picture, Picture, F32]] = deque(maxlen=3)  # made, true, the true lips (40, 2)
        self._size_px = 0
        self._apart: list[float] = []
        self.psnr: list[float] = []
        self.ssim: list[float] = []
        self.sharpness: list[float] = []
        self._flicker: dict[str, list[tuple[float, float]]] = {"all": [], "inside": [], "ring": []}

    def flicker_ratio(self, where: str = "all") -> float | None:
        """Made to truth, of ``all`` of the crop, ``inside`` of the lips or the ``ring`` around them.

        None where there were no three pictures in a row, or the truth is still.
        """
        if not self._flicker[where]:
            return None
        made, true = np.sqrt((np.array(self._flicker[where]) ** 2).mean(axis=0))
        return float(made / true) if true > 0 else None

    @property
    def apart(self) -> float:
        """The median distance of the heads in eye distances; 0 if unknown."""
        return float(np.median(self._apart)) if self._apart else 0.0

    def take(
        self,
        made: Picture,
        truth: Picture,
        made_pose: mesh.Pose | None,
        pose: mesh.Pose | None,
        face: Face | None,
    ) -> None:
        """One picture of each; `pose` and `face` are those of the true one."""
        if made_pose is None or pose is None or face is None:
            self._last.clear()
            return
        self._apart.append(float(np.linalg.norm((made_pose.shift_px - pose.shift_px)[:2])) / pose.scale_px)
        if not self._size_px:
            self._size_px = int(np.clip(round(_CROP_EYES * pose.scale_px), *_CROP_PX))
        matrix = _crop_matrix(pose, self._size_px)
        lips = face.points_px[np.concatenate([mesh.OUTER_LIP, mesh.INNER_LIP]), :2]
        self._last.append((made, truth, lips @ matrix[:, :2].T + matrix[:, 2]))
        ones, twos = (
            np.stack([last[i].warped_rgb(matrix, self._size_px) for last in self._last])  # type: ignore[union-attr]
            for i in range(2)
        )
        self.psnr.append(min(scores.psnr(ones[-1], twos[-1]), _EQUAL_DB))
        self.ssim.append(scores.ssim(ones[-1], twos[-1]))
        self.sharpness.append(scores.sharpness_ratio(ones[-1], twos[-1]))
        if len(self._last) == 3:
            # Of the lips before, which all three pictures were warped around by the last one's pose.
            inside, ring = _lip_masks(self._last[1][2], self._size_px)
            for where, mask in (("all", None), ("inside", inside), ("ring", ring)):
                self._flicker[where].append((scores.flicker(ones, mask), scores.flicker(twos, mask)))


def _lip_masks(lips: F32, size_px: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """What the lips enclose, themselves included, and the ring around them, in a mouth crop."""
    inside = np.zeros((size_px, size_px), np.uint8)
    cv2.fillConvexPoly(inside, cv2.convexHull(np.rint(lips).astype(np.int32)), 1)
    reach = max(1, round(_RING_EYES / _CROP_EYES * size_px))
    wide = cv2.dilate(inside, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1,) * 2))
    return inside > 0, wide > inside


def _compared(made: LipTrack, truth: LipTrack, pixels: MouthPixels | None, notes: list[str]) -> Comparison:
    points = _at(truth, np.arange(len(made)) / float(made.rate))
    both = np.isfinite(made.points[:, 0, 0]) & np.isfinite(points[:, 0, 0])
    if both.sum() < _LEAST:
        raise InputError("The two videos do not show the face at the same time. Compare videos of the same words.")
    true = LipTrack(points, made.rate)
    lag: Lag | None = scores.best_lag(made.gap, true.gap, round(_REACH_S * made.rate))
    opening_r, width_r = (_known(scores.pearson(a, b)) for a, b in ((made.gap, true.gap), (made.width, true.width)))
    if lag is None or opening_r is None or width_r is None:
        notes.append("One of the mouths does not move: correlation and lag are not known.")
    ones = np.ones(int(both.sum()), np.float32)
    return Comparison(
        opening_r=opening_r,
        width_r=width_r,
        lag_pictures=None if lag is None else lag.pictures,
        lag_ms=None if lag is None else lag.fine * float(1000 / made.rate),
        lmd=scores.landmark_distance(made.points[both], points[both], ones),
        psnr_db=_median(pixels.psnr) if pixels else None,
        ssim=_median(pixels.ssim) if pixels else None,
        sharpness=_median(pixels.sharpness) if pixels else None,
        flicker=pixels.flicker_ratio() if pixels else None,
        pictures=int(both.sum()),
        notes=tuple(notes),
        flicker_inside=pixels.flicker_ratio("inside") if pixels else None,
        flicker_ring=pixels.flicker_ratio("ring") if pixels else None,
        lips=(made, true),
    )


def _alike(made: SourceInfo, truth: SourceInfo) -> bool:
    return (made.rate, made.width_px, made.height_px) == (truth.rate, truth.width_px, truth.height_px)


def _at(track: LipTrack, times_s: Signal) -> F32:
    """The lips at other times, (t, 40, 2); NaN outside and beside pictures without a face."""
    own = np.arange(len(track)) / float(track.rate)
    flat = track.points.reshape(len(track), -1)
    columns = [np.interp(times_s, own, column, left=np.nan, right=np.nan) for column in flat.T]
    return np.stack(columns, axis=1).astype(np.float32).reshape(len(times_s), *track.points.shape[1:])


def _crop_matrix(pose: mesh.Pose, size_px: int) -> F32:
    """From picture pixels to a square around the mouth that keeps its place on the face, (2, 3)."""
    canonical = mesh.canonical()
    middle = canonical[mesh.OUTER_LIP].mean(axis=0)
    half = _CROP_EYES / 2
    corners = np.array([[-half, -half, 0], [half, -half, 0], [-half, half, 0]], np.float32) + middle
    source = pose.to_picture(corners)[:, :2].astype(np.float64)
    square = np.array([[0, 0], [size_px, 0], [0, size_px]], np.float64)
    linear = np.linalg.solve(np.hstack([source, np.ones((3, 1))]), square)
    return np.ascontiguousarray(linear.T, np.float32)


def _median(values: list[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return float(np.median(known)) if known else None


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
