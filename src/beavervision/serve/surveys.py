"""What a worker found when it looked at an avatar, kept as a file for the workers of later jobs."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from beavervision.media import Face, Picture, Reference, Region
from beavervision.stages.detect import FaceChoice, Survey

_PICTURE_PX = 512
_QUALITY = 88


def save_survey(survey: Survey, path: Path) -> None:
    """To a file of arrays: nothing in it is ever run."""
    place = survey.choice.place
    facts = {"index": survey.choice.index, "place": None if place is None else list(place), "seen": survey.faces_seen}
    arrays: dict[str, Any] = {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
    for number, reference in enumerate(survey.references):
        region, face = reference.region, reference.face
        arrays[f"{number}_region"] = np.array([region.x_px, region.y_px, region.width_px, region.height_px])
        arrays[f"{number}_points"], arrays[f"{number}_blendshapes"] = face.points_px, face.blendshapes
        arrays[f"{number}_confidence"] = np.float64(face.confidence)
        arrays[f"{number}_rgb"] = cv2.imencode(".png", reference.rgb, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
    np.savez(path, **arrays)


def load_survey(path: Path) -> Survey:
    """What :func:`save_survey` wrote.

    Raises:
        FileNotFoundError: it is gone, or damaged.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            references = tuple(_reference(arrays, n) for n in range(sum(name.endswith("_rgb") for name in arrays)))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, cv2.error) as error:
        raise FileNotFoundError(path) from error
    place = facts["place"]
    choice = FaceChoice(index=facts["index"], place=None if place is None else (place[0], place[1]))
    return Survey(choice, references, facts["seen"])


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
