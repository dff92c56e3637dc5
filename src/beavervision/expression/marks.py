"""Marks in a text, ``[happy] Great news. [neutral] Now the details.``: taken out before it is spoken, timed by its sound.

A mark is an expression as on the command line between square brackets, without spaces in its names: ``[happy]``,
``[sad:0.4]``, ``[browUp:0.5,eyeWide:0.3]``, ``[auto]``. Other brackets (``[1]``, ``[two words]``) are text. So is
``\\[word]``, without its backslash.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeVar

from beavervision.errors import TextError, UsageError
from beavervision.expression.controls import Wanted, parse
from beavervision.expression.script import Script
from beavervision.expression.sentiment import valence
from beavervision.media import F32, Audio

_ITEM = r"[A-Za-z][\w.-]*(?:\s*:\s*[\d.+-]+)?"
_MARK = re.compile(rf"(\\?)\[\s*({_ITEM}(?:\s*,\s*{_ITEM})*)\s*\]")
_CLAUSE = re.compile(r"[,;:.!?…—]+(?=\s|$)")
_PAUSE_MS = 60  # between two phones: a clause ends there
_REACH = 400  # letters that a voice may leave out in one go


class _Phone(Protocol):
    @property
    def start_ms(self) -> int: ...
    @property
    def end_ms(self) -> int: ...


class Said(Protocol):
    """A piece of speech: its sound from the first sample of the whole on, the text heard in it, and when each sound is heard."""

    @property
    def audio(self) -> Audio: ...
    @property
    def text(self) -> str: ...
    @property
    def phones(self) -> Sequence[_Phone]: ...


_Said = TypeVar("_Said", bound=Said)


@dataclass(frozen=True, slots=True, eq=False)
class Marked:
    """A text without its marks, each of which comes after so many of its letters. `left` are brackets that name nothing known."""

    text: str
    marks: tuple[tuple[int, Wanted], ...] = ()
    left: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str, custom: Mapping[str, F32] | None = None, *, strict: bool = True) -> Marked:
        """Take the marks out of `text`; unless `strict` those that are not understood stay, and are named in `left`.

        Raises:
            TextError: a mark is not understood.
        """
        parts: list[str] = []
        marks: list[tuple[int, Wanted]] = []
        left: list[str] = []
        count = end = 0

        def take(part: str) -> None:
            nonlocal count
            parts.append(part)
            count += len(letters(part))

        for match in _MARK.finditer(text):
            take(text[end : match.start()])
            end = match.end()
            if match[1]:
                take(match.group()[1:])
                continue
            try:
                marks.append((count, parse(match[2], custom)))
                take(" ")
            except UsageError as error:
                if strict:
                    raise TextError(
                        f"{match.group()} in the text is no mark: {error} To have it spoken, write \\{match.group()}."
                    ) from error
                left.append(match.group())
                take(match.group())
        take(text[end:])
        return cls("".join(parts), tuple(marks), tuple(dict.fromkeys(left)))

    @classmethod
    def joined(cls, parts: Iterable[Marked]) -> Marked:
        """Several texts that are said one after another."""
        texts: list[str] = []
        marks: list[tuple[int, Wanted]] = []
        count = 0
        for part in parts:
            marks += [(count + before, wanted) for before, wanted in part.marks]
            texts.append(part.text)
            count += len(letters(part.text))
        return cls(" ".join(texts), tuple(marks))

    def follow(self, chunks: Iterable[_Said], script: Script, *, language: str = "en") -> Iterator[_Said]:
        """Hand the chunks of the spoken text on, telling `script` beforehand when each mark and each sentence comes.

        How glad a sentence is can be told in English alone.
        """
        stream = letters(self.text)
        waiting = list(self.marks)
        at = 0  # letters of the text said so far
        end_s = 0.0
        for chunk in chunks:
            said = letters(chunk.text)
            places = []  # in the text, of each letter of the chunk
            for letter in said:
                found = stream.find(letter, at, at + _REACH)
                at = found + 1 if found >= 0 else at
                places.append(at - 1)
            while waiting and waiting[0][0] < at:
                before, wanted = waiting.pop(0)
                script.mark(_time_s(chunk, sum(place < before for place in places), len(said)), wanted)
            if said and language.split("-")[0] == "en":
                script.said(_time_s(chunk, 0, len(said)), valence(chunk.text))
            end_s = (chunk.audio.start + chunk.audio.samples) / chunk.audio.rate_hz
            yield chunk
        for _, wanted in waiting:
            script.mark(end_s, wanted)


def letters(text: str) -> str:
    """What of a text is the same before and after a voice has tidied it: its letters and digits."""
    return "".join(c for c in unicodedata.normalize("NFKC", text).lower() if c.isalnum())


def _time_s(chunk: Said, before: int, count: int) -> float:
    """When the sound begins that follows `before` of the `count` letters of a chunk.

    Clauses are found again as the phones between pauses, where their numbers agree; within a clause sounds are taken to be
    spread as its letters are.
    """
    if not chunk.phones:
        return (chunk.audio.start + chunk.audio.samples * before / max(count, 1)) / chunk.audio.rate_hz
    groups: list[list[_Phone]] = [[chunk.phones[0]]]
    for last, phone in pairwise(chunk.phones):
        if phone.start_ms - last.end_ms >= _PAUSE_MS:
            groups.append([])
        groups[-1].append(phone)
    clauses = [n for part in _CLAUSE.split(chunk.text) if (n := len(letters(part)))]
    if len(clauses) != len(groups) or sum(clauses) != count:
        clauses, groups = [count], [list(chunk.phones)]
    for number, (length, group) in enumerate(zip(clauses, groups, strict=True)):
        if before < length or number == len(clauses) - 1:
            return group[min(round(before / length * len(group)), len(group) - 1)].start_ms / 1000
        before -= length
    raise AssertionError("a chunk with phones has a clause")
