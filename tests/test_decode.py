"""Decoding: rates, time, orientation, formats, damage, sound, and memory."""

from __future__ import annotations

import gc
import itertools
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from beavervision.errors import MediaError, NoAudioError, UsageError
from beavervision.media import Audio, Color, Matrix, Patch, Phone, Picture, Region
from beavervision.stages import decode
from beavervision.stages.decode import Decode, audio_info, from_rgb, probe, read_audio, resample
from tests.media_factory import (
    beeps,
    make_sound,
    make_video,
    numbered_luma,
    numbers,
    onsets,
    read_number,
    video_frame,
)

VP9 = {"deadline": "realtime", "cpu-used": "8"}
RATES = [Fraction(r) for r in ("24000/1001", "24", "25", "30000/1001", "30", "50", "60000/1001", "60", "749/50")]


def all_numbers(path: Path) -> list[int]:
    return numbers(Decode(extend="none")(path))


def sound(path: Path, rate_hz: int | None = None, stream: int | None = None) -> np.ndarray:
    blocks = list(read_audio(path, rate_hz, stream))
    assert [b.start for b in blocks] == [sum(b.samples for b in blocks[:i]) for i in range(len(blocks))]
    return np.concatenate([b.pcm for b in blocks], axis=1)


def first_picture(path: Path) -> Picture:
    return next(Decode(extend="none")(path)).frames.pictures[0]


# Rate and time


@pytest.mark.parametrize("rate", RATES, ids=str)
def test_constant_rate_passes_one_to_one(tmp_path: Path, rate: Fraction) -> None:
    path = make_video(tmp_path / "a.mp4", pictures=70, rate=rate)
    info = probe(path)
    assert (info.rate, info.constant, info.frames) == (rate, True, 70)
    clips = list(Decode(extend="none", block=8)(info))
    assert numbers(clips) == list(range(70))
    assert [len(c) for c in clips] == [8] * 8 + [6]
    assert [c.frames.start for c in clips] == list(range(0, 70, 8))
    assert clips[0].frames.rate == rate


@pytest.mark.parametrize("rate", ["24000/1001", "60000/1001", "749/50"])
def test_coarse_time_stamps_neither_drop_nor_double(tmp_path: Path, rate: str) -> None:
    path = make_video(
        tmp_path / "a.webm", pictures=300, rate=Fraction(rate), size=(64, 48), codec="libvpx-vp9", options=VP9
    )
    info = probe(path)
    assert abs(info.rate - Fraction(rate)) < Fraction(1, 100)
    assert info.constant
    assert all_numbers(path) == list(range(300))


def test_b_frames_and_a_late_start(tmp_path: Path) -> None:
    options = {"preset": "veryfast", "bf": "3"}
    path = make_video(tmp_path / "a.mkv", pictures=40, video_start=Fraction(7, 5), options=options)
    assert probe(path).start == Fraction(7, 5)
    assert all_numbers(path) == list(range(40))


