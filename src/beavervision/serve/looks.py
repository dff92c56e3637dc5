"""What a worker found when it looked at an avatar, kept as a file for the workers of later jobs."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from beavervision.media import BLENDSHAPES, POINTS, Face, FaceState, FaceTrack, Picture, Reference, Region
from beavervision.pipeline import Look
from beavervision.stages.detect import FaceChoice, Survey

_PICTURE_PX = 512
_QUALITY = 88
_STATES = tuple(FaceState)


def save_look(look: Look, path: Path) -> None:
    """To a file of arrays: nothing in it is ever run."""
    survey, track = look.survey, look.track
    place = survey.choice.place
    facts = {"index": survey.choice.index, "place": None if place is None else list(place), "seen": survey.faces_seen}
    arrays: dict[str, Any] = {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
    for number, reference in enumerate(survey.references):
        region, face = reference.region, reference.face
        arrays[f"{number}_region"] = np.array([region.x_px, region.y_px, region.width_px, region.height_px])
        arrays[f"{number}_points"], arrays[f"{number}_blendshapes"] = face.points_px, face.blendshapes
        arrays[f"{number}_confidence"] = np.float64(face.confidence)
        arrays[f"{number}_rgb"] = cv2.imencode(".png", reference.rgb, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
    if track is not None:
        there = np.array([face is not None for face in track.faces])
        faces = [face for face in track.faces if face is not None]
        arrays |= {"track_there": there, "track_strength": track.strength, "track_shot": np.array(track.shot)}
        arrays["track_states"] = np.array([_STATES.index(state) for state in track.states], np.uint8)
        arrays["track_points"] = np.array([face.points_px for face in faces], np.float32).reshape(-1, POINTS, 3)
        shapes = np.array([face.blendshapes for face in faces], np.float32).reshape(-1, BLENDSHAPES)
        arrays["track_blendshapes"] = shapes
        arrays["track_confidence"] = np.array([face.confidence for face in faces], np.float64)
    np.savez(path, **arrays)


def load_look(path: Path) -> Look:
    """What :func:`save_look` wrote.

    Raises:
        FileNotFoundError: it is gone, or damaged.
    """
    with _opened(path) as arrays:
        track = _track(arrays) if "track_there" in arrays else None
        facts = _facts(arrays)
        references = tuple(_reference(arrays, n) for n in range(sum(name.endswith("_rgb") for name in arrays)))
        return Look(Survey(_choice(facts), references, facts["seen"]), track)


def load_choice(path: Path) -> FaceChoice:
    """Which face a look found, without the rest of it; raises as :func:`load_look`."""
    with _opened(path) as arrays:
        return _choice(_facts(arrays))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The arrays of a look; what goes wrong with them means that it is gone."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            yield arrays
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, cv2.error) as error:
        raise FileNotFoundError(path) from error


def _facts(arrays: Any) -> Any:
    return json.loads(arrays["facts"].tobytes())


def _choice(facts: Any) -> FaceChoice:
    place = facts["place"]
    return FaceChoice(index=facts["index"], place=None if place is None else (place[0], place[1]))


def _track(arrays: Any) -> FaceTrack:
    points, shapes, confidence = (arrays[f"track_{name}"] for name in ("points", "blendshapes", "confidence"))
    found = iter([Face(p, b, float(c)) for p, b, c in zip(points, shapes, confidence, strict=True)])
    return FaceTrack(
        tuple(next(found) if there else None for there in arrays["track_there"]),
        tuple(_STATES[i] for i in arrays["track_states"]),
        arrays["track_strength"],
        tuple(int(shot) for shot in arrays["track_shot"]),
    )


def _reference(arrays: Any, number: int) -> Reference:
    rgb = np.asarray(cv2.imdecode(arrays[f"{number}_rgb"], cv2.IMREAD_COLOR), np.uint8)
    face = Face(arrays[f"{number}_points"], arrays[f"{number}_blendshapes"], float(arrays[f"{number}_confidence"]))
    return Reference(Region(*(int(v) for v in arrays[f"{number}_region"])), rgb, face)


def write_picture(picture: Picture, path: Path) -> None:
    """A small JPEG of a picture."""
    rgb = picture.rgb()
    scale = min(1.0, _PICTURE_PX / max(rgb.shape[:2]))
    small = cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else rgb
    quality = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    path.write_bytes(cv2.imencode(".jpg", np.ascontiguousarray(small[..., ::-1]), quality)[1].tobytes())
