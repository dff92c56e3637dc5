"""Pictures and their sound to a file, whole or not at all.

The file grows under a temporary name beside its place and is renamed when it is complete. Picture i is stamped i / rate
and sample k is stamped k / rate_hz, both as integers in their own time base, so sound and picture cannot drift.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.audio.stream import AudioStream
from av.container import OutputContainer
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.stream import VideoStream

from beavervision.errors import OutputError, UsageError
from beavervision.files import partial, place_of
from beavervision.media import Audio, Clip, Color, Matrix, Picture, Stage

PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")


@dataclass(frozen=True, slots=True)
class _Format:
    muxer: str
    video: str
    audio: str
    audio_rates_hz: tuple[int, ...]  # other rates are resampled to 48 kHz by the encoder
    options: tuple[tuple[str, str], ...] = ()


_AAC_HZ = (48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)
# The movie's own clock rounds where the sound starts and ends, to milliseconds unless it is told to be finer.
_MOV = (("movflags", "+faststart"), ("movie_timescale", "90000"))
FORMATS = {
    ".mp4": _Format("mp4", "libx264", "aac", _AAC_HZ, _MOV),
    ".m4v": _Format("mp4", "libx264", "aac", _AAC_HZ, _MOV),
    ".mov": _Format("mov", "libx264", "aac", _AAC_HZ, _MOV),
    ".mkv": _Format("matroska", "libx264", "aac", _AAC_HZ),
    ".webm": _Format("webm", "libvpx-vp9", "libopus", (48000,)),
}
# What this preset can do without on talking heads: a quarter of its CPU time, for 0.6 % more bits at the same PSNR. Weighted
# prediction is for fades.
_SPARED = {"veryfast": "me=dia:partitions=i4x4,i8x8:weightp=0"}
_MATRIX_CODES = {Matrix.BT709: 1, Matrix.BT601: 6, Matrix.BT2020: 9}
# Of so many channels. Three, four, seven and eight have several layouts, and those that AAC and Opus know are not the same.
_LAYOUTS = {1: "mono", 2: "stereo", 5: "5.0", 6: "5.1"}
LAYOUTS = frozenset({*_LAYOUTS.values(), "5.0(side)", "5.1(side)"})  # the sound that can be written as it is
# FFmpeg's usual coder takes two to three times as long, and is no nearer to the sound at such bit rates.
AAC_OPTIONS = {"aac_coder": "fast"}
_BITS_PER_CHANNEL = 96_000


def check_output(path: Path | str) -> None:
    """Find out, before any work, whether a video can be written to `path`.

    Raises:
        UsageError: the suffix names no format that can be written; the message lists those that can.
        OutputError: the folder is missing or not writable, or `path` is a folder, a device or a pipe.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: cannot write {path.suffix or 'a file without suffix'}. Use {', '.join(FORMATS)}.")
    with _translated(path):
        place = place_of(path)
        if not place.parent.is_dir():
            raise OutputError(f"The folder {place.parent} does not exist. Create it, or write elsewhere.")
        trial = partial(place)
        try:
            trial.touch(exist_ok=False)
        finally:
            trial.unlink(missing_ok=True)


