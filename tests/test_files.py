"""Files that appear whole: where they go, and where they may not."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from beavervision.errors import OutputError, UsageError
from beavervision.files import check_apart, check_place, partial, write_json
from tests.conftest import Ran

Cli = Callable[..., Ran]


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def link_to_a_pipe(path: Path) -> None:
    pipe(path.with_name("real"))
    path.symlink_to("real")


@pytest.mark.parametrize("make", [pipe, listening, link_to_a_pipe])
def test_what_is_no_file_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's whole path is short
    path = Path("out.json")
    make(path)
    before = {name: name.lstat() for name in tmp_path.iterdir()}
    for write in (lambda: write_json(path, {}), lambda: check_place(path)):
        with pytest.raises(OutputError, match=r"out.json is a device or a pipe. Name a file\."):
            write()
    assert {name: name.lstat() for name in tmp_path.iterdir()} == before


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    kept, link, new = tmp_path / "there" / "kept.json", tmp_path / "link.json", tmp_path / "new.json"
    kept.write_text("old")
    link.symlink_to(kept)
    new.symlink_to(Path("there") / "new.json")
    for path in (link, new):
        check_place(path)
        write_json(path, {"a": 1})
        assert path.is_symlink()
        assert json.loads(path.resolve().read_text()) == {"a": 1}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["kept.json", "link.json", "new.json", "new.json", "there"]


def test_what_is_no_name_of_a_file_is_no_input(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    check_apart(["1\n00:00:00,000 --> 00:00:01,000\n\0", "x" * 9999, None, {"rest": 1}], [path, None])
    for inputs, outputs in (([str(path)], [path]), ([], [path, tmp_path / "." / "a.mp4"])):
        with pytest.raises(UsageError, match="Give"):
            check_apart(inputs, outputs)


def test_links_that_lead_nowhere_are_told_of(tmp_path: Path) -> None:
    ring, lost = tmp_path / "ring.json", tmp_path / "lost.json"
    ring.symlink_to(ring)
    lost.symlink_to(tmp_path / "missing" / "a.json")
    for path in (ring, lost):
        with pytest.raises(OutputError, match=f"{path.name} cannot be written"):
            check_place(path)


@pytest.mark.parametrize("name", ["嘴" * 83 + ".mp4", "a" * 251 + ".mp4", "a." + "b" * 253])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("old")  # the system allows it
    check_place(path)
    write_json(path, {})
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert partial(Path("嘴.mp4")).suffix == ".mp4"


def test_every_output_of_a_command_is_looked_at_first(cli: Cli, tmp_path: Path, portrait: Path) -> None:
    odd = {suffix: tmp_path / f"odd.{suffix}" for suffix in ("mp4", "json", "png", "wav")}
    for path in odd.values():
        os.mkfifo(path)
    speak = ("lipsync", portrait, "--text", "Hi.", "-o")
    for args in (
        (*speak, odd["mp4"]),
        (*speak, tmp_path / "a.mp4", "--report", odd["json"]),
        (*speak, tmp_path / "a.mp4", "--sheet", odd["png"]),
        ("say", "Hi.", "-o", odd["wav"]),
        ("say", "Hi.", "-o", tmp_path / "a.wav", "--phones", odd["json"]),
        ("style", "learn", portrait, "-o", odd["json"]),
        ("evaluate", "sync", portrait, "--plot", odd["png"]),
    ):
        ran = cli(*args)
        assert (ran.code, "is a device or a pipe. Name a file." in ran.err) == (4, True), (args, ran)
    assert all(path.is_fifo() for path in odd.values())
    assert sorted(tmp_path.iterdir()) == sorted(odd.values())
