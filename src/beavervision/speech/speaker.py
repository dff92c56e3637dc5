"""The front of speech synthesis: choose a voice, speak text or subtitles as a stream of chunks, write a sound file."""

from __future__ import annotations

import difflib
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from beavervision.errors import ModelError, OutputError, TextError, UsageError
from beavervision.files import whole
from beavervision.media import F32, Audio, Phone
from beavervision.speech._sound import settled
from beavervision.speech.base import Engine, SpeechChunk, Voice
from beavervision.speech.espeak import EspeakEngine
from beavervision.speech.hibari import HibariEngine
from beavervision.speech.kokoro import KokoroEngine
from beavervision.speech.subtitles import Cue
from beavervision.speech.text import Piece, SilentTextError, pieces

# in order of preference for a language that several can say
ENGINES: tuple[Callable[[int, Path | None], Engine], ...] = (HibariEngine, KokoroEngine, EspeakEngine)

DEFAULT_LANGUAGE = "en"
FACTORS = (0.5, 2.0)  # of speed and of pitch
LIMIT_CHARS = 100_000  # about two hours of speech
FINAL_MS = 150  # of silence after the last word, so that the mouth can close
SILENCE_S = 5  # the longest chunk of silence between cues
_WAV_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
_WAV_SAMPLES = (2**32 - _WAV_HEADER.size) // 2
_USUAL = {"en": "en-us", "fr": "fr-fr", "no": "nb", "zh": "cmn"}  # what a language without a region means


@dataclass(frozen=True, slots=True)
class CueReport:
    """What became of a cue. `asked_ms` is its own time, `start_ms` when it is said; times are of the whole utterance.

    `speed` is the factor it was said with, `overrun_ms` how far the speech goes on after the cue's own end (0 if it
    does not). `dropped` has the characters that could not be said; a cue of nothing else is not `spoken`.
    """

    index: int
    asked_ms: int
    start_ms: int
    speed: float
    overrun_ms: int
    spoken: bool
    dropped: str = ""


