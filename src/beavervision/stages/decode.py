"""Files to pictures and sound: video or still in, upright YUV 4:2:0 pictures at a constant rate out.

Time zero is the start of the video stream; sound is placed on that timeline to the sample. Memory does not grow with
the length of a file: pictures and sound are streamed, and playing backwards decodes bounded chunks after a seek.
"""

from __future__ import annotations

import io
import itertools
import statistics
import struct
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

import av
import cv2
import numpy as np
import numpy.typing as npt
from av.filter import Graph
from av.sidedata.sidedata import SideData
from av.stream import Disposition
from av.video.reformatter import ColorRange, Interpolation
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from beavervision.errors import MediaError, NoAudioError, UsageError
from beavervision.media import F32, U8, Audio, Clip, Color, Frames, Matrix, Phone, Picture

Extend = Literal["loop", "freeze", "none"]
Notify = Callable[[str], None]
Turn = tuple[int, int, int, int]  # a, b, c, d of the display matrix, each -1, 0 or 1

HELD_BYTES = 96 << 20  # pictures kept while playing backwards, together
HELD_PICTURES = 64
STILL_SIDE_PX = 1920  # a larger still is scaled down: no player shows 12-megapixel H.264
MAX_STILL_PX = 128_000_000
MAX_VIDEO_PX = 8192 * 4320
SOUND_HZ, SOUND_CHANNELS = (2000, 768_000), 8
STILL_RATE = Fraction(25)
LEAST_RATE, MOST_RATE = 10, 240  # pictures a second: of fewer no mouth is made, more are no video's
STANDARD_RATES = tuple(
    Fraction(r)
    for r in ("24000/1001", "24", "25", "30000/1001", "30", "48", "50", "60000/1001", "60", "120000/1001", "120", "15")
)

_SCAN_PACKETS = 4096  # looked at to find the rate, and at most this many bytes
_SCAN_BYTES = 64 << 20
_BAD_PACKETS = 500  # this many without a picture between them: the rest is given up
_JUMP_S = 600  # time stamps that jump further ahead, or this far back, are taken as broken
_BACK_S = 1
_LAST_S = 10  # the longest that the last picture of a variable-rate file is held
_AUDIO_SLACK_MS = 20  # time stamps this near to the samples counted so far are taken as rounding

# Containers that hold their own media. Playlists (hls, dash, concat) name other files or hosts, and stay out.
_CONTAINERS = (
    "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,gif,apng,ogg,mp3,wav,w64,flac,aac,aiff,caf,au,amr,ac3,"
    "eac3,dts,mxf,wv,tta,ape,m4v,h264,hevc,ivf,yuv4mpegpipe,rm,dv,nut"
)
_STILLS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "AVIF", "JPEG2000")
MATRICES = {1: Matrix.BT709, 5: Matrix.BT601, 6: Matrix.BT601, 9: Matrix.BT2020, 10: Matrix.BT2020}  # by FFmpeg's codes
_SAMPLES = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "flt": np.float32, "dbl": np.float64}
# Floats up to it are fractions of white, which highlights may pass: as levels of 255 they would all be black.
_FRACTION = 4
_USUAL_PLACES = {5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}  # of so many channels
_PLANES = frozenset({"yuv420p", "yuvj420p"})  # taken as they are
_FULL_RANGE = 2
_RESERVED = frozenset({0, 3})  # tag values that encoders refuse
_HDR_TRANSFERS = frozenset({16, 18})


@dataclass(frozen=True, slots=True)
class AudioStream:
    """One audio stream of a file; `index` counts the audio streams only. duration is in seconds, None if unknown.

    layout is FFmpeg's name for the places of its channels, such as ``5.1``, or ``3 channels`` where they are not known.
    """

    index: int
    rate_hz: int
    channels: int
    layout: str
    language: str | None
    default: bool
    codec: str
    duration: Fraction | None


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """What a file holds. Sizes are those of the upright, even-sided pictures; `coded_*` is what the file stores.

    start is the time stamp, in seconds, of the video's beginning; duration is in seconds; frames is an estimate.
    rotation_deg is how far the stored pictures are turned clockwise to stand upright, before they are mirrored if they are, and
    turn is the whole of it: stored pixel (x, y) is shown at (a x + c y, b x + d y), but for an offset. `constant` says that
    each source picture becomes one picture at `rate`; `rate_note` says how the rate was chosen.
    """

    path: Path
    kind: Literal["video", "still"]
    width_px: int
    height_px: int
    coded_width_px: int
    coded_height_px: int
    rate: Fraction
    rate_note: str
    constant: bool
    start: Fraction
    duration: Fraction | None
    frames: int | None
    rotation_deg: int
    turn: Turn
    color: Color
    codec: str
    audio: tuple[AudioStream, ...]
    notes: tuple[str, ...]
    interlaced: bool = False

    @property
    def has_audio(self) -> bool:
        return bool(self.audio)


def probe(path: Path | str) -> SourceInfo:
    """Look at a video or still: its beginning is read and one picture decoded.

    Raises:
        MediaError: no such file, an empty or damaged one, no media, or media without a picture.
    """
    path = Path(path)
    _check_file(path)
    picture = _open_still(path)
    if picture is not None:
        with picture:
            return _probe_still(path, picture)
    with _opened(path) as container:
        stream = _video_stream(path, container)
        timing = _timing(container, stream)
        if timing.rate > MOST_RATE:
            raise MediaError(
                f"{path} has {float(timing.rate):.0f} pictures a second; {MOST_RATE} are allowed. Convert it first."
            )
    with _opened(path) as container:
        stream = _video_stream(path, container)
        first = next(_frames(container, stream, None), None)
        if first is None:
            raise MediaError(f"{path}: none of its pictures can be decoded. The file is damaged; use another copy.")
        return _describe(path, container, stream, timing, first)


