"""Hostile and damaged media at the service's door: refused or failed with a reason, nothing left, no memory kept."""

from __future__ import annotations

import io
import os
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from random import Random

import av
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra serve")

from beavervision.media import F32, Picture
from beavervision.stages.decode import from_rgb
from tests import faces
from tests.answers import until
from tests.media_factory import beeps, make_sound, make_video
from tests.test_serve import Server, started

FEW, MANY = 30, 200
RATE_HZ = 16_000
UPLOAD_MB = 64
# What an upload that cannot be used may be told, and a job that failed for it.
REASONS = {"media", "no_face", "no_audio", "input"}
MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("BEAVERVISION_")]:
            patch.delenv(name)
        made = started(tmp_path_factory.mktemp("serve"), serve_max_upload_mb=str(UPLOAD_MB))
    yield made
    made.kill()


def small_face() -> Picture:
    picture = Image.fromarray(faces.portrait_rgb()).resize((192, 192))
    return from_rgb(np.asarray(picture))


def encoded(path: Path, video: str, sound: str) -> bytes:
    """Half a second of the portrait with a beep."""
    frames = [av.VideoFrame.from_ndarray(small_face().rgb(), "rgb24").reformat(format="yuv420p") for _ in range(12)]
    options = {"deadline": "realtime", "cpu-used": "8"} if video == "libvpx" else {}
    pcm = beeps(RATE_HZ * 3 // 10, RATE_HZ, [Fraction(0), Fraction(1, 10)])
    rate_hz = 48_000 if sound == "libopus" else RATE_HZ
    make_video(
        path,
        size=(192, 192),
        codec=video,
        frames=iter(frames),
        audio=[(sound, np.repeat(pcm, rate_hz // RATE_HZ, axis=1), rate_hz, Fraction(0))],
        options=options,
    )
    return path.read_bytes()


def still(kind: str) -> bytes:
    made = io.BytesIO()
    Image.fromarray(small_face().rgb()).save(made, kind)
    return made.getvalue()


def tone() -> F32:
    return beeps(RATE_HZ // 2, RATE_HZ, [Fraction(0), Fraction(1, 4)])


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Good files in few bytes, by kind."""
    folder = tmp_path_factory.mktemp("media")
    return {
        "mp4": encoded(folder / "a.mp4", "libx264", "aac"),
        "webm": encoded(folder / "a.webm", "libvpx", "libopus"),
        "png": still("PNG"),
        "jpg": still("JPEG"),
        "wav": make_sound(folder / "a.wav", tone(), RATE_HZ).read_bytes(),
        "mp3": make_sound(folder / "a.mp3", tone(), RATE_HZ, "libmp3lame").read_bytes(),
    }


# --- damage -----------------------------------------------------------------------------------------------------------


def bits_flipped(data: bytes, random: Random) -> bytes:
    """Up to 64 bits, in the first kilobyte, where headers are, or all over."""
    changed = bytearray(data)
    end = min(len(data), 1024) if random.random() < 0.5 else len(data)
    for _ in range(random.choice((1, 4, 16, 64))):
        changed[random.randrange(end)] ^= 1 << random.randrange(8)
    return bytes(changed)


def truncated(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(1, len(data))]


def block_lost(data: bytes, random: Random) -> bytes:
    """A part overwritten with zeros, or cut out."""
    start = random.randrange(len(data))
    size = random.randrange(1, max(2, len(data) // 4))
    return data[:start] + (bytes(size) if random.random() < 0.5 else b"") + data[start + size :]


def mutants(media: dict[str, bytes], count: int) -> Iterator[tuple[str, str, bytes]]:
    """Kind, what was done, and the file; the same ones each time."""
    random = Random(17)
    ways: list[Callable[[bytes, Random], bytes]] = [bits_flipped, truncated, block_lost]
    for number in range(count):
        kind = list(media)[number % len(media)]
        way = number // len(media) % (len(ways) + 1)
        if way < len(ways):
            yield kind, ways[way].__name__, ways[way](media[kind], random)
        else:
            other = random.choice([name for name in media if name != kind])
            size = random.choice((4, 12, 64, 512))
            yield kind, f"head of {other}", media[other][:size] + media[kind][size:]


def rss_bytes(pid: int, *, peak: bool = False) -> int:
    field = "VmHWM:" if peak else "VmRSS:"
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def memory(server: Server) -> int:
    """Of the server and its workers."""
    workers = server.get("/api/v1/status")["workers"]
    return rss_bytes(server.process.pid) + sum(rss_bytes(worker["pid"]) for worker in workers)


def send(server: Server, media: dict[str, bytes], kind: str, data: bytes) -> tuple[int, str]:
    """Send a file where it belongs: the status and the code of the answer. What was made is deleted."""
    if kind in ("wav", "mp3"):
        fields: dict[str, bytes | str] = {"video": media["jpg"], "audio": data}
    else:
        fields = {"video": data, "text": "Hi."}
    answer = server.lipsync({**fields, "consent": "true"})
    job = answer.headers.get("location") or answer.json.get("job")
    if job is not None:
        server.call("DELETE", job)
    if answer.status >= 400:
        assert answer.json["detail"].endswith("."), answer.json
        assert str(server.folder) not in answer.body.decode()
    return answer.status, answer.json.get("code", "")


def damage(server: Server, media: dict[str, bytes], count: int, slack_mib: int) -> Counter[str]:
    """Send `count` damaged files; how often each code came ("" for a video)."""
    for kind, data in media.items():  # what one good job of each kind needs is kept from then on
        assert send(server, media, kind, data) == (200, ""), kind
    restarts = [worker["restarts"] for worker in server.get("/api/v1/status")["workers"]]
    before, seen = memory(server), Counter[str]()
    for kind, done, data in mutants(media, count):
        status, code = send(server, media, kind, data)
        assert status == 200 or (400 <= status < 500 and code in REASONS), (kind, done, status, code)
        seen[code] += 1
    assert server.process.poll() is None
    assert [worker["restarts"] for worker in server.get("/api/v1/status")["workers"]] == restarts
    until(lambda: server.files() == [])
    grown = memory(server) - before
    print(seen, f"memory grew by {grown / MIB:.1f} MiB from {before / MIB:.0f}")
    assert grown < slack_mib * MIB
    assert send(server, media, "mp4", media["mp4"]) == (200, "")
    return seen


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_damaged_media_are_refused_or_fail_with_a_reason(server: Server, media: dict[str, bytes]) -> None:
    seen = damage(server, media, FEW, slack_mib=48)
    assert seen["media"] >= FEW // 5


@linux
@pytest.mark.slow
def test_much_damaged_media(server: Server, media: dict[str, bytes]) -> None:
    seen = damage(server, media, MANY, slack_mib=48)
    assert seen["media"] >= MANY // 5


# --- traps ------------------------------------------------------------------------------------------------------------


def png(width: int, height: int, data: bytes, depth: int = 8, color: int = 2) -> bytes:
    """A PNG of which the header says what it likes."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)),
        (b"IDAT", zlib.compress(data, 9)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks
    )


def wav(rate_hz: int, channels: int) -> bytes:
    """Noise under a header that says what it likes."""
    data = Random(1).randbytes(16_000)
    block = channels * 2
    form = struct.pack("<HHIIHH", 1, channels, rate_hz, rate_hz * block % 2**32, block, 16)
    return b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + (
        struct.pack("<I", len(data)) + data
    )  # fmt: skip


def ten_hours(path: Path) -> bytes:
    """41 pictures, 15 minutes apart."""
    return make_video(path, pictures=41, times=[Fraction(900 * i) for i in range(41)]).read_bytes()


def sound_of_hours(path: Path) -> bytes:
    """A tenth of a second of sound now and then, in a container that gives its streams no length."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.codec_context.layout = "mono"
        for number in range(60):
            frame = av.AudioFrame.from_ndarray(np.full((1, 800), 9000, np.int16), "s16", "mono")
            frame.rate, frame.pts, frame.time_base = 8000, number * 590 * 8000, Fraction(1, 8000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path.read_bytes()


TRAPS: dict[str, Callable[[Path], bytes]] = {
    "a header of 60000 px": lambda folder: png(60_000, 60_000, bytes(1000)),
    "20000 x 20000 px": lambda folder: png(20_000, 20_000, bytes(2501 * 20_000), depth=1, color=0),
    "20000 px, one high": lambda folder: png(20_000, 1, bytes(2501), depth=1, color=0),
    "8 kB that unpack to 200 MB": lambda folder: png(8192, 8192, bytes(1025 * 8192), depth=1, color=0),
    "a GIF of 65535 px": lambda folder: b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + bytes(200),
    "ten hours in an MP4": lambda folder: ten_hours(folder / "a.mp4"),
    "ten hours in a Matroska": lambda folder: ten_hours(folder / "a.mkv"),
    "240000 pictures a second": lambda folder: make_video(
        folder / "b.mp4", pictures=9, rate=Fraction(240_000)
    ).read_bytes(),
}
SOUND_TRAPS: dict[str, Callable[[Path], bytes]] = {
    "sound at 2 GHz": lambda folder: wav(2**31 - 1, 1),
    "sound at 1 Hz": lambda folder: wav(1, 1),
    "sound of 200 channels": lambda folder: wav(16_000, 200),
    "hours of sound": lambda folder: sound_of_hours(folder / "a.mka"),
}


@linux
@pytest.mark.parametrize("trap", [*TRAPS, *SOUND_TRAPS])
def test_a_trap_is_refused(server: Server, media: dict[str, bytes], tmp_path: Path, trap: str) -> None:
    before = memory(server)
    if trap in TRAPS:
        fields: dict[str, bytes | str] = {"video": TRAPS[trap](tmp_path), "text": "Hi."}
    else:
        fields = {"video": media["jpg"], "audio": SOUND_TRAPS[trap](tmp_path)}
    answer = server.lipsync({**fields, "consent": "true"})
    assert (answer.status, answer.json["code"]) == (422, "media"), answer
    assert "job" not in answer.json  # it was not even queued
    assert server.files() == []
    assert memory(server) - before < 8 * MIB


def playlists(target: Path) -> dict[str, bytes]:
    """What would play `target` if it were followed."""
    hls = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S">'
        '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1" width="192" height="192">'
        "<BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>"
    )
    forms = {
        "m3u8": hls,
        "m3u": "{}\n",
        "concat": "ffconcat version 1.0\nfile '{}'\n",
        "dash": dash,
        "xspf": '<playlist xmlns="http://xspf.org/ns/0/"><trackList><track><location>{}</location></track></trackList></playlist>',
        "asx": '<asx version="3.0"><entry><ref href="{}"/></entry></asx>',
        "svg": '<svg xmlns="http://www.w3.org/2000/svg"><image href="{}" width="9" height="9"/></svg>',
        "rtsp": "RTSPtext\nrtsp://127.0.0.1{}\n",
        "path": "{}",
    }
    made = {name: form.format(target).encode() for name, form in forms.items()}
    made["m3u8 with a scheme"] = hls.format(f"file://{target}").encode()
    return made


@pytest.mark.parametrize("field", ["video", "audio"])
def test_lists_of_local_files_are_not_followed(
    server: Server, media: dict[str, bytes], tmp_path: Path, field: str
) -> None:
    target = tmp_path / "secret.mp4"
    target.write_bytes(media["mp4"])
    for name, data in playlists(target).items():
        for dressed in (data, media["mp4"][:32] + data):
            fields: dict[str, bytes | str] = {"video": dressed, "text": "Hi."}
            if field == "audio":
                fields = {"video": media["jpg"], "audio": dressed}
            answer = server.lipsync({**fields, "consent": "true"})
            assert (answer.status, answer.json["code"]) == (422, "media"), (name, answer)
            assert b"secret" not in answer.body, name
    assert server.files() == []


# --- uploads ----------------------------------------------------------------------------------------------------------


@linux
def test_forty_megabytes_of_upload_are_not_held_in_memory(server: Server, media: dict[str, bytes]) -> None:
    padded = media["mp4"] + struct.pack(">I4s", 40 * MIB, b"free") + Random(2).randbytes(40 * MIB - 8)
    fields = {"text": "Hi.", "consent": "true"}
    assert server.lipsync({"video": media["mp4"], **fields}).status == 200  # what is loaded at the first time stays
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the peak counts from here
    before = rss_bytes(server.process.pid)
    answer = server.lipsync({"video": padded, **fields})
    peak = rss_bytes(server.process.pid, peak=True)
    assert answer.status == 200, answer
    print(f"the upload added {(peak - before) / MIB:.1f} MiB to {before / MIB:.0f}")
    assert peak - before < 10 * MIB
    for job in server.get("/api/v1/jobs")["jobs"]:
        server.call("DELETE", job["links"]["self"])
