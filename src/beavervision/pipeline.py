"""The one place where stages are wired: a face and words in, a video of that face saying them out.

    from beavervision import lipsync
    lipsync("portrait.png", "hello.mp4", text="Hello there.")

:class:`Pipeline` holds the loaded networks and serves many runs, one after another or at once; :func:`lipsync` makes one
for a single run.
"""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import cv2

from beavervision.engine.batcher import MicroBatcher
from beavervision.engine.flow import Flow
from beavervision.engine.host import cores
from beavervision.engine.memory import MemoryBudget
from beavervision.engine.placement import DevicePlan, StageCost, available_devices, plan, resolve
from beavervision.errors import MediaError, NoFaceError, TextError, UsageError
from beavervision.expression import Custom, Direct, ExpressionStore, Marked, Script, Style, Track, learn_custom
from beavervision.files import check_apart
from beavervision.media import Audio, Clip, Face, FaceTrack, Frames, Net, Phone, Picture, Stage, pictures_for
from beavervision.metrics import RunReport, StageTimes
from beavervision.models.beaver import LAST_ROW_MS
from beavervision.models.beaver import load as load_beaver
from beavervision.models.between import load_between
from beavervision.models.boxes import FaceBoxes
from beavervision.models.cards import BEAVER, SILERO_VAD, ModelCard, Timing, data_hashes, load_data
from beavervision.models.expression import load_basis
from beavervision.models.face import FaceNets
from beavervision.models.restorers import Restorer
from beavervision.models.runtime import OnnxNet
from beavervision.models.store import ModelStore
from beavervision.settings import Settings
from beavervision.speech import Cue, CueReport, Speaker, SpeechChunk, parse_srt, phones_of, read_phones
from beavervision.stages.decode import Decode, Extend, SourceInfo, audio_info, probe, read_audio, resample
from beavervision.stages.detect import Detect, FaceChoice, Retrace, Survey, joined, survey
from beavervision.stages.encode import LAYOUTS, Encode
from beavervision.stages.express import Express
from beavervision.stages.hear import COMING_MS, LOG_MEL_DENSE, Hear
from beavervision.stages.lipsync_beaver import BeaverSync, profile_of
from beavervision.stages.lipsync_wav2lip import Wav2LipSync
from beavervision.stages.mark import Mark
from beavervision.stages.render import Render
from beavervision.stages.restore import Area, Restore
from beavervision.stages.watch import Watch, check_sheet

_T = TypeVar("_T")
Fit = Literal["loop", "trim", "freeze", "keep"]
# Pictures done, and in all: an estimate while speech is synthesised, None while there is none.
Progress = Callable[[int, int | None], None]

SPEECH_HZ = 48_000  # synthetic speech is written at the rate that every player likes
_BLOCK = 8  # pictures in a clip, fewer where they are so large that it would have more than
_BLOCK_BYTES = 32 << 20
_DEPTH_BYTES = 16 << 20  # of a clip, from which on only one waits after each stage
_SHARED_BATCH, _SHARED_DEADLINE_MS = 32, 4.0  # of networks that several runs share
# What the stages cost for a 720p picture with `beavervision bench`, for the planning of devices and threads.
_COSTS = {
    "decode": StageCost(cpu_ms=3.5, max_threads=2),
    "detect": StageCost(cpu_ms=12.0),
    "hear": StageCost(cpu_ms=2.0),
    "lipsync": StageCost(cpu_ms=16.0, gpu_ms=1.0, memory_mb=600),  # on a GPU: a guess, none was there to measure
    "render": StageCost(cpu_ms=2.5),
    "encode": StageCost(cpu_ms=19.0, max_threads=8),
}
_SURVEY_S = 8  # of the source are looked at first,
_SURVEY_HZ = 4  # so many pictures a second,
_SURVEY_CLIPS = 4  # of a caller's own source
LOOK_PICTURES = 3000  # that a face is followed over for later runs
_SEARCH_HZ = 1  # and, where none of them has a face, so many in the rest
_ACCENT_AHEAD_S = 0.12  # so far ahead stressed syllables are looked for
_LIVE_VOICE_AHEAD_MS = 80.0  # a compromise of how early the lips part and how long a live stream is held back
_LEARN_S = 300  # of a clip, at most, an expression or a style is learned from