def audio_info(path: Path | str, stream: int | None = None) -> AudioStream:
    """The audio stream that :func:`read_audio` would read: number `stream`, else the default one, else the first.

    Raises:
        NoAudioError: the file has no sound.
        UsageError: it has fewer streams than `stream` asks for.
        MediaError: it cannot be read.
    """
    path = Path(path)
    _check_file(path)
    with _opened(path) as container:
        chosen = _chosen_audio(path, _audio_streams(container), stream)
        first = next(_audio_frames(container, container.streams.audio[chosen.index]), None)
        if first is None:
            raise MediaError(f"{path}: its sound cannot be decoded. The file is damaged; use another copy.")
        rate_hz, channels = first.sample_rate, first.layout.nb_channels
        if not SOUND_HZ[0] <= rate_hz <= SOUND_HZ[1] or channels > SOUND_CHANNELS:
            raise MediaError(
                f"{path}: its sound has {channels} channels of {rate_hz} Hz; up to {SOUND_CHANNELS} of {SOUND_HZ[0]} to "
                f"{SOUND_HZ[1]} Hz can be used. Convert it, or use another copy if it is damaged."
            )
        # Headers can be wrong by the factor that spectral band replication adds.
        return replace(chosen, rate_hz=rate_hz, channels=channels, layout=_places(first.layout))


def length(path: Path | str) -> Fraction | None:
    """How long a file of sound or video says it is, in seconds; None where it does not.

    Raises:
        MediaError: it cannot be opened.
    """
    path = Path(path)
    _check_file(path)
    with _opened(path) as container:
        return Fraction(container.duration, av.time_base) if container.duration else None


class Decode:
    """The source of a flow: the pictures of a file in clips of `block`.

    extend says what follows the last picture: "loop" plays back and forth for ever (0, 1, .. n-1, n-2, .. 1, 0, 1 ..),
    "freeze" repeats the last Picture object for ever, "none" ends. A still repeats one Picture object for ever. rate
    replaces the rate that :func:`probe` chose; a picture then holds until the next. on_note is told, once per reading,
    what was wrong with the file. At most `HELD_PICTURES` pictures, of at most `HELD_BYTES`, are held besides the clip.
    """

    name = "decode"

    def __init__(
        self,
        block: int = 8,
        extend: Extend = "loop",
        rate: Fraction | None = None,
        threads: int = 1,
        on_note: Notify | None = None,
    ) -> None:
        if block < 1 or threads < 1 or (rate is not None and rate <= 0):
            raise UsageError("block, threads and rate must be positive.")
        self._block = block
        self._extend = extend
        self._rate = rate
        self._threads = threads
        self._on_note = on_note

    def __call__(self, source: Path | str | SourceInfo) -> Iterator[Clip]:
        """Clips with frames only.

        Raises:
            MediaError: see :func:`probe`; at once, not at the first clip.
        """
        info = source if isinstance(source, SourceInfo) else probe(source)
        if self._rate is not None:
            info = replace(info, rate=self._rate, constant=False)
        return self._clips(info)

    def _clips(self, info: SourceInfo) -> Iterator[Clip]:
        start = 0
        pictures = self._pictures(info)
        try:
            while block := tuple(itertools.islice(pictures, self._block)):
                shown, of = zip(*block, strict=True)
                yield Clip(Frames(of, start, info.rate, shown))
                start += len(block)
        finally:
            pictures.close()

    def _pictures(self, info: SourceInfo) -> Generator[tuple[int, Picture], None, None]:
        if info.kind == "still":
            yield from itertools.repeat((0, _load_still(info.path)))
        elif self._extend == "loop":
            yield from _back_and_forth(info, self._threads, self._on_note)
        else:
            last: tuple[int, Picture] | None = None
            for last in enumerate(_forward(info, self._threads, self._on_note)):
                yield last
            if self._extend == "freeze" and last is not None:
                yield from itertools.repeat(last)


def read_audio(
    path: Path | str,
    rate_hz: int | None = None,
    stream: int | None = None,
    block_samples: int = 4096,
    *,
    stereo: bool = False,
) -> Iterator[Audio]:
    """The sound of a file in blocks of `block_samples` (the last may be shorter), at its own channels.

    Sample 0 is heard when the video starts, or first if there is no video: an offset between the two becomes
    silence or cut samples, and a gap in the sound becomes silence. rate_hz resamples; stream counts audio streams.
    stereo mixes more than two channels to two, by the places that the file says they have.

    Raises:
        NoAudioError, UsageError, MediaError: as :func:`audio_info`; at once, not at the first block.
    """
    path = Path(path)
    chosen = audio_info(path, stream)
    pieces = _audio_blocks(path, chosen)
    if stereo and chosen.channels > 2:
        shares = _to_stereo(chosen.layout, chosen.channels)
        pieces = (shares @ pcm for pcm in pieces)
    blocks = _reblocked(pieces, chosen.rate_hz, block_samples)
    if rate_hz is None or rate_hz == chosen.rate_hz:
        return blocks
    return _reblocked((b.pcm for b in resample(blocks, rate_hz)), rate_hz, block_samples)


