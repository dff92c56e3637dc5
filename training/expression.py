"""Learn how faces express: the basis that :mod:`beavervision.stages.express` warps with.

    python -m training.expression scan --talkers ../shared/talkers --data work/data
    python -m training.expression learn --talkers ../shared/talkers --data work/data --out src/beavervision/models/data

*Scan* tracks the faces of the train split, eight pictures a second, and keeps their points and blendshapes
(``<clip>.face.npz``), and of each person one picture that is like most of theirs.

*Learn* regresses the pose-free points on the blendshapes, both against their clip's median: ridge regression on all blendshapes
at once, so that each is what remains when the others stay as they are, on the clips and their mirror images. What a control
must not move is taken out: each has its part and its side of the face, the outline stays, the gaps of lips and lids become
factors (see :mod:`beavervision.models.expression`). Blendshapes that real clips hardly have, or only together with others, are
laid out on the mesh by hand: :data:`DESIGNED` (the frown by a search, on pictures of the train split, for what the net reads as
one). Then each of :data:`CALIBRATED` is asked for at 0.5 on one picture of each of some people of the train split, the face is
found again in the result, and it is scaled so that the median of what is measured rises by :data:`WANTED`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from beavervision.errors import BeaverVisionError
from beavervision.media import BLENDSHAPES, F32, POINTS, Picture, Region
from beavervision.models import mesh
from beavervision.models.expression import FILE, ExpressionBasis
from beavervision.models.face import Crop, FaceNets, blendshape_names
from beavervision.stages.decode import Decode, from_rgb, probe
from beavervision.stages.express import STILL, expressed
from training.clips import read_index
from training.pack import track

SCAN_HZ = 8
WANTED = 0.38  # rise of the measured blendshape for 0.5
_GAINS = (0.3, 2.8)
_LEAST_FACE_PX = 110
_ROUNDS = 3
_FRONTAL_DEG = 30.0
_RIDGE = 0.1  # of each blendshape's own variance
_FLOOR = 1e-3  # of the largest variance
_LEAST_CLIP = 10  # pictures

Field = npt.NDArray[np.float64]

# Learned from the clips, by the part of the face they may move; those that open the mouth apart.
BROWS = ("browDown", "browInnerUp", "browOuterUp")
MOUTH = ("mouthSmile", "mouthPucker", "mouthFunnel", "mouthRollLower", "mouthRollUpper", "mouthShrugUpper")
OPENS = ("jawOpen", "mouthUpperUp", "mouthLowerDown")
# Bumps on the mesh: x, y, radius, and the motion of its middle; on the picture's right side for Left, mirrored for Right.
# "mouth" and "jaw" are mouthLeft, jawLeft and their like.
DESIGNED: dict[str, tuple[tuple[float, float, float, float, float, float], ...]] = {
    "mouthFrown": (
        (0.43, 1.15, 0.24, 0.067, 0.101, 0.0), (0.3, 1.3, 0.24, 0.059, 0.054, 0.0), (0, 1.1, 0.24, 0.000, -0.020, 0.0),
        (0.22, 1.12, 0.24, 0.055, 0.024, 0.0), (0, 1.35, 0.24, 0.000, -0.020, 0.0), (0.25, 1.4, 0.24, 0.043, 0.010, 0.0),
        (0, 1.65, 0.24, 0.000, -0.015, 0.0), (0.45, 1.5, 0.24, 0.029, 0.037, 0.0), (0.65, 1.3, 0.24, 0.033, 0.035, 0.0),
        (0.6, 0.95, 0.24, 0.022, 0.032, 0.0), (0.25, 0.9, 0.24, 0.028, 0.007, 0.0), (0, 0.9, 0.24, 0.000, -0.019, 0.0),
    ),
    "mouthStretch": ((0.45, 1.18, 0.32, 0.09, 0.025, 0.03),),
    "mouthDimple": ((0.45, 1.13, 0.25, 0.06, -0.01, 0.04),),
    "mouthPress": ((0.42, 1.15, 0.25, 0.02, 0.0, 0.0),),
    "mouth": ((0.0, 1.15, 0.45, 0.09, 0.0, 0.0),),
    "jaw": ((0.0, 1.75, 0.55, 0.10, 0.0, 0.0),),
    "mouthShrugLower": ((0.0, 1.35, 0.3, 0.0, -0.03, -0.03), (0.0, 1.65, 0.4, 0.0, -0.06, 0.0)),
    "cheekSquint": ((0.62, 0.42, 0.34, 0.0, -0.06, -0.02),),
    "cheekPuff": ((0.72, 1.1, 0.36, 0.09, 0.0, -0.08), (-0.72, 1.1, 0.36, -0.09, 0.0, -0.08)),
    "noseSneer": ((0.24, 0.62, 0.22, 0.01, -0.06, 0.0), (0.2, 0.9, 0.2, 0.0, -0.03, 0.0)),
    "jawForward": ((0.0, 1.7, 0.5, 0.0, 0.0, -0.12),),
}  # fmt: skip
# By how much of their gap the upper and the lower lid close at 1. Clips have hardly any wide eyes. The lower lid gives way in a
# blink: in real ones it rises a little, which the net reads as half a squint.
LIDS = {
    "eyeBlink": (1.6, -0.35),
    "eyeSquint": (0.22, 0.45),
    "eyeWide": (-0.8, -0.1),
    "eyeLookUp": (-0.15, 0.05),
    "eyeLookDown": (0.35, -0.05),
    "cheekSquint": (0.0, 0.2),
    "browInnerUp": (0.03, 0.08),
    "browOuterUp": (0.03, 0.08),
}
GAZE = {
    "eyeLookIn": (-0.09, 0.0),
    "eyeLookOut": (0.09, 0.0),
    "eyeLookUp": (0.0, -0.055),
    "eyeLookDown": (0.0, 0.055),
}
EYE_TALLER = (
    0.1,
    0.38,
)  # a wide eye: the skin's motion away from its middle, for each eye distance, and how far it reaches
EYE_LOWER = (
    0.035,
    0.15,
    0.2,
)  # a blink: the skin's motion down, how far below the eye it is largest, and how far it reaches
# Scaled by what is measured; the rest is as learned or designed.
CALIBRATED = ("mouthSmile", "browInnerUp", "browOuterUp", "browDown", "mouthPucker")
_EYE_ROWS = (
    *(247, 30, 29, 27, 28, 56, 190, 243, 112, 26, 22, 23, 24, 110, 25, 130),
    *(113, 225, 224, 223, 222, 221, 189, 244, 233, 232, 231, 230, 229, 228, 31, 226),
)
_LIDS = (33, 246, 161, 160, 159, 158, 157, 173, 133, 7, 163, 144, 145, 153, 154, 155)


# Scan ---------------------------------------------------------------------------------------------


def scan(talkers: Path, data: Path, limit: int | None = None) -> None:
    """Write ``<clip>.face.npz`` for the clips of the train split, and a picture of each person."""
    nets = FaceNets()
    people: set[str] = set()
    for row in islice((r for r in read_index(talkers) if r.split == "train"), limit):
        points, shapes, pictures = [], [], []
        try:
            info = probe(talkers / row.file)
            every = max(1, round(info.rate / SCAN_HZ))
            all_pictures = (p for clip in Decode(extend="none")(info) for p in clip.frames.pictures)
            for face, _, picture in track(islice(all_pictures, 0, None, every), nets):
                if face is not None:
                    points.append(face)
                    shapes.append(nets.blendshapes(face))
                    pictures.append(picture if row.person not in people else None)
        except BeaverVisionError as error:
            print(f"{row.name} left out: {error}", flush=True)
            continue
        if len(points) < _LEAST_CLIP:
            continue
        out: dict[str, Any] = {"points": np.array(points, np.float32), "shapes": np.array(shapes, np.float32)}
        usual = int(np.argmin(np.abs(out["shapes"] - np.median(out["shapes"], axis=0)).sum(axis=1)))
        kept = pictures[usual]
        if kept is not None and abs(mesh.fit_pose(points[usual]).yaw_deg) < _FRONTAL_DEG:
            people.add(row.person)
            margin = 0.6 * float(np.ptp(points[usual][:, 1]))
            region = Region.around(points[usual], margin, kept.width_px, kept.height_px)
            out["picture"] = kept.rgb(region)
        np.savez_compressed(data / f"{row.name}.face.npz", **out)
        print(f"{row.name}: {len(points)} pictures", flush=True)


# Learn --------------------------------------------------------------------------------------------


def mirrored_points() -> npt.NDArray[np.intp]:
    """For each of the 478 points the one on the other side of the face."""
    points = mesh.canonical()
    flipped = [int(np.argmin(((points * [-1, 1, 1] - p) ** 2).sum(axis=1))) for p in points]
    return np.array([*flipped, 473, 476, 475, 474, 477, 468, 471, 470, 469, 472], np.intp)


def mirrored_names() -> list[int]:
    """For each blendshape that of the other side; one of both sides is its own."""
    names = blendshape_names()
    swapped = (n.replace("Left", "@").replace("Right", "Left").replace("@", "Right") for n in names)
    return [names.index(n) for n in swapped]


def regressed(data: Path) -> tuple[Field, Field]:
    """The motion (52, 478, 3) with each blendshape, and the median face (478, 3), in the pose-free frame."""
    points_of, names_of = mirrored_points(), mirrored_names()
    a = np.zeros((BLENDSHAPES, BLENDSHAPES))
    b = np.zeros((BLENDSHAPES, POINTS * 3))
    medians = []
    for path in sorted(data.glob("*.face.npz")):
        with np.load(path) as raw:
            points, shapes = raw["points"], raw["shapes"].astype(np.float64)
        poses = [mesh.fit_pose(p) for p in points]
        frontal = [i for i, pose in enumerate(poses) if abs(pose.yaw_deg) < _FRONTAL_DEG]
        if len(frontal) < _LEAST_CLIP:
            continue
        faces = np.array([poses[i].to_face(points[i]) for i in frontal], np.float64)
        medians.append(np.median(faces, axis=0))
        y = faces - medians[-1]
        x = shapes[frontal] - np.median(shapes[frontal], axis=0)
        for xs, ys in ((x, y), (x[:, names_of], y[:, points_of] * [-1, 1, 1])):
            a += xs.T @ xs / len(x)
            b += xs.T @ ys.reshape(len(ys), -1) / len(x)
    own = np.diag(a)
    motion = np.linalg.solve(a + np.diag(_RIDGE * own + _FLOOR * own.max()), b)
    return np.asarray(motion.reshape(BLENDSHAPES, POINTS, 3)), np.median(medians, axis=0)


def assembled(motion: Field, face: Field, gains: dict[str, float]) -> ExpressionBasis:
    """The basis out of what was learned and what is designed; `gains` scale controls by their name without the side."""
    names = blendshape_names()
    moves, opens = np.zeros((2, BLENDSHAPES, POINTS, 3))
    lids = np.zeros((BLENDSHAPES, 2, 2))
    x, y = face[:, 0], face[:, 1]
    outline = face[mesh.FACE_OVAL]
    outline = outline[outline[:, 1] < 0.8]
    to_outline = np.linalg.norm(face[:, None, :2] - outline[None, :, :2], axis=2).min(axis=1)
    inside = _step(to_outline, 0.0, 0.35)[:, None]
    upper = (1 - _step(y, -0.2, 0.0))[:, None] * inside
    lower = _step(y, 0.15, 0.55)[:, None] * inside
    for k, name in enumerate(names):
        side = 1 if name.endswith("Left") else -1 if name.endswith("Right") else 0
        kind = name.removesuffix("Left").removesuffix("Right")
        gain = gains.get(kind, 1.0)
        if kind in LIDS:
            lids[k, slice(None) if not side else int(side > 0)] = np.array(LIDS[kind])
        if kind in GAZE:
            eye = slice(473, 478) if side > 0 else slice(468, 473)
            moves[k, eye, :2] = np.array(GAZE[kind]) * [side, 1]
        if kind in ("eyeWide", "eyeBlink"):
            away = (face - face[[33, 133] if side < 0 else [362, 263]].mean(axis=0))[:468, :2]
            if kind == "eyeWide":
                near = np.exp(-(away**2).sum(axis=1) / EYE_TALLER[1] ** 2) * (1 - _step(y, 0.15, 0.55))[:468]
                moves[k, :468, 1] = EYE_TALLER[0] * away[:, 1] * near
            else:
                moves[k, :468, 1] = EYE_LOWER[0] * np.exp(
                    -((away - [0, EYE_LOWER[1]]) ** 2).sum(axis=1) / EYE_LOWER[2] ** 2
                )
        if kind in (*BROWS, *MOUTH, *OPENS):
            both = motion[k] if not side else motion[k] + motion[names.index(kind + ("Right" if side > 0 else "Left"))]
            if side:
                both = both * _step(side * x, -0.25, 0.25)[:, None]
            if kind in BROWS:
                moves[k] = _lids_still(both * upper * gain, face)
            elif kind in MOUTH:
                moves[k] = _lips_together(both * lower * gain, face)
            else:
                gap = (
                    motion[k] if not side else motion[k] + motion[names.index(kind + ("Right" if side > 0 else "Left"))]
                )
                opens[k] = both * lower / _gap(gap)
        elif kind in DESIGNED:
            field = sum((_bump(face, *bump) for bump in DESIGNED[kind]), np.zeros((POINTS, 3)))
            if side < 0:
                field = field[mirrored_points()] * [-1, 1, 1]
            if kind == "mouthPress":
                field += _thinner(face) * _step(side * x, -0.25, 0.25)[:, None]
            field *= inside * (1 if kind in ("cheekSquint", "noseSneer") else lower)
            moves[k] = _lips_together(_lids_still(field * gain, face), face)
    closed = names.index("mouthClose")
    opens[closed] = -0.8 * opens[names.index("jawOpen")]
    opens[:, 468:] = 0
    return ExpressionBasis(moves.astype(np.float32), opens.astype(np.float32), lids.astype(np.float32))


def _step(v: Field, low: float, high: float) -> Field:
    t = np.clip((v - low) / (high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def _bump(face: Field, cx: float, cy: float, radius: float, dx: float, dy: float, dz: float) -> Field:
    away2 = (face[:, 0] - cx) ** 2 + (face[:, 1] - cy) ** 2
    return np.asarray(np.exp(-away2 / radius**2)[:, None] * np.array([dx, dy, dz]))


def _gap(field: Field) -> float:
    """How far a motion opens the lips in the middle."""
    return float((field[mesh.INNER_LOWER[2:7], 1] - field[mesh.INNER_UPPER[2:7], 1]).mean())


def _mouth_line(face: Field) -> Field:
    """The height of the line between the lips at each point's x."""
    middle = (face[mesh.INNER_UPPER] + face[mesh.INNER_LOWER]) / 2
    return np.asarray(np.interp(face[:, 0], middle[:, 0], middle[:, 1]))


