"""What works on this machine and what does not: the rows of ``beavervision doctor``.

A row is `limited` where something optional is missing and `broken` where the main job cannot be done; both say what to do.
Everything is imported where it is tried, so that a broken package becomes a row.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

from beavervision.errors import BeaverVisionError, NoFaceError
from beavervision.evaluate.samples import portrait
from beavervision.settings import Settings

State = Literal["ok", "limited", "broken"]

# what pip calls a required package -> what Python does
PACKAGES = {
    "ai-edge-litert": "ai_edge_litert.interpreter",
    "av": "av",
    "hibari-tts": "hibari",
    "numpy": "numpy",
    "onnxruntime": "onnxruntime",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "prometheus-client": "prometheus_client",
    "rich": "rich",
    "typer": "typer",
}
_CODECS = {"libx264": "mp4, mov and mkv", "aac": "mp4, mov and mkv", "libvpx-vp9": "webm", "libopus": "webm"}
_REINSTALL = "Reinstall: pip install --force-reinstall beavervision"
_MIN_MEMORY_BYTES = 2 << 30
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Check:
    """One row: what was looked at, its state, what was found, and what to do if that is not well."""

    name: str
    state: State
    detail: str
    remedy: str = ""


def checkup(settings: Settings) -> Iterator[Check]:
    """All rows, each as soon as it is known. Takes a few seconds; needs no network and leaves nothing behind."""
    for name, look in _LOOKS.items():
        try:
            yield from look(settings)
        except BeaverVisionError as error:
            yield Check(name, "broken", str(error))
        except Exception as error:  # whatever a broken installation raises is the finding
            yield Check(name, "broken", f"{type(error).__name__}: {error}", _REINSTALL)


def _python(settings: Settings) -> Iterator[Check]:
    bits = "" if sys.maxsize > 2**32 else ", 32 bits"
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}{bits}"
    yield Check("python", "broken" if bits else "ok", found, "Use a 64-bit Python 3.11 or newer." if bits else "")


def _packages(settings: Settings) -> Iterator[Check]:
    good = []
    for package, module in PACKAGES.items():
        try:
            import_module(module)
            good.append(f"{package} {metadata.version(package)}")
        except (ImportError, OSError) as error:
            yield Check("packages", "broken", f"{package}: {error}", f"Install it: pip install {package}")
    yield Check("packages", "ok", ", ".join(good))


def _codecs(settings: Settings) -> Iterator[Check]:
    from av.codec import Codec
    from av.error import FFmpegError

    lacking = []
    for codec in _CODECS:
        try:
            Codec(codec, "w")
        except (ValueError, FFmpegError):
            lacking.append(codec)
    for codec in lacking:
        state: State = "limited" if _CODECS[codec] == "webm" else "broken"
        detail = f"This PyAV has no {codec}: {_CODECS[codec]} cannot be written."
        yield Check("codecs", state, detail, "Install PyAV's own wheel: pip install --force-reinstall av")
    yield Check("codecs", "ok", ", ".join(codec for codec in _CODECS if codec not in lacking))


def _files(settings: Settings) -> Iterator[Check]:
    from beavervision.models.cards import data_hashes, load_data

    for name in data_hashes():
        load_data(name)
    yield Check("bundled models", "ok", f"{len(data_hashes())} files, all with the recorded hash")


def _face_nets(settings: Settings) -> Iterator[Check]:
    from beavervision.models.face import FaceNets
    from beavervision.stages.decode import Decode

    with portrait() as path:
        picture = next(iter(Decode(1)(path))).frames.pictures[0]
    nets = FaceNets()
    found = nets.detect(picture)
    if not found or nets.face(picture, found[0].crop) is None:
        raise NoFaceError("The face networks run but do not see the face of the sample portrait. " + _REINSTALL)
    yield Check("LiteRT", "ok", "the face networks run and see the sample portrait's face")


def _speech(settings: Settings) -> Iterator[Check]:
    from beavervision.speech import Speaker

    speaker = Speaker(voices_dir=settings.voices_dir)
    chunk = next(iter(speaker.speak("Hello.", language="en")))
    yield Check("speech", "ok", f"English, {len(chunk.phones)} sounds of 'Hello' in {chunk.audio.seconds:.1f} s")
    languages = {voice.language.split("-")[0] for voice in speaker.voices() if not voice.unavailable}
    if missing := speaker.missing():
        yield Check(
            "languages", "limited", f"languages that can be spoken: {len(languages)}", " ".join(missing.values())
        )
    else:
        yield Check("languages", "ok", f"languages that can be spoken: {len(languages)}")


def _chain(settings: Settings) -> Iterator[Check]:
    from beavervision.models.cards import BEAVER
    from beavervision.pipeline import Pipeline

    with portrait() as path, tempfile.TemporaryDirectory() as folder:
        pipeline = Pipeline(BEAVER.name, settings=settings)
        report = pipeline.lipsync(path, Path(folder) / "out.mp4", text="Hello there.")
    where = ", ".join(pipeline.plan["lipsync"].devices)
    pace = report.times["pictures_per_s"]
    yield Check(
        "whole chain", "ok", f"{report.times['pictures']} pictures on {where}, {pace:.0f} a second, start included"
    )


def _machine(settings: Settings) -> Iterator[Check]:
    from beavervision.engine.host import cores, memory_total_bytes

    usable, there = cores(), os.cpu_count() or 1
    found = f"{usable} of {there} cores may be used" if usable < there else f"{usable} cores"
    slow = "One core is slower than real time: allow two." if usable < 2 else ""
    yield Check("processor", "limited" if slow else "ok", found, slow)
    memory = memory_total_bytes()
    small = "Large videos may not fit: allow 2 GiB." if memory < _MIN_MEMORY_BYTES else ""
    yield Check("memory", "limited" if small else "ok", f"{memory / _GIB:.1f} GiB may be used", small)


def _gpu(settings: Settings) -> Iterator[Check]:
    from beavervision.engine.placement import available_devices, resolve

    devices = available_devices()
    resolve(settings.device, devices)
    if gpus := [device for device in devices if device.is_gpu]:
        found = ", ".join(f"{gpu.name} {gpu.model}, {gpu.memory_mb / 1024:.0f} GiB" for gpu in gpus)
        yield Check("GPU", "ok", found)
    else:
        remedy = "Not needed. For an NVIDIA GPU with a driver: pip install 'beavervision[gpu]'"
        yield Check("GPU", "limited", "none is used; everything runs on the processor", remedy)


def _storage(settings: Settings) -> Iterator[Check]:
    from beavervision.models.store import ModelStore

    folder = settings.data_dir
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
        yield Check("data folder", "ok", str(folder))
    else:
        remedy = "Name one of your own: BEAVERVISION_DATA_DIR=FOLDER. Only `models add` needs it."
        yield Check("data folder", "limited", f"{folder} cannot be written", remedy)
    try:
        imported = [f"{model.card.name} ({model.card.licence_weights})" for model in ModelStore(folder).list()]
    except BeaverVisionError as error:
        yield Check("imported models", "limited", str(error))
    else:
        yield Check("imported models", "ok", ", ".join(imported) or "none")


_LOOKS: dict[str, Callable[[Settings], Iterator[Check]]] = {
    "python": _python,
    "packages": _packages,
    "codecs": _codecs,
    "bundled models": _files,
    "LiteRT": _face_nets,
    "speech": _speech,
    "whole chain": _chain,
    "machine": _machine,
    "GPU": _gpu,
    "data folder": _storage,
}
