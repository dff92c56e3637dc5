"""The speed of the whole chain on this machine, by a real run: H.264 in, speech, tracking, drawing, H.264 out.

The source is made on the fly from the sample portrait, under a slow pan and zoom with camera grain, so that decoding
and tracking have work to do, or is a video of one's own. Each run has a process of its own: its peak memory and CPU time
are the run's alone.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from beavervision.engine.host import Stolen, cores, memory_total_bytes, peak_rss_bytes
from beavervision.errors import ModelError, UsageError
from beavervision.evaluate.alone import Progress, call_alone
from beavervision.evaluate.samples import portrait
from beavervision.media import U8, Clip, Net
from beavervision.models.beaver import load as load_beaver
from beavervision.models.cards import BEAVER, SILERO_VAD, load_data
from beavervision.models.face import FaceNets
from beavervision.models.runtime import OnnxNet
from beavervision.models.torch_runtime import INSTALL_TORCH
from beavervision.pipeline import Pipeline
from beavervision.settings import Settings
from beavervision.speech import Speaker
from beavervision.stages.decode import Decode, probe
from beavervision.stages.detect import Detect, FaceChoice, survey
from beavervision.stages.encode import PRESETS
from beavervision.stages.hear import LOG_MEL_DENSE, Hear
from beavervision.stages.lipsync_beaver import BeaverSync, profile_of

SIZES = {"360p": (640, 360), "480p": (854, 480), "720p": (1280, 720), "1080p": (1920, 1080), "2160p": (3840, 2160)}

_FACE_AT = (0.44, 0.25)  # of the portrait's sides
_SHOWN = (0.72, 0.80)  # share of the portrait's width that fills the picture, over the zoom
_PAN = 0.012  # of the portrait's width, to each side
_CYCLE_S = 8  # the pan and zoom comes back to its beginning, so that it can be repeated without a cut
_GRAIN = 2.0  # standard deviation of the camera's noise, in 8-bit steps;
_GRAIN_SHIFT = 64  # it is one field, laid up to so many pixels aside
_WORDS = (
    "The beaver builds its dam from branches, stones and mud, and looks after it every evening of the year. "
    "When the water is high enough, nobody can walk up to the door of the house. "
    "Have you ever watched one at work by the light of the moon? "
    "It carries a young birch through the shallows, dives below the ice, and comes up again on the other side. "
    "Five hundred metres of canals, dug by paws alone, bring the wood from the forest to the pond. "
)
_CHARS_PER_S = 18  # a little more than the default voice says
_LIBRARIES = ("av", "numpy", "onnxruntime", "ai-edge-litert", "opencv-python-headless", "hibari-tts")

_BLOCK = 8
_COMPARED_BLOCKS = 8
_ROUNDS = 7


@dataclass(frozen=True, slots=True)
class Machine:
    """What the figures were taken on. load_1min is the number of busy threads just before, all processes;
    stolen_percent is how much of the CPU time wanted during the run the host of a virtual machine gave to others.
    """

    cpu: str
    cores: int
    memory_mb: int
    system: str
    python: str
    versions: dict[str, str]
    load_1min: float | None
    stolen_percent: float | None


@dataclass(frozen=True, slots=True)
class StageFigures:
    """One stage, per picture: the mean over all of them and the median over clips, of the CPU time of its own thread."""

    name: str
    cpu_ms: float
    cpu_ms_median: float
    wall_ms: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The lip-sync stage against the published Wav2Lip generator, CPU ms per picture on one thread; medians of rounds.

    networks_ms is the part of beaver_ms that its networks take, for motion and for the opening of the mouth; the rest is the
    warp, which moves the face's own pixels where Wav2Lip's network draws them anew.
    """

    beaver_ms: float
    networks_ms: float
    wav2lip_ms: float
    rounds: int

    @property
    def ratio(self) -> float:
        return self.wav2lip_ms / self.beaver_ms

    @property
    def networks_ratio(self) -> float:
        return self.wav2lip_ms / self.networks_ms


