"""Subtitles: SubRip and WebVTT to cues."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path

from beavervision.errors import TextError
from beavervision.files import unreadable

_TIME = r"(?:(\d{1,3}):)?(\d{1,2}):(\d{2})(?:[,.](\d{1,3}))?"
_TIMES = re.compile(rf"\s*{_TIME}\s*-->\s*{_TIME}(?:\s.*)?$")
_TAG = re.compile(r"<[^<>\n]*>|\{\\[^{}\n]*\}")
_SKIPPED_BLOCKS = ("NOTE", "STYLE", "REGION")  # of WebVTT


@dataclass(frozen=True, slots=True)
class Cue:
    """A subtitle: its number in the file (from 1), its times, and its text as one line without tags."""

    index: int
    start_ms: int
    end_ms: int
    text: str

    def __post_init__(self) -> None:
        if not 0 <= self.start_ms < self.end_ms:
            raise ValueError(f"a cue needs 0 <= start < end: {self}")


def parse_srt(source: str | Path) -> tuple[Cue, ...]:
    """The cues of a subtitle text (`str`) or file (`Path`), by start time. Cues without text are left out.

    Raises:
        InputError: the file cannot be read.
        TextError: it holds no cue or a damaged one; the message has the line number.
    """
    text, name = (_read(source), str(source)) if isinstance(source, Path) else (source, "subtitles")
    lines = text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    vtt = lines[0].startswith("WEBVTT")
    cues: list[Cue] = []
    starts = [i for i, line in enumerate(lines) if "-->" in line and _is_of_times(lines, i)]
    for n, i in enumerate(starts):
        if vtt and _block_header(lines, i).startswith(_SKIPPED_BLOCKS):
            continue
        where = f"{name}, line {i + 1}"
        match = _TIMES.match(lines[i])
        if not match:
            raise TextError(f"{where}: {lines[i].strip()!r} is no time. Write it as 00:00:01,000 --> 00:00:02,500.")
        start_ms, end_ms = _ms(match.groups()[:4]), _ms(match.groups()[4:])
        if end_ms <= start_ms:
            raise TextError(f"{where}: the cue ends ({end_ms} ms) before it starts ({start_ms} ms). Correct its times.")
        followed = n + 1 < len(starts)
        body = lines[i + 1 : starts[n + 1] if followed else len(lines)]
        if said := _clean(_body(body, followed, vtt)):
            cues.append(Cue(len(cues) + 1, start_ms, end_ms, said))
    if not starts and text.strip() not in ("", "WEBVTT"):
        first = next(i for i, line in enumerate(lines) if line.strip())
        raise TextError(
            f"{name}, line {first + 1}: {lines[first].strip()[:40]!r} is no subtitle. "
            "Expected a number, a line of times (00:00:01,000 --> 00:00:02,500), then text."
        )
    if not cues:
        raise TextError(f"{name} holds no cue with text. Give a SubRip (.srt) or WebVTT (.vtt) file with at least one.")
    return tuple(sorted(cues, key=lambda cue: cue.start_ms))


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise TextError(f"{path}, line {line}: the text is not UTF-8. Convert the file to UTF-8.") from error


def _ms(parts: tuple[str | None, ...]) -> int:
    hours, minutes, seconds, fraction = parts
    return (
        (int(hours or 0) * 60 + int(minutes or 0)) * 60000
        + int(seconds or 0) * 1000
        + int((fraction or "0").ljust(3, "0"))
    )


def _is_of_times(lines: list[str], i: int) -> bool:
    """Whether line `i`, which has an arrow, is meant to be a cue's times, if damaged ones, and not its text."""
    words = lines[i].partition("-->")[0].split()
    if len(words) == 1 and _has_digit(words[0].rpartition(":")[0]):
        return True
    before = lines[i - 1].strip() if i else ""
    return (not before or before.isdigit()) and _has_digit(lines[i])


def _has_digit(text: str) -> bool:
    return any(letter.isdigit() for letter in text)


def _block_header(lines: list[str], i: int) -> str:
    """The first line of the block that holds line `i`."""
    while i > 0 and lines[i - 1].strip():
        i -= 1
    return lines[i]


def _body(lines: list[str], followed: bool, vtt: bool) -> list[str]:
    """The text lines of a cue: without the name of the cue that follows, and without comments."""
    lines = [line.strip() for line in lines]
    if followed and lines and (lines[-1].isdigit() or (vtt and (len(lines) == 1 or not lines[-2]))):
        lines.pop()
    for i, line in enumerate(lines):
        if vtt and line.startswith(_SKIPPED_BLOCKS) and i > 0 and not lines[i - 1]:
            return lines[:i]
    return lines


def _clean(lines: list[str]) -> str:
    text = _TAG.sub("", "\n".join(lines)).replace("\\N", " ").replace("\\h", " ")
    return " ".join(html.unescape(text).replace("\xa0", " ").split())
