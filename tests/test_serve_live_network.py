"""Live delivery through real networks: a TURN server, a network that is cut and restored, an RTMP server.

What is needed is part of Linux distributions; where it is missing, the tests skip.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import av
import pytest

pytest.importorskip("aiortc", reason="live sessions need the extra live")

from aiortc import RTCConfiguration, RTCIceServer, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

from tests.answers import until
from tests.live_server import LiveServer, served

TURN = shutil.which("turnserver")
NGINX = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
RTMP_MODULE = next(iter(Path("/usr/lib/nginx/modules").glob("ngx_rtmp_module.so")), None)
IP = shutil.which("ip", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
SECRET = "only-for-this-test"


@contextmanager
def process(command: list[str], ready: Callable[[], bool]) -> Iterator[subprocess.Popen[bytes]]:
    """A server until the end of the block."""
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: ready() or running.poll() is not None)
        assert running.poll() is None, f"{command[0]} ended by itself"
        yield running
    finally:
        running.terminate()
        running.wait(20)


def answers(port: int, host: str = "127.0.0.1") -> bool:
    with suppress(OSError), socket.create_connection((host, port), 1):
        return True
    return False


def free() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


# TURN -------------------------------------------------------------------------------------------


@contextmanager
def turn(port: int, folder: Path) -> Iterator[None]:
    assert TURN is not None
    command = [TURN, "-n", "--no-cli", "--no-tls", "--no-dtls", "--lt-cred-mech", "--use-auth-secret"]
    command += [
        f"--static-auth-secret={SECRET}",
        "--realm=test",
        f"--listening-port={port}",
        "--listening-ip=127.0.0.1",
    ]
    command += ["--relay-ip=127.0.0.1", "--allow-loopback-peers", f"--log-file={folder / 'log'}", "--simple-log"]
    command += [f"--pidfile={folder / 'pid'}", f"--userdb={folder / 'db'}"]
    with process(command, lambda: answers(port)):
        yield


@pytest.mark.skipif(TURN is None, reason="no coturn is installed")
def test_a_viewer_who_can_only_relay_is_connected_and_a_turn_server_that_is_down_is_named(tmp_path: Path) -> None:
    port = free()
    settings = {"live_ice_servers": f"turn:127.0.0.1:{port}?transport=udp", "live_turn_secret": SECRET}
    with served(tmp_path / "serve", flashing=True, **settings) as server:
        with turn(port, tmp_path):
            assert _turn_check(server)["ok"], _turn_check(server)
            opened = server.open()
            pictures, pairs = asyncio.run(_relayed(server, opened))
            assert pictures > 10
            assert pairs == {"relay"}, "there was no other way"
            server.call("DELETE", f"/api/v1/sessions/{opened['id']}")
        down = _turn_check(server)
        assert not down["ok"]
        assert f"turn:127.0.0.1:{port}" in down["detail"] and "does not answer" in down["detail"]


@pytest.mark.skipif(TURN is None, reason="no coturn is installed")
def test_a_turn_server_with_another_secret_is_named(tmp_path: Path) -> None:
    port = free()
    settings = {"live_ice_servers": f"turn:127.0.0.1:{port}?transport=udp", "live_turn_secret": "another"}
    with turn(port, tmp_path), served(tmp_path / "serve", flashing=True, **settings) as server:
        refused = _turn_check(server)
        assert not refused["ok"] and "live_turn_secret" in refused["detail"], refused


def _turn_check(server: LiveServer) -> dict[str, Any]:
    checks = {c["name"]: c for c in server.call("GET", "/api/v1/live/check").json["checks"]}
    found: dict[str, Any] = checks["turn"]
    return found


async def _relayed(server: LiveServer, session: dict[str, Any]) -> tuple[int, set[str]]:
    """Watch with no candidate of one's own but the relay's: how many pictures came, and by which kinds of address."""
    (ice,) = session["media"]["ice_servers"]
    pc = RTCPeerConnection(RTCConfiguration(iceServers=[RTCIceServer(**ice)]))
    pictures = 0
    tasks: list[asyncio.Task[None]] = []

    async def take(track: Any) -> None:
        nonlocal pictures
        with suppress(MediaStreamError):
            while True:
                await track.recv()
                pictures += track.kind == "video"

    pc.on("track", lambda track: tasks.append(asyncio.ensure_future(take(track))))
    for kind in ("video", "audio"):
        pc.addTransceiver(kind, "recvonly")
    await pc.setLocalDescription(await pc.createOffer())
    connection = pc.getTransceivers()[0].receiver.transport.transport._connection
    connection._local_candidates = [c for c in connection.local_candidates if c.type == "relay"]
    for protocol in [p for p in connection._protocols if p.local_candidate.type != "relay"]:
        connection._protocols.remove(protocol)
        await protocol.close()
    lines = pc.localDescription.sdp.splitlines()
    offer = "\r\n".join([line for line in lines if "candidate:" not in line or " typ relay" in line] + [""])
    assert "typ relay" in offer
    answer = await asyncio.to_thread(server.call, "POST", session["media"]["whep"], offer.encode(), "application/sdp")
    assert answer.status == 201, answer
    await pc.setRemoteDescription(RTCSessionDescription(answer.body.decode(), "answer"))
    async with asyncio.timeout(60):
        while pictures <= 10:
            await asyncio.sleep(0.05)
    kinds = {pair.local_candidate.type for pair in connection._nominated.values()}
    await pc.close()
    await asyncio.gather(*tasks)
    return pictures, kinds


# A network that is cut ----------------------------------------------------------------------------


def _ip(*words: str) -> None:
    assert IP is not None
    subprocess.run([IP, *words], check=True, capture_output=True)


@pytest.fixture
def namespace() -> Iterator[tuple[str, str, str]]:
    """Another network, by name, with a cable to this one: the name, this end's address, and this end's device."""
    if IP is None or os.geteuid() != 0:
        pytest.skip("a network of its own needs root and iproute2")
    name, here, there = f"bv{os.getpid()}", f"bva{os.getpid()}"[:15], f"bvb{os.getpid()}"[:15]
    try:
        _ip("netns", "add", name)
        _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        _ip("address", "add", "10.213.7.1/30", "dev", here)
        _ip("link", "set", here, "up")
        _ip("-n", name, "address", "add", "10.213.7.2/30", "dev", there)
        _ip("-n", name, "link", "set", there, "up")
        _ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        _remove(name, here)
        pytest.skip(f"this machine gives no network of its own: {error.stderr.decode().strip()}")
    yield name, "10.213.7.1", here
    _remove(name, here)


def _remove(name: str, device: str) -> None:
    for words in (("link", "delete", device), ("netns", "delete", name)):
        with suppress(subprocess.CalledProcessError):
            _ip(*words)


# A WHEP viewer in a process of its own: `go` waits for a picture more than a cut could leave behind.
WATCHER = """
import asyncio, sys
from contextlib import suppress
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError

