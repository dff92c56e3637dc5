"""The measures against known values, the bench and the following on small real runs."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from rich.console import Console

from beavervision.errors import BeaverVisionError, InputError, MediaError, OutputError, UsageError
from beavervision.evaluate import bench as bench_module
from beavervision.evaluate import follow as follow_module
from beavervision.evaluate import scores
from beavervision.evaluate import table as table_module
from beavervision.evaluate.alone import call_alone
from beavervision.evaluate.articulation import ArticulationReport, Share
from beavervision.evaluate.bench import BenchReport, MemoryReport, bench, compare_memory, format_table
from beavervision.evaluate.follow import (
    ClipFollow,
    Control,
    FollowReport,
    MouthTrace,
    TalkerRow,
    follow,
    mouth_trace,
    still_of,
    talker_rows,
)
from beavervision.evaluate.samples import portrait
from beavervision.evaluate.sheets import sheets
from beavervision.evaluate.tracks import FaceTrace, face_trace
from beavervision.models import mesh
from beavervision.models.face import FaceNets
from beavervision.pipeline import Pipeline
from beavervision.stages.decode import Decode
from tests.media_factory import make_sound


def _random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def test_pearson_is_numpys_and_leaves_out_what_is_unknown() -> None:
    a, b = np.random.default_rng(1).normal(size=(2, 50))
    known = np.ones(50, bool)
    known[[3, 20]] = False
    a_holes, b_holes = a.copy(), b.copy()
    a_holes[3], b_holes[20] = np.nan, np.nan
    assert scores.pearson(a, b) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert scores.pearson(a_holes, b_holes) == pytest.approx(np.corrcoef(a[known], b[known])[0, 1])
    assert scores.pearson(3 * a + 1, a) == pytest.approx(1)
    assert math.isnan(scores.pearson(np.ones(50), b))
    assert math.isnan(scores.pearson(a[:4], b[:4]))


@pytest.mark.parametrize("late", [-3.0, 0.0, 2.0, 4.3])
def test_best_lag_is_positive_when_the_made_one_is_late(late: float) -> None:
    t = np.arange(120)

    def mouth(at: np.ndarray) -> np.ndarray:
        return np.sin(at / 3) + 0.7 * np.sin(at / 7.3 + 1)

    lag = scores.best_lag(0.2 * mouth(t - late) + 5, mouth(t), 10)
    assert lag is not None
    assert lag.pictures == round(late)
    assert lag.fine == pytest.approx(late, abs=0.1)
    assert lag.r > 0.98


def test_best_lag_without_any_motion_or_clock() -> None:
    assert scores.best_lag(np.zeros(40), np.arange(40.0), 5) is None
    with pytest.raises(ValueError, match="cannot be compared"):
        scores.best_lag(np.zeros(40), np.zeros(41), 5)


def test_landmark_distance_is_in_eye_distances() -> None:
    truth = np.random.default_rng(0).normal(size=(7, 20, 2)).astype(np.float32) * 50
    made = truth + np.array([3, 4], np.float32)
    assert scores.landmark_distance(made, truth, np.full(7, 50, np.float32)) == pytest.approx(0.1, rel=1e-4)


def test_psnr_of_a_constant_error() -> None:
    truth = _random(40, 30, 3) // 2
    assert scores.psnr(truth + 10, truth) == pytest.approx(10 * math.log10(255**2 / 100), abs=1e-4)
    assert scores.psnr(truth, truth) == math.inf


def test_ssim_of_flat_images_follows_the_formula() -> None:
    a, b = np.full((32, 32), 100, np.uint8), np.full((32, 32), 150, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert scores.ssim(a, b) == pytest.approx((2 * 100 * 150 + c1) / (100**2 + 150**2 + c1))
    assert scores.ssim(a, a) == pytest.approx(1)
    with pytest.raises(ValueError, match="11 px"):
        scores.ssim(a[:10], b[:10])


def test_ssim_equals_the_definition_window_by_window() -> None:
    x = _random(20, 17).astype(float)
    y = np.clip(x + np.random.default_rng(5).normal(0, 40, x.shape), 0, 255).astype(np.uint8).astype(float)
    offsets = np.arange(11) - 5
    bell = np.exp(-(offsets**2) / (2 * 1.5**2))
    weights = np.outer(bell, bell) / bell.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for i in range(10):
        for j in range(7):
            p, q = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
            mp, mq = (weights * p).sum(), (weights * q).sum()
            vp, vq = (weights * (p - mp) ** 2).sum(), (weights * (q - mq) ** 2).sum()
            cov = (weights * (p - mp) * (q - mq)).sum()
            found.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert scores.ssim(x.astype(np.uint8), y.astype(np.uint8)) == pytest.approx(np.mean(found), abs=1e-6)


def test_sharpness_ratio_scales_with_contrast_squared() -> None:
    truth = _random(40, 40) // 2 * 2
    assert scores.sharpness_ratio(truth // 2, truth) == pytest.approx(0.25, rel=1e-4)
    assert math.isnan(scores.sharpness_ratio(truth, np.full_like(truth, 7)))


def test_flicker_is_the_deviation_of_noise_and_nothing_for_even_motion() -> None:
    noise = np.random.default_rng(2).normal(128, 6, (200, 16, 16)).round().astype(np.uint8)
    even = np.repeat(np.arange(60, dtype=np.uint8), 16).reshape(60, 4, 4)
    inside = np.zeros((16, 16), bool)
    inside[:8] = True
    still = noise.copy()
    still[:, ~inside] = 100
    assert scores.flicker(noise) == pytest.approx(6, rel=0.02)
    assert scores.flicker(even) == 0
    assert scores.flicker(still, ~inside) == 0
    assert scores.flicker(still, inside) == pytest.approx(6, rel=0.03)
    with pytest.raises(ValueError, match="three"):
        scores.flicker(noise[:2])


def test_share_changed_counts_only_outside_of_the_mask() -> None:
    source = _random(10, 10, 3)
    mask = np.zeros((10, 10), bool)
    mask[:5] = True
    made = source.copy()
    made[:5] ^= 255
    assert scores.share_changed(made, source, mask) == 0
    made[9, 9, 1] ^= 1
    assert scores.share_changed(made, source, mask) == pytest.approx(1 / 50)
    assert scores.share_changed(made, source, np.ones((10, 10), bool)) == 0


# A process of its own ------------------------------------------------------------------------------


_JOBS = """
from beavervision.errors import MediaError
def answer(*, on_progress, **options):
    print("not an answer")
    on_progress(1, None)
    return options
