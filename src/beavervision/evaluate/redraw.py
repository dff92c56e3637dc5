"""The renderer of the default model alone: real mouths redrawn from real motion, pixel against pixel.

Each picture is drawn twice. The first time its mouth is closed; the second time, from that picture, it is given back the shape
that it had, so that nothing of the real opening is there to copy. The references come from the other half of the clip. Two rows
stand beside it: the mouth left closed, and the real video as it comes back from the encoder, which says what the numbers of a
good picture are.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from beavervision.errors import InputError
from beavervision.evaluate.follow import TalkerRow, Told, over_clips, talker_rows
from beavervision.evaluate.plots import Dots, Panel
from beavervision.evaluate.quality import MouthPixels
from beavervision.evaluate.scores import share_changed
from beavervision.media import Clip, Patch, Picture, Reference, Region
from beavervision.models.beaver import Beaver
from beavervision.models.beaver import load as load_beaver
from beavervision.models.face import FaceNets
from beavervision.models.mesh import fit_pose
from beavervision.stages.decode import Decode, probe
from beavervision.stages.detect import Detect
from beavervision.stages.encode import Encode
from beavervision.stages.lipsync_beaver import BeaverSync, profile_of
from beavervision.stages.render import Render

_LONGEST_S = 8.0  # of a clip are used
_REFERENCE_EVERY = 6  # pictures of the other half
ROWS = {"redrawn": "redrawn", "the mouth left closed": "closed", "real video, encoded": "encoded"}


@dataclass(frozen=True, slots=True)
class Figures:
    """Medians over pictures of the mouth crop against the real one: see :mod:`beavervision.evaluate.quality`."""

    psnr_db: float
    ssim: float
    sharpness: float
    flicker: float
    flicker_inside: float
    flicker_ring: float


@dataclass(frozen=True, slots=True)
class ClipRedrawn:
    """One clip: redrawn, and for comparison with the mouth left closed, and not drawn but encoded.

    changed_outside is the share of samples, luma and chroma, outside of the masks that differ from the source before encoding.
    """

    file: str
    pictures: int
    redrawn: Figures
    closed: Figures
    encoded: Figures
    changed_outside: float


@dataclass(frozen=True, slots=True)
class RedrawReport:
    """All clips; `left_out` has those that could not be measured, with the reason."""

    split: str
    clips: tuple[ClipRedrawn, ...]
    left_out: dict[str, str]

    def median(self, kind: str) -> Figures:
        """Over clips, of ``redrawn``, ``closed`` or ``encoded``."""
        values = [asdict(getattr(clip, kind)) for clip in self.clips]
        return Figures(**{name: round(float(np.median([v[name] for v in values])), 4) for name in values[0]})

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "split": self.split,
            "clips": len(self.clips),
            "median_redrawn": asdict(self.median("redrawn")),
            "median_closed": asdict(self.median("closed")),
            "median_encoded": asdict(self.median("encoded")),
            "most_changed_outside": max(clip.changed_outside for clip in self.clips),
            "per_clip": [asdict(clip) for clip in self.clips],
            "left_out": self.left_out,
        }


def redraw(
    folder: Path | str, split: str = "validate", *, limit: int | None = None, on_progress: Told | None = None
) -> RedrawReport:
    """Redraw the first half of each clip of `split` that lasts two seconds or more; arguments and errors as
    :func:`beavervision.evaluate.follow.follow`.
    """
    rows = talker_rows(Path(folder), split, limit)
    beaver, nets = load_beaver(), FaceNets()

    def one(row: TalkerRow) -> ClipRedrawn:
        return _redraw_one(Path(folder) / row.file, row.file, beaver, nets)

    clips, left_out = over_clips(f"{folder}: no clip of {split!r}", rows, one, on_progress)
    return RedrawReport(split, tuple(clips), left_out)


def _redraw_one(path: Path, file: str, beaver: Beaver, nets: FaceNets) -> ClipRedrawn:
    tracked = list(_tracked(path, nets))
    half = len(tracked) // 2
    references = _references(tracked[half:])
    if not half or not references:
        raise InputError("its second half shows no face from the front")
    stage = BeaverSync(beaver.motion, beaver.painter, beaver.basis, profile_of(references, beaver.basis))
    redrawn, closed, encoded, pictures = MouthPixels(), MouthPixels(), MouthPixels(), 0
    render = Render(match=False)
    shut_drawn = [stage.draw(c, np.zeros_like(stage.shown(c))) for c in tracked[:half]]
    shut = list(render(iter(shut_drawn)))
    drawn = [stage.draw(_as_source(s), stage.shown(c)) for s, c in zip(shut, tracked, strict=False)]
    made = list(render(iter(drawn)))
    changed: list[float] = []
    for clip, without, again, final, coded in zip(tracked, shut, drawn, made, _encoded(tracked[:half]), strict=False):
        assert clip.track is not None
        for i, face in enumerate(clip.track.faces):
            pose = fit_pose(face.points_px) if face is not None and clip.track.strength[i] == 1 else None
            source = clip.frames.pictures[i]
            closed.take(without.frames.pictures[i], source, pose, pose, face)
            redrawn.take(final.frames.pictures[i], source, pose, pose, face)
            encoded.take(coded.frames.pictures[i], source, pose, pose, face)
            changed.append(_changed(without.frames.pictures[i], final.frames.pictures[i], again.patches[i]))
            pictures += pose is not None
    if pictures < 10 or redrawn.flicker_ratio() is None:
        raise InputError("its face is seen from the front too seldom")
    outside = round(float(np.mean(changed)), 6)
    return ClipRedrawn(file, pictures, _figures(redrawn), _figures(closed), _figures(encoded), outside)


def _encoded(clips: list[Clip]) -> list[Clip]:
    """The clips as they come back from the encoder that the product uses by default."""
    with tempfile.TemporaryDirectory(prefix="beavervision-redraw-") as scratch:
        path = Path(scratch) / "real.mp4"
        for _ in Encode().to(path)(replace(clip, track=None) for clip in clips):
            pass
        return list(Decode(len(clips[0]), extend="none")(path))


def _changed(source: Picture, made: Picture, patches: tuple[Patch, ...]) -> float:
    """The share of samples under no mask that differ."""
    mask = np.zeros(source.y.shape, bool)
    for patch in patches:
        mask[patch.region.slices[0]] |= patch.mask > 0
    mask_c = mask[::2, ::2] | mask[::2, 1::2] | mask[1::2, ::2] | mask[1::2, 1::2]
    planes = ((made.y, source.y, mask), (made.u, source.u, mask_c), (made.v, source.v, mask_c))
    counts = [int((~m).sum()) for _, _, m in planes]
    differ = [share_changed(a, b, m) * n for (a, b, m), n in zip(planes, counts, strict=True)]
    return sum(differ) / max(sum(counts), 1)


def _tracked(path: Path, nets: FaceNets) -> Iterator[Clip]:
    info = probe(path)
    most = int(_LONGEST_S * info.rate)
    with closing(Detect(nets)(Decode(extend="none")(info))) as clips:  # type: ignore[type-var]
        yield from itertools.takewhile(lambda clip: clip.frames.stop <= most, clips)


def _references(clips: list[Clip]) -> list[Reference]:
    found = []
    for clip in clips:
        assert clip.track is not None
        for i, (picture, face) in enumerate(zip(clip.frames.pictures, clip.track.faces, strict=True)):
            if face is None or clip.track.strength[i] < 1 or (clip.frames.start + i) % _REFERENCE_EVERY:
                continue
            region = Region.around(
                face.points_px, 0.12 * float(np.ptp(face.points_px[:, 1])), picture.width_px, picture.height_px
            )
            if region is not None:
                found.append(Reference(region, picture.rgb(region), face))
    return found


def _as_source(drawn: Clip) -> Clip:
    """The clip as if it had been decoded so, its faces where they were drawn."""
    assert drawn.track is not None
    faces = tuple(
        replace(face, points_px=points) if face is not None and points is not None else face
        for face, points in zip(drawn.track.faces, drawn.drawn, strict=True)
    )
    return replace(drawn, track=replace(drawn.track, faces=faces), drawn=(), opening=None)


def _figures(pixels: MouthPixels) -> Figures:
    medians = [float(np.median(v)) for v in (pixels.psnr, pixels.ssim, pixels.sharpness)]
    flicker = [pixels.flicker_ratio(where) or 0.0 for where in ("all", "inside", "ring")]
    return Figures(*(round(v, 4) for v in (*medians, *flicker)))


def format_table(report: RedrawReport) -> RenderableType:
    """The report for a terminal."""
    table = Table(title=f"{len(report.clips)} clips of {report.split}, mouths redrawn from their real motion")
    table.add_column("clip")
    for name in ("pictures", "PSNR dB", "SSIM", "sharpness", "flicker", "of lips", "of ring", "changed outside"):
        table.add_column(name, justify="right")

    def row(name: str, pictures: str, f: Figures, outside: str = "", style: str = "") -> None:
        figures = (f"{f.psnr_db:.1f}", f"{f.ssim:.3f}", f"{f.sharpness:.2f}")
        flicker = (f"{f.flicker:.2f}", f"{f.flicker_inside:.2f}", f"{f.flicker_ring:.2f}")
        table.add_row(name, pictures, *figures, *flicker, outside, style=style)

    for clip in report.clips:
        row(clip.file, str(clip.pictures), clip.redrawn, f"{clip.changed_outside:.2%}")
    table.add_section()
    for name, kind in ROWS.items():
        row(f"median, {name}", "", report.median(kind), style="bold" if kind == "redrawn" else "")
    return Group(table, *(Text(f"left out: {file} ({reason})") for file, reason in report.left_out.items()))


def panels(report: RedrawReport) -> list[Panel]:
    """The report to be drawn: a dot for each clip."""
    goals = {"psnr_db": 30.0, "ssim": 0.92, "sharpness": 1.0, "flicker": 1.3}
    names = {"psnr_db": "PSNR of the mouth, dB", "ssim": "SSIM of the mouth"}
    drawn = []
    for figure in (field.name for field in fields(Figures)):
        rows = [
            Dots(name, [getattr(getattr(clip, kind), figure) for clip in report.clips], control=kind != "redrawn")
            for name, kind in ROWS.items()
        ]
        title = names.get(figure, f"{figure.replace('_', ', ')}, made to true")
        drawn.append(Panel(title, rows, goal=goals.get(figure)))
    return drawn