@dataclass(frozen=True, slots=True, eq=False)
class Look:
    """What is known of a source: the chosen person's face, and the face in each picture, None where there are too many."""

    survey: Survey
    track: FaceTrack | None


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did; :meth:`as_dict` is ready for JSON. Times in `track` are seconds of the output."""

    output: dict[str, Any]
    source: dict[str, Any]
    speech: dict[str, Any]
    model: dict[str, Any]
    track: dict[str, Any]
    times: RunReport
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class Pipeline:
    """The loaded networks, ready for many runs. Safe to use from several threads.

    Args:
        model: ``beaver``, or the name of an imported model (see :class:`~beavervision.models.store.ModelStore`).
        device: ``auto``, ``cpu``, ``cuda:0`` or a comma-separated list.
        allow_non_commercial: accept weights that may not be used commercially.
        settings: the other defaults; read from the environment if None.

    Raises:
        ModelError, LicenceError, DeviceError: the model cannot be loaded there.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        device: str | None = None,
        allow_non_commercial: bool = False,
        settings: Settings | None = None,
    ) -> None:
        self.settings = settings or Settings.load()
        cv2.setNumThreads(1)
        name = model or self.settings.model
        wanted = device or self.settings.device
        devices = resolve(wanted, available_devices(gpus=wanted != "cpu"))
        threshold = self.settings.memory_threshold
        self.plan: DevicePlan = plan(devices, _COSTS, self.settings.threads or cores(), threshold)
        self.speaker = Speaker(threads=1, voices_dir=self.settings.voices_dir)
        self.budgets = tuple(MemoryBudget(d, threshold) for d in dict.fromkeys(("cpu", *self.plan["lipsync"].devices)))
        self._voice = OnnxNet(load_data(SILERO_VAD.files[0]), name=SILERO_VAD.name)
        self._allow_non_commercial = allow_non_commercial
        self._restorers: dict[str, Restorer] = {}
        self._detectors: dict[str, FaceBoxes] = {}
        self._extras_lock = threading.Lock()  # of the two above
        make = _MODELS.get(name, _Imported)
        where = self.plan["lipsync"]
        self._models = _Replicas(
            [
                make(name, device, where.threads, self.settings.data_dir, allow_non_commercial)
                for device in where.devices
            ]
        )
        self._model = self._models.first
        for budget, on_it in itertools.product(self.budgets, self._models):
            if budget.device in ("cpu", on_it.device):
                budget.on_pressure(on_it.net.halve)

    @property
    def card(self) -> ModelCard:
        """The card of the lip-sync model in use."""
        return self._model.card

    def lipsync(
        self,
        source: Path | str,
        out: Path | str,
        *,
        text: str | None = None,
        audio: Path | str | None = None,
        phones: Path | str | Sequence[Phone | Mapping[str, Any]] | None = None,
        subtitles: Path | str | None = None,
        voice: str | None = None,
        language: str | None = None,
        speed: float = 1.0,
        pitch: float = 1.0,
        seed: int = 0,
        fit: Fit = "loop",
        face: str = "largest",
        keep_audio: float = 0.0,
        expression: str | None = None,
        expression_track: Path | str | Mapping[str, Any] | Sequence[Any] | None = None,
        style: Path | str | Mapping[str, Any] | None = None,
        alive: bool | None = None,
        restore: str | None = None,
        restore_area: Area = "mouth",
        boxes: str | None = None,
        whole_box: bool = False,
        mark: bool = False,
        look: Look | None = None,
        sheet: Path | str | None = None,
        on_progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> Report:
        """Write to `out` the face of `source` saying `text`, the sound of `audio`, or `subtitles` at their times.

        Args:
            source: a video or a still.
            phones: the times of the speech sounds in `audio`, where they are known, as
                :func:`beavervision.speech.phones_of` or the JSON file that has them: the default model's lips are led by them,
                as by those of a text.
            voice, language, speed, pitch, seed: of synthetic speech, as :meth:`beavervision.speech.Speaker.speak`.
            fit: a picture shorter than the sound plays back and forth (``loop``) or holds its last frame (``freeze``), and a
                longer one is cut; ``trim`` ends with the shorter of the two; ``keep`` keeps the picture's own length.
            face: which face, as :meth:`beavervision.stages.detect.FaceChoice.parse`.
            keep_audio: the level, 0 to 1, at which the source's own sound is mixed in.
            expression: what to express, as :func:`beavervision.expression.parse`: ``happy:0.6``, say, or ``auto``. Marks in the
                text or the subtitles (``[happy] Great news.``) change it on the way; they are not spoken.
            expression_track: keyframes to add to it, as :meth:`beavervision.expression.Track.of`, or the JSON file that has them.
            style: the manner of another speaker, see :func:`learn_style`: a JSON file or what it holds.
            alive: let the face blink, breathe and stress words unasked, repeatably by `seed`; None does so for stills alone.
            restore: an imported face restorer to run over the pictures; None for none. restore_area: where its detail shows.
            boxes: for a Wav2Lip checkpoint: an imported S3FD detector to take the boxes of faces from, as published; None takes
                the face mesh's. whole_box: paste the whole box with hard edges, as published, in place of the lower face.
            mark: say in a corner of the pictures that they are synthetic.
            look: what :meth:`look` found in `source`, whose `face` it was; None looks now.
            sheet: where to write a contact sheet (PNG) as well.
            cancel: setting it ends the run with Interrupted and leaves nothing behind.

        Raises:
            BeaverVisionError: its subclasses say what is wrong and what to do; no output is left then.
        """
        times = StageTimes()
        notes: list[str] = []
        if fit not in get_args(Fit):
            raise UsageError(f"fit {fit!r}: use {', '.join(get_args(Fit))}.")
        if not 0 <= keep_audio <= 1:
            raise UsageError(f"keep_audio is a level between 0 and 1, not {keep_audio:g}.")
        if restore_area not in get_args(Area):
            raise UsageError(f"restore_area {restore_area!r}: use {' or '.join(get_args(Area))}.")
        check_apart([source, audio, phones, subtitles, style, expression_track], [out, sheet])
        choice = FaceChoice.parse(face)
        if (boxes or whole_box) and not self._model.boxed:
            raise UsageError(f"boxes and whole_box are for Wav2Lip checkpoints; {self.card.name} draws without them.")
        store = ModelStore(self.settings.data_dir)
        restorer = self._opened(self._restorers, store.open_restorer, restore) if restore else None
        detector = self._opened(self._detectors, store.open_boxes, boxes) if boxes else None
        encode = Encode(self.settings.preset, self.settings.crf, threads=self.plan["encode"].threads).to(out)
        if sheet is not None:
            check_sheet(Path(sheet))
        info = probe(source)
        notes += info.notes
        script = self._script(expression, expression_track)
        manner = style if style is None else _style(style)
        words = self._words(
            text, audio, phones, subtitles, voice, language, speed, pitch, seed, keep_audio > 0, script, notes.append
        )
        sound = _begun(words.blocks())
        alive = info.kind == "still" if alive is None else alive
        expresses = alive or manner is not None or script.anything
        extend: Extend = {"loop": "loop", "freeze": "freeze", "trim": "none", "keep": "none"}[fit]  # type: ignore[assignment]
        if look is not None and look.track is not None:
            seen, detect = look.survey, cast(Stage, Retrace(look.track))
        else:
            nets = FaceNets()
            seen = self._survey(info, nets, choice) if look is None else look.survey
            between = load_between() if info.kind == "video" else None  # a still is looked at once
            detect = Detect(nets, seen.choice, shapes=expresses, sparing=True, between=between)
        if seen.faces_seen > 1:
            notes.append(f"{seen.faces_seen} people were seen; the face was chosen by {face!r}.")
        background = None
        if keep_audio:
            background = _background(info, words, notes.append)
        picture_bytes = info.width_px * info.height_px * 3 // 2
        block = max(1, min(_BLOCK, _BLOCK_BYTES // picture_bytes))
        decode = Decode(block, extend=extend, on_note=notes.append)
        watch = Watch(info.rate, sheet=sheet is not None)

        def hear(clips: Iterator[Clip]) -> Iterator[Clip]:
            return self._hear()(
                clips,
                sound,
                background=background,
                background_level=keep_audio,
                keep_picture=fit == "keep" and info.kind == "video",  # a still has no length of its own
                on_note=notes.append,
            )

        flow = Flow(
            lambda: decode(info),
            name="decode",
            depth=2 if block * picture_bytes < _DEPTH_BYTES else 1,
            times=times,
            cancel=cancel,
            guard=self._check_memory,
        )
        flow = flow.then(detect).then(_Named("hear", hear))
        if expresses:
            flow = flow.then(self._direct(script, alive, seed, manner))
        asked = _Asked(None if manner is None else manner.amplitude, boxes=detector, whole_box=whole_box)
        flow = flow.then(self._models.stage(seen, asked))
        flow = flow.then(Render(match=self._model.seams and not whole_box))
        if expresses:
            flow = flow.then(Express(load_basis()))
        if restorer is not None:
            flow = flow.then(Restore(restorer, restore_area))
        if mark:
            flow = flow.then(Mark())
        flow = flow.then(watch).then(encode)
        done = 0
        with closing(iter(flow)) as clips:
            for clip in clips:
                done += len(clip)
                if on_progress is not None:
                    on_progress(done, _expected(fit, info, words))
        if sheet is not None:
            watch.write_sheet(Path(sheet))
        return Report(
            output={
                "path": str(out),
                "pictures": done,
                "rate": str(info.rate),
                "seconds": round(float(done / info.rate), 3),
                "size_px": [info.width_px, info.height_px],
            },
            source=_source_facts(info),
            speech=words.facts(),
            model=self._model.facts()
            | ({} if restorer is None else {"restore": restore, "restore_area": restore_area})
            | ({} if detector is None else {"boxes": boxes})
            | ({"whole_box": True} if whole_box else {}),
            track=watch.facts(),
            times=times.report(),
            notes=tuple(dict.fromkeys((*notes, *words.notes()))),
        )

    def look(
        self,
        source: Path | str,
        *,
        face: str = "largest",
        on_progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> Look:
        """Find the face of `source` once, for many runs: who it is, and where in each picture.

        Of a source with more than `LOOK_PICTURES` pictures the face is not followed.

        Raises:
            MediaError, NoFaceError, UsageError, Interrupted: as :meth:`lipsync`.
        """
        info, nets = probe(source), FaceNets()
        seen = self._survey(info, nets, FaceChoice.parse(face))
        decode = Decode(_BLOCK, extend="none")
        flow = Flow(lambda: itertools.islice(decode(info), LOOK_PICTURES // _BLOCK + 1), cancel=cancel)
        if info.kind == "still":
            flow = Flow(lambda: itertools.islice(Decode(1)(info), 1), cancel=cancel)
        tracks: list[FaceTrack] = []
        done = 0
        with closing(iter(flow.then(Detect(nets, seen.choice)))) as clips:
            for clip in clips:
                assert clip.track is not None
                tracks.append(clip.track)
                done += len(clip)
                if on_progress is not None:
                    on_progress(done, info.frames)
        return Look(seen, joined(tracks) if done <= LOOK_PICTURES else None)

    def clips(
        self,
        clips: Iterable[Clip],
        audio: Iterable[Audio],
        *,
        face: str = "largest",
        script: Script | None = None,
        style: Style | None = None,
        alive: bool = False,
        seed: int = 0,
    ) -> Iterator[Clip]:
        """Bring your own source and sink: clips with frames in, the same with drawn mouths and their sound out.

        It ends with the sound or with the pictures, whichever is first. The first clips are held back to look at the face, and
        sound is read 0.8 s ahead of its picture; :mod:`beavervision.live` waits less.
        `script` says what to express; :meth:`~beavervision.expression.Script.set` changes it while the clips go by. `style`,
        `alive` and `seed` are as for :meth:`lipsync`.

        Raises:
            NoFaceError: the first four clips begin with no face.
        """
        incoming = iter(clips)
        first = list(itertools.islice(incoming, _SURVEY_CLIPS))
        nets = FaceNets()
        seen = survey([c.frames.pictures[0] for c in first], nets, FaceChoice.parse(face))
        if not seen.references:
            raise NoFaceError(
                "There is no face in the first pictures. Begin with a picture that shows one from the front."
            )
        hear = self._hear()
        expresses = alive or style is not None or script is not None
        stages: list[Stage] = [
            Detect(nets, seen.choice, shapes=expresses),
            _Named("hear", lambda heard: hear(heard, iter(audio))),
            *([self._direct(script or Script(), alive, seed, style)] if expresses else []),
            self._models.stage(seen, _Asked(None if style is None else style.amplitude)),
            Render(match=self._model.seams),
            *([Express(load_basis())] if expresses else []),
        ]
        flow = Flow(lambda: itertools.chain(first, incoming), guard=self._check_memory)
        for stage in stages:
            flow = flow.then(stage)
        return iter(flow)

    def live(
        self,
        seen: Survey,
        rate: Fraction,
        audio: Iterator[Audio],
        *,
        between: Sequence[Stage] = (),
        script: Script | None = None,
        seed: int = 0,
    ) -> tuple[Stage, ...]:
        """The stages of a live run after tracking: hearing, direction, `between`, and drawing. See :mod:`beavervision.live`."""
        hear = self.live_hear(rate)
        return (
            _Named("hear", lambda clips: hear(clips, audio)),
            *([self._direct(script, False, seed, None)] if script is not None else []),
            *between,
            self._models.stage(seen, _Asked(alone=True)),
            Render(match=self._model.seams),
            *([Express(load_basis())] if script is not None else []),
        )

    def enlivened(self, clips: Iterator[Clip], audio: Iterator[Audio], seed: int = 0) -> Iterator[Clip]:
        """Tracked clips of a still with the head swaying, breathing and blinking while `audio` is heard; the lips stay."""
        clips = self._direct(Script(), True, seed, None)(self._hear()(clips, audio))
        return Express(load_basis())(clips)

    def live_hear(self, rate: Fraction) -> Hear:
        """Hearing for clips of one picture at `rate`: no further ahead of a picture than the model needs."""
        timing = self._model.timing
        ahead_ms = max(self._model.row_ahead_ms - float(1000 / rate), 0.0)
        return Hear(self._model.front_end, timing.left_context_ms, ahead_ms, self._voice, _LIVE_VOICE_AHEAD_MS)

    @property
    def timing(self) -> Timing:
        """What the model must hear around a picture."""
        return self._model.timing

    def script(self, expression: str = "", track: Track | None = None) -> Script:
        """What a run is to express, with this user's custom expressions: for :meth:`clips`, and to change while it runs.

        Raises:
            UsageError: `expression` is not understood.
        """
        return Script(expression, track, ExpressionStore(self.settings.data_dir).looks())

    def _script(self, expression: str | None, track: Path | str | Mapping[str, Any] | Sequence[Any] | None) -> Script:
        custom = ExpressionStore(self.settings.data_dir).looks()
        keys = None
        if track is not None:
            keys = Track.read(Path(track), custom) if isinstance(track, (str, Path)) else Track.of(track, custom)
        return self.script(expression or "", keys)

    def _direct(self, script: Script, alive: bool, seed: int, style: Style | None) -> Direct:
        ahead_s = min(_ACCENT_AHEAD_S, self._model.timing.look_ahead_ms / 1000)
        return Direct(script, alive=alive, seed=seed, style=style, ahead_s=ahead_s)

    def _opened(self, opened: dict[str, _T], open_model: Callable[..., _T], name: str) -> _T:
        """An imported model that runs share, kept in `opened` by its name."""
        where = self.plan["lipsync"]
        with self._extras_lock:
            if name not in opened:
                opened[name] = open_model(
                    name,
                    allow_non_commercial=self._allow_non_commercial,
                    device=where.devices[0],
                    threads=where.threads,
                )
            return opened[name]

    def _check_memory(self) -> None:
        for budget in self.budgets:
            budget.check()

    def _hear(self) -> Hear:
        timing = self._model.timing
        return Hear(
            self._model.front_end, timing.left_context_ms, timing.look_ahead_ms, self._voice, coming_ms=COMING_MS
        )

    def _survey(self, info: SourceInfo, nets: FaceNets, choice: FaceChoice) -> Survey:
        """Look at the first seconds; where they hold no face, at the rest."""
        if info.kind == "still":
            pictures = itertools.islice(_pictures(info), 1)
            seen = survey(pictures, nets, choice)
        else:
            fast = max(1, round(info.rate / _SURVEY_HZ))
            count = int(_SURVEY_S * info.rate)
            with closing(_pictures(info)) as all_pictures:
                seen = survey(itertools.islice(all_pictures, count), nets, choice, every=fast)
                slow = max(1, round(info.rate / _SEARCH_HZ))
                while not seen.references:
                    picture = next(itertools.islice(all_pictures, slow - 1, None), None)
                    if picture is None:
                        break
                    seen = survey([picture], nets, choice)
        if not seen.references:
            raise NoFaceError(
                f"{info.path}: no face was found. Use a picture that shows a face from the front, at least 30 pixels wide."
                if not seen.faces_seen
                else f"{info.path}: the face that was asked for is not there, or never seen from the front; "
                f"{seen.faces_seen} {'was' if seen.faces_seen == 1 else 'were'} seen. Choose another face."
            )
        return seen

    def _words(
        self,
        text: str | None,
        audio: Path | str | None,
        phones: Path | str | Sequence[Phone | Mapping[str, Any]] | None,
        subtitles: Path | str | None,
        voice: str | None,
        language: str | None,
        speed: float,
        pitch: float,
        seed: int,
        mixed: bool,
        script: Script,
        note: Callable[[str], None],
    ) -> _Words:
        """What is said, by one of text, audio and subtitles; `mixed` says that other sound will be mixed in."""
        given = [
            name for name, value in (("text", text), ("audio", audio), ("subtitles", subtitles)) if value is not None
        ]
        if len(given) != 1:
            raise UsageError(
                "Say what the face should speak: exactly one of text, audio or subtitles"
                + (f", not {' and '.join(given)}." if given else ".")
            )
        if phones is not None and audio is None:
            raise UsageError("phones are those of recorded speech: give audio with them. A text's are known.")
        if audio is not None:
            known = read_phones(Path(phones)) if isinstance(phones, (str, Path)) else phones_of(phones or ())
            return _Recorded(Path(audio), known, note, mixed=mixed)
        chosen = self.speaker.voice(*self.settings.voice_for(voice, language))
        how: dict[str, Any] = {"voice": chosen.name, "speed": speed, "pitch": pitch, "seed": seed}
        facts = {"voice": chosen.name, "language": chosen.language, "engine": chosen.engine, "licence": chosen.licence}
        if subtitles is not None:
            cues: list[CueReport] = []
            parsed = parse_srt(Path(subtitles))
            plain, marked = _unmarked(parsed, script, note)
            chunks = self.speaker.speak_cues(plain, on_report=cues.append, **how)
            chunks = marked.follow(chunks, script, language=chosen.language)
            end_ms = parsed[-1].end_ms
            return _Synthetic("subtitles", chunks, facts, note, until_ms=end_ms, cues=cues, speed=speed)
        marked = Marked.of(text or "", script.custom)
        if not marked.text.strip():
            raise TextError("The text is empty. Give at least one word.")
        if marked.marks:
            script.expect()
        chunks = marked.follow(self.speaker.speak(marked.text, **how), script, language=chosen.language)
        return _Synthetic("text", chunks, facts, note, characters=len(marked.text))


def lipsync(
    source: Path | str, out: Path | str, *, model: str | None = None, device: str | None = None, **options: Any
) -> Report:
    """One run with networks of its own; the options are those of :meth:`Pipeline.lipsync` and `allow_non_commercial`."""
    allow = bool(options.pop("allow_non_commercial", False))
    return Pipeline(model, device=device, allow_non_commercial=allow).lipsync(source, out, **options)


def learn_expression(name: str, source: Path | str, neutral: Path | str | None = None) -> Custom:
    """The expression in a photo or a clip of a person, relative to a `neutral` one of the same person if there is any.

    Raises:
        NoFaceError, InputError, UsageError: as :func:`beavervision.expression.learn_custom`, or a file cannot be read.
    """
    rest = None if neutral is None else (face for _, face in _faces(neutral))
    return learn_custom(name, (face for _, face in _faces(source)), rest)


def learn_style(source: Path | str) -> Style:
    """The manner of a speaker from a clip of four seconds or more.

    Raises:
        NoFaceError: a face is seen for less.
        InputError: the file cannot be read, or is a still.
    """
    info = probe(source)
    if info.kind == "still":
        raise MediaError(f"{source} is a still: a manner shows in motion alone. Use a video.")
    return Style.learn((face for _, face in _faces(source)), info.rate)


def _faces(source: Path | str) -> Iterator[tuple[Picture, Face | None]]:
    """The pictures of a file, at most its first five minutes, with the largest face in each."""
    info = probe(source)
    count = 1 if info.kind == "still" else int(_LEARN_S * info.rate)
    with closing(_pictures(info)) as pictures:
        clips = (
            Clip(Frames((picture,), number, info.rate))
            for number, picture in enumerate(itertools.islice(pictures, count))
        )
        for clip in Detect(FaceNets(), look_ahead=0)(clips):
            assert clip.track is not None
            yield clip.frames.pictures[0], clip.track.faces[0]


def _style(style: Path | str | Mapping[str, Any]) -> Style:
    return Style.of(style) if isinstance(style, Mapping) else Style.read(Path(style))


def _unmarked(cues: Sequence[Cue], script: Script, note: Callable[[str], None]) -> tuple[list[Cue], Marked]:
    """The cues without their marks. A cue of marks alone is not spoken: they hold from its time on."""
    plain: list[Cue] = []
    parts: list[Marked] = []
    for cue in cues:
        part = Marked.of(cue.text, script.custom, strict=False)
        for left in part.left:
            note(f"{left} in the subtitles is no expression that is known, and is spoken.")
        if part.marks:
            script.expect()
        if part.marks and not part.text.strip():
            for _, wanted in part.marks:
                script.mark(cue.start_ms / 1000, wanted)
            continue
        parts.append(part)
        plain.append(replace(cue, text=part.text))
    return plain, Marked.joined(parts)


# Lip-sync models ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a run asks of the drawing, where the model knows of such a thing.

    `amplitude`, that of another speaker, replaces the person's own. `alone` says that nobody but the chosen one will be seen.
    `boxes` and `whole_box` are as for :class:`Wav2LipSync`.
    """

    amplitude: float | None = None
    alone: bool = False
    boxes: FaceBoxes | None = None
    whole_box: bool = False


_AS_USUAL = _Asked()


class _Model:
    """A loaded lip-sync model: what it must hear, and its stage for a source that was looked at."""

    card: ModelCard
    front_end: str
    timing: Timing
    row_ahead_ms: float  # from a picture's time to the middle of the last feature row that it needs, at most
    net: MicroBatcher  # the network that runs share
    device: str
    seams: bool  # whether what it draws differs from the picture at the mask's edge
    boxed = False  # whether it draws within the upright box of a face

    def stage(self, seen: Survey, asked: _Asked = _AS_USUAL) -> Stage:
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        hashes = {name: data_hashes()[name] for name in self.card.files}
        return {
            "name": self.card.name,
            "licence_weights": self.card.licence_weights,
            "sha256": hashes or self.card.sha256,
        }


class _Beaver(_Model):
    card = BEAVER
    row_ahead_ms = LAST_ROW_MS + 2.5  # a picture takes the nearest of rows each 5 ms
    front_end = LOG_MEL_DENSE.name
    seams = False

    def __init__(self, name: str, device: str, threads: int, data_dir: Path, allow_non_commercial: bool) -> None:
        self.device = device
        self._files = load_beaver(device, threads=threads)
        self.timing = self._files.timing
        self.net = _shared(self._files.painter, "painter")

    def stage(self, seen: Survey, asked: _Asked = _AS_USUAL) -> Stage:
        files = self._files
        profile = profile_of(seen.references, files.basis, asked.amplitude)
        if asked.alone:
            profile = replace(profile, looks=None)
        return BeaverSync(files.motion, self.net, files.basis, profile, asked.amplitude)


class _Imported(_Model):
    """A Wav2Lip checkpoint of the user's."""

    front_end = Wav2LipSync.front_end
    row_ahead_ms = 15 * 12.5
    seams = True
    boxed = True

    def __init__(self, name: str, device: str, threads: int, data_dir: Path, allow_non_commercial: bool) -> None:
        self.device = device
        store = ModelStore(data_dir)
        net = store.open(name, allow_non_commercial=allow_non_commercial, device=device, threads=threads)
        self.card = store.get(name).card
        assert Wav2LipSync.timing is not None
        self.timing = Wav2LipSync.timing
        self.net = _shared(net, name)

    def stage(self, seen: Survey, asked: _Asked = _AS_USUAL) -> Stage:
        return Wav2LipSync(self.net, boxes=asked.boxes, whole_box=asked.whole_box)


class _Replicas:
    """One model on several devices: each run draws on the one with the fewest runs, from its first clip to its last."""

    def __init__(self, models: Sequence[_Model]) -> None:
        self._models = tuple(models)
        self._runs = [0] * len(self._models)
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[_Model]:
        return iter(self._models)

    @property
    def first(self) -> _Model:
        return self._models[0]

    def stage(self, seen: Survey, asked: _Asked = _AS_USUAL) -> Stage:
        """As :meth:`_Model.stage`, on a device that is chosen when the clips begin to come."""

        def draw(clips: Iterator[Clip]) -> Iterator[Clip]:
            with self._lock:
                which = self._runs.index(min(self._runs))
                self._runs[which] += 1
            try:
                yield from self._models[which].stage(seen, asked)(clips)
            finally:
                with self._lock:
                    self._runs[which] -= 1

        return _Named("lipsync", draw)


def _shared(net: Net, name: str) -> MicroBatcher:
    return MicroBatcher(net, _SHARED_BATCH, _SHARED_DEADLINE_MS, name=name)


_MODELS: dict[str, type[_Beaver]] = {BEAVER.name: _Beaver}


# What is said ------------------------------------------------------------------------------------


def _begun(blocks: Iterator[Audio]) -> Iterator[Audio]:
    """`blocks`, the first of which is made from now on in a thread: a voice is loaded while the source is looked at."""
    making = ThreadPoolExecutor(1, "speech")
    first = making.submit(next, blocks, None)
    making.shutdown(wait=False)

    def all_of_them() -> Iterator[Audio]:
        block = first.result()
        if block is not None:
            yield block
            yield from blocks

    return all_of_them()


class _Words:
    """The sound of a run: blocks as the flow asks for them, and how much of it is known."""

    rate_hz: int
    channels: int

    def __init__(self) -> None:
        self._samples: int | None = None

    def blocks(self) -> Iterator[Audio]:
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        raise NotImplementedError

    def notes(self) -> tuple[str, ...]:
        """What a user should know of the sound, once it has all been heard."""
        return ()

    def pictures(self, rate: Fraction) -> int | None:
        """How many pictures the sound needs: estimated while it is synthesised, None while nothing is known."""
        samples = self._estimate() if self._samples is None else self._samples
        return None if samples is None else pictures_for(samples, rate, self.rate_hz)

    def _estimate(self) -> int | None:
        return None


class _Recorded(_Words):
    def __init__(
        self, path: Path, phones: tuple[Phone, ...], note: Callable[[str], None], *, mixed: bool = False
    ) -> None:
        """`mixed` says that other sound will be mixed in, which can be done with one or two channels."""
        super().__init__()
        self._path = path
        self._phones = phones
        self._stream = stream = audio_info(path)
        self._stereo = stream.channels > 2 and (mixed or stream.layout not in LAYOUTS)
        self.rate_hz, self.channels = stream.rate_hz, 2 if self._stereo else stream.channels
        if self._stereo:
            why = "to go with the source's own" if stream.layout in LAYOUTS else "for few players know such sound"
            note(f"The sound has {stream.channels} channels; it is mixed to stereo, {why}.")
        if stream.duration is not None:
            self._samples = int(stream.duration * stream.rate_hz)

    def blocks(self) -> Iterator[Audio]:
        samples = told = 0
        for block in read_audio(self._path, stereo=self._stereo):
            samples += block.samples
            ends_ms = samples * 1000 / block.rate_hz
            first = told
            told = bisect_left(self._phones, ends_ms, first, key=lambda phone: phone.start_ms)
            yield replace(block, phones=self._phones[first:told])
        self._samples = samples

    def facts(self) -> dict[str, Any]:
        seconds = None if self._samples is None else round(self._samples / self.rate_hz, 3)
        return {
            "kind": "audio",
            "path": str(self._path),
            "phones": len(self._phones),
            "seconds": seconds,
            "rate_hz": self.rate_hz,
            "channels": self._stream.channels,
        }


class _Synthetic(_Words):
    rate_hz = SPEECH_HZ
    channels = 1

    def __init__(
        self,
        kind: str,
        chunks: Iterator[SpeechChunk],
        facts: dict[str, Any],
        note: Callable[[str], None],
        *,
        characters: int = 0,
        until_ms: int = 0,
        cues: list[CueReport] | None = None,
        speed: float = 1.0,
    ) -> None:
        """`characters` (of a text) or `until_ms` (of subtitles) serve the estimate of the length; `speed` is what was asked for."""
        super().__init__()
        self._kind = kind
        self._chunks = chunks
        self._facts = facts
        self._note = note
        self._characters = characters
        self._until_ms = until_ms
        self._cues = cues
        self._speed = speed
        self._said = (0, 0.0)  # characters, seconds

    def blocks(self) -> Iterator[Audio]:
        samples = 0
        for block in resample(self._audio(), SPEECH_HZ):
            samples += block.samples
            yield block
        self._samples = samples

    def _audio(self) -> Iterator[Audio]:
        for chunk in self._chunks:
            if chunk.dropped:
                self._note(f"The voice cannot say {chunk.dropped!r}; left out.")
            characters, seconds = self._said
            self._said = (characters + len(chunk.text), seconds + chunk.audio.seconds)
            yield chunk.audio

    def _estimate(self) -> int | None:
        characters, seconds = self._said
        if self._until_ms:
            seconds = max(seconds, self._until_ms / 1000)
        elif characters:
            seconds *= max(1.0, self._characters / characters)
        return round(seconds * self.rate_hz) or None

    def facts(self) -> dict[str, Any]:
        seconds = None if self._samples is None else round(self._samples / self.rate_hz, 3)
        facts = {"kind": self._kind, **self._facts, "seconds": seconds}
        if self._cues is not None:
            names = CueReport.__slots__
            facts["cues"] = [{name: getattr(cue, name) for name in names} for cue in self._cues]
        return facts

    def notes(self) -> tuple[str, ...]:
        cues = self._cues or []
        long = [cue for cue in cues if cue.overrun_ms]
        if not long:
            return ()
        worst = max(long, key=lambda cue: cue.overrun_ms)
        sped_up = sum(cue.speed > self._speed for cue in long)
        which = "they were" if sped_up == len(long) else f"{sped_up} of them {'was' if sped_up == 1 else 'were'}"
        although = f", although {which} sped up" if sped_up else ""
        return (
            f"{len(long)} of {len(cues)} cues end after their time{although}: cue {worst.index} by "
            f"{worst.overrun_ms / 1000:.1f} s. Shorten their text; the report has all of them.",
        )


def _expected(fit: Fit, info: SourceInfo, words: _Words) -> int | None:
    """How many pictures a run will have, as far as that is known."""
    said = words.pictures(info.rate)
    if fit in ("loop", "freeze") or info.frames is None:
        return said
    return info.frames if fit == "keep" or said is None else min(said, info.frames)


def _background(info: SourceInfo, words: _Words, note: Callable[[str], None]) -> Iterator[Audio] | None:
    if not info.has_audio:
        note("The source has no sound of its own to keep.")
        return None
    return resample(read_audio(info.path, stereo=True), words.rate_hz, words.channels)


# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Named:
    """A function as a stage."""

    name: str
    run: Callable[[Iterator[Clip]], Iterator[Clip]]

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        return self.run(clips)


def _pictures(info: SourceInfo) -> Generator[Picture, None, None]:
    for clip in Decode(1, extend="none")(info):
        yield from clip.frames.pictures


def _source_facts(info: SourceInfo) -> dict[str, Any]:
    return {
        "path": str(info.path),
        "kind": info.kind,
        "codec": info.codec,
        "size_px": [info.width_px, info.height_px],
        "rate": str(info.rate),
        "rate_note": info.rate_note,
        "rotation_deg": info.rotation_deg,
        "frames": info.frames,
        "audio_streams": len(info.audio),
    }
