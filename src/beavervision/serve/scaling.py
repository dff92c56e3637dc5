"""How many workers a server has: more while jobs wait for one, fewer when some had nothing to do for long."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from beavervision.serve.schema import MemoryOut


class Scaler:
    """Between `least` and `most` workers. One that has been too many for `idle_s` seconds without a break may go."""

    def __init__(self, least: int, most: int, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._least, self._most, self._idle_s, self._clock = least, most, idle_s, clock
        self._spare_since_s = [clock()] * most  # element k: since when more than k workers have been without a job

    def wanted(self, workers: int, busy: int, waiting: int) -> int:
        """How many there should be.

        Args:
            workers: how many can take jobs now or, as they are starting, soon.
            busy: how many of them have one.
            waiting: jobs that could be taken now.
        """
        now_s = self._clock()
        spare = max(workers - busy - waiting, 0)
        self._spare_since_s[spare:] = [now_s] * (self._most - spare)
        if workers < busy + waiting:
            return max(self._least, min(self._most, busy + waiting))
        idle = sum(now_s - since_s >= self._idle_s for since_s in self._spare_since_s[:spare])
        return max(self._least, workers - idle)


def room(memory: Sequence[MemoryOut], more: int = 1) -> bool:
    """Whether each device has memory for so many workers `more`, as large as the largest of those that told theirs.

    A CPU's `used_bytes` are those of one process, a GPU's those of everybody.
    """
    for device in {use.device for use in memory}:
        uses = [use for use in memory if use.device == device]
        used = [use.used_bytes for use in uses]
        now, each = (sum(used), max(used)) if device == "cpu" else (max(used), max(used) / len(used))
        if now + more * each > uses[0].budget_bytes:
            return False
    return True
