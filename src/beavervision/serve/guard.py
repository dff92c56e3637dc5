"""A look at hostile media, in a child process with limits on its memory, its CPU time and what it may write.

The child runs ``python -m beavervision.serve.guard``; what kills it, kills nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beavervision.errors import BeaverVisionError, InputError, MediaError, NoAudioError

_MEMORY_BYTES = 3 << 30  # of address space: the libraries take a good half of a GiB of it
_CPU_S = 20
_WALL_S = 40
_RATE = 240  # pictures a second
_ANSWER_BYTES = 1 << 16
_KINDS: dict[str, type[InputError]] = {"media": MediaError, "no_audio": NoAudioError}


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest side of a picture, and the longest video or sound."""

    side_px: int
    seconds: float


def examine(video: Path | None, audio: Path | None, limits: Limits) -> None:
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
    try:
        done = subprocess.run(
            [sys.executable, "-B", "-m", "beavervision.serve.guard"],
            input=json.dumps(task).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_WALL_S,
            check=False,
        )
        answer = json.loads(done.stdout[:_ANSWER_BYTES])
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise MediaError(
            "The material cannot be examined within the limits of memory and time. Convert it to a plain MP4, PNG or WAV."
        ) from error
    if answer["code"]:
        message = str(answer["message"])
        for path, name in ((video, "The video"), (audio, "The audio")):
            message = message if path is None else message.replace(str(path), name)
        raise _KINDS.get(answer["code"], InputError)(message)


def _look(task: dict[str, Any]) -> None:
    from beavervision.stages.decode import Decode, audio_info, probe

    side_px, longest_s = int(task["side_px"]), float(task["seconds"])
    if task["video"] is not None:
        info = probe(task["video"])
        width, height = info.coded_width_px, info.coded_height_px
        if max(width, height) > side_px:
            raise MediaError(f"The video has {width}x{height} pixels; a side may have {side_px}. Scale it down first.")
        if info.duration is not None and info.kind == "video" and info.duration > longest_s:
            raise MediaError(
                f"The video is {float(info.duration):.0f} s long; {longest_s:g} s are allowed. Cut it first."
            )
        if info.rate > _RATE:
            raise MediaError(
                f"The video has {float(info.rate):.0f} pictures a second; {_RATE} are allowed. Convert it."
            )
        next(iter(Decode(1, extend="none")(info)), None)
    if task["audio"] is not None:
        sound = audio_info(task["audio"])
        if sound.duration is not None and sound.duration > longest_s:
            raise MediaError(
                f"The audio is {float(sound.duration):.0f} s long; {longest_s:g} s are allowed. Cut it first."
            )


def _limit() -> None:
    try:
        import resource  # not on every system
    except ImportError:
        return
    for what, value in (
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_CPU, _CPU_S),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def _main() -> None:
    _limit()
    answer = {"code": "", "message": ""}
    try:
        _look(json.load(sys.stdin))
    except BeaverVisionError as error:
        answer = {"code": error.code, "message": str(error)[:2000]}
    except MemoryError:
        answer = {"code": "media", "message": "The material needs too much memory. Scale it down first."}
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _main()
