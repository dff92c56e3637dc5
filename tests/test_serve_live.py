"""Live delivery as clients meet it: a real server on loopback, with sessions that flash and beep at known times."""

from __future__ import annotations

import asyncio
import functools
import io
import json
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

pytest.importorskip("aiortc", reason="live sessions need the extra live")

from aiortc import MediaStreamTrack, RTCCertificate, RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.rtcdtlstransport import generate_certificate
from cryptography.hazmat.primitives.asymmetric import rsa
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from beavervision.serve.access import add_key
from beavervision.serve.app import create_app
from beavervision.serve.jobs import new_id
from beavervision.serve.live import room as room_module
from beavervision.serve.looks import save_look
from beavervision.serve.problems import Problem
from beavervision.serve.service import Service
from beavervision.serve.who import LOCAL
from beavervision.settings import Settings
from tests.answers import until
from tests.live_server import SIZE, LiveServer, Viewer, served, until_async
from tests.test_serve_avatars import a_look

BASE = "/api/v1/sessions"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    with served(tmp_path_factory.mktemp("serve"), flashing=True, live_push_hosts="127.0.0.1") as server:
        yield server


@pytest.fixture
def session(server: LiveServer) -> Iterator[dict[str, Any]]:
    opened = server.open()
    yield opened
    server.call("DELETE", f"{BASE}/{opened['id']}")


async def closed_with(socket: ClientConnection) -> int:
    """The code by which the server closes a WebSocket; there is a reason too."""
    with suppress(ConnectionClosed):
        while True:
            await socket.recv()
    assert socket.close_code is not None
    assert socket.close_reason
    return socket.close_code


# The resource -----------------------------------------------------------------------------------


def test_a_session_is_opened_shown_used_and_ended(server: LiveServer) -> None:
    opened = server.open(voice="amy", fps=15, size_px=256)
    address = f"{BASE}/{opened['id']}"
    assert opened["delay"] == {"total_ms": 200, "look_ahead_ms": 150, "work_ms": 50}
    assert (opened["fps"], opened["camera"], opened["avatar"]) == (15, False, None)
    assert set(opened["media"]) >= {"whep", "whip", "websocket", "audio", "hls", "ice_servers"}
    shown = server.call("GET", address).json
    assert shown["facts"]["viewers"] == {"webrtc": 0, "websocket": 0, "hls": 0, "rtmp": 0}
    assert [s["id"] for s in server.call("GET", BASE).json["sessions"]] == [opened["id"]]
    assert server.call("GET", "/api/v1/status").json["sessions"] == 1

    source = server.source(opened)
    assert server.call("POST", f"{address}/say", {"text": "Hello."}).json == {"utterance": 1}
    assert server.call("POST", f"{address}/say", {"text": "No!", "interrupt": True}).status == 202
    assert server.call("POST", f"{address}/interrupt", {}).status == 204
    assert server.call("PUT", f"{address}/expression", {"expression": "happy:0.5"}).status == 204
    assert (source.said, source.interrupts, source.expressions) == (["Hello.", "No!"], 2, ["happy:0.5"])

    assert server.call("DELETE", address).status == 204
    assert source.closed
    for method, path, body in (
        ("GET", address, None),
        ("DELETE", address, None),
        ("POST", f"{address}/say", {"text": "x"}),
    ):
        gone = server.call(method, path, body)
        assert (gone.status, gone.json["code"]) == (404, "no_session"), (method, path)
    assert server.call("GET", "/api/v1/status").json["sessions"] == 0


