"""LSE-D, LSE-C and the offset between lips and sound, by SyncNet's published protocol.

SyncNet (Chung and Zisserman, "Out of Time: Automated Lip Sync in the Wild", ACCV 2016 workshops) embeds 0.2 s of sound and the five
pictures shown meanwhile; Wav2Lip's authors named two of its figures LSE-D and LSE-C (Prajwal et al., ACM MM 2020). The protocol:

- 25 pictures a second; sound at 16 kHz, 16 bits, mono; 13 MFCC each 10 ms;
- a crop of the face to 224 x 224: the box of the face detector, its middle and half its longer side smoothed by a median over 13
  pictures, widened by 0.4 of that half side (to either side, and twice that below);
- for each picture that four others follow: its five crops, and 20 rows of MFCC;
- the distance of each picture's embedding to those of the sound from 15 pictures before to 15 after it (beyond the ends:
  embeddings of zeros), the mean over the pictures;
- LSE-D is the least of those 31 means, LSE-C their median less that least one, and the offset 15 less its place: positive where
  the lips are late, negative where the sound is.

The published scripts take the box from the S3FD detector, which looks at a quarter of the picture's size. Who brings its weights
gets the same here; without them it is the bounding box of the face mesh, which covers about the same (forehead to chin), and the
figures compare with one another, but only roughly with those in papers. The scripts also write pictures and crops to JPEG and
video files in between; here nothing is compressed. And they leave out faces seen for less than 100 pictures: figures are noisy
below that.

The weights, ``syncnet_v2.model`` and ``sfd_face.pth``, are the user's to bring; PyTorch (the extra gpu) is needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from rich.console import RenderableType
from rich.table import Table

from beavervision.errors import InputError, ModelError
from beavervision.evaluate.plots import Line, Panel
from beavervision.evaluate.tracks import moving
from beavervision.media import F32, U8, Face, FaceState, Picture
from beavervision.models.boxes import FaceBoxes, load_syncnet_boxes, nearest
from beavervision.models.face import FaceNets
from beavervision.models.store import read_checkpoint
from beavervision.models.torch_runtime import INSTALL_TORCH, TorchNet
from beavervision.stages.decode import Decode, read_audio, resample
from beavervision.stages.detect import Detect
from beavervision.stages.hear import syncnet_mfcc

RATE = Fraction(25)
VSHIFT = 15
_RATE_HZ = 16_000
_PICTURES, _ROWS = 5, 20  # of a window; four rows belong to a picture
_SIDE_PX = 224
_WIDER = 0.4
_SMOOTH = 13
_BORDER = 110  # the grey beyond the picture's edge
_BATCH = 8
_BRIDGE = 25  # pictures without a face that a track may have in between
_LEAST = 25  # pictures that must be left for a figure
_EPS = 1e-6  # that PyTorch's pairwise distance adds

Told = Callable[[int, int | None], None]  # pictures scored, and in all


@dataclass(frozen=True, slots=True)
class LseReport:
    """The figures of one video. offset is in pictures at 25 a second, positive where the lips are late.

    They are of `pictures` from second `start_s` on: the longest time over which one face is seen without a cut.
    """

    lse_d: float
    lse_c: float
    offset: int
    start_s: float
    pictures: int
    distances: tuple[float, ...]  # by offset, from the lips late by `VSHIFT` to as early
    boxes: Literal["mesh", "s3fd"] = "mesh"

    @property
    def offset_ms(self) -> float:
        return float(self.offset * 1000 / RATE)

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"offset_ms": self.offset_ms, "protocol": f"SyncNet, vshift {VSHIFT}"}


@dataclass(frozen=True, slots=True)
class Sync:
    """What the distances of two lines of embeddings tell; see :class:`LseReport`."""

    distance: float
    confidence: float
    offset: int
    distances: tuple[float, ...]


def lse(
    video: Path | str,
    checkpoint: Path | str,
    s3fd: Path | str | None = None,
    *,
    threads: int = 1,
    on_progress: Told | None = None,
) -> LseReport:
    """The figures of `video` with the weights of `checkpoint` (``syncnet_v2.model``), and boxes by those of `s3fd`
    (``sfd_face.pth``) or by the face mesh.

    Runs on the CPU. Embeddings and sound are held whole: about 1 GB for an hour.

    Raises:
        ModelError: a checkpoint is none of SyncNet's, or of its detector's, holds more than tensors, or PyTorch is not installed.
        MediaError, NoAudioError: the video cannot be read, is a still, or is mute.
        InputError: no face is seen for a second or more.
    """
    net = load(Path(checkpoint), threads=threads)
    detector = None if s3fd is None else load_detector(Path(s3fd), threads=threads)
    moving(video)
    blocks = resample(read_audio(video), _RATE_HZ, 1)
    pcm = np.concatenate([np.zeros(0, np.float32), *(block.pcm[0] for block in blocks)])
    boxes, first = _boxes(video, detector)
    pcm16 = np.clip(np.rint(pcm * 32768), -32768, 32767).astype(np.int16)
    pcm16 = pcm16[first * _RATE_HZ // int(RATE) : (first + len(boxes)) * _RATE_HZ // int(RATE)]
    mfcc = syncnet_mfcc(pcm16) if len(pcm16) else np.zeros((0, 13), np.float32)
    windows = min(len(boxes), len(pcm16) * int(RATE) // _RATE_HZ) - _PICTURES
    if windows < _LEAST:
        raise InputError(f"{video}: face and sound go together for less than a second. Use a longer video.")
    sounds: list[F32] = []
    faces: list[F32] = []
    at = 0
    for batch in _batches(_crops(video, boxes, first), windows):
        rows = np.stack([mfcc[4 * i : 4 * i + _ROWS].T[None] for i in range(at, at + len(batch))])
        sound, face = net(rows.astype(np.float32), batch)
        sounds.append(np.asarray(sound, np.float32))
        faces.append(np.asarray(face, np.float32))
        at += len(batch)
        if on_progress is not None:
            on_progress(at, windows)
    found = sync_of(np.concatenate(faces), np.concatenate(sounds))
    start_s = round(float(first / RATE), 3)
    return LseReport(
        found.distance,
        found.confidence,
        found.offset,
        start_s,
        len(boxes),
        found.distances,
        "mesh" if detector is None else "s3fd",
    )


def sync_of(faces: F32, sounds: F32, vshift: int = VSHIFT) -> Sync:
    """Distance, confidence and offset of the embeddings of pictures and sound, both (t, n), by the published pairing."""
    if faces.shape != sounds.shape or faces.ndim != 2 or not len(faces):
        raise ValueError(f"embeddings of {faces.shape} and {sounds.shape} do not pair")
    padded = np.pad(sounds, ((vshift, vshift), (0, 0)))
    means = np.array(
        [
            np.linalg.norm(faces - padded[shift : shift + len(faces)] + np.float32(_EPS), axis=1).mean()
            for shift in range(2 * vshift + 1)
        ]
    )
    best = int(means.argmin())
    distances = tuple(round(float(mean), 4) for mean in means)
    return Sync(float(means[best]), float(np.median(means) - means[best]), vshift - best, distances)


def load(path: Path, threads: int = 1) -> TorchNet:
    """SyncNet with the weights of a checkpoint (tensors by their published names), read without running code of it.

    Raises:
        ModelError: see :func:`lse`.
    """
    try:
        from beavervision.models.nets.blocks import fitted, loaded
        from beavervision.models.nets.syncnet import SyncNet
    except ImportError as error:
        raise ModelError(f"{path.name} cannot be used. {INSTALL_TORCH}") from error
    state = fitted(SyncNet, read_checkpoint(path), path.name, "SyncNet")
    return TorchNet(loaded(SyncNet, state), threads=threads, name="syncnet")


def load_detector(path: Path, threads: int = 1) -> FaceBoxes:
    """SyncNet's face detector with the weights of a checkpoint; raises as :func:`load`."""
    return load_syncnet_boxes(read_checkpoint(path), path.name, threads=threads)


