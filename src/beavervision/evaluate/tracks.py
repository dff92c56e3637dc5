"""The face found again in a finished video: what the measures of a mouth start from."""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt

from beavervision.errors import MediaError
from beavervision.media import F32, POINTS, Face, FaceState, Picture
from beavervision.models import mesh
from beavervision.models.face import FaceNets
from beavervision.stages.decode import Decode, SourceInfo, probe
from beavervision.stages.detect import Detect

_OUTER = len(mesh.OUTER_LIP)
_MIDDLE_UPPER = _OUTER + np.array([3, 4, 5, 6, 7])  # of a track's points: the inner upper lip, without its corners,
_MIDDLE_LOWER = _OUTER + np.array([17, 16, 15, 14, 13])  # and the points below
_CORNERS = np.array([0, 10])  # of the outer lip
_NO_FACE = np.full((POINTS, 3), np.nan, np.float32)
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


@dataclass(frozen=True, slots=True, eq=False)
class FaceTrace:
    """The largest face over the pictures of a video as the pipeline follows it, smoothed.

    times_s is (t,); points (t, 478, 3) are pose-free, in eye distances, yaw_deg and pitch_deg (t,) the head's: NaN where no face
    was found. clear (t,) tells where it is whole and from the front.
    """

    times_s: npt.NDArray[np.float64]
    points: F32
    yaw_deg: F32
    pitch_deg: F32
    clear: npt.NDArray[np.bool_]

    @property
    def seen(self) -> npt.NDArray[np.bool_]:
        """Where there is a face, (t,)."""
        return np.isfinite(self.yaw_deg)

    @property
    def opening(self) -> F32:
        """How far the inner lips are apart in the middle of the mouth, (t,)."""
        return mesh.gaps(self.points)


def moving(path: Path | str) -> SourceInfo:
    """What a video is.

    Raises:
        MediaError: the file cannot be read, or is a still, which has no end.
    """
    info = probe(path)
    if info.kind == "still":
        raise MediaError(f"{path} is a still, in which nothing moves. Give a video.")
    return info


def face_trace(path: Path | str, nets: FaceNets) -> FaceTrace:
    """The largest face over a video.

    Raises:
        MediaError: as :func:`moving`.
    """
    info = moving(path)
    points: list[F32] = []
    turns: list[tuple[float, float]] = []
    clear: list[bool] = []
    for clip in Detect(nets)(Decode(extend="none")(info)):
        assert clip.track is not None
        for face, state in zip(clip.track.faces, clip.track.states, strict=True):
            if face is None:
                points.append(_NO_FACE)
                turns.append((math.nan, math.nan))
            else:
                pose = mesh.fit_pose(face.points_px)
                points.append(pose.to_face(face.points_px))
                turns.append((pose.yaw_deg, pose.pitch_deg))
            clear.append(state is FaceState.OK)
    yaw_deg, pitch_deg = np.array(turns, np.float32).reshape(-1, 2).T
    times_s = np.arange(len(points)) / float(info.rate)
    return FaceTrace(
        times_s, np.array(points, np.float32).reshape(-1, POINTS, 3), yaw_deg, pitch_deg, np.array(clear, bool)
    )


def watched(path: Path | str, nets: FaceNets) -> Generator[tuple[Picture, Face | None], None, None]:
    """The pictures of a video, each with its largest face.

    Raises:
        MediaError: as :func:`moving`.
    """
    # Without look-ahead nothing is smoothed: lips meet for two pictures only.
    for clip in Detect(nets, look_ahead=0)(Decode(extend="none")(moving(path))):
        assert clip.track is not None
        yield from zip(clip.frames.pictures, clip.track.faces, strict=True)


def lip_track(path: Path | str, nets: FaceNets) -> LipTrack:
    """The lips of the largest face over a video.

    Raises:
        MediaError: as :func:`moving`.
    """
    rows = [
        NO_LIPS if face is None else lips_of(face, mesh.fit_pose(face.points_px)) for _, face in watched(path, nets)
    ]
    return LipTrack(np.array(rows, np.float32).reshape(-1, *NO_LIPS.shape), probe(path).rate)
