"""What the lips must do at a speech sound, and motion that is led there; the times of phones as JSON."""

from __future__ import annotations

import json
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beavervision.errors import InputError, UsageError
from beavervision.media import F32, Phone
from beavervision.models.basis import MotionBasis
from beavervision.models.beaver import load
from beavervision.models.visemes import Lead, Lips, lips_at, speaking
from beavervision.speech import phones_of, read_phones

RATE = Fraction(25)


@cache
def basis() -> MotionBasis:
    return load().basis


def opened(gap: float, width: float, count: int = 50) -> F32:
    """Motion of pictures with the lips so far apart and so much wider than at rest."""
    rows = np.stack([basis().opening, basis().width])
    return np.tile(np.linalg.pinv(rows) @ [gap, width], (count, 1)).astype(np.float32)


def shown(motion: F32) -> tuple[F32, F32]:
    """The opening and the width of each picture."""
    return motion @ basis().opening, motion @ basis().width


def led(phones: list[Phone], motion: F32, start: int = 0, rate: Fraction = RATE) -> F32:
    return Lead(basis())(motion, start, rate, phones)


def said(ipa: str, start_ms: int = 1000, end_ms: int = 1080) -> list[Phone]:
    """A sound in the midst of vowels."""
    return [Phone("ɛ", start_ms - 100, start_ms), Phone(ipa, start_ms, end_ms), Phone("ɛ", end_ms, end_ms + 100)]


@pytest.mark.parametrize(
    ("ipa", "lips"),
    [
        ("p", Lips.CLOSED), ("bː", Lips.CLOSED), ("m", Lips.CLOSED), ("pʰ", Lips.CLOSED),
        ("f", Lips.LIP_TEETH), ("v", Lips.LIP_TEETH), ("ʋ", Lips.LIP_TEETH),
        ("w", Lips.ROUNDED), ("uː", Lips.ROUNDED), ("oʊ", Lips.ROUNDED), ("əʊ", Lips.ROUNDED), ("y", Lips.ROUNDED),
        ("ə", None), ("t", None), ("aʊ", None), ("", None),
    ],
)  # fmt: skip
def test_what_a_sound_asks_of_the_lips(ipa: str, lips: Lips | None) -> None:
    assert lips_at(ipa) is lips


@pytest.mark.parametrize("ipa", ["p", "m", "f"])
@pytest.mark.parametrize("rate", [Fraction(12), Fraction(25), Fraction(60)])
@pytest.mark.parametrize("end_ms", [1020, 1080])
def test_open_lips_meet_at_a_sound_that_wants_them_closed(ipa: str, rate: Fraction, end_ms: int) -> None:
    motion = opened(0.2, 0.03, int(2 * rate))
    gap, width = shown(led(said(ipa, 1000, end_ms), motion, rate=rate))
    times_ms = np.arange(len(motion)) * float(1000 / rate)
    around = (times_ms > 950 - float(500 / rate)) & (times_ms < end_ms + float(500 / rate))
    assert gap[around].min() < (0.0 if ipa in "pm" else 0.021)
    assert np.abs(width - 0.03).max() < 1e-5, "only the opening changes"
    far = (times_ms < 1000 - 200) | (times_ms > end_ms + 100)
    assert np.abs(gap[far] - 0.2).max() < 1e-5
    assert np.abs(np.diff(gap)).max() < 2.6 * float(1 / rate), "no faster than lips are"


def test_all_of_the_lips_meet_and_not_their_middle_alone() -> None:
    motion = led(said("m", 1000, 1200), opened(0.2, 0.0))
    assert (motion[26:28] @ basis().gap).max() < 0.002


def test_wide_lips_are_drawn_together_at_a_rounded_sound() -> None:
    gap, width = shown(led(said("u", 1000, 1120), opened(0.1, 0.06)))
    assert width[25:27].max() < -0.049 and np.abs(gap - 0.1).max() < 1e-5
    assert width[:20].min() > 0.059


