"""Model cards: what a model is, whose it is, how it may be used, and the files that ship with it.

A file under ``data/`` is only ever read by :func:`load_data`, which compares it with ``data/SHA256.json``.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from beavervision.errors import ModelError

Kind = Literal["lipsync", "face", "tts", "vad", "scorer", "restore", "boxes"]


@dataclass(frozen=True, slots=True)
class Timing:
    """What a lip-sync model must hear: its step, and how far before and after a picture it listens."""

    hop_ms: float
    left_context_ms: float
    look_ahead_ms: float


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model. `files` are those under ``data/``; none if the user brings the weights or a package holds them.

    `sha256` is the weights' own: of the file that the publisher released, where there is one.
    """

    name: str
    kind: Kind
    summary: str
    licence_code: str
    licence_weights: str
    non_commercial: bool
    source: str
    sha256: str | None = None
    files: tuple[str, ...] = ()
    timing: Timing | None = None


BEAVER = ModelCard(
    name="beaver",
    kind="lipsync",
    summary="Speech to mouth motion, drawn onto the face by warping and reference mouths. The default.",
    licence_code="Apache-2.0",
    licence_weights="Apache-2.0",
    non_commercial=False,
    source="this project; the recipe is in training/",
    files=(
        "beaver_motion.onnx",
        "beaver_painter.onnx",
        "beaver_basis.npz",
        "beaver_motion.safetensors",
        "beaver_painter.safetensors",
    ),
    timing=Timing(hop_ms=20, left_context_ms=340, look_ahead_ms=160),
)
WAV2LIP = ModelCard(
    name="wav2lip",
    kind="lipsync",
    summary="The Wav2Lip generator at 96 px. Not bundled: `beavervision models add` imports a published checkpoint.",
    licence_code="Apache-2.0",
    licence_weights="non-commercial research only",
    non_commercial=True,
    source="https://github.com/Rudrabha/Wav2Lip",
    timing=Timing(hop_ms=12.5, left_context_ms=0, look_ahead_ms=200),
)
S3FD = ModelCard(
    name="s3fd",
    kind="boxes",
    summary="S3FD, the face detector of the published Wav2Lip. Not bundled: `beavervision models add` imports a published "
    "checkpoint.",
    licence_code="Apache-2.0",
    licence_weights="not stated by the publisher; trained on WIDER FACE, which is CC BY-NC-ND 4.0",
    non_commercial=True,
    source="https://github.com/1adrianb/face-alignment",
)
FACE_LANDMARKER = ModelCard(
    name="face-landmarker",
    kind="face",
    summary="MediaPipe Face Landmarker: detector, 478-point mesh, 52 blendshapes.",
    licence_code="Apache-2.0",
    licence_weights="Apache-2.0",
    non_commercial=False,
    source="https://ai.google.dev/edge/mediapipe/solutions/vision/face_landmarker",
    sha256="64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
    files=("face_landmarker.task", "blendshape_names.json"),
)
FACE_BETWEEN = ModelCard(
    name="face-between",
    kind="face",
    summary="Where a face's points are in a picture between two in which the mesh found them.",
    licence_code="Apache-2.0",
    licence_weights="Apache-2.0",
    non_commercial=False,
    source="this project; the recipe is in training/",
    files=("face_between.onnx",),
)
HIBARI = ModelCard(
    name="hibari",
    kind="tts",
    summary="English speech synthesis, one US female voice, inside the hibari-tts package.",
    licence_code="Apache-2.0",
    licence_weights="Apache-2.0",
    non_commercial=False,
    source="https://pypi.org/project/hibari-tts/",
)
SILERO_VAD = ModelCard(
    name="silero-vad",
    kind="vad",
    summary="Silero VAD v5: the probability of speech for each 32 ms.",
    licence_code="MIT",
    licence_weights="MIT",
    non_commercial=False,
    source="https://github.com/snakers4/silero-vad",
    sha256="6b99cbfd39246b6706f98ec13c7c50c6b299181f2474fa05cbc8046acc274396",
    files=("silero_vad.onnx",),
)
SYNC_SCORER = ModelCard(
    name="sync-scorer",
    kind="scorer",
    summary="How well sound and lips agree, and at which offset: for `beavervision evaluate sync`.",
    licence_code="Apache-2.0",
    licence_weights="Apache-2.0",
    non_commercial=False,
    source="this project; the recipe is in training/",
    files=("sync_scorer.onnx",),
)

GFPGAN = ModelCard(
    name="gfpgan",
    kind="restore",
    summary="GFPGAN 1.2 to 1.4, a face restorer. Not bundled: `beavervision models add` imports a published checkpoint.",
    licence_code="Apache-2.0",
    licence_weights="Apache-2.0; trained on FFHQ, which is CC BY-NC-SA 4.0",
    non_commercial=False,
    source="https://github.com/TencentARC/GFPGAN",
)
RESTOREFORMER = ModelCard(
    name="restoreformer",
    kind="restore",
    summary="RestoreFormer, a face restorer. Not bundled: `beavervision models add` imports a published checkpoint.",
    licence_code="Apache-2.0",
    licence_weights="not stated by the publisher; trained on FFHQ, which is CC BY-NC-SA 4.0",
    non_commercial=True,
    source="https://github.com/wzhouxiff/RestoreFormer",
)
CODEFORMER = ModelCard(
    name="codeformer",
    kind="restore",
    summary="CodeFormer, a face restorer. Not bundled: `beavervision models add` imports a published checkpoint. "
    "It needs the package spandrel_extra_arches as well.",
    licence_code="S-Lab License 1.0",
    licence_weights="S-Lab License 1.0: non-commercial only",
    non_commercial=True,
    source="https://github.com/sczhou/CodeFormer",
)

CARDS = (
    BEAVER,
    WAV2LIP,
    S3FD,
    FACE_LANDMARKER,
    FACE_BETWEEN,
    HIBARI,
    SILERO_VAD,
    SYNC_SCORER,
    GFPGAN,
    RESTOREFORMER,
    CODEFORMER,
)


@cache
def data_hashes() -> dict[str, str]:
    """The sha256 of each bundled file, by its name."""
    try:
        hashes: dict[str, str] = json.loads(files(__package__).joinpath("data", "SHA256.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"The list of bundled model files cannot be read ({error}). Reinstall beavervision."
        ) from error
    return hashes


def load_data(name: str) -> bytes:
    """The bytes of the bundled file `name`.

    Raises:
        ModelError: it is missing or differs from its recorded hash.
    """
    try:
        data = files(__package__).joinpath("data", name).read_bytes()
    except OSError as error:
        raise ModelError(f"The bundled model file {name} is missing. Reinstall beavervision.") from error
    if hashlib.sha256(data).hexdigest() != data_hashes().get(name):
        raise ModelError(f"The bundled model file {name} is damaged: its hash is wrong. Reinstall beavervision.")
    return data