def test_what_cannot_be_opened_says_why(server: LiveServer) -> None:
    def refused(answer: Any) -> tuple[int, str]:
        assert answer.headers["content-type"] == "application/problem+json"
        return answer.status, answer.json["code"]

    assert refused(server.form(b"face", consent=False)) == (422, "consent")
    assert refused(server.form(b"face", camera=True)) == (422, "usage")
    assert refused(server.form(None)) == (422, "usage")
    assert refused(server.form(b"face", fps=1000)) == (422, "invalid")
    assert refused(server.form(b"face", nonsense=1)) == (422, "invalid")
    assert refused(server.call("POST", BASE, b"{")) == (422, "invalid")
    assert refused(server.call("POST", BASE, b" " * 70_000)) == (413, "too_large")
    assert refused(server.call("POST", BASE, {"avatar": "0" * 24})) == (404, "no_avatar")
    assert refused(server.form(b"face", model="no-such")) == (422, "model")
    forbidden = server.form(b"face", model="wav2lip")
    assert refused(forbidden) == (403, "licence") and "Use one of: beaver." in forbidden.json["detail"]
    assert server.call("GET", BASE).json["sessions"] == []


def test_an_avatars_face_is_the_one_that_was_found_with_its_upload(server: LiveServer, tmp_path: Path) -> None:
    avatars, avatar_id, look = server.service.place.avatars, new_id(), a_look()
    for name in ("source", "picture"):
        (tmp_path / name).write_bytes(b"face")
    save_look(look, tmp_path / "look.npz")
    avatars.add(avatar_id, LOCAL, "me", new_id(), tmp_path / "source")
    assert avatars.ready(avatar_id, tmp_path / "look.npz", tmp_path / "picture", {"face": "speaker"})
    opened = server.call("POST", BASE, {"avatar": avatar_id})
    assert opened.status == 201, opened
    assert server.source(opened.json).face == look.survey.choice
    assert server.source(server.open(face=b"face")).face == "largest"
    for session in server.call("GET", BASE).json["sessions"]:
        server.call("DELETE", f"{BASE}/{session['id']}")
    again = server.call("POST", BASE, {"avatar": avatar_id, "face": "right"})
    assert (again.status, again.json["code"]) == (422, "usage")
    avatars.remove(avatar_id)


def test_admission_answers_503_with_retry_after(tmp_path_factory: pytest.TempPathFactory) -> None:
    with served(tmp_path_factory.mktemp("full"), flashing=True, live_sessions=1) as server:
        opened = server.open()
        full = server.form(b"face")
        assert (full.status, full.json["code"]) == (503, "busy") and int(full.headers["retry-after"]) > 0
        server.source(opened).full = True
        full = server.call("POST", f"{BASE}/{opened['id']}/say", {"text": "x", "interrupt": True})
        assert (full.status, full.json["code"]) == (503, "busy") and int(full.headers["retry-after"]) > 0
        assert server.source(opened).interrupts == 0, "what is refused interrupts nothing"
        server.call("DELETE", f"{BASE}/{opened['id']}")
        server.open()


def test_with_keys_a_session_is_its_owners_and_signed_addresses_do_for_media(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    ann, bob = add_key(folder / "keys", "ann"), add_key(folder / "keys", "bob")
    with served(folder, flashing=True) as server:
        assert server.form(b"face").status == 401
        server.headers = {"Authorization": f"Bearer {ann}"}
        opened = server.open()
        server.headers = {"Authorization": f"Bearer {bob}"}
        assert server.call("GET", f"{BASE}/{opened['id']}").status == 404
        assert server.call("GET", BASE).json["sessions"] == []
        server.headers = {}
        for method, path in (("GET", ""), ("POST", "/say"), ("GET", "/hls/index.m3u8"), ("POST", "/whep")):
            assert (
                server.call(method, f"{BASE}/{opened['id']}{path}", b"{}" if method == "POST" else None).status == 401
            )
        hls = opened["media"]["hls"]
        assert server.call("GET", hls).status == 200
        assert server.call("GET", hls[:-1] + ("0" if hls[-1] != "0" else "1")).json["code"] == "link_invalid"
        to_speak = opened["media"]["whip"].partition("?")[2]
        watching_by_it = server.call("GET", f"{BASE}/{opened['id']}/hls/index.m3u8?{to_speak}")
        assert watching_by_it.json["code"] == "link_invalid", "the address to speak by is none to watch by"

        async def refused_with(url: str) -> int:
            async with connect(url) as socket:
                return await closed_with(socket)

        bare = opened["media"]["audio"].partition("?")[0]
        assert asyncio.run(refused_with(bare)) == 4401
        assert asyncio.run(refused_with(f"{bare}?{to_speak[:-1]}")) == 4403


def test_without_the_extra_the_address_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("beavervision.serve.live")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "aiortc", None)
    service = Service(Settings(serve_folder=tmp_path))
    try:
        app = create_app(service)
        assert app.state.rooms is None
        with pytest.raises(Problem, match=r"beavervision\[live\]") as refused:
            next(route.endpoint for route in app.routes if getattr(route, "path", "") == BASE)()
        assert refused.value.status == 501
    finally:
        service.close()


