"""Encoding: whole files or none, exact counts, and sound that stays with the picture."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from beavervision.errors import OutputError, UsageError
from beavervision.media import Audio, Clip, Color, Frames, Matrix, Picture, pictures_for, sample_at
from beavervision.stages.decode import Decode, probe, read_audio
from beavervision.stages.encode import Encode, check_output
from tests.media_factory import (
    beeps,
    clips_of,
    make_flashes,
    measured_flashes,
    numbered_picture,
    numbers,
    onsets,
    with_sound,
)

FAST = Encode(preset="ultrafast")
RATES = [Fraction(r) for r in ("24", "25", "30000/1001", "30", "50", "60000/1001")]


def some_clips(count: int = 40, rate: Fraction = Fraction(25), size: tuple[int, int] = (128, 96)) -> Iterator[Clip]:
    return iter(clips_of([numbered_picture(i, *size) for i in range(count)], rate))


def write(path: Path, clips: Iterator[Clip], encode: Encode = FAST) -> list[Clip]:
    return list(encode.to(path)(clips))


def folder(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


@pytest.mark.parametrize("suffix", ["mp4", "m4v", "mov", "mkv", "webm"])
@pytest.mark.parametrize(("rate_hz", "channels"), [(44100, 1), (48000, 2), (24000, 1), (96000, 1), (48000, 6)])
def test_round_trip(tmp_path: Path, suffix: str, rate_hz: int, channels: int) -> None:
    rate = Fraction(30000, 1001)
    pcm = beeps(sample_at(75, rate, rate_hz), rate_hz, [Fraction(1), Fraction(2)], channels)
    path = tmp_path / f"a.{suffix}"
    clips = list(clips_of([numbered_picture(i) for i in range(75)], rate, pcm, rate_hz))
    assert write(path, iter(clips)) == clips
    assert folder(tmp_path) == [path.name]
    info = probe(path)
    assert info.rate == rate
    assert numbers(Decode(extend="none")(path)) == list(range(75))
    written_hz = 48000 if suffix == "webm" or rate_hz > 48000 else rate_hz
    assert [(a.rate_hz, a.channels) for a in info.audio] == [(written_hz, channels)]
    got = np.concatenate([b.pcm for b in read_audio(path)], axis=1)
    for sample, second in zip(onsets(got, written_hz), (1, 2), strict=True):
        assert abs(Fraction(sample, written_hz) - second) < Fraction(1, 2000)
    padding = 1024 if suffix == "mkv" else 0  # Matroska does not say where AAC ends
    assert 0 <= got.shape[1] - pcm.shape[1] * written_hz / rate_hz <= padding + 1


@pytest.mark.parametrize("rate", ["24000/1001", "749/50", "120", "25"])
def test_picture_durations_are_exact(tmp_path: Path, rate: str) -> None:
    path = tmp_path / "a.mp4"
    write(path, some_clips(50, Fraction(rate)))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.average_rate, stream.start_time) == (50, Fraction(rate), 0)
        assert stream.duration * stream.time_base == 50 / Fraction(rate)
        packets = [p for p in container.demux(stream) if p.size]
    assert {p.duration * p.time_base for p in packets} == {1 / Fraction(rate)}


@pytest.mark.parametrize("suffix", ["mp4", "webm", "mkv"])
@pytest.mark.parametrize(
    "color",
    [
        Color(Matrix.BT601, False, 6, 6),
        Color(Matrix.BT709, False, 1, 1),
        Color(Matrix.BT709, True, 1, 13),
        Color(Matrix.BT2020, False, 9, 18),
    ],
)
def test_colour_tags_are_kept(tmp_path: Path, suffix: str, color: Color) -> None:
    path = tmp_path / f"a.{suffix}"
    write(path, iter(clips_of([numbered_picture(i, color=color) for i in range(5)], Fraction(25))))
    assert probe(path).color == color


def test_planes_arrive_as_given(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    planes = [
        rng.integers(16, 235, s).astype(np.uint8).repeat(2, 0).repeat(2, 1) for s in ((49, 65), (24, 32), (24, 32))
    ]
    y, u, v = planes[0], np.pad(planes[1], ((0, 1), (0, 1)), "edge"), np.pad(planes[2], ((0, 1), (0, 1)), "edge")
    picture = Picture(y, u, v)
    path = tmp_path / "a.mkv"
    write(path, iter([Clip(Frames((picture,) * 3, 0, Fraction(25)))]), Encode(preset="ultrafast", crf=0))
    got = next(Decode(extend="none")(path)).frames.pictures[2]
    for name in ("y", "u", "v"):
        assert np.array_equal(getattr(got, name), getattr(picture, name))


def test_as_many_pictures_as_the_sound_needs(tmp_path: Path) -> None:
    rate, rate_hz = Fraction(30000, 1001), 44100
    pcm = beeps(2 * rate_hz + 77, rate_hz, [])
    count = pictures_for(pcm.shape[1], rate, rate_hz)
    path = tmp_path / "a.mp4"
    write(path, iter(with_sound(some_clips(count, rate), pcm, rate_hz)))
    assert probe(path).frames == count
    got = sum(b.samples for b in read_audio(path))
    assert got == sample_at(count, rate, rate_hz)


# Nothing left behind


def test_interrupted_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"the older file")

    def failing(error: BaseException) -> Iterator[Clip]:
        yield from some_clips(40)
        raise error

    for error in (KeyboardInterrupt(), RuntimeError("stage"), OSError(errno.ENOSPC, "from another stage")):
        with pytest.raises(type(error)) as caught:
            write(path, failing(error))
        assert caught.value is error
        assert folder(tmp_path) == ["a.mp4"]
    running = FAST.to(path)(some_clips(400, size=(320, 240)))
    for _ in range(40):
        next(running)
    assert len(folder(tmp_path)) == 2
    running.close()
    assert folder(tmp_path) == ["a.mp4"]
    with pytest.raises(OutputError, match="no picture"):
        write(path, iter([]))
    assert path.read_bytes() == b"the older file"
    write(path, some_clips(3))
    assert probe(path).frames == 3


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "webm"])
@pytest.mark.parametrize("room", [40_000, 400])
def test_a_file_that_cannot_grow(tmp_path: Path, suffix: str, room: int) -> None:
    rng = np.random.default_rng(0)
    noisy = [
        Picture(
            rng.integers(0, 255, (240, 320)).astype(np.uint8),
            np.zeros((120, 160), np.uint8),
            np.zeros((120, 160), np.uint8),
        )
        for _ in range(8)
    ]
    path = tmp_path / f"a.{suffix}"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(OutputError, match="beyond the size"):
            write(path, iter(clips_of(noisy, Fraction(25))))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert folder(tmp_path) == []


def test_full_disk_found_at_the_very_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        write(tmp_path / "a.mp4", some_clips(5))
    assert folder(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small disk needs root")
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_full_disk(small_disk: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    half = np.zeros((120, 160), np.uint8)
    noisy = [Picture(rng.integers(0, 255, (240, 320)).astype(np.uint8), half, half) for _ in range(8)]
    with pytest.raises(OutputError, match="disk is full"):
        write(small_disk / f"a.{suffix}", iter(clips_of(noisy, Fraction(25))))
    assert folder(small_disk) == []


def test_check_output(tmp_path: Path) -> None:
    check_output(tmp_path / "a.mp4")
    check_output(tmp_path / "A.MP4")
    assert folder(tmp_path) == []
    for name in ("a.xyz", "a"):
        with pytest.raises(UsageError, match=r"\.mp4, \.m4v, \.mov, \.mkv, \.webm"):
            FAST.to(tmp_path / name)
    with pytest.raises(OutputError, match="Create it"):
        check_output(tmp_path / "none" / "a.mp4")
    (tmp_path / "dir.mp4").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path / "dir.mp4")
    with pytest.raises(OutputError, match="too long"):
        check_output(tmp_path / f"{'c' * 300}.mp4")


def test_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    if os.geteuid() == 0:  # root may write anywhere
        monkeypatch.setattr(Path, "touch", refused)
    else:
        tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="no permission"):
        FAST.to(tmp_path / "a.mp4")


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ultrafast"):
        Encode(preset="quick")
    with pytest.raises(UsageError, match=r"^crf .* not 60"):
        Encode(crf=60)
    with pytest.raises(UsageError, match=r"^threads .* not 0"):
        Encode(threads=0)
    mixed = [*some_clips(8), *some_clips(8, size=(64, 64))]
    with pytest.raises(ValueError, match="picture of 64x64"):
        write(tmp_path / "a.mp4", iter(mixed))
    loud = Clip(mixed[0].frames, audio=Audio(np.zeros((1, 100), np.float32), 48000))
    with pytest.raises(ValueError, match="sound in each or in none"):
        write(tmp_path / "a.mp4", iter([loud, mixed[0]]))
    for channels in (3, 4, 9):
        many = Clip(mixed[0].frames, audio=Audio(np.zeros((channels, 100), np.float32), 48000))
        with pytest.raises(UsageError, match=f"{channels} channels"):
            write(tmp_path / "a.mp4", iter([many]))
    assert folder(tmp_path) == []


def test_frames_of_the_encoder_are_freed_at_once(tmp_path: Path) -> None:
    def count() -> int:
        return sum(type(o) in (av.VideoFrame, av.AudioFrame) for o in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        of_others = count()
        for _ in FAST.to(tmp_path / "a.mp4")(some_clips(60)):
            assert count() - of_others <= 4
    finally:
        gc.enable()


def test_two_streams_at_once(tmp_path: Path) -> None:
    stages = [FAST.to(tmp_path / f"{i}.mp4")(some_clips(20 + i)) for i in range(2)]
    for _ in itertools.zip_longest(*stages):
        pass
    assert [probe(tmp_path / f"{i}.mp4").frames for i in range(2)] == [20, 21]


# Sound and picture, from a source file through decoding and encoding


def drift_pictures(tmp_path: Path, rate: Fraction, rate_hz: int, seconds: int, every_s: int, variable: bool) -> float:
    """The largest distance between a flash and its beep after the whole way, in pictures of the result."""
    source, result = tmp_path / "in.mp4", tmp_path / "out.mp4"
    at = make_flashes(source, rate, rate_hz, seconds, every_s, variable=variable)
    info = probe(source)
    pcm = np.concatenate([b.pcm for b in read_audio(source)], axis=1)
    clips = with_sound(Decode(extend="none")(info), pcm, rate_hz)
    count = sum(len(c) for c in FAST.to(result)(iter(clips)))
    seen, heard, pictures = measured_flashes(result)
    assert pictures == count == (int(seconds * rate) if not variable else count)
    assert abs(count / info.rate - seconds) <= 2 / info.rate
    assert len(seen) == len(heard) == len(at)
    assert max(abs(h - t) for h, t in zip(heard, at, strict=True)) < Fraction(1, 2000)
    return float(max(abs(s - h) for s, h in zip(seen, heard, strict=True)) * info.rate)


CASES = [(r, hz, False) for r in RATES for hz in (44100, 48000)] + [(Fraction(27), hz, True) for hz in (44100, 48000)]


@pytest.mark.parametrize(("rate", "rate_hz", "variable"), CASES, ids=str)
def test_no_drift(tmp_path: Path, rate: Fraction, rate_hz: int, variable: bool) -> None:
    assert drift_pictures(tmp_path, rate, rate_hz, 4, 2, variable) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "rate_hz", "variable"), CASES, ids=str)
def test_no_drift_over_ten_minutes(tmp_path: Path, rate: Fraction, rate_hz: int, variable: bool) -> None:
    drift = drift_pictures(tmp_path, rate, rate_hz, 600, 10, variable)
    print(f"{float(rate):.3f} fps{', variable' * variable}, {rate_hz} Hz: {drift:.4f} pictures")
    assert drift < 0.5


def test_a_link_is_written_through_and_a_pipe_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link, odd = tmp_path / "a.mp4", tmp_path / "b.mp4"
    link.symlink_to(tmp_path / "there" / "real")  # the link's name says the format
    write(link, some_clips())
    assert link.is_symlink()
    assert numbers(Decode(extend="none")(link)) == list(range(40))
    assert folder(tmp_path / "there") == ["real"]
    os.mkfifo(odd)
    with pytest.raises(OutputError, match=r"b.mp4 is a device or a pipe. Name a file\."):
        write(odd, some_clips())
    assert odd.is_fifo()
    assert folder(tmp_path) == ["a.mp4", "b.mp4", "there"]


def test_a_long_name_of_wide_letters_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("嘴" * 83 + ".mp4")
    write(path, some_clips())
    assert folder(tmp_path) == [path.name]
