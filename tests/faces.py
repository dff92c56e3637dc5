"""Pictures and videos of the sample portrait for tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from importlib.resources import files
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from beavervision.media import U8, Audio, Clip, Frames, Picture, sample_at
from beavervision.stages.decode import from_rgb
from beavervision.stages.encode import Encode


@cache
def portrait_rgb() -> U8:
    """The sample portrait, (512, 512, 3)."""
    data = files("beavervision").joinpath("samples/eileen_collins.png").read_bytes()
    return np.asarray(Image.open(BytesIO(data)).convert("RGB"))


def moved(dx: float = 0.0, dy: float = 0.0, zoom: float = 1.0, turn_deg: float = 0.0) -> Picture:
    """The portrait moved, zoomed and turned about the face's middle."""
    matrix = cv2.getRotationMatrix2D((225, 130), turn_deg, zoom)
    matrix[:, 2] += (dx, dy)
    return from_rgb(
        np.asarray(
            cv2.warpAffine(portrait_rgb(), matrix, (512, 512), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE),
            np.uint8,
        )
    )


def portrait() -> Picture:
    return from_rgb(portrait_rgb())


def empty(level: int = 90) -> Picture:
    """A picture without a face, with some structure in it."""
    y, x = np.mgrid[0:512, 0:512]
    ramp = (level + 20 * np.sin(x / 40) + 20 * np.cos(y / 30)).astype(np.uint8)
    return from_rgb(np.repeat(ramp[..., None], 3, axis=2))


def make_video(path: Path, pictures: Sequence[Picture], rate: Fraction, sound: Audio | None = None) -> Path:
    """Write `pictures` to `path` at `rate`, with the start of `sound`."""

    def clips() -> Iterator[Clip]:
        for start in range(0, len(pictures), 8):
            frames = Frames(tuple(pictures[start : start + 8]), start, rate)
            audio = None
            if sound is not None:
                first, last = (sample_at(i, rate, sound.rate_hz) for i in (frames.start, frames.stop))
                audio = Audio(sound.pcm[:, first:last], sound.rate_hz, first)
            yield Clip(frames, audio=audio)

    for _ in Encode("ultrafast", crf=10).to(path)(clips()):
        pass
    return path


@cache
def other_rgb() -> U8:
    """Somebody else in the place of the sample portrait: the same picture with a longer face and redder skin, (512, 512, 3)."""
    matrix = np.array([[1, 0, 0], [0, 1.18, -24]], np.float32)
    longer = cv2.warpAffine(portrait_rgb(), matrix, (512, 512), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(np.clip(longer * np.array([1.0, 0.78, 0.72]), 0, 255), np.uint8)


def somebody_else() -> Picture:
    return from_rgb(other_rgb())
