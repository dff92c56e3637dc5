"""Over a hundred languages with eSpeak NG: a formant synthesiser, robotic but small, fast and with exact phone times.

eSpeak NG is GPL-3.0-or-later, so it is no part of the default install: the extra `languages` brings its library
(espeakng-loader), which is loaded by ctypes on first use.
"""

from __future__ import annotations

import ctypes as c
import math
import threading
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from beavervision.errors import ModelError
from beavervision.speech.base import Span, Spoken, TimingKind, Voice

PREFIX = "espeak-"
RATE_HZ = 22050
WORDS_PER_MINUTE = 175  # at speed 1

# names of espeak-ng/speak_lib.h
_RETRIEVAL, _PHONEME_EVENTS, _PHONEME_IPA, _DONT_EXIT = 1, 1, 2, 0x8000
_UTF8, _IPA, _TIE = 1, 0x02, 0x80
_RATE, _PITCH, _RANGE = 1, 3, 4
_EVENT_END, _EVENT_PHONEME = 0, 7
_VARIANT = (
    "+Denis"  # male, without the flutter and echo whose state lives on between calls: the same text, the same samples
)
_PITCH_GAIN = 1.2  # measured: what is heard is the factor to the power 1 / 1.2
_AHEAD_MS = 25.0  # measured: sound comes this much before its mark
_UNUSABLE = ("fo", "kaa", "xex")  # without a dictionary, or a test


class _Id(c.Union):
    _fields_ = (("number", c.c_int), ("name", c.c_char_p), ("string", c.c_char * 8))


class _Event(c.Structure):
    _fields_ = (
        ("type", c.c_int), ("unique_identifier", c.c_uint), ("text_position", c.c_int), ("length", c.c_int),
        ("audio_position", c.c_int), ("sample", c.c_int), ("user_data", c.c_void_p), ("id", _Id),
    )  # fmt: skip


class _Voice(c.Structure):
    _fields_ = (
        ("name", c.c_char_p), ("languages", c.c_void_p), ("identifier", c.c_char_p), ("gender", c.c_ubyte),
        ("age", c.c_ubyte), ("variant", c.c_ubyte), ("xx1", c.c_ubyte), ("score", c.c_int), ("spare", c.c_void_p),
    )  # fmt: skip


_Callback = c.CFUNCTYPE(c.c_int, c.POINTER(c.c_short), c.c_int, c.POINTER(_Event))


