"""The command line: ``beavervision COMMAND``.

Results go to standard output, progress and errors to standard error. With ``--json`` a command prints one JSON document on
standard output and nothing else there, for an error too: ``{"error": {"code": ..., "message": ...}}``. Exit codes are those
of :mod:`beavervision.errors`.

What loads codecs or networks is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beavervision.errors import (
    BeaverVisionError,
    DeviceError,
    InputError,
    Interrupted,
    OutputError,
    TextError,
    UsageError,
)
from beavervision.files import check_apart, check_place, unreadable, write_json
from beavervision.settings import Settings

if TYPE_CHECKING:
    from rich.console import RenderableType

    from beavervision.evaluate.plots import Panel
    from beavervision.models.cards import ModelCard
    from beavervision.pipeline import Report
    from beavervision.speech import SpeechChunk

_TEXT_BYTES = 1 << 20  # of a text file; a voice refuses less
_FILE_COLUMNS = 160  # of a table that no terminal shows
_LINE_S = 10  # between two lines of progress where there is no terminal
_SIGPIPE_EXIT = 128 + 13
# Its base class for wrong options, whichever version of click it brings.
_ClickError: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    name="beavervision",
    help="Give a face speech: text or sound plus a face in, a video of that face saying it out.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models_app = typer.Typer(help="List the models with their licences and hashes; add or remove your own.")
app.add_typer(models_app, name="models")
expression_app = typer.Typer(help="List the expressions; record, share or remove your own.")
app.add_typer(expression_app, name="expression")
style_app = typer.Typer(help="Learn a speaker's manner from a clip.", no_args_is_help=True)
app.add_typer(style_app, name="style")
evaluate_app = typer.Typer(help="Measure how well mouths follow, speak and look.", no_args_is_help=True)
app.add_typer(evaluate_app, name="evaluate")

# Options that several commands share -------------------------------------------------------------

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Voice = Annotated[str | None, typer.Option(help="A voice, as `beavervision voices` lists them.")]
Language = Annotated[str | None, typer.Option(help="The language of the text, such as en-us or fr.")]
Speed = Annotated[float, typer.Option(help="How fast to speak: a factor from 0.5 to 2.")]
Pitch = Annotated[float, typer.Option(help="How high to speak: a factor from 0.5 to 2.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same voice, to the sample.")]
Model = Annotated[str | None, typer.Option(help="The lip-sync model, as `beavervision models` lists them.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda:0, or several with commas between.")]
NonCommercial = Annotated[
    bool, typer.Option("--allow-non-commercial", help="My use is not commercial: run models that forbid such use.")
]
Plot = Annotated[Path | None, typer.Option(help="Draw the measures into this PNG file.")]
Preset = Annotated[str | None, typer.Option(help="Speed of the H.264 encoder, from ultrafast to veryslow.")]


def _print_version(asked: bool) -> None:
    if asked:
        try:
            print(f"beavervision {metadata.version('beavervision')}")
        except metadata.PackageNotFoundError:
            print("beavervision, not installed")
        raise typer.Exit


@app.callback()
def _beavervision(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    pass  # the first is done by its callback, the second by main()


# Commands ----------------------------------------------------------------------------------------


@app.command()
def lipsync(
    source: Annotated[Path, typer.Argument(metavar="FACE", help="A video or a picture of the face.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The video to write: mp4, mov, mkv or webm.")],
    text: Annotated[str | None, typer.Option(help="What to say.")] = None,
    text_file: Annotated[Path | None, typer.Option(help="A text file (UTF-8) to say; - is standard input.")] = None,
    audio: Annotated[Path | None, typer.Option(help="Recorded speech to follow: a sound file or a video.")] = None,
    phones: Annotated[
        Path | None,
        typer.Option(
            help="The times of the speech sounds in --audio, a JSON file as `beavervision say --phones` writes it, which the lips "
            "of the default model then follow. A text's are known."
        ),
    ] = None,
    subtitles: Annotated[Path | None, typer.Option(help="Subtitles (SRT or WebVTT) to say, each at its time.")] = None,
    voice: Voice = None,
    language: Language = None,
    speed: Speed = 1.0,
    pitch: Pitch = 1.0,
    seed: Seed = 0,
    model: Model = None,
    fit: Annotated[
        str,
        typer.Option(
            help="If picture and sound differ in length: loop plays a short picture back and forth, freeze holds its last "
            "frame, trim ends with the shorter of the two, keep keeps the picture's length."
        ),
    ] = "loop",
    face: Annotated[
        str, typer.Option(help="Which face: largest, speaker, left, right, center, a number from 0 (left), or x,y.")
    ] = "largest",
    keep_audio: Annotated[
        float, typer.Option(help="How loud to mix in the source's own sound: a level from 0 to 1.")
    ] = 0.0,
    mark: Annotated[
        bool, typer.Option("--mark", help="Say in a corner of the pictures that they are synthetic.")
    ] = False,
    expression: Annotated[
        str | None,
        typer.Option(
            help="What to express: happy:0.6, mouthSmile:0.4,browInnerUp:0.2 or auto; `beavervision expression list` has all "
            "names. Marks in the text, [happy] Great news, change it on the way."
        ),
    ] = None,
    expression_track: Annotated[Path | None, typer.Option(help="Keyframes of expressions to add: a JSON file.")] = None,
    style: Annotated[
        Path | None, typer.Option(help="The manner of another speaker, as `beavervision style learn` writes it.")
    ] = None,
    alive: Annotated[
        bool | None,
        typer.Option(
            "--alive/--frozen",
            help="Let the face blink, breathe and stress words unasked, or not. By default stills alone do.",
        ),
    ] = None,
    restore: Annotated[
        str | None, typer.Option(help="A face restorer to run over the pictures: one that `models add` imported.")
    ] = None,
    restore_area: Annotated[str, typer.Option(help="Where its detail shows: mouth or face.")] = "mouth",
    boxes: Annotated[
        str | None,
        typer.Option(
            help="For a Wav2Lip checkpoint: take the boxes of faces from the S3FD detector that `models add` imported under "
            "this name, as published. By default they are the face mesh's."
        ),
    ] = None,
    whole_box: Annotated[
        bool,
        typer.Option(
            "--whole-box",
            help="For a Wav2Lip checkpoint: paste the whole box with hard edges, as published, instead of the lower face.",
        ),
    ] = False,
    device: Device = None,
    allow_non_commercial: NonCommercial = False,
    preset: Preset = None,
    crf: Annotated[int | None, typer.Option(help="Quality of the video: 0 is best, 51 worst.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write what was done, and how fast, to this JSON file.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="Write a contact sheet of the result to this PNG file.")] = None,
    as_json: JsonFlag = False,
    quiet: Quiet = False,
) -> None:
    """Make a face say a text, subtitles or recorded speech."""
    words = {"--text": text, "--text-file": text_file, "--audio": audio, "--subtitles": subtitles}
    given = [name for name, value in words.items() if value is not None]
    if len(given) != 1:
        raise UsageError(
            f"Say what to speak: exactly one of {', '.join(words)}"
            + (f", not {' and '.join(given)}." if given else ".")
        )
    check_apart([source, text_file, audio, phones, subtitles, expression_track, style], [out, report, sheet])
    _check_places(report, sheet)
    settings = Settings.load()
    settings = replace(settings, preset=preset or settings.preset, crf=settings.crf if crf is None else crf)
    if text_file is not None:
        text = _read_text(text_file)

    from beavervision.pipeline import Pipeline

    pipeline = Pipeline(model, device=device, allow_non_commercial=allow_non_commercial, settings=settings)
    with _progress(quiet) as told:
        done = pipeline.lipsync(
            source,
            out,
            text=text,
            audio=audio,
            phones=phones,
            subtitles=subtitles,
            voice=voice,
            language=language,
            speed=speed,
            pitch=pitch,
            seed=seed,
            fit=fit,  # type: ignore[arg-type]  # checked there
            face=face,
            keep_audio=keep_audio,
            mark=mark,
            expression=expression,
            expression_track=expression_track,
            style=style,
            alive=alive,
            restore=restore,
            restore_area=restore_area,  # type: ignore[arg-type]  # checked there
            boxes=boxes,
            whole_box=whole_box,
            sheet=sheet,
            on_progress=told,
        )
    if report is not None:
        write_json(report, done.as_dict())
    _show(as_json, done.as_dict(), _told_of(done))


@app.command()
def say(
    text: Annotated[str, typer.Argument(help="What to say; - reads standard input.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The WAV file to write.")],
    phones: Annotated[Path | None, typer.Option(help="Write the times of the speech sounds to this JSON file.")] = None,
    voice: Voice = None,
    language: Language = None,
    speed: Speed = 1.0,
    pitch: Pitch = 1.0,
    seed: Seed = 0,
    as_json: JsonFlag = False,
) -> None:
    """Speak a text into a sound file; marks of expressions in it are left out."""
    if out.suffix.lower() != ".wav":
        raise UsageError(f"{out}: speech is written as WAV; name it with .wav.")
    check_apart([], [out, phones])
    _check_places(out, phones)
    if text == "-":
        text = _read_text(Path("-"))

    from beavervision.expression import ExpressionStore, Marked
    from beavervision.speech import Speaker, write_wav

    settings = Settings.load()
    text = Marked.of(text, ExpressionStore(settings.data_dir).looks()).text
    speaker = Speaker(voices_dir=settings.voices_dir)
    chosen = speaker.voice(*settings.voice_for(voice, language))
    made: list[dict[str, Any]] = []
    dropped: list[str] = []

    def noted(chunks: Iterator[SpeechChunk]) -> Iterator[SpeechChunk]:
        for chunk in chunks:
            made.extend(asdict(phone) for phone in chunk.phones)
            dropped.extend(chunk.dropped)
            yield chunk

    samples = write_wav(noted(speaker.speak(text, voice=chosen.name, speed=speed, pitch=pitch, seed=seed)), out)
    facts = {
        "path": str(out),
        "voice": chosen.name,
        "language": chosen.language,
        "licence": chosen.licence,
        "rate_hz": chosen.rate_hz,
        "samples": samples,
        "seconds": round(samples / chosen.rate_hz, 3),
        "left_out": "".join(dict.fromkeys(dropped)),
        "timing": chosen.timing.value,
    }
    if phones is not None:
        write_json(phones, {**facts, "phones": made})
    lines = [f"{out}: {facts['seconds']} s, voice {chosen.name} ({chosen.language})"]
    if dropped:
        lines.append(f"Note: the voice cannot say {facts['left_out']!r}; left out.")
    _show(as_json, facts, lines)


@app.command()
def voices(
    language: Annotated[str | None, typer.Option(help="Only voices of this language, such as en or pt-br.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the voices, and what those need that do not work here."""
    from beavervision.speech import Speaker

    speaker = Speaker(voices_dir=Settings.load().voices_dir)
    tag = (language or "").lower().replace("_", "-")
    found = [v for v in speaker.voices() if not tag or v.language == tag or v.language.startswith(f"{tag}-")]
    missing = speaker.missing()
    rows = [(v.name, v.language, v.engine, v.gender, v.licence, "needs more" if v.unavailable else "ok") for v in found]
    lines = _table(("voice", "language", "engine", "gender", "licence", "state"), rows)
    lines += dict.fromkeys(f"{v.engine}: {v.unavailable}" for v in found if v.unavailable and v.engine not in missing)
    lines += [f"{engine}: {reason}" for engine, reason in missing.items()]
    if not found:
        lines = [f"There is no voice for {language!r} here.", *lines[1:]]
    _show(as_json, {"voices": [asdict(v) for v in found], "missing": missing}, lines)