def format_table(report: LseReport) -> RenderableType:
    """The report for a terminal."""
    table = Table(title=f"{report.pictures} pictures from {report.start_s:g} s on")
    for heading in ("LSE-D (low is good)", "LSE-C (high is good)", "lips late by"):
        table.add_column(heading, justify="right")
    offset = f"{report.offset:+d} pictures, {report.offset_ms:+.0f} ms"
    table.add_row(f"{report.lse_d:.3f}", f"{report.lse_c:.3f}", offset)
    return table


def panels(report: LseReport) -> list[Panel]:
    """The report to be drawn."""
    late_ms = [float((VSHIFT - i) * 1000 / RATE) for i in range(len(report.distances))]
    return [Panel("distance for each offset, lips late by ms", [Line("mean", late_ms, report.distances)], x_name="ms")]


def _boxes(video: Path | str, detector: FaceBoxes | None) -> tuple[F32, int]:
    """Middle x, y and half side of the face, (t, 3), over the longest time that one is seen; and its first picture."""
    runs: list[list[tuple[int, F32]]] = []
    last, last_shot, number = -_BRIDGE, -1, 0
    for clip in Detect(FaceNets(), look_ahead=0)(Decode(rate=RATE, extend="none")(video)):
        assert clip.track is not None
        track = clip.track
        for picture, face, state, shot in zip(clip.frames.pictures, track.faces, track.states, track.shot, strict=True):
            box = None if face is None or state is FaceState.CUT else _box(picture, face, detector)
            if box is not None:
                if shot != last_shot or number - last > _BRIDGE:
                    runs.append([])
                runs[-1].append((number, box))
                last, last_shot = number, shot
            number += 1
    if not runs:
        raise InputError(f"{video}: no face was found. Use a video that shows a face from the front.")
    run = max(runs, key=lambda r: r[-1][0] - r[0][0])
    numbers, known = np.array([n for n, _ in run]), np.stack([box for _, box in run])
    wanted = np.arange(numbers[0], numbers[-1] + 1)
    full = np.stack([np.interp(wanted, numbers, column) for column in known.T], axis=1)
    half = _SMOOTH // 2  # zeros beyond the ends, as the published filter has it
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(full, ((half, half), (0, 0))), _SMOOTH, axis=0)
    return np.median(windows, axis=-1).astype(np.float32), int(numbers[0])