def test_variable_rate_holds_each_picture_for_its_time(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    ticks = np.cumsum(rng.integers(1, 4, 80)) - 1  # of 1/30 s: 15 a second on average
    times = [Fraction(int(t), 30) for t in ticks - ticks[0]]
    path = make_video(tmp_path / "a.mp4", pictures=80, times=times, rate=Fraction(30))
    info = probe(path)
    assert not info.constant
    assert "variable" in info.rate_note
    assert any("variable" in n for n in info.notes)
    shown = all_numbers(path)
    for i, number in enumerate(shown):
        slack = Fraction(1, 2) / info.rate
        latest = max(k for k, t in enumerate(times) if t <= max(i / info.rate - slack, Fraction(0)))
        assert number >= latest
        assert times[number] <= i / info.rate + slack
    assert abs(len(shown) / info.rate - times[-1] - Fraction(1, 15)) <= Fraction(3, 30)


def test_dropped_pictures_keep_the_usual_rate(tmp_path: Path) -> None:
    kept = [i for i in range(120) if i % 23 != 11]
    path = make_video(
        tmp_path / "a.mp4",
        times=[i * Fraction(1001, 30000) for i in kept],
        frames=[video_frame(numbered_luma(i)) for i in kept],
    )
    assert probe(path).rate == Fraction(30000, 1001)
    assert all_numbers(path) == [i if i in kept else i - 1 for i in range(120)]


def test_rate_can_be_chosen(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", pictures=30, rate=Fraction(30))
    clips = list(Decode(extend="none", rate=Fraction(15))(path))
    assert clips[0].frames.rate == 15
    assert len(numbers(clips)) == 15
    assert numbers(Decode(extend="none", rate=Fraction(60))(path)) == [i // 2 for i in range(60)]


def test_file_without_time_stamps(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.h264", pictures=30)
    assert all_numbers(path) == list(range(30))
    assert numbers(itertools.islice(Decode(block=1)(path), 70)) == [*range(30), *range(28, 0, -1), *range(12)]


def test_fields_become_whole_pictures_at_their_own_times(tmp_path: Path) -> None:
    """A bar that moves between the two fields of a picture stands as a comb in the file, and not in what is decoded."""

    def field(at: int) -> np.ndarray:
        luma = np.full((96, 128), 60, np.uint8)
        luma[:, 10 + at : 40 + at] = 200
        return luma

    pictures = []
    for number in range(24):
        luma = field(4 * number % 80)
        luma[1::2] = field((4 * number + 2) % 80)[1::2]
        pictures.append(video_frame(luma))
    tags = {"x264-params": "tff=1:interlaced=1"}
    path = make_video(tmp_path / "fields.mp4", frames=pictures, pictures=24, options=tags)
    info = probe(path)
    assert info.interlaced and info.frames == 24 and any("fields" in note for note in info.notes)
    clips = list(Decode(extend="none")(info))
    shown = [picture.y.astype(int) for clip in clips for picture in clip.frames.pictures]
    assert len(shown) == 24

    def comb(luma: np.ndarray) -> float:
        return float(np.abs(luma[1:-1] - (luma[:-2] + luma[2:]) / 2).max(axis=0).mean())

    assert comb(np.asarray(pictures[5].to_ndarray()[:96], int)) > 4
    assert max(comb(luma) for luma in shown[1:-1]) < 2
    for number in (3, 10, 17):
        left = int(np.argmax(shown[number].mean(axis=0) > 130))
        assert left == pytest.approx(10 + 4 * number % 80, abs=2), "a picture moved in time"
    assert not probe(make_video(tmp_path / "whole.mp4", pictures=5)).interlaced


def test_few_pictures_a_second_are_held_and_too_many_refused(tmp_path: Path) -> None:
    slow = make_video(tmp_path / "slow.mp4", pictures=6, rate=Fraction(2))
    info = probe(slow)
    assert (info.rate, info.constant) == (25, False)
    assert any("too few for a mouth" in note and "25.000" in note for note in info.notes)
    shown = all_numbers(slow)
    assert [n for n, _ in itertools.groupby(shown)] == [0, 1, 2, 3, 4, 5]
    assert len(shown) == 75 and shown.count(3) in (12, 13)
    with pytest.raises(MediaError, match=r"1000 pictures a second; 240 are allowed\. Convert"):
        probe(make_video(tmp_path / "fast.mp4", pictures=40, rate=Fraction(1000)))


# Extending


def ping_pong(n: int, length: int) -> list[int]:
    return list(itertools.islice(itertools.cycle([*range(n), *range(n - 2, 0, -1)]), length))


@pytest.mark.parametrize("n", [1, 2, 3, 9])
def test_short_clip_plays_back_and_forth(tmp_path: Path, n: int) -> None:
    path = make_video(tmp_path / "a.mp4", pictures=n)
    expected = ping_pong(n, 40) if n > 1 else [0] * 40
    clips = list(itertools.islice(Decode()(path), 5))
    assert numbers(clips) == expected
    assert [n for clip in clips for n in clip.frames.shown] == expected


@pytest.mark.parametrize(
    ("suffix", "options", "gop"),
    [
        ("mp4", {}, 12),
        ("mp4", {}, 250),
        ("mp4", {"preset": "veryfast", "x264-params": "open-gop=1:bframes=3:keyint=12:min-keyint=12"}, 12),
        ("mkv", {"preset": "veryfast", "bf": "2"}, 30),
        ("ts", {"preset": "veryfast", "bf": "2"}, 30),
        ("avi", {}, 30),
    ],
)
def test_long_clip_plays_back_and_forth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, options: dict[str, str], gop: int
) -> None:
    monkeypatch.setattr(decode, "HELD_PICTURES", 9)
    path = make_video(tmp_path / f"a.{suffix}", pictures=70, gop=gop, options=options)
    clips = list(itertools.islice(Decode()(path), 26))
    assert numbers(clips) == ping_pong(70, 208)
    assert [n for clip in clips for n in clip.frames.shown] == ping_pong(70, 208)


def test_variable_rate_plays_back_and_forth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "HELD_PICTURES", 9)
    ticks = np.cumsum(np.random.default_rng(2).integers(1, 5, 40))
    path = make_video(tmp_path / "a.mp4", times=[Fraction(int(t - ticks[0]), 40) for t in ticks], pictures=40)
    once = all_numbers(path)
    expected = [once[i] for i in ping_pong(len(once), 4 * len(once))]
    assert numbers(itertools.islice(Decode(block=1)(path), len(expected))) == expected


def test_playing_back_holds_a_bounded_number_of_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "HELD_BYTES", 10 * 128 * 96 * 3 // 2)
    path = make_video(tmp_path / "a.mp4", pictures=120, gop=40)

    def alive() -> int:
        return sum(type(o) is Picture for o in gc.get_objects())

    before = alive()
    counts = [alive() - before for i, _ in enumerate(itertools.islice(Decode(block=4)(path), 64)) if i % 5 == 2]
    assert 4 <= max(counts) <= 10 + 2 * 4


def test_frames_of_the_decoder_are_freed_at_once(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", pictures=60, rotation_deg=90)
    info = probe(path)
    gc.collect()
    gc.disable()
    try:
        for clip in Decode(extend="none")(info):
            alive = sum(type(o) is av.VideoFrame for o in gc.get_objects())
            assert alive <= 4, clip.frames.start
    finally:
        gc.enable()


def test_freeze_repeats_the_last_object_and_none_ends(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", pictures=10)
    pictures = [p for c in itertools.islice(Decode(extend="freeze")(path), 4) for p in c.frames.pictures]
    assert [read_number(p) for p in pictures] == [*range(10), *[9] * 22]
    assert all(p is pictures[9] for p in pictures[10:])
    assert all_numbers(path) == list(range(10))


# Planes


def test_planes_stay_valid_and_unpainted_pixels_identical(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", pictures=40, size=(130, 98))
    kept = [p for c in Decode(extend="none")(path) for p in c.frames.pictures]
    again = [p for c in Decode(extend="none")(path) for p in c.frames.pictures]
    region = Region(20, 30, 40, 24)
    patch = Patch.of_rgb(region, np.full((24, 40, 3), 200, np.uint8), np.full((24, 40), 255, np.uint8), kept[0].color)
    for a, b in zip(kept, again, strict=True):
        painted = a.painted((patch,))
        for name, step in (("y", 1), ("u", 2), ("v", 2)):
            before, after, other = getattr(a, name), getattr(painted, name).copy(), getattr(b, name)
            assert np.array_equal(before, other)
            box = np.s_[30 // step : 54 // step, 20 // step : 60 // step]
            assert not np.array_equal(after[box], before[box])
            after[box] = before[box]
            assert np.array_equal(after, before)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("turned", [0, 90, 180, 270])
def test_rotation_is_applied_exactly(tmp_path: Path, turned: int, mirrored: bool) -> None:
    plain = first_picture(make_video(tmp_path / "plain.mp4", pictures=3))
    path = make_video(tmp_path / "turned.mp4", pictures=3, rotation_deg=turned, mirrored=mirrored)
    info, picture = probe(path), first_picture(path)
    for name in ("y", "u", "v"):
        expected = np.rot90(getattr(plain, name), turned // 90)
        assert np.array_equal(getattr(picture, name), expected[:, ::-1] if mirrored else expected)
        assert getattr(picture, name).flags.c_contiguous
    assert (info.width_px, info.height_px) == (picture.width_px, picture.height_px)
    assert (info.coded_width_px, info.coded_height_px) == (128, 96)
    assert info.rotation_deg == -turned % 360


def test_phone_video_is_turned_by_its_track_header(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", pictures=3)
    data = bytearray(path.read_bytes())
    one = 1 << 16
    upright, quarter = (
        np.array(m, ">i4").tobytes()
        for m in ([one, 0, 0, 0, one, 0, 0, 0, 1 << 30], [0, one, 0, -one, 0, 0, 96 * one, 0, 1 << 30])
    )
    at = data.index(upright, data.index(b"tkhd"))
    plain = first_picture(path)
    data[at : at + 36] = quarter
    path.write_bytes(data)
    assert probe(path).rotation_deg == 90
    assert np.array_equal(first_picture(path).y, np.rot90(plain.y, -1))


def test_odd_size_is_padded_by_its_edge(tmp_path: Path) -> None:
    luma = np.arange(95 * 127, dtype=np.uint32).reshape(95, 127).astype(np.uint8)
    path = make_video(tmp_path / "a.mkv", codec="ffv1", size=(127, 95), frames=[video_frame(luma)] * 3, options={})
    info, picture = probe(path), first_picture(path)
    assert (info.width_px, info.height_px, info.coded_width_px) == (128, 96, 127)
    assert any("odd" in n for n in info.notes)
    assert np.array_equal(picture.y, np.pad(luma, ((0, 1), (0, 1)), mode="edge"))
    assert picture.u.shape == (48, 64)


@pytest.mark.parametrize("pix_fmt", ["yuv420p10le", "yuv422p", "yuv444p", "yuv422p10le"])
def test_other_yuv_formats_are_converted(tmp_path: Path, pix_fmt: str) -> None:
    luma = numbered_luma(0xA5)
    path = make_video(
        tmp_path / "a.mkv", codec="ffv1", pix_fmt=pix_fmt, frames=[video_frame(luma, pix_fmt)] * 3, options={}
    )
    picture = first_picture(path)
    assert np.abs(picture.y.astype(int) - luma).max() <= 1
    assert np.abs(picture.u.astype(int) - 100).max() <= 1
    assert np.abs(picture.v.astype(int) - 150).max() <= 1
    assert any(pix_fmt in n for n in probe(path).notes)


def test_rgb_and_gray_are_converted(tmp_path: Path) -> None:
    rgb = np.zeros((96, 128, 3), np.uint8)
    rgb[:] = 200, 60, 30
    for array, kind in ((rgb, "rgb24"), (rgb[..., 0].copy(), "gray")):
        frame = av.VideoFrame.from_ndarray(array, kind)
        stored = "bgr0" if kind == "rgb24" else "gray"
        path = make_video(
            tmp_path / f"{kind}.mkv", codec="ffv1", pix_fmt=stored, frames=[frame.reformat(format=stored)] * 2
        )
        picture = first_picture(path)
        expected = (200, 60, 30) if kind == "rgb24" else (200, 200, 200)
        assert np.abs(picture.rgb().astype(int) - expected).max() <= 3, kind
        assert not picture.color.full_range


@pytest.mark.parametrize("pix_fmt", ["yuvj420p", "yuvj444p"])
def test_full_range_is_kept(tmp_path: Path, pix_fmt: str) -> None:
    luma = np.tile(np.arange(0, 256, 2, dtype=np.uint8), (96, 1))
    path = make_video(
        tmp_path / "a.mkv",
        codec="mjpeg",
        pix_fmt=pix_fmt,
        frames=[video_frame(luma, pix_fmt)] * 2,
        color=Color(full_range=True),
        options={"qmin": "1", "qmax": "1"},
    )
    picture = first_picture(path)
    assert picture.color.full_range
    assert np.abs(picture.y.astype(int) - luma).mean() < 2


def test_colour_tags(tmp_path: Path) -> None:
    tagged = Color(Matrix.BT2020, full_range=True, primaries=9, transfer=18)
    path = make_video(tmp_path / "a.mp4", pictures=2, color=tagged)
    assert probe(path).color == tagged
    assert any("HDR" in n for n in probe(path).notes)
    assert probe(make_video(tmp_path / "b.mp4", pictures=2)).color.matrix is Matrix.BT601
    assert probe(make_video(tmp_path / "c.mp4", pictures=1, size=(320, 720))).color.matrix is Matrix.BT709


# Bad files


def test_unusable_files_say_what_to_do(tmp_path: Path) -> None:
    good = make_video(tmp_path / "good.mp4", pictures=30)
    whole = good.read_bytes()
    bad = {
        "empty.mp4": (b"", "is empty"),
        "text.mp4": (b"This is a letter, not a film.\n" * 200, "no video"),
        "text.txt": (b"This is a letter, not a film.\n" * 200, "no video"),
        "cut.mp4": (whole[: whole.index(b"moov") - 8], "cut off"),
        "noise.mkv": (np.random.default_rng(0).bytes(20000), "no video"),
        "photo.heic": (b"\0\0\0\x18ftypheic" + bytes(100), "JPEG"),
        "list.m3u8": (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n", "no video"),
        "list.ffconcat": (b"ffconcat version 1.0\nfile good.mp4\n", "no video"),
        "half.jpg": (b"\xff\xd8\xff\xe0" + bytes(100), "."),
    }
    for name, (data, words) in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(MediaError, match=words):
            Decode()(tmp_path / name)
    for path, words in ((tmp_path / "none.mp4", "does not exist"), (tmp_path, "folder")):
        with pytest.raises(MediaError, match=words):
            probe(path)
    with pytest.raises(MediaError, match="sound but no picture"):
        probe(make_sound(tmp_path / "a.wav", beeps(4800, 48000, []), 48000))


def test_damage_in_the_middle_is_skipped_and_told(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", pictures=100, gop=10)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    middle = start + (data.index(b"moov") - start) // 2
    data[middle : middle + 4000] = bytes(4000)
    path.write_bytes(data)
    notes: list[str] = []
    shown = numbers(Decode(extend="none", on_note=notes.append)(path))
    assert len(shown) == 100
    assert shown[:20] == list(range(20))
    assert shown[-10:] == list(range(90, 100))
    assert len(notes) == 1
    assert "damaged" in notes[0]


def test_end_cut_off_gives_what_is_there(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mkv", pictures=100, gop=10)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    shown = all_numbers(path)
    assert shown == list(range(len(shown)))
    assert 40 < len(shown) < 90


def test_nothing_decodable_is_an_error(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", pictures=20)
    data = bytearray(path.read_bytes())
    start, end = data.index(b"mdat") + 4, data.index(b"moov") - 4
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    with pytest.raises(MediaError, match="decoded"):
        probe(path)


# Stills


def test_still_repeats_one_object(tmp_path: Path) -> None:
    rgb = np.zeros((75, 101, 3), np.uint8)
    rgb[:, :50] = 180, 40, 90
    rgb[:, 50:] = 30, 200, 220
    Image.fromarray(rgb).save(tmp_path / "a.png")
    info = probe(tmp_path / "a.png")
    assert (info.kind, info.width_px, info.height_px, info.rate) == ("still", 102, 76, 25)
    assert not info.has_audio
    for extend in ("loop", "freeze", "none"):
        clips = list(itertools.islice(Decode(extend=extend)(tmp_path / "a.png"), 3))
        assert len({id(p) for c in clips for p in c.frames.pictures}) == 1
        assert [c.frames.start for c in clips] == [0, 8, 16]
    shown = clips[0].frames.pictures[0].rgb()
    assert np.abs(shown[:75, :48].astype(int) - rgb[:, :48]).max() <= 2
    assert np.abs(shown[:75, 53:101].astype(int) - rgb[:, 53:]).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = np.full((64, 96, 3), 20, np.uint8)
    upright[:24, :32] = 240, 30, 30  # red in the top left corner
    upright[40:, 64:] = 30, 30, 240
    stored = Image.fromarray(upright)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose members that undo the orientation
    if orientation > 1:
        stored = stored.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    stored.save(path, exif=exif, **({"quality": 95} if suffix in ("jpg", "webp") else {}))
    info, picture = probe(path), first_picture(path)
    assert (info.width_px, info.height_px) == (picture.width_px, picture.height_px) == (96, 64)
    assert np.abs(picture.rgb()[4:20, 4:28].astype(int) - (240, 30, 30)).max() <= 25
    assert np.abs(picture.rgb()[44:60, 68:92].astype(int) - (30, 30, 240)).max() <= 25


def test_odd_kinds_of_stills(tmp_path: Path) -> None:
    layer = np.zeros((64, 64, 4), np.uint8)
    layer[:32] = 10, 20, 30, 255
    Image.fromarray(layer).save(tmp_path / "alpha.png")
    shown = first_picture(tmp_path / "alpha.png").rgb()
    assert np.abs(shown[:30].astype(int) - (10, 20, 30)).max() <= 2
    assert shown[34:].min() >= 253
    Image.fromarray(np.full((64, 64), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert abs(int(first_picture(tmp_path / "deep.png").rgb()[5, 5, 0]) - 127) <= 2
    Image.new("CMYK", (64, 64), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    assert first_picture(tmp_path / "cmyk.jpg").rgb()[5, 5].argmax() == 0
    Image.new("P", (64, 64), 3).save(tmp_path / "palette.gif")
    assert probe(tmp_path / "palette.gif").kind == "still"
    Image.new("RGB", (3001, 1500)).save(tmp_path / "large.jpg")
    large = probe(tmp_path / "large.jpg")
    assert (large.width_px, large.height_px) == (1920, 960)
    assert "scaled" in large.notes[0]


def test_animated_gif_is_a_video(tmp_path: Path) -> None:
    grays = [Image.new("L", (64, 64), 40 * i) for i in range(5)]
    grays[0].save(tmp_path / "a.gif", save_all=True, append_images=grays[1:], duration=100, loop=0)
    info = probe(tmp_path / "a.gif")
    assert (info.kind, info.rate) == ("video", 10)
    pictures = [p for c in Decode(extend="none")(info) for p in c.frames.pictures]
    assert [round(float(p.rgb().mean()) / 40) for p in pictures] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("white", [1, 255, 65535])
@pytest.mark.parametrize("width", [64, 8192])
def test_stills_of_floats_show_what_they_hold(tmp_path: Path, white: int, width: int) -> None:
    ramp = np.linspace(0, white, width, dtype=np.float32)[None].repeat(64, axis=0)
    ramp[0, :3] = np.nan, np.inf, -white
    if white == 1:
        ramp[0, 3] = 1.5
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    shown = next(iter(Decode(1)(tmp_path / "a.tif"))).frames.pictures[0].rgb()
    got = shown[shown.shape[0] // 2 :].mean(axis=(0, 2))
    assert np.abs(got - np.linspace(0, 255, shown.shape[1])).max() < 3


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "1", "L", "I;16", "CMYK"])
def test_very_large_stills_are_reduced_in_steps(tmp_path: Path, mode: str) -> None:
    ramp = np.linspace(0, 255, 8192, dtype=np.uint8)[None].repeat(64, axis=0)
    picture = Image.fromarray(ramp).convert("L" if mode == "I;16" else "RGB" if mode in ("RGBA", "CMYK") else mode)
    if mode == "I;16":
        picture = Image.fromarray(ramp.astype(np.uint16) * 257)
    elif mode in ("RGBA", "CMYK"):
        picture = picture.convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(path)
    info = probe(path)
    shown = next(iter(Decode(1)(info))).frames.pictures[0]
    assert (shown.width_px, shown.height_px, info.coded_width_px) == (1920, 16, 8192)  # 15 rows and one of padding
    wanted = np.linspace(0, 255, 1920)
    got = shown.rgb()[..., 1].mean(axis=0)
    assert np.abs(got[8:-8] - wanted[8:-8]).mean() < (12 if mode == "1" else 2)  # dithered


@pytest.mark.parametrize(("rate_hz", "channels"), [(1, 1), (2**31 - 1, 1), (16_000, 9)])
def test_sound_that_no_one_hears_is_refused(tmp_path: Path, rate_hz: int, channels: int) -> None:
    head = struct.pack("<HHIIHH", 1, channels, rate_hz, rate_hz * channels * 2 % 2**32, channels * 2, 16)
    data = bytes(3600)
    (tmp_path / "a.wav").write_bytes(
        b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + struct.pack("<I", 16) + head
        + b"data" + struct.pack("<I", len(data)) + data
    )  # fmt: skip
    with pytest.raises(MediaError, match=f"its sound has {channels} channels of {rate_hz} Hz"):
        audio_info(tmp_path / "a.wav")


@pytest.mark.parametrize("look", [probe, audio_info, read_audio, decode.length, Decode()])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, look: Callable[[Path], object]) -> None:
    path = tmp_path / "a.mp4"
    os.mkfifo(path)
    with pytest.raises(MediaError, match=r"a.mp4 is a device or a pipe\. Write what comes from it to a file first"):
        look(path)


def test_a_file_says_how_long_it_is(tmp_path: Path) -> None:
    assert decode.length(make_sound(tmp_path / "a.wav", np.zeros((1, 8000), np.float32), 8000)) == 1
    assert decode.length(make_video(tmp_path / "a.mkv", pictures=50)) == 2


def test_absurd_stills_are_refused(tmp_path: Path) -> None:
    for width, height in ((20000, 20000), (12000, 11000)):
        chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + bytes(8))
        data = b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
        path = tmp_path / f"{width}.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
        with pytest.raises(MediaError, match="pixels"):
            probe(path)


def test_from_rgb_round_trip() -> None:
    rgb = np.kron(np.random.default_rng(0).integers(0, 256, (8, 8, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    back = from_rgb(rgb).rgb()
    inner = np.s_[4:12, 4:12]
    for i, j in itertools.product(range(8), range(8)):
        block = np.s_[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
        assert np.abs(back[block][inner].astype(int) - rgb[block][inner]).max() <= 3


# Sound


@pytest.mark.parametrize(("suffix", "codec", "rate_hz"), [("mp4", "aac", 44100), ("webm", "libopus", 48000)])
@pytest.mark.parametrize("offset", ["0", "37/100", "-1/4"])
def test_sound_keeps_its_place(tmp_path: Path, suffix: str, codec: str, rate_hz: int, offset: str) -> None:
    late = Fraction(offset)  # of the sound after the picture
    at = [Fraction(1, 2), Fraction(3, 2)]
    path = make_video(
        tmp_path / f"a.{suffix}",
        pictures=60,
        codec="libx264" if suffix == "mp4" else "libvpx-vp9",
        options={} if suffix == "mp4" else VP9,
        video_start=max(-late, Fraction(0)),
        audio=[(codec, beeps(2 * rate_hz, rate_hz, at, 2), rate_hz, max(late, Fraction(0)))],
    )
    assert all_numbers(path) == list(range(60))
    pcm = sound(path)
    assert pcm.shape[0] == 2
    tolerance = rate_hz // 1000 + 10 if late else 10  # these containers keep an offset in milliseconds
    heard = onsets(pcm, rate_hz)
    assert len(heard) == 2
    for sample, time in zip(heard, at, strict=True):
        assert abs(sample - (time + late) * rate_hz) <= tolerance
    assert abs(pcm.shape[1] - (2 + late) * rate_hz) <= tolerance


def test_several_streams(tmp_path: Path) -> None:
    tracks = [("aac", beeps(48000, 48000, [Fraction(i + 1, 5)], 1 + i % 2), 48000, Fraction(0)) for i in range(3)]
    path = make_video(tmp_path / "a.mp4", pictures=25, audio=tracks, languages=("eng", "fra", "deu"), default_audio=1)
    info = probe(path)
    assert [(a.index, a.language, a.channels) for a in info.audio] == [(0, "eng", 1), (1, "fra", 2), (2, "deu", 1)]
    chosen = next((a.index for a in info.audio if a.default), 0)
    assert audio_info(path).index == chosen
    for stream in (None, 0, 1, 2):
        at = (chosen if stream is None else stream) + 1
        assert abs(onsets(sound(path, stream=stream), 48000)[0] - at * 9600) <= 10
    with pytest.raises(UsageError, match="0, 1, 2"):
        read_audio(path, stream=3)


def test_no_sound(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", pictures=5)
    with pytest.raises(NoAudioError):
        read_audio(path)
    (tmp_path / "a.wav").write_bytes(b"")
    with pytest.raises(MediaError, match="empty"):
        read_audio(tmp_path / "a.wav")
    (tmp_path / "b.wav").write_bytes(b"no sound at all" * 100)
    with pytest.raises(MediaError, match="no video, picture or sound"):
        read_audio(tmp_path / "b.wav")


@pytest.mark.parametrize(
    ("suffix", "codec", "rate_hz", "slack"),
    [
        ("wav", "pcm_s16le", 22050, 0),
        ("wav", "pcm_s32le", 44100, 0),
        ("wav", "pcm_u8", 8000, 0),
        ("wav", "pcm_f32le", 96000, 0),
        ("flac", "flac", 44100, 0),
        ("mp3", "libmp3lame", 44100, 2304),
        ("m4a", "aac", 44100, 45),
        ("ogg", "libopus", 48000, 0),
    ],
)
def test_sound_files(tmp_path: Path, suffix: str, codec: str, rate_hz: int, slack: int) -> None:
    pcm = beeps(rate_hz * 2 + 123, rate_hz, [Fraction(1, 2), Fraction(5, 4)])
    path = make_sound(tmp_path / f"a.{suffix}", pcm, rate_hz, codec)
    got = sound(path)
    assert 0 <= got.shape[1] - pcm.shape[1] <= slack
    assert got.dtype == np.float32
    for a, b in zip(onsets(got, rate_hz), onsets(pcm, rate_hz), strict=True):
        assert abs(a - b) <= 8
    if suffix in ("wav", "flac"):
        assert np.abs(got - pcm).max() <= (0.005 if codec == "pcm_u8" else 2e-5)


def test_gap_becomes_silence(tmp_path: Path) -> None:
    pcm = beeps(96000, 48000, [Fraction(1, 4), Fraction(3, 2)])
    path = tmp_path / "a.mka"
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=48000)
        stream.codec_context.layout = "mono"
        for start in range(0, 96000, 4800):
            if not 24000 <= start < 48000:
                frame = av.AudioFrame.from_ndarray(pcm[:, start : start + 4800].copy(), "fltp", "mono")
                frame.rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
                container.mux(stream.encode(frame))
    got = sound(path)
    assert got.shape == pcm.shape
    assert np.abs(got - pcm).max() < 1e-4


@pytest.mark.parametrize(("source", "target"), [(44100, 48000), (48000, 16000), (24000, 48000), (22050, 44100)])
def test_resampling_keeps_time_and_length(source: int, target: int) -> None:
    length, impulse = 3 * source + 17, source + source // 3
    pcm = np.zeros((2, length), np.float32)
    pcm[:, impulse] = 1
    tone = (0.3 * np.sin(2 * np.pi * 440 * np.arange(length) / source)).astype(np.float32)
    for signal in (pcm, np.stack([tone, tone])):
        blocks = [Audio(signal[:, i : i + 1000].copy(), source, i) for i in range(0, length, 1000)]
        out = list(resample(iter(blocks), target))
        got = np.concatenate([b.pcm for b in out], axis=1)
        assert [b.start for b in out] == [sum(b.samples for b in out[:i]) for i in range(len(out))]
        assert got.shape == (2, round(Fraction(length * target, source)))
        if signal is pcm:
            assert abs(int(np.abs(got[0]).argmax()) - impulse * target / source) <= 1
        else:
            expected = 0.3 * np.sin(2 * np.pi * 440 * np.arange(got.shape[1]) / target)
            assert np.abs(got[0] - expected)[200:-200].max() < 2e-3


@pytest.mark.parametrize("target", [48000, 24000])
def test_phones_go_along_with_the_sound_in_which_they_begin(target: int) -> None:
    phones = tuple(Phone("a", i * 70, i * 70 + 70) for i in range(20))
    blocks = []
    for i in range(0, 36_000, 1700):
        begins = tuple(p for p in phones if i <= p.start_ms * 24 < i + 1700)
        blocks.append(Audio(np.zeros((1, min(1700, 36_000 - i)), np.float32), 24000, i, begins))
    out = list(resample(iter(blocks), target))
    assert tuple(p for b in out for p in b.phones) == phones
    for block in out:
        for phone in block.phones:
            begin = phone.start_ms * target / 1000
            assert begin < block.start + block.samples
            assert begin >= block.start or target == 48000  # the resampler holds the last samples back


@pytest.mark.parametrize(
    ("layout", "left"),
    [  # how much of each channel goes left, against that of the left one
        ("2.1", [1, 0, 0]),
        ("3.0", [1, 0, 0.707]),
        ("3 channels", [1, 1, 1]),
        ("quad", [1, 0, 0.707, 0]),
        ("4.0", [1, 0, 0.707, 0.5]),
        ("4.1", [1, 0, 0.707, 0, 0.5]),
        ("6 channels", [1, 0, 0.707, 0, 0.707, 0]),
        ("7.1", [1, 0, 0.707, 0, 0.707, 0, 0.707, 0]),
    ],
)
def test_more_channels_are_mixed_to_stereo_by_their_places(tmp_path: Path, layout: str, left: list[float]) -> None:
    count, path = len(left), tmp_path / "a.wav"
    pcm = np.zeros((count, 1000 * count), np.float32)
    for channel in range(count):
        pcm[channel, 1000 * channel : 1000 * channel + 1000] = 0.5  # one after another
    make_sound(path, pcm, 48000, "pcm_f32le", layout=layout)
    assert audio_info(path).layout == {"6 channels": "5.1"}.get(layout, layout)
    assert np.array_equal(sound(path), pcm)
    got = np.concatenate([b.pcm for b in read_audio(path, stereo=True)], axis=1)
    assert got.shape == (2, pcm.shape[1])
    heard = got[0].reshape(count, 1000)
    assert np.ptp(heard, axis=1).max() < 1e-6
    assert heard[:, 0] / heard[0, 0] == pytest.approx(left, abs=0.001)
    assert heard[:, 0].sum() <= 0.5 + 1e-6, "never beyond full scale"
    assert sound(path, 16_000).shape[0] == count


def test_eight_channels_in_planes_are_read(tmp_path: Path) -> None:
    pcm = beeps(48_000, 48_000, [Fraction(1, 4)], 8) * np.arange(1, 9, dtype=np.float32)[:, None] / 8
    got = sound(make_sound(tmp_path / "a.m4a", pcm, 48_000, "aac", layout="7.1"))
    assert got.shape[0] == 8
    loud = np.abs(got).max(axis=1)
    loud[3] = 0.4  # AAC takes the high sounds from the low-frequency channel
    assert loud == pytest.approx(0.8 * np.arange(1, 9) / 8, abs=0.12)


def test_one_and_two_channels_stay_as_they_are(tmp_path: Path) -> None:
    for channels in (1, 2):
        path = make_sound(tmp_path / "a.wav", beeps(4800, 48000, [Fraction(0)], channels), 48000)
        assert np.array_equal(sound(path), np.concatenate([b.pcm for b in read_audio(path, stereo=True)], axis=1))


def test_mixing() -> None:
    pcm = np.zeros((6, 100), np.float32)
    pcm[2] = 0.5
    for channels in (1, 2):
        mixed = next(resample(iter([Audio(pcm, 48000)]), 48000, channels)).pcm
        assert mixed.shape == (channels, 100)
        assert (mixed > 0.09).all()
        assert np.ptp(mixed) == 0
    assert next(resample(iter([Audio(pcm[2:3], 48000)]), 48000, 2)).pcm.shape == (2, 100)
    assert list(resample(iter([]), 16000)) == []
    with pytest.raises(UsageError):
        list(resample(iter([Audio(pcm[:2], 48000)]), 48000, 6))


def test_wrong_arguments() -> None:
    with pytest.raises(UsageError):
        Decode(block=0)


def test_name_with_odd_characters(tmp_path: Path) -> None:
    path = shutil.copy(make_video(tmp_path / "a.mp4", pictures=4), tmp_path / "pipe:1 ä %03d.mp4")
    assert all_numbers(Path(path)) == [0, 1, 2, 3]
