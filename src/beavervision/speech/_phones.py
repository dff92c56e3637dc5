"""The phoneme alphabet that hibari and Kokoro share (misaki's), and the network durations that come with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from beavervision.media import F32
from beavervision.speech.base import Span, Spoken

RATE_HZ = 24000
UNIT_MS = 25.0  # of a duration: 600 samples, in both networks
AHEAD_MS = 50.0  # sound comes this much before the durations say (measured on both networks)

_TO_IPA = {
    "A": "eɪ", "I": "aɪ", "O": "oʊ", "Q": "əʊ", "W": "aʊ", "Y": "ɔɪ", "T": "ɾ", "ᵊ": "ə", "ᵻ": "ɪ", "ʤ": "dʒ",
    "ʧ": "tʃ", "ʦ": "ts", "ʣ": "dz", "ʨ": "tɕ", "ʥ": "dʑ", "ꭧ": "ʈʂ",
}  # fmt: skip
_STRESS = "ˈˌ"
_PAUSES = ';:,.!?—…"()“”'
_AFTER = "ːʰʲ\u0303"  # lengthen or colour the phone before them
_TONES = "↓→↗↘"


def spans(phonemes: str, durations: Sequence[float]) -> tuple[Span, ...]:
    """Spans of a phoneme string; `durations` has one more at either end for the pads.

    A stress mark's share goes to the phone after it; that of length marks, tones and spaces to the phone before it.
    """
    out: list[Span] = []
    at = durations[0] * UNIT_MS - AHEAD_MS
    start = at
    for char, units in zip(phonemes, durations[1:-1], strict=True):
        at += units * UNIT_MS
        if char in _STRESS:
            continue
        if char in _PAUSES or (not out and char == " "):
            out.append(Span("", start, at))
        elif char in _AFTER or char in _TONES or char == " ":
            ipa = out[-1].ipa + (char if char in _AFTER and out[-1].ipa else "") if out else ""
            out[-1:] = [Span(ipa, out[-1].start_ms if out else start, at)]
        else:
            out.append(Span(_TO_IPA.get(char, char), start, at))
        start = at
    return tuple(out)


def said(phonemes: str, limit: int, synthesise: Callable[[str], tuple[F32, Sequence[float]]]) -> Spoken:
    """The sound of `phonemes` from a network that takes `limit` at once: `synthesise` gives samples and durations."""
    pcm: list[F32] = []
    found: list[Span] = []
    at_ms = 0.0
    for part in _capped(phonemes, limit):
        sound, durations = synthesise(part)
        found += [Span(s.ipa, max(s.start_ms, 0) + at_ms, max(s.end_ms, 0) + at_ms) for s in spans(part, durations)]
        pcm.append(sound)
        at_ms += len(sound) * 1000 / RATE_HZ
    return Spoken(np.concatenate([np.zeros(0, np.float32), *pcm]), tuple(found))


def _capped(phonemes: str, limit: int) -> list[str]:
    """Parts of at most `limit`, cut at spaces (numbers make long strings of short texts)."""
    out = []
    while len(phonemes) > limit:
        cut = phonemes.rfind(" ", 1, limit) + 1 or limit
        out.append(phonemes[:cut])
        phonemes = phonemes[cut:]
    return [*out, phonemes] if phonemes.strip() else out
