"""What goes wrong in use: each a message that says what to do, its exit code, no traceback and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from beavervision import cli as module
from beavervision import errors
from beavervision.errors import BeaverVisionError
from tests.conftest import Ran
from tests.media_factory import beeps, make_sound, make_video

Cli = Callable[..., Ran]
LONG = "One word follows another, and there is no end to them. " * 40


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder for outputs that must stay empty."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def refused(ran: Ran, code: int, *words: str) -> None:
    """One line of complaint on standard error that holds `words`, and nothing on standard output."""
    assert ran.code == code, ran
    assert ran.out == ""
    complaint = [line for line in ran.err.splitlines() if not line.startswith("INFO: Created TensorFlow Lite")]
    assert len(complaint) == 1, ran.err
    assert complaint[0].startswith("Error: ")
    for word in words:
        assert word in complaint[0]


def no_traceback(text: str) -> bool:
    return "Traceback" not in text and 'File "' not in text


def start(*args: str | Path, before: Sequence[str] = ()) -> subprocess.Popen[str]:
    """The command line as a process of its own."""
    return subprocess.Popen(
        [*before, sys.executable, "-m", "beavervision", *map(str, args)],
        env={**os.environ, "BEAVERVISION_DEVICE": "cpu"},  # looking for GPUs takes seconds
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in the background of a shell hands on an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(*args: str | Path, before: Sequence[str] = ()) -> Ran:
    with start(*args, before=before) as process:
        out, err = process.communicate(timeout=120)
    return Ran(process.returncode, out, err)


# --- the source -------------------------------------------------------------------------------------------------------


def test_an_empty_file(cli: Cli, tmp_path: Path, place: Path) -> None:
    empty = tmp_path / "face.mp4"
    empty.touch()
    refused(cli("lipsync", empty, "--text", "Hello.", "-o", place / "a.mp4"), 3, str(empty), "is empty", "again")
    assert not any(place.iterdir())


def test_a_truncated_mp4(cli: Cli, tmp_path: Path, place: Path) -> None:
    whole = make_video(tmp_path / "whole.mp4", pictures=50)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    refused(cli("lipsync", cut, "--text", "Hello.", "-o", place / "a.mp4"), 3, str(cut), "cut off", "Copy or record")
    assert not any(place.iterdir())


def test_a_text_file_named_mp4(cli: Cli, tmp_path: Path, place: Path) -> None:
    note = tmp_path / "note.mp4"
    note.write_text("This is no video at all.\n" * 50)
    refused(cli("lipsync", note, "--text", "Hello.", "-o", place / "a.mp4"), 3, str(note), "no video", "Give an mp4")
    assert not any(place.iterdir())


def test_a_missing_file_in_a_real_process(tmp_path: Path, place: Path) -> None:
    ran = run("lipsync", tmp_path / "none.mp4", "--text", "Hello.", "-o", place / "a.mp4")
    assert ran.code == 3
    assert ran.out == ""
    assert ran.err == f"Error: {tmp_path / 'none.mp4'} does not exist. Check the name and the folder.\n"
    assert not any(place.iterdir())


def test_a_video_without_a_face(cli: Cli, tmp_path: Path, place: Path) -> None:
    faceless = make_video(tmp_path / "bars.mp4", pictures=30, size=(320, 240))
    refused(cli("lipsync", faceless, "--text", "Hello.", "-o", place / "a.mp4"), 3, "no face", "from the front")
    assert not any(place.iterdir())


def test_a_face_that_is_not_there(cli: Cli, place: Path, portrait: Path) -> None:
    ran = cli("lipsync", portrait, "--text", "Hello.", "-o", place / "a.mp4", "--face", "3")
    refused(ran, 3, "is not there", "1 was seen", "Choose another face")
    assert not any(place.iterdir())


# --- the words --------------------------------------------------------------------------------------------------------


def test_no_sound_in_the_audio(cli: Cli, tmp_path: Path, place: Path, portrait: Path) -> None:
    silent = make_video(tmp_path / "silent.mp4", pictures=10)
    ran = cli("lipsync", portrait, "--audio", silent, "-o", place / "a.mp4")
    refused(ran, 3, str(silent), "no sound")
    assert not any(place.iterdir())


@pytest.mark.parametrize("text", ["", "  \n", "...", "😀"])
def test_nothing_to_say(cli: Cli, place: Path, portrait: Path, text: str) -> None:
    refused(cli("lipsync", portrait, "--text", text, "-o", place / "a.mp4"), 3, "at least one word")
    refused(cli("say", text, "-o", place / "a.wav"), 3, "at least one word")
    assert not any(place.iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "empty"), (b"Caf\xe9", "UTF-8"), (b"a " * (1 << 20), "Split it"), (None, "Check the name")],
)
def test_text_files_that_cannot_be_used(
    cli: Cli, tmp_path: Path, place: Path, portrait: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "words.txt"
    if content is not None:
        path.write_bytes(content)
    refused(cli("lipsync", portrait, "--text-file", path, "-o", place / "a.mp4"), 3, words)
    assert not any(place.iterdir())


@pytest.mark.parametrize(("text", "language"), [("Привет, мир", "ru"), ("こんにちは", "ja"), ("مرحبا", "ar")])
def test_a_script_that_the_voice_cannot_say(cli: Cli, place: Path, portrait: Path, text: str, language: str) -> None:
    ran = cli("lipsync", portrait, "--text", text, "-o", place / "a.mp4")
    refused(ran, 3, "cannot say the letters", f"Set the language to {language} ")
    assert not any(place.iterdir())


def test_damaged_subtitles(cli: Cli, tmp_path: Path, place: Path, portrait: Path) -> None:
    path = tmp_path / "a.srt"
    path.write_text("1\n00:00:01,000 --> 00:0x\nHello.\n")
    refused(cli("lipsync", portrait, "--subtitles", path, "-o", place / "a.mp4"), 3, "a.srt, line 2")
    assert not any(place.iterdir())


# --- the output -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["-o", "--report", "--sheet"])
def test_an_output_that_cannot_be_written(cli: Cli, place: Path, portrait: Path, option: str) -> None:
    name = {"-o": "a.mp4", "--report": "a.json", "--sheet": "a.png"}[option]
    others = [] if option == "-o" else ["-o", place / "b.mp4"]
    missing = place / "missing" / name
    refused(cli("lipsync", portrait, "--text", "Hello.", option, missing, *others), 4, str(place / "missing"))
    blocked = place / name
    blocked.mkdir()
    refused(cli("lipsync", portrait, "--text", "Hello.", option, blocked, *others), 4, str(blocked), "folder")
    assert [path.name for path in place.iterdir()] == [name]


# Root may write anywhere, but not without these capabilities.
PLAIN = () if os.geteuid() else ("setpriv", "--bounding-set=-dac_override,-dac_read_search", "--")


@pytest.mark.skipif(bool(PLAIN) and shutil.which("setpriv") is None, reason="root needs setpriv to give up its rights")
@pytest.mark.parametrize(("option", "name"), [("-o", "a.mp4"), ("--report", "a.json"), ("--sheet", "a.png")])
def test_a_folder_without_the_right_to_write(place: Path, portrait: Path, option: str, name: str) -> None:
    others = [] if option == "-o" else ["-o", place / "b.mp4"]
    locked = place / "locked"
    locked.mkdir(mode=0o500)
    ran = run("lipsync", portrait, "--text", "Hello.", option, locked / name, *others, before=PLAIN)
    refused(ran, 4, str(locked / name), "written")
    assert [path.name for path in place.iterdir()] == ["locked"]
    assert not any(locked.iterdir())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root cannot write: /proc")
def test_a_folder_that_nobody_can_write(cli: Cli, portrait: Path) -> None:
    refused(cli("lipsync", portrait, "--text", "Hello.", "-o", "/proc/self/a.mp4"), 4, "/proc/self/a.mp4", "written")
    refused(cli("say", "Hello.", "-o", "/proc/self/a.wav"), 4, "/proc/self/a.wav", "written")


# Files end after 40 blocks (of 512 or 1024 bytes), as on a disk that is full.
FULL = ("/bin/sh", "-c", 'ulimit -f 40; exec "$@"', "sh")


def test_a_disk_that_fills_up(place: Path, portrait: Path) -> None:
    options = ("--text", "Hello there.", "--preset", "ultrafast", "--report", place / "a.json")
    ran = run("lipsync", portrait, "-o", place / "a.mp4", *options, before=FULL)
    assert ran.code == 4, ran
    assert ran.out == ""
    assert ran.err.splitlines()[-1].startswith(f"Error: {place / 'a.mp4'} cannot be written: ")
    assert "another disk" in ran.err
    assert no_traceback(ran.err)
    assert not any(place.iterdir())


def test_a_disk_that_fills_up_with_sound(place: Path) -> None:
    ran = run("say", "Hello there.", "-o", place / "a.wav", before=FULL)
    assert ran.code == 4
    assert f"{place / 'a.wav'} cannot be written" in ran.err
    assert no_traceback(ran.err)
    assert not any(place.iterdir())


# --- stopped ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle(place: Path, portrait: Path, number: signal.Signals) -> None:
    older = place / "a.mp4"
    older.write_bytes(b"an older result")
    options = ("--preset", "ultrafast", "--sheet", place / "a.png", "--report", place / "a.json")
    with start("lipsync", portrait, "--text", LONG, "-o", older, *options) as process:
        assert process.stderr is not None
        first = process.stderr.readline()
        assert "pictures" in first
        assert any(path.name.endswith(".part.mp4") for path in place.iterdir())
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "Stopped; nothing was written."
    assert no_traceback(err)
    assert [path.name for path in place.iterdir()] == ["a.mp4"]
    assert older.read_bytes() == b"an older result"


# --- how errors are told ----------------------------------------------------------------------------------------------


def all_errors(kind: type[BeaverVisionError] = BeaverVisionError) -> list[type[BeaverVisionError]]:
    children = [child for child in kind.__subclasses__() if child.__module__ == errors.__name__]
    return [kind, *(error for child in children for error in all_errors(child))]


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_each_class_has_its_exit_code(cli: Cli, monkeypatch: pytest.MonkeyPatch, kind: type[BeaverVisionError]) -> None:
    def fail(env: Mapping[str, str] | None = None) -> None:
        raise kind("It broke. Mend it.")

    monkeypatch.setattr(module.Settings, "load", fail)
    monkeypatch.setattr(module, "_debug_is_set", lambda: False)
    plain, parsed = cli("models"), cli("models", "--json")
    assert plain.code == parsed.code == kind.exit_code
    assert plain.err.removeprefix("Error: ") == "It broke. Mend it.\n"
    assert (plain.out, parsed.err) == ("", "")
    assert json.loads(parsed.out) == {"error": {"code": kind.code, "message": "It broke. Mend it."}}


def test_the_tree_in_the_docstring_is_true() -> None:
    drawn = errors.__doc__ or ""
    for kind in all_errors():
        line = next(line for line in drawn.splitlines() if f" {kind.__name__} " in f"{line} ")
        assert str(kind.exit_code) in line.split()


def test_an_unexpected_error_is_a_defect(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(env: Mapping[str, str] | None = None) -> None:
        raise LookupError("lost")

    monkeypatch.setattr(module.Settings, "load", fail)
    monkeypatch.setattr(module, "_debug_is_set", lambda: False)
    refused(cli("models"), 1, "LookupError: lost", "report it", "beavervision doctor")
    shown = cli("--debug", "models")
    assert shown.code == 1
    assert "Traceback" in shown.err
    assert json.loads(cli("models", "--json").out)["error"]["code"] == "error"


def test_debug_may_be_set_in_the_environment(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" not in cli("models", "remove", "none").err
    monkeypatch.setenv("BEAVERVISION_DEBUG", "1")
    assert "Traceback" in cli("models", "remove", "none").err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["dance"], ["dance", "--help"]),
        (["lipsync", "a.png", "-o", "b.mp4", "--colour", "red"], ["--colour", "beavervision lipsync --help"]),
        (["lipsync", "a.png", "-o", "b.mp4", "--speed", "fast", "--text", "a"], ["--speed", "number"]),
        (["lipsync", "a.png", "--text", "a"], ["--out"]),
        (["lipsync", "a.png", "-o", "b.mp4"], ["exactly one of --text, --text-file, --audio, --subtitles."]),
        (["lipsync", "a.png", "-o", "b.mp4", "--text", "a", "--audio", "c.wav"], ["not --text and --audio."]),
        (["lipsync", "a.mp4", "-o", "./a.mp4", "--text", "a"], ["over itself"]),
        (["lipsync", "a.mp4", "-o", "b.mp4", "--report", "a.mp4", "--text", "a"], ["over itself"]),
        (["evaluate", "articulation", "a.png", "--plot", "a.png"], ["over itself"]),
        (["lipsync", "a.png", "-o", "b.mp4", "--sheet", "b.mp4", "--text", "a"], ["two outputs"]),
        (["lipsync", "a.png", "-o", "b.avi", "--text", "a"], [".avi", ".mp4"]),
        (["lipsync", "a.png", "-o", "b.mp4", "--text", "a", "--crf", "70"], ["crf"]),
        (["lipsync", "a.png", "-o", "b.mp4", "--text", "a", "--fit", "bend"], ["bend", "loop"]),
        (["lipsync", "a.png", "-o", "b.mp4", "--text", "a", "--sheet", "b.jpg"], [".png"]),
        (["say", "Hello.", "-o", "b.mp3"], ["b.mp3", ".wav"]),
        (["evaluate", "sync", "a.mp4", "--plot", "b.jpg"], ["b.jpg", ".png"]),
        (["bench", "--seconds", "0"], ["seconds"]),
    ],
)
def test_wrong_options(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(cli(*args), 2, *words)
    told = json.loads(cli(*args, "--json").out)
    assert told["error"]["code"] == "usage"
    assert not any(tmp_path.iterdir())


def test_a_device_that_is_not_there(cli: Cli, place: Path, portrait: Path) -> None:
    ran = cli("lipsync", portrait, "--text", "Hello.", "-o", place / "a.mp4", "--device", "cuda:77")
    refused(ran, 6, "cuda:77", "cpu")
    assert not any(place.iterdir())


def test_a_model_that_is_not_there(cli: Cli, place: Path, portrait: Path) -> None:
    ran = cli("lipsync", portrait, "--text", "Hello.", "-o", place / "a.mp4", "--model", "wav2lip")
    refused(ran, 5, "wav2lip", "beavervision models")
    assert not any(place.iterdir())


def test_damaged_sound_is_no_traceback(cli: Cli, tmp_path: Path, place: Path, portrait: Path) -> None:
    whole = make_sound(tmp_path / "a.wav", beeps(16_000, 16_000, [Fraction(1, 2)]), 16_000)
    rest = np.random.default_rng(1).bytes(200)
    whole.write_bytes(whole.read_bytes()[:20] + rest)
    ran = cli("lipsync", portrait, "--audio", whole, "-o", place / "a.mp4")
    assert ran.code == 3, ran
    assert no_traceback(ran.err)
    assert not any(place.iterdir())
