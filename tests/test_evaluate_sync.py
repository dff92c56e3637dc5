"""The sync scorer on finished videos: real clips with their sound as it is and moved."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest

from beavervision.errors import InputError, MediaError
from beavervision.evaluate.follow import encode_again
from beavervision.evaluate.sync import SyncJudge
from beavervision.evaluate.tracks import face_trace, lip_track, watched
from beavervision.models.face import FaceNets
from beavervision.pipeline import Pipeline
from beavervision.stages.decode import read_audio
from tests.media_factory import make_video

TALKERS = Path(__file__).parents[2] / "shared" / "talkers"


def with_sound_moved(source: Path, out: Path, late_ms: int) -> Path:
    """The same pictures, the sound heard `late_ms` later."""
    blocks = list(read_audio(source))
    rate_hz = blocks[0].rate_hz
    pcm = np.concatenate([b.pcm.mean(axis=0) for b in blocks])
    shift = rate_hz * late_ms // 1000
    pcm = np.concatenate([np.zeros(max(shift, 0), np.float32), pcm[max(-shift, 0) :]])
    with av.open(str(source)) as given, av.open(str(out), "w") as made:
        stream = given.streams.video[0]
        pictures = made.add_stream_from_template(stream)
        sound = made.add_stream("pcm_s16le", rate=rate_hz, layout="mono")
        for packet in given.demux(stream):
            if packet.dts is not None:
                packet.stream = pictures
                made.mux(packet)
        samples = (np.clip(pcm, -1, 1) * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(samples, "s16", "mono")
        frame.rate, frame.pts = rate_hz, 0
        made.mux(sound.encode(frame))
        made.mux(sound.encode(None))
    return out


@pytest.mark.shared
@pytest.mark.skipif(not (TALKERS / "index.tsv").is_file(), reason="the clips of talkers are not here")
def test_moved_sound_moves_the_offset(tmp_path: Path) -> None:
    with (TALKERS / "index.tsv").open(encoding="utf-8", newline="") as file:
        lines = [
            x for x in csv.DictReader(file, delimiter="\t") if x["split"] == "validate" and x["file"].endswith(".mp4")
        ]
    line = max(
        (x for x in lines if float(x["seconds"]) < 7), key=lambda x: float(x["sync_r"] or 0) + (float(x["seconds"]) > 5)
    )
    judge = SyncJudge()
    # A sound that is late by the clip's own lag makes the lips early by as much.
    own_ms = -1000 * float(line["sync_lag_s"] or 0)
    plain = judge.judge(TALKERS / line["file"])
    assert plain.offset_ms == pytest.approx(own_ms, abs=60)
    for late_ms in (-240, 240):
        moved = judge.judge(with_sound_moved(TALKERS / line["file"], tmp_path / f"{late_ms}.mkv", late_ms))
        assert moved.offset_ms == pytest.approx(own_ms - late_ms, abs=60)
        assert moved.agreement < 0.5 * plain.agreement


@pytest.mark.shared
@pytest.mark.skipif(not (TALKERS / "index.tsv").is_file(), reason="the clips of talkers are not here")
def test_the_offset_of_a_short_clips_sound_is_found_or_not_told(tmp_path: Path) -> None:
    judge, clip = SyncJudge(), TALKERS / "muavic_av2av7_01.webm"
    faces = face_trace(clip, FaceNets())
    plain = judge.sound_late_s(clip, faces)
    assert plain == pytest.approx(0.16, abs=0.04), "three seconds, with silence around them"
    moved = judge.sound_late_s(with_sound_moved(clip, tmp_path / "late.mkv", 200), faces)
    assert moved == pytest.approx(plain + 0.2, abs=0.03)
    others = with_sound_moved(clip, tmp_path / "others.mkv", 1500)
    assert judge.sound_late_s(others, faces) is None, "so late is beyond what is looked for"


def test_a_video_without_a_face_or_too_short_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        SyncJudge().judge(make_video(tmp_path / "a.mp4", pictures=20))


@pytest.mark.parametrize(
    "measure",
    [
        lambda still: SyncJudge().judge(still),
        lambda still: next(watched(still, FaceNets())),
        lambda still: lip_track(still, FaceNets()),
        lambda still: encode_again(still, still.with_name("again.mp4"), Pipeline()),
    ],
)
def test_a_still_is_refused_and_not_looked_at_for_ever(portrait: Path, measure: Callable[[Path], object]) -> None:
    with pytest.raises(MediaError, match="is a still"):
        measure(portrait)
