"""What live delivery is made of, one part at a time: packets, fragments, playlists, pushes."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
from fractions import Fraction
from typing import Any

import av
import cv2
import numpy as np
import pytest

pytest.importorskip("aiortc", reason="live sessions need the extra live")

from beavervision.errors import UsageError
from beavervision.media import Color, Matrix, Picture
from beavervision.serve.live.check import check
from beavervision.serve.live.encoder import AUDIO_HZ, VIDEO_HZ, Coded, Encoder, Kind
from beavervision.serve.live.fanout import Ended, Fanout
from beavervision.serve.live.fmp4 import fragment, sound_track, video_track
from beavervision.serve.live.hls import Hls
from beavervision.serve.live.push import Push
from beavervision.serve.live.room import as_picture
from beavervision.serve.live.webrtc import Network
from beavervision.settings import Settings
from beavervision.stages.encode import video_frame
from tests.live_server import FLASH_EVERY, SIZE, moment, until_async

SECOND = 25


def coded(count: int, rate: Fraction = Fraction(25), keys: tuple[int, ...] = (), first: int = 0) -> list[list[Coded]]:
    """`count` moments, encoded."""
    encoder, packets = Encoder(SIZE, SIZE, rate, Color()), []
    for n in range(first, first + count):
        m = moment(n, rate)
        pictures = encoder.picture(m.picture, n, n / 25, keyframe=n in keys)
        packets.append(pictures + encoder.sound(m.audio.pcm[0], m.audio.start, n / 25, aac=True))
    return packets


def of(kind: Kind, packets: list[list[Coded]]) -> list[Coded]:
    return [p for group in packets for p in group if p.kind is kind]


# Packets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30000, 1001)])
def test_every_picture_leaves_at_once_with_its_exact_time(rate: Fraction) -> None:
    groups = coded(2 * SECOND, rate, keys=(7,))
    pictures = of(Kind.VIDEO, groups)
    assert [len(of(Kind.VIDEO, [group])) for group in groups] == [1] * len(groups)
    assert [p.pts for p in pictures] == [VIDEO_HZ + int(n * VIDEO_HZ / rate) for n in range(len(groups))]
    keys = [n for n, p in enumerate(pictures) if p.keyframe]
    assert {0, 7} <= set(keys), "one asked for is a key picture, at once"
    assert max(np.diff(keys)) <= round(rate), "at least one a second"


def test_sound_is_stamped_by_its_samples_and_begins_anew_after_a_gap() -> None:
    encoder = Encoder(SIZE, SIZE, Fraction(25), Color())
    first = [c for n in range(25) for c in encoder.sound(np.zeros(1920, np.float32), n * 1920, 0.0, aac=n > 4)]
    for kind, size in ((Kind.OPUS, 960), (Kind.AAC, 1024)):
        times = [c.pts for c in first if c.kind is kind]
        assert np.diff(times).tolist() == [size] * (len(times) - 1)
        assert min(times) > 0, "no time is negative, whatever the encoder puts before the first sample"
    later = [c for c in encoder.sound(np.zeros(1920, np.float32), 96_000, 0.0, aac=True) if c.kind is Kind.OPUS]
    assert later[0].pts - AUDIO_HZ == pytest.approx(96_000, abs=AUDIO_HZ // 100)


def test_fragments_hold_what_went_in_and_picture_and_sound_stay_together() -> None:
    groups = coded(3 * SECOND)
    found = {}
    for track, kind in (
        (video_track(of(Kind.VIDEO, groups)[0].data, SIZE, SIZE), Kind.VIDEO),
        (sound_track(), Kind.AAC),
    ):
        data = track.head + b"".join(fragment(p, n + 1) for n, p in enumerate(of(kind, groups)))
        with av.open(io.BytesIO(data)) as container:
            found[kind] = list(container.decode(container.streams[0]))
    assert len(found[Kind.VIDEO]) == 3 * SECOND
    white = [f.time for f in found[Kind.VIDEO] if f.to_ndarray(format="gray").mean() > 128]
    assert white == pytest.approx([1 + n / 25 for n in range(0, 3 * SECOND, FLASH_EVERY)])
    first = found[Kind.AAC][0].time
    loud = np.abs(np.concatenate([f.to_ndarray()[0] for f in found[Kind.AAC]])) > 0.2
    for time_s in white[1:]:
        at = int((time_s - first) * AUDIO_HZ)
        begun = at - AUDIO_HZ // 20 + int(np.argmax(loud[at - AUDIO_HZ // 20 :]))
        assert abs(begun - at) < 0.005 * AUDIO_HZ, "the beep is heard with the flash"


# Colours ----------------------------------------------------------------------------------------

RED, GREEN = (200, 30, 30), (30, 160, 40)
BT601, BT709, FULL = Color(Matrix.BT601), Color(Matrix.BT709, primaries=1, transfer=1), Color(full_range=True)
BT2020 = Color(Matrix.BT2020, primaries=9, transfer=14)


def two_colors(color: Color) -> Picture:
    """Red on the left, green on the right."""
    rgb = np.full((SIZE, SIZE, 3), RED, np.float32)
    rgb[:, SIZE // 2 :] = GREEN
    yuv = np.rint(cv2.transform(rgb, color.to_yuv())).astype(np.uint8)
    return Picture(*(np.ascontiguousarray(p) for p in (yuv[..., 0], yuv[::2, ::2, 1], yuv[::2, ::2, 2])), color)


def assert_two_colors(rgb: Any) -> None:
    for at, wanted in ((SIZE // 4, RED), (SIZE * 3 // 4, GREEN)):
        assert rgb[SIZE // 2, at].astype(int) == pytest.approx(wanted, abs=6)


def played(colors: list[Color]) -> list[av.VideoFrame]:
    """A stream of such pictures as its viewer decodes it."""
    encoder, data = Encoder(SIZE, SIZE, Fraction(25), colors[0]), b""
    for n, color in enumerate(colors):
        for packet in encoder.picture(two_colors(color), n, 0.0, keyframe=False):
            data += fragment(packet, n + 1) if n else video_track(packet.data, SIZE, SIZE).head + fragment(packet, 1)
    with av.open(io.BytesIO(data)) as container:
        return list(container.decode(video=0))


@pytest.mark.parametrize("color", [BT601, BT709, FULL, BT2020])
def test_a_stream_says_what_its_colours_are(color: Color) -> None:
    (frame,) = played([color])
    expected = video_frame(two_colors(color))
    for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
        assert getattr(frame, name) == getattr(expected, name), name
    assert_two_colors(frame.to_ndarray(format="rgb24"))


def test_pictures_of_other_colours_than_the_first_look_right_too() -> None:
    for first in (BT709, FULL, BT601):
        for frame in played([first, BT601, FULL, BT709, BT2020]):
            assert_two_colors(frame.to_ndarray(format="rgb24"))


@pytest.mark.parametrize("color", [BT601, BT709, FULL, BT2020])
def test_a_cameras_pictures_have_the_same_colours_whatever_it_sends(color: Color) -> None:
    picture = as_picture(video_frame(two_colors(color)), (SIZE, SIZE // 2))
    assert picture.color == Color() and picture.y.shape == (SIZE // 2, SIZE)
    assert_two_colors(np.repeat(picture.rgb(), 2, axis=0))


def test_a_camera_that_tells_nothing_of_its_colours_means_bt601() -> None:
    frame = video_frame(two_colors(BT601))
    frame.colorspace, frame.color_range = 2, 0
    assert_two_colors(as_picture(frame, (SIZE, SIZE)).rgb())


# Viewers ----------------------------------------------------------------------------------------


def test_a_viewer_begins_with_a_key_picture_and_a_slow_one_goes_on_with_the_next() -> None:
    async def scene() -> None:
        asked = []
        fanout = Fanout(lambda: asked.append(1))
        groups = coded(20 * SECOND)
        for group in groups[:3]:
            fanout.publish(group)
        with fanout.view(Kind.VIDEO, Kind.AAC) as view:
            assert len(asked) == len(fanout) == 1
            for group in groups[3:]:
                fanout.publish(group)
            assert view.skipped > 0 and len(asked) > 1, "nobody fetched for twenty seconds"
            got = await view.get()
            assert got.kind is Kind.VIDEO and got.keyframe
            fanout.end()
            with pytest.raises(Ended):  # what waited is forgotten
                await view.get()
        assert len(fanout) == 0
        with pytest.raises(Ended):
            fanout.view(Kind.OPUS)

    asyncio.run(scene())


def test_hls_lists_whole_segments_that_play_and_forgets_old_ones() -> None:
    async def scene() -> None:
        fanout = Fanout(lambda: None)
        hls = Hls(fanout, (SIZE, SIZE))
        for group in coded(20 * SECOND):
            fanout.publish(group)
            await asyncio.sleep(0)

        async def file(name: str) -> bytes:
            found = await hls.file(name, "a=b")
            assert found is not None, name
            return found[0]

        assert 'URI="sound.m3u8?a=b"' in (await file("index.m3u8")).decode()
        lines = (await file("video.m3u8")).decode().splitlines()
        names = [line.removesuffix("?a=b") for line in lines if not line.startswith("#")]
        assert len(names) == 8 and "#EXT-X-TARGETDURATION:2" in lines
        with av.open(io.BytesIO(await file("video.mp4") + await file(names[0]))) as container:
            frames = list(container.decode(video=0))
        assert len(frames) == SECOND and frames[0].time == pytest.approx(1 + int(names[0][6:-4]), abs=0.001)
        assert await hls.file("video-0.m4s", "") is None and await hls.file("other.m3u8", "") is None
        await hls.close()
        assert len(fanout) == 0

    asyncio.run(scene())


def packet(kind: Kind, at_s: float, duration_s: float, *, keyframe: bool = False) -> Coded:
    hz = VIDEO_HZ if kind is Kind.VIDEO else AUDIO_HZ
    key = KEY if keyframe else b"\0\0\0\1\x41nothing"
    return Coded(kind, key, round((1 + at_s) * hz), round(duration_s * hz), keyframe or kind is Kind.AAC, 0.0)


KEY = of(Kind.VIDEO, coded(1))[0].data


@pytest.mark.parametrize("answers", [True, False])
@pytest.mark.parametrize(
    "missing", [range(0), range(0, 1000, 2), range(120, 1000, 3), range(130, 220), range(100, 113)]
)
def test_no_segment_is_longer_than_the_playlist_says_whatever_pictures_come(missing: range, answers: bool) -> None:
    """Some pictures are missing, and key pictures come each 25 that are there and, if `answers`, when one is asked for."""

    async def scene() -> None:
        asked: list[int] = []
        fanout = Fanout(lambda: asked.append(1))
        hls = Hls(fanout, (SIZE, SIZE))
        since, targets, durations = 24, set(), {}
        gaps: dict[str, set[int]] = {}  # how many a segment says are before it, in each playlist that has it
        for n in range(500):
            fanout.publish([packet(Kind.AAC, n / 25, 1 / 25)])
            since += n not in missing
            if (asked and answers) or (since >= 25 and n not in missing):
                fanout.publish([packet(Kind.VIDEO, n / 25, 1 / 25, keyframe=True)])
                since = 0
                asked.clear()
            elif n not in missing:
                fanout.publish([packet(Kind.VIDEO, n / 25, 1 / 25)])
            await asyncio.sleep(0)
            if n % 25 == 0 and n >= 150:
                for name in ("video", "sound"):
                    found = await hls.file(f"{name}.m3u8", "")
                    assert found is not None
                    lines = found[0].decode().splitlines()
                    targets |= {int(line.partition(":")[2]) for line in lines if "TARGETDURATION" in line}
                    times = [float(line[8:-1]) for line in lines if line.startswith("#EXTINF")]
                    before = next(int(line.partition(":")[2]) for line in lines if "DISCONTINUITY-SEQUENCE" in line)
                    for line in lines:
                        before += line == "#EXT-X-DISCONTINUITY"
                        if not line.startswith("#"):
                            gaps.setdefault(line, set()).add(before)
                    durations |= dict(zip([line for line in lines if not line.startswith("#")], times, strict=True))
        (target,) = targets
        assert max(round(seconds) for seconds in durations.values()) <= target
        assert all(len(told) == 1 for told in gaps.values())
        if not missing:
            assert min(durations.values()) >= 0.95
            assert set().union(*gaps.values()) == {0}
        assert len([name for name in durations if name.startswith("video")]) >= (10 if answers else 4)
        await hls.close()

    asyncio.run(scene())


LISTENER = """
import av, sys
counts = {"video": 0, "audio": 0}
times = {"video": [], "audio": []}
with av.open(sys.argv[1], options={"listen": "1"}, timeout=60) as stream:
    try:
        for packet in stream.demux():
            if packet.pts is not None:
                times[packet.stream.type].append(float(packet.pts * packet.time_base))
    except av.FFmpegError:
        pass
