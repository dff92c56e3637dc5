"""Reading subtitles."""

from __future__ import annotations

from pathlib import Path

import pytest

from beavervision.errors import InputError, TextError
from beavervision.speech import Cue, parse_srt

SRT = """1
00:00:01,000 --> 00:00:02,500
Hello <i>there</i>,
my friend.

2
00:00:03,000 --> 00:00:04,000
{\\an8}Good &amp; bye
"""
CUES = (Cue(1, 1000, 2500, "Hello there, my friend."), Cue(2, 3000, 4000, "Good & bye"))


@pytest.mark.parametrize(
    "text",
    [
        SRT,
        "\ufeff" + SRT,
        SRT.replace("\n", "\r\n"),
        SRT.replace(",000", ".000").replace(",500", ".5"),
        SRT.replace("1\n00", "00", 1).replace("\n2\n", "\n"),  # no numbers
        SRT.replace("friend.\n\n2", "friend.\n2"),  # no blank line
        "WEBVTT - title\n\nNOTE a\nnote\n\nSTYLE\n::cue { color: red }\n\n"
        + SRT.replace(",", ".")
        .replace("</i>.", "</i>,")
        .replace("00:00:0", "00:0")
        .replace("4.000", "4.000 line:0 align:start"),
        "WEBVTT\n\nintro\n" + SRT.replace("\n2\n", "\nsecond part\n").removeprefix("1\n"),
    ],
)
def test_variants_give_the_same_cues(text: str) -> None:
    assert parse_srt(text) == CUES


def test_file_in_utf8_or_utf16(tmp_path: Path) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        path = tmp_path / f"{encoding}.srt"
        path.write_text(SRT, encoding=encoding)
        assert parse_srt(path) == CUES


def test_cues_come_by_time_and_without_empty_ones() -> None:
    text = "1\n00:00:05,000 --> 00:00:06,000\nLater 42\n\n"
    text += "2\n00:00:01,000 --> 00:00:02,000\n<b></b>\n\n3\n0:03.25 --> 0:04\n7"
    assert parse_srt(text) == (Cue(2, 3250, 4000, "7"), Cue(1, 5000, 6000, "Later 42"))


def test_long_lines_are_looked_at_once() -> None:
    first, _ = parse_srt(SRT.replace("Hello <i>there</i>,", "1:" * 20_000 + " and --> so on"))
    assert len(first.text) > 40_000


@pytest.mark.parametrize(
    "said", ["-->", "Go from A --> B.", "Step 1 --> step 2", "<i>x</i> --> y: 3", "So --> 10:30 it is"]
)
def test_an_arrow_may_be_said(said: str) -> None:
    spoken = said.replace("<i>", "").replace("</i>", "")
    for text in (said, f"Now:\n{said}", f"{said}\n{said}"):
        first, second = parse_srt(SRT.replace("Hello <i>there</i>,\nmy friend.", text))
        assert (first.start_ms, first.text) == (1000, text.replace("\n", " ").replace(said, spoken))
        assert second == CUES[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no cue"),
        ("WEBVTT\n", "no cue"),
        ("\n\nJust some prose.\n", "line 3: 'Just some prose.' is no subtitle"),
        (SRT.replace("00:00:03,000 -->", "00:00:x3 -->"), "line 7: .* is no time"),
        (SRT.replace("00:00:03,000 -->", "3 s -->"), "line 7: .* is no time"),
        (SRT.replace("\n\n2\n00:00:03,000 -->", "\n00:00;03 -->"), "line 5: .* is no time"),
        (SRT.replace("\n\n2\n00:00:03,000 -->", "\n\n3s -->"), "line 6: .* is no time"),
        (SRT.replace("00:00:03,000 -->", "00:00:05,000 -->"), "line 7: .*ends .* before it starts"),
        ("1\n00:00:01,000 --> 00:00:02,000\n\n", "no cue"),
    ],
)
def test_damage_is_told_with_its_line(text: str, message: str) -> None:
    with pytest.raises(TextError, match=message):
        parse_srt(text)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        parse_srt(tmp_path / "absent.srt")
    path = tmp_path / "latin1.srt"
    path.write_bytes("1\n00:00:01,000 --> 00:00:02,000\ncafé\n".encode("latin-1"))
    with pytest.raises(TextError, match=r"line 3: .*UTF-8"):
        parse_srt(path)