# WebRTC -----------------------------------------------------------------------------------------


def test_whep_shows_flash_and_beep_together(server: LiveServer, session: dict[str, Any]) -> None:
    async def scene() -> None:
        async with Viewer(server, session["media"]["whep"]) as viewer:
            await until_async(lambda: sum(p.mean() > 128 for _, p in viewer.pictures) >= 4)
            found = await asyncio.to_thread(server.call, "GET", f"{BASE}/{session['id']}")
            assert found.json["facts"]["viewers"]["webrtc"] == 1
            state = await asyncio.to_thread(server.call, "GET", viewer.location)
            assert state.json["state"] == "connected"
            flashes = [at for at, p in viewer.pictures if p.mean() > 128]
            beeps = [at for at, s in viewer.sounds if np.abs(s).max() > 3000]
            apart = [min(abs(flash - beep) for beep in beeps) for flash in flashes[1:]]
            assert np.median(apart) < 0.06, "a player without a clock of its own hears and sees it as it comes"
            assert viewer.pictures[0][1].shape == (SIZE, SIZE)
            hung_up = await asyncio.to_thread(server.call, "DELETE", viewer.location)
            assert hung_up.status == 200
            await until_async(lambda: viewer.pc.connectionState == "closed")
        gone = await asyncio.to_thread(server.call, "GET", viewer.location)
        assert gone.json["code"] == "no_peer"

    asyncio.run(scene())


class RsaCertificate(RTCCertificate):
    """As GStreamer's webrtcbin has one."""

    @classmethod
    def generateCertificate(cls) -> RsaCertificate:  # noqa: N802
        key = rsa.generate_private_key(65537, 2048)
        return cls(key=key, cert=generate_certificate(key))  # type: ignore[arg-type]

    def _create_ssl_context(self, srtp_profiles: Any) -> Any:
        context = super()._create_ssl_context(srtp_profiles)
        context.set_cipher_list(b"ECDHE-RSA-AES128-GCM-SHA256")
        return context


def test_a_player_with_an_rsa_certificate_sees_it_too(server: LiveServer, session: dict[str, Any]) -> None:
    async def scene() -> None:
        viewer = Viewer(server, session["media"]["whep"])
        viewer.pc._RTCPeerConnection__certificates = [RsaCertificate.generateCertificate()]  # type: ignore[attr-defined]
        async with viewer:
            await until_async(lambda: len(viewer.pictures) > 3 and len(viewer.sounds) > 3)

    asyncio.run(scene())


