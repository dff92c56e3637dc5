"""Articulation: the criteria on lips of known shape, and one sentence spoken by the sample portrait."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from beavervision.errors import InputError, UsageError
from beavervision.evaluate import articulation as module
from beavervision.evaluate.articulation import ArticulationReport, articulation, format_table, judged
from beavervision.evaluate.tracks import LipTrack, lip_track
from beavervision.models.face import FaceNets
from beavervision.pipeline import Pipeline
from beavervision.speech import Phone
from tests.conftest import Ran
from tests.faces import empty, make_video, portrait

RATE = Fraction(25)
GAPS = {"ɑ": 0.3, "m": 0.0, "f": 0.03, "u": 0.1, "i": 0.1, "s": 0.08}
WIDTHS = {"u": 0.7, "ɑ": 1.0, "i": 1.1}


def lips(gap: np.ndarray, width: np.ndarray) -> LipTrack:
    """Lips of these gaps and widths: all that the other points do is to stay."""
    points = np.zeros((len(gap), 40, 2), np.float32)
    points[:, 0, 0], points[:, 10, 0] = -width / 2, width / 2
    points[:, 20:][:, 1:10, 1] = -gap[:, None] / 2
    points[:, 20:][:, 11:, 1] = gap[:, None] / 2
    return LipTrack(points, RATE)


def words(sounds: str = "mɑmifɑsuɑmɑiufimɑsiɑfuɑm") -> list[Phone]:
    """Each phone lasts 120 ms; a pause of 1 s after every twelve."""
    return [
        Phone(ipa, 200 + 120 * i + 1000 * (i // 12), 320 + 120 * i + 1000 * (i // 12)) for i, ipa in enumerate(sounds)
    ]


def spoken(phones: list[Phone], late_ms: float = 0) -> tuple[np.ndarray, np.ndarray]:
    """Gap and width of a mouth that does what the phones need."""
    t = np.arange(5200 // 40) * 40 - late_ms
    gap, width = np.zeros(len(t)), np.ones(len(t))
    for phone in phones:
        inside = (t >= phone.start_ms) & (t < phone.end_ms)
        gap[inside], width[inside] = GAPS[phone.ipa], WIDTHS.get(phone.ipa, 0.95)
    return gap, width


def shares(report: ArticulationReport) -> dict[str, float | None]:
    return {name: share.share for name, share in report.shares.items()}


def test_a_mouth_that_does_it_all_gets_it_all() -> None:
    phones = words()
    report = judged(lips(*spoken(phones)), phones)
    assert shares(report) == dict.fromkeys(("closed", "lip_teeth", "rounded", "open", "parted", "still"), 1.0)
    counted = {name: share.of for name, share in report.shares.items()}
    assert counted == {"closed": 5, "lip_teeth": 3, "rounded": 3, "open": 7, "parted": 14, "still": 2}
    assert report.stillness == 0
    assert report.open_range == pytest.approx(0.3)
    assert (report.seconds, report.seen) == (5.2, 1.0)
    assert all(share.chance is not None and share.chance < 1 for share in list(report.shares.values())[:-1])
    json.dumps(report.as_dict(), allow_nan=False)
    assert format_table(report) is not None


def test_a_mouth_that_hardly_opens_is_closed_but_not_parted() -> None:
    phones = words()
    gap, width = spoken(phones)
    gap[gap < 0.25] = 0.0  # opens at ɑ only
    report = judged(lips(gap, width), phones)
    assert report.closed.share == report.open.share == 1
    assert report.parted.share == pytest.approx(7 / 14)
    assert report.closed.chance is not None and report.closed.chance > 0.9


def test_a_late_mouth_loses_to_one_in_time() -> None:
    phones = words("sɑsimɑsuɑsimɑsumisɑsimɑs")
    in_time, late = (judged(lips(*spoken(phones, late_ms=late_ms)), phones) for late_ms in (0, 240))
    assert in_time.closed.share == in_time.open.share == 1
    assert in_time.closed.chance is not None and in_time.closed.chance < 0.7
    assert late.closed.share == 0
    assert late.open.share is not None and late.open.share < 0.8


def test_motion_in_a_pause_is_seen_and_its_edges_do_not_count() -> None:
    phones = words()
    gap, width = spoken(phones)
    pause = slice(1640 // 40, 2640 // 40)
    gap[pause.start : pause.start + 4] = 0.2  # the mouth may take 0.2 s to close
    assert judged(lips(gap, width), phones).still.right == 2
    gap[pause.start + 5 : pause.stop - 5 : 2] = 0.1
    report = judged(lips(gap, width), phones)
    assert (report.still.right, report.still.of) == (1, 2)
    assert report.stillness is not None and report.stillness > 0.1


def test_phones_at_which_the_lips_are_hidden_are_left_out() -> None:
    phones = words()
    track = lips(*spoken(phones))
    track.points[: 440 // 40] = np.nan  # until the first m and ɑ are over
    report = judged(track, phones)
    assert (report.closed.right, report.closed.of) == (4, 4)
    assert report.open.of == 6
    assert report.seen == pytest.approx(1 - 11 / 130)
    track.points[:] = np.nan
    with pytest.raises(ValueError, match="lips are seen"):
        judged(track, phones)


def test_pictures_without_a_face_are_gaps_of_the_track(tmp_path: Path) -> None:
    pictures = [portrait()] * 6 + [empty()] * 3 + [portrait()] * 3
    track = lip_track(make_video(tmp_path / "some.mp4", pictures, RATE), FaceNets())
    assert track.points.shape == (12, 40, 2) and track.rate == RATE
    assert np.isfinite(track.gap).tolist() == [True] * 6 + [False] * 3 + [True] * 3
    assert track.seen == 0.75
    assert 0.5 < track.width[0] < 1.5 and 0 < track.gap[0] < 0.5


def test_the_portrait_speaks_and_is_measured(
    cli: Callable[..., Ran], portrait: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Phone] = []

    def noting(track: LipTrack, phones: list[Phone]) -> ArticulationReport:
        heard.extend(phones)
        assert (
            abs(len(track) * 40 - phones[-1].end_ms - 1000) < 500
        )  # both clocks have the silence that was put between
        return judged(track, phones)

    monkeypatch.setattr(module, "judged", noting)
    monkeypatch.setattr(module, "articulation", partial(articulation, sentences=("Pam!", "Bob may.")))
    ran = cli("evaluate", "articulation", portrait, "--json", "--quiet")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert "".join(p.ipa for p in heard) == "pæmbɑbmeɪ"
    assert heard[3].start_ms - heard[2].end_ms > 900
    assert report["closed"]["of"] == 5 and report["still"]["of"] == 2 and report["seen"] == 1
    assert report["open"]["of"] == 2 and report["parted"]["of"] == 3
    assert report["model"]["name"] == "beaver"


def test_the_lips_are_led_by_the_phones_of_a_voice_unless_they_are_not_told(portrait: Path) -> None:
    pipeline = Pipeline()
    sentences = ("Five vivid leaves of ivy.", "Pam, would you buy a map?")
    told, by_ear = (articulation(pipeline, portrait, sentences=sentences, by_ear=ear) for ear in (False, True))
    for kind in ("closed", "lip_teeth", "rounded"):
        share, heard = getattr(told, kind), getattr(by_ear, kind)
        assert share.of == heard.of >= 3
        assert share.right >= max(heard.right, 0.8 * share.of)
    assert told.lip_teeth.right > by_ear.lip_teeth.right, "the f of five comes after silence"


def test_nothing_to_say_and_no_face_are_told(tmp_path: Path) -> None:
    pipeline = Pipeline()
    with pytest.raises(UsageError, match="at least one sentence"):
        articulation(pipeline, "face.png", sentences=())
    video = make_video(tmp_path / "empty.mp4", [empty()] * 5, RATE)
    with pytest.raises(InputError, match="no face"):
        articulation(pipeline, video, sentences=("Yes.",))