def _lips_together(field: Field, face: Field) -> Field:
    """The motion without what parts or presses the inner lips, which is taken from the lips and fades around them."""
    up, low = mesh.INNER_UPPER, mesh.INNER_LOWER
    apart = field[low, 1:] - field[up, 1:]
    at = face[[78, *up, 308], 0]
    out = field.copy()
    away = face[:, 1] - _mouth_line(face)
    below = np.isin(np.arange(POINTS), low) | (away > 0) & ~np.isin(np.arange(POINTS), up)
    share = np.where(below, -0.5, 0.5) * np.exp(-((away / 0.22) ** 2))
    share[low], share[up] = -0.5, 0.5
    for axis in (1, 2):
        over = np.interp(face[:, 0], at, [0.0, *apart[:, axis - 1], 0.0], left=0.0, right=0.0)
        over[low] = over[up] = apart[:, axis - 1]
        out[:, axis] += share * over
    return out


def _thinner(face: Field) -> Field:
    """Lips pressed: what is red of them comes nearer to the line between them."""
    away = face[:, 1] - _mouth_line(face)
    field = np.zeros((POINTS, 3))
    near = np.exp(-((away / 0.2) ** 2)) * (np.abs(face[:, 0]) < 0.5)
    field[:, 1] = -0.35 * away * near
    return field


