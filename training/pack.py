"""Pack a folder of talking people: faces tracked once, all that training needs kept small.

    python -m training.pack --talkers ../shared/talkers --data work/data

For each line of ``index.tsv`` it writes ``<clip>.npz``: times_s (t,) of the pictures, points of the face in crop coordinates
(origin in the crop's centre, unit the distance of the eyes, half precision; see :data:`training.clips.KEPT` and
:func:`training.clips.read_points`), presence (t,), pcm (samples,) int16 at 16 kHz; and ``<clip>.mp4``, the mouth crops.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import numpy.typing as npt

from beavervision.errors import BeaverVisionError, NoAudioError
from beavervision.media import F32, U8, Picture
from beavervision.models.face import Crop, FaceNets
from beavervision.models.mesh import Pose, fit_pose
from beavervision.stages.decode import Decode, probe, read_audio
from beavervision.stages.hear import RATE_HZ, Resampler
from training.clips import CROP_CENTRE, CROP_PX, CROP_UNIT_PX, KEPT, Row, read_index, write_points

_MIN_PRESENCE = 0.5
_QUALITY = "14"  # of the crops' H.264, a constant rate factor


def crop_matrix(pose: Pose) -> F32:
    """(2, 3): picture pixels to the mouth crop, upright and at a fixed scale."""
    turn = float(np.arctan2(pose.rotation[1, 0], pose.rotation[0, 0]))
    scale = CROP_UNIT_PX / pose.scale_px
    cos, sin = np.cos(turn) * scale, np.sin(turn) * scale
    linear = np.array([[cos, sin], [-sin, cos]], np.float32)
    shift = CROP_PX / 2 - linear @ pose.to_picture(CROP_CENTRE)[:2]
    return np.hstack([linear, shift[:, None]]).astype(np.float32)


def packed_points(points_px: F32, pose: Pose) -> npt.NDArray[np.float16]:
    """The kept points of a face (478, 3) as :mod:`training.clips` reads them."""
    matrix = crop_matrix(pose)
    plane = (points_px[KEPT, :2] @ matrix[:, :2].T + matrix[:, 2] - CROP_PX / 2) / CROP_UNIT_PX
    return np.hstack([plane, points_px[KEPT, 2:] / pose.scale_px]).astype(np.float16)


def track(pictures: Iterator[Picture], nets: FaceNets) -> Iterator[tuple[F32 | None, float, Picture]]:
    """The largest face of each picture, followed from one to the next: its points (478, 3) or None, and its presence."""
    crop: Crop | None = None
    for picture in pictures:
        points, presence = nets.mesh(picture, crop) if crop else (None, 0.0)
        if presence < _MIN_PRESENCE:
            found = nets.detect(picture)
            if found:
                points, presence = nets.mesh(picture, max(found, key=lambda d: d.crop.side_px).crop)
                for _ in range(2):
                    points, presence = nets.mesh(picture, Crop.of_points(points))
        if points is None or presence < _MIN_PRESENCE:
            crop = None
            yield None, 0.0, picture
            continue
        crop = Crop.of_points(points)
        yield points, presence, picture


def sound(path: Path) -> npt.NDArray[np.int16]:
    """The sound of a file from its first picture on, 16 kHz mono."""
    blocks = read_audio(path)
    resampler: Resampler | None = None
    parts = []
    for block in blocks:
        resampler = resampler or Resampler(block.rate_hz)
        parts.append(resampler.push(block.pcm))
    if resampler is None:
        raise NoAudioError(f"{path} has no sound. Take it out of the index.")
    parts.append(resampler.end())
    return (np.concatenate(parts) * 32767).clip(-32768, 32767).astype(np.int16)


def pack(path: Path, out: Path, name: str, nets: FaceNets, limit: int | None = None) -> int:
    """Pack one file, its first `limit` pictures or all; how many."""
    info = probe(path)
    pcm = sound(path)
    points: list[npt.NDArray[np.float16]] = []
    presences: list[float] = []
    pictures = (p for clip in Decode(extend="none")(info) for p in clip.frames.pictures)
    with CropWriter(out / f"{name}.mp4", info.rate) as writer:
        for face, presence, picture in track(pictures, nets):
            if len(points) == limit:
                break
            presences.append(presence)
            if face is None:
                points.append(np.zeros((len(KEPT), 3), np.float16))
                writer.write(np.zeros((CROP_PX, CROP_PX, 3), np.uint8))
                continue
            pose = fit_pose(face)
            points.append(packed_points(face, pose))
            writer.write(picture.warped_rgb(crop_matrix(pose), CROP_PX))
    np.savez_compressed(
        out / f"{name}.npz",
        times_s=np.arange(len(points)) / float(info.rate),
        points=write_points(np.array(points)),
        presence=np.array(presences, np.float16),
        pcm=pcm if limit is None else pcm[: int(limit / info.rate * RATE_HZ)],
    )
    return len(points)


class CropWriter:
    """Crops to an H.264 file, nearly without loss."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        self._container = av.open(str(path), "w")
        self._stream = self._container.add_stream("libx264", rate=rate, options={"crf": _QUALITY, "preset": "medium"})
        self._stream.width = self._stream.height = CROP_PX
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.thread_count = 1

    def __enter__(self) -> CropWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.mux(self._stream.encode())
        self._container.close()

    def write(self, rgb: U8) -> None:
        self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))


def read_crops(path: Path) -> Iterator[U8]:
    """The crops (160, 160, 3) of a packed clip."""
    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        for frame in container.decode(video=0):
            yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--talkers", type=Path, default=Path("../shared/talkers"))
    parser.add_argument("--data", type=Path, default=Path("work/data"))
    parser.add_argument("--part", type=int, default=0, help="do this part of ...")
    parser.add_argument("--parts", type=int, default=1, help="... so many, for several processes")
    parser.add_argument("--smoke", action="store_true", help="two clips of each split, 40 pictures of each")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    args.data.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.talkers / "index.tsv", args.data / "index.tsv")
    nets = FaceNets()
    for row in _chosen(read_index(args.talkers), args.smoke)[args.part :: args.parts]:
        try:
            count = pack(args.talkers / row.file, args.data, row.name, nets, 40 if args.smoke else None)
            print(f"{row.name}: {count} pictures", flush=True)
        except BeaverVisionError as error:
            print(f"{row.name} left out: {error}", flush=True)


def _chosen(rows: list[Row], smoke: bool) -> list[Row]:
    if not smoke:
        return rows
    return [r for split in ("train", "validate") for r in [q for q in rows if q.split == split and q.seconds > 2][:2]]


if __name__ == "__main__":
    main()
