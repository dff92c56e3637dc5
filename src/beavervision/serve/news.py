"""News of jobs, from the threads that hear of them to the requests that wait for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class News:
    """Who waits for which job. Safe from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, set[_Bell]] = {}

    def told(self, job_id: str) -> None:
        """Something changed about the job."""
        with self._lock:
            for bell in self._waiting.get(job_id, ()):
                bell.ring()

    @contextmanager
    def watch(self, job_id: str) -> Iterator[_Bell]:
        """A bell that rings at each news of the job; for one task of the running loop."""
        bell = _Bell()
        with self._lock:
            self._waiting.setdefault(job_id, set()).add(bell)
        try:
            yield bell
        finally:
            with self._lock:
                self._waiting[job_id].discard(bell)
                if not self._waiting[job_id]:
                    del self._waiting[job_id]


class _Bell:
    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def ring(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._event.set)
        except RuntimeError:  # the loop has ended
            return

    async def wait(self, seconds: float) -> None:
        """Until the next ring since the last wait, or `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self._event.wait()
        except TimeoutError:
            return
        finally:
            self._event.clear()
