"""The stage that gives each clip its sound: the samples heard, the features a model listens to, and where speech is.

Everything in here is streaming and gives the same values however the sound is cut. The features are made from sound
at 16 kHz, mono; the samples that travel on keep their own rate and channels.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property, lru_cache
from math import ceil, floor, gcd
from typing import cast

import numpy as np
import numpy.typing as npt

from beavervision.errors import MediaError, NoAudioError
from beavervision.media import F32, Audio, Clip, Frames, Heard, Net, Phone, pictures_for, sample_at

F64 = npt.NDArray[np.float64]

RATE_HZ = 16_000
_ZERO_CROSSINGS = 16  # of the resampler's sinc, on each side
_KAISER_BETA = 9.0
_ROLL_OFF = 0.94  # of the lower Nyquist frequency
_PIECE_S = 1  # longest piece of sound worked on at once
_VAD_SAMPLES = 512
_VAD_CONTEXT = 64
_VAD_STEP = Fraction(_VAD_SAMPLES, RATE_HZ)
VOICE_AHEAD_MS = 120.0  # lips part before the sound is heard
COMING_MS = 700.0  # before it somebody who is about to speak breathes in and opens the mouth
_PHONES_BACK_MS = 300  # phones are told of for so long after they end


# --- features ---------------------------------------------------------------------------------------------------------


def _hz_to_mel(hz: F64) -> F64:
    """Slaney's scale: linear to 1 kHz, logarithmic above."""
    return np.where(hz < 1000, hz * 3 / 200, 15 + 27 * np.log(np.maximum(hz, 1000) / 1000) / np.log(6.4))


def _mel_to_hz(mel: F64) -> F64:
    return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))


def _mel_bank(bins: int, n_fft: int, low_hz: float, high_hz: float, equal_area: bool) -> F64:
    """(bins, n_fft / 2 + 1) triangles with a peak of 1, or of equal area over hertz (Slaney's normalisation)."""
    ends = _hz_to_mel(np.array([low_hz, high_hz]))
    corners = _mel_to_hz(np.linspace(ends[0], ends[1], bins + 2))
    hz = np.linspace(0, RATE_HZ / 2, n_fft // 2 + 1)
    rising = (hz - corners[:-2, None]) / np.diff(corners)[:-1, None]
    falling = (corners[2:, None] - hz) / np.diff(corners)[1:, None]
    bank = np.maximum(0, np.minimum(rising, falling))
    return bank * (2 / (corners[2:] - corners[:-2]))[:, None] if equal_area else bank


@dataclass(frozen=True)
class FrontEnd:
    """What a model listens to: row k is made from the `window` samples around sample ``k * hop_samples`` (16 kHz)."""

    name: str
    bins: int
    hop_samples: int
    window: int
    n_fft: int
    low_hz: float
    high_hz: float
    preemphasis: float
    power: int  # of the spectrum's magnitude
    equal_area: bool
    compress: Callable[[F64], F64]

    @property
    def hop(self) -> Fraction:
        """Seconds from row to row."""
        return Fraction(self.hop_samples, RATE_HZ)

    @property
    def after(self) -> int:
        """How many samples from its centre on a row needs."""
        return self.window // 2

    @cached_property
    def _taper(self) -> F64:
        return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(self.window) / self.window)

    @cached_property
    def _bank(self) -> F64:
        return _mel_bank(self.bins, self.n_fft, self.low_hz, self.high_hz, self.equal_area).T

    def of(self, windows: F64) -> F32:
        """Rows (t, bins) of windows of sound (t, window), pre-emphasised."""
        magnitude = np.abs(np.fft.rfft(windows * self._taper, self.n_fft))
        return self.compress(magnitude**self.power @ self._bank).astype(np.float32)

    def rows(self, pcm: npt.NDArray[np.floating], first: int = 0) -> F32:
        """All rows from `first` to the last whose centre lies within `pcm` (samples,), 16 kHz mono; silence around."""
        stream = RowStream(self, first)
        head = stream.push(pcm)
        stream.end()
        missing = pcm.shape[0] // self.hop_samples + 1 - first - len(head)
        tail = stream.push(np.zeros(self.after + self.hop_samples))[: max(missing, 0)]
        return np.concatenate([head, tail])


