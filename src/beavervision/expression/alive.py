"""What a face does unasked: it blinks, breathes, sways a little, moves its brows and stresses words; seeded, to be repeatable.

Everything is a function of the time and of events in their order, never of how pictures are cut into clips.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from beavervision.expression.controls import GROWTH, PITCH, ROLL, SHIFT_X, SHIFT_Y, VALUES, YAW, look_of
from beavervision.media import F32

_CLOSE_S, _SHUT_S, _OPEN_S = 0.08, 0.05, 0.17  # of a blink; shut long enough for a picture at 25 a second
_BLINK_S = _CLOSE_S + _SHUT_S + _OPEN_S
_APART_S = 1.0  # between two blinks, at least
_AT_PHRASE_END = 0.55  # the probability of a blink there
_LATER = (0.55, 1.6)  # the shares of the mean interval between which blinks come
_FADE_S = 1.0  # a still begins as it is
_RISE_S, _STAY_S, _FALL_S = 0.16, 0.08, 0.34  # of an accent
_GESTURES = 4  # at once
_BREATH_S = 3.9
# Seconds of the slow waves that make up a motion, and their shares.
_WAVES_S, _SHARES = np.array([7.9, 4.7, 3.1]), np.array([0.8, 0.5, 0.33])


@dataclass(frozen=True, slots=True)
class Manner:
    """How lively a face is. sway is the standard deviation of yaw, pitch and roll in degrees; brows scales their motion."""

    blinks_per_min: float = 17.0
    sway_deg: tuple[float, float, float] = (1.1, 0.8, 0.6)
    brows: float = 1.0


class Blinks:
    """When the eyes are shut. For one stream."""

    def __init__(self, seed: int, per_min: float) -> None:
        self._random = np.random.default_rng([seed, 1])
        self._mean_s = 60 / per_min if per_min > 0 else np.inf
        self._start_s = -_BLINK_S
        self._next_s = self._interval() * 0.7

    def at(self, time_s: float, phrase_end: bool, own: bool) -> float:
        """How far the lids are closed, 0 to 1; `own` says that the source's eyes are shut anyway."""
        if own:
            self._start_s, self._next_s = time_s - _BLINK_S, time_s + self._interval()
        elif time_s >= self._next_s:
            self._begin(self._next_s)
        if phrase_end:
            wanted = self._random.random() < _AT_PHRASE_END
            if wanted and np.isfinite(self._mean_s) and time_s - self._start_s > _APART_S:
                self._begin(time_s)
        since = time_s - self._start_s
        if since < _CLOSE_S:
            return _smooth(since / _CLOSE_S)
        return 1.0 - _smooth((since - _CLOSE_S - _SHUT_S) / _OPEN_S)

    def _begin(self, time_s: float) -> None:
        self._start_s, self._next_s = time_s, time_s + self._interval()

    def _interval(self) -> float:
        return (
            float(max(self._mean_s * self._random.uniform(*_LATER), _APART_S)) if np.isfinite(self._mean_s) else np.inf
        )


class Gestures:
    """Brows and head on stressed syllables. For one stream."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng([seed, 2])
        self._going: list[tuple[float, F32]] = []
        self._brow = look_of({"browInnerUp": 0.22, "browOuterUp": 0.28, "eyeWide": 0.06})
        self._nod = look_of({"headPitch": 0.16})

    def begin(self, time_s: float, strength: float) -> None:
        """An accent from a time on."""
        brow, nod, tilt = self._random.uniform((0.5, 0.4, -0.5), (1.0, 1.0, 0.5))
        look = self._brow * np.float32(brow * strength) + self._nod * np.float32(nod * strength)
        look[ROLL] += np.float32(tilt * strength)
        self._going = [*self._going[1 - _GESTURES :], (time_s, look)]

    def at(self, time_s: float) -> F32:
        """Their look (58,)."""
        total = np.zeros(VALUES, np.float32)
        self._going = [(s, look) for s, look in self._going if time_s - s < _RISE_S + _STAY_S + _FALL_S]
        for start_s, look in self._going:
            since = time_s - start_s
            up = _smooth(since / _RISE_S) * (1 - _smooth((since - _RISE_S - _STAY_S) / _FALL_S))
            total += look * np.float32(up)
        return total


class Sway:
    """Slow motion of head and brows, and breath; a function of the time."""

    def __init__(self, seed: int, manner: Manner) -> None:
        random = np.random.default_rng([seed, 3])
        brow_up, brow_side = look_of({"browUp": 1.0}), look_of({"browOuterUpLeft": 0.6, "browOuterUpRight": -0.6})
        shift = np.zeros((2, VALUES), np.float32)
        shift[0, SHIFT_X], shift[1, SHIFT_Y] = 1, 1
        turn = np.zeros((3, VALUES), np.float32)
        turn[[0, 1, 2], [YAW, PITCH, ROLL]] = manner.sway_deg
        sway = float(np.mean(manner.sway_deg))
        brows = (brow_up * 0.05 * manner.brows, brow_side * 0.03 * manner.brows)
        self._parts = np.stack([*turn, shift[0] * 0.004 * sway, shift[1] * 0.002 * sway, *brows])
        shape = (len(self._parts), len(_WAVES_S))
        self._hz = 1 / (_WAVES_S * random.uniform(0.85, 1.18, shape))
        self._phase = random.uniform(0, 2 * np.pi, shape)
        self._breath = np.zeros(VALUES, np.float32)
        self._breath[[SHIFT_Y, GROWTH, PITCH]] = (-0.003, 0.0025, -0.15)
        self._breath_phase = float(random.uniform(0, 2 * np.pi))

    def at(self, time_s: float) -> F32:
        """Its look (58,)."""
        waves = np.sin(2 * np.pi * self._hz * time_s + self._phase) @ _SHARES * 1.41
        breath = np.sin(2 * np.pi * time_s / _BREATH_S + self._breath_phase)
        look = waves.astype(np.float32) @ self._parts + self._breath * np.float32(breath)
        return np.asarray(look * np.float32(_smooth(time_s / _FADE_S)), np.float32)


def _smooth(x: float) -> float:
    x = min(max(x, 0.0), 1.0)
    return x * x * (3 - 2 * x)
