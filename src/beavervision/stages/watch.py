"""Watch the finished pictures go by: the facts of the track for the report, and a contact sheet to look at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np

from beavervision.errors import OutputError, UsageError
from beavervision.files import check_place, whole
from beavervision.media import U8, Clip, FaceState, Picture, Region, sample_at, to_rgb

_SHEET_TILES = 32
_TILE_PX = 320
_CURVE = 300  # values of a curve, or up to twice as many
_SILENCE_DB = -100.0


@dataclass(slots=True)
class _Curve:
    """A mean over time in bounded memory: stretches of `stride` pictures, which double when there are too many."""

    stride: int = 1
    _sums: list[float] = field(default_factory=list)
    _counts: list[int] = field(default_factory=list)

    def add(self, number: int, total: float, count: int) -> None:
        """`total` is the sum of `count` values that belong to picture `number`."""
        while number // self.stride >= 2 * _CURVE:
            self._sums = [sum(self._sums[i : i + 2]) for i in range(0, len(self._sums), 2)]
            self._counts = [sum(self._counts[i : i + 2]) for i in range(0, len(self._counts), 2)]
            self.stride *= 2
        missing = number // self.stride + 1 - len(self._sums)
        self._sums += [0.0] * missing
        self._counts += [0] * missing
        self._sums[-1] += total
        self._counts[-1] += count

    def means(self) -> list[float]:
        return [total / max(count, 1) for total, count in zip(self._sums, self._counts, strict=True)]


@dataclass(slots=True)
class Watch:
    """Notes what passes; :meth:`facts` and, with `sheet`, :meth:`write_sheet` tell of it afterwards. For one run."""

    name: ClassVar[str] = "watch"

    rate: Fraction
    sheet: bool = True
    _segments: list[tuple[FaceState, int, int]] = field(
        default_factory=list
    )  # state, first picture, one after the last
    _opening: list[float] = field(default_factory=list)
    _tiles: list[tuple[int, U8]] = field(default_factory=list)
    _stride: int = 1
    _cuts: int = 0
    _opened: _Curve = field(default_factory=_Curve)
    _power: _Curve = field(default_factory=_Curve)

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        region: Region | None = None
        for clip in clips:
            track = clip.track
            assert track is not None
            for offset, (picture, face, state) in enumerate(
                zip(clip.frames.pictures, track.faces, track.states, strict=True)
            ):
                number = clip.frames.start + offset
                if self._segments and self._segments[-1][0] is state:
                    self._segments[-1] = (state, self._segments[-1][1], number + 1)
                else:
                    self._segments.append((state, number, number + 1))
                if self.sheet and number % self._stride == 0:
                    if face is not None:
                        side = float(np.ptp(face.points_px[:, 1]))
                        region = Region.around(face.points_px, 0.15 * side, picture.width_px, picture.height_px)
                    self._keep(number, picture, region)
            if clip.opening is not None:
                self._opening += [float(v) for v in clip.opening]
            self._note_curves(clip)
            self._cuts = track.shot[-1]
            yield clip

    def _note_curves(self, clip: Clip) -> None:
        first, audio = clip.frames.start, clip.audio
        for offset in range(len(clip)):
            self._opened.add(first + offset, 0.0 if clip.opening is None else float(clip.opening[offset]), 1)
            if audio is None:
                self._power.add(first + offset, 0.0, 0)
                continue
            a, b = (sample_at(first + n, clip.frames.rate, audio.rate_hz) - audio.start for n in (offset, offset + 1))
            heard = audio.pcm[:, a:b]
            self._power.add(first + offset, float(np.vdot(heard, heard)), heard.size)

    def _keep(self, number: int, picture: Picture, region: Region | None) -> None:
        y, u, v = picture.planes(region or picture.region)
        scale = min(1.0, _TILE_PX / y.shape[0])
        half = (max(round(u.shape[1] * scale), 1), max(round(u.shape[0] * scale), 1))
        size = (2 * half[0], 2 * half[1])
        small = [
            np.asarray(cv2.resize(p, to, interpolation=cv2.INTER_AREA), np.uint8)
            for p, to in ((y, size), (u, half), (v, half))
        ]
        self._tiles.append((number, to_rgb(small[0], small[1], small[2], picture.color)))
        if len(self._tiles) > 2 * _SHEET_TILES:
            self._stride *= 2
            self._tiles = [tile for tile in self._tiles if tile[0] % self._stride == 0]

    def facts(self) -> dict[str, Any]:
        counts = dict.fromkeys((state.value for state in FaceState), 0)
        for state, first, stop in self._segments:
            counts[state.value] += stop - first
        opening = np.array(self._opening or [0.0])
        return {
            "pictures": counts,
            "cuts": self._cuts,
            "not_drawn": [
                {"state": s.value, "from_s": round(float(a / self.rate), 3), "to_s": round(float(b / self.rate), 3)}
                for s, a, b in self._segments
                if s is not FaceState.OK
            ],
            "mouth_opening": {
                "median": round(float(np.median(opening)), 4),
                "p95": round(float(np.quantile(opening, 0.95)), 4),
            },
            "series": {
                "step_s": round(float(self._opened.stride / self.rate), 6),
                "opening": [round(value, 3) for value in self._opened.means()],
                "loudness_db": [
                    round(max(10 * math.log10(power + 1e-12), _SILENCE_DB), 1) for power in self._power.means()
                ],
            },
        }

    def write_sheet(self, path: Path) -> None:
        """The contact sheet: the face over the run, each tile with its time."""
        chosen = self._tiles[:: max(1, -(-len(self._tiles) // _SHEET_TILES))][:_SHEET_TILES]
        height, width = max(t.shape[0] for _, t in chosen), max(t.shape[1] for _, t in chosen)
        tiles = []
        for number, rgb in chosen:
            tile = np.zeros((height, width, 3), np.uint8)
            tile[: rgb.shape[0], : rgb.shape[1]] = rgb
            label = f"{float(number / self.rate):.2f} s"
            for shade, thick in ((0, 3), (255, 1)):  # an outline, for bright pictures
                cv2.putText(tile, label, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (shade,) * 3, thick, cv2.LINE_AA)
            tiles.append(tile)
        columns = min(8, len(tiles))
        tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % columns)
        rows = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
        write_png(path, np.vstack(rows))


def write_png(path: Path, rgb: U8) -> None:
    """An RGB picture (h, w, 3) as a PNG file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    ok, data = cv2.imencode(".png", rgb[..., ::-1])
    assert ok
    with whole(path) as part:
        part.write_bytes(data.tobytes())


def check_sheet(path: Path) -> None:
    """Raises UsageError or OutputError where no contact sheet can be written to `path`."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: a contact sheet is a picture; name it with .png.")
    if not path.parent.is_dir():
        raise OutputError(f"The folder {path.parent} does not exist. Create it, or write elsewhere.")
    check_place(path)
