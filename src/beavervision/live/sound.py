"""The sound of a session as one line of samples, and streaming conversion to its rate."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import av
import numpy as np

from beavervision.errors import BusyError, UsageError
from beavervision.media import F32, Phone

RATE_HZ = 48_000
HELD_S = 60.0  # of sound that may wait to be heard
HISTORY = RATE_HZ * 2  # samples kept after they were taken: what a drawing that begins now must have heard
BLOCK = RATE_HZ // 100  # of loudness
_LOUD = 10 ** (-55 / 20)  # root mean square from which something may be speech,
_ABOVE_NOISE = 3.0  # and by how much it stands out of a known noise
_LOUDEST_NOISE = 0.05
_UNHEARD = 10 ** (-40 / 20)  # root mean square of noise that nobody misses, at most
_NOISE_BLOCKS = 100  # among so many, some are between words
_FADE = RATE_HZ // 100  # of sound that is cut


class SoundLine:
    """Samples by their number on the session's clock; silence where none were written, and what phones are known. Not safe to
    share by itself."""

    def __init__(self) -> None:
        self._pcm: F32 = np.zeros(RATE_HZ * 4, np.float32)
        self._first = 0  # number of the sample _pcm[0]
        self._measured = 0
        self._noise = 0.0  # root mean square of what was found to be no speech
        self._phones: list[Phone] = []
        self.head = 0  # one after the last sample written
        self.loud_from = 0  # where the latest stretch that may be speech begins,
        self.loud_until = 0  # and one after its last sample so far

    def write(self, pcm: F32, not_before: int, keep_from: int) -> int:
        """Append samples (n,), the first at number `not_before` at the earliest; returns its number.

        Samples before `keep_from` may be forgotten.

        Raises:
            BusyError: more sound waits than is held.
        """
        start = max(self.head, not_before)
        stop = start + len(pcm)
        self.check_room(stop, keep_from)
        self._make_room(stop, keep_from)
        self._pcm[start - self._first : stop - self._first] = pcm
        self.head = stop
        self._measure()
        return start

    def check_room(self, stop: int, keep_from: int) -> None:
        """Raises BusyError where sound up to sample `stop` is more than is held."""
        if stop - keep_from > (HELD_S + 1) * RATE_HZ + HISTORY:
            raise BusyError(
                f"More than {HELD_S:.0f} s of sound wait to be heard. Send no more than that ahead, or interrupt first."
            )

    def pad(self, until: int, keep_from: int) -> None:
        """Let the line go on in silence to sample `until`."""
        if until > self.head:
            self._make_room(until, keep_from)
            self.head = until
            self._measure()

    def read(self, start: int, stop: int) -> F32:
        """Samples `start` to `stop`, a copy."""
        out = np.zeros(stop - start, np.float32)
        a, b = max(start, self._first), min(stop, self.head)
        if b > a:
            out[a - start : b - start] = self._pcm[a - self._first : b - self._first]
        return out

    def tell(self, phones: Iterable[Phone], sample: int) -> None:
        """These phones, whose clock begins at `sample`, are in the sound; they follow those told before."""
        moved_ms = round(sample * 1000 / RATE_HZ)
        self._phones = [p for p in self._phones if p.end_ms * RATE_HZ > self._first * 1000]
        self._phones += [p.later(moved_ms) for p in phones]

    def phones(self, start: int, stop: int, base: int) -> tuple[Phone, ...]:
        """Those that begin from sample `start` on and before `stop`, on a clock that begins at `base`."""
        moved_ms = -round(base * 1000 / RATE_HZ)
        return tuple(p.later(moved_ms) for p in self._phones if start * 1000 <= p.start_ms * RATE_HZ < stop * 1000)

    def cut(self, at: int) -> int:
        """Forget the sound from sample `at` on, but for a short fade; returns how many samples were there."""
        lost = max(self.head - at, 0)
        at_ms = at * 1000 // RATE_HZ
        self._phones = [replace(p, end_ms=min(p.end_ms, at_ms)) for p in self._phones if p.start_ms < at_ms]
        if lost:
            local = at - self._first
            fade = min(_FADE, lost)
            self._pcm[local : local + fade] *= np.linspace(1, 0, fade, dtype=np.float32)
            self._pcm[local + fade :] = 0
            self.head = at + fade
            self._measured = min(self._measured, self.head)
            self.loud_until = min(self.loud_until, at)
        return lost

    def hush(self, start: int, stop: int) -> None:
        """The sound from `start` to `stop` is noise: what is no louder is no speech, from `stop` on, until it was quieter."""
        pcm = self.read(start, stop)
        self._noise = min(float(np.sqrt(np.mean(np.square(pcm)))), _LOUDEST_NOISE) if len(pcm) else 0.0
        self._measured = stop
        self.loud_until = min(self.loud_until, stop)
        self._measure()

    def _make_room(self, stop: int, keep_from: int) -> None:
        if stop - self._first <= len(self._pcm):
            return
        keep = max(keep_from, self._first)
        kept = self._pcm[min(keep, self.head) - self._first : self.head - self._first]
        first = keep if len(kept) else max(keep, min(self.head, stop))
        size = len(self._pcm)
        while size < stop - first:
            size *= 2
        pcm = np.zeros(size, np.float32)
        pcm[: len(kept)] = kept
        self._pcm, self._first = pcm, first

    def _measure(self) -> None:
        start = max(self._measured, self._first + -self._first % BLOCK)
        count = (self.head - start) // BLOCK
        if count <= 0:
            return
        pcm = self._pcm[start - self._first :][: count * BLOCK].reshape(count, BLOCK)
        level = np.sqrt(np.mean(np.square(pcm), axis=1))
        self._noise = min(self._noise, float(level.max()))
        loud = np.flatnonzero(level > max(_LOUD, _ABOVE_NOISE * self._noise))
        if loud.size:
            begin = start + int(loud[0]) * BLOCK
            if begin > self.loud_until + RATE_HZ // 2 or not self.loud_until:
                self.loud_from = begin
            self.loud_until = start + (int(loud[-1]) + 1) * BLOCK
        self._measured = start + count * BLOCK


class Converter:
    """Mono sound of any rate to :data:`RATE_HZ`, the same however it is cut."""

    def __init__(self, rate_hz: int) -> None:
        if not 8000 <= rate_hz <= 192_000:
            raise UsageError(f"Sound has a rate from 8000 to 192000 Hz, not {rate_hz}.")
        self.rate_hz = rate_hz
        self._resampler = None if rate_hz == RATE_HZ else av.AudioResampler("fltp", "mono", RATE_HZ)
        self._taken = self._given = 0

    def push(self, pcm: F32) -> F32:
        """The samples (m,) that the next samples (n,) complete."""
        if self._resampler is None:
            return pcm
        if not len(pcm):
            return np.zeros(0, np.float32)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm[None]), "fltp", "mono")
        frame.rate = self.rate_hz
        frame.pts = self._taken
        self._taken += len(pcm)
        return self._joined(self._resampler.resample(frame))

    def end(self) -> F32:
        """What remains; the converter is used up then."""
        if self._resampler is None or not self._taken:
            return np.zeros(0, np.float32)
        wanted = round(self._taken * RATE_HZ / self.rate_hz)
        rest = self._joined(self._resampler.resample(None))
        missing = max(wanted - self._given, 0)
        return np.concatenate([rest, np.zeros(missing, np.float32)])

    def _joined(self, frames: list[av.AudioFrame]) -> F32:
        parts = [np.asarray(frame.to_ndarray(), np.float32).reshape(-1) for frame in frames]
        self._given += sum(map(len, parts))
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)


class Pcm16:
    """Little-endian 16-bit mono in pieces of any length, half samples included, to float."""

    def __init__(self) -> None:
        self._odd = b""

    def push(self, data: bytes) -> F32:
        data = self._odd + data
        whole = len(data) // 2 * 2
        self._odd = data[whole:]
        return np.frombuffer(data[:whole], "<i2").astype(np.float32) * np.float32(1 / 32768)


class Pauses:
    """Finds the pauses of one stream of sound, whose noise is what its quietest blocks of late are."""

    def __init__(self) -> None:
        self._lowest = [_UNHEARD, _UNHEARD]  # root mean square of the quietest block, lately and before
        self._blocks = 0

    def silent(self, block: F32) -> bool:
        """Whether the next block, of up to BLOCK samples, is nothing that anybody would miss."""
        level = float(np.sqrt(np.mean(np.square(block))))
        if self._blocks % _NOISE_BLOCKS == 0:
            self._lowest = [self._lowest[1], _UNHEARD]
        self._blocks += 1
        self._lowest[1] = min(self._lowest[1], level)
        return level <= max(_LOUD, min(_ABOVE_NOISE * min(self._lowest), _UNHEARD))


def pieces(pcm: F32, size: int) -> Iterator[F32]:
    for at in range(0, len(pcm), size):
        yield pcm[at : at + size]
