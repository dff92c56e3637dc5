"""The measures of the expression stage, on a small folder of talkers made of the sample portrait."""

from __future__ import annotations

from fractions import Fraction
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from beavervision.errors import InputError, UsageError
from beavervision.evaluate.expression import ASKED, ExpressionReport, evaluate_expression, format_table
from tests.faces import empty, make_video, moved

HEAD = "file\tsplit\tperson\tseconds\tsync_lag_s\n"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> ExpressionReport:
    folder = tmp_path_factory.mktemp("talkers")
    make_video(folder / "one_01.mp4", [moved(dx=0.4 * (i % 3), zoom=1.5) for i in range(6)], Fraction(25))
    make_video(folder / "none_01.mp4", [empty() for _ in range(9)], Fraction(25))
    lines = ["none_01.mp4\tvalidate\tnone\t3\t0", "one_01.mp4\tvalidate\tone\t3\t0", "one_02.mp4\tvalidate\tone\t3\t0"]
    (folder / "index.tsv").write_text(HEAD + "\n".join(lines) + "\n", "utf-8")
    return evaluate_expression(folder, people=2, talking=1)


def test_controls_are_seen_again(report: ExpressionReport) -> None:
    assert set(report.rises) == set(ASKED)
    assert report.rises["blink"].rise > 0.1
    assert report.rises["brow raise"].rise > 0.2
    assert report.same


def test_nothing_beyond_the_face_changes(report: ExpressionReport) -> None:
    assert report.outside == 0


def test_presets_keep_the_mouth_talking(report: ExpressionReport) -> None:
    assert "happy" in report.speech
    assert "neutral" not in report.speech
    assert report.ms["neutral"] < 0.5 < report.ms["happy"]


def test_presets_keep_the_lips_of_phones_closed(report: ExpressionReport) -> None:
    happy = report.phones["happy"]
    assert happy.of == 28, "p, b and m of the two sentences"
    assert happy.closed_plain >= 14
    assert happy.kept > 0.95
    assert happy.opening_r > 0.9


def test_people_without_a_face_are_left_out(report: ExpressionReport) -> None:
    assert report.people == ("one_01.mp4",)
    assert list(report.left_out) == ["none_01.mp4"]


def test_it_can_be_read(report: ExpressionReport) -> None:
    out = StringIO()
    Console(file=out, width=160).print(format_table(report))
    assert "blink" in out.getvalue()
    assert report.as_dict()["rises"]["brow raise"]["reached"] == 1


def test_what_cannot_be_measured_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        evaluate_expression(tmp_path, people=0)
    make_video(tmp_path / "none_01.mp4", [empty() for _ in range(9)], Fraction(25))
    (tmp_path / "index.tsv").write_text(HEAD + "none_01.mp4\tvalidate\tnone\t3\t0\n", "utf-8")
    with pytest.raises(InputError, match="frontal"):
        evaluate_expression(tmp_path)
