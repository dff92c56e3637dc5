"""The values that flow from stage to stage, and the protocol of a stage.

All are frozen. Names carry their unit: ``_px`` pixels of the upright picture, ``_hz`` per second, ``_ms``
milliseconds. Time is an index and a :class:`~fractions.Fraction`: picture ``i`` of a stream at ``rate``
pictures a second shows from ``i / rate`` to ``(i + 1) / rate`` seconds, and the samples heard meanwhile are
``sample_at(i) .. sample_at(i + 1)``. Floats of seconds are for display only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from fractions import Fraction
from math import ceil, floor
from typing import Protocol, TypeVar

import cv2
import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

_Matrix = TypeVar("_Matrix", F32, npt.NDArray[np.float64])

POINTS = 478  # of the face mesh, iris included
BLENDSHAPES = 52


def sample_at(index: int, rate: Fraction, rate_hz: int) -> int:
    """The first audio sample heard while picture `index` shows (exact; nothing accumulates)."""
    return (index * rate_hz * rate.denominator) // rate.numerator


def pictures_for(samples: int, rate: Fraction, rate_hz: int) -> int:
    """How many pictures it takes to show while `samples` samples are heard: the last may be partly silent."""
    return -((-samples * rate.numerator) // (rate_hz * rate.denominator))


class Matrix(StrEnum):
    """The luma coefficients of a picture's YUV planes."""

    BT601 = "bt601"
    BT709 = "bt709"
    BT2020 = "bt2020"


_KR_KB = {Matrix.BT601: (0.299, 0.114), Matrix.BT709: (0.2126, 0.0722), Matrix.BT2020: (0.2627, 0.0593)}