def test_motion_that_does_what_is_asked_stays_as_it_is() -> None:
    motion = opened(-0.01, -0.06)
    for phones in (said("p"), said("f"), said("w"), said("t")):
        assert np.array_equal(led(phones, motion), motion)
    wide = opened(0.2, 0.1)
    assert led([], wide) is wide
    assert np.array_equal(led(said("t"), wide), wide)


def test_after_silence_the_lips_wait_for_their_sound() -> None:
    first = [Phone("p", 1000, 1080), Phone("æ", 1080, 1200)]
    gap, _ = shown(led(first, opened(0.15, 0.0)))
    assert gap[24:26].max() < 0.0
    assert gap[20] == pytest.approx(0.15)
    assert np.abs(np.diff(gap)).max() < 2.7 / 25
    within, _ = shown(led([Phone("ɛ", 800, 900), *first], opened(0.15, 0.0)))
    assert within[23] > gap[23] + 0.05 and within[24] < 0.0


def test_the_same_however_the_pictures_are_cut() -> None:
    phones = [*said("p", 300, 350), *said("w", 600, 700), *said("v", 900, 950)]
    motion = opened(0.2, 0.08)
    motion *= np.linspace(0.5, 1.5, len(motion), dtype=np.float32)[:, None]
    whole = led(phones, motion)
    pieces = []
    for start in range(0, len(motion), 3):
        # What Hear tells of: nothing that begins later than the look-ahead, nothing that is long over.
        now_ms = start * 40
        known = [p for p in phones if p.start_ms < now_ms + 3 * 40 + 110 and p.end_ms > now_ms - 300]
        pieces.append(led(known, motion[start : start + 3], start))
    assert np.abs(np.concatenate(pieces) - whole).max() < 1e-6


def test_who_has_phones_speaks_shortly_before_them_and_while_they_last() -> None:
    phones = [Phone("h", 1000, 1100), Phone("a", 1100, 1400), Phone("t", 1800, 1900)]
    pictures = np.flatnonzero(speaking(phones, 10, RATE, 60)) + 10
    assert pictures.tolist() == [*range(22, 35), *range(42, 48)]
    assert not speaking([], 10, RATE, 60).any()


def test_phones_from_json(tmp_path: Path) -> None:
    rows = [{"ipa": "h", "start_ms": 0, "end_ms": 60.4}, {"ipa": "oʊ", "start_ms": 60, "end_ms": 200}]
    wanted = (Phone("h", 0, 60), Phone("oʊ", 60, 200))
    assert phones_of(rows) == phones_of({"phones": rows, "voice": "x"}) == phones_of(wanted) == wanted
    path = tmp_path / "phones.json"
    path.write_text(json.dumps({"phones": rows}), encoding="utf-8")
    assert read_phones(path) == wanted
    with pytest.raises(InputError, match="cannot be read"):
        read_phones(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("document", "told"),
    [
        ("h", "a list"),
        ({"phone": []}, "a list"),
        ([{"ipa": "h"}], "phone 1: .*start_ms"),
        ([{"ipa": "", "start_ms": 0, "end_ms": 1}], "phone 1: ipa"),
        ([{"ipa": "h", "start_ms": -1, "end_ms": 1}], "phone 1: .*from 0"),
        ([{"ipa": "h", "start_ms": float("nan"), "end_ms": 1}], "phone 1: .*from 0"),
        ([{"ipa": "h", "start_ms": True, "end_ms": 2}], "phone 1: .*from 0"),
        ([{"ipa": "h", "start_ms": 5, "end_ms": 5}], "phone 1: it ends"),
        ([{"ipa": "h", "start_ms": 0, "end_ms": 50}, {"ipa": "i", "start_ms": 40, "end_ms": 90}], "phone 2: it starts"),
    ],
)
def test_what_is_no_list_of_phones_is_told(document: Any, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        phones_of(document, "some.json")
