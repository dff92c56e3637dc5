"""Is the drawn mouth as sharp as the face around it? Real clips brought to several face sizes, driven by their own sound.

For each picture two regions are compared by the mean energy of their luma's Laplacian: the mouth (within the outer lip line)
and its ring (skin from 0.15 to 0.5 eye distances outside of that line). Real mouths have another amount of detail than
cheeks, so the figure is normalised by the footage's own:

    ratio = median of mouth / ring over the made pictures  /  median of mouth / ring over the source's pictures

1 is a mouth as sharp as the person's own, below 1 is blurrier. `mean` is the same with geometric means: an open mouth has
several times the detail of a closed one, so that a median jumps with the share of open ones. `opening` is the same for the
inside of the inner lip line alone, the part that is painted, over the pictures in which the mouth stands open. All are taken
before encoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from rich.table import Table

from beavervision.errors import InputError
from beavervision.evaluate.follow import Told, read_index
from beavervision.media import F32, U8, Clip, Picture
from beavervision.models import mesh
from beavervision.pipeline import Pipeline
from beavervision.stages.decode import Decode, read_audio

FACES_PX = (120, 250, 500)
GOAL = (0.85, 1.15)
_RING_EYES = (0.15, 0.5)  # where the ring begins and ends, outside of the outer lip line
_OPEN = 0.06  # inner lip gap in mouth widths, from which the opening is compared
_LEAST_PX = 24  # of a region
_LEAST = 5  # pictures
_ENLARGED = 1.25  # beyond which a clip is not enlarged

_LEAST_S = 1.0


@dataclass(frozen=True, slots=True)
class ClipSharpness:
    """One clip at one size of the face; opening is None where the mouth did not open in both."""

    file: str
    face_px: int
    pictures: int
    mouth: float
    mean: float
    opening: float | None


@dataclass(frozen=True, slots=True)
class SharpnessReport:
    """All clips, at all sizes."""

    clips: tuple[ClipSharpness, ...]

    def median(self, face_px: int) -> tuple[float, float | None]:
        """Of the mouths and of the openings of the clips at that size."""
        clips = [clip for clip in self.clips if clip.face_px == face_px]
        open_ones = [clip.opening for clip in clips if clip.opening is not None]
        return float(np.median([clip.mouth for clip in clips])), float(np.median(open_ones)) if open_ones else None

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(sorted({clip.face_px for clip in self.clips}))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        medians = {str(size): dict(zip(("mouth", "opening"), self.median(size), strict=True)) for size in self.sizes}
        return {"goal": list(GOAL), "median": medians, "per_clip": [asdict(clip) for clip in self.clips]}


def sharpness(
    folder: Path | str,
    split: str = "validate",
    *,
    limit: int = 6,
    pictures: int = 60,
    faces_px: tuple[int, ...] = FACES_PX,
    pipeline: Pipeline | None = None,
    on_progress: Told | None = None,
) -> SharpnessReport:
    """Measure up to `limit` clips of the split at each of `faces_px` (width of the face), `pictures` of each.

    Args:
        folder: videos and an ``index.tsv`` with the columns file, split, seconds and face_px.

    Raises:
        InputError: there is no such index, or no clip of the split in it has a face of such a size.
    """
    folder = Path(folder)

    def row(line: dict[str, str]) -> tuple[str, float, float]:
        return line["file"], float(line["face_px"]), float(line["seconds"])

    rows = [(file, px) for file, px, seconds in read_index(folder, split, row, "face_px") if seconds >= _LEAST_S]
    pipeline = pipeline or Pipeline()
    jobs = [
        (size, *row)
        for size in faces_px
        for row in sorted((r for r in rows if r[1] * _ENLARGED >= size), key=lambda r: -r[1])[:limit]
    ]
    found: list[ClipSharpness] = []
    for number, (size, file, face_px) in enumerate(jobs):
        if on_progress is not None:
            on_progress(number, len(jobs), f"{file} at {size} px")
        clip = sharpness_of(pipeline, folder / file, size, face_px, pictures)
        if clip is not None:
            found.append(clip)
    if not found:
        raise InputError(f"{folder}: no clip of {split!r} shows a face of {min(faces_px)} pixels or more.")
    return SharpnessReport(tuple(found))


def sharpness_of(
    pipeline: Pipeline,
    source: Path,
    size: int,
    face_px: float,
    pictures: int,
    audio: Path | None = None,
    look: Callable[[Picture, Picture, F32], None] | None = None,
) -> ClipSharpness | None:
    """One clip whose face is `face_px` wide, brought to `size`; None where too few pictures show it.

    `audio` drives it, its own sound if None. `look` is shown each made picture with its source and the drawn points.
    """
    sources: list[Picture] = []

    def scaled() -> Iterator[Clip]:
        extend: Any = "none" if audio is None else "loop"
        for clip in Decode(4, extend=extend)(source):
            now = tuple(_scaled(picture, size / face_px) for picture in clip.frames.pictures)
            sources.extend(now)
            yield Clip(replace(clip.frames, pictures=now))
            if len(sources) >= pictures:
                return

    own: list[tuple[float, float | None]] = []
    made: list[tuple[float, float | None]] = []
    done = 0
    for clip in pipeline.clips(scaled(), read_audio(audio or source)):
        assert clip.track is not None
        for i, (picture, face, points) in enumerate(
            zip(clip.frames.pictures, clip.track.faces, clip.drawn, strict=True)
        ):
            before = sources[clip.frames.start + i]
            if face is None or points is None or clip.track.strength[i] < 1:
                continue
            own += _energies(before, face.points_px)
            made += _energies(picture, points)
            done += 1
            if look is not None:
                look(picture, before, points)
    if done < _LEAST:
        return None
    mouth = _median([m for m, _ in made]) / _median([m for m, _ in own])
    mean = float(np.exp(np.mean([np.log(m) for m, _ in made]) - np.mean([np.log(m) for m, _ in own])))
    inside = [[o for _, o in rows if o is not None] for rows in (made, own)]
    opening = _median(inside[0]) / _median(inside[1]) if min(map(len, inside)) >= _LEAST else None
    return ClipSharpness(
        source.name, size, done, round(mouth, 3), round(mean, 3), None if opening is None else round(opening, 3)
    )


def format_table(report: SharpnessReport) -> Table:
    """The report for a terminal."""
    table = Table(title=f"sharpness of the mouth to its ring; the goal is {GOAL[0]} to {GOAL[1]}")
    for heading in ("clip", "face px", "pictures", "mouth", "mean", "opening"):
        table.add_column(heading, justify="left" if heading == "clip" else "right")
    for c in report.clips:
        style = "" if GOAL[0] <= c.mouth <= GOAL[1] else "yellow"
        table.add_row(
            c.file, str(c.face_px), str(c.pictures), f"{c.mouth:.2f}", f"{c.mean:.2f}", _shown(c.opening), style=style
        )
    table.add_section()
    for size in report.sizes:
        mouth, opening = report.median(size)
        mean = float(np.median([c.mean for c in report.clips if c.face_px == size]))
        table.add_row("median", str(size), "", f"{mouth:.2f}", f"{mean:.2f}", _shown(opening), style="bold")
    inside = [sum(GOAL[0] <= getattr(c, name) <= GOAL[1] for c in report.clips) for name in ("mouth", "mean")]
    table.add_row("inside", "", str(len(report.clips)), *map(str, inside), "", style="bold")
    return table


def _energies(picture: Picture, points_px: F32) -> list[tuple[float, float | None]]:
    """Mouth to ring, and opening to ring (None where it is closed); nothing where a region is too small."""
    eyes_px = mesh.fit_pose(points_px).scale_px
    lips = points_px[mesh.OUTER_LIP, :2]
    reach = int(np.ceil(_RING_EYES[1] * eyes_px)) + 3
    low = np.maximum(np.floor(lips.min(axis=0)).astype(int) - reach, 0)
    high = np.minimum(np.ceil(lips.max(axis=0)).astype(int) + reach, (picture.width_px, picture.height_px))
    if (high - low).min() < 8:
        return []
    luma = picture.y[low[1] : high[1], low[0] : high[0]]
    energy = cv2.Laplacian(luma, cv2.CV_32F) ** 2
    mouth = _filled(lips - low, luma.shape)
    away = cv2.distanceTransform(1 - mouth, cv2.DIST_L2, 5)
    ring = (away > _RING_EYES[0] * eyes_px) & (away < _RING_EYES[1] * eyes_px)
    inside = _filled(points_px[mesh.INNER_LIP, :2] - low, luma.shape) > 0
    if mouth.sum() < _LEAST_PX or ring.sum() < _LEAST_PX:
        return []
    around = float(energy[ring].mean()) + 1e-3
    is_open = mesh.opening(points_px) > _OPEN and inside.sum() >= _LEAST_PX
    return [(float(energy[mouth > 0].mean()) / around, float(energy[inside].mean()) / around if is_open else None)]


def _filled(points: F32 | npt.NDArray[np.float64], shape: tuple[int, ...]) -> U8:
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.round(points - 0.5).astype(np.int32)], 1)
    return mask


def _scaled(picture: Picture, scale: float) -> Picture:
    width, height = (max(2, round(side * scale / 2) * 2) for side in (picture.width_px, picture.height_px))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    y, u, v = (
        np.asarray(cv2.resize(plane, size, interpolation=how), np.uint8)
        for plane, size in (
            (picture.y, (width, height)),
            (picture.u, (width // 2, height // 2)),
            (picture.v, (width // 2, height // 2)),
        )
    )
    return Picture(y, u, v, picture.color)


def _median(values: list[float]) -> float:
    return float(np.median(values))


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
