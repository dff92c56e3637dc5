"""Text before it is spoken: what a voice can say of it, and where it is cut into pieces."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from beavervision.errors import TextError

SENTENCE_MS, PARAGRAPH_MS, CLAUSE_MS = 250, 500, 100  # pauses at speed 1
FOREIGN_SHARE = 0.05  # of the letters may be in a script that the voice cannot say; they are dropped

# script (first word of a character's Unicode name) -> the language it suggests, and that language's code
_LIKELY = {
    "ARABIC": ("Arabic", "ar"), "ARMENIAN": ("Armenian", "hy"), "BENGALI": ("Bengali", "bn"),
    "CHEROKEE": ("Cherokee", "chr"), "CJK": ("Chinese", "zh"), "CYRILLIC": ("Russian", "ru"),
    "DEVANAGARI": ("Hindi", "hi"), "ETHIOPIC": ("Amharic", "am"), "GEORGIAN": ("Georgian", "ka"),
    "GREEK": ("Greek", "el"), "GUJARATI": ("Gujarati", "gu"), "GURMUKHI": ("Punjabi", "pa"),
    "HANGUL": ("Korean", "ko"), "HEBREW": ("Hebrew", "he"), "HIRAGANA": ("Japanese", "ja"),
    "KANNADA": ("Kannada", "kn"), "KATAKANA": ("Japanese", "ja"), "LATIN": ("English", "en"),
    "MALAYALAM": ("Malayalam", "ml"), "MYANMAR": ("Burmese", "my"), "ORIYA": ("Odia", "or"),
    "SINHALA": ("Sinhala", "si"), "TAMIL": ("Tamil", "ta"), "TELUGU": ("Telugu", "te"), "THAI": ("Thai", "th"),
}  # fmt: skip
# letters that single out a language within a script
_TELLING = (("іїєґ", "Ukrainian", "uk"), ("پچژگ", "Persian", "fa"), ("ٹڈڑے", "Urdu", "ur"))

# languages that are not written in Latin letters alone (a Latin word within any text can be said)
_SCRIPTS = {
    "CYRILLIC": "ba be bg cv kk ky mk nog ru sr tt uk", "ARABIC": "ar fa sd ug ur", "GREEK": "el grc",
    "DEVANAGARI": "hi kok mr ne", "BENGALI": "as bn bpy", "ETHIOPIC": "am ti", "CJK": "cmn hak yue zh",
    "HIRAGANA": "ja", "KATAKANA": "ja", "HANGUL": "ko", "HEBREW": "he", "ARMENIAN": "hy hyw", "GEORGIAN": "ka",
    "GUJARATI": "gu", "GURMUKHI": "pa", "KANNADA": "kn", "MALAYALAM": "ml", "MYANMAR": "my shn", "ORIYA": "or",
    "SINHALA": "si", "TAMIL": "ta", "TELUGU": "te", "THAI": "th", "CHEROKEE": "chr",
}  # fmt: skip

_SPOKEN_SYMBOLS = frozenset("°©®™§µ№&@%+=#")
_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’»)\]]*(?=\s|$)\s*|[。！？।؟]+[”’»」』）]*\s*")
_CLAUSE_END = re.compile(r"[.!?…,;:—–)]\s+|[，、；：،]\s*")
# words whose full stop ends no sentence
_NO_END = "mr mrs ms dr prof st mt gen gov sen rep capt lt col sgt rev hon vs approx fig vol"


class SilentTextError(TextError):
    """Text of nothing but signs that are not said."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is synthesised in one go, the pause after it, and the visible characters left out of it."""

    text: str
    pause_ms: int
    dropped: str = ""


def scripts_of(language: str) -> frozenset[str]:
    """The scripts that a voice of `language` (BCP 47) can say."""
    primary = language.split("-")[0]
    return frozenset({s for s, languages in _SCRIPTS.items() if primary in languages.split()} | {"LATIN"})


@lru_cache(maxsize=4096)
def _script(char: str) -> str:
    """The script of a letter; empty for letters that belong to none (modifiers, ordinal signs)."""
    word = re.split(r"[ -]", unicodedata.name(char, "UNKNOWN"))[0]
    return "" if word in ("MODIFIER", "FEMININE", "MASCULINE", "MICRO") else word


def _is_letter(char: str) -> bool:
    return unicodedata.category(char)[0] == "L"


def _folded(text: str) -> str:
    """Composed (NFC), with letters and digits in disguise (full-width, circled, ligatures, ...) as plain ones."""
    text = unicodedata.normalize("NFC", text)
    return text if text.isascii() else "".join(_plain(c) for c in text)


@lru_cache(maxsize=4096)
def _plain(char: str) -> str:
    kind = unicodedata.category(char)
    if kind == "Nd":
        return str(unicodedata.decimal(char))
    disguise = unicodedata.decomposition(char).split(" ")[0]
    if kind[0] in "LN" and disguise in ("<wide>", "<narrow>", "<font>", "<compat>", "<circle>"):
        return unicodedata.normalize("NFKC", char)
    return char