@models_app.callback(invoke_without_command=True)
def models(context: typer.Context, as_json: JsonFlag = False) -> None:
    """List the models with their licences and hashes; add or remove your own."""
    if context.invoked_subcommand is not None:
        return
    from beavervision.models.cards import CARDS
    from beavervision.models.store import ModelStore

    settings = Settings.load()
    stored = ModelStore(settings.data_dir).list()
    facts = [{**_card_facts(card), "imported": None} for card in CARDS]
    facts += [{**_card_facts(m.card), "imported": m.imported, "folder": str(m.folder)} for m in stored]
    rows = [
        (
            fact["name"],
            fact["kind"],
            fact["licence_weights"],
            "imported" if fact["imported"] else "not bundled" if "Not bundled" in fact["summary"] else "ok",
            (fact["sha256"] or next(iter(fact["files"].values()), ""))[:12],
            fact["summary"],
        )
        for fact in facts
    ]
    _show(as_json, {"models": facts}, _table(("model", "kind", "licence", "state", "sha256", ""), rows))


@models_app.command("add")
def models_add(
    file: Annotated[
        Path, typer.Argument(help="A checkpoint (.pth or .safetensors) of Wav2Lip, S3FD or a face restorer.")
    ],
    name: Annotated[str | None, typer.Option(help="What to call it; by default as the file.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Import a checkpoint of your own. No code in it is run; needs the extra gpu, for a face restorer the extra restore."""
    from beavervision.models.store import ModelStore, use_of

    stored = ModelStore(Settings.load().data_dir).add(file, name)
    facts = {**_card_facts(stored.card), "imported": stored.imported, "folder": str(stored.folder)}
    use = " --allow-non-commercial" if stored.card.non_commercial else ""
    lines = [
        f"{stored.card.name} is imported into {stored.folder}. Its licence: {stored.card.licence_weights}.",
        f"Use it with: {use_of(stored.card)}{use}",
    ]
    _show(as_json, facts, lines)


@models_app.command("remove")
def models_remove(
    name: Annotated[str, typer.Argument(help="An imported model.")],
    as_json: JsonFlag = False,
) -> None:
    """Delete an imported model."""
    from beavervision.models.store import ModelStore

    ModelStore(Settings.load().data_dir).remove(name)
    _show(as_json, {"removed": name}, [f"{name} is removed."])


@expression_app.callback(invoke_without_command=True)
def expressions(context: typer.Context, as_json: JsonFlag = False) -> None:
    """List the expressions; record, share or remove your own."""
    if context.invoked_subcommand is None:
        expression_list(as_json)


@expression_app.command("list")
def expression_list(as_json: JsonFlag = False) -> None:
    """List all names that --expression and marks take."""
    from beavervision.expression import ExpressionStore, known

    names = known(ExpressionStore(Settings.load().data_dir).looks())
    rows = [(k.name, k.kind, f"{k.low:g} to {k.high:g}", k.summary) for k in names]
    _show(as_json, {"expressions": [asdict(k) for k in names]}, _table(("name", "kind", "numbers", ""), rows))


@expression_app.command("learn")
def expression_learn(
    source: Annotated[Path, typer.Argument(metavar="FACE", help="A photo or a clip of the expression.")],
    name: Annotated[str, typer.Option(help="What to call it.")],
    neutral: Annotated[Path | None, typer.Option(help="A photo or a clip of the same person, unmoved.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Record an expression of your own from a photo or a clip."""
    from beavervision.expression import ExpressionStore
    from beavervision.pipeline import learn_expression

    made = learn_expression(name, source, neutral)
    path = ExpressionStore(Settings.load().data_dir).add(made)
    strongest = sorted(made.controls.items(), key=lambda item: -abs(item[1]))[:6]
    lines = [
        f"{name} is kept in {path}: " + ", ".join(f"{control} {value:+.2f}" for control, value in strongest),
        f"Use it with: --expression {name}:1",
    ]
    _show(as_json, {**made.as_dict(), "path": str(path)}, lines)


@expression_app.command("show")
def expression_show(name: Annotated[str, typer.Argument(help="An expression of yours.")]) -> None:
    """Print an expression of yours as JSON: its file, to share."""
    from beavervision.expression import ExpressionStore

    _show(True, ExpressionStore(Settings.load().data_dir).get(name).as_dict(), [])


@expression_app.command("import")
def expression_import(
    file: Annotated[Path, typer.Argument(help="The JSON file of an expression that somebody shared.")],
    name: Annotated[str | None, typer.Option(help="What to call it; by default as in the file.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Keep an expression that somebody shared."""
    from beavervision.expression import ExpressionStore

    made = ExpressionStore(Settings.load().data_dir).load(file, name)
    _show(as_json, made.as_dict(), [f"{made.name} is kept. Use it with: --expression {made.name}:1"])


@expression_app.command("remove")
def expression_remove(
    name: Annotated[str, typer.Argument(help="An expression of yours.")], as_json: JsonFlag = False
) -> None:
    """Delete an expression of yours."""
    from beavervision.expression import ExpressionStore

    ExpressionStore(Settings.load().data_dir).remove(name)
    _show(as_json, {"removed": name}, [f"{name} is removed."])


@style_app.command("learn")
def style_learn(
    clip: Annotated[Path, typer.Argument(metavar="CLIP", help="A video of a speaker, four seconds or more.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The JSON file to write.")],
    as_json: JsonFlag = False,
) -> None:
    """Learn a speaker's manner: how far the mouth moves, the face at rest, brows, blinks and head."""
    check_apart([clip], [out])
    _check_places(out)
    from beavervision.pipeline import learn_style

    made = learn_style(clip)
    made.write(out)
    manner = made.manner
    lines = [
        f"{out}: mouth {made.amplitude:.2f}, brows {manner.brows:.2f}, {manner.blinks_per_min:.0f} blinks a minute, head "
        + "/".join(f"{value:.1f}" for value in manner.sway_deg)
        + " degrees",
        f"Use it with: --style {out}",
    ]
    _show(as_json, made.as_dict(), lines)


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Try everything on this machine: what works, what does not, and what to do about it."""
    from beavervision.evaluate.doctor import checkup

    rows = []
    for check in checkup(Settings.load()):
        rows.append(check)
        if not as_json:
            print(f"{check.state:8} {check.name:16} {check.detail}", flush=True)
            if check.remedy:
                print(f"{'':25} {check.remedy}", flush=True)
    broken = any(check.state == "broken" for check in rows)
    verdict = "Something that is needed is broken: see above." if broken else "Everything that is needed works."
    _show(as_json, {"works": not broken, "checks": [asdict(check) for check in rows]}, [verdict])
    if broken:
        raise typer.Exit(5)


@app.command()
def bench(
    source: Annotated[Path | None, typer.Option(help="A video with a face, instead of one made for it.")] = None,
    seconds: Annotated[float, typer.Option(help="Length of the video to make for it.")] = 10,
    size: Annotated[str, typer.Option(help="Its size: 360p, 480p, 720p, 1080p or 2160p.")] = "720p",
    rate: Annotated[str, typer.Option(help="Its pictures a second, such as 25 or 30000/1001.")] = "25",
    preset: Preset = None,
    model: Model = None,
    device: Device = None,
    allow_non_commercial: NonCommercial = False,
    compare: Annotated[bool, typer.Option(help="Time the published Wav2Lip generator as well (needs PyTorch).")] = True,
    memory: Annotated[
        bool, typer.Option("--memory", help="Compare the peak memory of 1 and 10 minutes instead.")
    ] = False,
    as_json: JsonFlag = False,
    quiet: Quiet = False,
) -> None:
    """Measure the speed of the whole chain on this machine."""
    from beavervision.evaluate.bench import BenchReport, MemoryReport, compare_memory, format_table
    from beavervision.evaluate.bench import bench as measure

    measured: BenchReport | MemoryReport
    with _progress(quiet) as told:
        if memory:
            measured = compare_memory(size=size, rate=rate, preset=preset or "ultrafast", on_progress=told)
        else:
            measured = measure(
                source=source,
                seconds=seconds,
                size=size,
                rate=rate,
                preset=preset,
                model=model,
                device=device,
                allow_non_commercial=allow_non_commercial,
                compare=compare,
                on_progress=told,
            )
    _show(as_json, measured.as_dict(), format_table(measured))


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", "-o", help="The folder to write to.")] = Path("out"),
    text: Annotated[str | None, typer.Option(help="What to say instead of the demo's own sentence.")] = None,
    as_json: JsonFlag = False,
    quiet: Quiet = False,
) -> None:
    """Let the sample portrait speak: writes demo.mp4, demo.png (a contact sheet) and demo.json (a report)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error.strerror}. Name another folder with --out.") from error
    video, sheet, report = (folder / f"demo.{suffix}" for suffix in ("mp4", "png", "json"))
    _check_places(sheet, report)

    from beavervision.evaluate.samples import SENTENCE, portrait
    from beavervision.pipeline import Pipeline

    with portrait() as face, _progress(quiet) as told:
        done = Pipeline().lipsync(face, video, text=SENTENCE if text is None else text, sheet=sheet, on_progress=told)
    write_json(report, done.as_dict())
    lines = [*_told_of(done), f"The face over the video: {sheet}", f"What was done: {report}"]
    _show(as_json, {**done.as_dict(), "sheet": str(sheet), "report": str(report)}, lines)


@evaluate_app.command("follow")
def evaluate_follow(
    folder: Annotated[Path, typer.Argument(metavar="TALKERS_DIR", help="A folder of talkers with its index.tsv.")],
    split: Annotated[str, typer.Option(help="Which clips of the index.")] = "validate",
    limit: Annotated[int | None, typer.Option(help="So many clips only, spread over the index.")] = None,
    footage: Annotated[
        bool,
        typer.Option("--footage", help="Draw over each talker's footage, shifted by half its length, not a still."),
    ] = False,
    index_offsets: Annotated[
        bool, typer.Option("--index-offsets", help="Take the sound's offsets from the index; do not listen for them.")
    ] = False,
    model: Model = None,
    device: Device = None,
    allow_non_commercial: NonCommercial = False,
    plot: Plot = None,
    as_json: JsonFlag = False,
    quiet: Quiet = False,
) -> None:
    """Drive a still or the footage of each talker with their own sound, and compare with their own video."""
    from beavervision.evaluate.follow import follow, format_table, panels

    _check_plot(plot)
    measured = follow(
        folder,
        split,
        limit=limit,
        footage=footage,
        index_offsets=index_offsets,
        model=model,
        device=device,
        allow_non_commercial=allow_non_commercial,
        on_progress=None if quiet else _told_clip,
    )
    _plot(panels(measured), plot)
    _show(as_json, measured.as_dict(), format_table(measured))


@evaluate_app.command("quality")
def evaluate_quality(
    folder: Annotated[Path, typer.Argument(metavar="TALKERS_DIR", help="A folder of talkers with its index.tsv.")],
    split: Annotated[str, typer.Option(help="Which clips of the index.")] = "validate",
    limit: Annotated[int | None, typer.Option(help="So many clips only, spread over the index.")] = None,
    model: Model = None,
    device: Device = None,
    allow_non_commercial: NonCommercial = False,
    plot: Plot = None,
    as_json: JsonFlag = False,
    quiet: Quiet = False,
) -> None:
    """Dub each talker's own footage with their own sound: every measure and one score, real video beside it."""
    from beavervision.evaluate.table import format_table, panels, table

    _check_plot(plot)
    measured = table(
        folder,
        split,
        limit=limit,
        model=model,
        device=device,
        allow_non_commercial=allow_non_commercial,
        on_progress=None if quiet else _told_clip,
    )
    _plot(panels(measured), plot)
    _show(as_json, measured.as_dict(), format_table(measured))


@evaluate_app.command("sheets")
def evaluate_sheets(
    folder: Annotated[Path, typer.Argument(metavar="TALKERS_DIR", help="A folder of talkers with its index.tsv.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write videos and contact sheets to.")],
    split: Annotated[str, typer.Option(help="Which clips of the index.")] = "validate",
    people: Annotated[int, typer.Option(help="So many people, spread over the index.")] = 12,
    text: Annotated[str | None, typer.Option(help="What they say; by default a text of all kinds of lips.")] = None,
    model: Model = None,
    device: Device = None,
    allow_non_commercial: NonCommercial = False,
    as_json: JsonFlag = False,
    quiet: Quiet = False,
) -> None:
    """Contact sheets to look at: each talker saying a synthetic text, and what another one really said."""
    from beavervision.evaluate.sheets import SENTENCE, format_table, sheets

    made = sheets(
        folder,
        out,
        split,
        people=people,
        text=SENTENCE if text is None else text,
        model=model,
        device=device,
        allow_non_commercial=allow_non_commercial,
        on_progress=None if quiet else _told_clip,
    )
    _show(as_json, made.as_dict(), format_table(made))


@evaluate_app.command("redraw")
def evaluate_redraw(
    folder: Annotated[Path, typer.Argument(metavar="TALKERS_DIR", help="A folder of talkers with its index.tsv.")],
    split: Annotated[str, typer.Option(help="Which clips of the index.")] = "validate",
    limit: Annotated[int | None, typer.Option(help="So many clips only, spread over the index.")] = None,
    plot: Plot = None,
    as_json: JsonFlag = False,
    quiet: Quiet = False,
) -> None:
    """Close each talker's mouth, give it back its real motion, and compare the pixels: the renderer of beaver alone."""
    from beavervision.evaluate.redraw import format_table, panels, redraw

    _check_plot(plot)
    measured = redraw(folder, split, limit=limit, on_progress=None if quiet else _told_clip)
    _plot(panels(measured), plot)
    _show(as_json, measured.as_dict(), format_table(measured))


@evaluate_app.command("articulation")
def evaluate_articulation(
    source: Annotated[Path, typer.Argument(metavar="FACE", help="A video or a picture of the face.")],
    voice: Voice = None,
    by_ear: Annotated[
        bool, typer.Option("--by-ear", help="Do not tell the model the speech sounds, as if the speech were recorded.")
    ] = False,
    seed: Seed = 0,
    model: Model = None,
    device: Device = None,
    allow_non_commercial: NonCommercial = False,
    plot: Plot = None,
    as_json: JsonFlag = False,
    quiet: Quiet = False,
) -> None:
    """Let a face speak eight sentences, and check its lips at each speech sound."""
    from beavervision.evaluate.articulation import articulation, format_table, panels
    from beavervision.pipeline import Pipeline

    _check_plot(plot, source)
    pipeline = Pipeline(model, device=device, allow_non_commercial=allow_non_commercial)
    with _progress(quiet) as told:
        measured = articulation(pipeline, source, voice=voice, by_ear=by_ear, seed=seed, on_progress=told)
    _plot(panels(measured), plot)
    _show(as_json, measured.as_dict(), format_table(measured))


@evaluate_app.command("sync")
def evaluate_sync(
    video: Annotated[Path, typer.Argument(metavar="VIDEO", help="A video with sound.")],
    plot: Plot = None,
    as_json: JsonFlag = False,
) -> None:
    """Offset and confidence of sound and lips, by the project's own scorer."""
    from beavervision.evaluate.sync import SyncJudge, format_table, panels

    _check_plot(plot, video)
    report = SyncJudge().judge(video)
    _plot(panels(report), plot)
    _show(as_json, report.as_dict(), format_table(report))


@evaluate_app.command("lse")
def evaluate_lse(
    video: Annotated[Path, typer.Argument(metavar="VIDEO", help="A video with sound.")],
    syncnet: Annotated[Path, typer.Option(help="The published weights, syncnet_v2.model. Needs the extra gpu.")],
    s3fd: Annotated[
        Path | None,
        typer.Option(
            help="The published face detector's weights, sfd_face.pth. Without them boxes are the face mesh's."
        ),
    ] = None,
    plot: Plot = None,
    as_json: JsonFlag = False,
    quiet: Quiet = False,
) -> None:
    """LSE-D, LSE-C and the offset of lips and sound, by SyncNet's published protocol."""
    from beavervision.engine.host import cores
    from beavervision.evaluate.lse import format_table, lse, panels

    _check_plot(plot, video)
    with _progress(quiet) as told:
        measured = lse(video, syncnet, s3fd, threads=Settings.load().threads or cores(), on_progress=told)
    _plot(panels(measured), plot)
    _show(as_json, measured.as_dict(), format_table(measured))


@evaluate_app.command("expression")
def evaluate_expression(
    folder: Annotated[Path, typer.Argument(metavar="TALKERS_DIR", help="A folder of talkers with its index.tsv.")],
    split: Annotated[str, typer.Option(help="Which clips of the index.")] = "validate",
    people: Annotated[int, typer.Option(help="So many people, spread over the index.")] = 12,
    talking: Annotated[int, typer.Option(help="So many of them talk with each preset.")] = 4,
    as_json: JsonFlag = False,
    quiet: Quiet = False,
) -> None:
    """Ask faces for expressions, and look whether they show, keep the speech, and stay steady."""
    from beavervision.evaluate.expression import evaluate_expression as measure
    from beavervision.evaluate.expression import format_table

    def told(done: int, total: int, file: str) -> None:
        print(f"{done} of {total}; now {file}", file=sys.stderr, flush=True)

    measured = measure(folder, split, people=people, talking=talking, on_progress=None if quiet else told)
    _show(as_json, measured.as_dict(), format_table(measured))


@evaluate_app.command("sharpness")
def evaluate_sharpness(
    folder: Annotated[Path, typer.Argument(metavar="TALKERS_DIR", help="A folder of talkers with its index.tsv.")],
    split: Annotated[str, typer.Option(help="Which clips of the index.")] = "validate",
    limit: Annotated[int, typer.Option(help="So many clips for each size of the face: those with the largest.")] = 6,
    as_json: JsonFlag = False,
    quiet: Quiet = False,
) -> None:
    """Is the drawn mouth as sharp as the face around it, at faces of 120, 250 and 500 pixels?"""
    from beavervision.evaluate.sharpness import format_table, sharpness

    measured = sharpness(folder, split, limit=limit, on_progress=None if quiet else _told_clip)
    _show(as_json, measured.as_dict(), format_table(measured))


@evaluate_app.command("compare")
def evaluate_compare(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="The video made.")],
    truth: Annotated[Path, typer.Argument(metavar="TRUTH", help="The real video of the same words.")],
    plot: Plot = None,
    as_json: JsonFlag = False,
    quiet: Quiet = False,
) -> None:
    """Hold the mouth of a video against that of a real one of the same words."""
    from beavervision.evaluate.quality import compare, format_table, panels, quality

    _check_plot(plot, result, truth)
    with _progress(quiet) as told:
        measured = compare(result, truth, on_progress=told)
    score = quality(measured)
    _plot(panels(measured), plot)
    _show(as_json, {**measured.as_dict(), "quality": score.as_dict()}, format_table(measured, score))


@evaluate_app.command("live")
def evaluate_live(
    face: Annotated[Path | None, typer.Argument(help="A video or picture; by default the sample portrait.")] = None,
    fps: Annotated[int, typer.Option(help="Pictures a second.")] = 25,
    size: Annotated[int, typer.Option(help="The longer side of the pictures.")] = 512,
    times: Annotated[int, typer.Option(help="How often something is said.")] = 20,
    interruptions: Annotated[int, typer.Option(help="How often it is interrupted.")] = 50,
    loads: Annotated[str, typer.Option(help="Sessions at once and their pictures a second, as 1x25,2x25,4x15.")] = "",
    seconds: Annotated[float, typer.Option(help="How long each of these goes on.")] = 20,
    minutes: Annotated[float, typer.Option(help="Of a long run of one session.")] = 0,
    browser: Annotated[
        bool,
        typer.Option(
            "--browser", help="Time what is said in a Chromium, too, and have it watch the long run (extra browser)."
        ),
    ] = False,
    as_json: JsonFlag = False,
    quiet: Quiet = False,
) -> None:
    """Measure live sessions: delays, barge-in, sessions at once, a long run. Needs the extra live."""
    from beavervision.evaluate.samples import portrait

    try:
        from beavervision.serve.live.bench import measure
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("beavervision"):
            raise
        raise UsageError(
            f"Live sessions need {error.name}, which is not installed: pip install 'beavervision[live]'."
        ) from error
    pairs = [part.strip().partition("x") for part in loads.split(",") if part.strip()]
    if not all(count.isdecimal() and rate.isdecimal() for count, _, rate in pairs):
        raise UsageError(f"--loads {loads}: write sessions x pictures a second, such as 1x25,2x25.")

    def told(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    with nullcontext(face) if face is not None else portrait() as path:
        report = measure(
            path,
            Settings.load(),
            fps=fps,
            size_px=size,
            times=times,
            interruptions=interruptions,
            sessions=tuple((int(count), int(rate)) for count, _, rate in pairs),
            seconds=seconds,
            minutes=minutes,
            browser=browser,
            on_progress=told,
        )
    _show(as_json, report.as_dict(), report.lines())


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="The address to listen on; by default this machine only.")] = None,
    port: Annotated[int | None, typer.Option(help="The port to listen on; 0 takes a free one.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that draw, each with one job at a time.")] = None,
    workers_max: Annotated[int | None, typer.Option(help="As many of them while jobs wait for one.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where jobs, uploads and results are kept.")] = None,
    new_key: Annotated[str | None, typer.Option(metavar="NAME", help="Make an API key, print it, and end.")] = None,
) -> None:
    """Run the service: a REST API with jobs that survive a crash. Needs the extra serve."""
    given: dict[str, Any] = {
        "serve_host": host,
        "serve_port": port,
        "serve_workers": workers,
        "serve_workers_max": workers_max,
        "serve_folder": folder,
    }
    settings = replace(Settings.load(), **{name: value for name, value in given.items() if value is not None})
    try:
        from beavervision.serve.access import add_key, key_file
        from beavervision.serve.server import serve as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("beavervision"):
            raise
        raise UsageError(
            f"The service needs {error.name}, which is not installed: pip install 'beavervision[serve]'."
        ) from error
    if new_key is not None:
        print(add_key(key_file(settings), new_key))
    else:
        run(settings)


@app.command()
def loadtest(
    url: Annotated[
        str | None, typer.Argument(metavar="URL", help="The service, such as http://127.0.0.1:8000.")
    ] = None,
    start: Annotated[bool, typer.Option("--start", help="Start a service of its own on this machine instead.")] = False,
    workers: Annotated[int | None, typer.Option(help="With --start: processes that draw.")] = None,
    users: Annotated[str, typer.Option(help="How many users at once, one number after another.")] = "1,5,10,20",
    seconds: Annotated[float, typer.Option(help="How long each scenario goes on, for each number of users.")] = 30,
    scenario: Annotated[
        list[str] | None,
        typer.Option(help="single_user_continuous, multi_user_concurrent, peak_load or recovery; by default all."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="What each job says; by default a sentence of two seconds.")] = None,
    face: Annotated[Path | None, typer.Option(help="The face of each job; by default the sample portrait.")] = None,
    key: Annotated[Path | None, typer.Option(help="A file with the API key to send.")] = None,
    as_json: JsonFlag = False,
    quiet: Quiet = False,
) -> None:
    """Try a service with many users: availability, success, response time, latency, pictures a second, memory.

    Exit code 1 says that a request failed.
    """
    from beavervision.evaluate.samples import portrait
    from beavervision.serve.loadtest import SCENARIOS, SENTENCE, Plan, format_table, own_service
    from beavervision.serve.loadtest import loadtest as run

    if (url is None) != start or (workers is not None and not start):
        raise UsageError("Give the address of a service, or --start (and then --workers) for one of its own.")
    if not all(number.strip().isdecimal() for number in users.split(",")):
        raise UsageError(f"--users {users}: give numbers with commas between, such as 1,5,10,20.")
    plan = Plan(
        users=tuple(int(number) for number in users.split(",")),
        seconds=seconds,
        scenarios=SCENARIOS if not scenario else tuple(scenario),
        text=SENTENCE if text is None else text,
    )

    def told(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        secret = None if key is None else key.read_text(encoding="utf-8").strip()
        with nullcontext(face) if face is not None else portrait() as path:
            picture = path.read_bytes()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{face or key} cannot be read: {error}. Check the name and the rights.") from error
    with own_service(workers) if start else nullcontext(url) as address:
        measured = run(str(address), picture, plan, key=secret, on_progress=None if quiet else told)
    _show(as_json, measured.as_dict(), format_table(measured))
    if measured.failed:
        raise typer.Exit(1)


# What commands share -----------------------------------------------------------------------------


def _show(as_json: bool, document: Mapping[str, Any], human: Sequence[str] | RenderableType) -> None:
    if as_json:
        print(json.dumps(document, indent=2, allow_nan=False))
    elif isinstance(human, Sequence) and not isinstance(human, str):
        for line in human:
            print(line)
    else:
        from rich.console import Console

        wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
        Console(width=_FILE_COLUMNS if wide else None).print(human)


def _told_of(report: Report) -> list[str]:
    output, times = report.output, report.times
    width, height = output["size_px"]
    lines = [
        f"{output['path']}: {output['seconds']} s, {output['pictures']} pictures of {width}x{height}, "
        f"made in {times['elapsed_ms'] / 1e3:.1f} s ({times['pictures_per_s']:.1f} a second)"
    ]
    left = {state: count for state, count in report.track["pictures"].items() if count and state != "ok"}
    if left:
        lines.append("Pictures left as they were: " + ", ".join(f"{count} {state}" for state, count in left.items()))
    return [*lines, *(f"Note: {note}" for note in report.notes)]


def _told_clip(done: int, total: int, file: str) -> None:
    print(f"{done} of {total} clips; now {file}", file=sys.stderr, flush=True)


def _check_plot(path: Path | None, *inputs: Path) -> None:
    """Raises UsageError or OutputError where no plot can be written, or it would replace an input; found out before any work."""
    if path is not None and path.suffix.lower() != ".png":
        raise UsageError(f"{path}: a plot is a picture; name it with .png.")
    check_apart(inputs, [path])
    _check_places(path)


def _plot(panels: Sequence[Panel], path: Path | None) -> None:
    if path is not None:
        from beavervision.evaluate.plots import write_plot

        write_plot(panels, path)


def _card_facts(card: ModelCard) -> dict[str, Any]:
    from beavervision.models.cards import data_hashes

    return asdict(card) | {"files": {name: data_hashes()[name] for name in card.files}}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]


def _read_text(path: Path) -> str:
    """The text of a file, or of standard input for ``-``."""
    name = "standard input" if str(path) == "-" else str(path)
    try:
        with nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
            data = file.read(_TEXT_BYTES + 1)
    except OSError as error:
        raise unreadable(name, error) from error
    if len(data) > _TEXT_BYTES:
        raise TextError(f"{name} has more than {_TEXT_BYTES >> 20} MiB of text. Split it into parts.")
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(f"{name} is no UTF-8 text (byte {error.start}). Save it as UTF-8 text first.") from error


def _check_places(*paths: Path | None) -> None:
    """Raises OutputError where a file cannot be made at one of them; found out before any work."""
    for path in paths:
        if path is not None:
            check_place(path)


class _Pace:
    """Pictures done against the time since the first of them."""

    def __init__(self) -> None:
        self._start: tuple[float, int] | None = None
        self.per_s = 0.0

    def __call__(self, done: int) -> float:
        """Pictures a second so far; 0 while that is not known."""
        now_s = time.monotonic()
        if self._start is None:
            self._start = now_s, done
        elif now_s > self._start[0]:
            self.per_s = (done - self._start[1]) / (now_s - self._start[0])
        return self.per_s


def _progress(quiet: bool) -> AbstractContextManager[Callable[[int, int | None], None] | None]:
    """What to tell of the pictures done and in all, on standard error: a bar on a terminal, else a line now and then."""
    if quiet:
        return nullcontext()
    return _bar() if sys.stderr.isatty() else nullcontext(_lines())


@contextmanager
def _bar() -> Iterator[Callable[[int, int | None], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed} pictures, {task.fields[per_s]:.1f} a second,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    pace = _Pace()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("preparing", total=None, per_s=0.0)

        def told(done: int, total: int | None) -> None:
            progress.update(
                task,
                description="drawing",
                completed=done,
                total=None if total is None else max(total, done),
                per_s=pace(done),
            )

        yield told


def _lines() -> Callable[[int, int | None], None]:
    pace = _Pace()
    next_s = 0.0

    def told(done: int, total: int | None) -> None:
        nonlocal next_s
        per_s = pace(done)
        if time.monotonic() < next_s:
            return
        next_s = time.monotonic() + _LINE_S
        line = f"{done} pictures" if total is None else f"{done} of {max(total, done)} pictures"
        if per_s:
            line += f", {per_s:.1f} a second"
            line += "" if total is None else f", {max(total - done, 0) / per_s:.0f} s left"
        print(line, file=sys.stderr, flush=True)

    return told


# The process -------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (that of the process if None) and return its exit code. Nothing is raised."""
    args = sys.argv[1:] if argv is None else list(argv)
    as_json, debug = "--json" in args, "--debug" in args
    logging.getLogger("beavervision").addHandler(logging.NullHandler())
    with ExitStack() as stack:
        if argv is None:
            _own_the_process(quiet_libraries=not debug)
        restore = _stop_on_signals()
        stack.callback(restore)
        try:
            code = _run(args)
            sys.stdout.flush()
            return code
        except BaseException as error:
            if argv is None:
                _ignore_signals()  # the end is near, and it is to be a clean one
            return _explained(error, as_json, debug)


def _run(args: list[str]) -> int:
    # Not click's own main(), which would print errors and end the process in its own way.
    command = typer.main.get_command(app)
    try:
        with command.make_context("beavervision", args) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    return 0


def _explained(error: BaseException, as_json: bool, debug: bool) -> int:
    """Tell of an error as it was asked for; its exit code."""
    if isinstance(error, BrokenPipeError):
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush does not fail
        return _SIGPIPE_EXIT
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        told: BeaverVisionError = Interrupted("Stopped; nothing was written.")
    elif isinstance(error, BeaverVisionError):
        told = error
    elif isinstance(error, _ClickError):
        where = getattr(error, "ctx", None)
        help_of = where.command_path if where is not None else "beavervision"
        message = error.format_message().strip().rstrip(".")  # type: ignore[attr-defined]
        told = UsageError(f"{message}. See `{help_of} --help`." if message else f"See `{help_of} --help`.")
    elif isinstance(error, MemoryError):
        told = DeviceError("The memory is used up. Close other programs, or use a smaller video.")
    else:
        told = BeaverVisionError(
            f"Something unexpected happened ({type(error).__name__}: {error}). This is a defect of the program: please "
            "report it with the command and what `beavervision doctor` says. --debug shows where it happened."
        )
    if debug or _debug_is_set():
        traceback.print_exception(error)
    with suppress(BrokenPipeError):
        if as_json:
            print(json.dumps({"error": {"code": told.code, "message": str(told)}}, indent=2), flush=True)
        else:
            print(
                f"Error: {told}" if told.exit_code != Interrupted.exit_code else str(told), file=sys.stderr, flush=True
            )
    return told.exit_code


def _debug_is_set() -> bool:
    try:
        return Settings.load().debug
    except UsageError:
        return False


def _own_the_process(*, quiet_libraries: bool) -> None:
    """What only a process of its own may do to its streams."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if quiet_libraries:
        # Native libraries write to descriptor 2 without being asked; Python keeps the real one.
        try:
            real = os.dup(2)
            sys.stderr = os.fdopen(real, "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)
        except OSError:  # started without a standard error
            return


def _stop_on_signals() -> Callable[[], None]:
    """Let SIGTERM and SIGHUP stop a command as Ctrl-C does; returns what undoes it."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, stop)

    def restore() -> None:
        for number, handler in before.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)

    return restore


def _ignore_signals() -> None:
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
