"""Expressions of one's own: learned from a photo or a clip, kept as small JSON files without pictures, asked for by name."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from beavervision.errors import InputError, NoFaceError, OutputError, UsageError
from beavervision.expression.controls import check_name, is_number, look_of
from beavervision.files import read_json, write_json
from beavervision.media import F32, Face
from beavervision.models.face import blendshape_names

FORMAT = "beavervision-expression"
VERSION = 1
LIMIT_BYTES = 64 << 10
LIMIT_FILES = 1000
_LEAST = 0.04  # of an offset: less is noise of the net
# What an unmoved face shows, the median over speakers; what is not here is 0.
_USUAL_PAIRS = {"browDown": 0.04, "browOuterUp": 0.04, "eyeBlink": 0.12, "eyeSquint": 0.33, "mouthPress": 0.06}
USUAL = {f"{name}{side}": value for name, value in _USUAL_PAIRS.items() for side in ("Left", "Right")} | {
    "jawOpen": 0.02,
    "mouthRollUpper": 0.03,
}


@dataclass(frozen=True, slots=True)
class Custom:
    """A custom expression: the ARKit blendshapes that it moves, and how far at an intensity of 1."""

    name: str
    controls: Mapping[str, float]

    @property
    def look(self) -> F32:
        """As a look (58,), see :mod:`beavervision.expression.controls`."""
        return look_of(self.controls)

    def as_dict(self) -> dict[str, Any]:
        """Its JSON document."""
        return {"format": FORMAT, "version": VERSION, "name": self.name, "controls": dict(self.controls)}

    @classmethod
    def of(cls, document: Any, where: str, name: str | None = None) -> Custom:
        """From parsed JSON; `name` replaces its own.

        Raises:
            InputError: it is no such document; `where` names it.
            UsageError: its name cannot be used.
        """
        if not isinstance(document, Mapping) or document.get("format") != FORMAT:
            raise InputError(f"{where} holds no expression. Make one with `beavervision expression learn`.")
        if document.get("version") != VERSION:
            raise InputError(
                f"{where} is of version {reprlib.repr(document.get('version'))}; this program reads {VERSION}. Update it."
            )
        values = document.get("controls")
        if not isinstance(values, Mapping) or not values:
            raise InputError(f"{where} is damaged: it has no controls.")
        names = set(blendshape_names()[1:])
        for key, value in values.items():
            if key not in names or not is_number(value, -1, 1):
                told = f"{reprlib.repr(key)} with {reprlib.repr(value)}"
                raise InputError(f"{where} is damaged: {told} is no blendshape between -1 and 1.")
        own = name if name is not None else document.get("name")
        if not isinstance(own, str):
            raise InputError(f"{where} has no name. Give one with --name.")
        check_name(own)
        return cls(own, {key: float(value) for key, value in values.items()})


def learn(name: str, faces: Iterable[Face | None], neutral: Iterable[Face | None] | None = None) -> Custom:
    """The expression in some pictures of a person: the median, relative to `neutral` pictures of the same person.

    Without those it is relative to what unmoved faces usually show. Where the eyes look is left out.

    Raises:
        NoFaceError: no picture has a face.
        InputError: the face hardly differs from the neutral one.
        UsageError: the name cannot be used.
    """
    check_name(name)
    names = blendshape_names()
    shown = _median(faces, "the expression")
    rest = np.array([USUAL.get(n, 0.0) for n in names]) if neutral is None else _median(neutral, "the neutral face")
    values = {
        n: round(float(np.clip(v, -1, 1)), 3)
        for n, v in zip(names[1:], (shown - rest)[1:], strict=True)
        if abs(v) >= _LEAST and not n.startswith("eyeLook")
    }
    if not values:
        raise InputError("The face shows no expression there: it is the neutral one. Use a clearer picture of it.")
    return Custom(name, values)


def _median(faces: Iterable[Face | None], what: str) -> F32:
    found = [face.blendshapes for face in faces if face is not None]
    if not found:
        raise NoFaceError(f"There is no face in the pictures of {what}. Use ones that show a face from the front.")
    return np.asarray(np.median(found, axis=0), np.float32)


class ExpressionStore:
    """The custom expressions of this user, in the folder ``expressions`` of `data_dir`."""

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / "expressions"

    def list(self) -> tuple[Custom, ...]:
        """All that can be read, by name."""
        found = []
        for path in sorted(filter(Path.is_file, self._folder.glob("*.json")))[:LIMIT_FILES]:
            try:
                found.append(Custom.of(read_json(path, LIMIT_BYTES), str(path), path.stem))
            except (InputError, UsageError):
                continue  # a damaged file takes nothing from the others; `get` tells of it
        return tuple(found)

    def looks(self) -> dict[str, F32]:
        """Their looks, by name."""
        return {custom.name: custom.look for custom in self.list()}

    def get(self, name: str) -> Custom:
        """The expression called `name`.

        Raises:
            UsageError: there is none.
            InputError: its file is damaged.
        """
        path = self._path(name)
        return Custom.of(read_json(path, LIMIT_BYTES), str(path), name)

    def add(self, custom: Custom) -> Path:
        """Keep an expression; one of the same name is replaced.

        Raises:
            UsageError: its name cannot be used.
            OutputError: it cannot be written.
        """
        check_name(custom.name)
        path = self._folder / f"{custom.name}.json"
        write_json(path, custom.as_dict())
        return path

    def load(self, path: Path, name: str | None = None) -> Custom:
        """Keep the expression of a file that somebody shared.

        Raises:
            InputError, UsageError, OutputError: the file or its name cannot be used, or it cannot be kept.
        """
        custom = Custom.of(read_json(path, LIMIT_BYTES), str(path), name)
        self.add(custom)
        return custom

    def remove(self, name: str) -> None:
        """Raises UsageError where there is none, OutputError where it cannot be removed."""
        path = self._path(name)
        try:
            path.unlink()
        except OSError as error:
            raise OutputError(f"{path} cannot be removed: {error.strerror}. Check the rights.") from error

    def _path(self, name: str) -> Path:
        check_name(name)
        path = self._folder / f"{name}.json"
        if not path.is_file():
            known = ", ".join(custom.name for custom in self.list()) or "none"
            raise UsageError(f"There is no expression of yours called {name!r}. There is: {known}.")
        return path
