"""The names that an expression is asked for with, and what each means for the face.

A *look* is an array (58,) of float32: the 52 controls (offsets of the ARKit blendshapes relative to the person's own neutral, -1
to 1), then the head: yaw, pitch and roll in degrees, shifts right and down in face widths, and by how much to enlarge it.
Looks add up; zeros change nothing.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TypeGuard

import numpy as np

from beavervision.errors import UsageError
from beavervision.media import BLENDSHAPES, F32
from beavervision.models.face import blendshape_names

VALUES = BLENDSHAPES + 6
YAW, PITCH, ROLL, SHIFT_X, SHIFT_Y, GROWTH = range(BLENDSHAPES, VALUES)
DEFAULT_INTENSITY = 0.6  # of a name without a number
LIMIT_CHARS = 1000  # of what is asked for in one go
AUTO = "auto"
NEUTRAL = "neutral"
_ITEM = re.compile(r"\s*([A-Za-z][\w.-]*)\s*(?::\s*([^\s:,]+)\s*)?")
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}[a-z0-9]|[a-z0-9]")

# What several blendshapes are called together, beside the pairs of Left and Right.
_TOGETHER = {
    "browUp": {"browInnerUp": 1.0, "browOuterUpLeft": 0.8, "browOuterUpRight": 0.8},
    "lookUp": {"eyeLookUpLeft": 1.0, "eyeLookUpRight": 1.0},
    "lookDown": {"eyeLookDownLeft": 1.0, "eyeLookDownRight": 1.0},
    "lookLeft": {"eyeLookOutLeft": 1.0, "eyeLookInRight": 1.0},
    "lookRight": {"eyeLookInLeft": 1.0, "eyeLookOutRight": 1.0},
}
# Degrees at 1.
_HEAD = {"headYaw": (YAW, 12.0), "headPitch": (PITCH, 10.0), "headRoll": (ROLL, 6.0)}

# What each preset means at an intensity of 1, after the prototypes of Ekman and Friesen (Facial Action Coding System, 1978),
# weaker about the lips: these speak.
PRESETS: dict[str, dict[str, float]] = {
    NEUTRAL: {},
    "happy": {"mouthSmile": 1.0, "cheekSquint": 0.4, "eyeSquint": 0.3, "browOuterUp": 0.12},
    "sad": {
        "browInnerUp": 0.8,
        "mouthFrown": 0.8,
        "mouthSmile": -0.5,
        "mouthShrugLower": 0.15,
        "eyeBlink": 0.1,
        "lookDown": 0.1,
        "headPitch": 0.25,
    },
    "surprised": {"browUp": 0.9, "eyeWide": 0.25, "headPitch": -0.15},
    "angry": {
        "browDown": 0.9,
        "eyeSquint": 0.2,
        "noseSneer": 0.25,
        "mouthPress": 0.25,
        "mouthFrown": 0.4,
        "mouthSmile": -0.35,
        "headPitch": 0.15,
    },
    "calm": {"mouthSmile": 0.2, "eyeBlink": 0.1},
    "excited": {"mouthSmile": 0.9, "browUp": 0.5, "eyeWide": 0.15, "headPitch": -0.15},
    "serious": {"browDown": 0.55, "mouthPress": 0.15, "mouthSmile": -0.3, "eyeSquint": 0.1},
}
_SUMMARIES = {
    NEUTRAL: "the person's own face",
    "happy": "a smile with the eyes",
    "sad": "inner brows up, corners of the mouth down, head a little lowered",
    "surprised": "brows up, eyes wide",
    "angry": "brows down, eyes narrow, lips pressed",
    "calm": "lids and mouth at ease",
    "excited": "a smile, brows up, eyes wide",
    "serious": "brows a little down, mouth firm",
}


@dataclass(frozen=True, slots=True)
class Known:
    """A name that can be asked for. `kind` is preset, control, head, custom or auto; low and high bound its number."""

    name: str
    kind: str
    summary: str
    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """What was asked for: a look (58,), and how strongly to follow words and voice (0: not at all)."""

    look: F32
    auto: float = 0.0

    @property
    def anything(self) -> bool:
        return bool(self.auto) or bool(self.look.any())


NOTHING = Wanted(np.zeros(VALUES, np.float32))


@cache
def controls() -> Mapping[str, Mapping[str, float]]:
    """Each named control with the blendshapes that it moves, at 1."""
    names = blendshape_names()[1:]
    single = {name: {name: 1.0} for name in names}
    bases = [name.removesuffix("Left") for name in names if name.endswith("Left")]
    pairs = {
        base: {f"{base}Left": 1.0, f"{base}Right": 1.0} for base in bases if base not in ("jaw", "mouth")
    }  # those two are directions
    return single | pairs | _TOGETHER


def known(custom: Mapping[str, F32] | None = None) -> tuple[Known, ...]:
    """All names: presets, auto, the custom expressions, controls, the head."""
    found = [Known(name, "preset", _SUMMARIES[name], 0.0, 1.0) for name in PRESETS]
    found.append(Known(AUTO, "auto", "follows the words and the voice", 0.0, 1.0))
    found += [Known(name, "custom", "recorded from a face", 0.0, 1.0) for name in sorted(custom or {})]
    for name, parts in controls().items():
        summary = "a blendshape of ARKit" if parts == {name: 1.0} else " + ".join(parts)
        found.append(Known(name, "control", summary, -1.0, 1.0))
    sides = ("to the picture's right", "down", "clockwise")
    for (name, (_, degrees)), side in zip(_HEAD.items(), sides, strict=True):
        found.append(Known(name, "head", f"{degrees:g} degrees {side}", -1.0, 1.0))
    return tuple(found)


def check_name(name: str) -> None:
    """Raises UsageError where a custom expression cannot be called `name`."""
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name for an expression. Use up to 64 small letters, digits, dots, dashes and underscores."
        )
    if name in {k.name for k in known()}:
        raise UsageError(f"{name!r} is taken: it is a preset or a control. Choose another name.")


def is_number(value: object, low: float = -math.inf, high: float = math.inf) -> TypeGuard[float]:
    """Whether a value out of JSON is a finite number from `low` to `high`; its whole numbers may be too large for a float."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return low <= value <= high and abs(value) <= sys.float_info.max


