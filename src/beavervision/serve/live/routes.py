"""The routes of live sessions: see docs/live.md."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, cast
from urllib.parse import urlsplit

from fastapi import FastAPI, Path, Query, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.concurrency import run_in_threadpool
from pydantic import ValidationError
from starlette.requests import HTTPConnection

from beavervision.errors import BeaverVisionError, BusyError
from beavervision.live import LiveSession, SoundStream
from beavervision.serve.access import is_loopback
from beavervision.serve.live.check import check
from beavervision.serve.live.encoder import Kind
from beavervision.serve.live.fanout import Ended, View
from beavervision.serve.live.fmp4 import Track, fragment, sound_track, video_track
from beavervision.serve.live.push import Push
from beavervision.serve.live.room import Room, ended
from beavervision.serve.live.rooms import Rooms
from beavervision.serve.live.schema import (
    ChecksOut,
    DelayOut,
    ExpressionIn,
    MediaOut,
    PushIn,
    PushOut,
    SaidOut,
    SayIn,
    SessionOut,
    SessionSettings,
    SessionsOut,
)
from beavervision.serve.problems import Problem, of_validation
from beavervision.serve.schema import file_field, form_body
from beavervision.serve.service import Service
from beavervision.serve.upload import Intake
from beavervision.serve.who import Owner, owner_of

SESSIONS = "/api/v1/sessions"
_SDP = "application/sdp"
_SDP_BYTES = 1 << 15
_RATES_HZ = (8_000, 96_000)
_SEND_S = 10.0  # a WebSocket viewer that takes nothing for so long has gone
# Close codes of WebSockets, after the HTTP status that says the same.
_BAD, _UNKNOWN, _FULL = 4400, 4404, 4429
_OVER = 1001

SessionId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$", description="The id of a session.")]
PeerId = Annotated[str, Path(pattern=r"^[0-9a-f]{24}$")]
PushId = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$")]
Way = Annotated[Literal["whep", "whip"], Path()]
Scope = Literal["watch", "speak"]
Expires = Annotated[int | None, Query(ge=0, lt=2**53)]
Signature = Annotated[str | None, Query(max_length=64)]
_SETTINGS = SessionSettings.model_json_schema()
_FORM = form_body(
    {"video": file_field("A video or picture of the face."), "settings": _SETTINGS},
    or_json=_SETTINGS,
    required=["video"],
)
_OFFER = {"requestBody": {"required": True, "content": {_SDP: {"schema": {"type": "string"}}}}}


def add_live(app: FastAPI, service: Service, intake: Intake) -> Rooms:
    """Add the routes; the rooms returned are to be closed with the server."""
    rooms = Rooms(service.settings)
    _add_sessions(app, service, rooms, intake)
    _add_other_media(app, service, rooms)
    _add_webrtc(app, service, rooms)
    return rooms


# Sessions ----------------------------------------------------------------------------------------


def _add_sessions(app: FastAPI, service: Service, rooms: Rooms, intake: Intake) -> None:
    @app.post(SESSIONS, status_code=201, openapi_extra=_FORM)
    async def open_session(request: Request, who: Owner, response: Response) -> SessionOut:
        """Open a live session: an avatar or a camera as JSON, or a face as a form with `video` and `settings`."""
        if service.draining.is_set():
            raise Problem(
                503, "draining", "The service is being stopped. Try again in a moment.", headers={"Retry-After": "10"}
            )
        async with _asked_for(request, service, intake) as (wanted, upload):
            if wanted.model is not None:
                await run_in_threadpool(service.check_model, wanted.model)
            source, choice = upload, None
            if upload is None and wanted.avatar is not None:
                source, choice = await run_in_threadpool(service.avatars.source, wanted.avatar, who)
                if "face" in wanted.model_fields_set:
                    detail = "The face of an avatar was chosen when it was uploaded. Leave out face."
                    raise Problem(422, "usage", detail)
            if (source is None) != wanted.camera:
                detail = "Say whose face: exactly one of avatar, camera or an upload in the field video."
                raise Problem(422, "usage", detail)
            consent = wanted.consent or wanted.avatar is not None  # an avatar's was given with its upload
            if service.settings.serve_require_consent and not consent:
                detail = "Confirm that you have the right to use this face and voice: set consent to true."
                raise Problem(422, "consent", detail)
            await run_in_threadpool(service.examine, upload, None)
            room = await rooms.open(who, wanted, source, choice)
        service.place.audit.write("session", session=room.id, owner=who, avatar=wanted.avatar, consent=consent)
        response.headers["Location"] = f"{SESSIONS}/{room.id}"
        return _shown(room, request, service)

    @app.get(SESSIONS)
    async def sessions(request: Request, who: Owner) -> SessionsOut:
        """Your open sessions."""
        return SessionsOut(sessions=[_shown(room, request, service) for room in rooms.list(who)])

    @app.get("/api/v1/live/check")
    async def live_check(request: Request, who: Owner) -> ChecksOut:
        """Whether WebRTC can reach you from here, and what is wrong where it cannot."""
        client = request.client.host if request.client else "127.0.0.1"
        return ChecksOut(checks=await check(service.settings, rooms.network, client))

    @app.get(f"{SESSIONS}/{{session_id}}")
    async def session(session_id: SessionId, request: Request, who: Owner) -> SessionOut:
        """A session: its media addresses, its delay, and what is measured of it."""
        return _shown(rooms.get(session_id, who), request, service)

    @app.delete(f"{SESSIONS}/{{session_id}}", status_code=204)
    async def close_session(session_id: SessionId, who: Owner) -> None:
        """End a session."""
        await rooms.get(session_id, who).close()

    @app.post(f"{SESSIONS}/{{session_id}}/say", status_code=202)
    async def say(session_id: SessionId, said: SayIn, who: Owner) -> SaidOut:
        """Say a text: the first sentence is heard while the others are still being synthesised."""
        room = rooms.get(session_id, who)
        room.used()
        if len(said.text) > service.settings.serve_max_text_chars:
            detail = f"{service.settings.serve_max_text_chars} characters are allowed. Split the text."
            raise Problem(422, "text", detail)
        return SaidOut(utterance=await run_in_threadpool(_busy_told, _say, room.session, said))

    @app.post(f"{SESSIONS}/{{session_id}}/interrupt", status_code=204)
    async def interrupt(session_id: SessionId, who: Owner) -> None:
        """Fall silent at once."""
        room = rooms.get(session_id, who)
        room.used()
        room.session.interrupt()

    @app.put(f"{SESSIONS}/{{session_id}}/expression", status_code=204)
    async def expression(session_id: SessionId, wanted: ExpressionIn, who: Owner) -> None:
        """Change what the face expresses, while it speaks too."""
        room = rooms.get(session_id, who)
        room.used()
        room.session.set_expression(wanted.expression)


def _say(session: LiveSession, said: SayIn) -> int:
    return session.say(said.text, interrupt=said.interrupt)


def _busy_told(work: Callable[..., int], *arguments: Any) -> int:
    try:
        return work(*arguments)
    except BusyError as error:
        raise Problem(503, "busy", str(error), headers={"Retry-After": "5"}) from error


@asynccontextmanager
async def _asked_for(
    request: Request, service: Service, intake: Intake
) -> AsyncIterator[tuple[SessionSettings, FilePath | None]]:
    """What a request to open a session says, and the face that it brings, kept until the end of the context."""
    with service.scratch() as folder:
        upload: FilePath | None = None
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            form = await intake.receive(request, folder, {"settings": 1 << 16}, ("video",))
            upload, document = form.files.get("video"), (form.fields.get("settings") or "{}").encode()
        else:
            document = await request.body()
        try:
            wanted = SessionSettings.model_validate_json(document or b"{}")
        except ValidationError as error:
            raise of_validation(error, "settings") from error
        if upload is not None and (wanted.avatar or wanted.camera):
            raise Problem(
                422, "usage", "Say whose face: exactly one of avatar, camera or an upload in the field video."
            )
        yield wanted, upload


def _shown(room: Room, request: HTTPConnection, service: Service) -> SessionOut:
    base = f"{SESSIONS}/{room.id}"
    public = (service.settings.serve_public_url or str(request.base_url)).rstrip("/")
    sockets = "ws" + public.removeprefix("http")
    watch, expires_s = service.links.sign(f"{base}/watch")
    speak, _ = service.links.sign(f"{base}/speak")
    session, terms = room.session, room.terms
    facts = session.facts()
    delay = facts["delay_ms"]
    return SessionOut(
        id=room.id,
        created=datetime.fromtimestamp(room.created_s, UTC),
        avatar=terms.avatar,
        camera=terms.camera,
        model=terms.model,
        voice=terms.voice,
        size_px=session.size_px,
        fps=float(session.rate),
        delay=DelayOut(total_ms=delay["play_out"], look_ahead_ms=delay["look_ahead"], work_ms=delay["work"]),
        media=MediaOut(
            whep=f"{public}{base}/whep?{watch}",
            whip=f"{public}{base}/whip?{speak}",
            websocket=f"{sockets}{base}/watch?{watch}",
            audio=f"{sockets}{base}/audio?{speak}",
            hls=f"{public}{base}/hls/index.m3u8?{watch}",
            expires=datetime.fromtimestamp(expires_s, UTC),
            ice_servers=room.network.ice_servers(),
        ),
        pushes=[_push_shown(name, push) for name, push in room.pushes.items()],
        facts=facts | room.facts(),
    )


def _push_shown(name: str, push: Push) -> PushOut:
    return PushOut(id=name, url=push.shown_url, state=push.state, error=push.error)


def _room(connection: HTTPConnection, service: Service, rooms: Rooms, session_id: str, scope: Scope) -> Room:
    """The session, for whoever brings its signed address or the key of its owner.

    Raises:
        Problem: neither, or there is none.
    """
    query = connection.query_params
    if "signature" not in query:
        return rooms.get(session_id, owner_of(cast(Request, connection)))
    expires = query.get("expires", "")
    expires_s = int(expires) if expires.isdecimal() and len(expires) < 16 else 0
    if not service.links.holds(f"{SESSIONS}/{session_id}/{scope}", expires_s, query["signature"]):
        raise Problem(403, "link_invalid", "This address was not made here, or was changed. Get it from the session.")
    if time.time() >= expires_s:
        raise Problem(403, "link_expired", "This address has expired. Get a new one from the session.")
    return rooms.get(session_id, None)


# WebRTC ------------------------------------------------------------------------------------------


def _add_webrtc(app: FastAPI, service: Service, rooms: Rooms) -> None:
    async def agreed(request: Request, session_id: str, way: Literal["whep", "whip"]) -> Response:
        room = _room(request, service, rooms, session_id, "watch" if way == "whep" else "speak")
        if request.headers.get("content-type", "").partition(";")[0].strip() != _SDP:
            raise Problem(415, "sdp", f"Send an SDP offer as {_SDP}.")
        offer = (await request.body())[:_SDP_BYTES].decode("utf-8", "replace")
        loopback = request.client is not None and is_loopback(request.client.host)
        room.used()
        name, answer = await (room.play if way == "whep" else room.bring)(offer, loopback=loopback)
        query = f"?{request.url.query}" if request.url.query else ""
        response = Response(answer, 201, media_type=_SDP)
        response.headers["Location"] = f"{SESSIONS}/{session_id}/{way}/{name}{query}"
        response.headers["Accept-Patch"] = "application/trickle-ice-sdpfrag"
        for link in rooms.network.links():
            response.headers.append("Link", link)
        return response

    @app.post(f"{SESSIONS}/{{session_id}}/whep", status_code=201, response_class=Response, openapi_extra=_OFFER)
    async def whep(
        session_id: SessionId, request: Request, expires: Expires = None, signature: Signature = None
    ) -> Response:
        """Watch by WebRTC (draft-ietf-wish-whep): an SDP offer in, the answer out, the connection's address in Location."""
        return await agreed(request, session_id, "whep")

    @app.post(f"{SESSIONS}/{{session_id}}/whip", status_code=201, response_class=Response, openapi_extra=_OFFER)
    async def whip(
        session_id: SessionId, request: Request, expires: Expires = None, signature: Signature = None
    ) -> Response:
        """Send a camera, a microphone or both by WebRTC (RFC 9725): an SDP offer in, the answer out."""
        return await agreed(request, session_id, "whip")

    def scope(way: str) -> Scope:
        return "watch" if way == "whep" else "speak"

    @app.get(f"{SESSIONS}/{{session_id}}/{{way}}/{{peer}}")
    async def connection(session_id: SessionId, way: Way, peer: PeerId, request: Request) -> dict[str, str]:
        """How far a connection has come, and what to do if it goes no further."""
        found = _room(request, service, rooms, session_id, scope(way)).peer(peer)
        return {"state": found.state, "detail": found.advice()}

    @app.patch(f"{SESSIONS}/{{session_id}}/{{way}}/{{peer}}", status_code=204)
    async def trickle(session_id: SessionId, way: Way, peer: PeerId, request: Request) -> None:
        """More candidates, as an SDP fragment (RFC 8840)."""
        found = _room(request, service, rooms, session_id, scope(way)).peer(peer)
        await found.trickle((await request.body())[:_SDP_BYTES].decode("utf-8", "replace"))

    @app.delete(f"{SESSIONS}/{{session_id}}/{{way}}/{{peer}}")
    async def hang_up(session_id: SessionId, way: Way, peer: PeerId, request: Request) -> Response:
        """End a connection."""
        await _room(request, service, rooms, session_id, scope(way)).peer(peer).close()
        return Response(status_code=200)


