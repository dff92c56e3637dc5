"""The server process: the API on a socket, the workers beside it, and an orderly end."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from beavervision.errors import UsageError
from beavervision.serve.app import create_app
from beavervision.serve.service import Service
from beavervision.serve.telemetry import set_up_logs
from beavervision.settings import Settings

if TYPE_CHECKING:
    from beavervision.serve.live import Rooms

_CLOSING_S = 3  # for answers on their way when the server ends
_BACKLOG = 128
_WS_BYTES = 1 << 20  # of one message


def serve(settings: Settings) -> None:
    """Serve until SIGTERM or Ctrl-C: then no job is taken any more, running ones may end for `serve_drain_s`, and what
    does not end goes back to the queue for the next start. A second signal ends it at once.

    Raises:
        UsageError: the address or the folder is in use, or other machines could reach it without keys.
        OutputError: the folder cannot be written.
    """
    set_up_logs(settings, "server")
    service = Service(settings)
    try:
        with _only_one(settings), _listening(settings) as listener:
            service.start()
            app = create_app(service)
            config = uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                http="h11",
                ws="none" if app.state.rooms is None else "websockets-sansio",
                ws_max_size=_WS_BYTES,
                ws_per_message_deflate=False,
                lifespan="off",
                loop="asyncio",
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=_CLOSING_S,
            )
            _Server(config, service, settings.serve_drain_s, app.state.rooms).run(sockets=[listener])
    finally:
        service.close()


@contextmanager
def _only_one(settings: Settings) -> Iterator[None]:
    """One server to a folder: each cleans up in it."""
    with (settings.serve_folder / "lock").open("w") as lock:
        with suppress(ImportError):
            import fcntl  # not on every system

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UsageError(
                    f"{settings.serve_folder} is served already. Stop that server, or set BEAVERVISION_SERVE_FOLDER."
                ) from error
        yield


@contextmanager
def _listening(settings: Settings) -> Iterator[socket.socket]:
    host, port = settings.serve_host, settings.serve_port
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise UsageError(
            f"{host}:{port} cannot be listened on: {error.strerror}. Choose another --port or --host."
        ) from error
    with listener:
        shown = f"[{host}]" if family == socket.AF_INET6 else host
        print(f"Serving on http://{shown}:{listener.getsockname()[1]} (stop with Ctrl-C)", flush=True)
        yield listener


class _Server(uvicorn.Server):
    """Drains before it ends: it goes on answering while running jobs end."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float, rooms: Rooms | None) -> None:
        super().__init__(config)
        self._service, self._drain_s, self._rooms = service, drain_s, rooms
        self._asked = False
        self._until_s: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # Not the base class's: that would end the process by the signal in the end.
        if self._asked:
            self.should_exit = True
        self._asked = True

    async def on_tick(self, counter: int) -> bool:
        if self._asked and self._until_s is None:
            self._until_s = time.monotonic() + self._drain_s
            await asyncio.to_thread(self._service.drain)
        if self._until_s is not None and (self._service.supervisor.idle or time.monotonic() > self._until_s):
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._rooms is not None:
            await self._rooms.close()
        await super().shutdown(sockets)