def resample(blocks: Iterator[Audio], rate_hz: int, channels: int | None = None) -> Iterator[Audio]:
    """Consecutive sound at another rate, without delay: n samples become exactly round(n * rate_hz / from). Phones go along.

    channels mixes to 1 or 2 before that (the mean for mono; front and 0.7 of centre and surround for stereo).

    Raises:
        UsageError: channels is neither None, 1 nor 2, and differs from the sound's.
    """
    first = next(blocks, None)
    if first is None:
        return
    source_hz, start = first.rate_hz, round(Fraction(first.start * rate_hz, first.rate_hz))
    resampler = av.AudioResampler(rate=rate_hz)
    taken = given = 0
    width = channels or first.channels
    layout = _layout(width)
    phones: list[Phone] = []

    def told(stop: int) -> tuple[Phone, ...]:
        """Those waiting that begin before sample `stop`."""
        count = sum(phone.start_ms * rate_hz < stop * 1000 for phone in phones)
        begun, phones[:count] = tuple(phones[:count]), ()
        return begun

    for block in itertools.chain([first], blocks):
        pcm = _mixed(block.pcm, width)
        if source_hz == rate_hz:
            yield Audio(pcm, rate_hz, start + taken, block.phones)
            taken += pcm.shape[1]
            continue
        phones += block.phones
        if not pcm.shape[1]:
            continue
        frame = av.AudioFrame.from_ndarray(_packed(pcm), "flt", layout)
        frame.rate, frame.pts, frame.time_base = source_hz, taken, Fraction(1, source_hz)
        taken += pcm.shape[1]
        for out in resampler.resample(frame):
            given += out.samples
            yield Audio(_pcm(out), rate_hz, start + given - out.samples, told(start + given))
    if source_hz == rate_hz:
        return
    wanted = round(Fraction(taken * rate_hz, source_hz))
    rest = [_pcm(out) for out in resampler.resample(None)]
    tail = np.concatenate([*rest, np.zeros((width, max(wanted - given, 0)), np.float32)], axis=1)[:, : wanted - given]
    if tail.shape[1]:
        yield Audio(np.ascontiguousarray(tail), rate_hz, start + given, tuple(phones))


