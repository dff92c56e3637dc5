"""The values of speech synthesis, and the protocol of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from beavervision.media import F32, Audio, Phone


class TimingKind(StrEnum):
    """How the times of the phones were had."""

    NETWORK = "network"  # the durations that the synthesising network itself used
    EVENTS = "events"  # marks that the synthesiser set while it wrote the samples


@dataclass(frozen=True, slots=True, eq=False)
class SpeechChunk:
    """A piece of an utterance: mono audio with its phones, and the text heard in it.

    Chunks follow one another without gap or overlap: each `audio.start` is the sum of the samples before it.
    The phones' clock starts at sample 0 of the utterance, like `audio.start`; they are in order, do not overlap
    and lie within the audio. `dropped` has the visible characters of the text that the voice cannot say (emoji,
    say) and that were left out. A chunk of mere silence has no text and no phones.
    """

    audio: Audio
    text: str
    timing: TimingKind
    dropped: str = ""

    @property
    def phones(self) -> tuple[Phone, ...]:
        return self.audio.phones


@dataclass(frozen=True, slots=True)
class Voice:
    """A voice that can be asked for by `name`. `language` is a lower-case BCP 47 tag.

    `unavailable` is empty for a voice that works here; otherwise it says why it does not and what to do.
    """

    name: str
    language: str
    engine: str
    gender: str
    description: str
    licence: str
    rate_hz: int
    timing: TimingKind
    unavailable: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of synthesised sound as the engine tells it; a pause has an empty `ipa`."""

    ipa: str
    start_ms: float
    end_ms: float


@dataclass(frozen=True, slots=True, eq=False)
class Spoken:
    """What an engine makes of one piece: pcm (samples,) float32 at the voice's rate, and its spans in order."""

    pcm: F32
    spans: tuple[Span, ...]


class Engine(Protocol):
    """A synthesiser. Making one is cheap: networks load on the first :meth:`say`. Threads may share it."""

    name: str

    def missing(self) -> str:
        """Why the engine cannot run here, and what to do; empty if it can."""
        ...

    def voices(self) -> tuple[Voice, ...]:
        """The voices, also those that need something first (see :attr:`Voice.unavailable`); none if none is known."""
        ...

    def say(self, text: str, voice: Voice, *, speed: float, pitch: float, seed: int) -> Spoken:
        """Synthesise one piece, a sentence or less. The same arguments give the same samples.

        Raises:
            ModelError: something the voice needs is missing or damaged.
        """
        ...