# HLS, RTMP, WebSockets ---------------------------------------------------------------------------


def _add_other_media(app: FastAPI, service: Service, rooms: Rooms) -> None:
    @app.get(f"{SESSIONS}/{{session_id}}/hls/{{name}}", response_class=Response)
    async def hls(
        session_id: SessionId,
        name: Annotated[str, Path(pattern=r"^[a-z0-9-]{1,40}\.(m3u8|m4s|mp4)$")],
        request: Request,
        expires: Expires = None,
        signature: Signature = None,
    ) -> Response:
        """Playlists and segments (RFC 8216)."""
        room = _room(request, service, rooms, session_id, "watch")
        data, kind = await room.hls(name, request.url.query)
        cache = "no-store" if kind.endswith("mpegurl") else "private, max-age=60"
        return Response(data, media_type=kind, headers={"Cache-Control": cache})

    @app.post(f"{SESSIONS}/{{session_id}}/pushes", status_code=201)
    async def push(session_id: SessionId, wanted: PushIn, who: Owner) -> PushOut:
        """Send the session to a streaming platform by RTMP. Its state is told with the session."""
        allowed = {part.strip() for part in service.settings.live_push_hosts.split(",") if part.strip()}
        host = urlsplit(wanted.url).hostname or ""
        if "*" not in allowed and host not in allowed:
            detail = f"Streams may not be pushed to {host!r} from here. Name it in live_push_hosts."
            raise Problem(403, "push_host", detail)
        room = rooms.get(session_id, who)
        name, made = await room.push(wanted.url)
        service.place.audit.write("push", session=room.id, owner=who, url=made.shown_url)
        return _push_shown(name, made)

    @app.delete(f"{SESSIONS}/{{session_id}}/pushes/{{push_id}}", status_code=204)
    async def unpush(session_id: SessionId, push_id: PushId, who: Owner) -> None:
        """End a push."""
        await rooms.get(session_id, who).unpush(push_id)

    @app.websocket(f"{SESSIONS}/{{session_id}}/watch")
    async def watch(socket: WebSocket, session_id: str) -> None:
        """A text message with the tracks, then binary ones: a byte with the track's number and a piece of its MP4."""
        async with _opened(socket, service, rooms, session_id, "watch") as room:
            if room is not None:
                await _watched(socket, room)

    @app.websocket(f"{SESSIONS}/{{session_id}}/audio")
    async def audio(socket: WebSocket, session_id: str) -> None:
        """Binary messages of PCM16 (little-endian, mono, `rate` in the query), text messages {"type": "end"} or
        {"type": "interrupt"}."""
        async with _opened(socket, service, rooms, session_id, "speak") as room:
            if room is not None:
                await _listened(socket, room)


