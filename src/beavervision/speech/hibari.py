"""English speech with hibari-tts: small enough to synthesise about fifty times faster than real time on one core."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from beavervision.errors import ModelError, TextError
from beavervision.media import F32
from beavervision.speech import _onnx
from beavervision.speech._phones import RATE_HZ, said
from beavervision.speech.base import Spoken, TimingKind, Voice

MAX_PHONEMES = 400  # that the network sees at once
VOICED_HZ = 40.0  # an F0 below it means unvoiced (hibari.dsp)
_DURATIONS, _ROUNDED = "/Div_40_output_0", "/Clip_output_0"  # before rounding to the grid, and after

_LONG_NUMBER = re.compile(r"\d[\d,]{14,}")  # no name for it: digit by digit
_G2P_LOCK = threading.Lock()


class HibariEngine:
    """See :class:`~beavervision.speech.base.Engine`. One network per voice, loaded once, `threads` threads each.

    Voices beside the bundled one are files of the hibari project; `voices_dir` is where to look for them.
    """

    name = "hibari"

    def __init__(self, threads: int = 1, voices_dir: Path | None = None) -> None:
        self._threads = threads
        self._dir = voices_dir
        self._lock = threading.Lock()
        self._models: dict[str, bytes] = {}
        self._timed: dict[str, Any] = {}
        self._paced: dict[str, Any] = {}

    def missing(self) -> str:
        return "" if find_spec("hibari") else "hibari-tts is not installed: pip install hibari-tts"

    def voices(self) -> tuple[Voice, ...]:
        if self.missing():
            return ()
        from hibari.voices import VOICES

        return tuple(
            Voice(
                name=name,
                language=entry["language"].lower(),
                engine=self.name,
                gender=entry["gender"],
                description=f"{entry['accent']} English",
                licence="Apache-2.0",
                rate_hz=RATE_HZ,
                timing=TimingKind.NETWORK,
                unavailable="" if self._path(name) else self._how_to_get(name),
            )
            for name, entry in VOICES.items()
        )

    def say(self, text: str, voice: Voice, *, speed: float, pitch: float, seed: int) -> Spoken:
        ids_of = vocabulary()
        rng = np.random.default_rng(seed)
        phonemes = "".join(c for c in phonemes_of(text, british=voice.language == "en-gb") if c in ids_of)

        def synthesise(part: str) -> tuple[F32, list[float]]:
            return self._synthesise(voice.name, [ids_of[c] for c in part], speed, pitch, rng)

        return said(phonemes, MAX_PHONEMES, synthesise)

    def _synthesise(
        self, voice: str, ids: list[int], speed: float, pitch: float, rng: np.random.Generator
    ) -> tuple[F32, list[float]]:
        from hibari import dsp

        feed = {"ids": np.array([[0, *ids, 0]], np.int64), "speed": np.ones(1, np.float32)}
        *parts, raw = self._session(voice, self._timed, _onnx.with_output, _DURATIONS).run(None, feed)
        durations = np.maximum(np.round(raw), 1)
        if speed != 1:
            durations = _paced(raw, speed)
            paced = self._session(voice, self._paced, _onnx.with_input, _ROUNDED)
            parts = paced.run(None, {**feed, "?" + _ROUNDED[1:]: durations})
        lh, theta, ln, lr, phi, f0 = (part[0] for part in parts)
        state = rng.bit_generator.state
        pcm = dsp.synth(lh, theta, ln, lr, phi, f0, rng)
        if pitch != 1:
            rng.bit_generator.state = state
            moved = dsp.synth(*_moved(lh, theta, ln, lr, phi, f0, pitch), rng)
            pcm = moved * (_rms(pcm) / max(_rms(moved), 1e-6))
        peak = float(np.abs(pcm).max(initial=0.0))
        return (pcm * np.float32(0.98 / peak) if peak > 0.98 else pcm).astype(np.float32), durations.tolist()

    def _session(self, voice: str, cache: dict[str, Any], edit: Any, value: str) -> Any:
        with self._lock:
            if voice not in cache:
                if voice not in self._models:
                    self._models[voice] = self._load(voice)
                try:
                    cache[voice] = _onnx.session(edit(self._models[voice], value), self._threads)
                except Exception as error:  # the runtime's errors have no public base class
                    raise ModelError(f"The network of voice {voice} cannot be loaded: {error}") from error
            return cache[voice]

    def _load(self, voice: str) -> bytes:
        from hibari.voices import VOICES

        if (path := self._path(voice)) is None:
            raise ModelError(self._how_to_get(voice))
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != VOICES[voice]["sha256"]:
            raise ModelError(
                f"{path} is damaged or another version: its hash is wrong. Replace it, or reinstall hibari-tts."
            )
        return data

    def _path(self, voice: str) -> Path | None:
        """The voice's file, never downloaded; None if it is not here."""
        from hibari.voices import VOICES, voice_path

        if self._dir and (own := self._dir / str(VOICES[voice]["file"])).is_file():
            return own
        try:
            return Path(voice_path(voice, download_missing=False))
        except FileNotFoundError:
            return None

    def _how_to_get(self, voice: str) -> str:
        return (
            f"The voice {voice} is not on this machine. Fetch it once with: hibari --voice {voice} -o hello.wav Hello"
        )


