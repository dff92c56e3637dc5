"""Does the mouth do what the speech sounds need? Measured on synthetic speech, whose phones have exact times.

A voice speaks sentences, the pipeline draws them on a face into a real file, the lips are found again in that file, and each
phone is held against what it needs. The criteria, with the gap between the inner lips and the width of the mouth in the pose-free
frame, and the time of a phone widened by 40 ms on either side where a brief contact is looked for:

- *closed* (p b m): the gap falls below 15 % of the clip's open range, which is the 95th percentile of the gap while speaking;
- *lip to teeth* (f v): the gap falls below the clip's median and below the mean of the neighbouring phones (those that are no lip
  sounds themselves);
- *rounded* (w u ʊ oʊ): the mean width is below the clip's median;
- *open* (a æ ɑ ɒ aɪ aʊ): the mean gap is above the clip's median;
- *parted* (all vowels): the gap rises to 15 % of the open range, the counterpart of *closed*: a mouth that hardly opens is closed
  at every p, b and m;
- *still*: in a pause of more than 0.4 s the lips move at less than 10 % of their speed in speech, from 0.2 s after the last phone
  to 0.2 s before the next one (a mouth closes after the sound and opens before it). A pause of 0.4 s or just above has no such
  inside and is not counted.

Medians and speeds of speech are over the pictures of phones. Each share comes with the one that chance would give: the same
criteria with the phones moved along the speech, round and round.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import RenderableType
from rich.table import Table

from beavervision.errors import InputError, UsageError
from beavervision.evaluate.plots import Dots, Panel
from beavervision.evaluate.tracks import LipTrack, lip_track
from beavervision.media import F32, Audio
from beavervision.models.face import FaceNets
from beavervision.pipeline import Pipeline, Progress
from beavervision.speech import Phone, SpeechChunk, write_wav
from beavervision.speech.base import TimingKind
from beavervision.stages.decode import probe

# Rich in the sounds that are measured; about 28 s with the default voice.
SENTENCES = (
    "My baby brother Bob may buy a brown puppy, maybe on Monday.",
    "Five vivid leaves of ivy have fallen from above the old farm.",
    "We will walk through the woods where the wind blows all winter.",
    "You know the moon grows slowly over the cold blue ocean.",
    "Father parked the large black car behind that tall barn last March.",
    "Pam, please put both plump apples back by the top of the map.",
    "The five brave wolves move far away before the fog falls over the wharf.",
    "How would you describe the sound of a happy crowd cheering at the park?",
)
CLOSED = frozenset("pbm")
LIP_TEETH = frozenset("fv")
ROUNDED = frozenset({"w", "u", "ʊ", "o", "oʊ", "əʊ"})
OPEN = frozenset({"a", "æ", "ɑ", "ɒ", "aɪ", "aʊ"})
PARTED = OPEN | ROUNDED - {"w"} | frozenset({"ɐ", "ʌ", "ə", "ɔ", "ɔɪ", "ɛ", "e", "eɪ", "ɜ", "ɚ", "ɪ", "i"})
KINDS: dict[str, frozenset[str]] = {
    "closed": CLOSED,
    "lip_teeth": LIP_TEETH,
    "rounded": ROUNDED,
    "open": OPEN,
    "parted": PARTED,
}

_PAUSE_MS = 1000  # of silence put between the sentences
_AROUND_MS = 40
_CLOSED_SHARE = 0.15
_OPEN_QUANTILE = 0.95
_STILL_PAUSE_MS, _STILL_EDGE_MS, _STILL_SHARE = 400, 200, 0.1
_NEAR_MS = 100  # a phone farther away is no neighbour
_SHIFTS = 16  # for the chance
_LEAST_SEEN = 0.9  # share of pictures that must show the face

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Share:
    """So many of so many were right; `chance` is the share that phones at other times would get, None for pauses."""

    right: int
    of: int
    chance: float | None

    @property
    def share(self) -> float | None:
        """None where there was nothing to measure."""
        return self.right / self.of if self.of else None


@dataclass(frozen=True, slots=True)
class ArticulationReport:
    """Shares by kind, as the module describes them.

    stillness is the speed of the lips in all pauses against that in speech; open_range is in eye distances; seen is the
    share of pictures in which the face was found.
    """

    closed: Share
    lip_teeth: Share
    rounded: Share
    open: Share
    parted: Share
    still: Share
    stillness: float | None
    open_range: float
    seconds: float
    seen: float
    model: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        shares = {name: asdict(share) | {"share": share.share} for name, share in self.shares.items()}
        rest = ("stillness", "open_range", "seconds", "seen", "model")
        return {**_rounded(shares), **_rounded({name: getattr(self, name) for name in rest})}

    @property
    def shares(self) -> dict[str, Share]:
        return {name: getattr(self, name) for name in (*KINDS, "still")}


def articulation(
    pipeline: Pipeline,
    face: Path | str,
    *,
    sentences: Sequence[str] = SENTENCES,
    voice: str | None = None,
    by_ear: bool = False,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> ArticulationReport:
    """Let `face`, a still or a video, speak `sentences`, and measure what its mouth does.

    Args:
        voice: one that knows the times of its phones; the default voice if None.
        by_ear: do not tell the pipeline the phones, as if the speech were recorded.

    Raises:
        UsageError: no sentences.
        InputError: the face cannot be found in more than a tenth of the pictures made.
        BeaverVisionError: what speaking and drawing raise.
    """
    if not sentences:
        raise UsageError("Give at least one sentence to speak.")
    probe(face)  # what cannot be read is told before anything is spoken
    phones: list[Phone] = []
    with tempfile.TemporaryDirectory(prefix="beavervision-articulation-") as scratch:
        sound, out = Path(scratch) / "speech.wav", Path(scratch) / "out.mp4"
        write_wav(spoken(pipeline, sentences, voice, seed, phones), sound)
        told = None if by_ear else phones
        report = pipeline.lipsync(face, out, audio=sound, phones=told, alive=False, on_progress=on_progress)
        track = lip_track(out, FaceNets())
    if track.seen < _LEAST_SEEN:
        raise InputError(f"{face}: the face is seen in {track.seen:.0%} of the pictures only. Use a steadier one.")
    return replace(judged(track, phones), model=report.model)


def judged(track: LipTrack, phones: Sequence[Phone]) -> ArticulationReport:
    """The criteria on lips and phones of one clock; `model` of the report is empty.

    Raises:
        ValueError: no phone is spoken while the lips are seen.
    """
    scene = _Scene.of(track, phones)
    shares = {kind: _share(scene, phones, kind) for kind in KINDS}
    speech = float(scene.speed[scene.speaking].mean())
    pauses = [scene.speed[inside] for inside in scene.pauses(phones)]
    still = [float(pause.mean()) < _STILL_SHARE * speech for pause in pauses]
    return ArticulationReport(
        **shares,
        still=Share(sum(still), len(still), None),
        stillness=float(np.concatenate(pauses).mean()) / speech if pauses and speech > 0 else None,
        open_range=scene.open_range,
        seconds=float(len(track) / track.rate),
        seen=track.seen,
        model={},
    )


def format_table(report: ArticulationReport) -> RenderableType:
    """The report for a terminal."""
    table = Table(title=f"articulation over {report.seconds:.0f} s of synthetic speech")
    for heading in ("what", "right", "of", "share", "by chance"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    names = (
        "closed at p b m",
        "lip to teeth at f v",
        "rounded at w u o",
        "open at a",
        "parted at all vowels",
        "still in pauses",
    )
    for name, share in zip(names, report.shares.values(), strict=True):
        shown = ("-" if value is None else f"{value:.0%}" for value in (share.share, share.chance))
        table.add_row(name, str(share.right), str(share.of), *shown)
    if report.stillness is not None:
        table.caption = f"motion in pauses: {report.stillness:.1%} of that in speech"
    return table


def panels(report: ArticulationReport) -> list[Panel]:
    """The report to be drawn: what was right, and by chance."""
    rows = []
    for name, share in report.shares.items():
        rows += [Dots(name, [share.share])] if share.share is not None else []
        rows += [Dots("by chance", [share.chance], control=True)] if share.chance is not None else []
    return [Panel("share of phones that are right", rows, goal=0.9)] if rows else []


@dataclass(frozen=True, slots=True, eq=False)
class _Scene:
    """Signals over the pictures, (t,), and what they are held against."""

    times_ms: npt.NDArray[np.floating]
    gap: F32
    width: F32
    speed: F32
    speaking: Mask
    open_range: float
    median_gap: float
    median_width: float

    @classmethod
    def of(cls, track: LipTrack, phones: Sequence[Phone]) -> _Scene:
        times_ms = np.arange(len(track), dtype=np.float64) * float(1000 / track.rate)
        gap, width = track.gap, track.width
        steps = np.linalg.norm(np.diff(track.points, axis=0), axis=2).mean(axis=1)
        speed = np.concatenate([steps[:1], steps]).astype(np.float32)
        speed = np.where(np.isfinite(speed), speed, 0).astype(np.float32)
        speaking = np.zeros(len(track), bool)
        for phone in phones:
            speaking |= (times_ms >= phone.start_ms) & (times_ms < phone.end_ms)
        speaking &= np.isfinite(gap)
        if not speaking.any():
            raise ValueError("nothing is spoken while the lips are seen")
        spoken = gap[speaking]
        return cls(
            times_ms=times_ms,
            gap=gap,
            width=width,
            speed=speed,
            speaking=speaking,
            open_range=float(np.quantile(spoken, _OPEN_QUANTILE)),
            median_gap=float(np.median(spoken)),
            median_width=float(np.median(width[speaking])),
        )

    def within(self, signal: F32, start_ms: float, end_ms: float) -> F32:
        """What is known of a signal over a time; the picture nearest to its middle if it falls between two."""
        inside = (self.times_ms >= start_ms) & (self.times_ms < end_ms)
        if not inside.any():
            inside[np.argmin(np.abs(self.times_ms - (start_ms + end_ms) / 2))] = True
        values = signal[inside]
        return values[np.isfinite(values)]

    def pauses(self, phones: Sequence[Phone]) -> list[Mask]:
        """The inside of each pause between phones and at the end."""
        ends = [*(phone.start_ms for phone in phones[1:]), self.times_ms[-1] + _STILL_EDGE_MS]
        spans = [(phone.end_ms, end) for phone, end in zip(phones, ends, strict=True)]
        inside = [
            (self.times_ms >= start + _STILL_EDGE_MS) & (self.times_ms < end - _STILL_EDGE_MS)
            for start, end in spans
            if end - start > _STILL_PAUSE_MS
        ]
        return [mask for mask in inside if mask.sum() > 1]


def _share(scene: _Scene, phones: Sequence[Phone], kind: str) -> Share:
    found = _verdicts(scene, phones, kind)
    by_chance = [verdict for moved in _moved(phones) for verdict in _verdicts(scene, moved, kind)]
    return Share(sum(found), len(found), sum(by_chance) / len(by_chance) if by_chance else None)


def _verdicts(scene: _Scene, phones: Sequence[Phone], kind: str) -> list[bool]:
    """Whether each phone of a kind is as it should be; those at which the lips are not seen are left out."""
    verdicts = []
    for i, phone in enumerate(phones):
        if _plain(phone) not in KINDS[kind]:
            continue
        start, end = phone.start_ms, phone.end_ms
        if not len(scene.within(scene.gap, start, end)):
            continue
        least = float(scene.within(scene.gap, start - _AROUND_MS, end + _AROUND_MS).min())
        if kind == "closed":
            verdicts.append(least < _CLOSED_SHARE * scene.open_range)
        elif kind == "lip_teeth":
            around = [scene.within(scene.gap, n.start_ms, n.end_ms) for n in _neighbours(phones, i)]
            beside = np.concatenate(around) if around else np.array([scene.median_gap])
            verdicts.append(least < min(scene.median_gap, float(beside.mean())))
        elif kind == "rounded":
            verdicts.append(float(scene.within(scene.width, start, end).mean()) < scene.median_width)
        elif kind == "open":
            verdicts.append(float(scene.within(scene.gap, start, end).mean()) > scene.median_gap)
        else:
            verdicts.append(float(scene.within(scene.gap, start, end).max()) >= _CLOSED_SHARE * scene.open_range)
    return verdicts


def _neighbours(phones: Sequence[Phone], i: int) -> list[Phone]:
    here = phones[i]
    beside = [*phones[max(i - 1, 0) : i], *phones[i + 1 : i + 2]]
    return [
        n
        for n in beside
        if _plain(n) not in CLOSED | LIP_TEETH and max(here.start_ms - n.end_ms, n.start_ms - here.end_ms) < _NEAR_MS
    ]


def _moved(phones: Sequence[Phone]) -> Iterator[list[Phone]]:
    """The same times with the sounds moved on by some phones, round and round: for the chance."""
    count = len(phones)
    for by in np.unique(np.linspace(0, count, _SHIFTS + 2).astype(int)[1:-1]):
        if 0 < by < count:
            yield [replace(p, ipa=phones[(i + int(by)) % count].ipa) for i, p in enumerate(phones)]


def _plain(phone: Phone) -> str:
    return phone.ipa.rstrip("ːʰʲ\u0303")


def spoken(
    pipeline: Pipeline, sentences: Sequence[str], voice: str | None, seed: int, phones: list[Phone]
) -> Iterator[SpeechChunk]:
    """The sentences with silence between them; `phones` is filled with their phones on one clock."""
    start = 0
    chosen = pipeline.speaker.voice(*pipeline.settings.voice_for(voice, None))
    for sentence in sentences:
        begin = start
        for chunk in pipeline.speaker.speak(sentence, voice=chosen.name, seed=seed):
            moved_ms = round(begin * 1000 / chosen.rate_hz)
            moved = tuple(phone.later(moved_ms) for phone in chunk.phones)
            phones += moved
            yield replace(chunk, audio=replace(chunk.audio, start=start, phones=moved))
            start += chunk.audio.samples
        silence = np.zeros((1, _PAUSE_MS * chosen.rate_hz // 1000), np.float32)
        yield SpeechChunk(Audio(silence, chosen.rate_hz, start), "", TimingKind.NETWORK)
        start += silence.shape[1]


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value