class Speaker:
    """Speech in any of the voices that this machine has; share one among threads.

    `threads` is the CPU thread count of each network; `voices_dir` a folder with voice files beside the bundled one.
    """

    def __init__(self, threads: int = 1, voices_dir: Path | None = None) -> None:
        self._engines = {engine.name: engine for engine in (make(threads, voices_dir) for make in ENGINES)}

    def voices(self) -> tuple[Voice, ...]:
        """All voices, preferred engine first; those that do not work here say why in `unavailable`."""
        return tuple(voice for engine in self._engines.values() for voice in engine.voices())

    def missing(self) -> dict[str, str]:
        """Engines that cannot run here, each with why and what to do."""
        return {name: reason for name, engine in self._engines.items() if (reason := engine.missing())}

    def voice(self, name: str | None = None, language: str | None = None) -> Voice:
        """The voice called `name`, or the preferred one for `language` (BCP 47; English if neither is given).

        Raises:
            UsageError: no such voice or language, or the voice speaks another language.
            ModelError: it needs something that is not installed.
        """
        # engine by engine, so that no library is loaded for a voice that an earlier engine has
        lazily = (voice for engine in self._engines.values() for voice in engine.voices())
        if name:
            found = next((v for v in lazily if v.name == name), None)
            if found is None:
                raise UsageError(f"There is no voice {name!r}.{self._near(name, [v.name for v in self.voices()])}")
            if language and _tag(language).split("-")[0] != found.language.split("-")[0]:
                raise UsageError(f"The voice {name} speaks {found.language}, not {language}. Leave out one of the two.")
        else:
            found = _best(lazily, _tag(language or DEFAULT_LANGUAGE))
            if found is None:
                known = sorted({v.language for v in self.voices()})
                message = f"There is no voice for the language {language!r}.{self._near(language or '', known)}"
                raise ModelError(message) if self.missing() else UsageError(message)
        if found.unavailable:
            raise ModelError(found.unavailable)
        return found

    def speak(
        self,
        text: str,
        *,
        voice: str | None = None,
        language: str | None = None,
        speed: float = 1.0,
        pitch: float = 1.0,
        seed: int = 0,
        limit_chars: int = LIMIT_CHARS,
    ) -> Iterator[SpeechChunk]:
        """Speak `text`, one chunk per sentence (or part of a very long one), each as soon as it is ready.

        All that can be checked is checked before this returns; synthesis runs as the chunks are taken. The same
        arguments give the same samples. `speed` and `pitch` are factors from 0.5 to 2.

        Raises:
            UsageError: unknown voice or language, or a factor out of range.
            TextError: text that is empty, too long, or that the voice cannot say.
            ModelError: the voice needs something that is not installed, or is damaged.
        """
        chosen = self.voice(voice, language)
        _check_options(speed, pitch, seed)
        cut = pieces(text, language=chosen.language, voice=chosen.name, limit_chars=limit_chars)
        return self._speak(cut, chosen, speed, pitch, seed)

    def speak_cues(
        self,
        cues: Sequence[Cue],
        *,
        voice: str | None = None,
        language: str | None = None,
        speed: float = 1.0,
        pitch: float = 1.0,
        seed: int = 0,
        max_speedup: float = 1.35,
        spill_ms: int = 1000,
        limit_chars: int = LIMIT_CHARS,
        on_report: Callable[[CueReport], None] = lambda report: None,
    ) -> Iterator[SpeechChunk]:
        """Speak each cue at its time, with silence between: the chunks are continuous from 0.

        A cue's speech may go on after its end for `spill_ms`, but not into the next cue. If it needs longer it is said
        again faster, by up to `max_speedup`; if that does not suffice either, the cues after it start late until
        there is room again. `on_report` hears of each cue before its chunk comes. `limit_chars` is for each cue.

        Raises:
            UsageError, TextError, ModelError: as :meth:`speak`; the message names the cue.
        """
        chosen = self.voice(voice, language)
        _check_options(speed, pitch, seed)
        if not 1 <= max_speedup <= FACTORS[1] or spill_ms < 0:
            raise UsageError(f"max_speedup is a factor from 1 to {FACTORS[1]:g} and spill_ms 0 or more.")
        if not cues:
            raise TextError("There are no cues to say.")
        planned = []
        for cue in sorted(cues, key=lambda cue: cue.start_ms):
            try:
                cut = pieces(cue.text, language=chosen.language, voice=chosen.name, limit_chars=limit_chars)
            except SilentTextError:
                cut = ()
            except TextError as error:
                raise TextError(f"Cue {cue.index}: {error}") from error
            planned.append((cue, cut))
        if not any(cut for _, cut in planned):
            raise SilentTextError("No cue has anything to say. Give at least one word or number.")
        fastest = min(speed * max_speedup, FACTORS[1])
        return self._speak_cues(planned, chosen, speed, fastest, pitch, seed, spill_ms, on_report)

    def _near(self, name: str, known: Sequence[str]) -> str:
        near = difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.4)
        hint = f" Near it: {', '.join(near)}." if near else f" There are {len(known)}, such as {', '.join(known[:12])}."
        return hint + "".join(f" {reason}." for reason in self.missing().values())

    def _speak(
        self,
        cut: Sequence[Piece],
        voice: Voice,
        speed: float,
        pitch: float,
        seed: int,
        start: int = 0,
        final_ms: int = FINAL_MS,
    ) -> Iterator[SpeechChunk]:
        engine = self._engines[voice.engine]
        said = False
        for number, piece in enumerate(cut):
            spoken = engine.say(piece.text, voice, speed=speed, pitch=pitch, seed=seed + number)
            pause_ms = final_ms if number == len(cut) - 1 else piece.pause_ms / speed
            pcm, phones = settled(spoken, voice.rate_hz, start, round(pause_ms * voice.rate_hz / 1000))
            if not len(pcm):
                continue
            said = True
            audio = Audio(pcm[None], voice.rate_hz, start, phones)
            yield SpeechChunk(audio, piece.text, voice.timing, piece.dropped)
            start += len(pcm)
        if not said:
            raise TextError(f"The voice {voice.name} makes no sound of {cut[0].text[:40]!r}. Write it in plain words.")

    def _speak_cues(
        self,
        planned: Sequence[tuple[Cue, tuple[Piece, ...]]],
        voice: Voice,
        speed: float,
        fastest: float,
        pitch: float,
        seed: int,
        spill_ms: int,
        on_report: Callable[[CueReport], None],
    ) -> Iterator[SpeechChunk]:
        rate_hz = voice.rate_hz
        at = 0
        for number, (cue, cut) in enumerate(planned):
            if not cut:
                on_report(CueReport(cue.index, cue.start_ms, cue.start_ms, speed, 0, False, cue.text))
                continue
            start = max(at, cue.start_ms * rate_hz // 1000)
            deadline_ms = cue.end_ms + spill_ms
            following = next((after.start_ms for after, words in planned[number + 1 :] if words), deadline_ms)
            room = min(deadline_ms, following) * rate_hz // 1000 - start
            chunk, used = self._fitted(cut, voice, speed, fastest, pitch, seed + number, start, room)
            yield from _silence(at, start, voice)
            at = start + chunk.audio.samples
            overrun_ms = max(0, -(-at * 1000 // rate_hz) - cue.end_ms)
            on_report(
                CueReport(cue.index, cue.start_ms, round(start * 1000 / rate_hz), used, overrun_ms, True, chunk.dropped)
            )
            yield chunk

    def _fitted(
        self,
        cut: Sequence[Piece],
        voice: Voice,
        speed: float,
        fastest: float,
        pitch: float,
        seed: int,
        start: int,
        room: int,
    ) -> tuple[SpeechChunk, float]:
        """The cue as one chunk of at most `room` samples if a speed up to `fastest` gets it there, and that speed."""
        used = speed
        while True:  # ends: the speed grows by 2 % at least
            chunk = _joined(list(self._speak(cut, voice, used, pitch, seed, start, final_ms=0)))
            if chunk.audio.samples <= room or used >= fastest:
                return chunk, used
            needed = used * chunk.audio.samples / room if room > 0 else fastest
            used = min(max(needed, used * 1.02), fastest)


def _tag(language: str) -> str:
    tag = language.strip().lower().replace("_", "-")
    return _USUAL.get(tag, tag)


def _best(voices: Iterable[Voice], tag: str) -> Voice | None:
    """The first voice of just this language that works here, else of the language in another region; else one that
    would be had something been installed.
    """
    near: list[Voice] = []
    for voice in voices:
        if voice.language == tag and not voice.unavailable:
            return voice
        if voice.language.split("-")[0] == tag.split("-")[0]:
            near.append(voice)
    return min(near, key=lambda v: (bool(v.unavailable), v.language != tag), default=None)


def _check_options(speed: float, pitch: float, seed: int) -> None:
    if seed < 0:
        raise UsageError(f"seed is a whole number from 0, not {seed}.")
    for name, value in (("speed", speed), ("pitch", pitch)):
        if not FACTORS[0] <= value <= FACTORS[1]:
            raise UsageError(
                f"{name} is a factor from {FACTORS[0]:g} to {FACTORS[1]:g} (1 is the voice's own), not {value:g}."
            )


def _silence(start: int, stop: int, voice: Voice) -> Iterator[SpeechChunk]:
    step = SILENCE_S * voice.rate_hz
    for at in range(start, stop, step):
        pcm = np.zeros((1, min(step, stop - at)), np.float32)
        yield SpeechChunk(Audio(pcm, voice.rate_hz, at), "", voice.timing)


def _joined(chunks: Sequence[SpeechChunk]) -> SpeechChunk:
    first = chunks[0]
    pcm: F32 = np.concatenate([chunk.audio.pcm for chunk in chunks], axis=1)
    phones: tuple[Phone, ...] = tuple(phone for chunk in chunks for phone in chunk.phones)
    return SpeechChunk(
        Audio(pcm, first.audio.rate_hz, first.audio.start, phones),
        " ".join(chunk.text for chunk in chunks),
        first.timing,
        "".join(dict.fromkeys("".join(chunk.dropped for chunk in chunks))),
    )


def write_wav(chunks: Iterable[SpeechChunk], path: Path) -> int:
    """Write continuous chunks to a 16-bit mono WAV file and return the number of samples.

    The file appears under its name when it is whole; nothing is left behind on an error.

    Raises:
        OutputError: it cannot be written.
    """
    samples = rate_hz = 0
    with whole(path) as part, part.open("xb") as file:
        file.write(bytes(_WAV_HEADER.size))
        for chunk in chunks:
            rate_hz = chunk.audio.rate_hz
            samples += chunk.audio.samples
            if samples > _WAV_SAMPLES:
                raise OutputError(f"{path} would pass 4 GiB, the most a WAV file holds. Split the text.")
            file.write(np.round(np.clip(chunk.audio.pcm[0], -1, 1) * 32767).astype("<i2").tobytes())
        size = samples * 2
        file.seek(0)
        file.write(
            _WAV_HEADER.pack(b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, rate_hz, rate_hz * 2, 2, 16, b"data", size)
        )
    return samples


@lru_cache
def _shared() -> Speaker:
    return Speaker()


def speak(
    text: str,
    *,
    voice: str | None = None,
    language: str | None = None,
    speed: float = 1.0,
    pitch: float = 1.0,
    seed: int = 0,
    limit_chars: int = LIMIT_CHARS,
) -> Iterator[SpeechChunk]:
    """:meth:`Speaker.speak` of a speaker with default arguments that the process shares."""
    return _shared().speak(
        text, voice=voice, language=language, speed=speed, pitch=pitch, seed=seed, limit_chars=limit_chars
    )
