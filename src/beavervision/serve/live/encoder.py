"""Pictures and sound of a session to packets, once for all who watch.

One thread at a time. Times are ticks of one clock, 90 kHz for pictures and 48 kHz for sound, in every delivery. It stands at
one second when a session begins, because sound encoders stamp their first packets a little earlier than their first sample.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from functools import cache

import av
import numpy as np
from av.audio.codeccontext import AudioCodecContext
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace

from beavervision.errors import DeviceError
from beavervision.media import F32, Color, Matrix, Picture
from beavervision.stages.encode import AAC_OPTIONS, tag, video_frame

VIDEO_HZ = 90_000
AUDIO_HZ = 48_000
OPUS_SAMPLES = 960
AAC_SAMPLES = 1024

_BIT_RATE = 2_500_000  # at most; a talking head of 512 px takes a fifth of it
_OPUS_BIT_RATE = 64_000
_AAC_BIT_RATE = 96_000
_SCALER_CODES = {Matrix.BT709: Colorspace.ITU709, Matrix.BT601: Colorspace.ITU601, Matrix.BT2020: 9}


class Kind(StrEnum):
    VIDEO = "video"  # H.264, Annex B
    OPUS = "opus"
    AAC = "aac"  # raw, without ADTS


@dataclass(frozen=True, slots=True)
class Coded:
    """An encoded picture or piece of sound. pts and duration are in ticks of its kind's clock; at_s is when it is to be
    sent, on the event loop's clock."""

    kind: Kind
    data: bytes
    pts: int
    duration: int
    keyframe: bool
    at_s: float


class Encoder:
    """H.264, Opus and, from when somebody asks for it, AAC.

    Args:
        rate: pictures a second.
        color: what the stream says of its colours. Pictures of another matrix or range are converted to it.

    Raises:
        DeviceError: no H.264 encoder can be opened.
    """

    def __init__(self, width_px: int, height_px: int, rate: Fraction, color: Color) -> None:
        self.rate = rate
        self._color = color
        self._video = _video(video_codec(), width_px, height_px, rate, color)
        self._sound: dict[Kind, _Sound] = {Kind.OPUS: _Sound(Kind.OPUS)}

    @property
    def codec(self) -> str:
        return self._video.name

    def picture(self, picture: Picture, index: int, at_s: float, *, keyframe: bool) -> list[Coded]:
        """Picture number `index`; `keyframe` makes it one that a viewer can begin with."""
        frame = recolored(video_frame(picture), picture.color, self._color)
        frame.pts, frame.time_base = index, 1 / self.rate
        frame.pict_type = PictureType.I if keyframe else PictureType.NONE
        ticks = VIDEO_HZ / self.rate
        return [
            Coded(
                Kind.VIDEO,
                bytes(packet),
                VIDEO_HZ + int((packet.pts or 0) * ticks),
                int(ticks),
                packet.is_keyframe,
                at_s,
            )
            for packet in self._video.encode(frame)
        ]

    def sound(self, pcm: F32, start: int, at_s: float, *, aac: bool) -> list[Coded]:
        """`pcm` (samples,) at 48 kHz, the first being sample number `start`, which is due at `at_s`. Sound that follows
        without a gap needs the same `aac` or more."""
        if aac and Kind.AAC not in self._sound:
            self._sound[Kind.AAC] = _Sound(Kind.AAC)
        return [coded for sound in self._sound.values() for coded in sound.encode(pcm, start, at_s)]


