"""Media made on the spot for tests: numbered pictures, flashes and beeps at known times."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt

from beavervision.media import F32, U8, Audio, Clip, Color, Frames, Picture, sample_at

BITS = 16
DARK, LIGHT = 40, 210


def numbered_luma(number: int, width: int = 128, height: int = 96) -> U8:
    """A luma plane that carries `number` in its upper half as 16 bars and in its lower half as a gray level."""
    luma = np.full((height, width), 60 + number * 7 % 128, np.uint8)
    for bit in range(BITS):
        luma[: height // 2, width * bit // BITS : width * (bit + 1) // BITS] = LIGHT if number >> bit & 1 else DARK
    return luma


def read_number(picture: Picture) -> int:
    """The number that :func:`numbered_luma` put there."""
    height, width = picture.y.shape
    row = picture.y[height // 4]
    return sum(int(row[width * (2 * bit + 1) // (2 * BITS)] > (DARK + LIGHT) // 2) << bit for bit in range(BITS))


def numbered_picture(number: int, width: int = 128, height: int = 96, color: Color | None = None) -> Picture:
    half = (height // 2, width // 2)
    return Picture(
        numbered_luma(number, width, height),
        np.full(half, 100, np.uint8),
        np.full(half, 150, np.uint8),
        color or Color(),
    )


def numbers(clips: Iterable[Clip]) -> list[int]:
    """The numbers of all pictures of `clips`."""
    return [read_number(p) for clip in clips for p in clip.frames.pictures]


def beeps(samples: int, rate_hz: int, at_s: Sequence[Fraction], channels: int = 1) -> F32:
    """Silence with a short 1 kHz beep that starts on the sample nearest to each time."""
    pcm = np.zeros((channels, samples), np.float32)
    tone = np.sin(2 * np.pi * 1000 / rate_hz * (np.arange(rate_hz // 50) + 0.25)).astype(np.float32) * 0.8
    for time in at_s:
        start = round(time * rate_hz)
        length = max(min(len(tone), samples - start), 0)
        pcm[:, start : start + length] = tone[:length]
    return pcm


def onsets(pcm: F32, rate_hz: int) -> list[int]:
    """The first sample of each beep: where the sound comes from silence to half of its peak."""
    loud = np.flatnonzero(np.abs(pcm[0]) > 0.4 * np.abs(pcm[0]).max())
    return [int(s) for i, s in enumerate(loud) if i == 0 or s - loud[i - 1] > rate_hz // 10]


def clips_of(
    pictures: Sequence[Picture], rate: Fraction, pcm: F32 | None = None, rate_hz: int = 48000, block: int = 8
) -> Iterable[Clip]:
    """Pictures and the samples heard while they show, in clips of `block`."""
    for start in range(0, len(pictures), block):
        frames = Frames(tuple(pictures[start : start + block]), start, rate)
        audio = None
        if pcm is not None:
            first, last = sample_at(start, rate, rate_hz), sample_at(frames.stop, rate, rate_hz)
            audio = Audio(pcm[:, first:last], rate_hz, first)
        yield Clip(frames, audio=audio)


def video_frame(
    luma: npt.NDArray[Any], pix_fmt: str = "yuv420p", chroma: tuple[int, int] = (100, 150)
) -> av.VideoFrame:
    """A frame in `pix_fmt` with this 8-bit luma and constant chroma (of 8 bits)."""
    height, width = luma.shape
    frame = av.VideoFrame(width, height, pix_fmt)
    wide = "10le" in pix_fmt
    for index, plane in enumerate(frame.planes):
        kind: Any = np.uint16 if wide else np.uint8
        rows = np.frombuffer(memoryview(plane), kind).reshape(plane.height, -1)
        values = luma if index == 0 else np.full((plane.height, plane.width), chroma[index - 1], np.uint8)
        rows[:, : values.shape[1]] = values.astype(kind) * (4 if wide else 1)
    return frame


def make_video(
    path: Path,
    *,
    pictures: int = 50,
    rate: Fraction = Fraction(25),
    size: tuple[int, int] = (128, 96),
    times: Sequence[Fraction] | None = None,
    video_start: Fraction = Fraction(0),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    gop: int = 12,
    rotation_deg: int = 0,
    mirrored: bool = False,
    color: Color | None = None,
    frames: Iterable[av.VideoFrame] | None = None,
    audio: Sequence[tuple[str, F32, int, Fraction]] = (),
    languages: Sequence[str] = (),
    default_audio: int | None = None,
    time_base: Fraction | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """Write a video of numbered pictures (or `frames`).

    times are the pictures' times in seconds (default i / rate); audio has (codec, pcm, rate_hz, start in seconds) for
    each stream, of one or two channels; rotation_deg is counter-clockwise, as FFmpeg counts.
    """
    base = time_base or (1 / rate if times is None and not video_start else Fraction(1, 90000))
    with av.open(f"file:{path}", "w") as container:
        video = container.add_stream(codec, rate=rate, options={"crf": "10"} | (options or {}))
        video.width, video.height, video.pix_fmt = *size, pix_fmt
        video.codec_context.time_base, video.codec_context.gop_size = base, gop
        video.codec_context.thread_count = 1
        if codec == "libx264":
            video.options |= {"preset": "ultrafast"} | (options or {})
        if color is not None:
            video.codec_context.colorspace = {"bt709": 1, "bt601": 6, "bt2020": 9}[color.matrix]
            video.codec_context.color_range = 2 if color.full_range else 1
            video.codec_context.color_primaries, video.codec_context.color_trc = color.primaries, color.transfer
        if rotation_deg or mirrored:
            video.set_display_rotation(rotation_deg, hflip=mirrored)
        sounds = []
        for number, (name, pcm, rate_hz, start) in enumerate(audio):
            stream = container.add_stream(name, rate=rate_hz)
            stream.codec_context.layout = "mono" if pcm.shape[0] == 1 else "stereo"
            stream.codec_context.time_base = Fraction(1, rate_hz)
            if number < len(languages):
                stream.metadata["language"] = languages[number]
            if default_audio is not None:
                flag = av.stream.Disposition.default if number == default_audio else av.stream.Disposition(0)
                stream.disposition = flag
            sounds.append((stream, pcm, rate_hz, round(start * rate_hz)))
        given = [0] * len(sounds)
        source = frames or (video_frame(numbered_luma(i, *size), pix_fmt) for i in range(pictures))
        for i, frame in enumerate(source):
            time = times[i] if times is not None else i / rate
            frame.pts, frame.time_base = round((time + video_start) / base), base
            container.mux(video.encode(frame))
            for k, (stream, pcm, rate_hz, start) in enumerate(sounds):
                upto = min(round((time + video_start + Fraction(1, 2)) * rate_hz), pcm.shape[1])
                given[k] = _give(container, stream, pcm, rate_hz, start, given[k], upto)
        container.mux(video.encode(None))
        for k, (stream, pcm, rate_hz, start) in enumerate(sounds):
            _give(container, stream, pcm, rate_hz, start, given[k], pcm.shape[1])
            container.mux(stream.encode(None))
    return path


def _give(container: Any, stream: Any, pcm: F32, rate_hz: int, start: int, given: int, upto: int) -> int:
    if upto > given:
        layout = "mono" if pcm.shape[0] == 1 else "stereo"
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm[:, given:upto]), "fltp", layout)
        frame.rate, frame.pts, frame.time_base = rate_hz, start + given, Fraction(1, rate_hz)
        container.mux(stream.encode(frame))
    return max(upto, given)


def make_sound(path: Path, pcm: F32, rate_hz: int, codec: str = "pcm_s16le", layout: str = "") -> Path:
    """Write a sound file; the codec must fit the suffix, and the layout (FFmpeg's name; mono or stereo if empty) the channels."""
    layout = layout or ("mono" if pcm.shape[0] == 1 else "stereo")
    with av.open(f"file:{path}", "w") as container:
        stream = container.add_stream(codec, rate=rate_hz)
        stream.codec_context.layout = layout
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm.T).reshape(1, -1), "flt", layout)
        frame.rate, frame.pts, frame.time_base = rate_hz, 0, Fraction(1, rate_hz)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def with_sound(clips: Iterable[Clip], pcm: F32, rate_hz: int) -> Iterable[Clip]:
    """Each clip with exactly the samples heard while its pictures show, silence after the end."""
    for clip in clips:
        first = sample_at(clip.frames.start, clip.frames.rate, rate_hz)
        last = sample_at(clip.frames.stop, clip.frames.rate, rate_hz)
        part = pcm[:, first:last]
        part = np.pad(part, ((0, 0), (0, last - first - part.shape[1])))
        yield Clip(clip.frames, audio=Audio(part, rate_hz, first))


