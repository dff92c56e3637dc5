"""What the lips must do at a speech sound, and motion that is led there where the sounds are known.

A motion network hears a p before a pause, or an f behind a wide vowel, too late or too faintly now and then. Synthetic speech
tells its phones and their times, so that such a lapse can be mended: at the sound the lips may be so far apart, or so wide, and
before and after it only as much more as lips can move meanwhile. Motion within these bounds stays as it is heard.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from beavervision.media import F32, Phone
from beavervision.models.basis import MotionBasis

# In eye distances over the rest mouth, whose lips touch.
_CLOSED_GAP, _BITTEN_GAP, _ROUND_WIDTH = -0.005, 0.02, -0.05
_OPENING, _WIDENING = 2.5, 0.7  # the most a second: about what the fastest lips of real clips do
_EARLY_MS = 40.0  # that lips are there before the sound is: motion that is heard agrees best with phones so moved
_CLOSURE_SHARE = 0.7  # of a plosive, from its start: what follows is its release
_BITE_EDGE = 0.1  # of an f or a v, at either end
_AHEAD_MS = 140.0  # a phone is known before it starts, no more: live speech is heard no further ahead
_BACK_MS = 200.0
_LEAST_MS = 25.0  # that the lips stay
_SILENCE_MS, _WAIT_MS = 200, 40.0  # after so much silence they are there so long before, and wait for the sound


class Lips(StrEnum):
    """What a phone asks of them."""

    CLOSED = "closed"
    LIP_TEETH = "lip to teeth"
    ROUNDED = "rounded"


_BY_FIRST = {
    **dict.fromkeys("pbm", Lips.CLOSED),
    **dict.fromkeys("fvʋɱ", Lips.LIP_TEETH),
    **dict.fromkeys("wuʊoyøʏɥ", Lips.ROUNDED),
}


def lips_at(ipa: str) -> Lips | None:
    """What the phone `ipa` asks of the lips, None where they are free. Of a diphthong and an affricate the beginning counts, but
    əʊ is rounded."""
    return Lips.ROUNDED if ipa.startswith("əʊ") else _BY_FIRST.get(ipa[:1])


def speaking(phones: Sequence[Phone], start: int, rate: Fraction, count: int) -> npt.NDArray[np.bool_]:
    """Whether one of the `phones` is said or soon to be, at each of `count` pictures from number `start` on, at `rate` a second."""
    times_ms = (start + np.arange(count)) * float(1000 / rate)
    begins, ends = (np.array([getattr(p, edge) for p in phones]) for edge in ("start_ms", "end_ms"))
    near = (begins - times_ms[:, None] <= _AHEAD_MS) & (ends > times_ms[:, None])
    return np.asarray(near.any(axis=1))


class Lead:
    """Keeps mouth motion within what the phones that are said allow."""

    def __init__(self, basis: MotionBasis) -> None:
        self._gap, self._width = basis.opening, basis.width
        # The least change of all coefficients that changes the one by so much and leaves the other as it is.
        self._opens, self._widens = np.linalg.pinv(np.stack([self._gap, self._width])).T.astype(np.float32)

    def __call__(self, motion: F32, start: int, rate: Fraction, phones: Sequence[Phone]) -> F32:
        """Coefficients (n, k) of pictures from number `start` on, at `rate` a second, with what the `phones` ask of them."""
        if not phones:
            return motion
        picture_ms = float(1000 / rate)
        times_ms = (start + np.arange(len(motion))) * picture_ms
        gap, width = np.full(len(motion), np.inf), np.full(len(motion), np.inf)
        silent_since: float = -np.inf
        for phone in phones:
            lips, first = lips_at(phone.ipa), phone.start_ms - silent_since > _SILENCE_MS
            silent_since = phone.end_ms
            if lips is None:
                continue
            begin, end = _held(phone, lips)
            # At least one picture shows it.
            reach = max(end - begin, picture_ms, _LEAST_MS) / 2
            away_ms = np.maximum(np.abs(times_ms + _EARLY_MS - (begin + end) / 2) - reach, 0)
            if first:
                before = times_ms + _EARLY_MS < (begin + end) / 2
                away_ms[before] = np.maximum(away_ms[before] - _WAIT_MS, 0)
            away_ms[(phone.start_ms - times_ms > _AHEAD_MS) | (times_ms - phone.end_ms > _BACK_MS)] = np.inf
            if lips is Lips.ROUNDED:
                np.minimum(width, _ROUND_WIDTH + _WIDENING / 1000 * away_ms, out=width)
            else:
                least = _CLOSED_GAP if lips is Lips.CLOSED else _BITTEN_GAP
                np.minimum(gap, least + _OPENING / 1000 * away_ms, out=gap)
        open_by, wide_by = np.maximum(motion @ self._gap - gap, 0), np.maximum(motion @ self._width - width, 0)
        return np.asarray(motion - open_by[:, None] * self._opens - wide_by[:, None] * self._widens, np.float32)


def _held(phone: Phone, lips: Lips) -> tuple[float, float]:
    """From when to when a phone asks for all of it, in ms."""
    start, lasts = phone.start_ms, phone.end_ms - phone.start_ms
    if lips is Lips.CLOSED:
        return start, start + (1.0 if phone.ipa.startswith("m") else _CLOSURE_SHARE) * lasts
    edge = _BITE_EDGE * lasts if lips is Lips.LIP_TEETH else 0.0
    return start + edge, phone.end_ms - edge