print(*(f"{len(times[k])} {times[k][0]:.3f} {times[k][-1]:.3f}" for k in ("video", "audio")))
"""


def test_a_push_arrives_with_picture_and_sound_in_step(free_port: int) -> None:
    url = f"rtmp://127.0.0.1:{free_port}/live/secret"
    listener = subprocess.Popen([sys.executable, "-c", LISTENER, url], stdout=subprocess.PIPE, text=True)

    async def scene() -> None:
        while True:  # the listener takes a moment to listen, and takes one connection only
            fanout = Fanout(lambda: None)
            push = Push(url, fanout, (SIZE, SIZE))
            groups = coded(3 * SECOND)
            fanout.publish(groups[0])
            await until_async(lambda push=push: push.state != "connecting")
            if push.state == "running":
                break
            await push.close()
        assert push.shown_url == f"rtmp://127.0.0.1:{free_port}/..."
        for group in groups[1:]:
            fanout.publish(group)
            await asyncio.sleep(0)
        sent = sum(len(group) for group in groups) - len(of(Kind.OPUS, groups))
        await until_async(lambda: push.packets >= sent - 1)
        fanout.end()
        await push.close()
        assert push.state == "ended"

    try:
        asyncio.run(scene())
        told, _ = listener.communicate(timeout=60)
    finally:
        listener.kill()
        listener.wait()
    pictures, p0, p1, sounds, s0, s1 = map(float, told.split())
    assert pictures >= 3 * SECOND - 1 and sounds >= 3 * AUDIO_HZ / 1024 - 4
    assert p0 == pytest.approx(0, abs=0.002) and s0 < 0.05 and abs(p1 - s1) < 0.1


def test_a_push_that_is_refused_says_so_and_leaves_no_thread(free_port: int) -> None:
    async def scene() -> None:
        fanout = Fanout(lambda: None)
        push = Push(f"rtmp://127.0.0.1:{free_port}/live/key", fanout, (SIZE, SIZE))
        fanout.publish(coded(1)[0])
        await until_async(lambda: push.state == "failed")
        assert "refused" in push.error and "key" in push.error
        await until_async(lambda: not push._worker.is_alive())
        await push.close()

    asyncio.run(scene())


# The network ------------------------------------------------------------------------------------


def network(**settings: Any) -> Network:
    return Network.of(Settings(**settings))


def test_addresses_and_servers_come_from_the_settings() -> None:
    assert network(live_udp_hosts="10.0.0.1, 10.0.0.2").addresses(loopback=False) == ["10.0.0.1", "10.0.0.2"]
    assert "127.0.0.1" in network().addresses(loopback=True)
    assert network().configuration().iceServers == [], "the library's default would ask a public server"
    servers = "stun:stun.example.org:3478,turn:turn.example.org:3478?transport=udp"
    told = network(live_ice_servers=servers, live_turn_user="u", live_turn_password="p").ice_servers()
    assert told[0] == {"urls": ["stun:stun.example.org:3478"]}
    assert told[1] == {"urls": ["turn:turn.example.org:3478?transport=udp"], "username": "u", "credential": "p"}
    timed = network(live_ice_servers=servers, live_turn_secret="s").ice_servers()[1]
    assert timed["username"].isdigit() and len(timed["credential"]) == 28
    with pytest.raises(UsageError, match="live_ice_servers"):
        Settings(live_ice_servers="http://example.org")


def test_the_check_names_what_is_wrong(free_port: int) -> None:
    settings = Settings(live_ice_servers=f"stun:127.0.0.1:{free_port}", live_udp_hosts="127.0.0.1,203.0.113.9")
    checks = {c.name: c for c in asyncio.run(check(settings, Network.of(settings), "8.8.8.8"))}
    assert checks["encoder"].ok
    assert "203.0.113.9" in checks["udp"].detail and "live_udp_hosts" in checks["udp"].detail
    assert not checks["stun"].ok and "live_ice_servers" in checks["stun"].detail
    settings = Settings(live_udp_hosts="127.0.0.1")
    checks = {c.name: c for c in asyncio.run(check(settings, Network.of(settings), "8.8.8.8"))}
    assert not checks["reach"].ok and "live_public_host" in checks["reach"].detail


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