def test_one_encoder_serves_all_viewers_and_rests_when_they_have_gone(
    server: LiveServer, session: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = room_module.Encoder
    monkeypatch.setattr(room_module, "Encoder", lambda *a: made.append(real(*a)) or made[-1])
    url = session["media"]["whep"]

    async def scene() -> None:
        async with Viewer(server, url) as one, Viewer(server, url) as two:
            await until_async(lambda: len(one.pictures) > 10 and len(two.pictures) > 10)
            assert len(made) == 1
        source = server.source(session)
        await until_async(lambda: server.rooms.get(session["id"], None).peers == {})
        before = source.next
        async with Viewer(server, url) as three:
            await until_async(lambda: len(three.pictures) > 2)
            assert three.pictures[0][1].shape == (SIZE, SIZE)
        assert source.next - before < 100, "time stood still meanwhile"

    asyncio.run(scene())


def test_offers_that_cannot_be_used_are_refused_and_leave_no_peer(server: LiveServer, session: dict[str, Any]) -> None:
    url = session["media"]["whep"]
    vp8 = "v=0\r\no=- 0 0 IN IP4 0.0.0.0\r\ns=-\r\nt=0 0\r\nm=video 9 UDP/TLS/RTP/SAVPF 96\r\na=rtpmap:96 VP8/90000\r\na=mid:0\r\n"
    for offer in (b"", b"nonsense", os.urandom(2000), vp8.encode()):
        refused = server.call("POST", url, offer, "application/sdp")
        assert (refused.status, refused.json["code"]) == (422, "sdp"), offer
    assert server.call("POST", url, b"v=0", "text/plain").status == 415
    until(lambda: server.rooms.get(session["id"], None).peers == {})


def test_candidates_may_come_later_and_a_router_is_told(tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = {
        "live_public_host": "203.0.113.7",
        "live_ice_servers": "turn:127.0.0.1:9?transport=udp",
        "live_turn_secret": "s",
    }
    with served(tmp_path_factory.mktemp("router"), flashing=True, **settings) as server:
        opened = server.open()
        assert opened["media"]["ice_servers"][0]["urls"] == ["turn:127.0.0.1:9?transport=udp"]

        async def scene() -> None:
            pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
            pc.addTransceiver("video", "recvonly")
            await pc.setLocalDescription(await pc.createOffer())
            whole = pc.localDescription.sdp
            lines = [line for line in whole.splitlines() if not line.startswith(("a=candidate", "a=end-of-candidates"))]
            later = [line for line in whole.splitlines() if line.startswith("a=candidate")]
            call = functools.partial(asyncio.to_thread, server.call)
            answer = await call("POST", opened["media"]["whep"], "\r\n".join([*lines, ""]).encode(), "application/sdp")
            assert answer.status == 201, answer
            assert 'rel="ice-server"' in answer.headers["link"]
            sdp = answer.body.decode()
            told = [line.split(" ") for line in sdp.splitlines() if line.startswith("a=candidate")]
            assert {line[5] for line in told if line[4] == "203.0.113.7"} <= {
                line[5] for line in told if line[4] != "203.0.113.7"
            }
            assert any(line[4] == "203.0.113.7" for line in told)
            where = answer.headers["location"]
            assert "had no candidates" in (await call("GET", where)).json["detail"]
            await pc.setRemoteDescription(RTCSessionDescription(sdp, "answer"))
            fragment = "\r\n".join(["a=mid:0", *later, ""]).encode()
            assert (await call("PATCH", where, fragment, "application/trickle-ice-sdpfrag")).status == 204
            await until_async(lambda: pc.connectionState == "connected")
            garbage = await call("PATCH", where, b"a=candidate:1 x", "application/trickle-ice-sdpfrag")
            assert (garbage.status, garbage.json["code"]) == (422, "sdp")
            await pc.close()

        asyncio.run(scene())


class _Camera(MediaStreamTrack):
    kind = "video"

    def __init__(self) -> None:
        super().__init__()
        self._n = 0

    async def recv(self) -> av.VideoFrame:
        await asyncio.sleep(0.04)
        frame = av.VideoFrame.from_ndarray(np.full((120, 160, 3), (250, 20, 20), np.uint8), "rgb24")
        frame.pts, frame.time_base = self._n * 3600, Fraction(1, 90_000)
        self._n += 1
        return frame


class _Microphone(MediaStreamTrack):
    kind = "audio"

    def __init__(self) -> None:
        super().__init__()
        self._n = 0

    async def recv(self) -> av.AudioFrame:
        await asyncio.sleep(0.02)
        tone = np.sin(2 * np.pi * 500 * np.arange(self._n, self._n + 960) / 48_000) * 16_000
        frame = av.AudioFrame.from_ndarray(tone[None].astype(np.int16), "s16", "mono")
        frame.rate, frame.pts, frame.time_base = 48_000, self._n, Fraction(1, 48_000)
        self._n += 960
        return frame


def test_whip_brings_a_camera_and_a_microphone(server: LiveServer) -> None:
    answer = server.call("POST", BASE, {"camera": True, "consent": True, "size_px": 128, "shape": "4:3"})
    assert answer.status == 201, answer
    session = answer.json
    assert session["camera"] and session["size_px"] == [128, 96]

    async def scene() -> None:
        pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        for track in (_Camera(), _Microphone()):
            pc.addTransceiver(track, "sendonly")
        await pc.setLocalDescription(await pc.createOffer())
        offer = pc.localDescription.sdp.encode()
        answer = await asyncio.to_thread(server.call, "POST", session["media"]["whip"], offer, "application/sdp")
        assert answer.status == 201, answer
        await pc.setRemoteDescription(RTCSessionDescription(answer.body.decode(), "answer"))
        source = server.source(session)
        await until_async(lambda: len(source.pictures) > 5 and len(source.heard) > 48_000)
        await pc.close()
        picture = source.pictures[-1]
        assert picture.y.shape == (96, 128)
        assert picture.rgb()[48, 64] == pytest.approx((250, 20, 20), abs=8)
        assert set(source.rates) == {48_000}
        sound = np.frombuffer(bytes(source.heard[-48_000:]), np.int16)
        spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
        assert np.argmax(spectrum) * 48_000 / len(sound) == pytest.approx(500, abs=10)
        await until_async(lambda: server.rooms.get(session["id"], None).peers == {})
        assert source.ends == 1 and not source.streams[0].open, "with the connection its utterance ends"

    asyncio.run(scene())
    server.call("DELETE", f"{BASE}/{session['id']}")


def test_a_microphone_is_heard_beside_sound_of_another_rate(server: LiveServer, session: dict[str, Any]) -> None:
    async def scene() -> None:
        source = server.source(session)
        async with connect(session["media"]["audio"] + "&rate=16000") as speaking:
            await speaking.send(bytes(640))
            pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
            pc.addTransceiver(_Microphone(), "sendonly")
            await pc.setLocalDescription(await pc.createOffer())
            offer = pc.localDescription.sdp.encode()
            answer = await asyncio.to_thread(server.call, "POST", session["media"]["whip"], offer, "application/sdp")
            await pc.setRemoteDescription(RTCSessionDescription(answer.body.decode(), "answer"))
            await until_async(lambda: len(source.streams) == 2 and len(source.streams[1].heard) > 48_000)
            assert [stream.rate_hz for stream in source.streams] == [16_000, 48_000]
            await asyncio.to_thread(server.call, "DELETE", answer.headers["location"])
            await until_async(lambda: source.ends == 1)
            assert [stream.open for stream in source.streams] == [True, False]
            await pc.close()

    asyncio.run(scene())


# WebSockets -------------------------------------------------------------------------------------


async def watched(url: str, seconds: float) -> tuple[list[dict[str, Any]], dict[int, bytes]]:
    """The tracks that a WebSocket viewer is told, and what came of each."""
    data: dict[int, bytes] = {}
    async with connect(url) as socket:
        tracks = json.loads(await socket.recv())["tracks"]
        while True:
            message = await socket.recv()
            assert isinstance(message, bytes)
            data[message[0]] = data.get(message[0], b"") + message[1:]
            times = struct.unpack(">Q", message[1:][message.index(b"tfdt") + 7 :][:8]) if b"tfdt" in message else (0,)
            if message[0] == 0 and times[0] > 90_000 * (1 + seconds):
                return tracks, data


def test_mp4_over_websocket_has_flash_and_beep_at_the_same_time(server: LiveServer, session: dict[str, Any]) -> None:
    tracks, data = asyncio.run(watched(session["media"]["websocket"], 2.0))
    assert [t["track"] for t in tracks] == [0, 1]
    assert tracks[0]["mime"].startswith('video/mp4; codecs="avc1.') and "mp4a.40.2" in tracks[1]["mime"]
    with av.open(io.BytesIO(data[0])) as video, av.open(io.BytesIO(data[1])) as sound:
        pictures = list(video.decode(video=0))
        frames = list(sound.decode(audio=0))
    white = [f.time for f in pictures if f.to_ndarray(format="gray").mean() > 128]
    assert (pictures[0].colorspace, pictures[0].color_range) == (1, 1), "it says that its colours are those of BT.709"
    loud = np.abs(np.concatenate([f.to_ndarray()[0] for f in frames])) > 0.2
    began = frames[0].time + (np.flatnonzero(np.diff(loud.astype(int)) == 1) + 1) / 48_000
    for flash in white[1:-1]:
        assert np.abs(began - flash).min() < 0.02
    assert len(white) >= 3


def test_audio_in_any_chunks_arrives_whole_and_events_come_back(server: LiveServer, session: dict[str, Any]) -> None:
    sound = os.urandom(40_004)
    source = server.source(session)

    async def scene() -> None:
        async with connect(session["media"]["audio"] + "&rate=24000") as socket:
            at = 0
            for size in (1, 2, 3, 997, 1, 20_000, 19_000):
                await socket.send(sound[at : at + size])
                at += size
            await socket.send('{"type": "end"}')
            await until_async(lambda: source.ends == 1)
            assert bytes(source.heard) == sound[:at] and set(source.rates) == {24_000}
            await socket.send('{"type": "interrupt"}')
            await until_async(lambda: source.interrupts == 1)
            await asyncio.to_thread(server.call, "POST", f"{BASE}/{session['id']}/say", {"text": "x"})
            told = json.loads(await socket.recv())
            assert (told["kind"], told["utterance"]) == ("started", 1)
            await socket.send(sound[:999])
        await until_async(lambda: source.ends == 2)
        assert bytes(source.heard[at:]) == sound[:999], "what came before the connection broke is said to its end"

    asyncio.run(scene())


def test_sound_sockets_have_streams_of_their_own(server: LiveServer, session: dict[str, Any]) -> None:
    source, url = server.source(session), session["media"]["audio"]

    async def scene() -> None:
        async with connect(url + "&rate=24000") as speaking:
            await speaking.send(bytes(333))
            async with connect(url + "&rate=8000") as passing:
                await until_async(lambda: len(source.streams) == 2)
                await passing.send('{"type": "end"}')
            await until_async(lambda: server.rooms.get(session["id"], None).sockets == 1)
            assert source.ends == 0, "whoever says nothing ends nothing"
            async with connect(url + "&rate=8000") as other:
                await other.send(b"other")
                await until_async(lambda: len(source.streams) == 3 and source.streams[2].heard == b"other")
            await until_async(lambda: source.ends == 1)
            assert [stream.open for stream in source.streams] == [True, False, False]
            await speaking.send(bytes(333))
            await speaking.send('{"type": "end"}')
            await until_async(lambda: source.ends == 2)
            assert len(source.streams[0].heard) == 666

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("query", "message", "code"),
    [
        ("&rate=16000", "garbage", 4400),
        ("&rate=16000", '{"type": "dance"}', 4400),
        ("&rate=16000", "[" * 60_000, 4400),
        ("&rate=1", b"\0\0", 4400),
        ("&rate=abc", b"\0\0", 4400),
    ],
)
def test_garbage_on_the_audio_socket_closes_it_with_a_code_and_nothing_else(
    server: LiveServer, session: dict[str, Any], query: str, message: str | bytes, code: int
) -> None:
    async def scene() -> None:
        async with connect(session["media"]["audio"] + query) as socket:
            with suppress(ConnectionClosed):  # for some queries it is closed before anything was sent
                await socket.send(message)
            assert await closed_with(socket) == code

    asyncio.run(scene())
    assert server.call("GET", f"{BASE}/{session['id']}").status == 200


def test_too_much_sound_closes_with_4429_and_an_unknown_session_with_4404(
    server: LiveServer, session: dict[str, Any]
) -> None:
    async def scene() -> None:
        server.source(session).full = True
        async with connect(session["media"]["audio"]) as socket:
            await socket.send(b"\0\0")
            assert await closed_with(socket) == 4429
        async with connect(f"ws://127.0.0.1:{server.port}{BASE}/{'0' * 16}/watch") as socket:
            assert await closed_with(socket) == 4404

    asyncio.run(scene())


def test_the_end_of_a_session_ends_all_who_watch_and_speak(server: LiveServer) -> None:
    opened = server.open()

    async def scene() -> None:
        async with (
            Viewer(server, opened["media"]["whep"]) as viewer,
            connect(opened["media"]["websocket"]) as watching,
            connect(opened["media"]["audio"]) as speaking,
        ):
            await until_async(lambda: viewer.pictures and viewer.sounds)
            await asyncio.to_thread(server.call, "DELETE", f"{BASE}/{opened['id']}")
            for socket in (watching, speaking):
                assert await closed_with(socket) == 1001
            await until_async(lambda: viewer.pc.connectionState == "closed")

    asyncio.run(scene())


# HLS and RTMP -----------------------------------------------------------------------------------


def test_hls_plays_through_the_api(server: LiveServer, session: dict[str, Any]) -> None:
    hls = session["media"]["hls"]
    base, _, query = hls.rpartition("/index.m3u8")[0], None, hls.partition("?")[2]
    master = server.call("GET", hls)
    assert master.headers["content-type"] == "application/vnd.apple.mpegurl"
    assert f"video.m3u8?{query}" in master.body.decode()
    listed = server.call("GET", f"{base}/video.m3u8?{query}").body.decode().splitlines()
    names = [line for line in listed if line and not line.startswith("#")]
    data = server.call("GET", f"{base}/video.mp4?{query}").body + server.call("GET", f"{base}/{names[0]}").body
    with av.open(io.BytesIO(data)) as container:
        assert len(list(container.decode(video=0))) >= 24
    assert server.call("GET", f"{base}/video-999999.m4s?{query}").json["code"] == "no_segment"


def test_a_push_needs_an_allowed_host_and_hides_its_key(server: LiveServer, session: dict[str, Any]) -> None:
    path = f"{BASE}/{session['id']}/pushes"
    assert server.call("POST", path, {"url": "rtmp://evil.example.org/a/b"}).json["code"] == "push_host"
    assert server.call("POST", path, {"url": "http://127.0.0.1/a/b"}).json["code"] == "invalid"
    made = server.call("POST", path, {"url": "rtmp://127.0.0.1:9/live/SECRET"})
    assert made.status == 201 and "SECRET" not in made.body.decode()
    until(lambda: server.call("GET", f"{BASE}/{session['id']}").json["pushes"][0]["state"] == "failed")
    shown = server.call("GET", f"{BASE}/{session['id']}").json["pushes"][0]
    assert "SECRET" not in json.dumps(shown) and shown["error"]
    assert server.call("DELETE", f"{path}/{shown['id']}").status == 204
    assert server.call("GET", f"{BASE}/{session['id']}").json["pushes"] == []


@pytest.mark.parametrize(
    "url",
    [
        "rtmp://[::1/a",
        "rtmp://[host]/a/b",
        "rtmp://127.0.0.1:port/a/b",
        "rtmp://127.0.0.1:70000/a/b",
        "rtmp://127.0.0.1:0/a/b",
        "rtmp://:1935/a/b",
        "rtmp://127.0.0.1",
        "http://127.0.0.1/a/b",
        "rtmp://127.0.0.1/a b",
        "rtmp://127.0.0.1/a\n",
        "",
    ],
)
def test_what_is_no_address_to_push_to_is_refused_and_says_what_is(
    server: LiveServer, session: dict[str, Any], url: str
) -> None:
    refused = server.call("POST", f"{BASE}/{session['id']}/pushes", {"url": url})
    assert (refused.status, refused.json["code"]) == (422, "invalid")
    assert "rtmp://HOST/APP/KEY" in refused.json["detail"]
    assert server.call("GET", BASE).json["sessions"][0]["pushes"] == []


# Faults -----------------------------------------------------------------------------------------


def left(server: LiveServer) -> tuple[int, set[str], int]:
    """What a server has: tasks, threads by name, open files."""
    names = {t.name for t in threading.enumerate() if t.name.startswith(("encode-", "rtmp"))}
    open_files = Path("/proc/self/fd")
    return server.tasks(), names, len(list(open_files.iterdir())) if open_files.is_dir() else 0


def test_a_hundred_comings_and_goings_leave_nothing(server: LiveServer) -> None:
    async def viewer(opened: dict[str, Any]) -> None:
        async with Viewer(server, opened["media"]["whep"]) as one:
            await until_async(lambda: one.pictures)

    async def rude(opened: dict[str, Any]) -> None:
        """Connects and vanishes in the middle of things."""
        socket = await connect(opened["media"]["websocket"]).__aenter__()
        await socket.recv()
        socket.transport.abort()
        audio = await connect(opened["media"]["audio"]).__aenter__()
        await audio.send(os.urandom(333))
        audio.transport.abort()

    def round_of(opened: dict[str, Any]) -> None:
        async def both() -> None:
            await asyncio.gather(viewer(opened), rude(opened))

        asyncio.run(both())

    opened = server.open()
    round_of(opened)
    server.call("DELETE", f"{BASE}/{opened['id']}")
    until(lambda: not left(server)[1])
    before = left(server)
    began_s = time.monotonic()
    for _ in range(5):
        opened = server.open()
        for _ in range(10):
            round_of(opened)
        server.call("DELETE", f"{BASE}/{opened['id']}")
    until(lambda: (left(server)[0], left(server)[1]) == (before[0], set()), 30)
    assert left(server)[2] <= before[2] + 3, "no file or socket was left open"
    assert time.monotonic() - began_s < 60, "a hundred connections, and as many ends, in a minute"
    assert server.call("GET", "/healthz").status == 200


def test_a_viewer_whose_network_is_cut_is_dropped_and_can_come_back(
    server: LiveServer, session: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aioice.ice.CONSENT_INTERVAL", 0.3)
    monkeypatch.setattr("aioice.ice.CONSENT_FAILURES", 2)
    room = server.rooms.get(session["id"], None)

    async def scene() -> None:
        async with Viewer(server, session["media"]["whep"]) as viewer:
            await until_async(lambda: viewer.pictures)
            (peer,) = room.peers.values()
            for protocol in viewer.pc.getTransceivers()[0].receiver.transport.transport._connection._protocols:
                protocol.datagram_received = lambda data, addr: None  # nothing reaches it any more,
                protocol.send_stun = lambda *_: None  # and nothing leaves it
            await until_async(lambda: room.peers == {} and len(room.fanout) == 0)
            assert peer.state == "closed"
        async with Viewer(server, session["media"]["whep"]) as viewer:
            await until_async(lambda: viewer.pictures and viewer.sounds)

    asyncio.run(scene())


def test_a_session_that_nobody_watches_is_ended(tmp_path_factory: pytest.TempPathFactory) -> None:
    with served(tmp_path_factory.mktemp("idle"), flashing=True, live_idle_s=1.5) as server:
        opened = server.open()
        source = server.source(opened)

        async def scene() -> None:
            async with Viewer(server, opened["media"]["whep"]) as viewer:
                await until_async(lambda: len(viewer.pictures) > 75)  # twice that long

        asyncio.run(scene())
        assert not source.closed, "while somebody watches it goes on"
        until(lambda: source.closed)
        assert server.call("GET", f"{BASE}/{opened['id']}").status == 404


def test_the_check_is_answered(server: LiveServer) -> None:
    checks = {c["name"]: c for c in server.call("GET", "/api/v1/live/check").json["checks"]}
    assert checks["encoder"]["ok"] and checks["udp"]["ok"] and checks["reach"]["ok"]
