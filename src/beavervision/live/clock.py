"""The clock of live sessions: the machine's, or one that a test turns by hand."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since some moment, never going back."""

    inline: bool  # whether sessions work in the thread that takes their pictures, instead of threads of their own

    def now(self) -> float: ...

    async def sleep_until(self, at_s: float) -> None:
        """Return at `at_s`, at once if that has passed."""
        ...

    def wait_until(self, at_s: float) -> None:
        """The same, blocking the thread."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    inline = False

    def now(self) -> float:
        return time.monotonic()

    async def sleep_until(self, at_s: float) -> None:
        await asyncio.sleep(max(at_s - time.monotonic(), 0))

    def wait_until(self, at_s: float) -> None:
        time.sleep(max(at_s - time.monotonic(), 0))


class ManualClock:
    """Time passes only when somebody waits for it or calls :meth:`advance`: sessions run as fast as they can, and
    always alike.
    """

    inline = True

    def __init__(self) -> None:
        self._now_s = 0.0

    def now(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        self._now_s += seconds

    async def sleep_until(self, at_s: float) -> None:
        self.wait_until(at_s)
        await asyncio.sleep(0)

    def wait_until(self, at_s: float) -> None:
        self._now_s = max(self._now_s, at_s)
