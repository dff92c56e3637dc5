"""Synthetic speech with exact phone times: what teaches the motion network to tell phones apart."""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import numpy.typing as npt

from beavervision.errors import BeaverVisionError
from beavervision.media import F32
from beavervision.models.sync import SOUND_RMS
from beavervision.speech import Phone, Speaker
from beavervision.stages.hear import RATE_HZ, Resampler
from training.clips import STEP_S, heard_rows

_EDGE_MS = 200.0  # silence around each sentence
_SHARES = {"hibari": 0.25, "kokoro": 0.65, "espeak": 0.1}  # of the sentences, among the engines that work


class Viseme(IntEnum):
    """Classes of phones by what the mouth does."""

    SILENCE = 0
    CLOSED = 1
    LIP_TEETH = 2
    ROUND = 3
    OPEN = 4
    SPREAD = 5
    OTHER = 6


_BY_FIRST = {
    **dict.fromkeys("pbm", Viseme.CLOSED),
    **dict.fromkeys("fv", Viseme.LIP_TEETH),
    **dict.fromkeys("wuʊoɔyøʃʒ", Viseme.ROUND),
    **dict.fromkeys("aɑæʌɒɐ", Viseme.OPEN),
    **dict.fromkeys("iɪeɛj", Viseme.SPREAD),
}

_ADJECTIVES = """
big brown quiet warm purple happy famous broken open simple poor pure wooden empty yellow vivid moody major silver heavy
bitter beautiful careful modern foggy rapid humble smooth wide awful
"""
_NOUNS = """
boat map people father window movie mother bottle river apple flower wolf phone market village coffee baby summer book shoe
photograph beaver machine paper umbrella farm wave mountain office balloon family spoon van bubble problem fish
"""
_VERBS = """
moves brings follows above finds wants before makes over keeps from loves opens behind paints watches forgets under remembers
pushes believes buys shows calls saves by puts throws
"""
_LEADS = """
Maybe,
Of course,
My father says that
We hope that
Why would you believe that
Please remember:
Well,
After a while,
You know,
Every morning
Both of us think
I am sure that
Hello!
No, wait.
In fact,
Oh!
"""


@dataclass(frozen=True, slots=True, eq=False)
class Spoken:
    """One sentence: its sound (samples,) at 16 kHz, its equalised log-mel rows (r, 64), each step's class and weight (n,), and
    whether Kokoro speaks.

    A step at the edge of a phone counts less than one in its middle.
    """

    pcm: F32
    rows: F32
    classes: npt.NDArray[np.int64]
    centred: F32
    kokoro: bool = False


@cache
def _lexicon() -> npt.NDArray[np.str_]:
    """The plain words of the default voice's lexicon, some 50 000."""
    raw = files("hibari").joinpath("assets/lexicon_us_gold.json.gz").read_bytes()
    words = (w for w in json.loads(gzip.decompress(raw)) if w.isascii() and w.islower() and 2 < len(w) < 10)
    return np.array(sorted(words))


def sentences(rng: np.random.Generator) -> Iterator[str]:
    """English sentences without end: of words with many labials and all vowels, and in turn of any words, in which every
    phone meets every other.
    """
    adjectives, nouns, verbs, leads = _ADJECTIVES.split(), _NOUNS.split(), _VERBS.split(), _LEADS.strip().splitlines()
    while True:
        first, second = (" ".join(rng.choice(_lexicon(), rng.integers(2, 5))) for _ in range(2))
        yield f"{first}{rng.choice([' the', ' of', ' and', ',', '.'])} {second}{rng.choice(['.', '!', '?'])}".capitalize()
        lead, pause = rng.choice(leads), rng.choice(["", "", ",", ";"])
        a, b = (f"the {rng.choice(adjectives)} {rng.choice(nouns)}" for _ in range(2))
        yield f"{lead} {a}{pause} {rng.choice(verbs)} {b}{rng.choice(['.', '!', '?', ''])}"


def labels(phones: tuple[Phone, ...], steps: int, shift_s: float) -> tuple[npt.NDArray[np.int64], F32]:
    """The class of each step, and 1 in the middle of a phone falling to 0.3 at its edges."""
    classes = np.full(steps, Viseme.SILENCE, np.int64)
    centred = np.ones(steps, np.float32)
    at = np.arange(steps) * STEP_S
    for phone in phones:
        start, end = phone.start_ms / 1000 + shift_s, phone.end_ms / 1000 + shift_s
        inside = (at >= start) & (at < end)
        classes[inside] = _BY_FIRST.get(phone.ipa[:1], Viseme.OTHER)
        middle = (start + end) / 2
        centred[inside] = np.clip(1 - np.abs(at[inside] - middle) / max(end - start, STEP_S), 0.3, 1)
    return classes, centred


