"""The command group `beavervision evaluate` where no network is needed; the other commands are in their measures' tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beavervision.evaluate import follow as module
from beavervision.evaluate.follow import ClipFollow, FollowReport
from tests.conftest import Ran

CLIP = ClipFollow("a.mp4", 3.0, 0.7, 0.6, 0.9, 0, 5.0, 0.71, 0.05, 0.06)


def test_follow_hands_its_options_on_and_tells_of_the_clips(
    cli: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def follow(folder: Path, split: str, **options: Any) -> FollowReport:
        options.pop("on_progress")(0, 1, "a.mp4")
        asked.update(folder=folder, split=split, **options)
        return FollowReport(split, {"name": "beaver"}, (CLIP,), {})

    monkeypatch.setattr(module, "follow", follow)
    given = ("--split", "train", "--limit", "3", "--footage", "--index-offsets", "--device", "cpu")
    ran = cli("evaluate", "follow", tmp_path, *given, "--json")
    assert ran.code == 0
    assert json.loads(ran.out)["median_opening_r"] == 0.7
    assert "a.mp4" in ran.err and "1 clips" in ran.err
    wanted = {
        "limit": 3,
        "footage": True,
        "index_offsets": True,
        "model": None,
        "device": "cpu",
        "allow_non_commercial": False,
    }
    assert asked == {"folder": tmp_path, "split": "train", **wanted}
    plot = tmp_path / "follow.png"
    assert "0.700" in cli("evaluate", "follow", tmp_path, "--plot", plot).out
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("command", "code", "told"),
    [
        (["follow", "nowhere"], 3, "index.tsv"),
        (["follow"], 2, "TALKERS_DIR"),
        (["articulation", "nowhere.png"], 3, "nowhere.png"),
        (["compare", "nowhere.mp4", "elsewhere.mp4"], 3, "nowhere.mp4"),
        (["lse", "nowhere.mp4"], 2, "--syncnet"),
        (["quality", "nowhere"], 3, "index.tsv"),
        (["sheets", "nowhere", "-o", "elsewhere"], 3, "index.tsv"),
        (["sync", "nowhere.mp4", "--plot", "plot.jpg"], 2, "plot.jpg"),
        (["sync", "nowhere.mp4", "--plot", "missing/plot.png"], 4, "missing"),
    ],
)
def test_errors_have_their_class_and_leave_no_traceback(
    cli: Callable[..., Ran], command: list[str], code: int, told: str
) -> None:
    ran = cli("evaluate", *command, "--json")
    assert ran.code == code
    assert told in json.loads(ran.out)["error"]["message"]
    assert "Traceback" not in ran.err
