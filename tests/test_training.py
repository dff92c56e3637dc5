"""The recipe of the shipped weights, on a made-up talker."""

from __future__ import annotations

import json
from argparse import Namespace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

pytest.importorskip("torch", reason="training needs the train extra")
pytest.importorskip("onnx", reason="training needs the train extra")

import onnx
import torch
from onnx import helper, numpy_helper

from beavervision.media import Heard
from beavervision.models import mesh
from beavervision.models.basis import MotionBasis
from beavervision.models.nets.beaver import (
    DECISION,
    FEATURES,
    HEARS,
    MEL_PER_STEP,
    MotionHead,
    MotionNet,
    PainterNet,
    SoundNet,
    beginning,
)
from beavervision.models.nets.sync import SyncScorer
from beavervision.models.runtime import OnnxNet
from beavervision.models.sync import SOUND_RMS
from beavervision.stages.hear import LOG_MEL_DENSE
from beavervision.stages.lipsync_beaver import _Ear
from training import between, clips, export, lessons, motion, painter, recordings, sound, sync, voices
from training.machine import CPU, Machine, machine_of

pytestmark = pytest.mark.torch

FPS = 25
SECONDS = 3
MACHINES = [
    pytest.param(CPU, id="cpu"),
    pytest.param(Machine(torch.device("cpu"), half=True), id="cpu-half"),
    pytest.param(
        Machine(torch.device("cuda"), half=True),
        id="cuda-half",
        marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ),
]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def talker(seed: int, sound_late_s: float = 0.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times, packed points and sound of a canonical face whose jaw falls with the loudness of noise."""
    rng = np.random.default_rng(seed)
    loud = np.interp(np.arange(SECONDS * 100) / 100, np.arange(0, SECONDS, 0.2), rng.uniform(0, 1, SECONDS * 5))
    pcm = np.repeat(loud, 160) * rng.standard_normal(SECONDS * 16000) * 0.1
    pcm = np.roll(pcm, int(sound_late_s * 16000))
    times = np.arange(SECONDS * FPS) / FPS
    faces = np.repeat(mesh.canonical()[None], len(times), axis=0)
    lower = np.setdiff1d(clips.LOWER, np.concatenate([mesh.INNER_UPPER, mesh.STABLE]))
    lower = lower[mesh.canonical()[lower, 1] > 1.1]
    faces[:, lower, 1] += 0.2 * np.interp(times, np.arange(len(loud)) / 100, loud)[:, None]
    packed = faces[:, clips.KEPT] - clips.CROP_CENTRE
    return times, packed.astype(np.float16), (pcm * 32767).clip(-32768, 32767).astype(np.int16)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder as training.pack leaves it, of two people to learn from and one to measure on."""
    lines = ["file\tsplit\tperson\tseconds\tface_px\tsync_r\tsync_lag_s"]
    for i, split in enumerate(("train", "train", "validate")):
        times, points, pcm = talker(i)
        packed = clips.write_points(points)
        np.savez(tmp_path / f"c{i}.npz", times_s=times, points=packed, presence=np.ones(len(times)), pcm=pcm)
        lines.append(f"c{i}.mp4\t{split}\tp{i}\t{SECONDS}\t200\t0.6\t0.0")
    (tmp_path / "index.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    return tmp_path


@pytest.fixture
def basis(data: Path) -> MotionBasis:
    return clips.learn_basis(clips.load_all(data), motion.BASIS_SIZE)


def test_points_are_packed_without_loss() -> None:
    _, points, _ = talker(0)
    points[3] = np.float16(-1e-5)
    packed = clips.write_points(points)
    assert packed.nbytes == points.nbytes
    assert np.array_equal(clips.read_points(packed), points.astype(np.float32))


def test_a_step_hears_no_further_than_its_last_row() -> None:
    torch.manual_seed(0)
    net = MotionNet(SoundNet(), [MotionHead(3, channels=8, hears=name) for name in HEARS]).eval()
    steps = 4
    rows = torch.randn(1, MEL_PER_STEP * steps + net.extra_rows, 64)
    start = beginning(1)
    step = 2
    last = net.extra_rows + MEL_PER_STEP - 1 + MEL_PER_STEP * step
    with torch.no_grad():
        (before,), (states,) = net(rows, start)
        assert len(before) == steps
        beyond, within = rows.clone(), rows.clone()
        beyond[:, last + 1 :] += 500
        within[:, last] += 500
        assert torch.equal(net(beyond, start)[0][0, : step + 1], before[: step + 1])
        assert not torch.equal(net(within, start)[0][0, step], before[step])
        later, _ = net(rows[:, MEL_PER_STEP * step :], states[None, step - 1])
        assert torch.allclose(later[0], before[step:], atol=1e-6)


def test_a_step_learns_with_the_rows_that_the_product_will_give_it() -> None:
    pcm = talker(0)[2].astype(np.float32) / 32768
    dense, heard = LOG_MEL_DENSE.rows(pcm), clips.heard_rows(pcm)
    assert len(heard) == len(clips.LOG_MEL.rows(pcm))

    torch.manual_seed(0)
    net = MotionNet(SoundNet(), [MotionHead(3, channels=8)]).eval()

    def hears(*given: np.ndarray) -> tuple[np.ndarray, ...]:
        with torch.no_grad():
            return tuple(x.numpy() for x in net(*(torch.from_numpy(x) for x in given)))

    before = np.full((100, 64), clips.SILENCE, np.float32)
    around = Heard(np.concatenate([before, dense, before]), -100, Fraction(1, 200), *[np.ones(75, np.float32)] * 2)
    ear = _Ear(hears, Fraction(25))
    told = np.concatenate([ear(around, i, 15) for i in range(0, 75, 15)])
    learned = motion.predict(net, heard)
    assert len(learned) == len(heard) // MEL_PER_STEP
    heard_to_the_end = 65  # what comes after the sound is silence here, there an equalised one
    assert np.allclose(told[:heard_to_the_end], learned[: 2 * heard_to_the_end : 2], atol=1e-4)


def test_a_basis_tells_the_motion_of_its_clips(data: Path, basis: MotionBasis) -> None:
    for clip in clips.load_all(data, basis):
        again = basis.displacement(clip.coefficients)
        assert np.abs(again - clip.moved).max() < 0.01
        assert np.corrcoef(clip.coefficients @ basis.gap.mean(axis=1), clip.gap)[0, 1] > 0.99


def test_a_late_sound_is_found(data: Path, basis: MotionBasis) -> None:
    (clip, *_) = clips.load_all(data, basis)
    readout = motion.Readout.of(basis)
    told = {clip.row.name: clip.targets()[0]}
    clip.lag_s = 0.1
    assert motion.correct_lags(told, [clip], readout) == 1
    assert abs(clip.lag_s) < 0.021


@pytest.mark.parametrize("machine", MACHINES)
def test_the_sync_scorer_learns_and_says_where_it_cannot_be_measured(
    data: Path, basis: MotionBasis, machine: Machine
) -> None:
    motions = clips.load_all(data, basis)
    before = SyncScorer(motion.BASIS_SIZE).state_dict()
    net = sync.train(motions, 2, machine=machine)
    assert any(not torch.equal(value, before[name]) for name, value in net.state_dict().items())
    rows, lips, weight = sync.Windows(motions, 0).take(3)
    with torch.no_grad():
        scores = net.compare(net.sound(rows), net.motion(lips), weight)
    assert torch.isfinite(scores).all()
    assert sync.figures(net, motions) == sync.Figures(0, 0, None, None), "three seconds are too short for a window"


@pytest.mark.parametrize("machine", MACHINES)
def test_the_recipe_runs_from_packed_clips_to_files(
    data: Path, basis: MotionBasis, tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, out = tmp_path / "weights", tmp_path / "out"
    motion.write_basis(basis, weights / "beaver_basis.npz")
    motions = clips.load_all(data, motion.read_basis(weights / "beaver_basis.npz"))
    pcm = talker(9)[2].astype(np.float32) / 32768
    rows = clips.LOG_MEL.rows(pcm)
    classes = np.arange(len(rows) // 2) // 5 % len(voices.Viseme)
    said = [voices.Spoken(pcm, rows, classes, np.ones(len(classes), np.float32), kokoro) for kokoro in (True, False)]
    voices.save(said, data / "voices.npz")
    taught = {
        name: lessons.Lesson(np.zeros((n, motion.BASIS_SIZE)), np.zeros((n, lessons.COMPONENTS)), 0.02)
        for name, n in [("c0", 150), ("c1", 149), ("voice 0", 150), ("voice 1", 150), ("recording 0", 148)]
    }
    lessons.write_lessons(taught, data / "taught.npz")
    spoken = voices.load(data / "voices.npz")
    assert [s.kokoro for s in spoken] == [True, False]
    options = motion.Options(
        heads=(motion.Kind("words", kokoro=False), motion.Kind("phones+rows", plain=True)),
        iterations=2,
        batch=2,
        synthetic=2,
        recorded=3,
        channels=8,
        variants=1,
    )
    readout, hears = motion.Readout.of(basis), SoundNet().eval()
    material = motion.Material.of(
        motions[:2],
        {lessons.voice_name(i): s for i, s in enumerate(spoken)},
        {lessons.recording_name(0): clips.heard_rows(pcm)},
        lessons.read_lessons(data / "taught.npz"),
        hears,
        options,
    )
    learned_from: list[list[bool]] = []
    examples = motion.Examples

    def kept(sounds: list[motion.Sound], *args: Any, **options: Any) -> motion.Examples:
        learned_from.append([sound.kokoro for sound in sounds])
        return examples(sounds, *args, **options)

    monkeypatch.setattr(motion, "Examples", kept)
    net = motion.train(motions[:2], material, hears, readout, options, machine)
    assert learned_from[1::3] == [[False], [True, False]], (
        "synthetic speech for a head without Kokoro, and for one with"
    )
    torch.save(net.state_dict(), weights / "motion.pt")
    assert all(bool(torch.isfinite(value).all()) for value in net.state_dict().values())
    assert motions[0].lag_s == 0.02
    found = motion.figures(net, motions[2:], spoken, basis, motion.usual_mouth(motions[:2]))
    assert found.clips == 1
    assert -1 <= found.gap <= 1

    (out / "SHA256.json").parent.mkdir()
    (out / "SHA256.json").write_text('{"other": "kept"}', "utf-8")
    trained = motion.load_net(weights / "motion.pt")
    assert export.export_motion(trained, out / "beaver_motion.onnx") < export.TOLERANCE
    assert export.export_painter(PainterNet((4, 4, 8)), out / "beaver_painter.onnx") < export.TOLERANCE
    assert export.export_sync(SyncScorer(16, channels=8, size=4).eval(), out / "sync_scorer.onnx") < export.TOLERANCE
    card = out / "card.md"
    card.write_text(f"| `beaver_motion.onnx` | `{'0' * 64}` |\n", "utf-8")
    export.record(out, ["beaver_motion.onnx"], card)
    hashes = json.loads((out / "SHA256.json").read_text("utf-8"))
    assert set(hashes) == {"other", "beaver_motion.onnx"}
    assert hashes["beaver_motion.onnx"] in card.read_text("utf-8")
    rows, state = np.zeros((1, 2 * 7 + trained.extra_rows, 64), np.float32), np.zeros((1, 128), np.float32)
    told, states = OnnxNet(out / "beaver_motion.onnx")(rows, state)
    assert told.shape == (1, 7, motion.BASIS_SIZE)
    assert states.shape == (1, 7 + MotionHead.context_steps, 128)


def test_a_head_learns_from_kokoro_where_it_shall_or_where_nobody_else_speaks() -> None:
    own, kokoros = (
        motion.Sound([], *np.zeros((2, 1), np.float32), np.zeros(1, np.int64), kokoro=k) for k in (False, True)
    )
    without = motion.Kind("words", kokoro=False)
    assert motion.Kind("words").learned_from([own, kokoros]) == [own, kokoros]
    assert without.learned_from([own, kokoros]) == [own]
    assert without.learned_from([kokoros]) == [kokoros]


def test_heads_count_in_the_opening_and_in_all_else_as_their_kinds_say(basis: MotionBasis) -> None:
    torch.manual_seed(0)
    readout = motion.Readout.of(basis)
    kinds = (
        motion.Kind("words+phones", opening=2),
        motion.Kind("words"),
        motion.Kind("phones+rows", opening=0, rest=2),
    )
    heads = [MotionHead(len(basis.shapes), 16, hears=kind.hears).eval() for kind in kinds]
    features = torch.randn(2, FEATURES, 20 + MotionHead.context_steps)
    with torch.no_grad():
        apart = [head(features) for head in heads]
        motion.share_out(heads, kinds, readout)
        told = torch.stack([head(features) for head in heads]).mean(dim=0)
    opening = (2 * apart[0] + apart[1]) / 3 @ readout.gap
    assert torch.allclose(told @ readout.gap, opening, atol=1e-4)
    all_else = (apart[0] + apart[1] + 2 * apart[2]) / 4
    opens = readout.gap / readout.gap.square().sum()
    assert torch.allclose(told, all_else + (opening - all_else @ readout.gap)[..., None] * opens, atol=1e-4)


def test_recordings_of_one_voice_are_heard_one_after_the_other(tmp_path: Path) -> None:
    folder = tmp_path / "sounds" / "tuxpaint-stamps-default"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    long = {"a_desc_fr": 6.0, "b_desc_fr": 7.0, "c_desc_fr": 2.0, "d_desc_el": 1.5, "e_desc_el": 0.1}
    for level, (name, seconds) in zip((0.5, 0.05, 0.1, 0.2, 0.2), long.items(), strict=True):
        pcm = rng.normal(0, level / 3, int(seconds * 22050)).clip(-1, 1)
        pcm[: 22050 // 10] = 0
        with av.open(str(folder / f"{name}.ogg"), "w", format="wav") as file:
            stream = file.add_stream("pcm_s16le", rate=22050, layout="stereo")
            frame = av.AudioFrame.from_ndarray(np.repeat(pcm * 32767, 2).astype(np.int16)[None], "s16", "stereo")
            frame.rate = 22050
            file.mux(stream.encode(frame))
            file.mux(stream.encode(None))
    (folder / "f_desc_fr.ogg").write_bytes(b"no sound")
    (folder / "bark.ogg").write_bytes(b"of no voice")
    told = {name: (len(paths), most_s) for name, paths, most_s in recordings.recordings(tmp_path / "sounds")}
    assert told == {"tuxpaint-stamps-default-fr": (4, 480), "tuxpaint-stamps-default-el": (2, 480)}
    sounds = {
        name: list(recordings.joined(paths, most_s, np.random.default_rng(1)))
        for name, paths, most_s in recordings.recordings(tmp_path / "sounds")
    }
    french, greek = sounds.values()
    assert sum(map(len, french)) / 16000 == pytest.approx(15, abs=2)
    assert len(french) == 2
    assert len(greek) == 1, "what is too short is left out"
    loud = [float(np.sqrt(np.mean(part[part != 0] ** 2))) for part in (*french, *greek)]
    assert loud == pytest.approx([SOUND_RMS] * 3, rel=0.1)
    recordings.save([*french, *greek], tmp_path / "recordings.npz")
    again = recordings.load(tmp_path / "recordings.npz")
    assert [len(one) for one in again] == [len(one) for one in (*french, *greek)]
    assert np.abs(again[0] - french[0]).max() < 1e-4
    assert recordings.load(tmp_path / "none.npz") == []


def made_triples(count: int, seed: int = 0) -> between.Triples:
    """Lips that were left behind the line as far as the middle picture's mouth is brighter than its neighbours'."""
    rng = np.random.default_rng(seed)
    bright = rng.uniform(-1, 1, count).astype(np.float32)
    mouth = np.full((count, 3, 60, 72), 100.0) + rng.normal(0, 4, (count, 3, 60, 72))
    mouth[:, 1, 20:40, 20:50] += 40 * bright[:, None, None]
    off = np.zeros((count, 478, 3), np.float32)
    off[:, [*mesh.INNER_LIP, *mesh.OUTER_LIP], 1] = 4 * bright[:, None]
    off += rng.normal(0, 0.05, off.shape)
    steps = rng.normal(0, 1, (count, 2, 478, 3))
    face = rng.integers(90, 110, (count, 3, 56, 56))
    return between.Triples(
        np.clip(mouth, 0, 255).astype(np.uint8), face.astype(np.uint8), steps.astype(np.float16),
        off.astype(np.float16), np.arange(count, dtype=np.int32) // 10,
    )  # fmt: skip


def test_the_network_between_pictures_learns_what_the_line_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(between, "_BATCH", 32)
    net = between.train(made_triples(300), 150)
    figures = between.measure(net, made_triples(80, seed=1))
    assert figures.pictures == 80
    assert figures.line_lips[0] > 1.5
    assert figures.lips[0] < 0.5 * figures.line_lips[0]
    torch.save(net.state_dict(), tmp_path / "between.pt")
    loaded = between.load_net(tmp_path / "between.pt")
    assert between.measure(loaded, made_triples(80, seed=1)) == figures
    assert export.export_between(loaded, tmp_path / "face_between.onnx") < export.TOLERANCE


def test_variation_keeps_what_is_seen_and_what_is_told_together() -> None:
    """Whatever was mirrored or turned back: the lips lie below the line where the middle picture is bright."""
    torch.manual_seed(3)
    parts = between.example(made_triples(64), np.arange(64))
    mouth, _, steps, off = between.varied(*parts)
    brighter = (mouth[:, 1] - mouth[:, [0, 2]].mean(dim=1))[:, 25:35, 25:45].mean(dim=(1, 2))
    below = off[:, mesh.OUTER_LIP, 1].mean(dim=1)
    assert np.corrcoef(brighter, below)[0, 1] > 0.95
    forgotten = (steps[:, 1] == 0).flatten(1).all(dim=1)
    assert 0.4 < float(forgotten.float().mean()) < 0.75
    assert not torch.equal(steps[:, 0], parts[2][:, 0])


def published_embedding(path: Path) -> None:
    """A file with the layers of the published embedding that are taken over, with weights of our own, up to their features."""
    rng = np.random.default_rng(0)
    made, nodes, at = [], [], "rows"

    def constant(name: str, *shape: int, around: float = 0.0) -> str:
        values = around + 0.2 * rng.standard_normal(shape).astype(np.float32)
        made.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    def add(kind: str, *more: str, **attributes: object) -> None:
        nonlocal at
        nodes.append(helper.make_node(kind, [at, *more], [f"out{len(nodes)}"], **attributes))
        at = nodes[-1].output[0]

    made.append(numpy_helper.from_array(np.array(-0.4, np.float32), "floor"))
    shapes = [
        (24, 1, 3, 3),
        (24, 24, 1, 3),
        (24, 24, 3, 1),
        (48, 24, 1, 3),
        (48, 48, 3, 1),
        (48, 48, 1, 3),
        (48, 48, 3, 1),
    ]
    for i, shape in enumerate(shapes):
        weights = [constant(f"weight{i}", *shape)] + ([constant(f"bias{i}", shape[0])] if i else [])
        add("Conv", *weights, pads=[0, 1, 0, 1] if shape[3] == 3 else [0, 0, 0, 0])
        if i == 0:
            add("Relu")
            statistics = (constant(name, 24, around=1.0) for name in ("scale", "shift", "mean"))
            made.append(numpy_helper.from_array(rng.random(24, np.float32) + 0.5, "variance"))
            add("BatchNormalization", *statistics, "variance", epsilon=1e-3)
        add("LeakyRelu", alpha=0.2)
        add("Max", "floor")
        if i in (2, 6):
            size = [2, 2] if i == 2 else [1, 2]
            add("MaxPool", kernel_shape=size, strides=size)
    ends = [helper.make_tensor_value_info(name, 1, [None] * 4) for name in ("rows", at)]
    graph = helper.make_graph(nodes, "embedding", ends[:1], ends[1:], made)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)


def test_the_published_layers_are_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "embedding_model.onnx"
    published_embedding(path)
    net = sound.published(tmp_path)
    rows = np.random.default_rng(1).standard_normal((1, 2 * 9 + net.extra_rows, 64)).astype(np.float32)
    with torch.no_grad():
        net.bands.weight.zero_()
        net.bands.bias.zero_()
        net.bands.weight[np.arange(32), np.arange(32), 1] = 1  # the bands are the middle row's first 32
        ((told,), _) = net.raw(torch.from_numpy(rows), beginning(1))
    (wanted,) = OnnxNet(path)(rows[:, None, 1:-1, :32])
    assert np.abs(told[:384].numpy() - wanted[0].transpose(0, 2, 1).reshape(384, -1)).max() < 1e-3
    assert np.array_equal(told[512:, 3].numpy(), rows[0, net.extra_rows + 6 : net.extra_rows + 8].ravel())
    with pytest.raises(SystemExit, match="openwakeword"):
        sound.published(tmp_path / "elsewhere")


def test_the_published_recogniser_is_taken_over(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"pre.weight": (256, 80), "pre.bias": (256,)}
    for side, inputs in (("ih", 256), ("hh", 128)):
        shapes |= {f"bi_rnn.weight_{side}_l0": (384, inputs), f"bi_rnn.bias_{side}_l0": (384,)}
    known = {name: (rng.normal(size=shape) / 8).astype(np.float16) for name, shape in shapes.items()}
    np.savez(tmp_path / "jp.npz", meta_data=np.array({"n_mels": 80}, object), **known)
    net = SoundNet().eval()
    sound.add_phones(net, tmp_path / "jp.npz")
    rows = torch.from_numpy(rng.normal(size=(1, 12 + net.extra_rows, 64)).astype(np.float32))
    state = rng.uniform(-1, 1, 128)
    with torch.no_grad():
        features, states = net.raw(rows, torch.from_numpy(state[None].astype(np.float32)))
        bands = net.phone_bands(rows[:, 10:].transpose(1, 2))[0].T.numpy()
    known = {name: array.astype(np.float64) for name, array in known.items()}
    for step, band in enumerate(bands):
        x = known["pre.weight"] @ band + known["pre.bias"]
        given = np.split(known["bi_rnn.weight_ih_l0"] @ x + known["bi_rnn.bias_ih_l0"], 3)
        kept = np.split(known["bi_rnn.weight_hh_l0"] @ state + known["bi_rnn.bias_hh_l0"], 3)
        reset, update = (1 / (1 + np.exp(-g - k)) for g, k in zip(given[:2], kept[:2], strict=True))
        state = update * state + (1 - update) * np.tanh(given[2] + reset * kept[2])
        assert np.abs(states[0, step].numpy() - state).max() < 1e-4
        assert np.abs(features[0, 384:512, step].numpy() - state).max() < 1e-4
    with pytest.raises(SystemExit, match="snfa"):
        sound.add_phones(net, tmp_path / "elsewhere.npz")


def test_the_recognisers_bands_are_those_of_its_moment() -> None:
    pcm = np.zeros(16_000, np.float32)
    pcm[8000:] = np.sin(2 * np.pi * 1000 * np.arange(8000) / 16_000)
    bands = sound.phone_bands(pcm, np.array([0, 7000, 8000, 9000, 15_999]))
    assert bands.shape == (5, 80)
    low_hz = 700 * (10 ** (np.arange(82) * 2840.023 / 81 / 2595) - 1)
    assert low_hz[bands[3].argmax()] < 1000 < low_hz[bands[3].argmax() + 2]
    assert bands[3].max() > bands[2].max() > bands[1].max() == bands[0].max()


def test_its_bands_are_told_from_our_rows(data: Path) -> None:
    motions = clips.load_all(data)[:2]

    def bands(pcm: np.ndarray) -> tuple[np.ndarray]:
        """What the published front end gives, from every other of our bins: its windows begin, ours are centred, each 10 ms."""
        rows = clips.LOG_MEL.rows(pcm[0] / 32767)[2:, ::2]
        return ((rows - 2) * 10,)

    net = SoundNet()
    assert sound.tell_bands(net, motions, bands) > 0.9
    assert sound.tell_phone_bands(net, motions) > 0.9
    sound.even_out(net, motions)
    with torch.no_grad():
        rows = [torch.from_numpy(m.even[None, : len(m.even) // 2 * 2]) for m in motions]
        raw = torch.cat([net.raw(r, beginning(1))[0][0] for r in rows], dim=1)
    assert torch.allclose(net.mean[:, 0], raw.mean(dim=1), atol=1e-5)
    assert torch.allclose(net.spread[:, 0], raw.std(dim=1), atol=2e-3)


def test_augmented_rows_stay_log_mel() -> None:
    rows = torch.from_numpy(np.tile(clips.LOG_MEL.rows(talker(0)[2] / 32768), (3, 1, 1)))
    changed = motion.augment(rows, np.random.default_rng(0))
    assert changed.shape == rows.shape
    assert bool(torch.isfinite(changed).all())
    assert float(changed.min()) >= float(clips.SILENCE)
    assert not torch.allclose(changed, rows, atol=0.1)


def some_mouths() -> painter.Mouths:
    angle = np.linspace(np.pi, -np.pi, 20, endpoint=False)
    ring = np.stack([48 + 20 * np.cos(angle), 40 - 10 * np.sin(angle)], axis=1)
    count = 30
    crops = np.random.default_rng(0).integers(0, 255, (count, 80, 96, 3), np.uint8)
    row = clips.Row("c.mp4", "train", "p", 3.0, 200.0, 0.0)
    every = np.arange(count)
    return painter.Mouths(row, crops, np.repeat(ring[None], count, axis=0).astype(np.float32), every, every, every)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_painter_learns_from_other_pictures_of_the_clip_and_never_sees_the_mouth(machine: Machine) -> None:
    rng, mouths = np.random.default_rng(0), some_mouths()
    for _ in range(5):
        given, wanted = painter.example(mouths, rng)
        assert given.shape == (12, 80, 96)
        assert wanted.shape == (3, 80, 96)
        assert np.all(given[:3, given[3] > 0.02] == 0)
    given, wanted = painter.probe(mouths)
    seen = np.abs(given[:3] - wanted).max(axis=0)
    assert np.all(seen[given[3] == 0][seen[given[3] == 0] > 0] <= 1)
    assert (seen == 0).mean() > 0.8
    options = painter.Options(iterations=2, batch=2, adversary=1)
    net = painter.train([mouths], [mouths], options, Path("/dev/null"), machine)
    assert not net.training
    assert all(bool(torch.isfinite(value).all()) for value in net.state_dict().values())


@pytest.mark.parametrize("machine", MACHINES)
def test_the_painter_learns_to_make_of_low_crops_what_it_made_of_whole_ones(machine: Machine, tmp_path: Path) -> None:
    torch.manual_seed(3)
    teacher, mouths = PainterNet((4, 4, 8)), some_mouths()
    with torch.no_grad():
        for weights in teacher.parameters():
            weights.mul_(3 if weights.ndim == 4 else 1)  # so that what is far away matters
    options = painter.Options(batch=6, low_iterations=60, low_rate=1e-3)
    learned = painter.teach_low(teacher, [mouths], options, tmp_path / "low.pt", machine)
    teacher.cpu()
    rng = np.random.default_rng(5)
    given, _ = painter.batch_of([painter.example(mouths, rng) for _ in range(12)])
    with torch.no_grad():
        wanted = [teacher.chosen(teacher.told(given), given, decision) for decision in (1.0, DECISION)]
        low, of_low = painter.low_crops(given, wanted)
        assert low.shape[2] == 40 and len(low) > 6
        before, after = (float(painter.apart(net, low, of_low)) for net in (teacher, learned))
    assert after < 0.88 * before
    saved = torch.load(tmp_path / "low.pt", weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in learned.state_dict().items())


def test_a_device_that_is_not_there_is_refused_before_anything_is_read() -> None:
    assert machine_of(Namespace(device="cpu", half=True)) == Machine(torch.device("cpu"), half=True)
    for device in ("cuda:99", "abacus"):
        with pytest.raises(SystemExit, match=f"{device}.*cpu, or cuda"):
            machine_of(Namespace(device=device, half=False))


def test_the_card_has_the_hashes_of_the_shipped_files() -> None:
    card = export.CARD.read_text("utf-8")
    hashes = json.loads((export.DATA / "SHA256.json").read_text("utf-8"))
    for name in ("beaver_motion.onnx", "beaver_painter.onnx", "beaver_basis.npz"):
        assert f"| `{name}` | `{hashes[name]}` |" in card
