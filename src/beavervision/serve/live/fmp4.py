"""Encoded packets as fragmented MP4, a track to itself: an initialisation segment, then a fragment for each packet.

Boxes after ISO/IEC 14496-12 (the file format), 14496-14 (AAC in it) and 14496-15 (H.264 in it). A fragment leaves as soon
as its packet is there: a muxer would keep it until the next one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from beavervision.serve.live.encoder import AUDIO_HZ, VIDEO_HZ, Coded, Kind

_SPS, _PPS, _DELIMITER = 7, 8, 9
_UNITY = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
_AAC_CONFIG = bytes((0x11, 0x88))  # AAC-LC, 48 kHz, mono (ISO/IEC 14496-3)


@dataclass(frozen=True, slots=True)
class Track:
    """How a track's packets are to be read: its MIME type with codecs, and its initialisation segment."""

    kind: Kind
    mime: str
    head: bytes


def video_track(keyframe: bytes, width_px: int, height_px: int) -> Track:
    """From a key picture with its parameter sets (Annex B)."""
    sps, pps = parameter_sets(keyframe)
    config = b"\x01" + sps[1:4] + b"\xff\xe1" + _counted(sps) + b"\x01" + _counted(pps)
    entry = _box(
        b"avc1",
        bytes(6)
        + struct.pack(">H", 1)
        + bytes(16)
        + struct.pack(">HHIIIH", width_px, height_px, 72 << 16, 72 << 16, 0, 1),
        bytes(32) + struct.pack(">Hh", 24, -1),
        _box(b"avcC", config),
    )
    head = _head(VIDEO_HZ, b"vide", _full(b"vmhd", 1, bytes(8)), entry, width_px, height_px)
    return Track(Kind.VIDEO, f'video/mp4; codecs="avc1.{sps[1:4].hex()}"', head)


def sound_track() -> Track:
    """AAC, as the encoder makes it."""
    specific = _descriptor(5, _AAC_CONFIG)
    decoder = _descriptor(4, b"\x40\x15" + bytes(11), specific)
    esds = _full(b"esds", 0, _descriptor(3, bytes(3), decoder, _descriptor(6, b"\x02")))
    sound = struct.pack(">HIIHHHHI", 1, 0, 0, 1, 16, 0, 0, AUDIO_HZ << 16)
    entry = _box(b"mp4a", bytes(6), sound, esds)
    head = _head(AUDIO_HZ, b"soun", _full(b"smhd", 0, bytes(4)), entry, 0, 0)
    return Track(Kind.AAC, 'audio/mp4; codecs="mp4a.40.2"', head)


def fragment(packet: Coded, number: int) -> bytes:
    """`packet` as fragment `number` (from 1) of its track."""
    data = avcc(packet.data) if packet.kind is Kind.VIDEO else packet.data
    flags = 0x02000000 if packet.keyframe else 0x01010000

    def moof(offset: int) -> bytes:
        run = struct.pack(">IiIII", 1, offset, packet.duration, len(data), flags)
        parts = (
            _full(b"tfhd", 0x020000, struct.pack(">I", 1)),
            _full(b"tfdt", 0, struct.pack(">Q", packet.pts), version=1),
            _full(b"trun", 0x000701, run),
        )
        return _box(b"moof", _full(b"mfhd", 0, struct.pack(">I", number)), _box(b"traf", *parts))

    return moof(len(moof(0)) + 8) + _box(b"mdat", data)


def avcc(data: bytes) -> bytes:
    """Annex B as units with their lengths, without the parameter sets, which tracks have in their description."""
    units = (unit for unit in nal_units(data) if unit[0] & 31 not in (_SPS, _PPS, _DELIMITER))
    return b"".join(struct.pack(">I", len(unit)) + unit for unit in units)


def parameter_sets(keyframe: bytes) -> tuple[bytes, bytes]:
    """The sequence and the picture parameter set of a key picture (Annex B), without start codes."""
    units = list(nal_units(keyframe))
    return next(u for u in units if u[0] & 31 == _SPS), next(u for u in units if u[0] & 31 == _PPS)


def nal_units(data: bytes) -> Iterator[bytes]:
    """The units of an Annex B stream, without their start codes."""
    for part in data.split(b"\0\0\1")[1:]:
        if unit := part.rstrip(b"\0"):
            yield unit


def _head(rate_hz: int, handler: bytes, media: bytes, entry: bytes, width_px: int, height_px: int) -> bytes:
    movie = (
        struct.pack(">IIIIIH", 0, 0, 1000, 0, 0x10000, 0x100) + bytes(10) + _UNITY + bytes(24) + struct.pack(">I", 2)
    )
    volume = 0 if width_px else 0x100
    track = struct.pack(">IIIII", 0, 0, 1, 0, 0) + bytes(8) + struct.pack(">HHHH", 0, 0, volume, 0)
    table = _box(
        b"stbl",
        _full(b"stsd", 0, struct.pack(">I", 1), entry),
        *(_full(name, 0, bytes(4)) for name in (b"stts", b"stsc", b"stco")),
        _full(b"stsz", 0, bytes(8)),
    )
    where = _box(b"dinf", _full(b"dref", 0, struct.pack(">I", 1), _full(b"url ", 1)))
    mdia = _box(
        b"mdia",
        _full(b"mdhd", 0, struct.pack(">IIIIHH", 0, 0, rate_hz, 0, 0x55C4, 0)),  # the language "und"
        _full(b"hdlr", 0, bytes(4) + handler + bytes(13)),
        _box(b"minf", media, where, table),
    )
    trak = _box(b"trak", _full(b"tkhd", 3, track, _UNITY, struct.pack(">II", width_px << 16, height_px << 16)), mdia)
    extends = _box(b"mvex", _full(b"trex", 0, struct.pack(">IIIII", 1, 1, 0, 0, 0)))
    brands = b"iso6" + struct.pack(">I", 0) + b"iso6cmfcmp41"
    return _box(b"ftyp", brands) + _box(b"moov", _full(b"mvhd", 0, movie), trak, extends)


def _box(name: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I", len(body) + 8) + name + body


def _full(name: bytes, flags: int, *parts: bytes, version: int = 0) -> bytes:
    return _box(name, struct.pack(">I", version << 24 | flags), *parts)


def _counted(unit: bytes) -> bytes:
    return struct.pack(">H", len(unit)) + unit


def _descriptor(tag: int, *parts: bytes) -> bytes:
    body = b"".join(parts)
    assert len(body) < 128
    return bytes((tag, len(body))) + body