def from_rgb(rgb: U8) -> Picture:
    """An RGB array (h, w, 3) as a picture; an odd side is padded by repeating its edge."""
    height, width = rgb.shape[:2]
    rgb = np.pad(rgb, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    color = Color(_matrix(2, height), full_range=False, primaries=1, transfer=1)
    yuv = cv2.transform(rgb.astype(np.float32), color.to_yuv())
    half = cv2.resize(yuv[..., 1:], (rgb.shape[1] // 2, rgb.shape[0] // 2), interpolation=cv2.INTER_AREA)
    y, u, v = (np.clip(np.rint(p), 0, 255).astype(np.uint8) for p in (yuv[..., 0], half[..., 0], half[..., 1]))
    return Picture(y, u, v, color)


# Opening files


def _check_file(path: Path) -> None:
    try:
        if path.is_dir():
            raise MediaError(f"{path} is a folder. Name a video or picture file in it.")
        if not path.exists():
            raise MediaError(f"{path} does not exist. Check the name and the folder.")
        if not path.is_file():  # media is read more than once, and from its end
            raise MediaError(f"{path} is a device or a pipe. Write what comes from it to a file first, and give that.")
        with path.open("rb") as file:
            head = file.read(12)
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    if not head:
        raise MediaError(f"{path} is empty. Copy or record it again.")
    if head[4:8] == b"ftyp" and head[8:12] in (b"heic", b"heix", b"mif1", b"msf1"):
        raise MediaError(f"{path} is a HEIC picture, which is not supported. Save it as JPEG or PNG first.")


@contextmanager
def _opened(path: Path) -> Iterator[av.container.InputContainer]:
    try:
        container = av.open(f"file:{path}", options={"format_whitelist": _CONTAINERS}, metadata_errors="replace")
    except (av.FFmpegError, OSError, ValueError) as error:
        with path.open("rb") as file:
            head = file.read(8)
        if head[4:8] in (b"ftyp", b"mdat", b"moov"):
            reason = "is cut off or damaged: its index is missing. Copy or record it again"
        else:
            reason = "is no video, picture or sound that can be read. Give an mp4, mov, mkv, webm, jpg, png or wav file"
        raise MediaError(f"{path} {reason}.") from error
    with container:
        yield container


def _video_stream(path: Path, container: av.container.InputContainer) -> av.VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        held = "sound but no picture" if container.streams.audio else "neither picture nor sound"
        raise MediaError(f"{path} holds {held}. Give a video or a picture of the face.")
    stream = next((s for s in streams if s.disposition & Disposition.default), streams[0])
    if stream.codec_context is None:
        raise MediaError(f"{path}: no decoder for its video. Convert it to H.264 first.")
    if stream.width * stream.height > MAX_VIDEO_PX:
        raise MediaError(f"{path} is {stream.width}x{stream.height}, larger than 8K. Scale it down first.")
    return stream


def _audio_streams(container: av.container.InputContainer) -> tuple[AudioStream, ...]:
    return tuple(
        AudioStream(
            index=i,
            rate_hz=s.codec_context.sample_rate,
            channels=s.codec_context.layout.nb_channels,
            layout=_places(s.codec_context.layout),
            language=s.language if s.language != "und" else None,
            default=bool(s.disposition & Disposition.default),
            codec=s.codec_context.name,
            duration=s.duration * s.time_base if s.duration and s.time_base else None,
        )
        for i, s in enumerate(container.streams.audio)
        if s.codec_context is not None and s.codec_context.sample_rate > 0
    )


def _chosen_audio(path: Path, streams: tuple[AudioStream, ...], wanted: int | None) -> AudioStream:
    if not streams:
        raise NoAudioError(f"{path} has no sound. Give a file with sound, or text to be spoken.")
    if wanted is None:
        return next((s for s in streams if s.default), streams[0])
    for stream in streams:
        if stream.index == wanted:
            return stream
    raise UsageError(f"{path} has no audio stream {wanted}. It has {', '.join(str(s.index) for s in streams)}.")


# What a video is


@dataclass(frozen=True, slots=True)
class _Timing:
    rate: Fraction
    note: str
    constant: bool
    start: Fraction
    pictures: int  # packets looked at


def _timing(container: av.container.InputContainer, stream: av.VideoStream) -> _Timing:
    base = stream.time_base or Fraction(1, 90000)
    stamps: list[int] = []
    packets = size = 0
    try:
        for packet in container.demux(stream):
            packets += 1 if packet.size else 0
            size += packet.size
            if packet.pts is not None and not packet.is_discard:
                stamps.append(packet.pts)
            if packets >= _SCAN_PACKETS or (size >= _SCAN_BYTES and packets >= 50):
                break
    except (av.FFmpegError, OSError):
        pass  # damage further on is met again, and told, when decoding
    times = [s * base for s in sorted(set(stamps))]
    start = times[0] if times else Fraction(0)
    rate, note, constant = _choose_rate([t - start for t in times], stream.average_rate)
    if rate < LEAST_RATE:
        few = f"{float(rate):.2f} a second are too few for a mouth: each picture is shown several times"
        rate, note, constant = STILL_RATE, few, False
    return _Timing(rate, note, constant, start, packets)


def _choose_rate(times: list[Fraction], declared: Fraction | None) -> tuple[Fraction, str, bool]:
    """The constant rate for pictures at `times` (sorted, from 0), why, and whether each picture has its own slot.

    times may be only the beginning of the file.
    """
    if not times and declared:
        return _snapped(declared, Fraction(1, 1000)), "as the file declares, for it has no time stamps", True
    if len(times) < 2:
        return STILL_RATE, "assumed, for the file gives none", True
    average = (len(times) - 1) / (times[-1] - times[0])
    measured = average.limit_denominator(1001)
    for guess in (declared, measured):
        for rate in (_snapped(guess, Fraction(1, 1000)), guess) if guess else ():
            if all(_slot(t, rate) == i for i, t in enumerate(times)):
                return rate, "constant in the file", True
    gaps = [float(b - a) for a, b in itertools.pairwise(times)]
    median = statistics.median(gaps)
    usual = [g for g in gaps if abs(g - median) <= median / 5]
    if len(usual) >= 0.9 * len(gaps):
        nominal = Fraction(len(usual) / sum(usual)).limit_denominator(1001)
        return (
            _snapped(nominal, Fraction(1, 50)),
            f"variable ({float(average):.2f} on average): its usual spacing",
            False,
        )
    return _snapped(measured, Fraction(1, 20)), f"variable: near its average of {float(average):.2f}", False


def _snapped(rate: Fraction, tolerance: Fraction) -> Fraction:
    nearest = min(STANDARD_RATES, key=lambda r: abs(r - rate))
    return nearest if abs(nearest - rate) <= tolerance * nearest else rate


def _slot(time: Fraction, rate: Fraction) -> int:
    """The picture number nearest to `time`: coarse time stamps land on their own picture."""
    exact = time * rate
    return (2 * exact.numerator + exact.denominator) // (2 * exact.denominator)


def _describe(
    path: Path,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    timing: _Timing,
    first: av.VideoFrame,
) -> SourceInfo:
    base = stream.time_base or Fraction(1, 90000)
    duration = None
    if stream.duration:
        duration = stream.duration * base
    elif container.duration:
        duration = Fraction(container.duration, av.time_base)
    if timing.constant and stream.frames:
        frames: int | None = stream.frames
    else:
        frames = round(duration * timing.rate) if duration else None
    notes = []
    size = _square(first.width, first.height, stream)
    if first.format.name not in _PLANES:
        notes.append(f"{first.format.name} pictures are converted to 8-bit 4:2:0")
    if size[0] != first.width:
        notes.append(f"non-square pixels: scaled to {size[0]}x{size[1]}")
    if size[0] % 2 or size[1] % 2:
        notes.append(f"odd size {size[0]}x{size[1]}: padded by repeating the edge")
    if first.color_trc in _HDR_TRANSFERS:
        notes.append("HDR: kept in 8 bits, so smooth areas may show bands")
    if first.interlaced_frame:
        notes.append("interlaced: whole pictures were made of its fields")
    if not timing.constant:
        notes.append(f"frame rate {timing.note}; written at {float(timing.rate):.3f} pictures a second")
    turn = _display_matrix(first)
    picture = _picture(first, size, turn)
    return SourceInfo(
        path=path,
        kind="video",
        width_px=picture.width_px,
        height_px=picture.height_px,
        coded_width_px=first.width,
        coded_height_px=first.height,
        rate=timing.rate,
        rate_note=timing.note,
        constant=timing.constant,
        start=timing.start,
        duration=duration,
        frames=frames,
        rotation_deg=_rotation_deg(turn),
        turn=turn,
        color=picture.color,
        codec=stream.codec_context.name,
        audio=_audio_streams(container),
        notes=tuple(notes),
        interlaced=bool(first.interlaced_frame),
    )


# Decoding video


def _frames(
    container: av.container.InputContainer, stream: av.VideoStream, on_note: Notify | None
) -> Iterator[av.VideoFrame]:
    """All pictures that can be decoded; packets that cannot are skipped and counted in one note."""
    bad = in_a_row = 0
    packets = container.demux(stream)
    while in_a_row < _BAD_PACKETS:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, OSError):
            bad += 1
            break
        if packet is None:
            break
        try:
            frames = packet.decode()
        except (av.FFmpegError, OSError):
            bad += 1
            in_a_row += 1
            continue
        if frames:
            in_a_row = 0
        for frame in frames:
            assert isinstance(frame, av.VideoFrame)
            yield frame
    if bad and on_note:
        on_note(f"{bad} damaged part{'s' * (bad > 1)} of the video skipped; the picture before holds meanwhile")


def _deinterlaced(frames: Iterator[av.VideoFrame], base: Fraction) -> Iterator[av.VideoFrame]:
    """Whole pictures made of fields, one for each frame at its own time; frames that are whole already pass as they are."""
    graph: Graph | None = None
    shape = None
    for frame in frames:
        if shape != (frame.width, frame.height, frame.format.name):
            if graph is not None:
                yield from _filtered(graph, None, base)
            shape = (frame.width, frame.height, frame.format.name)
            graph = Graph()
            graph.threads = 1
            source = graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=base)
            graph.link_nodes(source, graph.add("bwdif", "mode=send_frame:deint=interlaced"), graph.add("buffersink"))
            graph.configure()
        assert graph is not None
        yield from _filtered(graph, frame, base)
    if graph is not None:
        yield from _filtered(graph, None, base)


def _filtered(graph: Graph, frame: av.VideoFrame | None, base: Fraction) -> Iterator[av.VideoFrame]:
    """What a graph gives after one more frame, or at the end; its times are put back into the stream's own base."""
    graph.push(frame)
    while True:
        try:
            out = graph.pull()
        except (av.BlockingIOError, av.EOFError):
            return
        assert isinstance(out, av.VideoFrame)
        if out.pts is not None and out.time_base is not None:
            out.duration = round(out.duration * out.time_base / base)
            out.pts, out.time_base = round(out.pts * out.time_base / base), base
        yield out


@dataclass(frozen=True, slots=True)
class _Span:
    """A decoded frame and the picture numbers it shows for: begin <= number < end."""

    begin: int
    end: int
    frame: av.VideoFrame


def _spans(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    info: SourceInfo,
    on_note: Notify | None,
) -> Iterator[_Span]:
    """Each source frame with the picture numbers it shows for, in order. A frame that shows in none is left out.

    The time stamp alone decides the number, so it is the same after a seek; where stamps are missing or jump, the
    frame follows the one before.
    """
    base = stream.time_base or Fraction(1, 90000)
    usual = 1 / info.rate
    shift = Fraction(0)
    last: Fraction | None = None
    held: tuple[int, av.VideoFrame] | None = None
    frames = _frames(container, stream, on_note)
    for frame in _deinterlaced(frames, base) if info.interlaced else frames:
        follows = last + usual if last is not None else Fraction(0)
        time = frame.pts * base - info.start + shift if frame.pts is not None else follows
        if last is not None and not -_BACK_S <= time - last <= _JUMP_S:
            shift, time = shift + follows - time, follows
        last = time
        slot = _slot(time, info.rate)
        if slot < 0 or (held and slot < held[0]):
            continue
        if held and slot > held[0]:
            yield _Span(held[0], slot, held[1])
        held = (slot, frame)
    if held:
        slot, frame = held
        end = slot + 1
        if not info.constant and last is not None and frame.duration:
            shown_s = min(frame.duration * base, Fraction(_LAST_S))
            end = max(_slot(last + shown_s, info.rate), slot, 1)
        if end > slot:
            yield _Span(slot, end, frame)


def _forward(info: SourceInfo, threads: int, on_note: Notify | None) -> Iterator[Picture]:
    """The pictures 0, 1, .. of the file, once."""
    number = 0
    with _opened(info.path) as container:
        stream = _prepared(info.path, container, threads)
        size = _square(info.coded_width_px, info.coded_height_px, stream)
        for span in _spans(container, stream, info, on_note):
            picture = _picture(span.frame, size, info.turn)
            yield from itertools.repeat(picture, span.end - number)
            number = span.end
    if not number:
        raise MediaError(f"{info.path}: none of its pictures can be decoded. The file is damaged; use another copy.")


def _prepared(path: Path, container: av.container.InputContainer, threads: int) -> av.VideoStream:
    stream = _video_stream(path, container)
    stream.codec_context.thread_count = threads
    stream.codec_context.thread_type = "AUTO" if threads > 1 else "SLICE"
    return stream


def _back_and_forth(info: SourceInfo, threads: int, on_note: Notify | None) -> Iterator[tuple[int, Picture]]:
    size = info.width_px * info.height_px * 3 // 2
    limit = max(2, min(HELD_PICTURES, HELD_BYTES // size))
    short: list[tuple[int, Picture]] | None = []
    count = 0
    for one in enumerate(_forward(info, threads, on_note)):
        count += 1
        if short is not None:
            short.append(one)
            if len(short) > limit:
                short = None
        yield one
    if short is not None:
        while True:
            yield from short[-2:0:-1]
            yield from short
    while True:
        end = count - 1
        while end > 1:
            begin = max(1, end - limit)
            chunk = _chunk(info, begin, end, threads)
            while chunk:
                yield begin + len(chunk) - 1, chunk.pop()
            end = begin
        yield from enumerate(_forward(info, threads, None))


def _chunk(info: SourceInfo, begin: int, end: int, threads: int) -> list[Picture]:
    """The pictures begin <= number < end, decoded from the last key frame that comes before."""
    for lead_s in (0, 2, 10, None):
        chunk: list[Picture] = []
        with _opened(info.path) as container:
            stream = _prepared(info.path, container, threads)
            if lead_s is not None and not _seek(container, stream, info.start + begin / info.rate - lead_s):
                continue
            size = _square(info.coded_width_px, info.coded_height_px, stream)
            for span in _spans(container, stream, info, None):
                if lead_s is not None and not chunk and (span.begin > begin or span.frame.pts is None):
                    break  # the seek went too far, or its place is not known: start earlier
                if span.end > begin:
                    chunk += [_picture(span.frame, size, info.turn)] * (min(span.end, end) - begin - len(chunk))
                if span.end >= end:
                    break
            if len(chunk) == end - begin:
                return chunk
    if not chunk:
        raise MediaError(f"{info.path} changed while it was read. Leave it in place until the job is done.")
    return chunk + [chunk[-1]] * (end - begin - len(chunk))


def _seek(container: av.container.InputContainer, stream: av.VideoStream, time_s: Fraction) -> bool:
    base = stream.time_base or Fraction(1, 90000)
    try:
        container.seek(int(time_s // base), stream=stream)
    except (av.FFmpegError, OSError):
        return False
    return True


# Planes


def _square(width_px: int, height_px: int, stream: av.VideoStream) -> tuple[int, int]:
    """The size that the stream's pictures get before they are turned: the first one's, with square pixels."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    if abs(aspect - 1) <= Fraction(1, 100) or not Fraction(1, 4) <= aspect <= 4:
        return width_px, height_px
    return round(width_px * aspect / 2) * 2, height_px


def _matrix(code: int, height_px: int) -> Matrix:
    return MATRICES.get(code, Matrix.BT709 if height_px >= 720 else Matrix.BT601)


def _picture(frame: av.VideoFrame, size: tuple[int, int], turn: Turn) -> Picture:
    """The frame's planes, upright, of even size and not to be written to; other formats than 8-bit 4:2:0 are converted."""
    name = frame.format.name
    full_range = name.startswith("yuvj") or frame.color_range == _FULL_RANGE
    matrix = _matrix(frame.colorspace, frame.height)
    primaries, transfer = (code if code not in _RESERVED else 2 for code in (frame.color_primaries, frame.color_trc))
    if name not in _PLANES or (frame.width, frame.height) != size:
        is_yuv = len(frame.format.components) >= 3 and not frame.format.is_rgb and not frame.format.has_palette
        if not is_yuv:
            full_range = False
        frame = frame.reformat(
            *size,
            "yuv420p",
            src_color_range=ColorRange.JPEG if full_range or not is_yuv else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG if full_range else ColorRange.MPEG,
            dst_colorspace=None if is_yuv else ("ITU709" if matrix is Matrix.BT709 else "ITU601"),
            interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
            threads=1,
        )
        if not is_yuv:
            matrix = _matrix(2, frame.height)
    y, u, v = (_upright(_plane(frame, i), turn) for i in range(3))
    return Picture(y, u, v, Color(matrix, full_range, primaries, transfer))


def _plane(frame: av.VideoFrame, index: int) -> U8:
    """A view of plane `index` without the rows' padding; of the luma plane, odd sides are repeated."""
    plane = frame.planes[index]
    view: U8 = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)[: plane.height, : plane.width]
    if index == 0 and (plane.height % 2 or plane.width % 2):
        view = np.pad(view, ((0, plane.height % 2), (0, plane.width % 2)), mode="edge")
    return view


def _display_matrix(frame: av.VideoFrame) -> Turn:
    """How the container wants the pictures turned, to the nearest quarter.

    To be asked of one frame only: reading its side data ties a frame into a reference cycle, and it then lives, tens of
    frames deep, until the garbage collector comes.
    """
    data = cast(Mapping[str, SideData], frame.side_data).get("DISPLAYMATRIX")
    if data is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
    if abs(b) > abs(a):
        return (0, 1 if b > 0 else -1, 1 if c > 0 else -1, 0)
    return (1 if a > 0 else -1, 0, 0, 1 if d > 0 else -1)


def _rotation_deg(turn: Turn) -> int:
    """How far clockwise a turn goes, before it mirrors left and right if it does."""
    a, b, c, d = turn
    mirrored = a * d - b * c < 0
    return {(1, 0): 0, (0, 1): 90, (-1, 0): 180, (0, -1): 270}[-a if mirrored else a, b]


def _upright(plane: U8, turn: Turn) -> U8:
    """The plane turned by quarters and mirrored; if it is neither, it still is the frame's memory, kept alive by it, which the
    decoder may refer to.
    """
    a, b, c, d = turn
    if b:
        plane = plane.T
    if a + c < 0:
        plane = plane[:, ::-1]
    if b + d < 0:
        plane = plane[::-1]
    if turn != (1, 0, 0, 1):
        plane = np.array(plane, order="C")
    plane.flags.writeable = False
    return plane


# Stills


def _open_still(path: Path) -> Image.Image | None:
    """The picture file opened but not decoded; None if it is none, or is an animation (then it is a video)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(path, formats=_STILLS)
    except UnidentifiedImageError:
        return None
    except Image.DecompressionBombError as error:
        raise MediaError(f"{path} has more pixels than can be used. Scale it down first.") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise MediaError(f"{path} is a damaged picture: {error}. Use another copy.") from error
    if picture.format in ("GIF", "PNG") and getattr(picture, "is_animated", False):
        picture.close()
        return None
    if picture.width * picture.height > MAX_STILL_PX:
        size = f"{picture.width}x{picture.height}"
        picture.close()
        raise MediaError(f"{path} has {size} pixels, more than can be used. Scale it down first.")
    return picture


def _still_scale(width: int, height: int) -> tuple[int, int]:
    scale = min(1.0, STILL_SIDE_PX / max(width, height))
    return (width, height) if scale == 1 else (max(2, round(width * scale)), max(2, round(height * scale)))


def _probe_still(path: Path, picture: Image.Image) -> SourceInfo:
    turned = picture.getexif().get(0x0112, 1)
    width, height = picture.size if turned < 5 else picture.size[::-1]
    scaled = _still_scale(width, height)
    notes = []
    if scaled != (width, height):
        notes.append(f"scaled from {width}x{height} to {scaled[0]}x{scaled[1]}")
    if scaled[0] % 2 or scaled[1] % 2:
        notes.append(f"odd size {scaled[0]}x{scaled[1]}: padded by repeating the edge")
    shown = _load_still(path)
    return SourceInfo(
        path=path,
        kind="still",
        width_px=shown.width_px,
        height_px=shown.height_px,
        coded_width_px=picture.width,
        coded_height_px=picture.height,
        rate=STILL_RATE,
        rate_note="chosen for a still",
        constant=True,
        start=Fraction(0),
        duration=None,
        frames=None,
        rotation_deg={3: 180, 4: 180, 5: 90, 6: 90, 7: 270, 8: 270}.get(turned, 0),
        turn=(1, 0, 0, 1),
        color=shown.color,
        codec=(picture.format or "").lower(),
        audio=(),
        notes=tuple(notes),
    )


def _load_still(path: Path) -> Picture:
    opened = _open_still(path)
    if opened is None:
        raise MediaError(f"{path} changed while it was read. Leave it in place until the job is done.")
    try:
        with opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened.load()
            ImageOps.exif_transpose(opened, in_place=True)
            picture = _plain_rgb(_reduced(opened))
            picture = picture.resize(_still_scale(*picture.size), Image.Resampling.LANCZOS)
            return from_rgb(np.asarray(picture))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"{path} is a damaged picture: {error}. Use another copy.") from error


def _reduced(picture: Image.Image) -> Image.Image:
    """A very large picture averaged to some twice the size that is wanted: what follows makes copies of it."""
    step = max(picture.size) // (2 * STILL_SIDE_PX)
    if step < 2 or picture.mode.startswith("I"):
        return picture
    if picture.mode in ("P", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
    elif picture.mode == "1":
        picture = picture.convert("L")
    return picture.reduce(step)


def _white(highest: float, *, fractions: bool) -> float:
    """The level of white in a picture of one deep channel, by the highest that is there: `fractions` may be from 0 to 1."""
    if fractions and highest <= _FRACTION:
        return 1
    return 255 if highest <= 255 else 65535


def _plain_rgb(picture: Image.Image) -> Image.Image:
    """8-bit sRGB, what is transparent white."""
    profile = picture.info.get("icc_profile")
    if picture.mode.startswith(("I", "F")):
        levels = np.nan_to_num(np.asarray(picture, np.float32), posinf=0, neginf=0)
        levels *= 255 / _white(float(levels.max(initial=0)), fractions=picture.mode == "F")
        picture, profile = Image.fromarray(np.rint(np.clip(levels, 0, 255)).astype(np.uint8)), None
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    rgb = picture if picture.mode == "CMYK" and profile else picture.convert("RGB")
    if profile:
        try:
            srgb = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(rgb, io.BytesIO(profile), srgb, outputMode="RGB")
            rgb = converted or rgb
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass  # a broken profile: the values are taken as sRGB
    return rgb.convert("RGB")


# Sound


def _audio_blocks(path: Path, chosen: AudioStream) -> Iterator[F32]:
    """The stream's samples in order, (channels, n) each, silence and cuts applied."""
    position = 0  # samples given so far
    heard = False
    with _opened(path) as container:
        stream = container.streams.audio[chosen.index]
        stream.codec_context.thread_count = 1
        rate_hz, base = chosen.rate_hz, stream.time_base or Fraction(1, chosen.rate_hz)
        zero, end = _audio_zero(container), None
        for frame in _audio_frames(container, stream):
            if frame.sample_rate != rate_hz or frame.layout.nb_channels != chosen.channels:
                raise MediaError(f"{path}: its sound changes rate or channels midway. Convert it to one of each first.")
            pcm = _pcm(frame)
            if zero is None:
                zero = frame.pts * base if frame.pts is not None else Fraction(0)
            if end is None and chosen.duration and stream.start_time is not None and chosen.codec == "aac":
                end = round((stream.start_time * base + chosen.duration - zero) * rate_hz)
            gap = round((frame.pts * base - zero) * rate_hz) - position if frame.pts is not None else 0
            if gap > rate_hz * _JUMP_S or (heard and abs(gap) <= rate_hz * _AUDIO_SLACK_MS // 1000):
                gap = 0
            for silence in itertools.chain([rate_hz] * (gap // rate_hz), [gap % rate_hz] if gap > 0 else ()):
                yield np.zeros((chosen.channels, silence), np.float32)
                position += silence
            pcm = pcm[:, max(-gap, 0) :]
            # An encoder fills up its last block; the container says where the sound ends.
            if end is not None and 0 < position + pcm.shape[1] - end < 2048:
                pcm = pcm[:, : max(end - position, 0)]
            if pcm.shape[1]:
                heard = True
                position += pcm.shape[1]
                yield pcm


def _audio_zero(container: av.container.InputContainer) -> Fraction | None:
    """When the video starts. Not by its first picture's stamp: AVI stamps pictures late by the decoder's delay."""
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic and stream.start_time is not None and stream.time_base:
            return stream.start_time * stream.time_base
    return None


def _audio_frames(container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]:
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, OSError):
            return
        if packet is None:
            return
        try:
            frames = packet.decode()
        except (av.FFmpegError, OSError):
            continue  # the gap in the time stamps becomes silence
        for frame in frames:
            assert isinstance(frame, av.AudioFrame)
            if frame.samples:
                yield frame


def _pcm(frame: av.AudioFrame) -> F32:
    """The frame's samples as (channels, n) float32 of its own; of at most eight channels."""
    channels = frame.layout.nb_channels
    if frame.format.is_planar:
        # Not by its own to_ndarray(), which reads a ninth plane, that is none, after eight.
        kind, planes = _SAMPLES[frame.format.packed.name], frame.planes[:channels]
        planar: npt.NDArray[Any] = np.stack([np.frombuffer(memoryview(p), kind, frame.samples) for p in planes])
    else:
        planar = frame.to_ndarray().reshape(-1, channels).T
    if planar.dtype.kind == "f":
        return np.array(planar, np.float32, order="C")
    if planar.dtype == np.uint8:
        return np.ascontiguousarray((planar.astype(np.float32) - 128) / 128)
    full_scale = 2.0 ** (8 * planar.dtype.itemsize - 1)
    return np.ascontiguousarray(planar / full_scale, np.float32)


def _reblocked(blocks: Iterator[F32], rate_hz: int, block_samples: int) -> Iterator[Audio]:
    held: list[F32] = []
    count = start = 0
    for block in blocks:
        held.append(block)
        count += block.shape[1]
        if count >= block_samples:
            joined = np.concatenate(held, axis=1)
            whole = count // block_samples * block_samples
            for at in range(0, whole, block_samples):
                yield Audio(np.ascontiguousarray(joined[:, at : at + block_samples]), rate_hz, start + at)
            held, count, start = [joined[:, whole:]], count - whole, start + whole
    if count:
        yield Audio(np.ascontiguousarray(np.concatenate(held, axis=1)), rate_hz, start)


def _layout(channels: int) -> str:
    names = {1: "mono", 2: "stereo", 3: "2.1", 4: "quad", **_USUAL_PLACES}
    if channels not in names:
        raise UsageError(f"Sound of {channels} channels cannot be resampled. Mix it to mono or stereo first.")
    return names[channels]


def _places(layout: av.AudioLayout) -> str:
    """As :attr:`AudioStream.layout`: so many channels without places are those of a cinema's sound."""
    unknown = layout.name == f"{layout.nb_channels} channels"
    return _USUAL_PLACES.get(layout.nb_channels, layout.name) if unknown else layout.name


@cache
def _to_stereo(layout: str, channels: int) -> F32:
    """How much of each channel goes left and right, (2, channels), never beyond full scale.

    It is as FFmpeg mixes them, or all alike where their places are not known.
    """
    alike = np.full((2, channels), 1 / channels, np.float32)
    if layout == f"{channels} channels":
        return alike
    try:
        each = av.AudioFrame.from_ndarray(_packed(np.eye(channels, dtype=np.float32)), "flt", layout)
        each.rate = 48_000  # any will do
        (mixed,) = av.AudioResampler("fltp", "stereo", each.rate).resample(each)
    except (av.FFmpegError, ValueError):
        return alike
    shares = _pcm(mixed)
    return np.asarray(shares / max(1.0, float(shares.sum(axis=1).max())), np.float32)


def _packed(pcm: F32) -> F32:
    """Samples (channels, n) as FFmpeg's "flt" has them, (1, n * channels). PyAV cannot make frames of eight planes."""
    return np.ascontiguousarray(pcm.T).reshape(1, -1)


def _mixed(pcm: F32, channels: int) -> F32:
    """The sound in `channels`, in FFmpeg's channel order (left, right, centre, low, surround ..)."""
    have = pcm.shape[0]
    if have == channels:
        return pcm
    if channels not in (1, 2):
        raise UsageError(f"Sound can be mixed to 1 or 2 channels, not from {have} to {channels}.")
    if have == 1:
        return np.repeat(pcm, channels, axis=0)
    if have >= 6:
        pcm = np.delete(pcm, 3, axis=0)  # the low-frequency channel adds nothing to speech
        have -= 1
    if channels == 1:
        return np.asarray(pcm.mean(axis=0, keepdims=True), np.float32)
    centre = pcm[2] if have in (3, 5, 7) else np.zeros(pcm.shape[1], np.float32)
    rest = pcm[3:] if have in (3, 5, 7) else pcm[2:]
    sides = [rest[i::2].sum(axis=0) for i in range(2)]
    total = np.float32(1 + 0.7071 * (1 + (len(rest) + 1) // 2))
    return np.stack([(pcm[i] + np.float32(0.7071) * (centre + sides[i])) / total for i in range(2)])