def look_of(values: Mapping[str, float], custom: Mapping[str, F32] | None = None) -> F32:
    """The look (58,) of some names with their numbers, added up; controls are held within -1 to 1.

    Raises:
        UsageError: an unknown name, or a number out of its range.
    """
    index = {name: i for i, name in enumerate(blendshape_names())}
    look = np.zeros(VALUES, np.float32)
    for name, value in values.items():
        look += _part(name, value, index, custom or {})
    look[:BLENDSHAPES] = np.clip(look[:BLENDSHAPES], -1, 1)
    return look


def _part(name: str, value: float, index: Mapping[str, int], custom: Mapping[str, F32]) -> F32:
    look = np.zeros(VALUES, np.float32)
    if name in PRESETS or name in custom:
        _check(name, value, 0.0)
        if name in custom:
            return np.asarray(custom[name] * np.float32(value), np.float32)
        for part, weight in PRESETS[name].items():
            look += _part(part, weight, index, {})
        return look * np.float32(value)
    if name in _HEAD:
        _check(name, value, -1.0)
        at, degrees = _HEAD[name]
        look[at] = value * degrees
        return look
    parts = controls().get(name)
    if parts is None:
        raise UsageError(unknown(name, custom))
    _check(name, value, -1.0)
    for part, weight in parts.items():
        look[index[part]] = value * weight
    return look


def _check(name: str, value: float, low: float) -> None:
    if not (math.isfinite(value) and low <= value <= 1):
        raise UsageError(f"{name} takes a number from {low:g} to 1, not {value:g}.")


def unknown(name: str, custom: Mapping[str, F32]) -> str:
    """What to say of a name that is not known."""
    names = [k.name for k in known(custom)]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    first = [*PRESETS, *sorted(custom), AUTO]
    return (
        f"There is no expression {name!r}."
        + (f" Did you mean {' or '.join(near)}?" if near else "")
        + f" There are {', '.join(first)}, and the controls of the face, such as jawOpen or mouthSmile."
    )


def parse(spec: str, custom: Mapping[str, F32] | None = None) -> Wanted:
    """What ``happy:0.6``, ``mouthSmile:0.4,browInnerUp:0.2`` or ``auto`` ask for; a name without a number means 0.6, `auto` 1.

    Raises:
        UsageError: not of that form, an unknown name, or a number out of its range.
    """
    if len(spec) > LIMIT_CHARS:
        raise UsageError(f"An expression has at most {LIMIT_CHARS} characters, not {len(spec)}.")
    values: dict[str, float] = {}
    auto = 0.0
    for item in spec.split(",") if spec.strip() else []:
        match = _ITEM.fullmatch(item)
        try:
            number = float(match[2]) if match and match[2] else None
        except ValueError:
            match = None
        if match is None:
            raise UsageError(
                f"Expression {spec.strip()!r}: {item.strip()!r} is not understood. Write names with a number after a "
                "colon and commas between: happy:0.6, or mouthSmile:0.4,browInnerUp:0.2."
            )
        name = match[1]
        if name in values or (name == AUTO and auto):
            raise UsageError(f"Expression {spec.strip()!r} names {name} twice.")
        if name == AUTO:
            auto = 1.0 if number is None else number
            _check(AUTO, auto, 0.0)
        else:
            values[name] = DEFAULT_INTENSITY if number is None else number
    return Wanted(look_of(values, custom), auto)
