"""How much one client may ask for: requests a second (a token bucket each), and seconds of video a day."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

_KNOWN = 10_000  # clients that are remembered; who was forgotten begins with a full bucket


@dataclass(frozen=True, slots=True)
class Allowance:
    """`rate_per_s` requests on the average and `burst` at once, `daily_media_s` of video in 24 hours; 0: no limit."""

    rate_per_s: float
    burst: int
    daily_media_s: float


class Buckets:
    """A token bucket for each client. Safe from many threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when they were counted

    def take(self, client: str, allowed: Allowance) -> float:
        """Take a token of the client's; 0, or in how many seconds there will be one."""
        if allowed.rate_per_s <= 0:
            return 0.0
        now_s = self._clock()
        with self._lock:
            tokens, counted_s = self._left.pop(client, (float(allowed.burst), now_s))
            tokens = min(float(allowed.burst), tokens + (now_s - counted_s) * allowed.rate_per_s)
            enough = tokens >= 1
            self._left[client] = (tokens - 1 if enough else tokens, now_s)
            if len(self._left) > _KNOWN:
                self._left.popitem(last=False)
        return 0.0 if enough else (1 - tokens) / allowed.rate_per_s
