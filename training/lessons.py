"""What the teacher says of each sound: what :mod:`training.teacher` writes and :mod:`training.motion` learns from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from beavervision.media import F32

COMPONENTS = 64  # of the recogniser's features that the motion network is asked for


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """Of one sound, each 20 ms: motion (n, k), features (n, 64) of unit variance in all; and its lag where it is a clip's."""

    motion: F32
    features: F32
    lag_s: float


def read_lessons(path: Path) -> dict[str, Lesson]:
    with np.load(path) as raw:
        names, lags = [str(n) for n in raw["names"]], raw["lags_s"]
        ends = np.cumsum(raw["steps"])[:-1]
        motion, features = (np.split(raw[k].astype(np.float32), ends) for k in ("motion", "features"))
    return {n: Lesson(m, f, float(s)) for n, m, f, s in zip(names, motion, features, lags, strict=True)}


def write_lessons(lessons: dict[str, Lesson], path: Path) -> None:
    np.savez_compressed(
        path,
        names=np.array(list(lessons)),
        lags_s=np.array([x.lag_s for x in lessons.values()]),
        steps=np.array([len(x.motion) for x in lessons.values()]),
        motion=np.concatenate([x.motion for x in lessons.values()]).astype(np.float16),
        features=np.concatenate([x.features for x in lessons.values()]).astype(np.float16),
    )


def voice_name(index: int) -> str:
    """The name of a synthetic sentence among the lessons."""
    return f"voice {index}"


def recording_name(index: int) -> str:
    """The name of recorded speech among the lessons."""
    return f"recording {index}"