@dataclass(frozen=True, slots=True)
class BenchReport:
    """One measured run.

    process_cpu_ms (per picture) counts every thread of the process over the whole run, so besides the stages it holds the
    threads inside codecs and the first look at the source. first_picture_ms is from the call, with networks loaded, to
    the first encoded picture; load_ms is the loading.
    """

    size_px: tuple[int, int]
    rate: str
    preset: str
    model: str
    device: str
    pictures: int
    seconds: float
    elapsed_s: float
    pictures_per_s: float
    times_real_time: float
    load_ms: float
    first_picture_ms: float
    peak_memory_mb: float
    stages: tuple[StageFigures, ...]
    process_cpu_ms: float
    machine: Machine
    comparison: Comparison | None = None
    comparison_note: str = ""

    @property
    def stages_cpu_ms(self) -> float:
        """CPU ms per picture of all stages' own threads."""
        return sum(stage.cpu_ms for stage in self.stages)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        figures = asdict(self) | {"stages_cpu_ms": round(self.stages_cpu_ms, 3)}
        if self.comparison is not None:
            figures["comparison"]["ratio"] = round(self.comparison.ratio, 2)
        return figures


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Peak memory of runs over sources of several lengths, each in a process of its own."""

    size_px: tuple[int, int]
    preset: str
    seconds: tuple[float, ...]
    peak_memory_mb: tuple[float, ...]

    @property
    def growth(self) -> float:
        """Of the last against the first: 0 is none."""
        return self.peak_memory_mb[-1] / self.peak_memory_mb[0] - 1

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"growth": round(self.growth, 4)}


def bench(
    *,
    source: Path | None = None,
    seconds: float = 10,
    size: str = "720p",
    rate: Fraction | int | str = 25,
    preset: str | None = None,
    model: str | None = None,
    device: str | None = None,
    allow_non_commercial: bool = False,
    compare: bool = True,
    on_progress: Progress | None = None,
) -> BenchReport:
    """Measure the chain on a source that is spoken over for as long as it lasts.

    Args:
        source: a video with a face. Without one `seconds`, `size` and `rate` say what is made for it.
        size: one of :data:`SIZES`.
        rate: pictures a second of the source.
        preset, model, device: as in the settings if None.
        compare: time the lip-sync stage against the published Wav2Lip generator as well (beaver only; needs PyTorch for
            the export; random weights, which cost as much as trained ones).
        on_progress: told the pictures done and in all, once they are known.

    Raises:
        UsageError: `seconds`, `size`, `rate` or `preset` is none that can be used.
        BeaverVisionError: `source` cannot be used, or the run failed.
    """
    size_px, exact = _checked(seconds, size, rate, preset)
    load_1min = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with tempfile.TemporaryDirectory(prefix="beavervision-bench-") as scratch:
        if source is None:
            source = Path(scratch) / "source.mp4"
            _make_source(source, seconds, size_px, exact)
        else:
            info = probe(source)
            if info.duration is None:
                raise UsageError(f"{source} is no video of a known length: give one, or none.")
            size_px, exact, seconds = (info.width_px, info.height_px), info.rate, float(info.duration)
        options = {"model": model, "device": device, "allow_non_commercial": allow_non_commercial}
        stolen = Stolen()
        run = _run(source, Path(scratch), seconds, preset, options, on_progress)
        stolen_percent = stolen.percent()
        compared: dict[str, Any] = {}
        if compare and run["model"] != BEAVER.name:
            compared = {"note": f"Only {BEAVER.name} is compared with Wav2Lip."}
        elif compare:
            compared = call_alone(time_lipsync, {"source": str(source)})
    note = compared.pop("note", "")
    machine = Machine(**run.pop("machine"), load_1min=load_1min, stolen_percent=stolen_percent)
    stages = tuple(StageFigures(**stage) for stage in run.pop("stages"))
    comparison = Comparison(**compared) if compared else None
    return BenchReport(
        **run,
        size_px=size_px,
        rate=str(exact),
        times_real_time=round(run["pictures_per_s"] / float(exact), 3),
        stages=stages,
        machine=machine,
        comparison=comparison,
        comparison_note=note,
    )


def compare_memory(
    seconds: tuple[float, ...] = (60, 600),
    *,
    size: str = "1080p",
    rate: Fraction | int | str = 25,
    preset: str = "ultrafast",
    on_progress: Progress | None = None,
) -> MemoryReport:
    """Measure the peak memory of runs over sources of several lengths; arguments and errors as of :func:`bench`."""
    peaks: list[float] = []
    for length in seconds:
        size_px, exact = _checked(length, size, rate, preset)
        with tempfile.TemporaryDirectory(prefix="beavervision-bench-") as scratch:
            source = Path(scratch) / "source.mp4"
            _make_source(source, length, size_px, exact)
            peaks.append(_run(source, Path(scratch), length, preset, {}, on_progress)["peak_memory_mb"])
    return MemoryReport(size_px, preset, seconds, tuple(peaks))


def format_table(report: BenchReport | MemoryReport) -> RenderableType:
    """The report for a terminal."""
    return _bench_table(report) if isinstance(report, BenchReport) else _memory_table(report)


# In processes of their own --------------------------------------------------------------------------


def run_once(
    *, source: str, out: str, text: str, preset: str | None, on_progress: Progress | None = None, **options: Any
) -> dict[str, Any]:
    """One run of the pipeline from `source` to `out`, measured: the fields of :class:`BenchReport` that it can know."""
    settings = replace(Settings.load(), voice="", language="en")
    if preset is not None:
        settings = replace(settings, preset=preset)
    begin_s = time.perf_counter()
    pipeline = Pipeline(settings=settings, **options)
    load_ms = (time.perf_counter() - begin_s) * 1e3
    report = pipeline.lipsync(source, out, text=text, fit="keep", alive=False, on_progress=on_progress)
    times = report.times
    pictures = times["pictures"]
    return {
        "preset": settings.preset,
        "model": pipeline.card.name,
        "device": ",".join(pipeline.plan["lipsync"].devices),
        "pictures": pictures,
        "seconds": report.output["seconds"],
        "elapsed_s": round(times["elapsed_ms"] / 1e3, 3),
        "pictures_per_s": times["pictures_per_s"],
        "load_ms": round(load_ms, 1),
        "first_picture_ms": times["first_picture_ms"],
        "peak_memory_mb": round(peak_rss_bytes() / 2**20, 1),
        "process_cpu_ms": round(times["process_cpu_ms"] / pictures, 3),
        "stages": [
            {
                "name": name,
                "cpu_ms": round(stage["cpu_ms"] / pictures, 3),
                "cpu_ms_median": stage["cpu_ms_per_picture"],
                "wall_ms": round(stage["wall_ms"] / pictures, 3),
            }
            for name, stage in times["stages"].items()
        ],
        "machine": _machine(),
    }


def time_lipsync(*, source: str, on_progress: Progress | None = None) -> dict[str, Any]:
    """Time beaver's lip-sync stage (motion and drawing) and the Wav2Lip generator in turns: :class:`Comparison` or a note."""
    cv2.setNumThreads(1)
    try:
        wav2lip = _random_wav2lip()
    except ImportError:
        return {"note": f"Not compared with Wav2Lip. {INSTALL_TORCH}"}
    stage, clips, networks = _prepared(Path(source))
    inputs = tuple(np.random.default_rng(0).random((_BLOCK, *s), np.float32) for s in ((1, 80, 16), (6, 96, 96)))

    def draw() -> None:
        for _ in stage(iter(clips)):
            pass

    def generate() -> None:
        wav2lip(*inputs)

    draw()
    generate()
    pictures = sum(len(clip) for clip in clips)
    spent = []
    for _ in range(_ROUNDS):
        before_ms = sum(net.spent_ms for net in networks)
        drawn_ms = _cpu_ms(draw)
        networks_ms = sum(net.spent_ms for net in networks) - before_ms
        spent.append((drawn_ms / pictures, networks_ms / pictures, _cpu_ms(generate) / _BLOCK))
    names = ("beaver_ms", "networks_ms", "wav2lip_ms")
    medians = (round(statistics.median(side), 3) for side in zip(*spent, strict=True))
    return dict(zip(names, medians, strict=True)) | {"rounds": _ROUNDS}


