"""Joining the waiting calls of several threads to one network into one call.

There is no thread of its own: the caller that has waited longest runs the batch for all. While a batch runs the next
one gathers, so under load batches form without any delay; otherwise the oldest call waits for the others at most
`deadline_ms`, and not at all if no other thread has called lately.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from beavervision import metrics
from beavervision.errors import BeaverVisionError
from beavervision.media import Net

_LATELY_DEADLINES = 20.0

Array = npt.NDArray[np.generic]


@dataclass(slots=True, eq=False)
class _Call:
    inputs: tuple[Array, ...]
    rows: int
    kind: tuple[tuple[np.dtype[np.generic], tuple[int, ...]], ...]
    since_s: float
    outputs: tuple[Array, ...] | None = None
    error: BaseException | None = None


class MicroBatcher:
    """A :class:`~beavervision.media.Net` that joins concurrent calls of equal trailing shapes and types.

    `net` gets at most `max_batch` rows at once (larger calls are cut) and is never called by two threads at a time.
    Its outputs must have one row for each row of input. The CPU time of a joined batch counts for the stage whose
    thread ran it.
    """

    def __init__(self, net: Net, max_batch: int, deadline_ms: float, name: str = "net") -> None:
        if max_batch < 1 or deadline_ms < 0:
            raise ValueError(f"max_batch {max_batch} must be at least 1 and deadline_ms {deadline_ms} at least 0")
        self._net = net
        self._max_batch = max_batch
        self._deadline_s = deadline_ms / 1e3
        self._sizes = metrics.BATCH_SIZE.labels(name)
        self._changed = threading.Condition()
        self._waiting: list[_Call] = []  # oldest first
        self._busy = False
        self._closed = False
        self._seen_s: dict[int, float] = {}  # when each thread called last

    @property
    def max_batch(self) -> int:
        return self._max_batch

    def halve(self) -> bool:
        """Halve the largest batch; False if it is 1 already. For a device that runs out of memory."""
        with self._changed:
            if self._max_batch == 1:
                return False
            self._max_batch //= 2
            return True

    def __call__(self, *inputs: Array) -> tuple[Array, ...]:
        """Outputs for these rows alone.

        Raises:
            ValueError: the inputs do not have the same number of rows.
            BeaverVisionError: closed; or the network returned another number of rows.
            Exception: what the network raised, for every call of that batch.
        """
        rows = {len(x) for x in inputs}
        if len(rows) != 1:
            raise ValueError(f"inputs need one common number of rows, not shapes {[x.shape for x in inputs]}")
        now_s = time.monotonic()
        call = _Call(inputs, rows.pop(), tuple((x.dtype, x.shape[1:]) for x in inputs), now_s)
        with self._changed:
            if self._closed:
                raise BeaverVisionError("this network was closed. Load the pipeline again to use it.")
            self._seen_s[threading.get_ident()] = now_s
            self._waiting.append(call)
            self._changed.notify_all()
            try:
                while call.outputs is None and call.error is None:
                    if self._busy or self._waiting[0] is not call:
                        self._changed.wait()
                    else:
                        self._lead(call)
            finally:
                if call in self._waiting:  # interrupted meanwhile
                    self._waiting.remove(call)
                self._seen_s[threading.get_ident()] = time.monotonic()
                self._changed.notify_all()
        if call.error is not None:
            raise call.error
        assert call.outputs is not None
        return call.outputs

    def close(self) -> None:
        """Refuse new calls and wait until those under way have ended."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting and not self._busy)

    def _lead(self, first: _Call) -> None:
        """Gather a batch behind `first` and run it, with the lock released meanwhile."""
        self._busy = True
        batch: list[_Call] = []
        try:
            self._gather(first)
            rows = 0
            for call in self._waiting:
                if call.kind == first.kind and (call is first or rows + call.rows <= self._max_batch):
                    batch.append(call)
                    rows += call.rows
            self._waiting = [call for call in self._waiting if call not in batch]
            self._changed.release()
            try:
                outputs = self._evaluate(batch, rows)
            finally:
                self._changed.acquire()
            start = 0
            for call in batch:
                call.outputs = tuple(y[start : start + call.rows] for y in outputs)
                start += call.rows
        except Exception as error:
            for call in batch:
                call.error = error
        except BaseException:  # Ctrl-C in this thread: the others' calls are run by one of them
            self._waiting[:0] = [call for call in batch if call is not first]
            raise
        finally:
            self._busy = False
            self._changed.notify_all()

    def _gather(self, first: _Call) -> None:
        """Wait until the batch is full, everybody active waits too, or `first` is due."""
        due_s = first.since_s + self._deadline_s
        while not self._closed:
            rows = sum(call.rows for call in self._waiting if call.kind == first.kind)
            left_s = due_s - time.monotonic()
            if rows >= self._max_batch or len(self._waiting) >= self._active() or left_s <= 0:
                return
            self._changed.wait(left_s)

    def _active(self) -> int:
        """How many threads have called within the last few deadlines; those waiting now count anyway."""
        oldest_s = time.monotonic() - _LATELY_DEADLINES * self._deadline_s
        self._seen_s = {thread: at_s for thread, at_s in self._seen_s.items() if at_s >= oldest_s}
        return len(self._seen_s)

    def _evaluate(self, batch: Sequence[_Call], rows: int) -> tuple[Array, ...]:
        joined = batch[0].inputs
        if len(batch) > 1:
            joined = tuple(np.concatenate(parts) for parts in zip(*(call.inputs for call in batch), strict=True))
        step = self._max_batch
        pieces = []
        for start in range(0, max(rows, 1), step):
            piece = tuple(x[start : start + step] for x in joined)
            self._sizes.observe(len(piece[0]))
            pieces.append(self._net(*piece))
        outputs = pieces[0] if len(pieces) == 1 else tuple(np.concatenate(ys) for ys in zip(*pieces, strict=True))
        if any(len(y) != rows for y in outputs):
            raise BeaverVisionError(
                f"the network returned shapes {[y.shape for y in outputs]} for {rows} rows. "
                "Export it with the batch as the first axis of every output."
            )
        return outputs
