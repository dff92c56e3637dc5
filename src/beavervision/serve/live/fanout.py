"""Encoded packets to everybody who watches. All on the event loop's thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from types import TracebackType

from beavervision.serve.live.encoder import Coded, Kind

_WAITING = 250  # packets of a viewer: two to four seconds


class Ended(Exception):
    """The session has ended: nothing more comes."""


class Fanout:
    """Where viewers subscribe. `ask_for_key` is called when one needs a key picture to begin, or to go on, with."""

    def __init__(self, ask_for_key: Callable[[], None]) -> None:
        self.ask_for_key = ask_for_key
        self._views: set[View] = set()
        self._ended = False

    def __len__(self) -> int:
        return len(self._views)

    def wants(self, kind: Kind) -> bool:
        return any(kind in view.kinds for view in self._views)

    def view(self, *kinds: Kind) -> View:
        """Raises Ended."""
        if self._ended:
            raise Ended
        view = View(frozenset(kinds), self._views, self.ask_for_key)
        self._views.add(view)
        if Kind.VIDEO in view.kinds:
            self.ask_for_key()
        return view

    def publish(self, packets: list[Coded]) -> None:
        for view in tuple(self._views):
            view.put(packets)

    def end(self) -> None:
        self._ended = True
        for view in tuple(self._views):
            view.close()


class View:
    """What one viewer has still to get. It begins with a key picture. A viewer who is too slow skips to the next one, and
    loses the sound of that time too."""

    def __init__(self, kinds: frozenset[Kind], views: set[View], on_lag: Callable[[], None]) -> None:
        self.kinds = kinds
        self.skipped = 0
        self._views, self._on_lag = views, on_lag
        self._waiting: deque[Coded] = deque()
        self._news = asyncio.Event()
        self._begun = Kind.VIDEO not in kinds
        self._open = True

    def put(self, packets: list[Coded]) -> None:
        if len(self._waiting) > _WAITING:
            self.skipped += len(self._waiting)
            self._waiting.clear()
            if Kind.VIDEO in self.kinds:
                self._begun = False
                self._on_lag()
        for packet in packets:
            if packet.kind in self.kinds:
                self._begun = self._begun or (packet.kind is Kind.VIDEO and packet.keyframe)
                if self._begun:
                    self._waiting.append(packet)
        if self._waiting:
            self._news.set()

    async def get(self) -> Coded:
        """The next packet. Raises Ended."""
        while not self._waiting:
            if not self._open:
                raise Ended
            self._news.clear()
            await self._news.wait()
        return self._waiting.popleft()

    def close(self) -> None:
        self._open = False
        self._waiting.clear()
        self._views.discard(self)
        self._news.set()

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
