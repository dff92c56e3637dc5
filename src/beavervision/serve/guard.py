"""A look at hostile media, in a child process with limits on its memory, its time and what it may write.

What kills the child, kills nothing else. Loading the media libraries takes half a second, so that a process of its own
does it once (``python -m beavervision.serve.guard``) and forks a child for every look, one ahead: it waits for its task.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from beavervision.errors import BeaverVisionError, InputError, MediaError, NoAudioError

_MEMORY_BYTES = 3 << 30  # of address space: the libraries take a good half of a GiB of it
_CPU_S = 20
_WALL_S = 40
_STARTING_S = 60  # more, for a machine that is busy while the libraries are loaded
_PAUSE_S = 0.1  # before a child is forked in the place of one that died without a task
_UNPACKED_BYTES, _UNPACKED_TIMES = 48 << 20, 250  # a larger picture that is packed so densely is there to harm
_BLOCK_BYTES = 1 << 16  # a task, and an answer, at most
_COMMAND = [sys.executable, "-B", "-m", "beavervision.serve.guard"]
_KINDS: dict[str, type[InputError]] = {"media": MediaError, "no_audio": NoAudioError}


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest side of a picture, and the longest video or sound."""

    side_px: int
    seconds: float


class Guard:
    """The process that forks, started at the first look and again when it died. Safe from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(self) -> None:
        """Load the libraries now rather than at the first look; returns at once.

        Raises:
            OSError: no process can be started.
        """
        with self._lock:
            self._running()

    def close(self) -> None:
        with self._lock:
            if self._control is not None:
                self._control.close()  # that is what it ends by
                self._control = None
            if self._process is not None:
                self._process.kill()  # its children have an end of their own
                self._process.wait()
                self._process = None

    def examine(self, video: Path | None, audio: Path | None, limits: Limits) -> None:
        """Open both as the pipeline will, and decode the first picture and the first sound.

        Raises:
            MediaError, NoAudioError: it cannot be used, or not within the limits. Messages do not tell the paths.
        """
        task = {
            "video": None if video is None else str(video),
            "audio": None if audio is None else str(audio),
            "side_px": limits.side_px,
            "seconds": limits.seconds,
        }
        line = json.dumps(task).encode()
        try:
            told = b""
            with suppress(OSError):  # the forking process itself may have been killed
                told = self._asked(line)
            answer = json.loads(told or self._asked(line))
        except (OSError, ValueError) as error:
            raise MediaError(
                "The material cannot be examined within the limits of memory and time. Convert it to a plain MP4, PNG or WAV."
            ) from error
        if answer["code"]:
            message = str(answer["message"])
            for path, name in ((video, "The video"), (audio, "The audio")):
                message = message if path is None else message.replace(str(path), name)
            raise _KINDS.get(answer["code"], InputError)(message)

    def _asked(self, task: bytes) -> bytes:
        """What a child says to a task: nothing if it died."""
        mine, childs = socket.socketpair()
        with mine:
            with childs, self._lock:
                socket.send_fds(self._running(), [b"x"], [childs.fileno()])
            mine.settimeout(_WALL_S + _STARTING_S)
            mine.sendall(task)
            mine.shutdown(socket.SHUT_WR)
            return _read(mine)

    def _running(self) -> socket.socket:
        if self._control is None or self._process is None or self._process.poll() is not None:
            if self._control is not None:
                self._control.close()
            mine, its = socket.socketpair()
            with its:
                self._process = subprocess.Popen(_COMMAND, stdin=its.fileno(), stdout=subprocess.DEVNULL)
            self._control = mine
        return self._control


def _read(connection: socket.socket) -> bytes:
    """Everything up to the end."""
    told = b""
    while len(told) < _BLOCK_BYTES and (block := connection.recv(_BLOCK_BYTES)):
        told += block
    return told


def _look(task: dict[str, Any]) -> None:
    from beavervision.stages.decode import Decode, audio_info, length, probe

    side_px, longest_s = int(task["side_px"]), float(task["seconds"])
    if task["video"] is not None:
        info = probe(task["video"])
        width, height = info.coded_width_px, info.coded_height_px
        if max(width, height) > side_px:
            raise MediaError(f"The video has {width}x{height} pixels; a side may have {side_px}. Scale it down first.")
        unpacked, packed = width * height * 3, Path(task["video"]).stat().st_size
        if info.kind == "still" and unpacked > max(_UNPACKED_BYTES, packed * _UNPACKED_TIMES):
            raise MediaError(
                f"The video is a picture that unpacks to {unpacked // packed} times its size. Scale it down first."
            )
        if info.duration is not None and info.kind == "video" and info.duration > longest_s:
            raise MediaError(
                f"The video is {float(info.duration):.0f} s long; {longest_s:g} s are allowed. Cut it first."
            )
        if info.kind == "video":  # of a still `probe` has decoded everything
            next(iter(Decode(1, extend="none")(info)), None)
    if task["audio"] is not None:
        sound = audio_info(task["audio"])
        duration = sound.duration or length(task["audio"])
        if duration is not None and duration > longest_s:
            raise MediaError(f"The audio is {float(duration):.0f} s long; {longest_s:g} s are allowed. Cut it first.")


def limit(memory_bytes: int, cpu_s: int | None = None) -> None:
    """Hold this process to so much address space and CPU time, and let it write no file."""
    try:
        import resource  # not on every system
    except ImportError:
        return
    limits = [(resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)]
    if cpu_s is not None:
        limits.append((resource.RLIMIT_CPU, cpu_s))
    for what, value in limits:
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def _answer(connection: socket.socket) -> None:
    """In the child: one task, looked at."""
    answer = {"code": "", "message": ""}
    try:
        _look(json.loads(_read(connection)))
    except BeaverVisionError as error:
        answer = {"code": error.code, "message": str(error)[:2000]}
    except MemoryError:
        answer = {"code": "media", "message": "The material needs too much memory. Scale it down first."}
    connection.sendall(json.dumps(answer).encode())


def _child(control: socket.socket, taken: int) -> NoReturn:
    """Wait for a task or the end of the server, say which through `taken`, look, and end."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the libraries say of bad media
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        limit(_MEMORY_BYTES, _CPU_S)
        byte, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        os.close(control.detach())
        os.write(taken, b"task" if byte else b"over")
        os.close(taken)
        if byte:
            signal.alarm(_WALL_S)  # nobody catches it: it ends the process
            with socket.socket(fileno=descriptors[0]) as connection:
                _answer(connection)
    finally:
        os._exit(0)


def _main() -> None:
    """Fork a child for every socket that comes, until the server goes away."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's whole group
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    # One thread: a child forked from a process with more may wait for ever for a lock that another held.
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    import cv2

    from beavervision.evaluate.samples import portrait

    cv2.setNumThreads(1)
    with portrait() as sample:  # what the libraries do once they do now, and not in each child
        _look({"video": str(sample), "audio": None, "side_px": 1 << 20, "seconds": 1e9})
    with socket.socket(fileno=0) as control:
        news = b""
        while news != b"over":
            told, taken = os.pipe()
            if os.fork() == 0:
                _child(control, taken)
            os.close(taken)
            news = os.read(told, 4)
            os.close(told)
            if not news:  # it was killed while it waited: the next one has its place, though not at full speed for ever
                time.sleep(_PAUSE_S)


if __name__ == "__main__":
    _main()