class Library:
    """The process's one eSpeak NG: it has global state, so each call holds a lock."""

    def __init__(self) -> None:
        import espeakng_loader

        try:
            self._lib = c.CDLL(espeakng_loader.get_library_path())
            data = espeakng_loader.get_data_path().encode()
        except (OSError, RuntimeError) as error:
            raise ModelError(
                f"eSpeak NG does not load ({error}). Reinstall it: pip install --force-reinstall espeakng-loader"
            ) from error
        rate_hz = self._lib.espeak_Initialize(_RETRIEVAL, 0, data, _PHONEME_EVENTS | _PHONEME_IPA | _DONT_EXIT)
        if rate_hz != RATE_HZ:
            raise ModelError(
                f"eSpeak NG does not start ({rate_hz}). Reinstall it: pip install --force-reinstall espeakng-loader"
            )
        self._lib.espeak_ListVoices.restype = c.POINTER(c.POINTER(_Voice))
        self._lib.espeak_ng_SetRandSeed.argtypes = (c.c_long,)
        self._lib.espeak_TextToPhonemes.restype = c.c_char_p
        self._lock = threading.Lock()
        self._identifiers = {language: identifier for language, _, identifier in self.voices()}
        self._pcm: list[Any] = []
        self._marks: list[tuple[int, str]] = []
        self._callback = _Callback(self._receive)  # kept: the library holds a bare pointer
        self._lib.espeak_SetSynthCallback(self._callback)

    def voices(self) -> list[tuple[str, str, str]]:
        """(language, name, identifier) of each voice, one per language."""
        with self._lock:
            listed = self._lib.espeak_ListVoices(None)
            out: dict[str, tuple[str, str, str]] = {}
            i = 0
            while listed[i]:
                voice = listed[i].contents
                # the language list is a priority byte and a string
                language = c.string_at(voice.languages + 1).decode().lower()
                out.setdefault(language, (language, voice.name.decode().strip(), voice.identifier.decode()))
                i += 1
        return [v for v in out.values() if v[0] not in _UNUSABLE]

    def synthesise(
        self, text: str, language: str, words_per_minute: int, pitch: float, seed: int
    ) -> tuple[Any, list[tuple[int, str]]]:
        """Samples (n,) int16 and (sample, phoneme) marks; a pause is a mark without phoneme."""
        with self._lock:
            self._choose(language)
            self._lib.espeak_SetParameter(_RATE, words_per_minute, 0)
            # The base of the pitch doubles every 50 of 0..100, its range is proportional; both reach 0.6 to 1.8.
            factor = min(max(pitch**_PITCH_GAIN, 0.5), 2.0)
            self._lib.espeak_SetParameter(_PITCH, round(50 + 50 * math.log2(factor)), 0)
            self._lib.espeak_SetParameter(_RANGE, round(50 * factor), 0)
            self._lib.espeak_ng_SetRandSeed(seed)
            self._pcm, self._marks = [], []
            data = text.encode()
            if self._lib.espeak_Synth(data, len(data) + 1, 0, 1, 0, _UTF8, None, None) != 0:
                raise ModelError(
                    f"eSpeak NG failed on {text[:40]!r}. Reinstall it: pip install --force-reinstall espeakng-loader"
                )
            self._lib.espeak_Synchronize()
            return np.concatenate([np.zeros(0, np.int16), *self._pcm]), self._marks

    def phonemes(self, text: str, language: str, tie: str) -> str:
        """IPA of one clause; the letters of a diphthong or affricate are joined by `tie`."""
        with self._lock:
            self._choose(language)
            pointer = c.c_char_p(text.encode())
            out = []
            while pointer.value:
                part = self._lib.espeak_TextToPhonemes(c.byref(pointer), _UTF8, _IPA | _TIE | ord(tie) << 8)
                out.append((part or b"").decode())
            return " ".join(out)

    def _choose(self, language: str) -> None:
        if self._lib.espeak_SetVoiceByName((self._identifiers.get(language, language) + _VARIANT).encode()) != 0:
            raise ModelError(f"This eSpeak NG has no language {language}. Update it: pip install -U espeakng-loader")

    def _receive(self, samples: Any, count: int, events: Any) -> int:
        if samples and count > 0:
            self._pcm.append(np.ctypeslib.as_array(samples, (count,)).copy())
        i = 0
        while events[i].type != _EVENT_END:
            if events[i].type == _EVENT_PHONEME:
                # at most 8 bytes, without an end mark if it has all 8
                raw = c.string_at(c.addressof(events[i].id), 8).split(b"\0")[0]
                self._marks.append((events[i].sample, raw.decode(errors="ignore")))
            i += 1
        return 0


@lru_cache
def library() -> Library:
    """The one instance, loaded on first use."""
    return Library()


def missing() -> str:
    """Why eSpeak NG cannot run here; empty if it can."""
    if find_spec("espeakng_loader"):
        return ""
    return "eSpeak NG (100+ languages) is not installed: pip install 'beavervision[languages]'"


class EspeakEngine:
    """See :class:`~beavervision.speech.base.Engine`. It runs on the calling thread and has no voice files to find."""

    name = "espeak"

    def __init__(self, threads: int = 1, voices_dir: Path | None = None) -> None:
        pass

    def missing(self) -> str:
        return missing()

    def voices(self) -> tuple[Voice, ...]:
        if self.missing():
            return ()
        return tuple(
            Voice(
                PREFIX + language,
                language,
                self.name,
                "male",
                f"{name}, formant synthesis",
                "GPL-3.0-or-later",
                RATE_HZ,
                TimingKind.EVENTS,
            )
            for language, name, _ in library().voices()
        )

    def say(self, text: str, voice: Voice, *, speed: float, pitch: float, seed: int) -> Spoken:
        samples, marks = library().synthesise(text, voice.language, round(WORDS_PER_MINUTE * speed), pitch, seed)
        times_ms = [max(0.0, sample * 1000 / RATE_HZ - _AHEAD_MS) for sample, _ in marks]
        times_ms.append(len(samples) * 1000 / RATE_HZ)
        spans = tuple(
            Span(_ipa(raw), start_ms, end_ms)
            for (_, raw), start_ms, end_ms in zip(marks, times_ms, times_ms[1:], strict=False)
            if end_ms > start_ms
        )
        return Spoken(samples.astype(np.float32) / 32768, spans)


def _ipa(raw: str) -> str:
    """Without stress marks, ties and eSpeak's own signs; empty for a pause."""
    return "".join(ch for ch in raw if (ch.isalpha() and ch not in "ˈˌ") or ch in "ː\u0303\u0329ʰʲ")
