"""Where there is sound in a synthesised piece: trimming its silence, and ending phones where their sound ends."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from beavervision.media import F32, Phone
from beavervision.speech.base import Span, Spoken

HOP_MS = 5
FLOOR_DB = -45.0  # below the loudest hop: silence
LEAD_MS, TAIL_MS = 40, 60  # kept around the sound
RELEASE_MS = 40  # a phone keeps at least this much before a pause, heard or not (a stop's closure is silent)


def _loud(pcm: F32, rate_hz: int) -> npt.NDArray[np.bool_]:
    """Which hops of HOP_MS are loud, (hops,)."""
    hop = rate_hz * HOP_MS // 1000
    power = np.square(np.pad(pcm, (0, -len(pcm) % hop))).reshape(-1, hop).mean(axis=1)
    return np.asarray(power > max(float(power.max(initial=0.0)) * 10 ** (FLOOR_DB / 10), 1e-9))


def settled(spoken: Spoken, rate_hz: int, start: int, pause_samples: int) -> tuple[F32, tuple[Phone, ...]]:
    """The piece without its outer silence, with `pause_samples` after it, starting at sample `start` of the utterance.

    A phone that an engine stretches over the pause behind it ends where its sound does. A silent piece vanishes.
    """
    loud = _loud(spoken.pcm, rate_hz)
    hops = np.flatnonzero(loud)
    if not hops.size:
        return np.zeros(0, np.float32), ()
    first_ms, last_ms = hops[0] * HOP_MS - LEAD_MS, (hops[-1] + 1) * HOP_MS + TAIL_MS
    begin, end = max(0, first_ms) * rate_hz // 1000, min(last_ms * rate_hz // 1000, len(spoken.pcm))
    pcm = np.concatenate([spoken.pcm[begin:end], np.zeros(pause_samples, np.float32)])
    ramp = np.linspace(0, 1, rate_hz * HOP_MS // 1000, dtype=np.float32)
    pcm[: len(ramp)] *= ramp
    pcm[end - begin - len(ramp) : end - begin] *= ramp[::-1]

    offset_ms = (start - begin) * 1000 / rate_hz
    low, high = start * 1000 / rate_hz, (start + end - begin) * 1000 / rate_hz
    phones = []
    for span, after in zip(spoken.spans, (*spoken.spans[1:], Span("", 0, 0)), strict=True):
        if not span.ipa:
            continue
        end_ms = span.end_ms
        if not after.ipa:
            heard = np.flatnonzero(loud[int(span.start_ms // HOP_MS) : int(end_ms // HOP_MS) + 1])
            heard_ms = (span.start_ms // HOP_MS + heard[-1] + 1) * HOP_MS if heard.size else 0.0
            end_ms = min(end_ms, max(heard_ms, span.start_ms + RELEASE_MS))
        # rounded inwards, so that phones stay within the audio
        a, b = (int(np.clip(t + offset_ms, low, high)) for t in (span.start_ms, end_ms))
        a = max(a, -int(-low // 1))
        if b > a:
            phones.append(Phone(span.ipa, a, b))
    return pcm, tuple(phones)
