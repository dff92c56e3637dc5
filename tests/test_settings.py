"""Where settings come from, in which order, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from beavervision.errors import UsageError
from beavervision.settings import Settings


def _env(tmp_path: Path, toml: str | bytes | None = None, **more: str) -> dict[str, str]:
    if toml is not None:
        folder = tmp_path / "beavervision"
        folder.mkdir(exist_ok=True)
        (folder / "config.toml").write_bytes(toml.encode() if isinstance(toml, str) else toml)
    return {"XDG_CONFIG_HOME": str(tmp_path), **more}


def test_defaults_need_neither_file_nor_environment(tmp_path: Path) -> None:
    assert Settings.load(_env(tmp_path)) == Settings()
    assert not str(Settings().data_dir).startswith("~")


def test_environment_beats_file_beats_default(tmp_path: Path) -> None:
    env = _env(tmp_path, 'threads = 3\ncrf = 21\ndevice = "cpu"', BEAVERVISION_CRF="23", BEAVERVISION_MODEL="wav2lip")
    settings = Settings.load(env)
    assert (settings.threads, settings.crf, settings.device, settings.model) == (3, 23, "cpu", "wav2lip")
    assert settings.preset == Settings().preset


def test_config_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("memory_threshold = 1\ndata_dir = '/data'", encoding="utf-8")
    settings = Settings.load({"BEAVERVISION_CONFIG": str(path)})
    assert settings.memory_threshold == 1.0
    assert isinstance(settings.memory_threshold, float)
    assert settings.data_dir == Path("/data")


def test_file_is_looked_for_under_home(tmp_path: Path) -> None:
    folder = tmp_path / ".config" / "beavervision"
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("crf = 30", encoding="utf-8")
    assert Settings.load({"HOME": str(tmp_path)}).crf == 30


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        Settings.load({"BEAVERVISION_CONFIG": str(tmp_path / "none.toml")})


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("thread = 2", r"unknown setting 'thread'\. Known: .*threads"),
        ("threads = ", "not valid TOML"),
        (b"model = '\xff'", "not valid TOML"),
        ("threads = true", "threads: True is no int"),
        ("crf = 18.7", "crf: 18.7 is no int"),
        ("model = 5", "model: 5 is no str"),
        ("data_dir = 5", "data_dir: 5 is no Path"),
        ("[model]\nname = 'beaver'", "model: .* is no str"),
        ("crf = 52", r"^crf is a number from 0 \(best\) to 51 \(worst\), not 52\.$"),
        ("threads = -1", r"^threads must be 0 or more, not -1\.$"),
        ("memory_threshold = 0", "memory_threshold"),
        ("memory_threshold = nan", "memory_threshold"),
        ("memory_threshold = 1.01", "memory_threshold"),
        ("serve_port = 65536", "serve_port"),
        ("serve_workers = 0", "serve_workers"),
        ("serve_lease_s = nan", "serve_lease_s"),
        ("serve_wait_s = -1", "serve_wait_s"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, toml: str | bytes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings.load(_env(tmp_path, toml))


@pytest.mark.parametrize(("name", "value"), [("THREADS", "two"), ("THREADS", "1.5"), ("MEMORY_THRESHOLD", "85%")])
def test_a_bad_variable_is_refused_by_name(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(UsageError, match=name.lower()):
        Settings.load(_env(tmp_path, **{f"BEAVERVISION_{name}": value}))


def test_an_unreadable_file_is_a_usage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    env = _env(tmp_path, "crf = 20")
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UsageError, match=r"config\.toml cannot be read: Permission denied"):
        Settings.load(env)
