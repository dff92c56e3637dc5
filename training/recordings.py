"""Recorded speech of many people, without pictures, for the teacher to tell the motion of.

    python -m training.recordings --sounds FOLDER --data work/data

FOLDER has Debian packages of recorded speech, each unpacked into a folder of its name (``dpkg-deb -x``); :data:`SOURCES` says
which, and which of their files are of one voice. Writes ``recordings.npz`` into the data folder: sounds of a dozen seconds, each
of one voice, its recordings one after the other at the level that synthetic speech has.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from beavervision.media import F32
from beavervision.models.sync import SOUND_RMS
from beavervision.stages.hear import RATE_HZ
from training.voices import pack_sounds, unpack_sounds


@dataclass(frozen=True, slots=True)
class Source:
    """Recordings: the package that has them, which of its files they are, and how many minutes are used of each voice at most.

    What `files` captures in a path tells the voices of a package apart.
    """

    package: str
    files: str
    minutes: float = 8.0


SOURCES = (
    Source("asterisk-core-sounds-(?:en|es|fr|it|ru)-g722", r".*\.g722", 10),
    Source("asterisk-prompt-es-co", r".*\.gsm"),
    Source("asterisk-prompt-fr-armelle", r".*\.gsm"),
    Source("asterisk-prompt-it-menardi-wav", r".*\.wav"),
    Source("fillets-ng-data-(?:cs|nl)", r"(?:.*-([mv])-[^/]*|.*)\.ogg", 12),
    Source("hedgewars-data", r".*/voices/(?!Robot)(\w+)/.*\.ogg"),
    Source("ktuberling-data", r".*/sounds/([\w@]+)/.*\.ogg"),
    Source("klettres-data", r".*/klettres/(\w+)/.*\.ogg", 3),
    Source("tuxpaint-stamps-default", r".*_desc_([a-z]+)\.ogg"),
)
_SOUND_S = 12.0  # of what is heard together
_SHORTEST_S, _LONGEST_S = 0.35, 20.0  # of a recording
_PAUSE_S = 0.12, 0.6
_FLOOR = 0.03  # of a recording's peak: what is quieter at its ends is no speech
_EDGE_S = 0.05
_BARE = {".g722": "g722", ".gsm": "gsm"}  # formats without a header


def recordings(folder: Path) -> Iterator[tuple[str, list[Path], float]]:
    """Each voice of the packages in `folder`: its name, its files, and how many seconds of it are used at most."""
    for source in SOURCES:
        for package in sorted(p for p in folder.iterdir() if re.fullmatch(source.package, p.name)):
            voices: dict[str, list[Path]] = {}
            for path in sorted(package.rglob("*")):
                found = re.fullmatch(source.files, path.as_posix())
                if found and path.is_file() and not path.is_symlink():
                    voices.setdefault("-".join(filter(None, (package.name, *found.groups()))), []).append(path)
            for name, paths in voices.items():
                yield name, paths, source.minutes * 60


def read(path: Path) -> F32:
    """Sound (samples,) at 16 kHz, from where it begins to where it ends, at a given level; empty where there is none to use."""
    try:
        with av.open(str(path), format=_BARE.get(path.suffix), metadata_errors="replace") as container:
            even = av.AudioResampler("flt", "mono", RATE_HZ)
            frames = itertools.chain(container.decode(audio=0), (None,))
            parts = [np.asarray(part.to_ndarray()[0], np.float32) for frame in frames for part in even.resample(frame)]
    except av.FFmpegError:
        return np.zeros(0, np.float32)
    sound = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    loud = np.flatnonzero(np.abs(sound) > _FLOOR * np.abs(sound).max(initial=1e-4))
    if not loud.size:
        return np.zeros(0, np.float32)
    edge = int(_EDGE_S * RATE_HZ)
    sound = sound[max(loud[0] - edge, 0) : loud[-1] + edge]
    if not _SHORTEST_S * RATE_HZ <= len(sound) <= _LONGEST_S * RATE_HZ:
        return np.zeros(0, np.float32)
    return np.asarray(sound * SOUND_RMS / max(float(np.sqrt(np.mean(sound**2))), 1e-4), np.float32)


def joined(paths: list[Path], most_s: float, rng: np.random.Generator) -> Iterator[F32]:
    """Sounds of one voice, of its recordings in any order, with pauses in between."""
    parts: list[F32] = []
    length = total = 0
    for i in rng.permutation(len(paths)):
        sound = read(paths[i])
        if not len(sound):
            continue
        parts += [sound, np.zeros(int(rng.uniform(*_PAUSE_S) * RATE_HZ), np.float32)]
        length += len(parts[-2]) + len(parts[-1])
        if length >= _SOUND_S * RATE_HZ:
            yield np.concatenate(parts)
            total += length
            parts, length = [], 0
        if total >= most_s * RATE_HZ:
            return
    if parts:
        yield np.concatenate(parts)


def save(sounds: list[F32], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples, pcm = pack_sounds(sounds)
    np.savez_compressed(path, samples=samples, pcm=pcm)


def load(path: Path) -> list[F32]:
    """The sounds of ``recordings.npz``, (samples,) each; none where there is no such file."""
    if not path.exists():
        return []
    with np.load(path) as raw:
        return unpack_sounds(raw["samples"], raw["pcm"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sounds", type=Path, required=True, help="folder of unpacked Debian packages")
    parser.add_argument("--data", type=Path, default=Path("work/data"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="twenty files of each voice")
    args = parser.parse_args()
    sounds: list[F32] = []
    voices = 0
    for name, paths, most_s in recordings(args.sounds):
        before, rng = len(sounds), np.random.default_rng([args.seed, *name.encode()])
        sounds += joined(paths[:20] if args.smoke else paths, most_s, rng)
        voices += 1
        print(f"{name}: {sum(map(len, sounds[before:])) / RATE_HZ / 60:.1f} min", flush=True)
    if not sounds:
        parser.error(f"{args.sounds} has none of the packages named in SOURCES.")
    save(sounds, args.data / "recordings.npz")
    print(f"{voices} voices, {sum(map(len, sounds)) / RATE_HZ / 60:.0f} min")


if __name__ == "__main__":
    main()