def _sayable(text: str, scripts: frozenset[str]) -> tuple[str, str]:
    """`text` without what the voice cannot say, and the visible characters that were left out."""
    kept: list[str] = []
    dropped: list[str] = []
    for char in text:
        kind = unicodedata.category(char)
        if kind[0] == "L":
            ok = _script(char) in scripts or not _script(char)
        elif kind[0] == "M":  # belongs to the letter before it
            ok = (
                bool(kept) and unicodedata.category(kept[-1])[0] in "LM" and kind != "Me" and char not in "\ufe0e\ufe0f"
            )
        elif char in "\u200c\u200d":  # joiners: spelling in some scripts, glue in emoji
            ok = bool(kept) and unicodedata.category(kept[-1])[0] in "LM" and _script(kept[-1]) != "LATIN"
        else:
            ok = kind[0] in "NPZ" or kind in ("Sc", "Sm") or char.isascii() or char in _SPOKEN_SYMBOLS
            ok = (ok and kind[0] != "C") or char.isspace()
        if ok:
            kept.append(char)
        elif kind[0] not in "CM":
            dropped.append(char)
            kept.append(" ")
    return re.sub(r"\s+", " ", "".join(kept)).strip(), "".join(dict.fromkeys(dropped))


def _says_something(text: str) -> bool:
    return any(unicodedata.category(c)[0] in "LN" or c in _SPOKEN_SYMBOLS for c in text)


def guess_language(text: str) -> tuple[str, str] | None:
    """The language (name, code) that the most frequent script of `text` suggests; None if it has no known script."""
    scripts = [s for c in text if _is_letter(c) and (s := _script(c)) in _LIKELY]
    if not scripts:
        return None
    if {"HIRAGANA", "KATAKANA"} & set(scripts):
        return _LIKELY["HIRAGANA"]
    likely = _LIKELY[max(set(scripts), key=scripts.count)]
    for letters, name, code in _TELLING:
        if set(letters) & set(text.lower()) and likely[1] in ("ru", "ar"):
            return name, code
    return likely


def pieces(text: str, *, language: str, voice: str, limit_chars: int, piece_chars: int = 200) -> tuple[Piece, ...]:
    """Cut `text` at paragraphs, sentences and, where a sentence is longer than `piece_chars`, clauses or words.

    Characters that a voice of `language` cannot say are dropped and noted if few (emoji, the odd letter).

    Raises:
        SilentTextError: nothing but signs.
        TextError: no text, more than `limit_chars` characters, or a script that the voice cannot say.
    """
    if not text.strip():
        raise TextError("The text is empty. Give at least one word to say.")
    if len(text) > limit_chars:
        raise TextError(f"The text has {len(text):,} characters, the limit is {limit_chars:,}. Split it into parts.")
    text = _folded(text)
    scripts = scripts_of(language)
    letters = [c for c in text if _is_letter(c)]
    foreign = [c for c in letters if _script(c) and _script(c) not in scripts]
    if foreign and len(foreign) > FOREIGN_SHARE * len(letters):
        guess = guess_language("".join(foreign))
        sample = " ".join(dict.fromkeys(foreign[:12]))
        looks, code = (f" (looks like {guess[0]})", guess[1]) if guess else ("", "its code")
        raise TextError(
            f"The voice {voice} ({language}) cannot say the letters {sample}{looks}. "
            f"Set the language to {code} (most languages need the extra: pip install 'beavervision[languages]'), "
            "or write the text in the voice's language."
        )
    out: list[Piece] = []
    carried = ""
    for raw, pause_ms in _cut(text, piece_chars):
        kept, dropped = _sayable(raw, scripts)
        if _says_something(kept):
            out.append(Piece(kept, pause_ms, carried + dropped))
            carried = ""
        else:
            carried += dropped
    if not out:
        raise SilentTextError(
            f"There is nothing to say in {text.strip()[:20]!r}, only signs. Give at least one word or number."
        )
    out[-1] = replace(out[-1], dropped=out[-1].dropped + carried)
    return tuple(out)


def _cut(text: str, piece_chars: int) -> Iterator[tuple[str, int]]:
    for paragraph in re.split(r"\n\s*\n", text):
        sentences = list(_sentences(re.sub(r"\s+", " ", paragraph).strip()))
        for i, sentence in enumerate(sentences):
            end_ms = PARAGRAPH_MS if i == len(sentences) - 1 else SENTENCE_MS
            *heads, tail = _capped(sentence, piece_chars)
            for head in heads:
                yield head, CLAUSE_MS if _CLAUSE_END.search(head[-1] + " ") else 0
            yield tail, end_ms


def _sentences(paragraph: str) -> Iterator[str]:
    start = 0
    for match in _SENTENCE_END.finditer(paragraph):
        after = paragraph[match.end() : match.end() + 1]
        if after.islower():  # a quotation within a sentence, an abbreviation
            continue
        if after and match.group().strip() == ".":
            word = paragraph[start : match.start()].rsplit(" ", 1)[-1].lstrip("(\"'“‘«").lower()
            if word in _NO_END.split() or (len(word) == 1 and word.isalpha() and word != "i"):
                continue
        yield paragraph[start : match.end()].strip()
        start = match.end()
    if paragraph[start:].strip():
        yield paragraph[start:].strip()


def _width(char: str) -> int:
    """How much longer than a letter it takes to say: an ideograph is a syllable or two."""
    return 3 if unicodedata.east_asian_width(char) in "WF" else 1


def _capped(sentence: str, piece_chars: int) -> Iterator[str]:
    """Parts of at most `piece_chars` (wide ones count thrice): cut after the last clause, else word, else anywhere."""
    while True:
        widths = list(accumulate(map(_width, sentence)))
        if not widths or widths[-1] <= piece_chars:
            yield sentence
            return
        cap = bisect_right(widths, piece_chars)
        window = sentence[:cap]
        clauses = [m.end() for m in _CLAUSE_END.finditer(window) if m.end() > cap * 0.3]
        cut = clauses[-1] if clauses else window.rfind(" ") + 1 or cap
        yield sentence[:cut].strip()
        sentence = sentence[cut:].strip()