class Encode:
    """Writes clips as they pass: H.264 and AAC (mp4, m4v, mov, mkv), or VP9 and Opus (webm), by the path's suffix.

    preset and crf are those of x264, but that "veryfast" looks for motion as "superfast" does and has no weighted prediction; VP9
    runs in its real-time mode with the same share of its own crf scale. threads is for the video encoder. Sound has one or two
    channels, five (5.0) or six (5.1).
    """

    name = "encode"

    def __init__(self, preset: str = "veryfast", crf: int = 20, threads: int = 1) -> None:
        if preset not in PRESETS:
            raise UsageError(f"unknown preset {preset!r}. Known: {', '.join(PRESETS)}.")
        if not 0 <= crf <= 51:
            raise UsageError(f"crf is a number from 0 (best) to 51 (worst), not {crf}.")
        if threads < 1:
            raise UsageError(f"threads must be 1 or more, not {threads}.")
        self._preset = preset
        self._crf = crf
        self._threads = threads

    def to(self, path: Path | str) -> Stage:
        """The stage that writes to `path`, replacing a file there once all clips have passed; a symbolic link is followed.

        The stage yields each clip after writing it. The file comes to be when the stage has been read to its end; if
        that does not happen, because of an error, an interrupt or a reader that stops, nothing is left and an older
        file at `path` stays as it was. Either all clips have sound or none.

        Raises:
            UsageError, OutputError: as :func:`check_output`, and OutputError when writing fails or nothing came.
        """
        check_output(path)
        return _Sink(self, Path(path))

    def _write(self, clips: Iterator[Clip], path: Path) -> Iterator[Clip]:
        check_output(path)
        with _translated(path):
            place = place_of(path)
        part = partial(place)
        writer: _Writer | None = None
        try:
            for clip in clips:
                with _translated(path):
                    if writer is None:
                        writer = _Writer(part, path, clip, self._preset, self._crf, self._threads)
                    writer.write(clip)
                yield clip
            if writer is None:
                raise OutputError(f"{path}: there was no picture to write.")
            with _translated(path):
                writer.finish()
                _flush_to_disk(part)
                part.replace(place)
        finally:
            part.unlink(missing_ok=True)  # first, so that closing does not rearrange a file nobody wants
            if writer is not None:
                writer.abandon()


class _Sink:
    name = "encode"

    def __init__(self, encode: Encode, path: Path) -> None:
        self._encode = encode
        self._path = path

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        return self._encode._write(clips, self._path)


class _Writer:
    """An open output file: two streams and how far each has come."""

    def __init__(self, part: Path, path: Path, first: Clip, preset: str, crf: int, threads: int) -> None:
        picture, kind = first.frames.pictures[0], FORMATS[path.suffix.lower()]
        self._size = (picture.width_px, picture.height_px)
        self._rate = first.frames.rate
        self._pictures = self._samples = 0
        self._sound = first.audio
        self._container: OutputContainer | None = av.open(
            f"file:{part}", "w", format=kind.muxer, container_options=dict(kind.options)
        )
        self._video = _video_stream(self._container, kind, self._rate, picture, preset, crf, threads)
        self._audio = _audio_stream(self._container, kind, first.audio) if first.audio else None

    def write(self, clip: Clip) -> None:
        if clip.frames.rate != self._rate or (clip.audio is None) != (self._sound is None):
            raise ValueError("all clips of a file need the same rate, and sound in each or in none")
        assert self._container is not None
        for picture in clip.frames.pictures:
            if (picture.width_px, picture.height_px) != self._size:
                raise ValueError(f"picture of {picture.width_px}x{picture.height_px} in a file of {self._size}")
            frame = video_frame(picture)
            frame.pts, frame.time_base = self._pictures, 1 / self._rate
            self._mux(self._video.encode(frame))
            self._pictures += 1
        if clip.audio is not None and clip.audio.samples:
            assert self._audio is not None
            assert self._sound is not None
            if (clip.audio.rate_hz, clip.audio.channels) != (self._sound.rate_hz, self._sound.channels):
                raise ValueError("all clips of a file need sound of the same rate and channels")
            self._mux(self._audio.encode(_sound_frame(clip.audio, self._samples)))
            self._samples += clip.audio.samples

    def finish(self) -> None:
        """Write what the encoders still hold, and the index."""
        self._mux(self._video.encode(None))
        if self._audio is not None and self._samples:
            self._mux(self._audio.encode(None))
        container, self._container = self._container, None
        if container is not None:
            container.close()

    def abandon(self) -> None:
        """Close without caring for the result."""
        container, self._container = self._container, None
        if container is not None:
            with suppress(av.FFmpegError, OSError, ValueError):
                container.close()

    def _mux(self, packets: list[Packet[Any]]) -> None:
        assert self._container is not None
        for packet in packets:
            if packet.stream is self._video and not packet.duration:
                packet.duration = round(1 / (self._rate * (packet.time_base or 1 / self._rate)))
            self._container.mux_one(packet)