def _lids_still(field: Field, face: Field) -> Field:
    """The motion with the edges of the lids at rest, and smooth between them and what moves around the eyes."""
    other = mirrored_points()
    free = np.array([*_EYE_ROWS, *other[list(_EYE_ROWS)]])
    out = field.copy()
    out[[*_LIDS, *other[list(_LIDS)]]] = 0
    out[468:] = 0
    edges = np.concatenate([mesh.triangles()[:, [0, 1]], mesh.triangles()[:, [1, 2]], mesh.triangles()[:, [2, 0]]])
    near = np.zeros((len(free), POINTS))
    for row, point in enumerate(free):
        beside = np.unique(np.concatenate([edges[edges[:, 0] == point, 1], edges[edges[:, 1] == point, 0]]))
        near[row, beside] = 1 / np.linalg.norm(face[beside] - face[point], axis=1)
    near /= near.sum(axis=1, keepdims=True)
    for _ in range(80):
        out[free] = near @ out.reshape(POINTS, 3)
    return out


# Calibrate ----------------------------------------------------------------------------------------


def calibrated(data: Path, motion: Field, face: Field, people: int) -> dict[str, float]:
    """The gain of each of :data:`CALIBRATED`, from one picture of each of so many people."""
    nets = FaceNets()
    seen = list(islice(_people(data, nets), people))
    gains: dict[str, float] = dict.fromkeys(CALIBRATED, 1.0)
    for turn in range(_ROUNDS):
        basis = assembled(motion, face, gains)
        rises = {}
        for kind in CALIBRATED:
            wished = [
                k for k, n in enumerate(blendshape_names()) if n.removesuffix("Left").removesuffix("Right") == kind
            ]
            rises[kind] = float(np.median([_rise(basis, wished, *one, nets) for one in seen]))
            change = np.clip(WANTED / max(rises[kind], 0.02), 0.5, 2.0) ** 0.8
            gains[kind] = float(np.clip(gains[kind] * change, *_GAINS))
        print(f"round {turn}:", {k: (round(v, 2), round(gains[k], 2)) for k, v in rises.items()}, flush=True)
    return gains