@lru_cache
def _g2p(british: bool) -> Any:
    from hibari.g2p import G2P

    return G2P(british=british)


def phonemes_of(text: str, *, british: bool) -> str:
    """English text as phonemes, one string of the symbols of :func:`vocabulary` (and a few that are not in it).

    Raises:
        TextError: hibari's reading rules fail on it.
    """
    text = _LONG_NUMBER.sub(lambda m: " ".join(c for c in m.group() if c.isdigit()), text)
    with _G2P_LOCK:
        try:
            return str(_g2p(british)(text))
        except (ArithmeticError, LookupError, RecursionError, ValueError) as error:
            raise TextError(f"The voice cannot read {text[:60]!r} ({error}). Write it in plain words.") from error


@lru_cache
def vocabulary() -> dict[str, int]:
    """The phoneme alphabet, shared with Kokoro: symbol to id."""
    from hibari.tts import ASSETS

    table: dict[str, int] = json.loads((Path(ASSETS) / "vocab.json").read_text(encoding="utf-8"))
    return table


def _moved(lh: F32, theta: F32, ln: F32, lr: F32, phi: F32, f0: F32, pitch: float) -> tuple[F32, ...]:
    """The network's spectra (bins, frames) with F0 (frames,) scaled by `pitch`, for the voiced frames.

    The harmonic branch has the old harmonics' peaks, 20 Hz a bin: averaging over one harmonic's distance leaves the
    envelope. The free-phase branch holds what is left of the old pitch, so it is muted.
    """
    voiced = f0 > VOICED_HZ
    if not voiced.any():
        return lh, theta, ln, lr, phi, f0
    width = 2 * round(float(np.median(f0[voiced])) / 40) + 1
    total = np.cumsum(np.pad(lh, ((width // 2 + 1, width // 2), (0, 0)), mode="edge"), axis=0, dtype=np.float64)
    envelope = ((total[width:] - total[:-width]) / width).astype(np.float32)
    return (
        np.where(voiced, envelope, lh),
        theta,
        ln,
        np.where(voiced, np.float32(-30), lr),
        phi,
        np.where(voiced, np.maximum(f0 * np.float32(pitch), np.float32(VOICED_HZ + 1)), f0),
    )


def _rms(pcm: F32) -> float:
    return float(np.sqrt(np.mean(np.square(pcm))))


def _paced(raw: F32, speed: float) -> npt.NDArray[np.float32]:
    """Durations for `speed` on the network's grid: what one phone loses by rounding, the next makes up for."""
    out = np.empty_like(raw)
    owed = 0.0
    for i, wanted in enumerate(raw / speed):
        out[i] = max(1.0, np.floor(wanted + owed + 0.5))
        owed = float(np.clip(owed + wanted - out[i], -1, 1))
    return out
