"""A speaker's manner, learned from a clip and given to another face: a small JSON file without pictures or names.

What is learned: how far the mouth moves, what the face is like at rest, how much brows and head move, how often the eyes blink.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from beavervision.errors import InputError, NoFaceError
from beavervision.expression.alive import Manner
from beavervision.expression.controls import controls, is_number
from beavervision.expression.custom import USUAL
from beavervision.files import read_json, write_json
from beavervision.media import F32, Face
from beavervision.models import mesh
from beavervision.models.face import blendshape_names

FORMAT = "beavervision-style"
VERSION = 1
LIMIT_BYTES = 64 << 10
LEAST_S = 4.0  # of a face, to learn a manner from
_BLINKS_S = 12.0  # of a face, to count its blinks
_FIELDS = {
    "amplitude": (0.5, 1.6),
    "blinks_per_min": (0.0, 60.0),
    "brows": (0.0, 2.0),
    "sway_yaw_deg": (0.0, 2.2),  # more is looking about, which a still cannot do
    "sway_pitch_deg": (0.0, 1.8),
    "sway_roll_deg": (0.0, 1.5),
}
_REST_MOST = 0.5
# Usual speakers: standard deviation of the inner lip gap in eye distances, and of the brows' controls.
_GAP_STD, _BROW_STD = 0.07, 0.02
# The controls of a rest pose, and how far each may be from the usual before it is taken for a habit and not for the
# shape of the face.
_REST_DEAD = {
    "mouthSmile": 0.05,
    "mouthFrown": 0.05,
    "browInnerUp": 0.3,
    "browOuterUp": 0.3,
    "browDown": 0.35,
    "eyeSquint": 0.2,
    "eyeWide": 0.05,
}
_BLINK_RISE, _BLINK_FALL = 0.25, 0.12  # above the eyes' median


@dataclass(frozen=True, slots=True)
class Style:
    """A manner of speaking. amplitude scales the mouth's motion (1 is an average speaker), rest is the expression at rest."""

    amplitude: float
    rest: Mapping[str, float]
    manner: Manner

    def as_dict(self) -> dict[str, Any]:
        """Its JSON document."""
        yaw, pitch, roll = self.manner.sway_deg
        values = (self.amplitude, self.manner.blinks_per_min, self.manner.brows, yaw, pitch, roll)
        return {
            "format": FORMAT,
            "version": VERSION,
            **{name: round(value, 3) for name, value in zip(_FIELDS, values, strict=True)},
            "rest": dict(self.rest),
        }

    @classmethod
    def of(cls, document: Any, where: str = "style") -> Style:
        """From parsed JSON.

        Raises:
            InputError: it is no style; `where` names it.
        """
        if not isinstance(document, Mapping) or document.get("format") != FORMAT:
            raise InputError(f"{where} holds no style. Make one with `beavervision style learn`.")
        if document.get("version") != VERSION:
            raise InputError(
                f"{where} is of version {reprlib.repr(document.get('version'))}; this program reads {VERSION}. Update it."
            )
        values = {name: _number(document.get(name), name, *bounds, where) for name, bounds in _FIELDS.items()}
        rest = document.get("rest")
        if not isinstance(rest, Mapping) or not set(rest) <= set(controls()):
            raise InputError(f"{where} is damaged: rest must be an object of controls and numbers.")
        sway = (values["sway_yaw_deg"], values["sway_pitch_deg"], values["sway_roll_deg"])
        return cls(
            values["amplitude"],
            {name: _number(value, name, -_REST_MOST, _REST_MOST, where) for name, value in rest.items()},
            Manner(values["blinks_per_min"], sway, values["brows"]),
        )

    @classmethod
    def read(cls, path: Path) -> Style:
        """From a JSON file.

        Raises:
            InputError: it cannot be read or holds no style.
        """
        return cls.of(read_json(path, LIMIT_BYTES), str(path))

    def write(self, path: Path) -> None:
        """Raises OutputError where that cannot be done."""
        write_json(path, self.as_dict())

    @classmethod
    def learn(cls, faces: Iterable[Face | None], rate: Fraction) -> Style:
        """The manner of a speaker from the faces of a clip at `rate` pictures a second.

        Raises:
            NoFaceError: a face is seen for less than four seconds.
        """
        shapes: list[F32] = []
        gaps: list[float] = []
        turns: list[tuple[float, float, float]] = []
        for face in faces:
            if face is None:
                continue
            pose = mesh.fit_pose(face.points_px)
            gaps.append(float(mesh.gaps(pose.to_face(face.points_px))))
            roll_deg = float(np.degrees(np.arctan2(pose.rotation[1, 0], pose.rotation[0, 0])))
            if turns:  # by the shorter way round from the last: a face that is upside down lies where degrees wrap
                last_deg = turns[-1][2]
                roll_deg = last_deg + (roll_deg - last_deg + 180) % 360 - 180
            turns.append((pose.yaw_deg, pose.pitch_deg, roll_deg))
            shapes.append(face.blendshapes)
        seconds = len(shapes) / float(rate)
        if seconds < LEAST_S:
            raise NoFaceError(
                f"A face is seen for {seconds:.1f} s only. Use a clip that shows a speaker for {LEAST_S:g} s or more."
            )
        index = {name: i for i, name in enumerate(blendshape_names())}
        seen = np.asarray(shapes, np.float64)

        def of(control: str) -> Any:
            return np.mean([seen[:, index[part]] for part in controls()[control]], axis=0)

        def usual(control: str) -> float:
            return float(np.mean([USUAL.get(part, 0.0) for part in controls()[control]]))

        rest = {}
        for control, dead in _REST_DEAD.items():
            off = float(np.median(of(control))) - usual(control)
            if abs(off) > dead:
                rest[control] = round(float(np.clip(off - math.copysign(dead, off), -_REST_MOST, _REST_MOST)), 3)
        # Between speakers it differs by factors, not by steps: the root keeps the most and the least lively natural.
        brows = math.sqrt(float(np.std(of("browInnerUp")) + np.std(of("browOuterUp"))) / 2 / _BROW_STD)
        yaw, pitch, roll = (
            _bounded(float(np.std(turn)), f"sway_{axis}_deg")
            for turn, axis in zip(np.transpose(turns), ("yaw", "pitch", "roll"), strict=True)
        )
        per_min = Manner().blinks_per_min if seconds < _BLINKS_S else _blinks(of("eyeBlink")) * 60 / seconds
        return cls(
            _bounded(float(np.std(gaps)) / _GAP_STD, "amplitude"),
            rest,
            Manner(_bounded(per_min, "blinks_per_min"), (yaw, pitch, roll), _bounded(brows, "brows")),
        )


def _blinks(closed: F32) -> int:
    """How often the eyes shut."""
    usual = float(np.median(closed))
    count, shut = 0, False
    for value in closed:
        if not shut and value > usual + _BLINK_RISE:
            count, shut = count + 1, True
        elif shut and value < usual + _BLINK_FALL:
            shut = False
    return count


def _bounded(value: float, name: str) -> float:
    low, high = _FIELDS[name]
    return round(min(max(value, low), high), 3)


def _number(value: Any, name: str, low: float, high: float, where: str) -> float:
    if not is_number(value, low, high):
        told = reprlib.repr(value)
        raise InputError(f"{where} is damaged: {name} must be a number from {low:g} to {high:g}, not {told}.")
    return float(value)
