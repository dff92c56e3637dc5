"""Speech synthesis with the real English engine."""

from __future__ import annotations

import errno
import threading
import wave
from pathlib import Path

import numpy as np
import pytest

from beavervision.errors import ModelError, OutputError, TextError, UsageError
from beavervision.media import F32
from beavervision.speech import (
    Cue,
    CueReport,
    Phone,
    SilentTextError,
    Speaker,
    SpeechChunk,
    TimingKind,
    _sound,
    speak,
    write_wav,
)
from beavervision.speech.base import Span, Spoken
from beavervision.speech.hibari import HibariEngine
from beavervision.speech.text import pieces

TEXT = "Bob put a pepper map up by the baby. My mother makes apple pie! Did Peter bake a big potato cake?"
VOWELS = set("aeiouæɑɐɔəɛɜɪʊʌɒ")


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return Speaker()


def joined(chunks: list[SpeechChunk]) -> F32:
    return np.concatenate([chunk.audio.pcm[0] for chunk in chunks])


def check_clock(chunks: list[SpeechChunk]) -> None:
    """Continuous audio, and phones in order within the chunk's audio."""
    at, before_ms = 0, 0
    for chunk in chunks:
        assert chunk.audio.start == at
        assert chunk.audio.channels == 1
        rate_hz = chunk.audio.rate_hz
        for phone in chunk.phones:
            assert before_ms <= phone.start_ms < phone.end_ms
            before_ms = phone.end_ms
            assert at <= phone.start_ms * rate_hz / 1000
            assert phone.end_ms * rate_hz / 1000 <= at + chunk.audio.samples
        at += chunk.audio.samples