def refuse(*, on_progress):
    raise MediaError("it is damaged. Use another.")
def collapse(*, on_progress):
    raise RuntimeError("boom")
"""


def test_a_process_of_its_own_answers_and_its_errors_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "jobs_of_a_test.py").write_text(_JOBS, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(bench_module.__file__).parents[2]}")
    jobs = import_module("jobs_of_a_test")
    told: list[tuple[int, int | None]] = []
    assert call_alone(jobs.answer, {"a": [1, "x"]}, lambda done, total: told.append((done, total))) == {"a": [1, "x"]}
    assert told == [(1, None)]
    with pytest.raises(MediaError, match="damaged"):
        call_alone(jobs.refuse, {})
    with pytest.raises(BeaverVisionError, match="ended with 1: RuntimeError: boom"):
        call_alone(jobs.collapse, {})


# Bench ---------------------------------------------------------------------------------------------


def _printed(table: Any) -> str:
    page = io.StringIO()
    Console(width=160, file=page).print(table)
    return page.getvalue()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(bench_module.__file__).parents[2]))


@pytest.mark.usefixtures("installed")
def test_bench_measures_a_real_run() -> None:
    told: list[tuple[int, int | None]] = []
    report = bench(
        seconds=1,
        size="360p",
        rate="30000/1001",
        preset="ultrafast",
        model="beaver",
        device="cpu",
        compare=False,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert (report.pictures, report.rate, report.size_px) == (30, "30000/1001", (640, 360))
    assert [s.name for s in report.stages] == ["decode", "detect", "hear", "lipsync", "render", "watch", "encode"]
    assert report.process_cpu_ms >= report.stages_cpu_ms > 5
    assert next(s for s in report.stages if s.name == "detect").cpu_ms > 2, "tracking had nothing to do"
    assert 50 < report.peak_memory_mb < 4000
    assert 0 < report.first_picture_ms < report.elapsed_s * 1e3
    assert report.times_real_time == pytest.approx(report.pictures_per_s / (30000 / 1001), abs=1e-3)
    assert told[-1][0] == 30
    again = json.loads(json.dumps(report.as_dict()))
    assert again["machine"]["cores"] >= 1
    assert again["stages_cpu_ms"] == pytest.approx(report.stages_cpu_ms, abs=1e-3)


@pytest.mark.usefixtures("installed")
def test_bench_measures_on_a_video_of_ones_own(tmp_path: Path) -> None:
    own = tmp_path / "own.mp4"
    bench_module._make_source(own, 1, (320, 256), Fraction(20))
    report = bench(source=own, preset="ultrafast", device="cpu", compare=False)
    assert (report.pictures, report.rate, report.size_px) == (20, "20", (320, 256))
    assert list(tmp_path.iterdir()) == [own]
    with portrait() as still, pytest.raises(UsageError, match="no video"):
        bench(source=still)


def test_the_source_lasts_as_long_as_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_module, "_CYCLE_S", 1)
    bench_module._make_source(tmp_path / "s.mp4", 2.5, (640, 360), Fraction(24))
    with av.open(str(tmp_path / "s.mp4")) as container:
        times = [f.pts * f.time_base for f in container.decode(video=0) if f.pts is not None and f.time_base]
    assert times == [Fraction(i, 24) for i in range(60)]


@pytest.mark.torch
def test_the_comparison_times_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="exporting the Wav2Lip generator needs the gpu extra")
    pytest.importorskip("onnx", reason="exporting the Wav2Lip generator needs the gpu extra")
    monkeypatch.setattr(bench_module, "_ROUNDS", 1)
    monkeypatch.setattr(bench_module, "_COMPARED_BLOCKS", 2)
    bench_module._make_source(tmp_path / "s.mp4", 1, (640, 360), Fraction(25))
    compared = bench_module.Comparison(**bench_module.time_lipsync(source=str(tmp_path / "s.mp4")))
    assert 0 < compared.networks_ms < compared.beaver_ms
    assert 1 < compared.ratio < compared.networks_ratio


@pytest.mark.parametrize(
    "options", [{"size": "big"}, {"rate": "fast"}, {"rate": 0}, {"seconds": 0}, {"preset": "warp"}]
)
def test_bench_refuses_what_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        bench(**options)
    with pytest.raises(UsageError):
        compare_memory(**{k: (v,) if k == "seconds" else v for k, v in options.items()})


def test_tables_show_the_figures() -> None:
    machine = bench_module.Machine("Abacus 9", 2, 4096, "Linux 6", "3.11.1", {"av": "18.0"}, 1.5, 6.5)
    stages = (bench_module.StageFigures("decode", 3.25, 3.0, 4.0), bench_module.StageFigures("encode", 15.5, 15.0, 9.0))
    report = BenchReport(
        (1280, 720), "25", "veryfast", "beaver", "cpu", 250, 10.0, 8.0, 31.25, 1.25, 400.0, 900.0, 612.0, stages, 40.5,
        machine, bench_module.Comparison(8.0, 3.0, 120.0, 7),
    )  # fmt: skip
    text = _printed(format_table(report))
    for figure in (
        "18.75",
        "40.50",
        "1.25 x real time",
        "612 MB",
        "15.0 times more",
        "40.0 times that",
        "Abacus 9",
        "not quiet",
        "6.5 %",
    ):
        assert figure in text
    memory = MemoryReport((1920, 1080), "ultrafast", (60, 600), (800.0, 840.0))
    assert memory.growth == pytest.approx(0.05)
    assert "+5.0%" in _printed(format_table(memory))


# Following -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talkers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One speaking clip made by the product itself, by ear, whose sound is late by 80 ms, and one without any face."""
    folder = tmp_path_factory.mktemp("talkers")
    pipeline = Pipeline("beaver", device="cpu")
    with portrait() as still:
        pipeline.lipsync(still, folder / "told.mp4", text="Mama, wow! Papa, wow!")
        pipeline.lipsync(still, folder / "made.mp4", audio=folder / "told.mp4")
    late = np.zeros((1, 48000 * 80 // 1000), np.float32)
    with av.open(str(folder / "made.mp4")) as container:
        said = np.concatenate([f.to_ndarray()[:1] for f in container.decode(audio=0)], axis=1)
    make_sound(folder / "late.wav", np.concatenate([late, said], axis=1), 48000)
    with (
        av.open(str(folder / "made.mp4")) as seen,
        av.open(str(folder / "late.wav")) as heard,
        av.open(str(folder / "one.mkv"), "w") as out,
    ):
        streams = [out.add_stream_from_template(c.streams[0]) for c in (seen, heard)]
        for container, stream in zip((seen, heard), streams, strict=True):
            for packet in container.demux(container.streams[0]):
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
    make_sound(folder / "two.wav", said, 48000)
    (folder / "index.tsv").write_text(
        "file\tsplit\tseconds\tsync_lag_s\n"
        "one.mkv\tvalidate\t3\t0.08\ntwo.wav\tvalidate\t3\t\nshort.mp4\tvalidate\t1.2\t\nother.mp4\ttrain\t3\t\n",
        encoding="utf-8",
    )
    return folder


def test_an_offset_at_the_end_of_the_searched_range_was_not_found(tmp_path: Path) -> None:
    lines = [f"{lag}.mp4\tvalidate\t3\t{lag}" for lag in (0.36, 0.38, -0.4, -0.2)]
    (tmp_path / "index.tsv").write_text("\n".join(["file\tsplit\tseconds\tsync_lag_s", *lines]), encoding="utf-8")
    assert [row.late_s for row in talker_rows(tmp_path, "validate")] == [0.36, 0.0, 0.0, -0.2]


def test_follow_finds_the_products_own_mouth_in_time(talkers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEAVERVISION_CRF", "12")  # so that the control tells of the measure more than of the encoder
    told: list[str] = []
    report = follow(
        talkers,
        index_offsets=True,
        model="beaver",
        device="cpu",
        on_progress=lambda done, total, file: told.append(file),
    )
    assert told == ["one.mkv", "two.wav"], "short clips and other splits are left out"
    (clip,) = report.clips
    assert clip.opening_r > 0.8
    assert clip.in_time
    assert abs(clip.lag_ms) < 25, "the sound's offset in the index was not corrected"
    assert "two.wav" in report.left_out
    assert clip.real is not None and clip.real.opening_r > 0.99 and clip.real.lmd < clip.lmd < 0.1
    assert clip.people_mean_lmd is None and clip.chance is None, "there is nobody else"
    figures = json.loads(json.dumps(report.as_dict()))
    assert figures["median_opening_r"] == pytest.approx(clip.opening_r, abs=1e-3)
    assert figures["share_in_time"] == 1
    assert "one.mkv" in _printed(follow_module.format_table(report))


def test_follow_over_footage_that_shows_another_mouth(
    talkers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    # The scorer errs by 40 ms on a mouth that was made, as this clip's.
    monkeypatch.setattr(follow_module.SyncJudge, "sound_late_s", lambda self, video, faces: asked.append(video) or 0.08)
    report = follow(talkers, footage=True, model="beaver", device="cpu")
    (clip,) = report.clips
    assert report.as_dict()["over"] == "footage" and "shifted" in _printed(follow_module.format_table(report))
    assert clip.opening_r > 0.8 and clip.in_time, "the mouth of the footage shows"
    assert (clip.sound_late_s, clip.offset_from) == (0.08, "scorer") and talkers / "one.mkv" in asked
    nets = FaceNets()
    truth = mouth_trace(talkers / "made.mp4", nets)
    shifted = mouth_trace(follow_module._shifted(talkers / "made.mp4", tmp_path / "s.mp4", len(truth.times_s)), nets)
    half = len(truth.times_s) // 2
    rolled, in_place = (scores.pearson(shifted.opening, np.roll(truth.opening, -by)) for by in (half, 0))
    assert rolled > 0.98 and rolled > in_place + 0.2, "both halves sound alike"


def test_the_still_is_a_closed_mouth(talkers: Path, tmp_path: Path) -> None:
    nets = FaceNets()
    faces = face_trace(talkers / "made.mp4", nets)
    number, trace = still_of(faces), MouthTrace.of(faces)
    assert number is not None
    still = follow_module._kept(talkers / "made.mp4", number, tmp_path / "still.png")
    (picture,) = next(iter(Decode(1, extend="none")(still))).frames.pictures
    assert np.isfinite(trace.opening).all()
    face = nets.face(picture, nets.detect(picture)[0].crop, settle=2)
    assert face is not None
    points = mesh.fit_pose(face.points_px).to_face(face.points_px)
    gap = float(points[14, 1] - points[13, 1])
    assert gap < np.quantile(trace.opening, 0.25) + 0.01
    assert np.ptp(trace.opening) > 0.02, "the mouth did not move"
    moved = trace.at(np.array([-1.0, trace.times_s[3], 1e3]))
    assert np.isnan(moved.opening[[0, 2]]).all() and np.isnan(moved.lips[[0, 2]]).all()
    assert moved.opening[1] == trace.opening[3]
    assert np.array_equal(moved.lips[1], trace.lips[3])


def test_the_still_shows_the_head_as_it_is_usually_held() -> None:
    points = np.tile(mesh.canonical(), (6, 1, 1)).astype(np.float32)
    points = np.concatenate([points, np.zeros((6, 10, 3), np.float32)], axis=1)
    points[np.ix_([1, 2, 5], mesh.INNER_LOWER[2:7], [1])] += 0.2  # open
    yaw_deg = np.array([20, 20, 21, 22, 0, 20], np.float32)
    clear = np.array([False, True, True, True, True, True])
    faces = FaceTrace(np.arange(6) / 25, points, yaw_deg, np.zeros(6, np.float32), clear)
    assert still_of(faces) == 3, "closed, and turned as usual"
    assert still_of(replace(faces, clear=np.zeros(6, bool))) is None


def test_a_folder_without_an_index_and_a_split_without_clips(tmp_path: Path, talkers: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        follow(tmp_path)
    (tmp_path / "index.tsv").write_text("name\nx\n", encoding="utf-8")
    with pytest.raises(InputError, match="no index"):
        follow(tmp_path)
    with pytest.raises(InputError, match="no clip"):
        follow(talkers, "test")
    with pytest.raises(UsageError, match="limit"):
        follow(talkers, limit=0)


def test_the_report_is_made_of_medians() -> None:
    rows = [(0.2, 0, 0.0), (0.6, 1, 30.0), (0.7, -5, -200.0)]
    clips = tuple(ClipFollow("f", 3.0, r, r / 2, 1.0, k, ms, r, lmd=r / 10, clip_mean_lmd=0.1) for r, k, ms in rows)
    report = FollowReport("validate", {}, clips, {})
    assert (report.opening_r, report.width_r) == pytest.approx((0.6, 0.3))
    assert report.in_time == pytest.approx(2 / 3)
    assert (report.lmd, report.lmd_of_clip_mean) == pytest.approx((0.06, 0.6))
    assert report.lmd_of_people_mean is None and report.control("real") is None
    controlled = replace(clips[0], people_mean_lmd=0.04, real=Control(0.9, 0.8, True, 0.001))
    report = FollowReport("validate", {}, (*clips[1:], controlled), {})
    assert report.lmd_of_people_mean == pytest.approx(0.5)
    assert report.control("real") == {"opening_r": 0.9, "width_r": 0.8, "lmd": 0.001, "share_in_time": 1.0}


def test_a_mean_mouth_is_that_of_other_people_each_counting_alike() -> None:
    def seen(person: str, value: float, seconds: float = 3.0) -> follow_module._Seen:
        times_s = np.arange(20) / 25
        wave = np.sin(times_s * 30 + value).astype(np.float32)
        lips = np.full((20, 40, 2), value, np.float32)
        trace = MouthTrace(times_s, wave, wave, lips)
        row = TalkerRow(f"{person}{value}.mp4", seconds, 0.0, person)
        return follow_module._Seen(row, trace, trace, trace, scores.Lag(0, 0.0, 1.0), 0.04)

    one = seen("a", 0.0)
    crowd = [one, seen("a", 50.0), seen("b", 1.0), seen("b", 3.0), seen("c", 6.0, seconds=2.0)]
    clip = follow_module._measured(one, crowd)
    # b's mean is 2, c's is 6, and a's own other clip does not count: every point is 4 away in both directions.
    assert clip.people_mean_lmd == pytest.approx(4 * math.sqrt(2), rel=1e-4)
    assert (clip.lmd, clip.clip_mean_lmd) == (0, 0)
    assert clip.real is not None and clip.real.opening_r == 1
    assert clip.chance is not None and clip.chance.opening_r < 0.9, "held against its own words"
    assert follow_module._measured(one, [one]).chance is None


def test_one_clip_of_each_person_is_chosen_over_the_whole_index() -> None:
    rows = [TalkerRow(f"{n}.mp4", 3.0, 0.0, f"p{n // 2}") for n in range(12)]
    assert [row.file for row in follow_module.one_each(rows, 3)] == [f"{n}.mp4" for n in (0, 4, 8, 2, 6, 10)]


# The table and the sheets --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def couple(talkers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same clip as if it were of two people."""
    folder = tmp_path_factory.mktemp("couple")
    lines = ["file\tsplit\tperson\tseconds\tsync_lag_s"]
    for name in ("a", "b"):
        (folder / f"{name}.mkv").symlink_to(talkers / "one.mkv")
        lines.append(f"{name}.mkv\tvalidate\t{name}\t3\t0.08")
    (folder / "index.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_the_table_scores_footage_beside_the_real_video(couple: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEAVERVISION_CRF", "12")  # so that the control tells of the measure more than of the encoder
    share = Share(6, 10, 0.5)
    spoken = ArticulationReport(share, share, share, share, share, share, 0.05, 0.2, 9.0, 1.0, {})
    monkeypatch.setattr(table_module, "articulation", lambda *args, by_ear: spoken)
    report = table_module.table(couple, model="beaver", device="cpu", limit=1)
    (clip,) = report.clips
    assert clip.made.opening_r is not None and clip.made.opening_r > 0.8
    assert clip.made.lag_ms is not None and abs(clip.made.lag_ms) < 30, "the sound's offset was not corrected"
    assert clip.real.opening_r is not None and clip.real.opening_r > 0.99
    assert clip.real.quality > clip.made.quality
    assert clip.real.psnr_db is not None and clip.made.psnr_db is not None
    assert clip.real.psnr_db > clip.made.psnr_db > 20
    assert clip.made.sync_confidence is None, "three seconds are too short for the scorer"
    assert 0.6 < report.articulated < clip.made.quality
    told = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert told["median_made"]["opening_r"] == clip.made.opening_r
    assert "real video" in _printed(table_module.format_table(report))
    assert {panel.title for panel in table_module.panels(report)} >= {"quality", "PSNR dB", "flicker"}


def test_sheets_show_each_person_with_a_text_and_with_anothers_speech(couple: Path, tmp_path: Path) -> None:
    report = sheets(couple, tmp_path / "out", people=2, text="Hello there.", model="beaver", device="cpu")
    assert [(sheet.face, sheet.voice) for sheet in report.sheets] == [
        ("a.mkv", "synthetic"), ("a.mkv", "b.mkv"), ("b.mkv", "synthetic"), ("b.mkv", "a.mkv"),
    ]  # fmt: skip
    for sheet in report.sheets:
        assert Path(sheet.video).stat().st_size and Path(sheet.sheet).read_bytes().startswith(b"\x89PNG")
        assert sheet.drawn == 1
    with pytest.raises(UsageError, match="two people"):
        sheets(couple, tmp_path, people=1)
    with pytest.raises(OutputError):
        sheets(couple, couple / "index.tsv" / "out", people=2)
