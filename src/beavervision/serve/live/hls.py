"""HTTP Live Streaming (RFC 8216): a rolling playlist for each track and their segments, all in memory."""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from beavervision.serve.live.encoder import AUDIO_HZ, VIDEO_HZ, Coded, Kind
from beavervision.serve.live.fanout import Ended, Fanout
from beavervision.serve.live.fmp4 import Track, fragment, sound_track, video_track

SEGMENT_S = 1.0
_TARGET_S = 2  # which no segment's length, rounded, is above
_LONGEST_S = 2.3  # after which a picture is in no segment that began before
_LISTED = 8  # segments: three times _TARGET_S at least
_KEPT = 2 * _LISTED + 2  # for players that are behind the playlist
_READY_S = 10.0  # to wait for the first segments
_NAMES = {Kind.VIDEO: "video", Kind.AAC: "sound"}
_HZ = {Kind.VIDEO: VIDEO_HZ, Kind.AAC: AUDIO_HZ}


class Hls:
    """Cuts segments from when it is made until `fanout` ends or :meth:`close` is called."""

    def __init__(self, fanout: Fanout, size_px: tuple[int, int]) -> None:
        self._size_px = size_px
        self._fanout = fanout
        self._view = fanout.view(Kind.VIDEO, Kind.AAC)
        self._tracks: dict[Kind, Track] = {Kind.AAC: sound_track()}
        self._cut = {kind: _Segments(_NAMES[kind], hz) for kind, hz in _HZ.items()}
        self._ready = asyncio.Event()
        self._task = asyncio.ensure_future(self._run())
        self.asked_s = asyncio.get_running_loop().time()

    async def file(self, name: str, query: str) -> tuple[bytes, str] | None:
        """A playlist, segment or initialisation segment and its type; None if there is no such file. `query` is added
        to the addresses in playlists."""
        self.asked_s = asyncio.get_running_loop().time()
        try:
            await asyncio.wait_for(self._ready.wait(), _READY_S)
        except TimeoutError:
            return None
        if name.endswith(".m3u8"):
            text = self._playlist(name.removesuffix(".m3u8"), query)
            return None if text is None else (text.encode(), "application/vnd.apple.mpegurl")
        for kind, segments in self._cut.items():
            if name == f"{_NAMES[kind]}.mp4":
                return self._tracks[kind].head, "video/mp4"
            if name in segments.kept:
                return segments.kept[name].data, "video/iso.segment"
        return None

    async def close(self) -> None:
        self._view.close()
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            while True:
                packet = await self._view.get()
                if packet.kind is Kind.VIDEO and Kind.VIDEO not in self._tracks:
                    self._tracks[Kind.VIDEO] = video_track(packet.data, *self._size_px)
                self._cut[packet.kind].add(packet)
                # Key pictures are so many pictures apart: where some are dropped that is too long.
                if self._cut[Kind.VIDEO].is_late(packet.pts / _HZ[packet.kind]):
                    self._fanout.ask_for_key()
                if all(len(segments.kept) >= 2 for segments in self._cut.values()):
                    self._ready.set()
        except Ended:
            return

    def _playlist(self, name: str, query: str) -> str | None:
        suffix = f"?{query}" if query else ""
        if name == "index":
            codecs = ",".join(track.mime.split('"')[1] for track in self._tracks.values())
            width, height = self._size_px
            return (
                "#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-INDEPENDENT-SEGMENTS\n"
                f'#EXT-X-MEDIA:TYPE=AUDIO,GROUP-ID="sound",NAME="Speech",DEFAULT=YES,AUTOSELECT=YES,URI="sound.m3u8{suffix}"\n'
                f'#EXT-X-STREAM-INF:BANDWIDTH=3000000,CODECS="{codecs}",RESOLUTION={width}x{height},AUDIO="sound"\n'
                f"video.m3u8{suffix}\n"
            )
        kinds = {label: kind for kind, label in _NAMES.items()}
        return self._cut[kinds[name]].playlist(suffix) if name in kinds else None


class _Segment:
    """`gaps` of the track lie before it, one of them just before if it is `after_gap`."""

    def __init__(self, number: int, first: Coded, after_gap: bool, gaps: int) -> None:
        self.number, self.start, self.after_gap, self.gaps = number, first.pts, after_gap, gaps
        self.data = b""
        self.seconds = 0.0


class _Segments:
    """The segments of one track: each begins with a packet that can be decoded alone and is about SEGMENT_S long."""

    def __init__(self, name: str, hz: int) -> None:
        self.kept: OrderedDict[str, _Segment] = OrderedDict()
        self._name, self._hz = name, hz
        self._open: _Segment | None = None
        self._parts: list[bytes] = []
        self._next: int | None = None
        self._segments = self._fragments = self._gaps = 0

    def is_late(self, time_s: float) -> bool:
        """Whether the next segment should have begun by `time_s`, and did not."""
        return self._open is not None and time_s > self._open.start / self._hz + 1.1 * SEGMENT_S

    def add(self, packet: Coded) -> None:
        age = 0 if self._open is None else packet.pts - self._open.start
        too_long = age > _LONGEST_S * self._hz
        gap = too_long or (self._next is not None and packet.pts - self._next > self._hz // 2)
        if self._open is None or (packet.keyframe and (gap or age >= (SEGMENT_S - 0.05) * self._hz)):
            self._finish(packet.pts if not gap else self._next or packet.pts)
            self._gaps += gap
            self._open = _Segment(self._segments, packet, gap, self._gaps)
            self._segments += 1
        elif too_long:
            return
        self._fragments += 1
        self._parts.append(fragment(packet, self._fragments))
        self._next = packet.pts + packet.duration

    def _finish(self, stop: int) -> None:
        if self._open is None:
            return
        self._open.data = b"".join(self._parts)
        self._open.seconds = (stop - self._open.start) / self._hz
        self._parts = []
        self.kept[f"{self._name}-{self._open.number}.m4s"] = self._open
        while len(self.kept) > _KEPT:
            self.kept.popitem(last=False)

    def playlist(self, suffix: str) -> str:
        listed = list(self.kept.items())[-_LISTED:]
        first = listed[0][1]
        lines = [
            "#EXTM3U",
            "#EXT-X-VERSION:7",
            f"#EXT-X-TARGETDURATION:{_TARGET_S}",
            f"#EXT-X-MEDIA-SEQUENCE:{first.number}",
            f"#EXT-X-DISCONTINUITY-SEQUENCE:{first.gaps - first.after_gap}",
            f'#EXT-X-MAP:URI="{self._name}.mp4{suffix}"',
        ]
        for name, segment in listed:
            if segment.after_gap:
                lines.append("#EXT-X-DISCONTINUITY")
            lines += [f"#EXTINF:{segment.seconds:.3f},", f"{name}{suffix}"]
        return "\n".join(lines) + "\n"
