from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from av import AudioLayout
from PIL import Image

from beavervision import Pipeline
from beavervision import pipeline as module
from beavervision.engine.memory import MemoryBudget
from beavervision.engine.placement import Device
from beavervision.errors import Interrupted, LicenceError, NoFaceError, UsageError
from beavervision.media import Audio, Clip, Frames, Picture
from beavervision.models.beaver import Beaver
from beavervision.models.store import ModelStore
from beavervision.settings import Settings
from beavervision.speech import CueReport, speak, write_wav
from beavervision.stages.decode import Decode, probe, read_audio
from tests.faces import empty, make_video, moved, portrait, portrait_rgb
from tests.media_factory import make_sound

TEXT = "Papa moved away."


@cache
def pipeline() -> Pipeline:
    return Pipeline(device="cpu", settings=Settings(preset="ultrafast"))


@pytest.fixture(scope="module")
def still(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("face") / "portrait.png"
    Image.fromarray(portrait_rgb()).save(path)
    return path


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speech") / "speech.wav"
    write_wav(speak(TEXT), path)
    return path


def pictures(path: Path) -> list[Picture]:
    return [p for clip in Decode(extend="none")(path) for p in clip.frames.pictures]


def test_a_portrait_speaks(still: Path, tmp_path: Path) -> None:
    out, sheet = tmp_path / "out.mp4", tmp_path / "sheet.png"
    heard: list[tuple[int, int | None]] = []
    report = pipeline().lipsync(still, out, text=TEXT, sheet=sheet, on_progress=lambda *done: heard.append(done))
    info = probe(out)
    samples = sum(a.samples for a in read_audio(out))
    assert info.rate == 25
    assert len(pictures(out)) == report.output["pictures"] == heard[-1][0] == heard[-1][1]
    assert abs(report.output["pictures"] / 25 - report.speech["seconds"]) <= 1 / 25
    assert abs(samples / 48000 - report.output["pictures"] / 25) < 1 / 25
    assert report.track["pictures"]["ok"] == report.output["pictures"]
    assert report.track["mouth_opening"]["p95"] > 0.03
    assert json.loads(json.dumps(report.as_dict()))["model"]["name"] == "beaver"
    with Image.open(sheet) as picture:
        assert picture.size[0] > 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.mp4", "sheet.png"]


def test_large_pictures_travel_in_smaller_clips(still: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, small = tmp_path / "a.mp4", tmp_path / "b.mp4"
    pipeline().lipsync(still, usual, text="Hi.")
    monkeypatch.setattr("beavervision.pipeline._BLOCK_BYTES", 2 * 512 * 512 * 3 // 2)
    told: list[int] = []
    pipeline().lipsync(still, small, text="Hi.", on_progress=lambda done, _: told.append(done))
    assert told[:2] == [2, 4]
    for a, b in zip(pictures(usual), pictures(small), strict=True):
        assert np.abs(a.y.astype(int) - b.y).max() <= 2  # the painter's batches round differently


def test_a_video_keeps_its_rate_and_plays_on_until_the_sound_ends(speech: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.mp4", tmp_path / "out.mp4"
    rate = Fraction(30000, 1001)
    make_video(source, [moved(dx=i) for i in range(12)], rate=rate)
    report = pipeline().lipsync(source, out, audio=speech)
    seconds = sum(a.samples for a in read_audio(speech)) / 24000
    assert probe(out).rate == rate
    assert report.output["pictures"] == int(np.ceil(seconds * rate))
    cut = pipeline().lipsync(source, tmp_path / "trim.mp4", audio=speech, fit="trim")
    assert cut.output["pictures"] == 12
    assert any("cut" in note for note in cut.notes)


def test_the_whole_picture_is_kept_where_asked(speech: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "in.mp4", tmp_path / "out.mp4"
    seconds = sum(a.samples for a in read_audio(speech)) / 24000
    count = int(seconds * 10) + 12
    make_video(source, [moved(dx=i % 5) for i in range(count)], rate=Fraction(10))
    assert pipeline().lipsync(source, out, audio=speech, fit="keep").output["pictures"] == count
    assert pipeline().lipsync(source, out, audio=speech, fit="loop").output["pictures"] < count


def test_outside_of_the_drawing_the_planes_are_the_sources_bit_for_bit(speech: Path) -> None:
    source = [moved(dx=0.7 * i) for i in range(24)]

    def clips() -> Iterator[Clip]:
        for start in range(0, 24, 8):
            yield Clip(Frames(tuple(source[start : start + 8]), start, Fraction(25)))

    out = list(pipeline().clips(clips(), read_audio(speech)))
    drawn = [p for c in out for p in c.frames.pictures]
    assert len(drawn) == 24
    changed = 0
    for before, after, clip in zip(source, drawn, [c for c in out for _ in range(len(c))], strict=True):
        assert clip.track is not None
        face = clip.track.faces[0]
        assert face is not None
        top = int(face.points_px[[145, 374], 1].min()) - 4
        assert (after.y[:top] == before.y[:top]).all()
        assert (after.y[:, :120] == before.y[:, :120]).all()
        assert (after.u[: top // 2 - 1] == before.u[: top // 2 - 1]).all()
        changed += int((after.y != before.y).sum())
    assert changed > 24 * 200
    heard = np.concatenate([c.audio.pcm for c in out if c.audio is not None], axis=1)
    truth = np.concatenate([a.pcm for a in read_audio(speech)], axis=1)[:, : heard.shape[1]]
    assert (heard[:, : truth.shape[1]] == truth).all()


def test_the_sources_own_sound_can_stay_below(speech: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.mp4"
    tone = Audio((0.5 * np.sin(np.arange(48000) * 0.2)).astype(np.float32)[None], 48000)
    make_video(source, [moved()] * 25, rate=Fraction(25), sound=tone)
    quiet, loud = tmp_path / "quiet.mp4", tmp_path / "loud.mp4"
    pipeline().lipsync(source, quiet, audio=speech)
    pipeline().lipsync(source, loud, audio=speech, keep_audio=0.5)

    def level(path: Path) -> float:
        pcm = np.concatenate([a.pcm for a in read_audio(path)], axis=1)[0, :20000]
        return float(
            np.abs(np.fft.rfft(pcm * np.hanning(len(pcm))))[[int(0.2 / (2 * np.pi) * 48000 * len(pcm) / 24000)]].max()
        )

    assert level(loud) > 5 * level(quiet)


@pytest.mark.parametrize(
    ("layout", "keep_audio", "suffix", "channels"),
    [("quad", 0, "webm", 2), ("2.1", 0, "mp4", 2), ("7.1", 0, "mp4", 2), ("5.1", 0, "mp4", 6), ("5.1", 0.5, "mp4", 2)],
)
def test_sound_of_many_channels_is_mixed_where_it_must_be(
    speech: Path, tmp_path: Path, layout: str, keep_audio: float, suffix: str, channels: int
) -> None:
    pcm = np.concatenate([a.pcm for a in read_audio(speech)], axis=1)[:, :24000]
    given = AudioLayout(layout).nb_channels
    many = make_sound(tmp_path / "many.wav", pcm.repeat(given, axis=0), 24000, layout=layout)
    source, out = tmp_path / "in.mp4", tmp_path / f"out.{suffix}"
    make_video(source, [moved()] * 10, rate=Fraction(25), sound=Audio(pcm[:, :9600], 24000))
    report = pipeline().lipsync(source, out, audio=many, keep_audio=keep_audio, fit="trim")
    assert [stream.channels for stream in probe(out).audio] == [channels]
    told = [note for note in report.notes if f"has {given} channels; it is mixed to stereo" in note]
    assert len(told) == (channels == 2)
    assert report.speech["channels"] == given


def test_subtitles_speak_at_their_times(still: Path, tmp_path: Path) -> None:
    cues = tmp_path / "cues.srt"
    cues.write_text("1\n00:00:00,500 --> 00:00:01,500\nHello.\n\n2\n00:00:02,000 --> 00:00:03,000\nGoodbye.\n")
    report = pipeline().lipsync(still, tmp_path / "out.mp4", subtitles=cues)
    assert [c["start_ms"] for c in report.speech["cues"]] == [500, 2000]
    assert report.speech["seconds"] > 2.2
    assert not any("cues" in note for note in report.notes)


def test_cues_that_are_too_long_are_sped_up_and_told(still: Path, tmp_path: Path) -> None:
    cues = tmp_path / "cues.srt"
    cues.write_text(
        "1\n00:00:00,000 --> 00:00:00,400\nThis takes much longer than that.\n\n2\n00:00:03,000 --> 00:00:04,000\nGoodbye.\n"
    )
    report = pipeline().lipsync(still, tmp_path / "out.mp4", subtitles=cues)
    first = report.speech["cues"][0]
    assert first["speed"] > 1.2 and first["overrun_ms"] > 0
    (note,) = (note for note in report.notes if "cues" in note)
    assert note.startswith("1 of 2 cues") and "cue 1 by" in note and "Shorten" in note


@pytest.mark.parametrize(
    ("speeds", "told"),
    [
        ([1.2, 1.2], "2 of 3 cues end after their time: cue 2 by 0.9 s."),
        ([1.2, 1.6], "2 of 3 cues end after their time, although 1 of them was sped up: cue 2"),
        ([1.6, 1.6], "2 of 3 cues end after their time, although they were sped up: cue 2"),
    ],
)
def test_only_cues_that_were_sped_up_are_said_to_be(speeds: list[float], told: str) -> None:
    cues = [CueReport(i + 1, 0, 0, speed, 500 + 400 * i, True, "") for i, speed in enumerate(speeds)]
    cues.append(CueReport(3, 0, 0, 1.6, 0, True, ""))
    words = module._Synthetic("subtitles", iter(()), {}, print, cues=cues, speed=1.2)
    assert words.notes()[0].startswith(told)


@pytest.mark.parametrize("name", ["source", "audio", "subtitles", "phones", "style", "expression_track"])
@pytest.mark.parametrize("output", ["out", "sheet"])
def test_no_input_is_written_over(tmp_path: Path, name: str, output: str) -> None:
    there = tmp_path / ("in.mp4" if output == "out" else "in.png")
    there.write_bytes(b"precious")
    (tmp_path / "link").symlink_to(tmp_path)
    files = {
        "source": tmp_path / "a.mp4",
        "out": tmp_path / "b.mp4",
        name: there,
        output: tmp_path / "link" / there.name,
    }
    with pytest.raises(UsageError, match="over itself"):
        pipeline().lipsync(**files)
    assert there.read_bytes() == b"precious"
    with pytest.raises(UsageError, match="two outputs"):
        pipeline().lipsync(tmp_path / "a.mp4", str(there), sheet=str(there), text="Hi.")


def test_a_picture_without_a_face_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    source, out = tmp_path / "in.mp4", tmp_path / "out.mp4"
    make_video(source, [empty(90 + i % 3) for i in range(20)], rate=Fraction(25))
    with pytest.raises(NoFaceError, match="no face"):
        pipeline().lipsync(source, out, text=TEXT)
    assert not out.exists()


def test_a_face_that_comes_late_is_waited_for(speech: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.mp4"
    make_video(source, [empty(90 + i % 3) for i in range(45)] + [portrait()] * 6, rate=Fraction(5))
    report = pipeline().lipsync(source, tmp_path / "out.mp4", audio=speech, fit="keep")
    states = report.track["pictures"]
    assert states["ok"] >= 4
    assert states["lost"] + states["cut"] >= 40
    assert report.track["not_drawn"][0]["from_s"] == 0


def test_cancelling_leaves_nothing(still: Path, tmp_path: Path) -> None:
    cancel = threading.Event()
    with pytest.raises(Interrupted):
        pipeline().lipsync(
            still, tmp_path / "out.mp4", text=TEXT * 20, on_progress=lambda *_: cancel.set(), cancel=cancel
        )
    assert list(tmp_path.iterdir()) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("flow")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one"),
        ({"text": "Hi.", "audio": "a.wav"}, "exactly one"),
        ({"text": "Hi.", "fit": "stretch"}, "fit"),
        ({"text": "Hi.", "keep_audio": 3.0}, "keep_audio"),
        ({"text": "Hi.", "phones": []}, "give audio with them"),
        ({"audio": "a.wav", "phones": [{"ipa": "h"}]}, "phone 1"),
        ({"text": "Hi.", "face": "nobody"}, "The face .nobody"),
    ],
)
def test_contradictory_options_are_refused(
    still: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        pipeline().lipsync(still, tmp_path / "out.mp4", **options)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_runs_share_the_gpus_of_a_plan(still: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs are pretended; what would run there runs on the CPU. A run keeps its device, and leaves it when it ends."""
    loaded: list[str] = []
    drawing: list[str] = []
    load, stage = module.load_beaver, module._Beaver.stage

    def load_here(device: str, threads: int) -> Beaver:
        loaded.append(device)
        return load("cpu", threads=threads)

    def noted(self: module._Beaver, *args: object) -> module.Stage:
        drawing.append(self.device)
        return stage(self, *args)  # type: ignore[arg-type]

    here = (Device("cpu", 8000), Device("cuda:0", 16000), Device("cuda:1", 16000))
    monkeypatch.setattr(module, "available_devices", lambda **_: here)
    monkeypatch.setattr(module, "load_beaver", load_here)
    monkeypatch.setattr(
        module, "MemoryBudget", lambda device, *args: MemoryBudget(device, *args, probe=lambda: (1, 100))
    )
    monkeypatch.setattr(module._Beaver, "stage", noted)
    shared = Pipeline(device="cuda:0,cuda:1", settings=Settings(preset="ultrafast"))
    assert loaded == ["cuda:0", "cuda:1"]

    def begun() -> Iterator[Clip]:
        rate = Fraction(25)
        sources = (Clip(Frames((portrait(),) * 8, 8 * i, rate)) for i in range(40))
        sound = (Audio(np.zeros((1, 16000), np.float32), 16000, 16000 * i) for i in range(13))
        running = iter(shared.clips(sources, sound))
        next(running)
        return running

    first, second = begun(), begun()
    assert drawing == ["cuda:0", "cuda:1"]
    first.close()  # type: ignore[attr-defined]
    third = begun()
    assert drawing == ["cuda:0", "cuda:1", "cuda:0"]
    for running in (second, third):
        running.close()  # type: ignore[attr-defined]
    shared.lipsync(still, tmp_path / "out.mp4", text="Hi.")
    assert drawing[-1] == "cuda:0"


@pytest.mark.torch
def test_an_imported_wav2lip_checkpoint_draws(still: Path, speech: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="importing a checkpoint needs the gpu extra")
    from beavervision.models.nets.wav2lip import Wav2Lip

    torch.manual_seed(0)
    checkpoint = tmp_path / "wav2lip_gan.pth"
    torch.save({"state_dict": {f"module.{k}": v for k, v in Wav2Lip().state_dict().items()}}, checkpoint)
    settings = Settings(data_dir=tmp_path / "data", preset="ultrafast")
    name = ModelStore(settings.data_dir).add(checkpoint).card.name
    with pytest.raises(LicenceError, match="--allow-non-commercial"):
        Pipeline(name, device="cpu", settings=settings)
    wav2lip = Pipeline(name, device="cpu", settings=settings, allow_non_commercial=True)
    report = wav2lip.lipsync(still, tmp_path / "out.mp4", audio=speech)
    assert report.model["name"] == name
    source = portrait()
    mouth = pictures(tmp_path / "out.mp4")[10].y[130:150, 205:245].astype(int)
    assert np.abs(mouth - source.y[130:150, 205:245]).mean() > 4