@dataclass(frozen=True, slots=True)
class Color:
    """How planes map to light: what is needed for RGB, and the tags to hand on (FFmpeg's integer codes)."""

    matrix: Matrix = Matrix.BT709
    full_range: bool = False
    primaries: int = 2
    transfer: int = 2

    def to_rgb(self) -> F32:
        """The (3, 4) affine map from 8-bit (Y, U, V) to 8-bit (R, G, B)."""
        kr, kb = _KR_KB[self.matrix]
        kg = 1 - kr - kb
        y_gain, c_gain = (1.0, 1.0) if self.full_range else (255 / 219, 255 / 224)
        rows = np.array(
            [[1, 0, 2 * (1 - kr)], [1, -2 * kb * (1 - kb) / kg, -2 * kr * (1 - kr) / kg], [1, 2 * (1 - kb), 0]]
        ) * [y_gain, c_gain, c_gain]
        offset = np.array([0.0 if self.full_range else 16.0, 128.0, 128.0])
        return np.hstack([rows, -(rows @ offset)[:, None]]).astype(np.float32)

    def to_yuv(self) -> F32:
        """The inverse of :meth:`to_rgb`, (3, 4)."""
        forward = np.vstack([self.to_rgb().astype(np.float64), [0, 0, 0, 1]])
        return np.linalg.inv(forward)[:3].astype(np.float32)


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of a picture with even corners, so that it cuts the chroma planes cleanly."""

    x_px: int
    y_px: int
    width_px: int
    height_px: int

    def __post_init__(self) -> None:
        if any(v % 2 or v < 0 for v in (self.x_px, self.y_px, self.width_px, self.height_px)):
            raise ValueError(f"a region needs even, non-negative sides: {self}")

    @property
    def slices(self) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Rows and columns of the luma plane, and of the chroma planes."""
        x, y, w, h = self.x_px, self.y_px, self.width_px, self.height_px
        return (slice(y, y + h), slice(x, x + w)), (slice(y // 2, (y + h) // 2), slice(x // 2, (x + w) // 2))

    @classmethod
    def around(cls, points_px: F32, margin_px: float, width_px: int, height_px: int) -> Region | None:
        """The smallest region that holds `points_px` (n, 2+) and `margin_px` more, within the picture; None if empty."""
        x, y = points_px[:, 0], points_px[:, 1]
        x0, y0 = (max(floor(float(v.min()) - margin_px) // 2 * 2, 0) for v in (x, y))
        x1, y1 = (
            min(-(-ceil(float(v.max()) + margin_px) // 2) * 2, limit) for v, limit in ((x, width_px), (y, height_px))
        )
        return cls(x0, y0, x1 - x0, y1 - y0) if x1 - x0 >= 2 and y1 - y0 >= 2 else None


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One upright picture as planes, 8-bit YUV 4:2:0: y (H, W), u and v (H/2, W/2); H and W even.

    The arrays are never written to: :meth:`painted` copies.
    """

    y: U8
    u: U8
    v: U8
    color: Color = Color()

    def __post_init__(self) -> None:
        height, width = self.y.shape
        if height % 2 or width % 2 or self.u.shape != (height // 2, width // 2) or self.v.shape != self.u.shape:
            raise ValueError(f"planes {self.y.shape}, {self.u.shape}, {self.v.shape} are not YUV 4:2:0 of even size")

    @property
    def width_px(self) -> int:
        return int(self.y.shape[1])

    @property
    def height_px(self) -> int:
        return int(self.y.shape[0])

    @property
    def region(self) -> Region:
        return Region(0, 0, self.width_px, self.height_px)

    def planes(self, region: Region) -> tuple[U8, U8, U8]:
        """Views of `region`: y (h, w), u and v (h/2, w/2)."""
        (ys, xs), (yc, xc) = region.slices
        return self.y[ys, xs], self.u[yc, xc], self.v[yc, xc]

    def rgb(self, region: Region | None = None) -> U8:
        """The pixels of `region` (all of it if None) as (h, w, 3) RGB."""
        return to_rgb(*self.planes(region or self.region), self.color)

    def warped_rgb(self, matrix: F32, size_px: int) -> U8:
        """A square (size_px, size_px, 3) RGB view through `matrix` (2, 3), which maps picture pixels to the view's.

        Black beyond the edges. Strong reductions are averaged first, so that nothing flickers.
        """
        step = 1.0 / max(float(np.hypot(matrix[0, 0], matrix[1, 0])), 1e-6)
        views = []
        for plane, size, fill in ((self.y, 1, 16), (self.u, 2, 128), (self.v, 2, 128)):
            source, reduce = plane, max(1, int(step / size))
            if reduce > 1:
                shape = (max(plane.shape[1] // reduce, 1), max(plane.shape[0] // reduce, 1))
                source = np.asarray(cv2.resize(plane, shape, interpolation=cv2.INTER_AREA), np.uint8)
            pixel_px = (self.width_px / source.shape[1], self.height_px / source.shape[0])
            local = between_pixels(matrix.astype(np.float64), pixel_px)
            views.append(
                cv2.warpAffine(source, local, (size_px, size_px), flags=cv2.INTER_LINEAR, borderValue=float(fill))
            )
        return np.asarray(cv2.transform(cv2.merge(views), self.color.to_rgb()), np.uint8)

    def painted(self, patches: tuple[Patch, ...]) -> Picture:
        """A copy with `patches` blended in by their masks. A sample under a mask of 0 keeps its exact value.

        A chroma sample covers 2 x 2 pixels and takes the mean of their masks.
        """
        if not patches:
            return self
        y, u, v = self.y.copy(), self.u.copy(), self.v.copy()
        for patch in patches:
            luma, chroma = patch.region.slices
            half = (patch.region.width_px // 2, patch.region.height_px // 2)
            mask_c = np.asarray(cv2.resize(patch.mask, half, interpolation=cv2.INTER_AREA), np.uint8)
            for plane, at, new, mask in (
                (y, luma, patch.y, patch.mask),
                (u, chroma, patch.u, mask_c),
                (v, chroma, patch.v, mask_c),
            ):
                plane[at] = mixed(plane[at], new, mask)
        return replace(self, y=y, u=u, v=v)


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """New samples for a region of a picture, y (h, w), u and v (h/2, w/2), and how much of each to take, mask (h, w), 0 to 255."""

    region: Region
    y: U8
    u: U8
    v: U8
    mask: U8

    def __post_init__(self) -> None:
        size, half = (
            (self.region.height_px, self.region.width_px),
            (self.region.height_px // 2, self.region.width_px // 2),
        )
        if self.y.shape != size or self.mask.shape != size or self.u.shape != half or self.v.shape != half:
            raise ValueError(
                f"patch {self.y.shape}, {self.u.shape} with mask {self.mask.shape} does not fill {self.region}"
            )

    @classmethod
    def of_rgb(cls, region: Region, rgb: U8, mask: U8, color: Color) -> Patch:
        """From pixels (h, w, 3) RGB; `color` is the picture's."""
        return cls(region, *to_planes(rgb, color), mask)


def mixed(old: U8, new: U8, mask: U8) -> U8:
    """Samples of `old` where `mask` is 0, of `new` where it is 255, and shares of both between."""
    alpha = mask.astype(np.uint16)
    total = old * (255 - alpha) + new * alpha + 127
    return np.asarray((total + 1 + (total >> 8)) >> 8, np.uint8)  # divided by 255


def between_pixels(matrix: _Matrix, pixel_px: tuple[float, float] = (1, 1)) -> _Matrix:
    """`matrix` (2, 3), from one picture's continuous coordinates to another's, between the indices of their pixels.

    Pixel i of the first, `pixel_px` wide and high, lies at (i + 0.5) * pixel_px, and pixel i of the second at i + 0.5. The
    precision is that of `matrix`.
    """
    between = matrix.copy()
    if pixel_px != (1, 1):
        between[:, :2] *= np.asarray(pixel_px, matrix.dtype)
    between[:, 2] += (between[:, 0] + between[:, 1]) / 2 - 0.5
    return between


def to_rgb(y: U8, u: U8, v: U8, color: Color) -> U8:
    """Planes y (h, w), u and v (h/2, w/2) as (h, w, 3) RGB."""
    size = (y.shape[1], y.shape[0])
    up = [cv2.resize(p, size, interpolation=cv2.INTER_LINEAR) for p in (u, v)]
    return np.asarray(cv2.transform(cv2.merge([y, *up]), color.to_rgb()), np.uint8)


def to_planes(rgb: U8, color: Color) -> tuple[U8, U8, U8]:
    """The inverse of :func:`to_rgb`; a chroma sample is the mean of its 2 x 2 pixels."""
    yuv = cv2.transform(rgb, color.to_yuv())
    half = (rgb.shape[1] // 2, rgb.shape[0] // 2)
    chroma = np.asarray(cv2.resize(yuv[..., 1:], half, interpolation=cv2.INTER_AREA), np.uint8)
    return tuple(np.ascontiguousarray(p) for p in (yuv[..., 0], chroma[..., 0], chroma[..., 1]))  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, eq=False)
class Frames:
    """Consecutive pictures of a stream at a constant rate; the first is picture number `start`.

    A still repeats one Picture object, so that stages can see that nothing changed (``is``). `shown` are their numbers in the
    source, which may be played back and forth; () where that is not known.
    """

    pictures: tuple[Picture, ...]
    start: int
    rate: Fraction
    shown: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.pictures or self.start < 0 or self.rate <= 0 or len(self.shown) not in (0, len(self.pictures)):
            raise ValueError(
                f"{len(self.pictures)} pictures from {self.start} at {self.rate}/s, showing {len(self.shown)}"
            )

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def stop(self) -> int:
        return self.start + len(self.pictures)


@dataclass(frozen=True, slots=True)
class Phone:
    """One speech sound in IPA (no stress marks; diphthongs and affricates are one phone), on the clock of the sound it is in."""

    ipa: str
    start_ms: int
    end_ms: int

    def later(self, by_ms: int) -> Phone:
        """The same on a clock that began so much earlier."""
        return replace(self, start_ms=self.start_ms + by_ms, end_ms=self.end_ms + by_ms)


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """Consecutive sound: pcm (channels, samples) float32 in -1..1, the first being sample number `start`.

    phones are the speech sounds that begin in it, in order, as far as they are known: synthetic speech tells them. Their clock
    starts at sample 0.
    """

    pcm: F32
    rate_hz: int
    start: int = 0
    phones: tuple[Phone, ...] = ()

    def __post_init__(self) -> None:
        if self.pcm.ndim != 2 or self.pcm.dtype != np.float32 or self.rate_hz <= 0 or self.start < 0:
            raise ValueError(f"audio {self.pcm.dtype}{self.pcm.shape} at {self.rate_hz} Hz from {self.start}")

    @property
    def channels(self) -> int:
        return int(self.pcm.shape[0])

    @property
    def samples(self) -> int:
        return int(self.pcm.shape[1])

    @property
    def seconds(self) -> float:
        return self.samples / self.rate_hz


class FaceState(StrEnum):
    """What became of the chosen face in a picture."""

    OK = "ok"
    LOST = "lost"  # no face, or not the chosen one
    PROFILE = "profile"  # turned too far to draw on
    OCCLUDED = "occluded"  # something is before the mouth
    CUT = "cut"  # first picture of a new shot, face not locked yet


@dataclass(frozen=True, slots=True, eq=False)
class Face:
    """One face in one picture: points_px (478, 3), z in the scale of x; shapes (52,), 0 to 1, None where nobody asked for them."""

    points_px: F32
    shapes: F32 | None
    confidence: float

    def __post_init__(self) -> None:
        shapes = (BLENDSHAPES,) if self.shapes is None else self.shapes.shape
        if self.points_px.shape != (POINTS, 3) or shapes != (BLENDSHAPES,):
            raise ValueError(f"face of {self.points_px.shape} points and {shapes} blendshapes")

    @property
    def blendshapes(self) -> F32:
        """The blendshape weights (52,).

        Raises:
            ValueError: the face was found without them.
        """
        if self.shapes is None:
            raise ValueError("this face was found without its blendshapes")
        return self.shapes


@dataclass(frozen=True, slots=True, eq=False)
class FaceTrack:
    """The chosen face over the pictures of a clip.

    strength (n,) from 0 to 1 says how much of a drawn mouth to show: it ramps down before the face is lost or
    covered and up after it is found again. `shot` counts the cuts so far, picture by picture.
    """

    faces: tuple[Face | None, ...]
    states: tuple[FaceState, ...]
    strength: F32
    shot: tuple[int, ...]

    def __post_init__(self) -> None:
        n = len(self.faces)
        if len(self.states) != n or self.strength.shape != (n,) or len(self.shot) != n:
            raise ValueError("a track needs a face, a state, a strength and a shot for each picture")

    def at(self, pictures: Sequence[int]) -> FaceTrack:
        """The track of these of its pictures, in their order."""
        return FaceTrack(
            tuple(self.faces[i] for i in pictures),
            tuple(self.states[i] for i in pictures),
            self.strength[list(pictures)],
            tuple(self.shot[i] for i in pictures),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """Speech features around a clip: rows (t, bins); row k is centred at ``(start + k) * hop`` seconds.

    The rows cover the clip's time and the left context and look-ahead that the model declared. voice (n,) is the
    probability of speech while each picture shows or, within the look-ahead, shortly after; coming (n,) the same for so long after
    it as a mouth gets ready to speak, where the sound is known that far ahead. phones are those that the sound told of around the
    clip, up to the look-ahead.
    """

    rows: F32
    start: int
    hop: Fraction
    voice: F32
    coming: F32
    phones: tuple[Phone, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Expression:
    """What to add to the face, picture by picture, relative to the person's own neutral.

    controls (n, 52) are offsets of the ARKit blendshapes in the order of the blendshape net, -1 to 1. head (n, 6) moves the
    head: yaw, pitch and roll in degrees (positive: towards the picture's right, down, clockwise), shifts right and down
    in face widths, and a scale (1 leaves it).
    """

    controls: F32
    head: F32

    def __post_init__(self) -> None:
        n = len(self.controls)
        if self.controls.shape != (n, BLENDSHAPES) or self.head.shape != (n, 6):
            raise ValueError(f"expression of {self.controls.shape} controls and {self.head.shape} head movements")

    def __len__(self) -> int:
        return len(self.controls)


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """What travels down the flow: some pictures and, as stages add them, all that belongs to the same time.

    audio holds exactly the samples heard while the pictures show. patches has a tuple for each picture, empty
    where the picture stays as it is. opening (n,) is the drawn inner lip gap in mouth widths, for reports. drawn has for
    each picture the face's points (478, 3) as the lip sync drew them, None where it left the tracked ones. expression is what
    to add to the face after the lip sync, None for nothing.
    """

    frames: Frames
    track: FaceTrack | None = None
    audio: Audio | None = None
    heard: Heard | None = None
    patches: tuple[tuple[Patch, ...], ...] = ()
    opening: F32 | None = None
    drawn: tuple[F32 | None, ...] = ()
    expression: Expression | None = None

    def __len__(self) -> int:
        return len(self.frames)


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """A picture region of the person kept for drawing: rgb (h, w, 3) of `region`, and the face seen there; whether its open
    mouth is `imagined`."""

    region: Region
    rgb: U8
    face: Face
    imagined: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """What a first look at the source tells of the chosen face; computed once, reusable for later jobs.

    rest (478, 3) is the face with a closed, resting mouth in the pose-free frame of
    :mod:`beavervision.models.mesh`; amplitude scales mouth motion to the person's own (1 is average);
    references are the person's mouths, from closed to open; looks (n, d) are what the face is known by, as
    :mod:`beavervision.models.likeness` tells it, None where everybody is taken for this person.
    """

    rest: F32
    amplitude: float
    references: tuple[Reference, ...] = field(default=())
    looks: F32 | None = None


class Stage(Protocol):
    """One step of the flow. Weights live in the object, a stream's state in the call."""

    @property
    def name(self) -> str: ...

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]: ...


class Net(Protocol):
    """A network behind any runtime: arrays in, arrays out, the first axis of each is the batch."""

    def __call__(self, *inputs: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]: ...