async def main():
    pc = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    async def take(track):
        with suppress(MediaStreamError):
            while True:
                await track.recv()
                if track.kind == "video":
                    print("picture", flush=True)
    pc.on("track", lambda track: asyncio.ensure_future(take(track)))
    pc.on("connectionstatechange", lambda: print("state", pc.connectionState, flush=True))
    for kind in ("video", "audio"):
        pc.addTransceiver(kind, "recvonly")
    await pc.setLocalDescription(await pc.createOffer())
    print("offer", pc.localDescription.sdp.encode().hex(), flush=True)
    answer = await asyncio.to_thread(sys.stdin.readline)
    await pc.setRemoteDescription(RTCSessionDescription(bytes.fromhex(answer).decode(), "answer"))
    await asyncio.to_thread(sys.stdin.read)
    await pc.close()

asyncio.run(main())
"""


class Watcher:
    """A viewer in a network namespace."""

    def __init__(self, namespace: str, server: LiveServer, url: str) -> None:
        assert IP is not None
        command = [IP, "netns", "exec", namespace, sys.executable, "-c", textwrap.dedent(WATCHER)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None and self._process.stdout is not None
        offer = self._process.stdout.readline().decode().split()[1]
        answer = server.call("POST", url, bytes.fromhex(offer), "application/sdp")
        assert answer.status == 201, answer
        self._process.stdin.write(answer.body.hex().encode() + b"\n")
        self._process.stdin.flush()
        os.set_blocking(self._process.stdout.fileno(), False)
        self.pictures = 0

    def new_pictures(self) -> int:
        """How many came since the last time."""
        assert self._process.stdout is not None
        come = (self._process.stdout.read() or b"").count(b"picture")
        self.pictures += come
        return come

    def close(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self._process.communicate(timeout=10)
        self._process.kill()
        self._process.communicate()


@pytest.mark.slow
def test_a_network_that_is_cut_is_survived(tmp_path: Path, namespace: tuple[str, str, str]) -> None:
    """A short cut is only a gap; after a long one the viewer has been dropped, and comes back by a new offer."""
    name, address, device = namespace
    with served(tmp_path, flashing=True, live_udp_hosts=address, live_idle_s=120) as server:
        opened = server.open()
        url = opened["media"]["whep"]
        room = server.rooms.get(opened["id"], None)
        viewer = Watcher(name, server, url)
        try:
            until(lambda: viewer.new_pictures() > 0 and viewer.pictures > 10)
            _ip("link", "set", device, "down")
            time.sleep(3.0)
            viewer.new_pictures()
            time.sleep(0.5)
            assert viewer.new_pictures() == 0, "the cable is cut"
            _ip("link", "set", device, "up")
            until(lambda: viewer.new_pictures() > 5, 30)
            assert len(room.peers) == 1, "the same connection goes on"

            _ip("link", "set", device, "down")
            until(lambda: room.peers == {} and len(room.fanout) == 0, 90)
            assert not room.session.closed, "the session waits"
            _ip("link", "set", device, "up")
        finally:
            viewer.close()
        again = Watcher(name, server, url)
        try:
            until(lambda: again.new_pictures() > 0)
        finally:
            again.close()


# RTMP -------------------------------------------------------------------------------------------


@pytest.mark.skipif(NGINX is None or RTMP_MODULE is None, reason="no nginx with its RTMP module is installed")
def test_a_push_is_fanned_out_by_nginx(tmp_path: Path) -> None:
    port = free()
    assert NGINX is not None
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"""
        load_module {RTMP_MODULE};
        daemon off;
        user {"root" if os.geteuid() == 0 else "nobody"};
        pid {tmp_path}/pid;
        error_log {tmp_path}/log;
        events {{}}
        rtmp {{ server {{ listen 127.0.0.1:{port}; application live {{ live on; }} }} }}
        """
    )
    command = [NGINX, "-c", str(config), "-p", str(tmp_path), "-e", str(tmp_path / "log")]
    with (
        process(command, lambda: answers(port)),
        served(tmp_path / "serve", flashing=True, live_push_hosts="127.0.0.1") as server,
    ):
        opened = server.open()
        path = f"/api/v1/sessions/{opened['id']}"
        made = server.call("POST", f"{path}/pushes", {"url": f"rtmp://127.0.0.1:{port}/live/key"})
        assert made.status == 201, made
        shown = functools.partial(server.call, "GET", path)
        until(lambda: shown().json["pushes"][0]["state"] == "running")
        flashes, beeps = [], []
        with av.open(f"rtmp://127.0.0.1:{port}/live/key", options={"rtmp_live": "live"}, timeout=30) as played:
            for frame in played.decode(video=0, audio=0):
                assert frame.time is not None
                if isinstance(frame, av.VideoFrame):
                    if frame.to_ndarray(format="gray").mean() > 128:
                        flashes.append(frame.time)
                elif abs(frame.to_ndarray()).max() > 0.3:
                    beeps.append(frame.time)
                if len(flashes) >= 4:
                    break
        apart = [min(abs(flash - beep) for beep in beeps) for flash in flashes[1:3]]
        assert max(apart) < 0.06, (flashes, beeps)
        until(lambda: shown().json["facts"]["viewers"]["rtmp"] == 1)
        assert server.call("DELETE", f"{path}/pushes/{made.json['id']}").status == 204
        assert json.loads(shown().body)["pushes"] == []
