"""The times of speech sounds as JSON, as ``beavervision say --phones`` writes them: for a recording whose sounds are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from beavervision.errors import UsageError
from beavervision.files import read_json
from beavervision.media import Phone

LIMIT_BYTES = 64 << 20
LIMIT_PHONES = 500_000
_LONGEST_IPA = 16


def phones_of(document: Any, name: str = "phones") -> tuple[Phone, ...]:
    """From parsed JSON: ``[{"ipa": "h", "start_ms": 40, "end_ms": 90}, ...]`` or an object that has this list as phones; phones
    themselves may stand in it.

    Raises:
        UsageError: it is none; the message names the phone.
    """
    rows = document.get("phones") if isinstance(document, Mapping) else document
    if not isinstance(rows, Sequence) or isinstance(rows, str) or len(rows) > LIMIT_PHONES:
        raise UsageError(f"{name}: expected a list of at most {LIMIT_PHONES} phones, or an object with one as phones.")
    phones = tuple(_phone(row, f"{name}, phone {number}") for number, row in enumerate(rows, start=1))
    for number, (one, after) in enumerate(pairwise(phones), start=2):
        if after.start_ms < one.end_ms:
            raise UsageError(
                f"{name}, phone {number}: it starts at {after.start_ms} ms, before the end of the one before ({one.end_ms} ms)."
            )
    return phones


def read_phones(path: Path) -> tuple[Phone, ...]:
    """From a JSON file.

    Raises:
        InputError: it cannot be read or is no JSON.
        UsageError: as :func:`phones_of`.
    """
    return phones_of(read_json(path, LIMIT_BYTES), str(path))


def _phone(row: Any, where: str) -> Phone:
    if isinstance(row, Phone):
        return row
    if not isinstance(row, Mapping) or set(row) != {"ipa", "start_ms", "end_ms"}:
        raise UsageError(f"{where}: it must be an object with ipa, start_ms and end_ms.")
    ipa, times = row["ipa"], (row["start_ms"], row["end_ms"])
    if not isinstance(ipa, str) or not 0 < len(ipa) <= _LONGEST_IPA:
        raise UsageError(f"{where}: ipa is a speech sound such as p or oʊ, not {ipa!r}.")
    if not all(isinstance(t, (int, float)) and not isinstance(t, bool) and 0 <= t < 1e9 for t in times):
        raise UsageError(f"{where}: start_ms and end_ms are milliseconds from 0, not {times[0]!r} and {times[1]!r}.")
    start_ms, end_ms = (round(t) for t in times)
    if end_ms <= start_ms:
        raise UsageError(f"{where}: it ends ({end_ms} ms) before it has begun ({start_ms} ms).")
    return Phone(ipa, start_ms, end_ms)