def _box(picture: Picture, face: Face, detector: FaceBoxes | None) -> F32 | None:
    """Middle x, y and half the longer side of the face, (3,); None where the detector does not see it."""
    points_px = face.points_px[:, :2]
    bounds = np.concatenate([points_px.min(axis=0), points_px.max(axis=0)])
    found = bounds if detector is None else nearest(detector(picture.rgb()), bounds)
    if found is None:
        return None
    low, high = found[:2], found[2:]
    return np.array([*(low + high) / 2, float((high - low).max()) / 2], np.float32)


def _crops(video: Path | str, boxes: F32, first: int) -> Iterator[U8]:
    """The face in each picture from number `first` on, (224, 224, 3) BGR."""
    number = -first
    for clip in Decode(rate=RATE, extend="none")(video):
        for picture in clip.frames.pictures:
            if number >= len(boxes):
                return
            if number >= 0:
                yield crop(np.ascontiguousarray(picture.rgb()[..., ::-1]), boxes[number])
            number += 1


def crop(bgr: U8, box: F32) -> U8:
    """The published crop of a picture for a box (middle x, y, half side), (224, 224, 3); grey beyond the edges."""
    x, y, half = (float(v) for v in box)
    pad = int(half * (1 + 2 * _WIDER))
    padded = cv2.copyMakeBorder(bgr, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=(_BORDER,) * 3)
    top, bottom = int(y + pad - half), int(y + pad + half * (1 + 2 * _WIDER))
    left, right = (int(x + pad + side * half * (1 + _WIDER)) for side in (-1, 1))
    view = padded[max(top, 0) : bottom, max(left, 0) : right]
    return np.asarray(cv2.resize(view, (_SIDE_PX, _SIDE_PX)), np.uint8)


def _batches(crops: Iterator[U8], windows: int) -> Iterator[npt.NDArray[np.float32]]:
    """Windows of five crops, (n, 3, 5, 224, 224), in their order."""
    last: deque[U8] = deque(maxlen=_PICTURES)
    batch: list[U8] = []
    made = 0
    for image in crops:
        last.append(image)
        if len(last) < _PICTURES or made == windows:
            continue
        batch.append(np.stack(last, axis=1))
        made += 1
        if len(batch) == _BATCH or made == windows:
            yield np.stack(batch).transpose(0, 4, 2, 1, 3).astype(np.float32)
            batch = []
