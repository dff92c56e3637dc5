"""The sample material that ships in the package (see ``samples/NOTICE``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path

SENTENCE = "Hello! This picture never spoke before. Now it says whatever you write, and the lips follow every word."


@contextmanager
def portrait() -> Iterator[Path]:
    """The portrait as a file: a still of 512 x 512 pixels with one face, from the front."""
    with as_file(files("beavervision") / "samples" / "eileen_collins.png") as path:
        yield path
