"""The command line: what each command prints and writes."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tomllib
import wave
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

from beavervision import cli as module
from beavervision.evaluate import doctor
from beavervision.models import cards
from beavervision.stages.decode import probe
from tests.conftest import Ran

Cli = Callable[..., Ran]
ROOT = Path(__file__).parents[1]


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


# --- lipsync and demo -------------------------------------------------------------------------------------------------


def test_lipsync_writes_video_report_and_sheet(cli: Cli, tmp_path: Path, portrait: Path) -> None:
    out, report, sheet = (tmp_path / f"a.{suffix}" for suffix in ("mp4", "json", "png"))
    options = ("--preset", "ultrafast", "--crf", "30", "--speed", "1.5", "--report", report, "--sheet", sheet)
    ran = cli("lipsync", portrait, "--text", "Hello there.", "-o", out, *options, "--json")
    assert ran.code == 0, ran
    told = json.loads(ran.out)
    assert told == json.loads(report.read_text(encoding="utf-8"))
    info = probe(out)
    assert told["output"] == {
        "path": str(out),
        "pictures": info.frames,
        "rate": "25",
        "seconds": info.frames / 25,
        "size_px": [512, 512],
    }
    assert told["track"]["pictures"]["ok"] == info.frames
    assert told["speech"]["kind"] == "text"
    assert told["model"]["name"] == "beaver"
    assert told["times"]["stages"]["encode"]["pictures"] == info.frames
    assert probe(sheet).kind == "still"
    assert f"of {info.frames} pictures" in ran.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.mp4", "a.png"]


def test_demo_says_where_things_are(cli: Cli, tmp_path: Path) -> None:
    ran = cli("demo", "--text", "Hi.", "--out", tmp_path / "new" / "place", "--quiet")
    assert ran.code == 0, ran
    written = {path.name for path in (tmp_path / "new" / "place").iterdir()}
    assert written == {"demo.mp4", "demo.png", "demo.json"}
    assert all(name in ran.out for name in written)
    assert "pictures" not in ran.err


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_comes_from_a_file_or_standard_input(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    path = tmp_path / "words.txt"
    path.write_text("Café – at last.", encoding=encoding)
    assert module._read_text(path) == "Café – at last."
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    ran = cli("say", "-", "-o", tmp_path / "a.wav", "--json")
    assert ran.code == 0, ran
    assert json.loads(ran.out)["left_out"] == ""


@pytest.mark.parametrize(
    ("steps", "line"),
    [
        ([(0.0, 8, None)], "8 pictures"),
        ([(0.0, 8, 100)], "8 of 100 pictures"),
        ([(0.0, 8, 100), (1.0, 20, 100), (12.0, 68, 98)], "68 of 98 pictures, 5.0 a second, 6 s left"),
        ([(0.0, 8, 100), (10.0, 108, 100)], "108 of 108 pictures, 10.0 a second, 0 s left"),
    ],
)
def test_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    steps: list[tuple[float, int, int | None]],
    line: str,
) -> None:
    told = module._lines()
    for now_s, done, total in steps:
        monkeypatch.setattr(module.time, "monotonic", lambda now_s=now_s: 1000 + now_s)
        told(done, total)
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == line
    assert len(lines) == len([s for s in steps if s[0] == 0 or s[0] >= 10])


# --- say and voices ---------------------------------------------------------------------------------------------------


def test_say_writes_sound_and_phones(cli: Cli, tmp_path: Path) -> None:
    sound, phones = tmp_path / "a.wav", tmp_path / "a.json"
    ran = cli("say", "Hello there.", "-o", sound, "--phones", phones, "--json")
    assert ran.code == 0, ran
    told = json.loads(ran.out)
    with wave.open(str(sound)) as file:
        assert (file.getnframes(), file.getframerate()) == (told["samples"], told["rate_hz"])
    timed = json.loads(phones.read_text(encoding="utf-8"))
    assert "".join(phone["ipa"] for phone in timed["phones"]).startswith("h")
    assert timed["phones"][-1]["end_ms"] <= told["seconds"] * 1000
    assert {key: timed[key] for key in told} == told


def test_phones_that_say_wrote_lead_the_lips_of_its_sound(cli: Cli, portrait: Path, tmp_path: Path) -> None:
    sound, phones, out = (tmp_path / name for name in ("a.wav", "a.json", "a.mp4"))
    assert cli("say", "Pam!", "-o", sound, "--phones", phones).code == 0
    ran = cli("lipsync", portrait, "-o", out, "--audio", sound, "--phones", phones, "--json", "--quiet")
    assert ran.code == 0, ran
    assert json.loads(ran.out)["speech"]["phones"] == 3
    ran = cli("lipsync", portrait, "-o", tmp_path / "b.mp4", "--text", "Pam!", "--phones", phones, "--quiet")
    assert ran.code == 2 and "give audio with them" in ran.err


def test_voices_can_be_narrowed_to_a_language(cli: Cli) -> None:
    told = json.loads(cli("voices", "--language", "en", "--json").out)
    assert {voice["language"].split("-")[0] for voice in told["voices"]} == {"en"}
    assert any(not voice["unavailable"] for voice in told["voices"])
    assert told["voices"][0]["name"] in cli("voices").out
    assert "no voice for 'tlh-QO'" in cli("voices", "--language", "tlh-QO").out


# --- models -----------------------------------------------------------------------------------------------------------


def test_models_are_listed_with_licence_and_hash(cli: Cli) -> None:
    told = {model["name"]: model for model in json.loads(cli("models", "--json").out)["models"]}
    assert set(told) == {card.name for card in cards.CARDS}
    assert told["beaver"]["files"] == {name: cards.data_hashes()[name] for name in cards.BEAVER.files}
    assert told["wav2lip"]["non_commercial"] is True
    shown = cli("models").out.splitlines()
    assert any(line.startswith("face-landmarker") and "64184e229b26" in line and "Apache-2.0" in line for line in shown)


def test_models_that_are_not_there_or_no_models(cli: Cli, tmp_path: Path) -> None:
    assert cli("models", "remove", "none").code == 5
    ran = cli("models", "add", __file__, "--json")
    assert ran.code == 5
    assert json.loads(ran.out)["error"]["code"] == "model"


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_finds_everything_that_is_needed(cli: Cli) -> None:
    ran = cli("doctor", "--json")
    told = json.loads(ran.out)
    rows = {row["name"]: row for row in told["checks"]}
    assert (ran.code, told["works"]) == (0, True), told
    assert {"python", "codecs", "LiteRT", "speech", "whole chain", "memory", "GPU", "data folder"} <= set(rows)
    assert all(row["remedy"] for row in rows.values() if row["state"] == "limited")


def test_doctor_names_what_is_broken(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(settings: object) -> None:
        cards.load_data("beaver_motion.onnx")

    monkeypatch.setattr(cards, "data_hashes", lambda: {"beaver_motion.onnx": "0" * 64})
    looks = {name: look for name, look in doctor._LOOKS.items() if name in ("python", "bundled models")}
    monkeypatch.setattr(doctor, "_LOOKS", looks)
    ran = cli("doctor")
    assert ran.code == 5
    assert re.search(r"^ok +python", ran.out, re.MULTILINE)
    assert re.search(r"^broken +bundled models .*beaver_motion\.onnx is damaged.*Reinstall", ran.out, re.MULTILINE)


def test_doctor_survives_a_package_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.PACKAGES, "av", "no_such_module")
    broken = [row for row in doctor._packages(module.Settings()) if row.state == "broken"]
    assert [row.remedy for row in broken] == ["Install it: pip install av"]


def test_doctor_looks_at_every_required_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {re.split(r"[<>=]", line)[0] for line in project["dependencies"]} == set(doctor.PACKAGES)


# --- the whole --------------------------------------------------------------------------------------------------------


def test_help_loads_no_codec_and_no_network() -> None:
    done = in_a_process(
        "import sys; from beavervision.cli import main; main(['lipsync', '--help'])\n"
        "print(sorted({'av', 'cv2', 'numpy', 'onnxruntime', 'ai_edge_litert', 'torch', 'hibari'} & set(sys.modules)))"
    )
    assert "--subtitles" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""


def test_the_package_gives_its_public_names_lazily() -> None:
    done = in_a_process(
        "import sys, beavervision; print('av' in sys.modules)\n"
        "from beavervision import Pipeline, Report, lipsync; print(Pipeline.__module__, lipsync.__module__)\n"
        "print(hasattr(beavervision, 'nothing'))"
    )
    assert done.stdout.split() == ["False", "beavervision.pipeline", "beavervision.pipeline", "False"], done.stderr


def test_a_reader_that_leaves_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "beavervision", "voices"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def generator() -> ModuleType:
    spec = spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("page", ["cli.md", "models.md"])
def test_generated_pages_are_up_to_date(page: str) -> None:
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert written == generator().pages()[page], "run: python docs/generate.py"


def test_requirements_are_pinned_without_hosts() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    names = {re.split(r"[<>=\[]", line)[0] for line in needed} - {"beavervision"}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", pin) for pin in pins)
    assert names <= {pin.split("==")[0].replace("_", "-") for pin in pins}