def _log(power: F64) -> F64:
    return np.log(np.maximum(power, 1e-5))


def _wav2lip_scale(magnitude: F64) -> F64:
    decibel = 20 * np.log10(np.maximum(magnitude, 1e-5)) - 20
    return np.clip(8 * (decibel + 100) / 100 - 4, -4, 4)


LOG_MEL = FrontEnd("logmel", 64, 160, 400, 512, 60, 7600, 0.0, 2, False, _log)
# The same rows each 5 ms, for a model whose own rows, 10 ms apart, are to lie alike around each picture of any rate.
LOG_MEL_DENSE = replace(LOG_MEL, name="logmel_dense", hop_samples=80)
# The published front end: 12.5 ms hop, 50 ms window, -4 to 4 for -100 to 0 dB.
WAV2LIP_MEL = FrontEnd("wav2lip_mel", 80, 200, 800, 800, 55, 7600, 0.97, 1, True, _wav2lip_scale)
FRONT_ENDS = {front_end.name: front_end for front_end in (LOG_MEL, LOG_MEL_DENSE, WAV2LIP_MEL)}


class RowStream:
    """Rows of a front end as the sound comes in; the first is row number `first`, at most 0."""

    def __init__(self, front_end: FrontEnd, first: int = 0) -> None:
        if first > 0:
            raise ValueError(f"the first row is 0 or before, not {first}")
        self._front_end = front_end
        self._previous = 0.0
        self._pending: F64 = np.zeros(front_end.window - front_end.after - first * front_end.hop_samples)

    def push(self, pcm: npt.NDArray[np.floating]) -> F32:
        """The rows (t, bins) that the next samples (n,) complete."""
        f = self._front_end
        x = np.asarray(pcm, np.float64)
        if f.preemphasis and len(x):
            before = np.concatenate([[self._previous], x[:-1]])
            self._previous = float(x[-1])
            x = x - f.preemphasis * before
        self._pending = np.concatenate([self._pending, x])
        count = max((len(self._pending) - f.window) // f.hop_samples + 1, 0)
        if not count:
            return np.zeros((0, f.bins), np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(self._pending, f.window)[:: f.hop_samples][:count]
        rows = f.of(windows)
        self._pending = self._pending[count * f.hop_samples :]
        return rows

    def end(self) -> None:
        """The sound is over: what is pushed from now on is the silence behind it."""
        self._previous = 0.0


def syncnet_mfcc(pcm16: npt.NDArray[np.int16]) -> F32:
    """MFCC (rows, 13) as SyncNet wants them, of `pcm16` (samples,) at 16 kHz; a row each 10 ms, 25 ms long.

    The first coefficient is the log energy. Davis and Mermelstein 1980, with the usual defaults: pre-emphasis 0.97, 26
    filters to 8 kHz, a lifter of 22, no taper.
    """
    window, hop, n_fft, filters, kept = 400, 160, 512, 26, 13
    x = pcm16.astype(np.float64)
    x[1:] -= 0.97 * x[:-1].copy()
    count = 1 + max(-(-(len(x) - window) // hop), 0)
    x = np.pad(x, (0, (count - 1) * hop + window - len(x)))
    frames = np.lib.stride_tricks.sliding_window_view(x, window)[::hop]
    power = np.abs(np.fft.rfft(frames, n_fft)) ** 2 / n_fft
    top = 2595 * np.log10(1 + RATE_HZ / 2 / 700)
    corners = np.floor((n_fft + 1) * 700 * (10 ** (np.linspace(0, top, filters + 2) / 2595) - 1) / RATE_HZ)
    k = np.arange(n_fft // 2 + 1)
    rising = (k - corners[:-2, None]) / np.diff(corners)[:-1, None]
    falling = (corners[2:, None] - k) / np.diff(corners)[1:, None]
    bank = np.maximum(0, np.minimum(rising, falling))
    tiny = np.finfo(np.float64).eps
    bands = power @ bank.T
    logs = np.log(np.where(bands == 0, tiny, bands))
    n = np.arange(kept)[:, None]
    cosines = np.sqrt(2 / filters) * np.cos(np.pi * n * (2 * np.arange(filters) + 1) / (2 * filters))
    mfcc: F64 = (logs @ cosines.T) * (1 + 11 * np.sin(np.pi * n[:, 0] / 22))
    energy = power.sum(axis=1)
    mfcc[:, 0] = np.log(np.where(energy == 0, tiny, energy))
    return mfcc.astype(np.float32)


# --- resampling -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _filters(rate_hz: int) -> F64:
    """(phases, taps): a Kaiser-windowed sinc for each place that an output sample may have between input samples."""
    phases = RATE_HZ // gcd(RATE_HZ, rate_hz)
    cutoff = _ROLL_OFF * min(1.0, RATE_HZ / rate_hz)
    half = ceil(_ZERO_CROSSINGS / cutoff)
    t = np.arange(1 - half, half + 1) - (np.arange(phases) / phases)[:, None]
    taper = np.i0(_KAISER_BETA * np.sqrt(np.maximum(1 - (t / half) ** 2, 0)))
    taps = np.sinc(cutoff * t) * taper
    return cast(F64, taps / taps.sum(axis=1, keepdims=True))


class Resampler:
    """Sound of any rate and channels to 16 kHz mono without delay: sample m is the input at ``m / 16000`` seconds."""

    def __init__(self, rate_hz: int) -> None:
        common = gcd(RATE_HZ, rate_hz)
        self._up, self._down = RATE_HZ // common, rate_hz // common
        self._filters = _filters(rate_hz) if rate_hz != RATE_HZ else None
        half = 0 if self._filters is None else self._filters.shape[1] // 2
        self._pending: F64 = np.zeros(max(half - 1, 0))
        self._first = -len(self._pending)  # input sample number of pending[0]
        self._taken = 0  # input samples
        self._made = 0  # output samples

    def push(self, pcm: F32) -> F64:
        """The output samples (m,) that the next samples (channels, n) complete."""
        mono = pcm.mean(axis=0, dtype=np.float64)
        self._taken += len(mono)
        if self._filters is None:
            return cast(F64, mono)
        return self._push(mono)

    def end(self) -> F64:
        """What remains, as many samples as begin within the input."""
        if self._filters is None:
            return np.zeros(0)
        total = -(-self._taken * self._up // self._down)
        made = self._made
        return self._push(np.zeros(self._filters.shape[1]))[: total - made]

    def _push(self, mono: F64) -> F64:
        assert self._filters is not None
        taps = self._filters.shape[1]
        self._pending = np.concatenate([self._pending, mono])
        # Output m stands at input m * down / up; its taps begin taps / 2 - 1 samples before and must all be there.
        last = self._first + len(self._pending) - 1 - taps // 2
        stop = -(-(last + 1) * self._up // self._down)
        if stop <= self._made:
            return np.zeros(0)
        place = np.arange(self._made, stop) * self._down
        begin = place // self._up - (taps // 2 - 1) - self._first
        windows = np.lib.stride_tricks.sliding_window_view(self._pending, taps)
        if self._up == 1:
            out: F64 = windows[begin[0] : begin[-1] + 1 : self._down] @ self._filters[0]
        else:
            out = np.einsum("ij,ij->i", windows[begin], self._filters[place % self._up])
        self._made = stop
        drop = stop * self._down // self._up - (taps // 2 - 1) - self._first
        self._pending = self._pending[drop:]
        self._first += drop
        return out


# --- voice activity ---------------------------------------------------------------------------------------------------


class VoiceStream:
    """Probability of speech for each 32 ms of 16 kHz mono sound, by a Silero VAD v5 net."""

    def __init__(self, net: Net) -> None:
        self._net = net
        self._state = np.zeros((2, 1, 128), np.float32)
        self._pending = np.zeros(_VAD_CONTEXT, np.float32)
        self._rate = np.array(RATE_HZ, np.int64)

    def push(self, pcm: F64) -> list[float]:
        """The probabilities that the next samples (n,) complete."""
        self._pending = np.concatenate([self._pending, pcm.astype(np.float32)])
        found: list[float] = []
        at = 0
        while at + _VAD_CONTEXT + _VAD_SAMPLES <= len(self._pending):
            piece = self._pending[None, at : at + _VAD_CONTEXT + _VAD_SAMPLES]
            at += _VAD_SAMPLES
            probability, state = self._net(piece, self._state, self._rate)
            self._state = cast(F32, state)
            found.append(float(np.asarray(probability, np.float32)[0, 0]))
        self._pending = self._pending[at:]
        return found


# --- the stage --------------------------------------------------------------------------------------------------------


class _Sound:
    """An audio iterator read as far as asked, in pieces of bounded length; samples are kept until taken."""

    def __init__(self, source: Iterator[Audio]) -> None:
        self._source = source
        self._chunk = next(source, None)
        while self._chunk is not None and not self._chunk.samples:
            self._chunk = next(source, None)
        self.ended = self._chunk is None
        self.rate_hz = self._chunk.rate_hz if self._chunk else RATE_HZ
        self._kept: F32 = np.zeros((self._chunk.channels if self._chunk else 1, 0), np.float32)
        self._phones: list[Phone] = []
        self._first = 0  # sample number of kept[:, 0]
        self.read_samples = 0

    @property
    def format(self) -> tuple[int, int]:
        """Rate and channels."""
        return self.rate_hz, len(self._kept)

    def read(self) -> F32 | None:
        """The next piece (channels, n), kept as well; None at the end."""
        chunk = self._chunk or next(self._source, None)
        if chunk is None:
            self.ended = True
            return None
        if (chunk.rate_hz, chunk.channels) != self.format:
            raise MediaError("The sound changes its rate or channels midway. Convert it to one format first.")
        start = self.read_samples - chunk.start
        if not 0 <= start <= chunk.samples:
            raise MediaError(
                f"The sound has a gap or an overlap: sample {self.read_samples} is due, not {chunk.start}."
            )
        if not start:
            self._phones += chunk.phones
        stop = start + _PIECE_S * self.rate_hz
        self._chunk = chunk if stop < chunk.samples else None
        piece = chunk.pcm[:, start:stop]
        self.read_samples += piece.shape[1]
        self._kept = np.concatenate([self._kept, piece], axis=1)
        return piece

    def take(self, start: int, stop: int) -> F32:
        """Samples `start` to `stop` of what was read, silence beyond; all before `stop` are forgotten."""
        out = np.zeros((len(self._kept), stop - start), np.float32)
        piece = self._kept[:, start - self._first : stop - self._first]
        out[:, : piece.shape[1]] = piece
        self._kept = self._kept[:, stop - self._first :]
        self._first = stop
        return out

    def phones(self, begin_ms: Fraction, stop_ms: Fraction) -> tuple[Phone, ...]:
        """Those that begin before `stop_ms`, of what was read; those that end by `begin_ms` are forgotten."""
        self._phones = [phone for phone in self._phones if phone.end_ms > begin_ms]
        return tuple(phone for phone in self._phones if phone.start_ms < stop_ms)

    def left(self) -> bool:
        """Whether there is sound that was not taken."""
        return bool(self._kept.shape[1]) or (not self.ended and self.read() is not None)


class Hear:
    """Attaches the samples heard while each picture shows, and the features a model needs around them.

    Args:
        front_end: a name of :data:`FRONT_ENDS`.
        left_context_ms: how far before a clip its features begin.
        look_ahead_ms: how far beyond a clip they reach.
        voice: a Silero VAD v5 net.
        voice_ahead_ms: how far beyond a picture, within the look-ahead, speech counts as its own.
        coming_ms: how far beyond it speech counts as coming: sound is read that far ahead if it is farther.
    """

    name = "hear"

    def __init__(
        self,
        front_end: str,
        left_context_ms: float,
        look_ahead_ms: float,
        voice: Net,
        voice_ahead_ms: float = VOICE_AHEAD_MS,
        coming_ms: float = 0.0,
    ) -> None:
        self._front_end = FRONT_ENDS[front_end]
        self._left = Fraction(left_context_ms) / 1000
        self._ahead = Fraction(look_ahead_ms) / 1000
        self._voice = voice
        self._voice_ahead = min(self._ahead, Fraction(voice_ahead_ms) / 1000)
        self._coming = max(self._voice_ahead, Fraction(coming_ms) / 1000)

    def reach(self, rate_hz: int) -> Fraction:
        """How many seconds of sound beyond the end of a clip must be there before it is let go, at most."""
        front_end = self._front_end
        rows = self._ahead + front_end.hop + Fraction(front_end.after + 1, RATE_HZ)
        taps = 0 if rate_hz == RATE_HZ else _filters(rate_hz).shape[1] // 2 + 1
        return max(rows, self._coming + _VAD_STEP) + Fraction(taps, rate_hz)

    def __call__(
        self,
        clips: Iterator[Clip],
        audio: Iterator[Audio],
        *,
        background: Iterator[Audio] | None = None,
        background_level: float = 0.0,
        keep_picture: bool = False,
        on_note: Callable[[str], None] | None = None,
    ) -> Iterator[Clip]:
        """Yield the clips with ``audio`` and ``heard``, as many pictures as the sound needs.

        The stream ends with the picture that holds the last sample, the rest of it being silent; with
        `keep_picture` it goes on in silence to the last picture. If the pictures end first, the sound is cut there and
        `on_note` is told. Sound is read as far ahead as the features need, no further.

        Args:
            clips: consecutive pictures.
            audio: consecutive sound from sample 0 on, at one rate.
            background: sound to mix into ``audio`` (never into the features), of the same rate and channels.
            background_level: its gain.

        Raises:
            NoAudioError: `audio` has no sample.
            MediaError: the sound has gaps or changes its format, or the background's format differs.
        """
        try:
            sound = _Sound(audio)
            if sound.ended:
                raise NoAudioError("The sound is empty. Give a file with sound, or text.")
            behind = _Sound(background) if background is not None and background_level else None
            if behind is not None and not behind.ended and behind.format != sound.format:
                raise MediaError(
                    f"Sound to mix must share a format: {behind.format} is not {sound.format} (Hz, channels)."
                )
            ears = _Ears(self._front_end, self._left, self._voice, self._voice_ahead, self._coming, sound)
            for clip in clips:
                ears.listen(clip.frames.stop / clip.frames.rate, self._ahead)
                last = False
                if sound.ended and not keep_picture:
                    needed = pictures_for(sound.read_samples, clip.frames.rate, sound.rate_hz) - clip.frames.start
                    if needed <= 0:
                        return
                    last, clip = needed <= len(clip), _first_of(clip, needed)
                frames = clip.frames
                start, stop = (sample_at(i, frames.rate, sound.rate_hz) for i in (frames.start, frames.stop))
                pcm = sound.take(start, stop)
                if behind is not None:
                    while behind.read_samples < stop and behind.read() is not None:
                        pass
                    pcm = np.clip(pcm + np.float32(background_level) * behind.take(start, stop), -1, 1)
                heard = ears.heard(frames, self._ahead)
                yield replace(clip, audio=Audio(pcm, sound.rate_hz, start), heard=heard)
                if last:
                    return
            if on_note is not None and sound.left():
                on_note(
                    "The picture ends before the sound, which is cut there. Let the picture loop to hear all of it."
                )
        finally:
            for source in (clips, audio, background):
                if isinstance(source, Generator):
                    source.close()


class _Ears:
    """Features and voice of one stream, kept for as long as a clip may still ask for them."""

    def __init__(
        self,
        front_end: FrontEnd,
        left: Fraction,
        voice: Net,
        voice_ahead: Fraction,
        coming: Fraction,
        sound: _Sound,
    ) -> None:
        self._front_end = front_end
        self._left = left
        self._voice_ahead = voice_ahead
        self._coming = coming
        self._sound = sound
        self._resampler = Resampler(sound.rate_hz)
        self._first_row = -ceil(left / front_end.hop)
        self._stream = RowStream(front_end, self._first_row)
        self._rows: F32 = np.zeros((0, front_end.bins), np.float32)
        self._voice = VoiceStream(voice)
        self._first_voice = 0
        self._voices: list[float] = []
        self._over = False

    def listen(self, end: Fraction, ahead: Fraction) -> None:
        """Read sound until the rows, and as far as they are asked for the voice, up to `ahead` seconds beyond `end` are there."""
        rows = ceil((end + ahead) / self._front_end.hop) + 1
        voices = ceil((end + self._coming) / _VAD_STEP)
        while self._first_row + len(self._rows) < rows or self._first_voice + len(self._voices) < voices:
            if self._over:
                self._push(np.zeros(RATE_HZ // 10))
            elif (piece := self._sound.read()) is not None:
                self._push(self._resampler.push(piece))
            else:
                self._push(self._resampler.end())
                self._stream.end()
                self._over = True

    def heard(self, frames: Frames, ahead: Fraction) -> Heard:
        """What was heard around `frames`; what no later picture needs is forgotten."""
        hop = self._front_end.hop
        begin, end = frames.start / frames.rate, frames.stop / frames.rate
        start, stop, later = (
            floor((begin - self._left) / hop),
            ceil((end + ahead) / hop) + 1,
            floor((end - self._left) / hop),
        )
        rows = self._rows[start - self._first_row : stop - self._first_row].copy()
        voice, coming = (self._loudest(frames, reach) for reach in (self._voice_ahead, self._coming))
        drop = max(later - self._first_row, 0)
        self._rows, self._first_row = self._rows[drop:], self._first_row + drop
        drop = floor(end / _VAD_STEP) - self._first_voice
        self._voices, self._first_voice = self._voices[drop:], self._first_voice + drop
        phones = self._sound.phones(begin * 1000 - _PHONES_BACK_MS, (end + ahead) * 1000)
        return Heard(rows, start, hop, voice, coming, phones)

    def _loudest(self, frames: Frames, reach: Fraction) -> F32:
        """The highest probability of speech from the beginning of each picture (n,) until `reach` after its end."""
        found = []
        for i in range(frames.start, frames.stop):
            low, high = floor(i / frames.rate / _VAD_STEP), ceil(((i + 1) / frames.rate + reach) / _VAD_STEP)
            found.append(max(self._voices[low - self._first_voice : high - self._first_voice]))
        return np.array(found, np.float32)

    def _push(self, pcm: F64) -> None:
        self._rows = np.concatenate([self._rows, self._stream.push(pcm)])
        self._voices += self._voice.push(pcm)


def _first_of(clip: Clip, count: int) -> Clip:
    """The first `count` pictures of `clip`, with their track."""
    if count >= len(clip):
        return clip
    track = clip.track and clip.track.at(range(count))
    frames = replace(clip.frames, pictures=clip.frames.pictures[:count], shown=clip.frames.shown[:count])
    return replace(clip, frames=frames, track=track)