def envelope_db(pcm: F32, rate_hz: int) -> F32:
    """Loudness by 5 ms."""
    hop = rate_hz // 200
    power = np.square(pcm[: len(pcm) // hop * hop]).reshape(-1, hop).mean(axis=1)
    return np.asarray(10 * np.log10(power + 1e-8), np.float32)


def lag_ms(chunks: list[SpeechChunk]) -> int:
    """By how much the loudness comes after the phones: vowels should be loud, stops and pauses silent."""
    loud = envelope_db(joined(chunks), chunks[0].audio.rate_hz)
    expected = np.full(len(loud), -1.0)
    for phone in (phone for chunk in chunks for phone in chunk.phones):
        level = 1.0 if VOWELS & set(phone.ipa) else 0.2 if phone.ipa[0] in "mnŋlɹwj" else -0.6
        expected[phone.start_ms // 5 : phone.end_ms // 5] = level
    lags = range(-20, 21)
    fit = [np.corrcoef(np.roll(expected, lag)[20:-20], loud[20:-20])[0, 1] for lag in lags]
    assert max(fit) > 0.45
    return 5 * lags[int(np.argmax(fit))]


def pitch_hz(chunks: list[SpeechChunk]) -> float:
    pcm, rate_hz = joined(chunks), chunks[0].audio.rate_hz
    found = []
    for at in range(0, len(pcm) - 1400, 400):
        window = pcm[at : at + 1400] * np.hanning(1400)
        if np.mean(window**2) < 1e-4:
            continue
        correlation = np.fft.irfft(np.abs(np.fft.rfft(window, 4096)) ** 2)
        lag = 40 + int(np.argmax(correlation[40:500]))
        if correlation[lag] > 0.5 * correlation[0]:
            found.append(rate_hz / lag)
    return float(np.median(found))


def test_chunks_are_sentences_on_one_clock(speaker: Speaker) -> None:
    chunks = list(speaker.speak(TEXT))
    assert [chunk.text for chunk in chunks] == [
        "Bob put a pepper map up by the baby.",
        "My mother makes apple pie!",
        "Did Peter bake a big potato cake?",
    ]
    assert {chunk.timing for chunk in chunks} == {TimingKind.NETWORK}
    check_clock(chunks)
    assert 5 < len(joined(chunks)) / 24000 < 9


def test_first_sentence_comes_before_the_rest_is_synthesised(speaker: Speaker, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    real = HibariEngine.say

    def say(self: HibariEngine, text: str, *args: object, **options: object) -> Spoken:
        said.append(text)
        return real(self, text, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(HibariEngine, "say", say)
    stream = speaker.speak(TEXT)
    assert said == []
    next(stream)
    assert said == ["Bob put a pepper map up by the baby."]


def test_phones_are_ipa_of_the_words(speaker: Speaker) -> None:
    (chunk,) = speaker.speak("Judge my boy now.")
    assert [phone.ipa for phone in chunk.phones] == ["dʒ", "ʌ", "dʒ", "m", "aɪ", "b", "ɔɪ", "n", "aʊ"]


def test_phones_fit_the_sound(speaker: Speaker) -> None:
    assert abs(lag_ms(list(speaker.speak(TEXT)))) <= 20
    assert abs(lag_ms(list(speaker.speak(TEXT, speed=1.5)))) <= 20


def test_lips_are_closed_where_the_sound_dips(speaker: Speaker) -> None:
    chunks = list(speaker.speak(TEXT))
    loud = envelope_db(joined(chunks), 24000)
    phones = [phone for chunk in chunks for phone in chunk.phones]
    vowel_db = np.median([loud[p.start_ms // 5 : p.end_ms // 5].mean() for p in phones if VOWELS & set(p.ipa)])
    stops = [p for p in phones if p.ipa in ("p", "b")]
    dips_db = [loud[max(0, p.start_ms // 5 - 4) : p.end_ms // 5 + 2].min() for p in stops]
    assert len(stops) >= 12
    assert vowel_db - np.median(dips_db) > 20


def test_little_silence_before_the_first_word_and_pauses_between(speaker: Speaker) -> None:
    chunks = list(speaker.speak("Stop. Go."))
    loud = np.flatnonzero(envelope_db(joined(chunks), 24000) > -60) * 5
    assert loud[0] <= 60
    gap_ms = np.diff(loud).max()
    assert 250 <= gap_ms <= 450
    first, second = chunks[0].phones[-1], chunks[1].phones[0]
    assert second.start_ms - first.end_ms >= 200  # the phone before the pause does not take it


def test_same_seed_same_samples(speaker: Speaker) -> None:
    a, b, c = (joined(list(speaker.speak("Hello there. Bye.", seed=seed))) for seed in (7, 7, 8))
    assert np.array_equal(a, b)
    assert len(a) == len(c) or abs(len(a) - len(c)) < 2400
    assert not np.array_equal(a, c)


def test_threads_share_a_speaker(speaker: Speaker) -> None:
    results: dict[int, F32] = {}

    def work(n: int) -> None:
        results[n] = joined(list(speaker.speak("Hello there. Good bye.", speed=1.2)))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(np.array_equal(results[0], other) for other in results.values())


@pytest.mark.parametrize("speed", [0.5, 1.1, 1.35, 1.7])
def test_speed_is_what_was_asked_for(speaker: Speaker, speed: float) -> None:
    text = "This is a rather long sentence, which helps to measure how fast the voice speaks it."
    sound = [c.phones[-1].end_ms - c.phones[0].start_ms for s in (1.0, speed) for c in speaker.speak(text, speed=s)]
    assert sound[0] / sound[1] == pytest.approx(speed, rel=0.04)
    check_clock(list(speaker.speak(text, speed=speed)))


@pytest.mark.parametrize("pitch", [0.6, 1.25, 1.8])
def test_pitch_is_what_was_asked_for_at_the_same_loudness(speaker: Speaker, pitch: float) -> None:
    text = "My mama baked many more apple pies."
    own, moved = list(speaker.speak(text)), list(speaker.speak(text, pitch=pitch))
    assert pitch_hz(moved) / pitch_hz(own) == pytest.approx(pitch, rel=0.06)
    assert np.std(joined(moved)) == pytest.approx(np.std(joined(own)), rel=0.1)
    assert np.abs(joined(moved)).max() < 1


def test_text_without_a_full_stop_comes_in_short_chunks(speaker: Speaker) -> None:
    stream = speaker.speak("and so they went on and on without any end to it " * 40)
    first = next(stream)
    assert first.audio.seconds < 20
    assert len(first.text) <= 200


def test_long_number_is_said_whole(speaker: Speaker) -> None:
    (chunk,) = speaker.speak("9 " + "7" * 150)
    assert len(chunk.phones) > 600
    check_clock([chunk])


@pytest.mark.parametrize("text", ["", "   \n\t", "...", "😀👍", "♪ ♪", "--- * ---"])
def test_nothing_to_say_is_refused(speaker: Speaker, text: str) -> None:
    with pytest.raises(TextError, match="word"):
        speaker.speak(text)


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Привет, мир!", "ru"),
        ("Привіт, світе!", "uk"),
        ("你好，世界", "zh"),
        ("こんにちは", "ja"),
        ("مرحبا", "ar"),
        ("नमस्ते", "hi"),
    ],
)
def test_foreign_script_is_refused_with_the_way_out(speaker: Speaker, text: str, language: str) -> None:
    with pytest.raises(TextError) as error:
        speaker.speak(text)
    message = str(error.value)
    assert text[0] in message
    assert f"Set the language to {language} " in message
    assert "beavervision[languages]" in message


def test_a_few_signs_are_dropped_and_noted(speaker: Speaker) -> None:
    chunks = list(speaker.speak("😀 Well done 👍🏽 my friend. The number π is about three. Bye ❤️"))
    assert [chunk.text for chunk in chunks] == ["Well done my friend.", "The number is about three.", "Bye"]
    assert ["😀" in chunks[0].dropped, chunks[1].dropped, chunks[2].dropped] == [True, "π", "❤"]


def test_letters_in_disguise_are_read() -> None:
    (piece,) = pieces("𝗛𝗲𝗹𝗹𝗼 ﬁne\x00 ｗｏｒｌｄ ① ٣ m²\ufeff", language="en-us", voice="heart", limit_chars=100)
    assert piece.text == "Hello fine world 1 3 m²"
    assert piece.dropped == ""


def test_sentences_are_not_cut_at_abbreviations() -> None:
    text = 'Dr. Smith met J. K. Rowling at 3.5 p.m. today. "Really?" she said. No. It costs $3.50!\n\nNew part'
    cut = pieces(text, language="en-us", voice="heart", limit_chars=1000)
    assert [piece.text for piece in cut] == [
        "Dr. Smith met J. K. Rowling at 3.5 p.m. today.",
        '"Really?" she said.',
        "No.",
        "It costs $3.50!",
        "New part",
    ]
    assert cut[3].pause_ms > cut[2].pause_ms


def test_too_long_a_text_is_refused(speaker: Speaker) -> None:
    with pytest.raises(TextError, match="limit is 10"):
        speaker.speak("word " * 10, limit_chars=10)


@pytest.mark.parametrize("options", [{"speed": 0.4}, {"speed": 2.1}, {"pitch": 0.0}, {"pitch": float("nan")}])
def test_factors_out_of_range_are_refused(speaker: Speaker, options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"0\.5 to 2"):
        speaker.speak("Hello", **options)  # type: ignore[arg-type]


def test_negative_seed_is_refused(speaker: Speaker) -> None:
    with pytest.raises(UsageError, match="seed"):
        speaker.speak("Hello", seed=-1)


def test_voices(speaker: Speaker) -> None:
    assert speaker.voice().name == "heart"
    assert speaker.voice(language="en_US").name == "heart"
    with pytest.raises(UsageError, match="heart"):
        speaker.voice("hart")
    with pytest.raises(UsageError, match="speaks en-us"):
        speaker.voice("heart", "de")
    with pytest.raises((UsageError, ModelError), match="xx"):
        speaker.voice(language="xx")
    names = [voice.name for voice in speaker.voices()]
    assert len(names) == len(set(names))


def test_voice_that_is_not_here_says_how_to_get_it(
    speaker: Speaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HIBARI_HOME", str(tmp_path))
    with pytest.raises(ModelError, match="Fetch it once with: hibari --voice emma"):
        speaker.speak("Hello", voice="emma")


def test_damaged_voice_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "hibari.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match="damaged"):
        list(Speaker(voices_dir=tmp_path).speak("Hello"))


def test_missing_engines_are_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("espeak", "kokoro", "hibari"):
        monkeypatch.setattr(f"beavervision.speech.{module}.find_spec", lambda name: None)
    speaker = Speaker()
    assert set(speaker.missing()) == {"hibari", "kokoro", "espeak"}
    with pytest.raises(ModelError, match=r"beavervision\[languages\]"):
        speaker.speak("Guten Tag", language="de")


def test_phone_before_a_pause_ends_with_its_sound() -> None:
    rate_hz = 1000
    pcm = np.zeros(1000, np.float32)
    pcm[200:400] = 0.5
    spoken = Spoken(pcm, (Span("a", 200, 300), Span("n", 300, 900), Span("", 900, 1000)))
    sound, phones = _sound.settled(spoken, rate_hz, 5000, 50)
    assert len(sound) == 40 + 200 + 60 + 50
    assert phones == (Phone("a", 5040, 5140), Phone("n", 5140, 5240))


def test_wav_is_whole_or_absent(speaker: Speaker, tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    chunks = list(speaker.speak("Hello there. Bye."))
    assert write_wav(chunks, path) == len(joined(chunks))
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 24000)
        pcm = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32767
    assert np.abs(pcm - joined(chunks)).max() < 1e-4

    def broken() -> object:
        yield chunks[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_wav(broken(), tmp_path / "b.wav")  # type: ignore[arg-type]
    with pytest.raises(OutputError, match="cannot be written"):
        write_wav(chunks, tmp_path / "absent" / "c.wav")

    def full() -> object:
        yield chunks[0]
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError, match="No space left"):
        write_wav(full(), path)  # type: ignore[arg-type]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.wav"]


def test_module_function_speaks() -> None:
    (chunk,) = speak("Hello.")
    assert chunk.audio.rate_hz == 24000
    assert chunk.phones


# subtitles


def cues_of(*times_and_texts: tuple[int, int, str]) -> list[Cue]:
    return [Cue(i, start, end, text) for i, (start, end, text) in enumerate(times_and_texts, 1)]


def test_cues_start_on_their_time_to_the_sample(speaker: Speaker) -> None:
    reports: list[CueReport] = []
    cues = cues_of((1013, 2500, "Hello there."), (14001, 16000, "How are you? 😀"), (17000, 18000, "♪ ♪"))
    chunks = list(speaker.speak_cues(cues, on_report=reports.append))
    check_clock(chunks)
    assert max(chunk.audio.seconds for chunk in chunks) <= 5
    spoken = [chunk for chunk in chunks if chunk.text]
    assert [chunk.audio.start for chunk in spoken] == [1013 * 24, 14001 * 24]
    silent = joined([chunk for chunk in chunks if not chunk.text])
    assert not silent.any()
    assert reports == [
        CueReport(1, 1013, 1013, 1.0, 0, True),
        CueReport(2, 14001, 14001, 1.0, 0, True, "😀"),
        CueReport(3, 17000, 17000, 1.0, 0, False, "♪ ♪"),
    ]
    assert np.abs(spoken[0].audio.pcm[0, : 24 * 80]).max() > 0.005  # the word starts with the cue


def test_long_cue_is_said_faster_within_the_limit(speaker: Speaker) -> None:
    text = "This is quite a long sentence for the little time it has."
    natural = sum(chunk.audio.samples for chunk in speaker.speak_cues(cues_of((0, 60_000, text))))
    room_ms = int(natural / 24 / 1.2)
    reports: list[CueReport] = []
    cues = cues_of((0, room_ms, text), (room_ms, room_ms + 4000, "Next."))
    chunks = list(speaker.speak_cues(cues, on_report=reports.append))
    check_clock(chunks)
    assert 1.15 < reports[0].speed < 1.3
    assert reports[0].overrun_ms == 0
    assert reports[1].start_ms == room_ms
    assert reports[1].speed == 1


def test_cue_far_too_long_pushes_the_next_which_is_reported(speaker: Speaker) -> None:
    text = "This is quite a long sentence for the very little time that it has been given here."
    reports: list[CueReport] = []
    cues = cues_of((500, 1500, text), (1500, 2500, "Next."), (20_000, 21_000, "Last."))
    chunks = list(speaker.speak_cues(cues, on_report=reports.append))
    check_clock(chunks)
    first, second, third = reports
    assert first.speed == pytest.approx(1.35)
    assert first.overrun_ms > 500
    assert second.start_ms == pytest.approx(1500 + first.overrun_ms, abs=1)
    assert second.asked_ms == 1500
    assert third.start_ms == 20_000


def test_speech_may_spill_into_silence_but_not_into_the_next_cue(speaker: Speaker) -> None:
    text = "This goes on after the end of its own cue."
    for next_ms, speed in ((9000, 1.0), (2000, None)):
        reports: list[CueReport] = []
        list(speaker.speak_cues(cues_of((0, 1900, text), (next_ms, 9900, "Next.")), on_report=reports.append))
        assert reports[1].start_ms == next_ms
        assert reports[0].speed == speed if speed else reports[0].speed > 1.05


def test_cues_are_refused_by_number(speaker: Speaker) -> None:
    with pytest.raises(TextError, match=r"Cue 2: .*Set the language to ru "):
        speaker.speak_cues(cues_of((0, 900, "Hello."), (1000, 2000, "Привет.")))
    with pytest.raises(TextError, match="no cues"):
        speaker.speak_cues([])
    with pytest.raises(SilentTextError):
        speaker.speak_cues(cues_of((0, 900, "♪")))
    with pytest.raises(UsageError, match="max_speedup"):
        speaker.speak_cues(cues_of((0, 900, "Hello.")), max_speedup=3)
