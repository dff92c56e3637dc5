"""Which expression when: names, tracks, marks, moods, life. The faces that come of it are in test_expression_faces.py."""

from __future__ import annotations

import json
import math
import os
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beavervision.errors import InputError, NoFaceError, TextError, UsageError
from beavervision.expression import (
    PRESETS,
    Custom,
    Direct,
    ExpressionStore,
    Marked,
    Script,
    Style,
    Track,
    known,
    learn_custom,
    parse,
)
from beavervision.expression.alive import Manner
from beavervision.expression.controls import PITCH, VALUES, YAW, look_of
from beavervision.expression.direct import FELT_PER_S
from beavervision.expression.sentiment import valence
from beavervision.expression.voice import Impression, Listener, _pitch_st
from beavervision.media import BLENDSHAPES, F32, POINTS, Audio, Clip, Expression, Face, FaceState, FaceTrack, Frames
from beavervision.models.cards import SILERO_VAD, load_data
from beavervision.models.face import blendshape_names
from beavervision.models.mesh import INNER_LOWER, canonical
from beavervision.models.runtime import OnnxNet
from beavervision.pipeline import _unmarked
from beavervision.speech import Cue, Speaker, SpeechChunk
from beavervision.stages.hear import Hear
from tests.media_factory import numbered_picture

RATE = Fraction(25)
HUGE = 10**400  # larger than any float
INDEX = {name: i for i, name in enumerate(blendshape_names())}
SMILE, INNER, BLINK = INDEX["mouthSmileLeft"], INDEX["browInnerUp"], INDEX["eyeBlinkLeft"]


@cache
def speaker() -> Speaker:
    return Speaker()


@cache
def said(text: str) -> tuple[SpeechChunk, ...]:
    return tuple(speaker().speak(text))


@cache
def silero() -> OnnxNet:
    return OnnxNet(load_data(SILERO_VAD.files[0]))


def heard(audio: Sequence[Audio], rate: Fraction = RATE, block: int = 8) -> Iterator[Clip]:
    """As many pictures as the sound needs, in clips of `block`."""
    picture = numbered_picture(0, 16, 16)
    source = (Clip(Frames((picture,) * block, start, rate)) for start in range(0, 1 << 20, block))
    return Hear("logmel", 810, 160, silero())(source, iter(audio))


@cache
def clip_of(text: str) -> tuple[Clip, ...]:
    """A text as heard, in clips of one picture."""
    return tuple(heard([chunk.audio for chunk in said(text)], block=1))


def sound_of(seconds: float, rate_hz: int = 16_000) -> Audio:
    return Audio(np.zeros((1, round(seconds * rate_hz)), np.float32), rate_hz)


@cache
def silence(seconds: float) -> tuple[Clip, ...]:
    return tuple(heard([sound_of(seconds)], block=1))


def looks(clips: Iterator[Clip]) -> F32:
    """The expression of each picture, (n, 58), the head's scale as its growth."""
    rows = []
    for clip in clips:
        if clip.expression is None:
            rows.append(np.zeros((len(clip), VALUES), np.float32))
        else:
            assert len(clip.expression) == len(clip)
            rows.append(np.hstack([clip.expression.controls, clip.expression.head - [0, 0, 0, 0, 0, 1]]))
    return np.concatenate(rows)


# Names ---------------------------------------------------------------------------------------------------------------