@asynccontextmanager
async def _opened(
    socket: WebSocket, service: Service, rooms: Rooms, session_id: str, scope: Scope
) -> AsyncIterator[Room | None]:
    """Accept a WebSocket and count it. None: it was refused, and closed with a code and the reason."""
    await socket.accept()
    try:
        room = _room(socket, service, rooms, session_id, scope)
    except Problem as problem:
        await _hang_up(socket, 4000 + problem.status, problem.detail)
        yield None
        return
    room.sockets += 1
    try:
        yield room
    finally:
        room.sockets -= 1
        room.used()


async def _hang_up(socket: WebSocket, code: int, reason: str) -> None:
    with suppress(RuntimeError, WebSocketDisconnect):  # it has gone already
        await socket.close(code, reason.encode()[:123].decode("utf-8", "ignore"))


async def _watched(socket: WebSocket, room: Room) -> None:
    try:
        view = room.fanout.view(Kind.VIDEO, Kind.AAC)
    except Ended:
        await _hang_up(socket, _OVER, ended().detail)
        return
    with view:
        sending = asyncio.ensure_future(_sent(socket, view, room))
        going = asyncio.ensure_future(_gone(socket))
        done, _ = await asyncio.wait((sending, going), return_when=asyncio.FIRST_COMPLETED)
        for task in (sending, going):
            task.cancel()
        await asyncio.gather(sending, going, return_exceptions=True)
        if sending in done and isinstance(sending.exception(), Ended):
            await _hang_up(socket, _OVER, ended().detail)