class _Sound:
    """Sound in the encoder's own portions. A gap begins them anew."""

    def __init__(self, kind: Kind) -> None:
        self._kind = kind
        self._portion = {Kind.OPUS: OPUS_SAMPLES, Kind.AAC: AAC_SAMPLES}[kind]
        self._context = _audio(kind)
        self._left = np.zeros(0, np.float32)
        self._next: int | None = None

    def encode(self, pcm: F32, start: int, at_s: float) -> Iterator[Coded]:
        if self._next is None or start != self._next:
            self._left = np.zeros(0, np.float32)
            self._context = _audio(self._kind)  # one that went on would stamp what follows as if there were no gap
        self._next = start + len(pcm)
        first = start - len(self._left)
        waiting = np.concatenate([self._left, pcm])
        whole = len(waiting) // self._portion * self._portion
        self._left = waiting[whole:]
        for offset in range(0, whole, self._portion):
            part = np.clip(waiting[None, offset : offset + self._portion], -1, 1)
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(part), "fltp" if self._kind is Kind.AAC else "flt", "mono"
            )
            frame.rate, frame.pts, frame.time_base = AUDIO_HZ, first + offset, Fraction(1, AUDIO_HZ)
            for packet in self._context.encode(frame):
                pts = packet.pts or 0
                due_s = at_s + (pts - start) / AUDIO_HZ
                yield Coded(self._kind, bytes(packet), AUDIO_HZ + pts, self._portion, True, due_s)


@cache
def video_codec() -> str:
    """The H.264 encoder to use: the GPU's where it opens.

    Raises:
        DeviceError: none opens.
    """
    for name in ("h264_nvenc", "libx264"):
        try:
            _video(name, 256, 256, Fraction(25), Color()).open()
        except (av.FFmpegError, ValueError):
            continue
        return name
    raise DeviceError("No H.264 encoder can be opened here. Install the av package from its published wheel.")


def recolored(
    frame: av.VideoFrame, color: Color, wanted: Color, width_px: int | None = None, height_px: int | None = None
) -> av.VideoFrame:
    """`frame`, whose planes are as `color` says, as 8-bit 4:2:0 with the matrix and the range of `wanted`, and at that size.

    The frame itself if it is so already.
    """
    return frame.reformat(
        width_px,
        height_px,
        "yuv420p",
        src_colorspace=_SCALER_CODES[color.matrix],
        dst_colorspace=_SCALER_CODES[wanted.matrix],
        src_color_range=ColorRange.JPEG if color.full_range else ColorRange.MPEG,
        dst_color_range=ColorRange.JPEG if wanted.full_range else ColorRange.MPEG,
        threads=1,
    )


def _video(name: str, width_px: int, height_px: int, rate: Fraction, color: Color) -> VideoCodecContext:
    context = av.CodecContext.create(name, "w")
    assert isinstance(context, VideoCodecContext)
    context.width, context.height, context.pix_fmt = width_px, height_px, "yuv420p"
    context.framerate, context.time_base = rate, 1 / rate
    context.gop_size = max(1, round(rate))
    context.max_b_frames = 0
    context.thread_count = 1
    tag(context, color)
    limits = {"maxrate": str(_BIT_RATE), "bufsize": str(_BIT_RATE // 2), "forced-idr": "1"}
    if name == "libx264":
        context.options = limits | {"preset": "ultrafast", "tune": "zerolatency", "crf": "23", "profile": "baseline"}
    else:
        options = {"preset": "p1", "tune": "ull", "rc": "vbr", "cq": "23", "zerolatency": "1", "delay": "0"}
        context.options = limits | options | {"profile": "baseline"}
    return context


def _audio(kind: Kind) -> AudioCodecContext:
    context = av.CodecContext.create("libopus" if kind is Kind.OPUS else "aac", "w")
    assert isinstance(context, AudioCodecContext)
    context.sample_rate, context.layout = AUDIO_HZ, "mono"
    context.time_base = Fraction(1, AUDIO_HZ)
    if kind is Kind.OPUS:
        context.format, context.bit_rate = "flt", _OPUS_BIT_RATE
        context.options = {"application": "lowdelay", "frame_duration": "20"}
    else:
        context.format, context.bit_rate = "fltp", _AAC_BIT_RATE
        context.options = AAC_OPTIONS
    return context
