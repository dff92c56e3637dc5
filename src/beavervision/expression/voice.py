"""What the voice tells of its speaker's mood, streaming: how lively it is, which syllables are stressed, where phrases end.

Nothing here depends on how the sound is cut: samples and rows are taken picture by picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import floor

import numpy as np
import numpy.typing as npt

from beavervision.media import F32, Clip, sample_at

F64 = npt.NDArray[np.float64]

_PITCH_HZ = (70.0, 400.0)
_WINDOW_S, _HOP_S = 0.048, 0.03
_WORK_HZ = 8000
_PERIODIC = 0.45  # autocorrelation of a voiced sound, at least
_QUIET = 1e-3  # RMS below which there is no pitch
_NORM_S = 15.0  # over which a speaker's usual pitch and loudness are learned,
_NOW_S = 1.2  # what the present is,
_WHILE_S = 3.0  # and what it is of the rate of syllables
_SYLLABLES_HZ = 4.8  # a second, usual, as they are counted here
_REACH = 5  # rows on each side over which a syllable must be the loudest
_FLOOR_S = 4.0  # in which the range of loudness is forgotten
_PHRASE_S = 0.6  # of speech make a phrase
_ACCENT_S = 0.7  # between two accents, at least


@dataclass(frozen=True, slots=True)
class Impression:
    """Of one picture: arousal -1 (flat) to 1 (lively); stress 0 or how strongly a syllable begins to stand out; voice is heard;
    a phrase ended just now."""

    arousal: float
    stress: float
    speaking: bool
    phrase_end: bool


class Listener:
    """Listens to one stream. `ahead_s` is how far beyond a picture its feature rows are used."""

    def __init__(self, ahead_s: float = 0.12) -> None:
        self._mood = _Mood()
        self._beat = _Beat()
        self._ahead_s = ahead_s
        self._spoken_s = 0.0
        self._speaking = False

    def hear(self, clip: Clip, i: int, *, mood: bool = True) -> Impression:
        """The next picture: number `i` of `clip`, which was heard. Without `mood` arousal stays as it is, which saves its cost."""
        assert clip.audio is not None and clip.heard is not None
        audio, frames, heard = clip.audio, clip.frames, clip.heard
        if mood:
            first, last = (sample_at(frames.start + n, frames.rate, audio.rate_hz) - audio.start for n in (i, i + 1))
            self._mood.push(audio.pcm[:, first:last], audio.rate_hz)
        time_s = float((frames.start + i) / frames.rate)
        stop = min(floor((time_s + self._ahead_s) / float(heard.hop)) + 1, heard.start + len(heard.rows))
        speaking = bool(heard.voice[i] > 0.5)
        stress, syllables = self._beat.push(heard.rows, heard.start, stop, float(heard.hop), time_s)
        if mood:
            self._mood.count(syllables if speaking else 0, speaking, float(1 / frames.rate))
        end = self._speaking and not speaking and self._spoken_s >= _PHRASE_S
        self._spoken_s = self._spoken_s + float(1 / frames.rate) if speaking else 0.0
        self._speaking = speaking
        return Impression(self._mood.arousal, stress if speaking else 0.0, speaking, end)


class _Mean:
    """A mean that forgets, with the spread about it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._weight = 0.0
        self.value = self.variance = 0.0

    def push(self, value: float, dt_s: float) -> None:
        self._weight = min(self._weight + dt_s, self._seconds)
        part = dt_s / self._weight
        off = value - self.value
        self.value += part * off
        self.variance = (1 - part) * (self.variance + part * off * off)

    @property
    def known(self) -> float:
        """How much of its time it has seen, 0 to 1."""
        return self._weight / self._seconds