async def _sent(socket: WebSocket, view: View, room: Room) -> None:
    tracks: dict[Kind, Track] = {}
    counts = {Kind.VIDEO: 0, Kind.AAC: 0}
    numbers = {Kind.VIDEO: b"\0", Kind.AAC: b"\1"}
    while True:
        packet = await view.get()
        async with asyncio.timeout(_SEND_S):
            if not tracks:  # a view begins with a key picture
                tracks = {Kind.VIDEO: video_track(packet.data, *room.session.size_px), Kind.AAC: sound_track()}
                told = [{"track": numbers[kind][0], "mime": track.mime} for kind, track in tracks.items()]
                await socket.send_text(json.dumps({"tracks": told}))
                for kind, track in tracks.items():
                    await socket.send_bytes(numbers[kind] + track.head)
            counts[packet.kind] += 1
            await socket.send_bytes(numbers[packet.kind] + fragment(packet, counts[packet.kind]))


async def _gone(socket: WebSocket) -> None:
    while (await socket.receive())["type"] != "websocket.disconnect":
        continue


async def _listened(socket: WebSocket, room: Room) -> None:
    rate = socket.query_params.get("rate", "16000")
    if not (rate.isdecimal() and len(rate) < 7 and _RATES_HZ[0] <= int(rate) <= _RATES_HZ[1]):
        await _hang_up(socket, _BAD, "rate is the samples a second, from 8000 to 96000.")
        return
    sound = room.session.stream(int(rate))
    telling = asyncio.ensure_future(_told(socket, room))
    try:
        while True:
            message = await socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            room.used()
            if (pcm := message.get("bytes")) is not None:
                if pcm:
                    sound.push(pcm)
            else:
                _command(room.session, sound, message.get("text") or "")
    except BusyError as error:
        await _hang_up(socket, _FULL, str(error))
    except (ValueError, BeaverVisionError) as error:
        await _hang_up(socket, _BAD, str(error))
    finally:
        telling.cancel()
        sound.end()  # what was begun is said to its end: the sound of a connection that breaks is complete as far as it came


async def _told(socket: WebSocket, room: Room) -> None:
    """What becomes of utterances, as they begin and end; and the end of the session."""
    with room.events() as events, suppress(RuntimeError, WebSocketDisconnect):
        try:
            while True:
                await socket.send_text(json.dumps(await events.get()))
        except Ended:
            await _hang_up(socket, _OVER, ended().detail)


def _command(session: LiveSession, sound: SoundStream, text: str) -> None:
    """Raises ValueError for what is no command."""
    try:
        kind = json.loads(text)["type"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            'Send sound as binary messages, or {"type": "end"} or {"type": "interrupt"} as text.'
        ) from error
    if kind == "interrupt":
        session.interrupt()
    if kind in ("end", "interrupt"):
        sound.end()
    else:
        raise ValueError('There are the commands {"type": "end"} and {"type": "interrupt"}.')