def speak_many(count: int, seed: int, voices_dir: Path | None, without: Sequence[str] = ()) -> list[Spoken]:
    """`count` sentences in all English voices that work here but those `without`, at many pitches and paces; `voices_dir` has
    Kokoro's."""
    rng = np.random.default_rng(seed)
    speaker = Speaker(voices_dir=voices_dir)
    voices: dict[str, list[str]] = {}
    for v in speaker.voices():
        if not v.unavailable and v.language[:2] == "en" and v.name not in without:
            voices.setdefault(v.engine, []).append(v.name)
    engines = list(voices)
    share = np.array([_SHARES[engine] for engine in engines])
    share /= share.sum()
    out: list[Spoken] = []
    for text in sentences(rng):
        engine = str(rng.choice(engines, p=share))
        voice = str(rng.choice(voices[engine]))
        pitch, speed = np.exp(rng.uniform(-0.45, 0.35)), np.exp(rng.uniform(-0.2, 0.25))
        try:
            chunks = list(
                speaker.speak(text, voice=voice, language="en", pitch=pitch, speed=speed, seed=int(rng.integers(99)))
            )
        except BeaverVisionError as error:
            raise SystemExit(f"synthetic speech failed: {error}") from error
        resampler = Resampler(chunks[0].audio.rate_hz)
        pcm = np.concatenate([*(resampler.push(c.audio.pcm) for c in chunks), resampler.end()])
        edge = np.zeros(int(_EDGE_MS / 1000 * RATE_HZ))
        pcm = np.concatenate([edge, pcm * SOUND_RMS / max(float(np.sqrt(np.mean(pcm**2))), 1e-4), edge])
        rows = heard_rows(pcm)
        phones = tuple(p for c in chunks for p in c.phones)
        classes, centred = labels(phones, len(rows) // 2, _EDGE_MS / 1000)
        out.append(Spoken(pcm.astype(np.float32), rows, classes, centred, engine == "kokoro"))
        if len(out) == count:
            break
    return out


def pack_sounds(sounds: list[F32]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int16]]:
    """How many samples each of the sounds (samples,) has, and all of them in 16 bits."""
    kept = [(pcm * 32767).clip(-32768, 32767).astype(np.int16) for pcm in sounds]
    return np.array([len(pcm) for pcm in kept]), np.concatenate(kept)


def unpack_sounds(samples: npt.NDArray[np.intp], pcm: npt.NDArray[np.int16]) -> list[F32]:
    """What :func:`pack_sounds` packed."""
    return np.split(pcm.astype(np.float32) / 32768, np.cumsum(samples)[:-1])


def save(spoken: list[Spoken], path: Path) -> None:
    samples, pcm = pack_sounds([s.pcm for s in spoken])
    np.savez_compressed(
        path,
        steps=np.array([len(s.classes) for s in spoken]),
        samples=samples,
        pcm=pcm,
        classes=np.concatenate([s.classes for s in spoken]).astype(np.int8),
        centred=np.concatenate([s.centred for s in spoken]).astype(np.float16),
        kokoro=np.array([s.kokoro for s in spoken]),
    )


def load(path: Path) -> list[Spoken]:
    with np.load(path) as raw:
        steps, pieces = np.cumsum(raw["steps"])[:-1], unpack_sounds(raw["samples"], raw["pcm"])
        classes = np.split(raw["classes"].astype(np.int64), steps)
        centred = np.split(raw["centred"].astype(np.float32), steps)
        kokoro = raw["kokoro"].tolist()
    return [Spoken(p, heard_rows(p), c, w, k) for p, c, w, k in zip(pieces, classes, centred, kokoro, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Synthesise the sentences that the motion network trains on.")
    parser.add_argument("--data", type=Path, default=Path("work/data"))
    parser.add_argument("--count", type=int, default=400, help="sentences (about 3.5 s each)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--voices-dir", type=Path, help="folder with the voice files of Kokoro")
    parser.add_argument("--without", nargs="*", default=[], metavar="VOICE", help="voices to keep for measuring")
    parser.add_argument("--smoke", action="store_true", help="four sentences")
    args = parser.parse_args()
    args.data.mkdir(parents=True, exist_ok=True)
    spoken = speak_many(4 if args.smoke else args.count, args.seed, args.voices_dir, args.without)
    save(spoken, args.data / "voices.npz")


if __name__ == "__main__":
    main()
