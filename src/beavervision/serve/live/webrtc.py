"""WebRTC: encoded packets out to a viewer (WHEP), camera and microphone in (WHIP, RFC 9725)."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
from aioice.ice import get_host_addresses
from aiortc import (
    MediaStreamTrack,
    RTCBundlePolicy,
    RTCCertificate,
    RTCConfiguration,
    RTCIceServer,
    RTCPeerConnection,
    RTCRtpSender,
    RTCSessionDescription,
)
from aiortc.exceptions import InternalError, InvalidAccessError, InvalidStateError, OperationError
from aiortc.mediastreams import MediaStreamError
from aiortc.sdp import candidate_from_sdp

from beavervision.errors import BusyError, UsageError
from beavervision.live import SoundStream
from beavervision.serve.live.encoder import AUDIO_HZ, VIDEO_HZ, Kind
from beavervision.serve.live.fanout import Ended, Fanout, View
from beavervision.serve.problems import Problem
from beavervision.settings import Settings

_CONNECT_S = 20  # for ICE and DTLS, after the answer
_LOOPBACK = "127.0.0.1"
_TURN_S = 6 * 3600  # how long credentials made from live_turn_secret are valid
_TICKS_HZ = {Kind.VIDEO: VIDEO_HZ, Kind.OPUS: AUDIO_HZ}
_CIPHERS = b":".join(
    b"ECDHE-%s-%s" % (key, cipher)
    for key in (b"ECDSA", b"RSA")
    for cipher in (b"AES128-GCM-SHA256", b"CHACHA20-POLY1305", b"AES128-SHA", b"AES256-SHA")
)
# What aiortc raises for descriptions that are no SDP, or that it cannot agree to.
_REFUSALS = (
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    AssertionError,
    TypeError,
    InternalError,
    InvalidAccessError,
    InvalidStateError,
    OperationError,
)


@dataclass(frozen=True, slots=True)
class Network:
    """How WebRTC may reach viewers: the local addresses to use (none: all of this machine), an address to tell beside
    them (of a router that forwards to this machine), and STUN and TURN servers for both ends."""

    hosts: tuple[str, ...]
    public_host: str
    servers: tuple[str, ...]
    user: str
    password: str
    secret: str

    @classmethod
    def of(cls, settings: Settings) -> Network:
        return cls(
            _parts(settings.live_udp_hosts),
            settings.live_public_host,
            _parts(settings.live_ice_servers),
            settings.live_turn_user,
            settings.live_turn_password,
            settings.live_turn_secret,
        )

    def addresses(self, *, loopback: bool) -> list[str]:
        """Where this end receives. `loopback` for a peer on this machine: aiortc leaves that address out."""
        found = list(self.hosts) or get_host_addresses(use_ipv4=True, use_ipv6=True)
        return [*found, _LOOPBACK] if (loopback or not found) and _LOOPBACK not in found else found

    def ice_servers(self) -> list[dict[str, Any]]:
        """As RTCPeerConnection of browsers takes them."""
        if not self.servers:
            return []
        user, password = self.user, self.password
        if self.secret:  # "A REST API For Access To TURN Services", draft-uberti-behave-turn-rest
            user = str(int(time.time()) + _TURN_S)
            digest = hmac.new(self.secret.encode(), user.encode(), hashlib.sha1).digest()
            password = base64.b64encode(digest).decode()
        return [
            {"urls": [url], "username": user, "credential": password} if url.startswith("turn") else {"urls": [url]}
            for url in self.servers
        ]

    def links(self) -> list[str]:
        """The same as Link headers (RFC 9725, section 4.6)."""
        told = []
        for server in self.ice_servers():
            link = f'<{server["urls"][0]}>; rel="ice-server"'
            if "username" in server:
                link += f'; username="{server["username"]}"; credential="{server["credential"]}"; credential-type="password"'
            told.append(link)
        return told

    def configuration(self) -> RTCConfiguration:
        servers = [RTCIceServer(**server) for server in self.ice_servers()]
        return RTCConfiguration(iceServers=servers, bundlePolicy=RTCBundlePolicy.MAX_BUNDLE)


def _parts(listed: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in listed.split(",") if part.strip())


class _Certificate(RTCCertificate):
    """Agrees to peers with RSA certificates as well, which GStreamer has; aiortc's own only knows ECDSA."""

    def _create_ssl_context(self, srtp_profiles: Any) -> Any:
        context = super()._create_ssl_context(srtp_profiles)
        context.set_cipher_list(_CIPHERS)
        return context


