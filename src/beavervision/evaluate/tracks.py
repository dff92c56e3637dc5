"""The face found again in a finished video: what the measures of a mouth start from."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from beavervision.media import F32, Face, Picture
from beavervision.models import mesh
from beavervision.models.face import FaceNets
from beavervision.stages.decode import Decode, probe
from beavervision.stages.detect import Detect

_OUTER = len(mesh.OUTER_LIP)
_MIDDLE_UPPER = _OUTER + np.array([3, 4, 5, 6, 7])  # of a track's points: the inner upper lip, without its corners,
_MIDDLE_LOWER = _OUTER + np.array([17, 16, 15, 14, 13])  # and the points below
_CORNERS = np.array([0, 10])  # of the outer lip
NO_LIPS = np.full((_OUTER + len(mesh.INNER_LIP), 2), np.nan, np.float32)  # the row of a picture without a face


@dataclass(frozen=True, slots=True, eq=False)
class LipTrack:
    """The lips over the pictures of a video, pose-free, in eye distances.

    points (t, 40, 2) are the outer and the inner ring of :mod:`beavervision.models.mesh`; NaN where no face was found.
    Picture i is the mouth at ``i / rate`` seconds.
    """

    points: F32
    rate: Fraction

    def __len__(self) -> int:
        return len(self.points)

    @property
    def gap(self) -> F32:
        """How far the inner lips are apart in the middle of the mouth, (t,)."""
        apart = self.points[:, _MIDDLE_LOWER, 1] - self.points[:, _MIDDLE_UPPER, 1]
        return np.asarray(apart.mean(axis=1), np.float32)

    @property
    def width(self) -> F32:
        """From corner to corner, (t,)."""
        return np.asarray(self.points[:, _CORNERS[1], 0] - self.points[:, _CORNERS[0], 0], np.float32)

    @property
    def seen(self) -> float:
        """The share of pictures with a face."""
        return float(np.isfinite(self.points[:, 0, 0]).mean()) if len(self) else 0.0


def lips_of(face: Face, pose: mesh.Pose) -> F32:
    """The lips of a face as a row of :class:`LipTrack`, (40, 2)."""
    rings = np.concatenate([mesh.OUTER_LIP, mesh.INNER_LIP])
    return pose.to_face(face.points_px[rings])[:, :2]


def watched(path: Path | str, nets: FaceNets) -> Generator[tuple[Picture, Face | None], None, None]:
    """The pictures of a video, each with its largest face.

    Raises:
        MediaError: the file cannot be read.
    """
    # Without look-ahead nothing is smoothed: lips meet for two pictures only.
    for clip in Detect(nets, look_ahead=0)(Decode(extend="none")(path)):
        assert clip.track is not None
        yield from zip(clip.frames.pictures, clip.track.faces, strict=True)


def lip_track(path: Path | str, nets: FaceNets) -> LipTrack:
    """The lips of the largest face over a video.

    Raises:
        MediaError: the file cannot be read.
    """
    rows = [
        NO_LIPS if face is None else lips_of(face, mesh.fit_pose(face.points_px)) for _, face in watched(path, nets)
    ]
    return LipTrack(np.array(rows, np.float32).reshape(-1, *NO_LIPS.shape), probe(path).rate)