def make_flashes(
    path: Path, rate: Fraction, rate_hz: int, seconds: int, every_s: int, *, variable: bool = False
) -> list[Fraction]:
    """A video of 64 x 64 that flashes and beeps at once, every so often; the times of the flashes are returned.

    With `variable`, pictures come at 0.4 to 1.6 of the rate's spacing.
    """
    count = int(seconds * rate)
    times = [i / rate for i in range(count)]
    if variable:
        ticks = np.random.default_rng(3).integers(-27, 28, count)
        times = [t + Fraction(int(k), 90) / rate if i else t for i, (t, k) in enumerate(zip(times, ticks, strict=True))]
    starts = [bisect_left(times, s) for s in range(every_s // 2, seconds, every_s)]
    at = [times[i] for i in starts]
    lit = np.zeros(count, bool)
    for start in starts:
        lit[start : start + max(2, int(rate / 10))] = True
    dark, light = (video_frame(np.full((64, 64), v, np.uint8), chroma=(128, 128)) for v in (30, 220))
    make_video(
        path,
        rate=rate,
        times=times if variable else None,
        gop=250,
        size=(64, 64),
        frames=(light if flash else dark for flash in lit),
        audio=[("aac", beeps(seconds * rate_hz, rate_hz, at), rate_hz, Fraction(0))],
    )
    return at


def measured_flashes(path: Path) -> tuple[list[Fraction], list[Fraction], int]:
    """When flashes are seen and beeps are heard, by the container's own stamps, and the number of pictures."""
    seen: list[Fraction] = []
    count, lit = 0, False
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            count += 1
            now = float(frame.to_ndarray(format="gray").mean()) > 120
            if now and not lit:
                seen.append(Fraction(frame.pts * frame.time_base))
            lit = now
    heard: list[Fraction] = []
    with av.open(str(path)) as container:
        frames = list(container.decode(audio=0))
    pcm = np.concatenate([f.to_ndarray() for f in frames], axis=1)
    first, rate_hz = frames[0].pts * frames[0].time_base, frames[0].sample_rate
    heard = [first + Fraction(s, rate_hz) for s in onsets(pcm, rate_hz)]
    return seen, heard, count