class _Timed:
    """A network, and the CPU time that it took in all."""

    def __init__(self, net: Net) -> None:
        self._net = net
        self.spent_ms = 0.0

    def __call__(self, *inputs: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]:
        begin_s = time.process_time()
        out = self._net(*inputs)
        self.spent_ms += (time.process_time() - begin_s) * 1e3
        return out


def _cpu_ms(work: Callable[[], None]) -> float:
    begin_s = time.process_time()
    work()
    return (time.process_time() - begin_s) * 1e3


def _random_wav2lip() -> OnnxNet:
    import torch

    from beavervision.models.nets import wav2lip
    from beavervision.models.nets.blocks import loaded, onnx_bytes

    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = loaded(wav2lip.Wav2Lip, wav2lip.Wav2Lip().state_dict())
    return OnnxNet(onnx_bytes(net, wav2lip.INPUTS, wav2lip.OUTPUTS), threads=1, name="wav2lip")


def _prepared(source: Path) -> tuple[BeaverSync, list[Clip], tuple[_Timed, _Timed]]:
    """The stage for `source`, the first clips of it as they reach the stage, and the stage's networks."""
    nets, beaver, info = FaceNets(), load_beaver(threads=1), probe(source)
    first = next(Decode(1, extend="none")(info)).frames.pictures[0]
    profile = profile_of(survey([first], nets, FaceChoice()).references, beaver.basis)
    motion, painter = _Timed(beaver.motion), _Timed(beaver.painter)
    stage = BeaverSync(motion, painter, beaver.basis, profile)
    voice = OnnxNet(load_data(SILERO_VAD.files[0]), name=SILERO_VAD.name)
    hear = Hear(LOG_MEL_DENSE.name, beaver.timing.left_context_ms, beaver.timing.look_ahead_ms, voice)
    spoken = (chunk.audio for chunk in Speaker(threads=1).speak(_WORDS, language="en"))
    clips = hear(Detect(nets)(Decode(_BLOCK)(info)), spoken)
    return stage, list(itertools.islice(clips, _COMPARED_BLOCKS)), (motion, painter)


