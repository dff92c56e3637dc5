"""A prepared face: its pictures, its tracks and what its first look told, computed once and used by many sessions."""

from __future__ import annotations

import itertools
import json
import zipfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import cv2
import numpy as np

from beavervision.errors import MediaError, NoFaceError, OutputError, UsageError
from beavervision.live.sound import RATE_HZ
from beavervision.media import (
    F32,
    U8,
    Audio,
    Clip,
    Color,
    Face,
    FaceState,
    FaceTrack,
    Frames,
    Matrix,
    Picture,
    Reference,
    Region,
)
from beavervision.models.face import FaceNets
from beavervision.stages.decode import Decode, probe
from beavervision.stages.detect import Detect, FaceChoice, Survey, joined, survey
from beavervision.stages.encode import video_frame

if TYPE_CHECKING:
    from beavervision.pipeline import Pipeline

MAX_SECONDS = 8.0
_SURVEY_HZ = 4
_ALIVE_S = 5.0  # of a still's own motion, played back and forth
_BLOCK = 8
_FORMAT = 1  # of the folder
_PICTURES, _ARRAYS, _FACTS = "pictures.mp4", "arrays.npz", "avatar.json"


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The samples of a region of a picture."""

    region: Region
    y: U8
    u: U8
    v: U8

    def over(self, picture: Picture) -> Picture:
        """A copy of `picture` with these samples."""
        y, u, v = picture.y.copy(), picture.u.copy(), picture.v.copy()
        luma, chroma = self.region.slices
        y[luma], u[chroma], v[chroma] = self.y, self.u, self.v
        return replace(picture, y=y, u=u, v=v)

    @classmethod
    def differing(cls, picture: Picture, other: Picture) -> Part | None:
        """The samples of `picture` in the smallest region outside of which it equals `other`; None if it does everywhere."""
        rows, columns = (
            np.flatnonzero(
                (picture.y != other.y).any(axis=axis).reshape(-1, 2).any(axis=1)
                | (picture.u != other.u).any(axis=axis)
                | (picture.v != other.v).any(axis=axis)
            )
            for axis in (1, 0)
        )
        if not rows.size:
            return None
        x0, x1, y0, y1 = (2 * int(i) for i in (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1))
        region = Region(x0, y0, x1 - x0, y1 - y0)
        luma, chroma = region.slices
        return cls(region, picture.y[luma].copy(), picture.u[chroma].copy(), picture.v[chroma].copy())


@dataclass(frozen=True, slots=True, eq=False)
class Avatar:
    """A face to speak with: pictures in a loop that plays back and forth, and the face in each.

    rest has what makes each picture one with the lips at rest, and rest_px where the points (478, 3) are then; both are None
    where there is no face to draw on.
    """

    pictures: tuple[Picture, ...]
    track: FaceTrack
    rest: tuple[Part | None, ...]
    rest_px: tuple[F32 | None, ...]
    survey: Survey
    rate: Fraction
    model: str
    _still: Picture | None = field(init=False)

    def __post_init__(self) -> None:
        part, picture = self.rest[0], self.pictures[0]
        still = picture if part is None else part.over(picture)
        object.__setattr__(self, "_still", still if len(self.pictures) == 1 else None)

    @property
    def size_px(self) -> tuple[int, int]:
        return self.pictures[0].width_px, self.pictures[0].height_px

    def place(self, index: int, rate: Fraction) -> int:
        """Which picture of the loop shows while picture `index` of a session at `rate` does."""
        count = len(self.pictures)
        if count == 1:
            return 0
        at = int(index * self.rate / rate) % (2 * count - 2)
        return at if at < count else 2 * count - 2 - at

    def idle(self, index: int, rate: Fraction) -> Picture:
        """Picture `index` of a session at `rate` while nothing is said. A still is always the same object."""
        if self._still is not None:
            return self._still
        at = self.place(index, rate)
        part = self.rest[at]
        return self.pictures[at] if part is None else part.over(self.pictures[at])

    def rest_points(self, index: int, rate: Fraction) -> F32 | None:
        return self.rest_px[self.place(index, rate)]

    def clip(self, indices: range, start: int, rate: Fraction) -> Clip:
        """The pictures that show at `indices` of a session, tracked, as a clip that begins with number `start`."""
        at = [self.place(i, rate) for i in indices]
        return Clip(Frames(tuple(self.pictures[i] for i in at), start, rate), track=self.track.at(at))

    @classmethod
    def prepare(
        cls,
        source: Path | str,
        pipeline: Pipeline,
        *,
        size_px: int | None = 512,
        rate: Fraction | int = 25,
        max_seconds: float = MAX_SECONDS,
        face: str | FaceChoice = "largest",
        alive: bool = True,
    ) -> Avatar:
        """Look at a video or still once.

        Args:
            pipeline: whose model is to draw.
            size_px: the longer side of the pictures, which are made smaller for it, never larger; None keeps their size.
            rate: of the loop.
            max_seconds: how much of a video to use.
            alive: let a still blink, breathe and sway a little while it listens and speaks.
            face: which one, as :meth:`beavervision.stages.detect.FaceChoice.parse` reads it.

        Raises:
            MediaError: `source` cannot be read.
            NoFaceError: there is no such face in it.
        """
        rate = Fraction(rate)
        if rate <= 0 or max_seconds <= 0 or (size_px is not None and size_px < 64):
            raise UsageError("rate and max_seconds must be positive, and size_px at least 64.")
        choice = FaceChoice.parse(face) if isinstance(face, str) else face
        info = probe(source)
        still = info.kind == "still"
        decode = Decode(1, extend="none", rate=None if still else rate)
        count = 1 if still else max(1, int(max_seconds * rate))
        with closing(_pictures(decode(info))) as decoded:
            pictures = tuple(_scaled(p, size_px) for p in itertools.islice(decoded, count))
        nets = FaceNets()
        seen = survey(pictures, nets, choice, every=max(1, round(rate / _SURVEY_HZ)))
        if not seen.references:
            raise NoFaceError(
                f"{info.path}: no face was found in its first {max_seconds:g} s. "
                "Use a picture that shows a face from the front" + (", or another face." if seen.faces_seen else ".")
            )
        tracked = _tracked(pictures, rate, nets, seen.choice)
        if still and alive:
            held = _tracked(pictures * max(1, int(_ALIVE_S * rate)), rate, nets, seen.choice)
            moved = (clip.frames.pictures for clip in pipeline.enlivened(iter(held), _silence()))
            pictures = tuple(itertools.islice(itertools.chain.from_iterable(moved), len(held) * _BLOCK))
            tracked = _tracked(pictures, rate, nets, seen.choice)
        rest: list[Part | None] = []
        rest_px: list[F32 | None] = []
        silent: Iterator[Clip] = iter(tracked)
        for stage in pipeline.live(seen, rate, _silence()):
            silent = stage(silent)
        for clip, before in zip(silent, tracked, strict=True):
            rest += [Part.differing(*pair) for pair in zip(clip.frames.pictures, before.frames.pictures, strict=True)]
            rest_px += clip.drawn or (None,) * len(clip)
        return cls(
            pictures,
            joined([c.track for c in tracked if c.track is not None]),
            tuple(rest),
            tuple(rest_px),
            seen,
            rate,
            pipeline.card.name,
        )

    def save(self, folder: Path | str) -> None:
        """Write it into `folder`, which is made: pictures without loss, points and facts.

        Raises:
            OutputError: the folder cannot be written.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_video(folder / _PICTURES, self.pictures, self.rate)
            np.savez_compressed(folder / _ARRAYS, **self._arrays())
            (folder / _FACTS).write_text(json.dumps(self._facts(), indent=1), "utf-8")
        except (OSError, av.FFmpegError) as error:
            raise OutputError(
                f"The avatar cannot be written to {folder}: {error}. Check its rights and the disk."
            ) from error

    @classmethod
    def load(cls, folder: Path | str) -> Avatar:
        """Read what :meth:`save` wrote.

        Raises:
            MediaError: it is missing or damaged.
        """
        folder = Path(folder)
        try:
            facts = json.loads((folder / _FACTS).read_text("utf-8"))
            if facts["format"] != _FORMAT:
                raise ValueError(f"format {facts['format']} is not {_FORMAT}")
            color = Color(
                Matrix(facts["color"]["matrix"]), *(facts["color"][k] for k in ("full_range", "primaries", "transfer"))
            )
            info = replace(probe(folder / _PICTURES), rate=Fraction(facts["rate"]))
            with closing(_pictures(Decode(1, extend="none")(info))) as decoded:
                pictures = tuple(replace(p, color=color) for p in decoded)
            with np.load(folder / _ARRAYS, allow_pickle=False) as arrays:
                return cls._restored(facts, pictures, {name: arrays[name] for name in arrays.files})
        except (OSError, ValueError, KeyError, TypeError, IndexError, zipfile.BadZipFile) as error:
            raise MediaError(f"{folder} holds no usable avatar ({error}). Prepare it again.") from error

    def _facts(self) -> dict[str, Any]:
        color, choice = self.pictures[0].color, self.survey.choice
        return {
            "format": _FORMAT,
            "model": self.model,
            "rate": str(self.rate),
            "pictures": len(self.pictures),
            "color": {
                "matrix": str(color.matrix),
                "full_range": color.full_range,
                "primaries": color.primaries,
                "transfer": color.transfer,
            },
            "choice": {"index": choice.index, "place": choice.place, "speaker": choice.speaker},
            "faces_seen": self.survey.faces_seen,
            "states": [str(s) for s in self.track.states],
            "shots": list(self.track.shot),
        }

    def _arrays(self) -> dict[str, Any]:
        arrays: dict[str, Any] = {"strength": self.track.strength}
        arrays |= _faces_out("track", self.track.faces)
        arrays |= _faces_out("reference", [r.face for r in self.survey.references])
        arrays["reference_regions"] = np.array([_sides(r.region) for r in self.survey.references])
        arrays["reference_rgb"] = np.concatenate([r.rgb.reshape(-1) for r in self.survey.references])
        parts = [p for p in self.rest if p is not None]
        arrays["rest_at"] = np.array([i for i, p in enumerate(self.rest) if p is not None], np.int64)
        arrays["rest_regions"] = np.array([_sides(p.region) for p in parts], np.int64).reshape(-1, 4)
        planes = [plane.reshape(-1) for p in parts for plane in (p.y, p.u, p.v)]
        arrays["rest_planes"] = np.concatenate(planes) if planes else np.zeros(0, np.uint8)
        drawn = [p for p in self.rest_px if p is not None]
        arrays["rest_px_at"] = np.array([i for i, p in enumerate(self.rest_px) if p is not None], np.int64)
        arrays["rest_px"] = np.stack(drawn) if drawn else np.zeros((0, 0, 3), np.float32)
        return arrays

    @classmethod
    def _restored(cls, facts: dict[str, Any], pictures: tuple[Picture, ...], arrays: dict[str, Any]) -> Avatar:
        count = facts["pictures"]
        if len(pictures) != count:
            raise ValueError(f"{len(pictures)} pictures of {count}")
        track = FaceTrack(
            tuple(_faces_in("track", arrays, count)),
            tuple(FaceState(s) for s in facts["states"]),
            arrays["strength"],
            tuple(facts["shots"]),
        )
        references, at = [], 0
        for sides, face in zip(arrays["reference_regions"], _faces_in("reference", arrays), strict=True):
            region = Region(*(int(v) for v in sides))
            shape = (region.height_px, region.width_px, 3)
            size = int(np.prod(shape))
            assert face is not None
            references.append(Reference(region, arrays["reference_rgb"][at : at + size].reshape(shape), face))
            at += size
        rest: list[Part | None] = [None] * count
        at = 0
        for i, sides in zip(arrays["rest_at"], arrays["rest_regions"], strict=True):
            region = Region(*(int(v) for v in sides))
            height, width = region.height_px, region.width_px
            planes = []
            for shape2 in ((height, width), (height // 2, width // 2), (height // 2, width // 2)):
                size = shape2[0] * shape2[1]
                planes.append(arrays["rest_planes"][at : at + size].reshape(shape2))
                at += size
            rest[int(i)] = Part(region, *planes)
        rest_px: list[F32 | None] = [None] * count
        for i, points in zip(arrays["rest_px_at"], arrays["rest_px"], strict=True):
            rest_px[int(i)] = points
        choice = facts["choice"]
        place = choice["place"] and (float(choice["place"][0]), float(choice["place"][1]))
        seen = Survey(FaceChoice(choice["index"], place, choice["speaker"]), tuple(references), facts["faces_seen"])
        return cls(pictures, track, tuple(rest), tuple(rest_px), seen, Fraction(facts["rate"]), facts["model"])


def _pictures(clips: Iterator[Clip]) -> Generator[Picture, None, None]:
    for clip in clips:
        yield from clip.frames.pictures


def _tracked(pictures: Sequence[Picture], rate: Fraction, nets: FaceNets, choice: FaceChoice) -> list[Clip]:
    blocks = (tuple(pictures[i : i + _BLOCK]) for i in range(0, len(pictures), _BLOCK))
    clips = (Clip(Frames(block, i * _BLOCK, rate)) for i, block in enumerate(blocks))
    return list(Detect(nets, choice)(clips))


def _silence() -> Iterator[Audio]:
    for start in itertools.count(0, RATE_HZ):
        yield Audio(np.zeros((1, RATE_HZ), np.float32), RATE_HZ, start)


def _scaled(picture: Picture, size_px: int | None) -> Picture:
    longer = max(picture.width_px, picture.height_px)
    if size_px is None or longer <= size_px:
        return picture
    width, height = (max(2, round(v * size_px / longer / 2) * 2) for v in (picture.width_px, picture.height_px))

    def to(plane: U8, w: int, h: int) -> U8:
        return np.asarray(cv2.resize(plane, (w, h), interpolation=cv2.INTER_AREA), np.uint8)

    half = (width // 2, height // 2)
    return replace(picture, y=to(picture.y, width, height), u=to(picture.u, *half), v=to(picture.v, *half))


def _sides(region: Region) -> tuple[int, int, int, int]:
    return region.x_px, region.y_px, region.width_px, region.height_px


def _faces_out(name: str, faces: Sequence[Face | None]) -> dict[str, Any]:
    there = [(i, face) for i, face in enumerate(faces) if face is not None]
    return {
        f"{name}_at": np.array([i for i, _ in there], np.int64),
        f"{name}_points": np.stack([face.points_px for _, face in there]),
        f"{name}_blendshapes": np.stack([face.blendshapes for _, face in there]),
        f"{name}_confidence": np.array([face.confidence for _, face in there], np.float64),
    }


def _faces_in(name: str, arrays: dict[str, Any], count: int | None = None) -> list[Face | None]:
    at = arrays[f"{name}_at"]
    faces: list[Face | None] = [None] * (len(at) if count is None else count)
    columns = (arrays[f"{name}_{column}"] for column in ("points", "blendshapes", "confidence"))
    for i, points, blendshapes, confidence in zip(at, *columns, strict=True):
        faces[int(i)] = Face(points, blendshapes, float(confidence))
    return faces


def _write_video(path: Path, pictures: Sequence[Picture], rate: Fraction) -> None:
    """H.264 without loss."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=rate, options={"qp": "0", "preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = pictures[0].width_px, pictures[0].height_px, "yuv420p"
        stream.codec_context.thread_count = 1
        for number, picture in enumerate(pictures):
            frame = video_frame(picture)
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
