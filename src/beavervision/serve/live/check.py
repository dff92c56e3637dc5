"""Whether live sessions can be reached from here, and what is wrong where they cannot."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from urllib.parse import urlsplit

import aioice
from aioice import stun, turn
from aiortc import RTCIceServer
from aiortc.rtcicetransport import connection_kwargs
from fastapi.concurrency import run_in_threadpool

from beavervision.errors import DeviceError
from beavervision.serve.access import is_loopback
from beavervision.serve.live.encoder import video_codec
from beavervision.serve.live.schema import CheckOut
from beavervision.serve.live.webrtc import Network
from beavervision.settings import Settings

_WAIT_S = 8.0


async def check(settings: Settings, network: Network, client: str) -> list[CheckOut]:
    """Everything that WebRTC needs at this end. `client` is the address of who asks."""
    return [
        await _encoder(),
        await _udp(network, client),
        _reach(settings, network, client),
        *await _servers(network),
    ]


async def _encoder() -> CheckOut:
    try:
        return CheckOut(name="encoder", ok=True, detail=f"H.264 by {await run_in_threadpool(video_codec)}.")
    except DeviceError as error:
        return CheckOut(name="encoder", ok=False, detail=str(error))


async def _udp(network: Network, client: str) -> CheckOut:
    """Can this end open sockets on its addresses, and does a datagram come back to it?"""
    addresses = network.addresses(loopback=is_loopback(client))
    good = [address for address in addresses if await run_in_threadpool(_echo, address)]
    bad = [address for address in addresses if address not in good]
    if not bad:
        return CheckOut(name="udp", ok=True, detail=f"UDP works on {', '.join(good)}.")
    detail = f"UDP does not work on {', '.join(bad)}. Correct live_udp_hosts, or allow UDP in this machine's firewall."
    return CheckOut(name="udp", ok=bool(good), detail=detail)


def _echo(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as one, socket.socket(family, socket.SOCK_DGRAM) as other:
            one.bind((address, 0))
            other.bind((address, 0))
            one.settimeout(0.5)
            other.sendto(b"beaver", one.getsockname())
            return one.recv(16) == b"beaver"
    except OSError:
        return False


def _reach(settings: Settings, network: Network, client: str) -> CheckOut:
    """Will a client elsewhere learn an address that it can reach?"""
    if is_loopback(client):
        return CheckOut(name="reach", ok=True, detail="You are on this machine: nothing lies between.")
    told = network.addresses(loopback=False)
    turn = any(url.startswith("turn") for url in network.servers)
    if turn or network.public_host:
        what = "a TURN server" if turn else f"the public address {network.public_host}"
        return CheckOut(name="reach", ok=True, detail=f"Clients are told {what} beside {', '.join(told)}.")
    public = ipaddress.ip_address(client).is_global
    if public and not any(ipaddress.ip_address(address).is_global for address in told):
        detail = (
            f"You come from {client}, and this machine only has the private addresses {', '.join(told)}. Set "
            "live_public_host if a router forwards UDP to it, or live_ice_servers to a TURN server. Until then watch by "
            "WebSocket or HLS."
        )
        return CheckOut(name="reach", ok=False, detail=detail)
    return CheckOut(name="reach", ok=True, detail=f"Clients are told {', '.join(told)}.")


async def _servers(network: Network) -> list[CheckOut]:
    """Does each STUN and TURN server answer?"""
    checks = []
    for server in network.configuration().iceServers or []:
        url = str(server.urls[0])
        kind = urlsplit(url).scheme
        where = f"{url} does not answer. Check the address in live_ice_servers, and that UDP may go there."
        try:
            seen = await asyncio.wait_for(_relay(server) if kind.startswith("turn") else _reflected(server), _WAIT_S)
            checks.append(CheckOut(name=kind, ok=True, detail=f"{url} answers: this machine is seen at {seen}."))
        except stun.TransactionFailed as error:
            code, reason = error.response.attributes.get("ERROR-CODE", (0, "no reason"))
            whose = "live_turn_secret" if network.secret else "live_turn_user and live_turn_password"
            what = f"Check {whose}" if code in (401, 438, 441) else "Look into its log"
            detail = f"{url} answers, but refuses ({code} {reason}). {what}."
            checks.append(CheckOut(name=kind, ok=False, detail=detail))
        except (stun.TransactionError, TimeoutError, OSError):
            checks.append(CheckOut(name=kind, ok=False, detail=where))
    return checks


async def _reflected(server: RTCIceServer) -> str:
    """This machine's address as a STUN server sees it. Raises TimeoutError."""
    connection = aioice.Connection(ice_controlling=True, **connection_kwargs([server]))
    try:
        await connection.gather_candidates()
        found = [candidate.host for candidate in connection.local_candidates if candidate.type == "srflx"]
    finally:
        await connection.close()
    if not found:
        raise TimeoutError
    return found[0]


async def _relay(server: RTCIceServer) -> str:
    """The address that a TURN server lends. Raises TransactionError, OSError."""
    how = connection_kwargs([server])
    transport, _ = await turn.create_turn_endpoint(
        asyncio.DatagramProtocol,
        server_addr=how["turn_server"],
        username=how["turn_username"],
        password=how["turn_password"],
        ssl=how.get("turn_ssl", False),
        transport=how.get("turn_transport", "udp"),
    )
    host, _ = transport.get_extra_info("sockname")
    transport.close()
    return str(host)