def _machine() -> dict[str, Any]:
    versions = {name: importlib.metadata.version(name) for name in _LIBRARIES}
    if "torch" in sys.modules:  # where it is installed it is loaded to look for GPUs, and takes memory
        versions["torch"] = importlib.metadata.version("torch")
    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory_mb": memory_total_bytes() // 2**20,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


# The source ------------------------------------------------------------------------------------------


def _checked(
    seconds: float, size: str, rate: Fraction | int | str, preset: str | None
) -> tuple[tuple[int, int], Fraction]:
    if size not in SIZES:
        raise UsageError(f"size {size!r}: use {', '.join(SIZES)}.")
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"preset {preset!r}: use {', '.join(PRESETS)}.")
    try:
        exact = Fraction(rate)
    except (ValueError, ZeroDivisionError) as error:
        raise UsageError(f"rate {rate!r}: give pictures a second, such as 25 or 30000/1001.") from error
    if not 1 <= exact <= 240 or not 1 <= seconds <= 7200:
        raise UsageError("rate must be between 1 and 240 pictures a second, and seconds between 1 and 7200.")
    return SIZES[size], exact


def _run(
    source: Path,
    scratch: Path,
    seconds: float,
    preset: str | None,
    options: dict[str, Any],
    on_progress: Progress | None,
) -> dict[str, Any]:
    text = _WORDS * (1 + int(seconds * _CHARS_PER_S / len(_WORDS)))
    given = {"source": str(source), "out": str(scratch / "out.mp4"), "text": text, "preset": preset}
    return call_alone(run_once, given | options, on_progress)


