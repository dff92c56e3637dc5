"""What tests of the service send and get."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from beavervision.serve.loadtest import form

PATIENCE_S = 60.0  # for what takes a second on a free machine


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def multipart(fields: dict[str, bytes | str]) -> tuple[bytes, str]:
    """A form with a hostile name for each file, and its content type."""
    return form(fields, "../../x.mp4")


def until(true: Callable[[], Any], patience_s: float = PATIENCE_S) -> None:
    deadline_s = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.05)


class Clock:
    """A clock that stands until a test moves it."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s
