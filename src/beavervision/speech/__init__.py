"""Text to speech: voices, streaming synthesis with the times of the phones, subtitles.

    for chunk in speak("Hello there. How are you?"):
        ...  # chunk.audio, chunk.phones

An engine (:class:`Engine`) synthesises a sentence; :class:`Speaker` does what is common to all: it chooses the voice,
cuts the text, refuses what cannot be said, trims silence, sets pauses and keeps the clock.
"""

from beavervision.media import Phone
from beavervision.speech.base import Engine, Span, SpeechChunk, Spoken, TimingKind, Voice
from beavervision.speech.phone_times import phones_of, read_phones
from beavervision.speech.speaker import LIMIT_CHARS, CueReport, Speaker, speak, write_wav
from beavervision.speech.subtitles import Cue, parse_srt
from beavervision.speech.text import SilentTextError, guess_language

__all__ = [
    "LIMIT_CHARS",
    "Cue",
    "CueReport",
    "Engine",
    "Phone",
    "SilentTextError",
    "Span",
    "Speaker",
    "SpeechChunk",
    "Spoken",
    "TimingKind",
    "Voice",
    "guess_language",
    "parse_srt",
    "phones_of",
    "read_phones",
    "speak",
    "write_wav",
]
