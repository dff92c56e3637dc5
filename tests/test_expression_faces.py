"""Expression end to end: what was asked for is found again on the face of the finished video."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beavervision import Pipeline
from beavervision.evaluate.tracks import watched
from beavervision.expression import Custom, ExpressionStore, Marked, Style
from beavervision.expression.alive import Manner
from beavervision.expression.controls import look_of
from beavervision.media import BLENDSHAPES, F32, Clip, Face, Frames
from beavervision.models.expression import load_basis
from beavervision.models.face import Crop, FaceNets, blendshape_names
from beavervision.models.mesh import fit_pose
from beavervision.pipeline import learn_style
from beavervision.settings import Settings
from beavervision.speech import speak, write_wav
from beavervision.stages.express import STILL, expressed
from tests.faces import make_video, moved, portrait, portrait_rgb

INDEX = {name: i for i, name in enumerate(blendshape_names())}
GLAD = "We won the first prize, how wonderful!"
SAD = "It was a terrible loss, I am so sorry."
SEED = 25  # one with a blink in the first two seconds


@cache
def nets() -> FaceNets:
    return FaceNets()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faces")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Pipeline:
    return Pipeline(device="cpu", settings=Settings(preset="ultrafast", crf=14, data_dir=folder / "data"))


@pytest.fixture(scope="module")
def still(folder: Path) -> Path:
    path = folder / "portrait.png"
    Image.fromarray(portrait_rgb()).save(path)
    return path


@dataclass(frozen=True)
class Shown:
    """The face found again in the pictures of a video."""

    faces: tuple[Face, ...]

    def of(self, *names: str) -> F32:
        """The mean of some blendshapes, picture by picture."""
        return np.mean([[face.blendshapes[INDEX[name]] for face in self.faces] for name in names], axis=0)

    @property
    def smile(self) -> F32:
        return self.of("mouthSmileLeft", "mouthSmileRight")

    @property
    def brow(self) -> F32:
        return self.of("browInnerUp", "browOuterUpLeft", "browOuterUpRight")

    @property
    def frown(self) -> F32:
        return self.of("browDownLeft", "browDownRight")

    @property
    def blink(self) -> F32:
        return self.of("eyeBlinkLeft", "eyeBlinkRight")

    @property
    def sway_px(self) -> float:
        """How far the outer corners of the eyes come, from their mean, on average."""
        corners = np.array([face.points_px[[33, 263], :2] for face in self.faces])
        return float(np.linalg.norm(corners - corners.mean(axis=0), axis=2).mean())

    @property
    def yaw_deg(self) -> F32:
        return np.array([fit_pose(face.points_px).yaw_deg for face in self.faces])


Run = Callable[..., Shown]


def shown(path: Path) -> Shown:
    faces = tuple(face for _, face in watched(path, nets()) if face is not None)
    assert faces
    return Shown(faces)


@pytest.fixture(scope="module")
def run(pipeline: Pipeline, still: Path, folder: Path) -> Run:
    """Make a video of the portrait and find the face in it again; each only once."""
    made: dict[str, Shown] = {}

    def shown_of(**options: Any) -> Shown:
        key = repr(sorted(options.items()))
        if key not in made:
            out = folder / f"out{len(made)}.mp4"
            pipeline.lipsync(still, out, **options)
            made[key] = shown(out)
        return made[key]

    return shown_of


def test_marks_in_the_text_show_at_their_words_and_are_not_spoken(run: Run) -> None:
    text = "[surprised:0.8] Look at that! [angry:1] Take it away. [neutral] Thank you."
    plain = Marked.of(text).text
    marked, calm = run(text=text, alive=False), run(text=plain, alive=False)
    assert len(marked.faces) == len(calm.faces), "the marks are not spoken"
    starts = [round(chunk.phones[0].start_ms / 40) for chunk in speak(plain)]
    parts = (slice(0, starts[1] - 6), slice(starts[1] + 6, starts[2] - 4), slice(starts[2] + 10, None))
    up, down = marked.brow - calm.brow, marked.frown - calm.frown
    assert [float(up[part].mean()) > 0.15 for part in parts] == [True, False, False]
    assert [float(down[part].mean()) > 0.1 for part in parts] == [False, True, False]
    assert max(abs(float(up[parts[2]].mean())), abs(float(down[parts[2]].mean()))) < 0.05, "neutral is the plain face"
    assert np.abs(np.diff(up)).max() < 0.25, "no jump"


def test_auto_shows_the_mood_of_the_words(run: Run) -> None:
    (glad, sad), plain = (
        [run(text=text, alive=False, **options) for text in (GLAD, SAD)] for options in ({"expression": "auto"}, {})
    )
    smile = [float((one.smile - other.smile)[20:].mean()) for one, other in zip((glad, sad), plain, strict=True)]
    assert smile[0] > 0.05 and smile[1] < smile[0] - 0.08
    accents = [float((one.brow - other.brow)[5:].max()) for one, other in zip((glad, sad), plain, strict=True)]
    assert max(accents) > 0.08, "stressed words move the brows"


def test_a_portrait_is_alive_unless_it_is_frozen(run: Run) -> None:
    alive, frozen = run(text=GLAD, seed=SEED), run(text=GLAD, alive=False)
    assert alive.blink.max() > frozen.blink.max() + 0.2, "it blinks"
    assert np.ptp(alive.yaw_deg) > 0.7
    assert alive.sway_px > 3 * frozen.sway_px, "the eyes' corners, which the lips do not move"
    assert abs(float(np.median(alive.smile)) - float(np.median(frozen.smile))) < 0.1


@pytest.mark.slow
def test_a_track_and_an_expression_of_ones_own(run: Run, pipeline: Pipeline) -> None:
    plain = run(text=GLAD, alive=False)
    track = [{"time_s": 0.0, "expression": "neutral"}, {"time_s": 2.0, "expression": {"browUp": 0.8}, "ease": "linear"}]
    rising = (run(text=GLAD, alive=False, expression_track=track).brow - plain.brow)[:50]
    assert rising[-1] > 0.2 and np.corrcoef(rising, np.arange(len(rising)))[0, 1] > 0.85
    ExpressionStore(pipeline.settings.data_dir).add(Custom("mine", {"browInnerUp": 1.0, "browOuterUpLeft": 0.9}))
    mine = run(text=GLAD, alive=False, expression="mine:0.8")
    assert float(np.median(mine.of("browInnerUp") - plain.of("browInnerUp"))) > 0.15


def test_a_video_stays_as_it_is_unless_asked(pipeline: Pipeline, folder: Path) -> None:
    source, wav = folder / "in.mp4", folder / "words.wav"
    make_video(source, [moved(dx=i) for i in range(12)], rate=Fraction(25))
    write_wav(speak("Papa."), wav)
    outs = [folder / f"video{i}.mp4" for i in range(3)]
    pipeline.lipsync(source, outs[0], audio=wav, fit="trim")
    pipeline.lipsync(source, outs[1], audio=wav, fit="trim", alive=False, expression="neutral")
    pipeline.lipsync(source, outs[2], audio=wav, fit="trim", expression="browUp:0.6")
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert float(np.median(shown(outs[2]).brow - shown(outs[0]).brow)) > 0.15


def test_a_stream_changes_its_expression_while_it_runs(pipeline: Pipeline) -> None:
    picture, rate = moved(), Fraction(25)
    clips = (Clip(Frames((picture,) * 4, start, rate)) for start in range(0, 120, 4))
    script = pipeline.script("neutral")
    brows: list[float] = []
    audio = (chunk.audio for chunk in speak("All of this is one long and rather even sentence."))
    for clip in pipeline.clips(clips, audio, script=script):
        assert clip.track is not None and clip.track.faces[-1] is not None
        crop = Crop.of_points(clip.track.faces[-1].points_px)
        face = nets().face(clip.frames.pictures[-1], crop)
        assert face is not None
        brows.append(float(face.blendshapes[INDEX["browInnerUp"]]))
        script.set("browUp:0.7")
    assert brows[-1] > brows[0] + 0.2


def test_the_command_line_takes_it_all(cli: Callable[..., Any], still: Path, folder: Path) -> None:
    track, style, out = folder / "track.json", folder / "manner.json", folder / "cli.mp4"
    track.write_text('[{"time_s": 0, "expression": "browUp:0.4"}]')
    Style(1.1, {"browOuterUp": 0.2}, Manner()).write(style)
    asked = ("--expression", "browInnerUp:0.2", "--expression-track", track, "--style", style, "--frozen")
    ran = cli("lipsync", still, "--text", "[neutral] Hi.", "-o", out, *asked, "--preset", "ultrafast", "--json")
    assert ran.code == 0, ran.err
    plain = folder / "cli-plain.mp4"
    assert cli("lipsync", still, "--text", "Hi.", "-o", plain, "--frozen", "--preset", "ultrafast", "-q").code == 0
    assert len(shown(out).faces) == len(shown(plain).faces)
    assert float(np.median(shown(out).of("browOuterUpLeft") - shown(plain).of("browOuterUpLeft"))) > 0.08
    wrong = cli("lipsync", still, "--text", "[hapy] Hi.", "-o", out, "--json")
    assert wrong.code == 3 and "happy" in wrong.out


def test_the_smile_of_a_speaker_goes_to_another_face(run: Run, folder: Path) -> None:
    picture = portrait()
    (detection,) = nets().detect(picture)
    face = nets().face(picture, detection.crop, settle=2)
    assert face is not None
    smiles, worn = [], []
    for number, look in enumerate(({"mouthSmile": -1.0, "mouthFrown": 0.8}, {})):  # the portrait smiles of itself
        controls = look_of(look)[:BLENDSHAPES]
        made = expressed(picture, face.points_px, controls, STILL, load_basis())
        clip = make_video(folder / f"smile{number}.mp4", [made] * 45, Fraction(10))
        style = learn_style(clip)
        smiles.append(style.rest.get("mouthSmile", 0.0))
        style.write(folder / f"smile{number}.json")
        worn.append(run(text="Papa.", alive=False, style=folder / f"smile{number}.json").smile)
    assert smiles[1] > smiles[0] + 0.1, "it is learned"
    assert float(np.median(worn[1])) > float(np.median(worn[0])) + 0.05, "and shown"


@pytest.mark.slow
def test_a_style_goes_from_one_face_to_another(run: Run, pipeline: Pipeline, still: Path, folder: Path) -> None:
    """Two manners, learned from speakers made of the portrait, are given to the portrait again."""
    text = "Papa moved the other bath away from me, and then he went home again."
    manners = (Style(1.4, {}, Manner(30, (2.2, 1.6, 1.2), 2.0)), Style(0.7, {}, Manner(6, (0.3, 0.2, 0.2), 0.3)))
    learned, worn = [], []
    for number, style in enumerate(manners):
        clip = folder / f"speaker{number}.mp4"
        pipeline.lipsync(still, clip, text=f"{text} {text}", style=style.as_dict(), seed=2)
        learned.append(learn_style(clip))
        learned[-1].write(folder / f"style{number}.json")
        worn.append(run(text=text, style=folder / f"style{number}.json", seed=5))
    lively, quiet = learned
    assert lively.amplitude > 1.3 * quiet.amplitude
    assert lively.manner.sway_deg[0] > 1.6 * quiet.manner.sway_deg[0]
    assert lively.manner.brows > quiet.manner.brows
    gaps = [np.std([mouth_gap(face) for face in one.faces]) for one in worn]
    assert gaps[0] > 1.2 * gaps[1]
    assert worn[0].yaw_deg.std() > 1.6 * worn[1].yaw_deg.std()


def mouth_gap(face: Face) -> float:
    points = fit_pose(face.points_px).to_face(face.points_px)
    return float(points[[87, 14, 317], 1].mean() - points[[82, 13, 312], 1].mean())
