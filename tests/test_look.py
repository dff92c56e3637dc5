"""A source that was looked at before: the same video, without looking again."""

from __future__ import annotations

import itertools
import threading
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from beavervision import pipeline as pipeline_module
from beavervision.errors import Interrupted
from beavervision.pipeline import Pipeline
from beavervision.settings import Settings
from beavervision.speech import speak, write_wav
from beavervision.stages.decode import Decode
from beavervision.stages.detect import Detect, Retrace
from tests.faces import empty, make_video, moved


@cache
def pipeline() -> Pipeline:
    return Pipeline(device="cpu", settings=Settings(preset="ultrafast"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("face") / "in.mp4"
    make_video(path, [moved(dx=2 * i) for i in range(10)] + [empty()] * 3 + [moved()] * 7, rate=Fraction(25))
    return path


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    write_wav(speak("Papa moved away, and nobody asked him why."), path)
    return path


def lumas(path: Path) -> list[np.ndarray[tuple[int, int], np.dtype[np.uint8]]]:
    return [p.y for clip in Decode(extend="none")(path) for p in clip.frames.pictures]  # type: ignore[misc]


def test_a_run_with_a_look_gives_the_same_video_and_detects_nothing(
    source: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int | None]] = []
    look = pipeline().look(source, on_progress=lambda done, expected: told.append((done, expected)))
    assert look.track is not None
    assert len(look.track.faces) == told[-1][0] == 20
    # A look sees every picture, so a run that is to give the same must too.
    monkeypatch.setattr(pipeline_module, "Detect", lambda *nets, **how: Detect(*nets, **how | {"sparing": False}))
    fresh = pipeline().lipsync(source, tmp_path / "a.mp4", audio=speech)
    monkeypatch.setattr(pipeline_module, "Detect", None)
    monkeypatch.setattr(pipeline_module, "survey", None)
    again = pipeline().lipsync(source, tmp_path / "b.mp4", audio=speech, look=look)
    assert again.output["pictures"] == fresh.output["pictures"] > 40  # beyond the end and back again
    assert again.track["pictures"]["lost"] > 0
    differences = [
        float(np.abs(one.astype(int) - other).mean())
        for one, other in zip(lumas(tmp_path / "a.mp4"), lumas(tmp_path / "b.mp4"), strict=True)
    ]
    assert max(differences[:16]) == 0  # the same tracks, to the point
    assert max(differences) < 0.1  # the last pictures' points were smoothed with what follows in this run


def test_pictures_after_the_last_have_the_track_of_what_is_shown(source: Path) -> None:
    look = pipeline().look(source)
    assert look.track is not None
    first = [picture.y for clip in Decode(8, extend="none")(source) for picture in clip.frames.pictures]
    for extend in ("loop", "freeze"):
        for clip in Retrace(look.track)(itertools.islice(Decode(8, extend=extend)(source), 8)):
            assert clip.track is not None
            for i, (number, picture) in enumerate(zip(clip.frames.shown, clip.frames.pictures, strict=True)):
                assert np.array_equal(picture.y, first[number])
                assert clip.track.faces[i] is look.track.faces[number], extend
                assert clip.track.states[i] == look.track.states[number]
                assert clip.track.strength[i] == look.track.strength[number]


def test_a_look_is_what_detecting_gives(source: Path) -> None:
    look = pipeline().look(source)
    assert look.track is not None
    tracks = [
        clip.track for clip in Detect(pipeline_module.FaceNets(), look.survey.choice)(Decode(8, extend="none")(source))
    ]
    faces = [face for track in tracks if track is not None for face in track.faces]
    for one, other in zip(faces, look.track.faces, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            np.testing.assert_array_equal(one.points_px, other.points_px)


def test_a_still_a_long_video_and_a_look_that_is_stopped(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speech: Path
) -> None:
    from PIL import Image

    from tests.faces import portrait_rgb

    Image.fromarray(portrait_rgb()).save(tmp_path / "a.png")
    still = pipeline().look(tmp_path / "a.png")
    assert still.track is not None
    assert len(still.track.faces) == 1
    report = pipeline().lipsync(tmp_path / "a.png", tmp_path / "a.mp4", audio=speech, look=still)
    assert report.track["pictures"]["ok"] == report.output["pictures"]
    monkeypatch.setattr(pipeline_module, "LOOK_PICTURES", 15)
    long = pipeline().look(source)
    assert long.track is None
    assert long.survey.references
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(Interrupted):
        pipeline().look(source, cancel=stopped)