def _people(data: Path, nets: FaceNets) -> Iterator[tuple[Picture, F32]]:
    for path in sorted(data.glob("*.face.npz")):
        with np.load(path) as raw:
            if "picture" not in raw:
                continue
            picture = from_rgb(raw["picture"])
        found = nets.detect(picture)
        face = nets.face(picture, found[0].crop, settle=2) if found else None
        if face is not None and np.ptp(face.points_px[:, 0]) >= _LEAST_FACE_PX:
            yield picture, face.points_px


def _rise(basis: ExpressionBasis, wished: list[int], picture: Picture, points: F32, nets: FaceNets) -> float:
    controls = np.zeros(BLENDSHAPES, np.float32)
    controls[wished] = 0.5
    made = expressed(picture, points, controls, STILL, basis)
    crop = Crop.of_points(points)
    before, after = (nets.face(p, crop, settle=1) for p in (picture, made))
    if before is None or after is None:
        return 0.0
    return float((after.blendshapes - before.blendshapes)[wished].mean())


def main() -> None:
    from training.export import DATA, record  # which need PyTorch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["scan", "learn"])
    parser.add_argument("--talkers", type=Path, default=Path("../shared/talkers"))
    parser.add_argument("--data", type=Path, default=Path("work/data"))
    parser.add_argument("--out", type=Path, default=DATA, help="the folder that gets the basis and its hash")
    parser.add_argument("--people", type=int, default=24, help="to calibrate on")
    parser.add_argument("--smoke", action="store_true", help="scan four clips, calibrate on two people")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    args.data.mkdir(parents=True, exist_ok=True)
    if args.step == "scan":
        scan(args.talkers, args.data, 4 if args.smoke else None)
        return
    motion, face = regressed(args.data)
    gains = calibrated(args.data, motion, face, 2 if args.smoke else args.people)
    basis = assembled(motion, face, gains)
    args.out.mkdir(parents=True, exist_ok=True)
    packed: dict[str, Any] = basis.pack()
    np.savez_compressed(args.out / FILE, **packed)
    record(args.out, [FILE])
    print(f"{FILE}: {(args.out / FILE).stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
