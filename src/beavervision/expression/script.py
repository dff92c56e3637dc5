"""What a face is to express, told while it runs: the thread-safe meeting place of callers, speech and the stage."""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Mapping
from dataclasses import dataclass

from beavervision.expression.controls import Wanted, parse
from beavervision.expression.track import Track
from beavervision.media import F32

LEAD_S = 0.1  # a face begins to change so long before the words that it goes with


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What holds for one picture: what was asked for or marked, and the track's look (58,), None without a track.

    A mark silences the track, and one other than ``[auto]`` the mood that ``auto`` finds, though not its accents. valence is
    that of the sentence being said, -1 to 1, None where no text is known.
    """

    wanted: Wanted
    moved: F32 | None
    follows_track: bool
    follows_mood: bool
    valence: float | None


class Script:
    """The expression of one run. `spec` is as :func:`~beavervision.expression.controls.parse`; `track` is added to it.

    :meth:`set` may be called from any thread while the run goes on: the face passes smoothly into what is asked for.

    Raises:
        UsageError: `spec` is not understood.
    """

    def __init__(self, spec: str = "", track: Track | None = None, custom: Mapping[str, F32] | None = None) -> None:
        self._custom = dict(custom or {})
        self._track = track
        self._base = parse(spec, self._custom)
        self._lock = threading.Lock()
        self._marked: Wanted | None = None
        self._marks: list[tuple[float, int, Wanted]] = []
        self._said: list[tuple[float, int, float]] = []
        self._valence: float | None = None
        self._count = 0
        self._expects = self._base.anything or track is not None

    @property
    def anything(self) -> bool:
        """Whether the script asks for anything, now or later."""
        return self._expects

    @property
    def custom(self) -> Mapping[str, F32]:
        """The looks of the custom expressions, by name."""
        return self._custom

    def set(self, spec: str) -> None:
        """Ask for `spec` from the next picture on, in place of what was asked for and marked so far.

        Raises:
            UsageError: it is not understood; the old one stays.
        """
        wanted = parse(spec, self._custom)
        with self._lock:
            self._base, self._marked, self._expects = wanted, None, True

    def mark(self, time_s: float, wanted: Wanted) -> None:
        """Let `wanted` hold from a time on, until the next mark."""
        with self._lock:
            self._count += 1
            insort(self._marks, (time_s, self._count, wanted))

    def expect(self) -> None:
        """Say that marks will come."""
        self._expects = True

    def said(self, time_s: float, valence: float) -> None:
        """Tell how glad the sentence that begins at a time is."""
        with self._lock:
            self._count += 1
            insort(self._said, (time_s, self._count, valence))

    def forget(self) -> None:
        """Forget the marks and sentences whose time has not come: what they belong to will not be said."""
        with self._lock:
            self._marks.clear()
            self._said.clear()

    def at(self, time_s: float) -> Asked:
        """What holds at a time; times must not go back."""
        with self._lock:
            while self._marks and self._marks[0][0] <= time_s + LEAD_S:
                self._marked = self._marks.pop(0)[2]
            while self._said and self._said[0][0] <= time_s + LEAD_S:
                self._valence = self._said.pop(0)[2]
            base, marked, valence = self._base, self._marked, self._valence
        moved = None if self._track is None else self._track.at(time_s)
        if marked is None:
            return Asked(base, moved, True, True, valence)
        wanted = Wanted(marked.look, max(base.auto, marked.auto))
        return Asked(wanted, moved, False, bool(marked.auto), valence)
