"""A bounded queue between two threads, with one policy for what happens when it is full.

A file waits. A live session gives `merge`: when the queue is full, the oldest two neighbours that it agrees to
merge become one, so that pictures go and sound stays.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Cancelled(BaseException):
    """The other side has gone: stop, clean up, hand nothing on.

    Not an Exception, so that code which translates the errors of its libraries lets it through.
    """


class Channel(Generic[T]):
    """From one producer to one consumer, at most `depth` items on the way.

    `merge(older, newer)` returns the item that stands for both, or None where neither may go; it runs under the
    channel's lock, so it must be quick. If no neighbours can be merged, `put` waits.
    """

    def __init__(
        self,
        depth: int,
        merge: Callable[[T, T], T | None] | None = None,
        count: Callable[[int], object] | None = None,
    ) -> None:
        if depth < 1:
            raise ValueError(f"a channel holds at least one item, not {depth}")
        self._depth = depth
        self._merge = merge
        self._count = count or (lambda _: None)
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._cancelled = False
        self._error: BaseException | None = None

    def put(self, item: T) -> int:
        """Hand `item` on; returns how many items were merged away for it.

        Raises:
            Cancelled: the channel was cancelled, before or while waiting.
        """
        with self._changed:
            while True:
                if self._cancelled:
                    raise Cancelled
                if self._closed:
                    raise ValueError("put on a closed channel")
                if len(self._items) < self._depth:
                    break
                if self._make_room(item):
                    return 1
                self._changed.wait()
            self._items.append(item)
            self._count(1)
            self._changed.notify_all()
        return 0

    def _make_room(self, item: T) -> bool:
        """Append `item` to a full queue by merging the oldest neighbours that allow it."""
        if self._merge is None:
            return False
        self._items.append(item)
        for index in range(len(self._items) - 1):
            merged = self._merge(self._items[index], self._items[index + 1])
            if merged is not None:
                self._items[index] = merged
                del self._items[index + 1]
                return True
        self._items.pop()
        return False

    def get(self, timeout_s: float | None = None) -> T:
        """The next item.

        Raises:
            EOFError: the channel was closed and everything was taken.
            Cancelled: the channel was cancelled.
            TimeoutError: nothing came in `timeout_s`.
            BaseException: what `close` was given, once everything was taken.
        """
        with self._changed:
            ready = self._changed.wait_for(lambda: self._items or self._closed or self._cancelled, timeout_s)
            if not ready:
                raise TimeoutError
            if self._cancelled:
                raise Cancelled
            if self._items:
                item = self._items.popleft()
                self._count(-1)
                self._changed.notify_all()
                return item
            if self._error is not None:
                raise self._error
            raise EOFError

    def __iter__(self) -> Iterator[T]:
        while True:
            try:
                item = self.get()
            except EOFError:
                return
            yield item
            del item  # not held while waiting for the next

    def __len__(self) -> int:
        return len(self._items)

    def close(self, error: BaseException | None = None) -> None:
        """Nothing more will be put; what is queued can be taken, then comes `error` or the end. First call counts."""
        with self._changed:
            if not self._closed:
                self._closed, self._error = True, error
            self._changed.notify_all()

    def cancel(self) -> None:
        """Drop what is queued and wake both sides at once: each gets :class:`Cancelled`."""
        with self._changed:
            self._cancelled = True
            self._count(-len(self._items))
            self._items.clear()
            self._changed.notify_all()