class _Mood:
    """Arousal: pitch, loudness and rate of syllables now, against the speaker's usual."""

    def __init__(self) -> None:
        self._pcm: F32 = np.zeros(0, np.float32)
        self._rate_hz = 0
        self._pitch, self._level = _Mean(_NORM_S), _Mean(_NORM_S)
        self._pitch_now, self._level_now = _Mean(_NOW_S), _Mean(_NOW_S)
        self._rate, self._rate_now = _Mean(_NORM_S), _Mean(_WHILE_S)
        self.arousal = 0.0

    def push(self, pcm: F32, rate_hz: int) -> None:
        if rate_hz != self._rate_hz:
            self._rate_hz, self._pcm = rate_hz, np.zeros(0, np.float32)
        self._pcm = np.concatenate([self._pcm, pcm.mean(axis=0)])
        window, hop = round(_WINDOW_S * rate_hz), round(_HOP_S * rate_hz)
        while len(self._pcm) >= window:
            self._frame(self._pcm[:window], rate_hz)
            self._pcm = self._pcm[hop:]

    def count(self, syllables: int, speaking: bool, dt_s: float) -> None:
        """Of one picture; brings `arousal` up to date."""
        if speaking:
            self._rate.push(syllables / dt_s, dt_s)
            self._rate_now.push(syllables / dt_s, dt_s)
        pitch = (self._pitch_now.value - self._pitch.value) / max(self._pitch.variance**0.5, 1.5)
        level = (self._level_now.value - self._level.value) / max(self._level.variance**0.5, 3.0)
        own, usual = self._rate_now.value - self._rate.value, self._rate_now.value - _SYLLABLES_HZ
        rate = (own + 0.5 * usual) / 1.5
        sure = min(1.0, 3 * self._pitch.known)
        total = 0.9 * pitch + 0.6 * level + 0.4 * rate * self._rate_now.known
        self.arousal = float(np.tanh(sure * total)) if self._pitch.known else 0.0

    def _frame(self, pcm: F32, rate_hz: int) -> None:
        rms = float(np.sqrt(np.mean(pcm * pcm)))
        if rms < _QUIET:
            return
        semitones = _pitch_st(pcm, rate_hz)
        if semitones is None:
            return
        level_db = 20 * np.log10(rms)
        for mean, value in (
            (self._pitch, semitones),
            (self._pitch_now, semitones),
            (self._level, level_db),
            (self._level_now, level_db),
        ):
            mean.push(value, _HOP_S)


@cache
def _taper(count: int) -> tuple[F64, F64, int]:
    """A window of `count` samples, its autocorrelation (1 at 0), and the size of a transform that holds it."""
    taper = np.hanning(count)
    size = 1 << (2 * count - 1).bit_length()
    own = np.fft.irfft(np.abs(np.fft.rfft(taper, size)) ** 2)[:count]
    return taper, np.maximum(own / own[0], 1e-6), size


def _pitch_st(pcm: F32, rate_hz: int) -> float | None:
    """The pitch in semitones over 100 Hz, by the autocorrelation over that of the window (Boersma, 1993); None if unvoiced."""
    step = max(1, rate_hz // _WORK_HZ)
    x = pcm[: len(pcm) // step * step].reshape(-1, step).mean(axis=1)
    work_hz = rate_hz / step
    taper, of_taper, size = _taper(len(x))
    both = np.fft.irfft(np.abs(np.fft.rfft((x - x.mean()) * taper, size)) ** 2)[: len(x)]
    low, high = int(work_hz / _PITCH_HZ[1]), min(int(work_hz / _PITCH_HZ[0]) + 1, len(x) - 2)
    if both[0] <= 0 or high <= low:
        return None
    r = both / (both[0] * of_taper)
    best = low + int(np.argmax(r[low:high] - 0.01 * np.log2(np.arange(low, high) / low)))
    if r[best] < _PERIODIC:
        return None
    a, b, c = r[best - 1], r[best], r[best + 1]
    bend = a - 2 * b + c
    lag = best + (float(np.clip(0.5 * (a - c) / bend, -0.5, 0.5)) if bend < 0 else 0.0)
    return float(12 * np.log2(work_hz / lag / 100))


class _Beat:
    """Syllables, as the peaks of loudness, and those that stand out of the others."""

    def __init__(self) -> None:
        self._next = 0
        self._levels: list[float] = []
        self._raw: list[float] = []
        self._top = self._bottom = 0.0
        self._peaks = _Mean(12)  # of syllables
        self._last_s = -1.0

    def push(self, rows: F32, start: int, stop: int, hop_s: float, time_s: float) -> tuple[float, int]:
        """Rows up to number `stop`: how strongly a new accent stands out (0 for none), and the syllables found."""
        stress, found = 0.0, 0
        first = max(self._next, start)
        for value in rows[first - start : max(stop - start, 0)].mean(axis=1).tolist():
            self._raw = [*self._raw[-4:], value]
            level = sum(self._raw) / len(self._raw)
            if not self._levels:
                self._top = self._bottom = level
            fade = (self._top - self._bottom) * hop_s / _FLOOR_S
            self._top, self._bottom = max(level, self._top - fade), min(level, self._bottom + fade)
            self._levels = [*self._levels[-2 * _REACH :], level]
            middle = self._levels[_REACH] if len(self._levels) > 2 * _REACH else level
            span = self._top - self._bottom
            if len(self._levels) <= 2 * _REACH or span < 0.3 or middle < self._bottom + 0.5 * span:
                continue
            if middle == max(self._levels) and middle > self._levels[-1]:
                found += 1
                spread = max(self._peaks.variance**0.5, 0.05 * span)
                out = (middle - self._peaks.value) / spread if self._peaks.known > 0.2 else 1.0
                self._peaks.push(middle, 1.0)
                if out > 0.35 and time_s - self._last_s >= _ACCENT_S:
                    self._last_s = time_s
                    stress = float(np.clip(0.4 + 0.4 * out, 0.4, 1.0))
        self._next = max(self._next, stop)
        return stress, found
