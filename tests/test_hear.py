"""The hear stage: features, resampling, voice activity, and the samples that travel with the pictures."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from beavervision.errors import MediaError, NoAudioError
from beavervision.media import F32, Audio, Clip, Frames, Phone, Picture, pictures_for, sample_at
from beavervision.models.cards import load_data
from beavervision.models.runtime import OnnxNet
from beavervision.stages.hear import (
    FRONT_ENDS,
    LOG_MEL,
    LOG_MEL_DENSE,
    WAV2LIP_MEL,
    Hear,
    Resampler,
    RowStream,
    VoiceStream,
    syncnet_mfcc,
)

FEATURES = Path(__file__).parents[2] / "shared" / "reference" / "audio_features_io.npz"
shared = pytest.mark.skipif(not FEATURES.is_file(), reason="needs ../shared/reference: the published code's features")
PICTURE = Picture(np.zeros((2, 2), np.uint8), np.zeros((1, 1), np.uint8), np.zeros((1, 1), np.uint8))


def noise(*shape: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * np.float32(0.1)


def cuts(samples: int, longest: int, seed: int = 0) -> Iterator[slice]:
    rng = np.random.default_rng(seed)
    at = 0
    while at < samples:
        stop = min(at + int(rng.integers(1, longest)), samples)
        yield slice(at, stop)
        at = stop


def sound(pcm: F32, rate_hz: int, longest: int = 3000) -> Iterator[Audio]:
    for cut in cuts(pcm.shape[1], longest):
        yield Audio(pcm[:, cut], rate_hz, cut.start)


def clips(pictures: int, rate: Fraction, size: int = 8, closed: list[bool] | None = None) -> Generator[Clip]:
    try:
        for start in range(0, pictures, size):
            yield Clip(Frames((PICTURE,) * min(size, pictures - start), start, rate))
    finally:
        if closed is not None:
            closed.append(True)


class SilentNet:
    """Stands in for the voice net where speech does not matter."""

    def __call__(self, *inputs: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]:
        return np.zeros((1, 1), np.float32), inputs[1]


@pytest.fixture(scope="module")
def vad() -> OnnxNet:
    return OnnxNet(load_data("silero_vad.onnx"))


# --- features ---------------------------------------------------------------------------------------------------------


@shared
@pytest.mark.shared
def test_features_are_the_published_ones() -> None:
    reference = np.load(FEATURES)
    mel = WAV2LIP_MEL.rows(reference["pcm16"].astype(np.float32) / 32768)
    assert mel.shape == reference["wav2lip_mel"].T.shape
    assert np.abs(mel.T - reference["wav2lip_mel"]).max() < 1e-5
    mfcc = syncnet_mfcc(reference["pcm16"])
    assert mfcc.shape == reference["syncnet_mfcc"].shape
    assert np.abs(mfcc - reference["syncnet_mfcc"]).max() < 1e-4


@pytest.mark.parametrize("front_end", FRONT_ENDS.values(), ids=FRONT_ENDS)
def test_rows_do_not_depend_on_the_cuts(front_end: object) -> None:
    assert front_end in (LOG_MEL, LOG_MEL_DENSE, WAV2LIP_MEL)
    pcm = noise(20_000)
    whole = front_end.rows(pcm, first=-7)
    for longest in (37, 5000):
        stream = RowStream(front_end, -7)
        rows = np.concatenate([stream.push(pcm[cut]) for cut in cuts(len(pcm), longest)])
        assert len(whole) - 5 < len(rows) <= len(whole)
        assert np.abs(rows - whole[: len(rows)]).max() < 1e-6


def test_log_mel_rows_are_centred_on_their_time() -> None:
    pcm = np.zeros(16_000, np.float32)
    pcm[8_000] = 1.0
    loudness = LOG_MEL.rows(pcm).sum(axis=1)
    assert len(loudness) == 101 and loudness.argmax() == 50
    assert loudness[48] == loudness[0] == pytest.approx(64 * np.log(1e-5), rel=1e-6)
    tone = np.sin(2 * np.pi * 1000 * np.arange(16_000) / 16_000)
    assert LOG_MEL.rows(tone)[50].argmax() in (20, 21)  # 1 kHz is mel 15 of 0.9 to 44.5 on Slaney's scale
    assert np.abs(LOG_MEL_DENSE.rows(pcm)[::2] - LOG_MEL.rows(pcm)).max() < 1e-6


# --- resampling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 96_000, 192_000])
def test_resampling_keeps_time_and_does_not_depend_on_the_cuts(rate_hz: int) -> None:
    samples = rate_hz // 2 + 17
    t = np.arange(samples) / rate_hz
    pcm = np.stack([np.sin(2 * np.pi * 440 * t), np.zeros(samples)]).astype(np.float32)
    stream = Resampler(rate_hz)
    whole = np.concatenate([stream.push(pcm), stream.end()])
    assert len(whole) == -(-samples * 16_000 // rate_hz)
    want = np.sin(2 * np.pi * 440 * np.arange(len(whole)) / 16_000) / 2
    assert np.abs(whole - want)[100:-100].max() < 1e-4
    stream = Resampler(rate_hz)
    cut = np.concatenate([*(stream.push(pcm[:, c]) for c in cuts(samples, 900)), stream.end()])
    assert np.abs(cut - whole).max() < 1e-9


@pytest.mark.parametrize("rate_hz", [8_000, 44_100, 48_000])
def test_an_impulse_stays_where_it_was(rate_hz: int) -> None:
    pcm = np.zeros((1, rate_hz), np.float32)
    pcm[0, rate_hz // 3] = 1
    stream = Resampler(rate_hz)
    out = np.concatenate([stream.push(pcm), stream.end()])
    assert abs(int(np.abs(out).argmax()) - (rate_hz // 3) * 16_000 / rate_hz) <= 1


def test_what_16_khz_cannot_hold_is_removed() -> None:
    t = np.arange(48_000) / 48_000
    stream = Resampler(48_000)
    out = stream.push(np.sin(2 * np.pi * 10_000 * t)[None].astype(np.float32))
    assert np.abs(out[200:-200]).max() < 1e-3


# --- voice activity ---------------------------------------------------------------------------------------------------


def test_speech_is_found_in_noise_and_noise_is_none(vad: OnnxNet) -> None:
    hibari = pytest.importorskip("hibari", reason="needs hibari-tts for speech")
    speech = hibari.Hibari()("Good morning, everyone. We are going to talk about the weather.", seed=1)
    stream = Resampler(24_000)
    speech = np.concatenate(
        [np.zeros(8_000), stream.push(speech[None].astype(np.float32)), stream.end(), np.zeros(16_000)]
    )
    power = np.mean(speech[8_000:-16_000] ** 2)
    hiss = np.random.default_rng(0).standard_normal(len(speech)) * np.sqrt(power / 10)
    chunks = speech[: len(speech) // 512 * 512].reshape(-1, 512)
    loud = np.sqrt((chunks**2).mean(axis=1)) > 0.02
    for mixed in (speech, speech + hiss):
        voice = np.array(VoiceStream(vad).push(mixed))[: len(loud)]
        assert np.mean(voice[loud] > 0.5) > 0.9
        assert voice[:12].max() < 0.2 and voice[-12:].max() < 0.2
    assert max(VoiceStream(vad).push(hiss)) < 0.2
    assert max(VoiceStream(vad).push(np.zeros(32_000))) < 0.2


def test_voice_does_not_depend_on_the_cuts(vad: OnnxNet) -> None:
    pcm = noise(9_000).astype(np.float64)
    stream = VoiceStream(vad)
    found = [p for cut in cuts(len(pcm), 700) for p in stream.push(pcm[cut])]
    assert found == pytest.approx(VoiceStream(vad).push(pcm), abs=1e-6)


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30_000, 1001), Fraction(24), Fraction(60_000, 1001)])
@pytest.mark.parametrize("rate_hz", [44_100, 48_000])
def test_every_sample_travels_with_its_picture(rate: Fraction, rate_hz: int) -> None:
    pcm = noise(2, rate_hz * 3 + 123)
    hear = Hear("logmel", 200, 160, SilentNet())
    closed: list[bool] = []
    out = list(hear(clips(10_000, rate, closed=closed), sound(pcm, rate_hz)))
    pictures = sum(len(clip) for clip in out)
    assert pictures == pictures_for(pcm.shape[1], rate, rate_hz)
    assert closed
    for clip in out:
        assert clip.audio is not None and clip.audio.start == sample_at(clip.frames.start, rate, rate_hz)
        assert clip.audio.start + clip.audio.samples == sample_at(clip.frames.stop, rate, rate_hz)
    heard = np.concatenate([clip.audio.pcm for clip in out if clip.audio], axis=1)
    np.testing.assert_array_equal(heard[:, : pcm.shape[1]], pcm)
    assert not heard[:, pcm.shape[1] :].any()


def test_features_cover_the_clip_and_its_surroundings() -> None:
    pcm = noise(1, 16_000 * 2)
    rate = Fraction(30_000, 1001)
    whole = LOG_MEL.rows(np.pad(pcm[0], (0, 16_000)), first=-100)
    for size in (1, 7, 16):
        for clip in Hear("logmel", 250, 160, SilentNet())(clips(60, rate, size), sound(pcm, 16_000)):
            assert clip.heard is not None and clip.heard.hop == Fraction(1, 100)
            begin, end = clip.frames.start / rate, clip.frames.stop / rate
            first, stop = clip.heard.start, clip.heard.start + len(clip.heard.rows)
            assert first / 100 <= begin - Fraction(1, 4) < (first + 1) / 100
            # A last clip that was shortened keeps to the same rule.
            assert (stop - 2) / 100 < end + Fraction(16, 100) <= (stop - 1) / 100
            assert np.abs(clip.heard.rows - whole[100 + first : 100 + stop]).max() < 1e-6
            assert clip.heard.voice.shape == (len(clip),)


def test_phones_are_told_around_each_clip_however_the_sound_is_cut() -> None:
    phones = [Phone("a", at, at + 50) for at in range(30, 1950, 90)]

    def told(sizes: int, longest: int) -> Iterator[tuple[float, float, tuple[Phone, ...]]]:
        blocks = (
            replace(b, phones=tuple(p for p in phones if b.start <= p.start_ms * 16 < b.start + b.samples))
            for b in sound(noise(1, 32_000), 16_000, longest)
        )
        for clip in Hear("logmel", 200, 160, SilentNet())(clips(60, Fraction(25), sizes), blocks):
            assert clip.heard is not None
            yield clip.frames.start * 40, clip.frames.stop * 40, clip.heard.phones

    for sizes in (1, 8):
        one, other = list(told(sizes, 500)), list(told(sizes, 20_000))
        assert one == other
        for begin_ms, end_ms, found in one:
            assert list(found) == [p for p in phones if p.start_ms < end_ms + 160 and p.end_ms > begin_ms - 300]


def test_speech_that_is_coming_is_known_beforehand() -> None:
    class Loud:
        """Speech is what is not silent."""

        def __call__(self, *inputs: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]:
            return np.full((1, 1), np.abs(inputs[0]).max() > 0.01, np.float32), inputs[1]

    pcm = noise(1, 48_000)
    pcm[:, : 16_000 * 2] = 0
    for coming_ms, before in ((0, 3), (700, 18)):
        hear = Hear("logmel", 200, 160, Loud(), coming_ms=coming_ms)
        heard = [c.heard for c in hear(clips(75, Fraction(25)), sound(pcm, 16_000)) if c.heard]
        voice, coming = np.concatenate([h.voice for h in heard]), np.concatenate([h.coming for h in heard])
        assert 50 - int(voice.argmax()) in (3, 4)  # 120 ms, in chunks of 32 ms
        assert 50 - int(coming.argmax()) in (before, before + 1)


def test_sound_is_read_no_further_than_needed() -> None:
    read = 0

    def source() -> Iterator[Audio]:
        nonlocal read
        while True:
            yield Audio(np.zeros((1, 480), np.float32), 48_000, read)
            read += 480

    stream = Hear("logmel", 200, 160, SilentNet())(clips(10_000, Fraction(25), 4), source())
    for count in range(1, 50):
        next(stream)
        assert read / 48_000 <= count * 0.16 + 0.16 + 0.05  # a row's window, the resampler's, and one chunk
    assert isinstance(stream, Generator)
    stream.close()


def test_one_long_chunk_is_worked_on_in_pieces() -> None:
    pcm = noise(1, 48_000 * 30)
    out = Hear("logmel", 200, 160, SilentNet())(clips(10_000, Fraction(25)), iter([Audio(pcm, 48_000)]))
    assert sum(len(clip) for clip in out) == 750


def test_the_picture_can_go_on_in_silence() -> None:
    pcm = noise(1, 48_000)
    out = list(Hear("logmel", 0, 0, SilentNet())(clips(60, Fraction(25)), sound(pcm, 48_000), keep_picture=True))
    assert sum(len(clip) for clip in out) == 60
    heard = np.concatenate([clip.audio.pcm for clip in out if clip.audio], axis=1)
    assert heard.shape == (1, 60 * 1920)
    np.testing.assert_array_equal(heard[:, :48_000], pcm)
    assert not heard[:, 48_000:].any()


def test_a_picture_that_ends_first_cuts_the_sound_and_says_so() -> None:
    hear = Hear("logmel", 0, 100, SilentNet())
    notes: list[str] = []
    short = list(hear(clips(20, Fraction(25)), sound(noise(1, 48_000), 48_000), on_note=notes.append))
    assert sum(len(clip) for clip in short) == 20 and len(notes) == 1
    exact = list(hear(clips(25, Fraction(25)), sound(noise(1, 48_000), 48_000), on_note=notes.append))
    assert sum(len(clip) for clip in exact) == 25 and len(notes) == 1


def test_background_is_heard_but_not_listened_to() -> None:
    speech, behind = noise(2, 48_000), noise(2, 30_000, seed=1)
    hear = Hear("logmel", 200, 160, SilentNet())
    plain = list(hear(clips(99, Fraction(25)), sound(speech, 48_000)))
    mixed = list(
        hear(clips(99, Fraction(25)), sound(speech, 48_000), background=sound(behind, 48_000), background_level=0.5)
    )
    heard = np.concatenate([clip.audio.pcm for clip in mixed if clip.audio], axis=1)
    np.testing.assert_allclose(heard, speech + np.pad(behind, ((0, 0), (0, 18_000))) / 2, atol=1e-6)
    for a, b in zip(plain, mixed, strict=True):
        assert a.heard is not None and b.heard is not None
        np.testing.assert_array_equal(a.heard.rows, b.heard.rows)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (lambda: iter(()), NoAudioError, "empty"),
        (lambda: iter([Audio(np.zeros((1, 0), np.float32), 48_000)]), NoAudioError, "empty"),
        (lambda: iter([Audio(noise(1, 500), 48_000), Audio(noise(2, 500), 48_000, 500)]), MediaError, "channels"),
        (lambda: iter([Audio(noise(1, 500), 48_000), Audio(noise(1, 500), 48_000, 700)]), MediaError, "gap"),
    ],
)
def test_unusable_sound_is_refused(source: Callable[[], Iterator[Audio]], error: type[Exception], message: str) -> None:
    closed: list[bool] = []
    stream = Hear("logmel", 0, 100, SilentNet())(clips(20, Fraction(25), closed=closed), source())
    with pytest.raises(error, match=message):
        list(stream)


def test_voice_is_the_loudest_chunk_of_each_picture() -> None:
    class Counting:
        count = 0

        def __call__(self, *inputs: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.generic], ...]:
            self.count += 1
            return np.full((1, 1), self.count, np.float32), inputs[1]

    out = list(Hear("logmel", 0, 0, Counting())(clips(25, Fraction(25)), sound(noise(1, 16_000), 16_000)))
    voice = np.concatenate([clip.heard.voice for clip in out if clip.heard])
    assert voice.tolist() == [-(-((i + 1) * 640) // 512) for i in range(25)]