def test_a_spec_names_presets_controls_and_pairs() -> None:
    assert np.allclose(parse("happy:0.5").look, look_of({"happy": 1.0}) / 2)
    assert np.allclose(parse("happy").look, parse("happy:0.6").look)
    assert parse(" mouthSmileLeft:0.4 , browInnerUp:-0.2 ").look[[SMILE, INNER]] == pytest.approx([0.4, -0.2])
    smile = parse("mouthSmile:0.5").look
    assert smile[SMILE] == smile[INDEX["mouthSmileRight"]] == 0.5 and np.count_nonzero(smile) == 2
    assert np.count_nonzero(parse("jawLeft:1").look) == 1, "a direction is no pair"
    assert parse("headYaw:0.5,headPitch:-1").look[[YAW, PITCH]] == pytest.approx([6, -10])
    assert parse("auto:0.7,happy:0.3").auto == 0.7
    assert not parse("neutral").anything and not parse("").anything
    assert parse("happy:1,mouthSmile:1").look[:BLENDSHAPES].max() == 1, "controls are held within their range"


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("hapy:0.5", "Did you mean happy"),
        ("mouthSmlie:0.5", "mouthSmile"),
        ("happy:1.5", "from 0 to 1"),
        ("happy:-0.5", "from 0 to 1"),
        ("browUp:-1.5", "from -1 to 1"),
        ("happy:nan", "from 0 to 1"),
        ("happy:lots", "not understood"),
        ("happy=0.5", "not understood"),
        ("happy,,sad", "not understood"),
        ("happy:0.2,happy:0.3", "twice"),
        ("auto:2", "from 0 to 1"),
        ("x" * 2000, "at most"),
    ],
)
def test_a_wrong_spec_says_what_to_write(spec: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse(spec)


def test_every_name_that_is_listed_can_be_asked_for() -> None:
    names = known({"my-smile": look_of({"mouthSmile": 0.3})})
    assert len(names) == len({k.name for k in names})
    assert set(blendshape_names()[1:]) < {k.name for k in names}
    for k in names:
        wanted = parse(f"{k.name}:{k.high}", {"my-smile": look_of({"mouthSmile": 0.3})})
        assert wanted.anything or k.name == "neutral"
    assert {k.name for k in names if k.kind == "preset"} == set(PRESETS)


# Over time -----------------------------------------------------------------------------------------------------------


def test_keyframes_ease_into_one_another() -> None:
    keys = [
        {"time_s": 1, "expression": "mouthSmile:0"},
        {"time_s": 2, "expression": {"mouthSmile": 0.8}, "ease": "linear"},
        {"time_s": 3, "expression": "mouthSmile:0", "ease": "hold"},
        {"time_s": 4, "expression": "mouthSmile:0.4"},
    ]
    track = Track.of({"keyframes": keys})
    at = [float(track.at(t)[SMILE]) for t in (0, 1, 1.25, 2, 2.9, 3.0, 3.1, 3.5, 9)]
    assert at == pytest.approx([0, 0, 0.2, 0.8, 0.8, 0, 0.4 * (3 * 0.01 - 2 * 0.001), 0.2, 0.4])
    assert np.allclose(Track.of(keys).at(1.7), track.at(1.7))


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ({}, "keyframes"),
        ([], "keyframes"),
        ({"keyframes": [{"time_s": 0}]}, "keyframe 1"),
        ([{"time_s": 0, "expression": "hapy"}], "keyframe 1.*happy"),
        ([{"time_s": 0, "expression": "auto"}], "auto"),
        ([{"time_s": -1, "expression": "happy"}], "seconds"),
        ([{"time_s": True, "expression": "happy"}], "seconds"),
        ([{"time_s": 0, "expression": "happy", "easing": "in"}], "easing"),
        ([{"time_s": 0, "expression": "happy", "ease": "bounce"}], "in-out"),
        ([{"time_s": 0, "expression": "happy", "ease": ["in"]}], "in-out"),
        ([{"time_s": 0, "expression": "happy", "ease": None}], "in-out"),
        ([{"time_s": HUGE, "expression": "happy"}], "seconds"),
        ([{"time_s": math.inf, "expression": "happy"}], "seconds"),
        ([{"time_s": 0, "expression": {"happy": HUGE}}], "names and numbers"),
        ([{"time_s": 0, "expression": {"happy": math.nan}}], "names and numbers"),
        ([{"time_s": 0, "expression": {"happy": "much"}}], "names and numbers"),
        ([{"time_s": 1, "expression": "happy"}, {"time_s": 1, "expression": "sad"}], "keyframe 2.*not after"),
    ],
)
def test_a_wrong_track_names_its_keyframe(document: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Track.of(document)


def test_a_track_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "track.json"
    path.write_text(json.dumps({"keyframes": [{"time_s": 0, "expression": "happy:1"}]}))
    assert Track.read(path).at(5)[SMILE] == pytest.approx(PRESETS["happy"]["mouthSmile"])
    path.write_text("{")
    with pytest.raises(InputError, match="JSON"):
        Track.read(path)
    with pytest.raises(InputError, match="cannot be read"):
        Track.read(tmp_path / "none.json")


# Marks ---------------------------------------------------------------------------------------------------------------


def test_marks_are_taken_out_of_the_text() -> None:
    marked = Marked.of("[happy] Great news. [neutral] Now [sad:0.3, browUp:0.2]the details.")
    assert marked.text.split() == ["Great", "news.", "Now", "the", "details."]
    assert [count for count, _ in marked.marks] == [0, len("Greatnews"), len("GreatnewsNow")]
    assert marked.marks[2][1].look[INNER] == pytest.approx(PRESETS["sad"]["browInnerUp"] * 0.3 + 0.2)
    for text in ("See [1] and [two words], [] or [ 3:4 ].", "a plain text", r"say \[happy] aloud"):
        kept = Marked.of(text)
        assert not kept.marks and kept.text == text.replace("\\", "")


def test_an_unknown_mark_is_an_error_that_names_the_known_ones() -> None:
    with pytest.raises(TextError, match=r"\[hapy\].*happy.*surprised.*\\\[hapy\]"):
        Marked.of("[hapy] Hello.")
    assert Marked.of("[my-smile] Hello.", {"my-smile": look_of({"mouthSmile": 0.3})}).marks
    kept = Marked.of("[music] Hello [happy] there.", strict=False)
    assert kept.left == ("[music]",) and kept.text.startswith("[music]") and len(kept.marks) == 1


class Noted(Script):
    """A script that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.marks_s: list[float] = []
        self.sentences: list[tuple[float, float]] = []

    def mark(self, time_s: float, wanted: Any) -> None:
        self.marks_s.append(time_s)

    def said(self, time_s: float, glad: float) -> None:
        self.sentences.append((time_s, glad))


def test_marks_come_when_their_words_are_heard() -> None:
    """Against the phones of the sentence spoken without marks."""
    marked = Marked.of("[happy] We won the prize! [sad] But then, [angry] it was stolen by 3 thieves. The end.[calm]")
    chunks = said(marked.text)
    script = Noted()
    assert list(marked.follow(chunks, script)) == list(chunks)
    first, second, third = (chunk.phones for chunk in chunks)
    clause = next(b.start_ms for a, b in pairwise(second) if b.start_ms - a.end_ms > 60)
    end = chunks[-1].audio.start + chunks[-1].audio.samples
    assert script.marks_s == pytest.approx(
        [first[0].start_ms / 1000, second[0].start_ms / 1000, clause / 1000, end / chunks[-1].audio.rate_hz]
    )
    assert [time_s for time_s, _ in script.sentences] == [p[0].start_ms / 1000 for p in (first, second, third)]
    assert script.sentences[0][1] > 0.5 > -0.3 > script.sentences[1][1]


@pytest.mark.parametrize(
    "text",
    [
        "The old man in the red hat [happy] shouted about it.",
        "It is a long and narrow road, and the [happy] sheep are on it.",
        "Every morning after breakfast a man in a boat [happy] shows up.",
    ],
)
def test_a_mark_within_a_clause_is_near_its_word(text: str) -> None:
    marked, script = Marked.of(text), Noted()
    chunks = said(marked.text)
    list(marked.follow(chunks, script))
    (word_s,) = [phone.start_ms / 1000 for chunk in chunks for phone in chunk.phones if phone.ipa == "ʃ"]
    assert script.marks_s == [pytest.approx(word_s, abs=0.15)]


def test_marks_are_told_before_their_sound_and_survive_what_a_voice_leaves_out() -> None:
    marked = Marked.of("ﬁne “words” 😀 № 5. [happy] Ünder way, [neutral]ok")
    script = Noted()
    told: list[int] = []
    for _ in marked.follow(speaker().speak(marked.text), script):
        told.append(len(script.marks_s))
    assert told[-1] == 2 and script.marks_s == sorted(script.marks_s)
    assert script.marks_s[0] == pytest.approx(script.sentences[1][0], abs=0.3)


def test_other_languages_have_no_valence() -> None:
    script = Noted()
    list(Marked.of("Die bad die.").follow(said("Die bad die."), script, language="de"))
    assert not script.sentences


def test_marks_of_subtitles_take_effect_at_their_cues() -> None:
    script = Noted()
    notes: list[str] = []
    cues = [
        Cue(1, 0, 900, "[music] Good [happy] morning."),
        Cue(2, 1500, 1600, "[sad:0.3]"),
        Cue(3, 2000, 3000, "[neutral] And now."),
    ]
    plain, marked = _unmarked(cues, script, notes.append)
    assert script.anything and script.marks_s == [1.5]
    assert [cue.text.split() for cue in plain] == [["[music]", "Good", "morning."], ["And", "now."]]
    assert [(cue.index, cue.start_ms) for cue in plain] == [(1, 0), (3, 2000)]
    assert [count for count, _ in marked.marks] == [len("musicGood"), len("musicGoodmorning")]
    assert len(notes) == 1 and "[music]" in notes[0]
    chunks = tuple(speaker().speak_cues(plain))
    list(marked.follow(chunks, script))
    spoken = [chunk.phones[0].start_ms / 1000 for chunk in chunks if chunk.phones]
    assert spoken[0] < script.marks_s[1] < 1.2 and script.marks_s[2] == spoken[1]


# Direction -----------------------------------------------------------------------------------------------------------


def test_a_constant_holds_from_the_first_picture() -> None:
    rows = looks(Direct(Script("happy:0.6"))(iter(silence(1.0))))
    assert np.allclose(rows, parse("happy:0.6").look, atol=1e-6)


def test_nothing_asked_is_nothing_done() -> None:
    assert all(clip.expression is None for clip in Direct(Script())(iter(clip_of("Hello there."))))
    script = Script("happy")
    script.set("neutral")
    assert all(clip.expression is None for clip in Direct(script)(iter(silence(0.5))))


def test_a_track_is_followed_to_the_picture_and_adds_to_the_constant() -> None:
    track = Track.of(
        [{"time_s": 0, "expression": "browUp:0"}, {"time_s": 1, "expression": "browUp:1", "ease": "linear"}]
    )
    rows = looks(Direct(Script("mouthSmile:0.3", track))(iter(silence(1.2))))
    assert rows[:25, INNER] == pytest.approx(np.arange(25) / 25)
    assert np.allclose(rows[:, SMILE], 0.3)


def marked_run(text: str, spec: str, block: int, **options: Any) -> F32:
    marked = Marked.of(text)
    script = Script(spec)
    clips = heard([chunk.audio for chunk in marked.follow(said(marked.text), script)], block=block)
    return looks(Direct(script, **options)(clips))


TEXT = "[happy] Great news, we won the prize! [neutral] Now the details. It was a terrible day, and I am so sorry."


def test_marks_pass_smoothly_into_one_another() -> None:
    rows = marked_run(TEXT, "", 8)
    chunks = said(Marked.of(TEXT).text)
    change_s = chunks[1].phones[0].start_ms / 1000
    smile = rows[:, SMILE]
    before, after = int((change_s - 0.15) * 25), int((change_s + 0.6) * 25)
    assert np.allclose(smile[:before], parse("happy").look[SMILE], atol=1e-3) and np.allclose(
        smile[after:], 0, atol=0.01
    )
    assert np.all(np.diff(smile[before:after]) <= 1e-6) and np.abs(np.diff(smile)).max() < 0.1


def test_a_mark_silences_the_track_and_the_mood_without_a_jump() -> None:
    track = Track.of([{"time_s": 0, "expression": "browUp:1"}])
    marked = Marked.of("We won. [serious:0.5] Listen to me now.")
    script = Script("auto", track)
    rows = looks(Direct(script)(heard([c.audio for c in marked.follow(said(marked.text), script)])))
    assert rows[0, INNER] == 1 and np.abs(np.diff(rows[:, INDEX["browOuterUpLeft"]])).max() < 0.2
    assert rows[-1, INDEX["browDownLeft"]] > 0.2 and rows[-1, SMILE] < 0.02


@pytest.mark.parametrize("block", [3, 8])
def test_direction_does_not_depend_on_how_the_stream_is_cut(block: int) -> None:
    """Everything at once: marks, auto, life, a style."""
    style = Style(1.1, {"mouthSmile": 0.2}, Manner(20, (2, 1, 1), 1.4))
    one = marked_run(TEXT, "auto,browUp:0.1", 1, alive=True, seed=3, style=style)
    other = marked_run(TEXT, "auto,browUp:0.1", block, alive=True, seed=3, style=style)
    assert np.array_equal(one, other)


def test_the_sound_may_be_cut_anywhere_too() -> None:
    chunks = said("We won the prize! Now listen.")
    whole = Audio(np.concatenate([c.audio.pcm for c in chunks], axis=1), chunks[0].audio.rate_hz)
    bits = [Audio(whole.pcm[:, i : i + 997], whole.rate_hz, i) for i in range(0, whole.samples, 997)]
    one, other = (looks(Direct(Script("auto"), alive=True)(heard(audio))) for audio in ([whole], bits))
    assert np.array_equal(one, other)


def test_auto_follows_the_words_at_a_bounded_rate() -> None:
    rows = marked_run(Marked.of(TEXT).text, "auto", 8)
    chunks = said(Marked.of(TEXT).text)
    glad = slice(20, int(chunks[1].phones[0].start_ms / 40))
    sorry = slice(int(chunks[2].phones[0].start_ms / 40) + 20, None)
    smile, frown = rows[:, SMILE], rows[:, INDEX["mouthFrownLeft"]] + rows[:, INDEX["browDownLeft"]]
    assert smile[glad].mean() > 0.2 and smile[sorry].mean() < 0.02
    assert frown[sorry].mean() > frown[glad].mean() + 0.15
    # What neither accents nor blinks touch shows the bound.
    slow = [INDEX[n] for n in ("mouthSmileLeft", "mouthFrownLeft", "browDownLeft", "eyeSquintLeft", "mouthPressLeft")]
    assert np.abs(np.diff(rows[:, slow], axis=0)).max() * 25 <= FELT_PER_S + 1e-4


def test_the_live_spec_can_be_changed_from_another_thread() -> None:
    script = Script("happy")
    stage = Direct(script)(iter(silence(3.0)))
    first = [next(stage) for _ in range(10)]
    thread = threading.Thread(target=script.set, args=("sad:0.8",))
    thread.start()
    thread.join()
    rows = np.concatenate([looks(iter(first)), looks(stage)])
    assert np.allclose(rows[:10], parse("happy").look, atol=1e-6)
    assert np.allclose(rows[-1], parse("sad:0.8").look, atol=1e-3)
    steps = np.abs(np.diff(rows[:, [SMILE, INNER]], axis=0))
    assert steps.max() < 0.2 * np.ptp(rows[:, SMILE]), "no jump"
    with pytest.raises(UsageError):
        script.set("hapy")


def test_a_live_face_blinks_breathes_and_can_be_repeated() -> None:
    clips = silence(60.0)
    rows = looks(Direct(Script(), alive=True, seed=7)(iter(clips)))
    assert not rows[0, :BLENDSHAPES].any() and np.allclose(rows[0], 0, atol=1e-6), "it begins as it is"
    shut = rows[:, BLINK] > 0.9
    starts = np.flatnonzero(shut[1:] & ~shut[:-1])
    assert 12 <= len(starts) <= 24 and np.diff(starts).min() > 25, "each is seen shut, none follows at once"
    assert 0.5 < rows[:, YAW].std() < 2 and np.abs(rows[:, BLENDSHAPES:]).max() < 5
    assert np.abs(np.diff(rows[:, YAW])).max() < 0.3, "degrees a picture"
    assert rows[:, INNER].std() > 0.01
    assert np.array_equal(rows, looks(Direct(Script(), alive=True, seed=7)(iter(clips))))
    assert not np.array_equal(rows, looks(Direct(Script(), alive=True, seed=8)(iter(clips))))


def test_accents_and_blinks_follow_the_speech() -> None:
    text = "Never in all my life have I seen such an astonishing thing. And nobody knows why. It is a mystery to me."
    clips = clip_of(text)
    listener = Listener()
    impressions = [listener.hear(clip, 0) for clip in clips]
    stressed = [i for i, impression in enumerate(impressions) if impression.stress]
    seconds = len(clips) / 25
    assert 0.3 < len(stressed) / seconds < 1.5 and np.diff(stressed).min() * 0.04 >= 0.7
    assert sum(impression.phrase_end for impression in impressions) >= 2
    levels = np.array([np.sqrt(np.mean(clip.audio.pcm**2)) if clip.audio else 0 for clip in clips])
    near = [levels[i : i + 4].max() for i in stressed]
    assert np.mean(near) > 1.25 * levels[levels > 0.01].mean(), "they stand on loud syllables"
    brows = [float(np.ptp(looks(Direct(Script(spec))(iter(clips)))[:, INNER])) for spec in ("auto", "auto:0.4", "")]
    assert brows[0] > 0.1 and brows[1] == pytest.approx(0.4 * brows[0], rel=0.5) and brows[2] == 0
    runs = [looks(Direct(Script("auto"), seed=seed)(iter(clips)))[:, BLINK] > 0.9 for seed in range(6)]
    ends = [i for i, impression in enumerate(impressions) if impression.phrase_end]
    at_ends = sum(run[i : i + 8].any() for run in runs for i in ends) / (len(runs) * len(ends))
    assert 0.3 < at_ends < 0.9, "blinks gather at the ends of phrases"


def test_memory_is_constant() -> None:
    """Half a minute leaves nothing behind."""

    def grown(stage: Iterator[Clip], pictures: int) -> int:
        tracemalloc.start()
        for _ in range(pictures):
            next(stage)
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        return size

    clip = clip_of("Never in all my life.")[20]

    def endless() -> Iterator[Clip]:
        assert clip.audio is not None and clip.heard is not None
        for i in range(1 << 20):
            audio = replace(clip.audio, start=i * clip.audio.samples)
            rows = replace(clip.heard, start=clip.heard.start - clip.frames.start * 4 + i * 4)
            yield replace(clip, frames=replace(clip.frames, start=i), audio=audio, heard=rows)

    stage = Direct(Script("auto"), alive=True)(endless())
    for _ in range(200):
        next(stage)
    assert grown(stage, 500) < 16 << 10


# Words and voice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("We won! This is absolutely wonderful.", 0.7, 1),
        ("I am so sorry, it is a terrible loss.", -1, -0.7),
        ("The train leaves at nine from platform four.", -0.3, 0.3),
        ("This is not good at all.", -0.8, -0.2),
        ("It isn't bad.", 0.1, 0.8),
        ("", 0, 0),
    ],
)
def test_valence(text: str, low: float, high: float) -> None:
    assert low <= valence(text) <= high


@pytest.mark.parametrize("hz", [85.0, 120.0, 220.0, 330.0])
@pytest.mark.parametrize("rate_hz", [16_000, 44_100])
def test_the_pitch_of_a_voice(hz: float, rate_hz: int) -> None:
    t = np.arange(int(0.048 * rate_hz)) / rate_hz
    tone = sum(np.sin(2 * np.pi * hz * k * t) / k for k in range(1, 8)) * 0.1
    semitones = _pitch_st(np.asarray(tone, np.float32), rate_hz)
    assert semitones is not None and semitones == pytest.approx(12 * np.log2(hz / 100), abs=0.25)
    noise = np.random.default_rng(0).normal(0, 0.1, len(t)).astype(np.float32)
    assert _pitch_st(noise, rate_hz) is None


def voice_of(spoken: Sequence[tuple[float, float]]) -> Audio:
    """Pieces (speed-pitch factor of a real voice, gain), with the pauses between them."""
    pieces = []
    for factor, gain in spoken:
        for chunk in speaker().speak("The old man went down to the river and looked over the water.", pitch=factor):
            pieces.append(chunk.audio.pcm * np.float32(gain))
            rate_hz = chunk.audio.rate_hz
    return Audio(np.concatenate(pieces, axis=1), rate_hz)


def test_a_louder_and_higher_voice_is_livelier() -> None:
    audio = voice_of([(1.0, 0.4), (1.0, 0.4), (1.35, 1.0), (0.9, 0.25)])
    listener = Listener()
    arousal = np.array([listener.hear(clip, 0).arousal for clip in heard([audio], block=1)])
    part = len(arousal) // 4
    usual, lively, flat = (arousal[i * part + 20 : (i + 1) * part].mean() for i in (1, 2, 3))
    assert lively > usual + 0.3 and flat < usual - 0.2
    assert np.abs(arousal).max() <= 1


def test_silence_is_without_mood() -> None:
    listener = Listener()
    impressions = [listener.hear(clip, 0) for clip in silence(1.0)]
    assert set(impressions) == {Impression(0.0, 0.0, False, False)}


# Recorded faces ------------------------------------------------------------------------------------------------------


def face_of(shapes: dict[str, float], points: F32 | None = None) -> Face:
    values = np.zeros(BLENDSHAPES, np.float32)
    for name, value in shapes.items():
        values[INDEX[name]] = value
    plain = np.zeros((POINTS, 3), np.float32)
    plain[:468] = canonical() * 100
    return Face(plain if points is None else points, values, 1.0)


def test_an_expression_is_learned_kept_shared_and_removed(tmp_path: Path) -> None:
    neutral = [face_of({"mouthSmileLeft": 0.1, "browDownLeft": 0.3, "eyeLookInLeft": 0.4})]
    smiling = [face_of({"mouthSmileLeft": v, "browDownLeft": 0.3}) for v in (0.7, 0.8, 0.0)]
    made = learn_custom("my-smile", [None, *smiling], neutral)
    assert made.controls == {"mouthSmileLeft": pytest.approx(0.6)}
    assert learn_custom("other", smiling).controls["browDownLeft"] == pytest.approx(0.26), "against usual faces"
    store = ExpressionStore(tmp_path)
    assert store.list() == () and store.looks() == {}
    path = store.add(made)
    assert path.is_relative_to(tmp_path / "expressions") and store.get("my-smile") == made
    assert parse("my-smile:0.5", store.looks()).look[SMILE] == pytest.approx(0.3)
    elsewhere = ExpressionStore(tmp_path / "elsewhere")
    assert elsewhere.load(path, "hers").controls == made.controls
    assert [c.name for c in elsewhere.list()] == ["hers"]
    store.remove("my-smile")
    with pytest.raises(UsageError, match="my-smile"):
        store.get("my-smile")
    with pytest.raises(UsageError, match="my-smile"):
        parse("my-smile")


def test_a_recording_that_cannot_be_used(tmp_path: Path) -> None:
    face = face_of({"mouthSmileLeft": 0.5})
    for name in ("happy", "auto", "mouthSmile", "../x", "", "A b"):
        with pytest.raises(UsageError):
            learn_custom(name, [face])
    with pytest.raises(NoFaceError, match="neutral"):
        learn_custom("mine", [face], [None])
    with pytest.raises(InputError, match="neutral"):
        learn_custom("mine", [face], [face])
    good = Custom("mine", {"jawLeft": 0.5}).as_dict()
    for document in (
        [],
        {},
        good | {"version": 2},
        good | {"controls": {}},
        good | {"controls": {"jawLeft": 2}},
        good | {"controls": {"nose": 0.5}},
        good | {"controls": {"jawLeft": True}},
        good | {"controls": {"jawLeft": HUGE}},
        good | {"controls": {"jawLeft": math.nan}},
    ):
        with pytest.raises(InputError):
            Custom.of(document, "x.json")
    store = ExpressionStore(tmp_path)
    store.add(Custom("mine", {"jawLeft": 0.5}))
    (tmp_path / "expressions" / "broken.json").write_text("{}")
    (tmp_path / "expressions" / "huge.json").write_text(json.dumps(good | {"controls": {"jawLeft": HUGE}}))
    os.mkfifo(tmp_path / "expressions" / "pipe.json")
    assert [c.name for c in store.list()] == ["mine"], "one broken file takes nothing from the others"
    with pytest.raises(InputError):
        store.get("broken")
    with pytest.raises(UsageError):
        store.get("../../etc/passwd")


def test_a_style_of_odd_numbers_is_damaged() -> None:
    good = Style(1.2, {"mouthSmile": 0.2}, Manner()).as_dict()
    for odd in (HUGE, -HUGE, math.inf, math.nan, [1], "1", True, None):
        for document in (good | {"amplitude": odd}, good | {"rest": {"mouthSmile": odd}}):
            with pytest.raises(InputError, match=r"damaged: (amplitude|mouthSmile) must be a number"):
                Style.of(document)


def nodding(seconds: float, gap: float, yaw_deg: float, blinks: int, smile: float) -> Iterator[Face | None]:
    """A speaker with so much of everything."""
    count = round(seconds * 25)
    base = np.zeros((POINTS, 3), np.float32)
    base[:468] = canonical()
    for i in range(count):
        points = base.copy()
        points[INNER_LOWER, 1] += gap * (1 + np.sin(i * 0.9)) + 0.02
        yaw = np.radians(yaw_deg) * np.sin(i * 0.11) * 1.414
        turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]], np.float32)
        closed = 0.7 if any(abs(i - (k + 0.5) * count / max(blinks, 1)) < 3 for k in range(blinks)) else 0.1
        shapes = {"mouthSmileLeft": smile, "mouthSmileRight": smile, "eyeBlinkLeft": closed, "eyeBlinkRight": closed}
        yield face_of(shapes, (points @ turn.T) * 100)


def test_a_style_is_learned_from_motion(tmp_path: Path) -> None:
    wide = Style.learn(nodding(30, 0.12, 2.0, 15, 0.5), RATE)
    narrow = Style.learn(nodding(30, 0.04, 0.5, 3, 0.0), RATE)
    assert wide.amplitude > 1.1 > 0.75 > narrow.amplitude
    assert wide.manner.blinks_per_min == pytest.approx(30) and narrow.manner.blinks_per_min == pytest.approx(6)
    assert wide.manner.sway_deg[0] == pytest.approx(2.0, rel=0.1) and narrow.manner.sway_deg[0] == pytest.approx(
        0.5, rel=0.1
    )
    assert wide.rest["mouthSmile"] == pytest.approx(0.45) and "mouthSmile" not in narrow.rest
    path = tmp_path / "style.json"
    wide.write(path)
    assert Style.read(path) == wide
    with pytest.raises(NoFaceError, match="4 s"):
        Style.learn(nodding(2, 0.1, 1, 0, 0), RATE)
    good = wide.as_dict()
    for document in (
        [],
        good | {"version": 9},
        good | {"amplitude": 9},
        good | {"rest": {"happy": 0.1}},
        good | {"brows": None},
    ):
        with pytest.raises(InputError):
            Style.of(document)


def test_the_sway_of_a_face_is_the_same_upside_down() -> None:
    def tilting(by_deg: float) -> Iterator[Face | None]:
        for i, face in enumerate(nodding(10, 0.1, 1.0, 3, 0.0)):
            assert face is not None
            roll = np.radians(by_deg + np.sin(i * 0.2) * 1.414)
            turn = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
            yield replace(face, points_px=(face.points_px @ turn.T).astype(np.float32))

    upright, upside_down = (Style.learn(tilting(by_deg), RATE).manner for by_deg in (0.0, 180.0))
    assert upright.sway_deg[2] == pytest.approx(1.0, rel=0.1)
    assert upside_down.sway_deg == pytest.approx(upright.sway_deg, abs=0.01)


def test_a_style_changes_the_direction() -> None:
    clips = silence(60.0)
    lively = Style(1.0, {"mouthSmile": 0.3}, Manner(30, (2.5, 1, 1), 2.0))
    quiet = Style(1.0, {}, Manner(0, (0.2, 0.1, 0.1), 0.2))
    one, other = (looks(Direct(Script(), alive=True, style=style)(iter(clips))) for style in (lively, quiet))
    assert np.allclose(one[:, SMILE], 0.3) and not other[:, SMILE].any()
    assert one[:, YAW].std() > 5 * other[:, YAW].std() and one[:, INNER].std() > 3 * other[:, INNER].std()
    assert (one[:, BLINK] > 0.9).any() and not (other[:, BLINK] > 0.9).any()
    still = looks(Direct(Script(), style=lively)(iter(clips[:100])))
    assert np.allclose(still, look_of({"mouthSmile": 0.3})), "a video keeps its own blinks and head"


def test_the_eyes_of_a_video_are_left_to_blink_by_themselves() -> None:
    """Where the source shuts its eyes often enough nothing is added."""
    clips = []
    for i, clip in enumerate(silence(20.0)):
        face = face_of({"eyeBlinkLeft": 0.8, "eyeBlinkRight": 0.8} if i % 25 > 20 else {})
        track = FaceTrack((face,), (FaceState.OK,), np.ones(1, np.float32), (0,))
        clips.append(Clip(clip.frames, track, clip.audio, clip.heard))
    assert not looks(Direct(Script("auto"))(iter(clips)))[:, BLINK].any()


def test_narrow_eyes_blink_too() -> None:
    face = face_of({"eyeBlinkLeft": 0.8, "eyeBlinkRight": 0.8})
    track = FaceTrack((face,), (FaceState.OK,), np.ones(1, np.float32), (0,))
    clips = (replace(clip, track=track) for clip in silence(20.0))
    assert (looks(Direct(Script(), alive=True)(clips))[:, BLINK] > 0.9).any()


def test_an_expression_checks_its_shape() -> None:
    with pytest.raises(ValueError, match="expression"):
        Expression(np.zeros((2, 52), np.float32), np.zeros((3, 6), np.float32))


@dataclass(frozen=True)
class _Ran:
    code: int
    out: str
    err: str


def test_the_commands_keep_list_and_remove(cli: Callable[..., _Ran], portrait: Path, tmp_path: Path) -> None:
    ran = cli("expression", "learn", portrait, "--name", "sample-smile", "--json")
    assert ran.code == 0, ran.err
    made = json.loads(ran.out)
    assert made["controls"]["mouthSmileLeft"] > 0.4, "the sample portrait smiles"
    listed = json.loads(cli("expression", "list", "--json").out)["expressions"]
    assert {"name": "sample-smile", "kind": "custom"}.items() <= next(
        e for e in listed if e["kind"] == "custom"
    ).items()
    shown = cli("expression", "show", "sample-smile")
    (tmp_path / "shared.json").write_text(shown.out)
    assert cli("expression", "import", tmp_path / "shared.json", "--name", "hers").code == 0
    assert cli("expression", "remove", "sample-smile").code == 0
    assert cli("expression", "show", "sample-smile").code == 2
    assert cli("expression", "show", "hers").code == 0
    still = cli("style", "learn", portrait, "-o", tmp_path / "style.json")
    assert still.code == 3 and "still" in still.err
