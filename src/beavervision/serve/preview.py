"""An expression on a face before anything is made of it: a picture in, the same picture with the expression out.

A process of its own does it (``python -m beavervision.serve.preview``), one picture at a time, with limits on its memory and
its time and nothing that it may write: what kills it, kills nothing else. It is started at the first preview, remembers the last
face, and ends when nobody has asked for a while.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from beavervision.errors import BeaverVisionError, InputError, MediaError, ModelError, NoFaceError
from beavervision.media import F32
from beavervision.serve.guard import limit
from beavervision.serve.problems import Problem

if TYPE_CHECKING:
    from beavervision.media import Face, Picture

View = Literal["picture", "face"]

_MEMORY_BYTES = 3 << 30  # of address space
_WALL_S = 10
_STARTING_S = 60  # more, for a machine that is busy while the networks are loaded
_QUEUE_S = 10  # how long a preview waits for those before it
_IDLE_S = 120
_SIDE_PX = 1280  # of the picture that comes
_MARGIN = 0.18  # of the face's height, around it
_QUALITY = 88
_LINE_BYTES = 1 << 16
_COMMAND = [sys.executable, "-B", "-m", "beavervision.serve.preview"]
_KINDS: dict[str, type[BeaverVisionError]] = {"media": MediaError, "no_face": NoFaceError, "model": ModelError}


class Previewer:
    """The process that draws. Safe from many threads; they wait for one another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None

    def close(self) -> None:
        process = self._process
        if process is not None:
            process.kill()  # whoever waits for it gets an error, and the lock is free
        with self._lock:
            self._end()

    def show(self, path: Path, digest: str, face: str, look: F32, view: View, side_px: int) -> bytes:
        """A JPEG of the picture at `path` with the look (58,) on its face.

        Args:
            digest: of the file's content; the same one twice is looked at once.
            face: which face, as in jobs.
            view: the whole picture, or a square around the face.
            side_px: the longest side of what comes out, at most.

        Raises:
            MediaError, NoFaceError: there is no picture, no face, or not within the limits.
            Problem: too many wait (503).
        """
        wanted = {"path": str(path), "digest": digest, "face": face, "view": view, "side_px": side_px}
        task = json.dumps(wanted | {"look": [round(float(v), 5) for v in look]}).encode() + b"\n"
        if not self._lock.acquire(timeout=_QUEUE_S):
            raise Problem(
                503, "busy", "Too many previews at once. Try again in a moment.", headers={"Retry-After": "2"}
            )
        try:
            answer, data = self._answer(task)
        finally:
            self._lock.release()
        if answer["code"]:
            raise _KINDS.get(answer["code"], InputError)(str(answer["message"]).replace(str(path), "The picture"))
        return data

    def _answer(self, task: bytes) -> tuple[dict[str, Any], bytes]:
        for _ in range(2):
            fresh = self._process is None or self._process.poll() is not None
            try:
                return self._asked(task, fresh)
            except (OSError, ValueError):
                self._end()
                if fresh:  # an older one may just have ended for want of work
                    break
        raise MediaError(
            "The picture cannot be previewed within the limits of memory and time. Use a smaller JPEG or PNG."
        )

    def _asked(self, task: bytes, fresh: bool) -> tuple[dict[str, Any], bytes]:
        if fresh:
            self._begin()
        line = self._line
        assert line is not None
        line.settimeout(_WALL_S + (_STARTING_S if fresh else 0))
        line.sendall(task)
        with line.makefile("rb") as told:
            answer = json.loads(told.readline(_LINE_BYTES))
            data = told.read(int(answer["bytes"]))
        if len(data) != answer["bytes"]:
            raise ValueError("cut short")
        return answer, data

    def _begin(self) -> None:
        self._end()
        mine, its = socket.socketpair()
        with its:
            self._process = subprocess.Popen(
                _COMMAND, stdin=its.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
        self._line = mine

    def _end(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


# The process -------------------------------------------------------------------------------------


class _Artist:
    """Draws; remembers the last picture and the face in it."""

    def __init__(self) -> None:
        from beavervision.models.face import FaceNets

        self._nets = FaceNets()
        self._known: tuple[str, str] | None = None
        self._seen: tuple[Picture, Face] | None = None

    def draw(self, task: dict[str, Any]) -> bytes:
        import cv2
        import numpy as np

        from beavervision.media import BLENDSHAPES, Region
        from beavervision.models.expression import load_basis
        from beavervision.stages.express import STILL, expressed

        picture, face = self._face(task)
        look = np.array(task["look"], np.float32)
        head = STILL + look[BLENDSHAPES:]
        made = expressed(picture, face.points_px, look[:BLENDSHAPES], head, load_basis())
        region = None
        if task["view"] == "face":
            points = face.points_px[:, :2]
            middle = (points.min(axis=0) + points.max(axis=0)) / 2
            half = float(np.ptp(points, axis=0).max()) * (0.5 + _MARGIN)
            half = min(half, picture.width_px / 2, picture.height_px / 2)
            middle = np.clip(middle, half, np.array([picture.width_px, picture.height_px]) - half)
            square = np.array([middle - half, middle + half], np.float32)
            region = Region.around(square, 0, picture.width_px, picture.height_px)
        rgb = made.rgb(region)
        scale = min(1.0, task["side_px"] / max(rgb.shape[:2]))
        rgb = np.asarray(cv2.resize(rgb, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))
        ok, data = cv2.imencode(".jpg", rgb[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
        assert ok
        return data.tobytes()

    def _face(self, task: dict[str, Any]) -> tuple[Picture, Face]:
        from beavervision.stages.decode import Decode, probe
        from beavervision.stages.detect import FaceChoice, survey

        key = (task["digest"], task["face"])
        if self._known != key or self._seen is None:
            info = probe(task["path"])
            if max(info.coded_width_px, info.coded_height_px) > _SIDE_PX:
                raise MediaError(f"A side of the picture may have {_SIDE_PX} pixels here. Scale it down first.")
            picture = next(iter(Decode(1, extend="none")(info))).frames.pictures[0]
            seen = survey([picture], self._nets, FaceChoice.parse(task["face"]))
            if not seen.references:
                raise NoFaceError(
                    "No face was found. Use a picture that shows a face from the front, at least 30 pixels wide"
                    + (", or another face." if seen.faces_seen else ".")
                )
            self._known, self._seen = key, (picture, seen.references[0].face)
        return self._seen


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal's whole group
    import cv2

    cv2.setNumThreads(1)
    limit(_MEMORY_BYTES)
    artist = _Artist()
    with socket.socket(fileno=0) as line, suppress(OSError):  # the server is gone, or nobody asks any more
        line.settimeout(_IDLE_S)
        with line.makefile("rb") as tasks:
            while task := tasks.readline(_LINE_BYTES):
                answer, data = {"code": "", "message": ""}, b""
                try:
                    data = artist.draw(json.loads(task))
                except BeaverVisionError as error:
                    answer = {"code": error.code, "message": str(error)[:2000]}
                except MemoryError:
                    answer = {"code": "media", "message": "The picture needs too much memory. Scale it down first."}
                line.sendall(json.dumps(answer | {"bytes": len(data)}).encode() + b"\n" + data)


if __name__ == "__main__":
    _main()
