"""Expressions over time: keyframes, and how one passes into the next."""

from __future__ import annotations

import reprlib
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beavervision.errors import UsageError
from beavervision.expression.controls import AUTO, is_number, look_of, parse
from beavervision.files import read_json
from beavervision.media import F32

LIMIT_KEYS = 10_000
LIMIT_BYTES = 4 << 20
_FIELDS = ("time_s", "expression", "ease")
# How a key is come to from the one before it, as a share of the way over the share of the time.
EASINGS: dict[str, Callable[[float], float]] = {
    "in-out": lambda x: x * x * (3 - 2 * x),
    "in": lambda x: x * x,
    "out": lambda x: x * (2 - x),
    "linear": lambda x: x,
    "hold": lambda x: 0.0,
}


@dataclass(frozen=True, slots=True, eq=False)
class Key:
    """The look (58,) at a time; `ease` is how it is come to, a name of :data:`EASINGS`."""

    time_s: float
    look: F32
    ease: str = "in-out"


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """Keys in order of time. Before the first and after the last the nearest one holds."""

    keys: tuple[Key, ...]

    def at(self, time_s: float) -> F32:
        """The look (58,) at a time."""
        i = bisect_right(self.keys, time_s, key=lambda key: key.time_s)
        if i == 0 or i == len(self.keys):
            return self.keys[min(i, len(self.keys) - 1)].look
        before, after = self.keys[i - 1], self.keys[i]
        part = EASINGS[after.ease]((time_s - before.time_s) / (after.time_s - before.time_s))
        return before.look + (after.look - before.look) * part

    @classmethod
    def of(cls, document: Any, custom: Mapping[str, F32] | None = None, name: str = "expression_track") -> Track:
        """From parsed JSON: ``{"keyframes": [{"time_s": 0, "expression": "happy:0.6", "ease": "in-out"}, ...]}`` or the list.

        An expression is a string as on the command line, or an object of names and numbers.

        Raises:
            UsageError: it is none; the message names the keyframe.
        """
        rows = document.get("keyframes") if isinstance(document, Mapping) else document
        if isinstance(document, Mapping) and set(document) != {"keyframes"}:
            raise UsageError(f"{name}: expected an object with the one field keyframes, or a list of keyframes.")
        if not isinstance(rows, Sequence) or isinstance(rows, str) or not 0 < len(rows) <= LIMIT_KEYS:
            raise UsageError(f"{name}: keyframes must be a list of 1 to {LIMIT_KEYS} objects.")
        keys: list[Key] = []
        for number, row in enumerate(rows, start=1):
            where = f"{name}, keyframe {number}"
            try:
                keys.append(_key(row, custom))
            except UsageError as error:
                raise UsageError(f"{where}: {error}") from error
            if len(keys) > 1 and keys[-1].time_s <= keys[-2].time_s:
                raise UsageError(f"{where}: its time {keys[-1].time_s:g} s is not after that of the one before.")
        return cls(tuple(keys))

    @classmethod
    def read(cls, path: Path, custom: Mapping[str, F32] | None = None) -> Track:
        """From a JSON file.

        Raises:
            InputError: it cannot be read or is no JSON.
            UsageError: as :meth:`of`.
        """
        return cls.of(read_json(path, LIMIT_BYTES), custom, str(path))


def _key(row: Any, custom: Mapping[str, F32] | None) -> Key:
    if not isinstance(row, Mapping) or "time_s" not in row or "expression" not in row:
        raise UsageError("it must be an object with time_s and expression.")
    if odd := sorted(set(row) - set(_FIELDS)):
        raise UsageError(f"unknown field {odd[0]!r}; known are {', '.join(_FIELDS)}.")
    time_s, asked, ease = row["time_s"], row["expression"], row.get("ease", "in-out")
    if not is_number(time_s, 0):
        raise UsageError(f"time_s is a number of seconds from 0, not {reprlib.repr(time_s)}.")
    if not isinstance(ease, str) or ease not in EASINGS:
        raise UsageError(f"ease {reprlib.repr(ease)}: use {', '.join(EASINGS)}.")
    if isinstance(asked, str):
        wanted = parse(asked, custom)
        if wanted.auto:
            raise UsageError(f"{AUTO} cannot change over time; give it beside the track, as the expression.")
        return Key(float(time_s), wanted.look, ease)
    if not isinstance(asked, Mapping) or not all(isinstance(k, str) and is_number(v) for k, v in asked.items()):
        raise UsageError("expression is a string such as happy:0.6, or an object of names and numbers.")
    return Key(float(time_s), look_of({name: float(value) for name, value in asked.items()}, custom), ease)