class Peer:
    """One connection. It closes by itself when it fails, when the other end goes, or when it is not there in time."""

    def __init__(self, network: Network, on_closed: Callable[[Peer], None]) -> None:
        self.pc = RTCPeerConnection(network.configuration())
        # aiortc has no option for it.
        self.pc._RTCPeerConnection__certificates = [_Certificate.generateCertificate()]  # type: ignore[attr-defined]
        self._network, self._on_closed = network, on_closed
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None
        self.connected = asyncio.Event()

    @property
    def state(self) -> str:
        return self.pc.connectionState

    def advice(self) -> str:
        """What to do while it is not there."""
        if self.state == "connected":
            return "It is connected."
        theirs = {c.type for t in self.pc.getTransceivers() for c in t.sender.transport.transport.getRemoteCandidates()}
        if not theirs:
            return "The offer had no candidates: gather them before the offer is sent, or send them with PATCH."
        return (
            "No pair of addresses has answered yet. If it stays so, a firewall keeps UDP from this machine: allow it, or set "
            "live_ice_servers to a TURN server. /api/v1/live/check looks at this end."
        )

    async def answer(self, offer: str, *, loopback: bool) -> str:
        """The answer to `offer`, with all candidates.

        Raises:
            Problem: the offer cannot be used.
        """
        self.pc.on("connectionstatechange", self._changed)
        try:
            await self.pc.setRemoteDescription(RTCSessionDescription(offer, "offer"))
            if not self.pc.getTransceivers():
                raise ValueError("no media")
            addresses = self._network.addresses(loopback=loopback)
            for transceiver in self.pc.getTransceivers():
                _listen_on(transceiver.sender, addresses)
            await self.pc.setLocalDescription()
        except _REFUSALS as error:
            await self.close()
            raise Problem(
                422,
                "sdp",
                "The offer cannot be agreed to. Offer audio as Opus and video as H.264, in one bundle.",
            ) from error
        self.keep(self._in_time())
        return self._shown(self.pc.localDescription.sdp)

    async def trickle(self, fragment: str) -> None:
        """Candidates that the other end found later (RFC 8840).

        Raises:
            Problem: it is no such fragment, or asks for an ICE restart.
        """
        mid = None
        for line in fragment.splitlines():
            name, _, value = line.partition(":")
            if name == "a=mid":
                mid = value.strip()
            elif name == "a=candidate":
                try:
                    candidate = candidate_from_sdp(value.strip())
                    candidate.sdpMid = mid
                    await self.pc.addIceCandidate(candidate)
                except _REFUSALS as error:
                    raise Problem(422, "sdp", "A candidate cannot be read. Send lines as RFC 8840 has them.") from error

    def keep(self, work: Awaitable[None]) -> None:
        """A task that ends with the connection."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._on_closed(self)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.pc.close()

    async def _changed(self) -> None:
        if self.pc.connectionState == "connected":
            self.connected.set()
        elif self.pc.connectionState in ("failed", "closed"):
            await self.close()

    async def _in_time(self) -> None:
        try:
            await asyncio.wait_for(self.connected.wait(), _CONNECT_S)
        except TimeoutError:
            self._closing = self._closing or asyncio.ensure_future(self._close())

    def _shown(self, sdp: str) -> str:
        """The description with candidates for the public address beside those of this machine."""
        if not self._network.public_host:
            return sdp
        lines = []
        for line in sdp.splitlines():
            lines.append(line)
            parts = line.split(" ")
            if line.startswith("a=candidate:") and parts[7] == "host" and ipaddress.ip_address(parts[4]).version == 4:
                parts[4] = self._network.public_host
                lines.append(" ".join(parts))
        return "\r\n".join(lines) + "\r\n"


def _listen_on(sender: RTCRtpSender, addresses: list[str]) -> None:
    """Let a connection use these local addresses: it has no option for them, and leaves 127.0.0.1 out."""
    connection = sender.transport.transport.iceGatherer._connection
    gather = connection.get_component_candidates

    async def chosen(component: int, **_: Any) -> Any:
        return await gather(component=component, addresses=addresses)

    connection.get_component_candidates = chosen  # type: ignore[assignment, method-assign]


# Out ---------------------------------------------------------------------------------------------


def watch(peer: Peer, fanout: Fanout, offer: str) -> None:
    """Send what `fanout` has of what `offer` mentions; the rest aiortc could not answer. Before the answer."""
    for kind, packets, codecs in (
        ("video", Kind.VIDEO, ("video/H264", "video/rtx")),
        ("audio", Kind.OPUS, ("audio/opus",)),
    ):
        if f"m={kind} " not in offer:
            continue
        transceiver = peer.pc.addTransceiver(_Sent(kind, fanout, packets), "sendonly")
        known = RTCRtpSender.getCapabilities(kind).codecs
        transceiver.setCodecPreferences([codec for codec in known if codec.mimeType in codecs])
        # A viewer who lost a picture asks for a key picture; aiortc would keep that from tracks that bring encoded packets.
        transceiver.sender._send_keyframe = fanout.ask_for_key  # type: ignore[method-assign]


class _Sent(MediaStreamTrack):
    """A track of encoded packets.

    aiortc's sender reports pair a packet's time with the moment of its sending, and viewers align sound and picture by
    them: each packet leaves when it is due.
    """

    def __init__(self, kind: str, fanout: Fanout, packets: Kind) -> None:
        super().__init__()
        self.kind = kind
        self._fanout, self._packets = fanout, packets
        self._view: View | None = None

    async def recv(self) -> av.Packet[Any]:
        try:
            if self._view is None:  # not before: what waits until the connection is there would come too late
                self._view = self._fanout.view(self._packets)
            coded = await self._view.get()
        except Ended as error:
            raise MediaStreamError from error
        await asyncio.sleep(max(coded.at_s - asyncio.get_running_loop().time(), 0))
        packet = av.Packet(coded.data)
        packet.pts, packet.time_base = coded.pts, Fraction(1, _TICKS_HZ[coded.kind])
        return packet

    def stop(self) -> None:
        super().stop()
        if self._view is not None:
            self._view.close()


# In ----------------------------------------------------------------------------------------------


def take(
    peer: Peer, on_picture: Callable[[av.VideoFrame], Awaitable[None]], stream: Callable[[int], SoundStream]
) -> None:
    """Hand on what comes: pictures (the newest, while the last is still worked on), and each track of sound to a stream of its
    own, which `stream` makes for a rate in Hz. Before the answer."""

    def begun(track: MediaStreamTrack) -> None:
        peer.keep(_pictures(track, on_picture) if track.kind == "video" else _sound(track, stream(AUDIO_HZ)))

    peer.pc.on("track", begun)


async def _pictures(track: MediaStreamTrack, on_picture: Callable[[av.VideoFrame], Awaitable[None]]) -> None:
    newest: asyncio.Queue[av.VideoFrame | None] = asyncio.Queue(1)

    async def received() -> None:
        # A track keeps all that it has decoded until it is fetched, so it is fetched at once.
        try:
            while True:
                frame = await track.recv()
                if newest.full():
                    newest.get_nowait()
                newest.put_nowait(frame)  # type: ignore[arg-type]
        except MediaStreamError:
            if newest.full():
                newest.get_nowait()
            newest.put_nowait(None)

    receiving = asyncio.ensure_future(received())
    try:
        while (frame := await newest.get()) is not None:
            await on_picture(frame)
    finally:
        receiving.cancel()


async def _sound(track: MediaStreamTrack, stream: SoundStream) -> None:
    resample = av.AudioResampler("s16", "mono", AUDIO_HZ)
    try:
        while True:
            frame = await track.recv()
            assert isinstance(frame, av.AudioFrame)
            for part in resample.resample(frame):
                with suppress(BusyError, UsageError):  # more waits than is held, or the session was closed meanwhile
                    stream.push(part.to_ndarray().tobytes())
    except MediaStreamError:
        return
    finally:
        stream.end()
