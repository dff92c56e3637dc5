"""A function in a fresh process, so that its memory and CPU time are its own.

The child gets its arguments on standard input and answers in JSON lines on standard output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

from beavervision import errors
from beavervision.errors import BeaverVisionError

Progress = Callable[[int, int | None], None]
_CHILD = "from beavervision.evaluate.alone import child; child()"


def call_alone(
    function: Callable[..., dict[str, Any]], options: Mapping[str, Any], on_progress: Progress | None = None
) -> dict[str, Any]:
    """``function(**options, on_progress=...)`` in a process of its own, ended with this call however it ends.

    `function` must be found in its module by its name; options and result go through JSON.

    Raises:
        BeaverVisionError: what the function raised, by its class; or the process died.
    """
    job = {"module": function.__module__, "name": function.__qualname__, "options": dict(options)}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as said,
        subprocess.Popen(
            [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it died at once: said below
                process.stdin.write(json.dumps(job))
                process.stdin.close()
            for line in process.stdout:
                message = json.loads(line)
                if "result" in message:
                    result: dict[str, Any] = message["result"]
                    return result
                if "error" in message:
                    raise getattr(errors, message["error"], BeaverVisionError)(message["text"])
                if on_progress is not None:
                    on_progress(message["done"], message["total"])
            code = process.wait()
        finally:
            process.kill()
        said.seek(0)
        last = (said.read().strip().splitlines() or ["it said nothing"])[-1]
    raise BeaverVisionError(f"The measured process ended with {code}: {last}. Run it again with memory to spare.")


def child() -> None:
    """The other side of :func:`call_alone`."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # whatever prints must not come between the answers

        def answer(**message: Any) -> None:
            print(json.dumps(message), file=answers, flush=True)

        def on_progress(done: int, total: int | None) -> None:
            answer(done=done, total=total)

        job = json.load(sys.stdin)
        try:
            function = getattr(import_module(job["module"]), job["name"])
            answer(result=function(**job["options"], on_progress=on_progress))
        except BeaverVisionError as error:
            answer(error=type(error).__name__, text=str(error))