def _make_source(path: Path, seconds: float, size_px: tuple[int, int], rate: Fraction) -> None:
    """Write the pan and zoom over the portrait: one cycle is encoded, and its packets are repeated."""
    wanted = round(Fraction(seconds) * rate)
    base = 1 / rate
    with av.open(f"file:{path}", "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt = *size_px, "yuv420p"
        stream.codec_context.time_base = base
        stream.codec_context.thread_count = cores()
        packets: list[av.Packet[av.VideoStream]] = []
        cycle = min(round(_CYCLE_S * rate), wanted)
        for number, rgb in enumerate(_pan(cycle, size_px)):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
            frame.pts, frame.time_base = number, base
            packets += stream.encode(frame)
        packets += stream.encode(None)
        for start in range(0, wanted, cycle):
            for made in packets:
                assert made.pts is not None
                assert made.dts is not None
                if start + made.pts >= wanted:
                    continue
                packet = av.Packet(bytes(made))
                packet.stream, packet.time_base, packet.is_keyframe = stream, base, made.is_keyframe
                packet.pts, packet.dts, packet.duration = start + made.pts, start + made.dts, 1
                container.mux(packet)


def _pan(count: int, size_px: tuple[int, int]) -> Iterator[U8]:
    with portrait() as path:
        bgr = cv2.imread(str(path))
    if bgr is None:
        raise ModelError("The sample portrait is missing or damaged. Reinstall beavervision.")
    picture = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    side = picture.shape[1]
    random = np.random.default_rng(0)
    noise = random.normal(0, _GRAIN, (size_px[1] + _GRAIN_SHIFT, size_px[0] + _GRAIN_SHIFT))
    grain = cv2.merge([np.rint(noise).astype(np.int16)] * 3)
    for number in range(count):
        turn = 2 * np.pi * number / count
        scale = size_px[0] / (side * (_SHOWN[0] + (_SHOWN[1] - _SHOWN[0]) * (0.5 - 0.5 * np.cos(turn))))
        x = side * (_FACE_AT[0] + _PAN * np.sin(turn))
        y = picture.shape[0] * _FACE_AT[1] + side * _PAN * np.sin(2 * turn) / 2
        matrix = np.array([[scale, 0, size_px[0] / 2 - scale * x], [0, scale, size_px[1] / 2 - scale * y]])
        view = cv2.warpAffine(picture, matrix, size_px, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        dx, dy = random.integers(0, _GRAIN_SHIFT, 2)
        yield np.asarray(cv2.add(view, grain[dy : dy + size_px[1], dx : dx + size_px[0]], dtype=cv2.CV_8U), np.uint8)


# Tables ----------------------------------------------------------------------------------------------


def _bench_table(report: BenchReport) -> RenderableType:
    width, height = report.size_px
    title = (
        f"CPU ms per picture: {report.pictures} of {width}x{height} at {report.rate}/s, {report.preset}, {report.model}"
    )
    stages = Table()
    stages.add_column("stage")
    for heading in ("mean", "median", "wall"):
        stages.add_column(heading, justify="right")
    for stage in report.stages:
        stages.add_row(stage.name, f"{stage.cpu_ms:.2f}", f"{stage.cpu_ms_median:.2f}", f"{stage.wall_ms:.2f}")
    stages.add_section()
    stages.add_row("all stages", f"{report.stages_cpu_ms:.2f}", "", "")
    outside = report.process_cpu_ms - report.stages_cpu_ms
    stages.add_row("outside of them: first look at the source, threads of codecs", f"{outside:.2f}", "", "")
    stages.add_row("whole process", f"{report.process_cpu_ms:.2f}", "", "", style="bold")
    facts = _facts()
    facts.add_row("pictures per second", f"{report.pictures_per_s:.1f} ({report.times_real_time:.2f} x real time)")
    facts.add_row("first picture", f"{report.first_picture_ms:.0f} ms (loading before it: {report.load_ms:.0f} ms)")
    facts.add_row("peak memory", f"{report.peak_memory_mb:.0f} MB")
    if report.comparison is not None:
        c = report.comparison
        facts.add_row(
            "lip sync",
            f"{c.beaver_ms:.2f} CPU ms per picture, {c.networks_ms:.2f} of it in its networks; Wav2Lip's generator "
            f"{c.wav2lip_ms:.1f}: {c.ratio:.1f} times more, {c.networks_ratio:.1f} times that of the networks",
        )
    elif report.comparison_note:
        facts.add_row("lip sync", Text(report.comparison_note))
    m = report.machine
    facts.add_row("machine", f"{m.cpu}, {m.cores} cores, {m.memory_mb} MB, device {report.device}")
    if m.load_1min is not None:
        facts.add_row("busy before", f"{m.load_1min:.1f} threads" + (" (not quiet)" if m.load_1min > 0.5 else ""))
    if m.stolen_percent:
        facts.add_row("taken by its host", f"{m.stolen_percent:.1f} % of the CPU time wanted")
    facts.add_row("software", f"{m.system}, Python {m.python}, " + ", ".join(f"{k} {v}" for k, v in m.versions.items()))
    return Group(title, stages, facts)


def _memory_table(report: MemoryReport) -> RenderableType:
    width, height = report.size_px
    table = Table(title=f"Peak memory, {width}x{height}, {report.preset}")
    table.add_column("source")
    table.add_column("MB", justify="right")
    for seconds, peak in zip(report.seconds, report.peak_memory_mb, strict=True):
        table.add_row(f"{seconds:g} s", f"{peak:.0f}")
    table.add_section()
    table.add_row("growth", f"{report.growth:+.1%}")
    return table


def _facts() -> Table:
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="bold")
    facts.add_column()
    return facts