def _video_stream(
    container: OutputContainer, kind: _Format, rate: Fraction, picture: Picture, preset: str, crf: int, threads: int
) -> VideoStream:
    if kind.video == "libx264":
        options = {"preset": preset, "crf": str(crf), "x264-params": _SPARED.get(preset, "")}
    else:
        options = {"deadline": "realtime", "cpu-used": "8", "crf": str(round(crf * 63 / 51)), "b": "0"}
    stream = container.add_stream(kind.video, rate=rate, options=options)
    assert isinstance(stream, VideoStream)
    context = stream.codec_context
    context.width, context.height, context.pix_fmt = picture.width_px, picture.height_px, "yuv420p"
    context.time_base = 1 / rate
    context.thread_count = threads
    tag(context, picture.color)
    return stream


def _audio_stream(container: OutputContainer, kind: _Format, sound: Audio) -> AudioStream:
    if sound.channels not in _LAYOUTS:
        raise UsageError(f"sound of {sound.channels} channels cannot be written. Mix it to stereo first.")
    rate_hz = sound.rate_hz if sound.rate_hz in kind.audio_rates_hz else 48000
    stream = container.add_stream(kind.audio, rate=rate_hz, options=AAC_OPTIONS if kind.audio == "aac" else {})
    assert isinstance(stream, AudioStream)
    stream.codec_context.layout = _LAYOUTS[sound.channels]
    stream.codec_context.bit_rate = _BITS_PER_CHANNEL * sound.channels
    stream.codec_context.time_base = Fraction(1, rate_hz)
    return stream


def video_frame(picture: Picture) -> av.VideoFrame:
    """The picture with its colour tags as FFmpeg knows it, at no time yet."""
    frame = av.VideoFrame(picture.width_px, picture.height_px, "yuv420p")
    for plane, values in zip(frame.planes, (picture.y, picture.u, picture.v), strict=True):
        rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
        rows[: values.shape[0], : values.shape[1]] = values
    tag(frame, picture.color)
    return frame


def tag(what: av.VideoFrame | VideoCodecContext, color: Color) -> None:
    """Let a frame, or an encoder that is not open yet, say how its planes map to light."""
    what.colorspace, what.color_range = _MATRIX_CODES[color.matrix], 2 if color.full_range else 1
    what.color_primaries, what.color_trc = color.primaries, color.transfer


def _sound_frame(audio: Audio, start: int) -> av.AudioFrame:
    pcm = np.ascontiguousarray(np.clip(audio.pcm, -1, 1))
    frame = av.AudioFrame.from_ndarray(pcm, "fltp", _LAYOUTS[audio.channels])
    frame.rate, frame.pts, frame.time_base = audio.rate_hz, start, Fraction(1, audio.rate_hz)
    return frame


def _flush_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_REASONS = {
    errno.ENOSPC: "the disk is full. Free some space, or write to another disk",
    errno.EDQUOT: "your disk quota is used up. Free some space, or write to another disk",
    errno.EFBIG: "the file grew beyond the size allowed here. Raise the limit, or write to another disk",
    errno.EACCES: "no permission. Write to a folder of your own, or change its permissions",
    errno.EPERM: "no permission. Write to a folder of your own, or change its permissions",
    errno.EROFS: "the disk is read-only. Write to another disk",
    errno.ENAMETOOLONG: "the name is too long. Use a shorter one",
}


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, av.FFmpegError) as error:
        reason = _REASONS.get(error.errno or 0, f"{error.strerror or error}. Try another folder, format or size")
        raise OutputError(f"{path} cannot be written: {reason}.") from error
