"""One live session: text and sound in, moments (a picture and what is heard while it shows) out, on one clock.

Picture `i` is due `i / rate` seconds after the session's beginning, and sample `s` of its sound `s / 48000` seconds after it.
Sound is written to a line ahead of its time; a worker draws the pictures of the stretches that may be speech, some
pictures ahead of theirs. Whoever takes a moment gets the sound of that time in any case, and the picture if it was drawn
in time.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np

from beavervision import metrics
from beavervision.errors import BeaverVisionError, BusyError, TextError, UsageError
from beavervision.expression import Marked, Script, Wanted
from beavervision.expression.script import Asked
from beavervision.live.avatar import Avatar
from beavervision.live.footage import Camera, CameraFootage, Footage, Loop
from beavervision.live.sound import BLOCK, HISTORY, RATE_HZ, Converter, Pauses, Pcm16, SoundLine, pieces
from beavervision.media import BLENDSHAPES, F32, U8, Audio, Clip, Expression, Phone, Picture, sample_at
from beavervision.models.expression import load_basis
from beavervision.speech import SpeechChunk, Voice
from beavervision.stages.express import STILL, expressed

if TYPE_CHECKING:
    from beavervision.live.engine import LiveEngine

WORK_S = 0.05  # between the arrival of the last sample that a picture needs and its time
_SOON_S = 0.08  # a drawing that begins is given at least so long for its first picture
_EARLY_S = 0.25  # before the first sound a drawing begins: lips part before
_AHEAD = 8  # pictures drawn before their time, at most
_WARM = 10  # pictures gone through, undrawn, by a drawing that begins amid sound: its mouth is then where it would be
_LATE = 2  # pictures by which a drawing may be late and still be shown, where there is none in time
_LONGEST_S = 0.25  # that a drawing is reckoned with
_BLOCK = 2  # pictures drawn at once while there is time,
_FIRST_BLOCK = 3  # and at the beginning of a drawing, which costs as much as three: the next ones are then in time
_CATCH_UP = 50  # pictures that one drawing passes over, at most
_SPEAK_AHEAD_S = 12.0  # so much speech is synthesised before its time
_WAITING = 256  # texts, at most
_REST = 0.001  # of the distance of the eyes' outer corners: lips that near to rest are at rest
_FADE = 0.25  # by which a drawing on a mouth that moves by itself comes and goes with each picture,
_LINGER = 8  # so many pictures after the last sound
_NOISE_S = 1.5  # sound without a voice for so long is noise
_GLIDE_S = 0.8  # in which a face comes to a new expression
_SETTLED = 2e-3  # a look that changes less from picture to picture has come to rest,
_UNSETTLED_S = 3.0  # or after so much silence
_SILENCE_S = 0.1  # by which sound and lips come to rest after an interruption
_PAUSE = RATE_HZ // 2  # samples of silence after which no word goes on,
_WAITS = RATE_HZ // 2  # and by which sound that came early is told from a microphone's
_HELD_BACK = RATE_HZ // 10  # samples that conversion to the line's rate keeps to itself, at most
_TICK_S = 0.005  # by which a clock without threads moves on between pieces of work
_KEPT = 2048  # measured values

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Moment:
    """A picture and exactly the samples heard while it shows (mono, 48 kHz, numbered on the session's clock).

    `due_s` is when to show it, on the session's clock. `fresh` is False where the picture is the last one again because the
    right one came too late: an encoder may skip it, never its sound. A picture that did not change is the same object.
    """

    picture: Picture
    audio: Audio
    index: int
    pts: Fraction  # seconds: index / rate
    due_s: float
    fresh: bool
    speaking: bool


@dataclass(frozen=True, slots=True)
class Event:
    """What became of an utterance. `seconds` is how much of it was heard; `message` says why one failed.

    `sample` is where that was on the session's clock: its first sample, one after its last, or where it was cut.
    """

    kind: Literal["started", "finished", "interrupted", "failed"]
    utterance: int
    seconds: float = 0.0
    message: str = ""
    sample: int = 0


class _Told(Script):
    """Keeps what a text says of its expression until it is known when it is said."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[float, Wanted | float]] = []

    def mark(self, time_s: float, wanted: Wanted) -> None:
        self._kept.append((time_s, wanted))

    def said(self, time_s: float, valence: float) -> None:
        self._kept.append((time_s, valence))

    def pass_on(self, script: Script, start_s: float) -> None:
        kept, self._kept = self._kept, []
        for time_s, what in kept:
            if isinstance(what, Wanted):
                script.mark(start_s + time_s, what)
            else:
                script.said(start_s + time_s, what)


class _Later(Script):
    """A script on the session's clock, for stages that count from `base_s`."""

    def __init__(self, script: Script, base_s: float) -> None:
        super().__init__()
        self._of, self._base_s = script, base_s

    def at(self, time_s: float) -> Asked:
        return self._of.at(self._base_s + time_s)


@dataclass(slots=True, eq=False)
class _Utterance:
    """Something said, from its first sample on the line to one after its last, as far as they are known."""

    number: int
    since_s: float  # when it was asked for
    start: int | None = None
    stop: int = 0
    written: int = 0  # samples: fewer than from start to stop where synthesis came late
    complete: bool = False
    begun: bool = False
    chunks: Iterator[SpeechChunk] | None = None  # still to be synthesised
    converter: Converter | None = None
    told: _Told | None = None


@dataclass(slots=True, eq=False)
class _Run:
    """One stretch of drawing. Its stages count pictures from `base` on."""

    first: int
    base: int
    next: int  # the picture to draw next
    asked: range  # the pictures being drawn
    heard: int = 0  # samples handed to the stages
    useful_from: int = 0  # earlier ones are not to be drawn
    level: float = 1.0  # how much of the drawing shows
    quiet: int = 0  # pictures since the last sound, with the lips at rest
    leaves: bool = False
    voiceless: int = 0  # pictures since the last voice, though there is sound
    look: Expression | None = None  # of the last picture
    clips: Iterator[Clip] = field(default_factory=lambda: iter(()))


@dataclass(slots=True)
class _Counts:
    due: int = 0
    drawn: int = 0
    dropped: int = 0
    late: int = 0
    runs: int = 0
    blocks: int = 0
    interrupts: int = 0
    behind_s: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    delay_s: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    say_s: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT))
    skew_s: float = 0.0


class SoundStream:
    """The sound of one caller, as it comes; made by :meth:`LiveSession.stream`.

    What is pushed until :meth:`end` is one utterance, and after an interruption another one. Other callers' streams are theirs
    alone. Callable from any thread.
    """

    def __init__(self, session: LiveSession, rate_hz: int) -> None:
        self.rate_hz = Converter(rate_hz).rate_hz  # which refuses what is out of range
        self._session = session
        # The session's to read and write:
        self.parser = Pcm16()
        self.utterance: _Utterance | None = None
        self.due = 0  # where its next sample would be heard if nobody else said anything
        self.pauses = Pauses()
        self.quiet = 0  # samples since it was last loud

    def push(self, pcm16: bytes) -> int:
        """Speak sound: little-endian 16-bit mono, in pieces of any length. Returns the utterance's number.

        Raises:
            UsageError: the session is closed.
            BusyError: more than a minute of sound waits.
        """
        return self._session._push(self, pcm16)

    def end(self) -> None:
        """What was pushed is complete; half a sample at its end is left out."""
        self._session._end(self)


class LiveSession:
    """Made by :meth:`~beavervision.live.engine.LiveEngine.open`. All methods may be called from any thread."""

    def __init__(
        self,
        engine: LiveEngine,
        name: str,
        source: Avatar | Camera,
        rate: Fraction,
        *,
        voice: Voice,
        speed: float,
        pitch: float,
        seed: int,
        script: Script,
    ) -> None:
        self.id = name
        self.rate = rate
        self._camera = CameraFootage(source, rate, WORK_S) if isinstance(source, Camera) else None
        self._face: Footage = self._camera or Loop(source, rate)  # type: ignore[arg-type]
        self._engine = engine
        self.clock = engine.clock
        self._how: dict[str, Any] = {"voice": voice.name, "speed": speed, "pitch": pitch, "seed": seed}
        reach = engine.pipeline.live_hear(rate).reach(RATE_HZ)
        self._needs = ceil(reach * RATE_HZ)  # samples beyond the end of a picture that its drawing must have
        self._look_ahead_s = float(reach + 1 / rate)
        self._period = _period(rate)
        self._changed = threading.Condition()
        self._line = SoundLine()
        self._next = 0  # the moment to take next
        self._origin_s: float | None = None  # when moment 0 was due; None while nobody takes moments
        self._language = voice.language
        self._seed = seed
        self._script = script
        self._look: Expression | None = None  # what the face expresses that was shown last
        self._glide_until = 0  # the picture by which a new expression is there
        if script.anything and self._camera is None:
            self._glide_until = 1
        self._shown_idle: tuple[Picture, Expression, Picture] | None = None
        self._closed = False
        self._ended = False
        self._failed: BaseException | None = None
        self._numbers = itertools.count(1)
        self._utterances: deque[_Utterance] = deque()  # those that were not heard to their end
        self._stream: SoundStream | None = None  # of push_audio
        self._broken = False  # whether the line ran dry before the text went on
        self._speaking: Future[None] | None = None
        self._run: _Run | None = None
        self._retired: list[_Run] = []  # to be closed by the worker
        self._drawn: dict[int, tuple[Picture, Expression | None]] = {}
        self._idles: dict[int, Picture] = {}  # pictures between drawings that had to be worked on
        self._last: Picture | None = None
        self._last_drawn = False
        self._ease: deque[float] = deque()  # shares of the last drawn picture in the next ones
        self._arrivals: deque[tuple[int, float]] = deque(maxlen=_KEPT)
        self._block_s = 0.02  # that a drawing takes, running mean
        self._counts = _Counts()
        self._listeners: list[Callable[[Event], None]] = []
        self.touched_s = self.clock.now()
        self._worker: threading.Thread | None = None
        if not self.clock.inline:
            self._worker = threading.Thread(target=self._work, name=f"live-{name}", daemon=True)
            self._worker.start()

    # What callers ask for -----------------------------------------------------------------------

    @property
    def size_px(self) -> tuple[int, int]:
        """Width and height of the pictures."""
        return self._face.size_px

    @property
    def has_camera(self) -> bool:
        return self._camera is not None

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def delay_s(self) -> float:
        """From the arrival of streamed sound to its being heard, with its picture: constant."""
        return self._look_ahead_s + WORK_S

    @property
    def watched(self) -> bool:
        """Whether somebody takes moments now."""
        return self._origin_s is not None

    def on_event(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` when utterances begin and end, from the thread that takes the moments, or that interrupts."""
        self._listeners.append(listener)

    def say(self, text: str, *, interrupt: bool = False) -> int:
        """Speak `text` after what is being said, or in its place; returns the utterance's number at once.

        The first sentence is heard while the others are synthesised.

        Args:
            interrupt: fall silent first, as :meth:`interrupt`, but not for a text that is refused.

        Raises:
            TextError: it is empty, or the voice cannot say it.
            BusyError: too many texts wait.
            UsageError: the session is closed.
        """
        marked = Marked.of(text, self._script.custom)
        if not marked.text.strip():
            raise TextError("The text is empty. Give at least one word.")
        told = _Told()
        spoken = self._engine.pipeline.speaker.speak(marked.text, **self._how)
        chunks = marked.follow(spoken, told, language=self._language)
        with self._changed:
            self._touch()
            cut = self._cut()[0] if interrupt else []
            if marked.marks:
                self._script.expect()
            if len(self._utterances) >= _WAITING:
                raise BusyError(f"{_WAITING} texts wait to be said. Wait for some, or interrupt first.")
            utterance = _Utterance(next(self._numbers), self.clock.now(), chunks=chunks, told=told)
            self._utterances.append(utterance)
            self._speak_on()
            self._changed.notify_all()
        self._tell(cut)
        return utterance.number

    def push_audio(self, pcm16: bytes, rate_hz: int) -> int:
        """Speak sound: little-endian 16-bit mono, in pieces of any length. Returns the utterance's number.

        Raises:
            UsageError: the rate is out of range or changed before :meth:`end_audio`, or the session is closed.
            BusyError: more than a minute of sound waits.
        """
        with self._changed:
            stream = self._stream or self.stream(rate_hz)
            if rate_hz != stream.rate_hz:
                raise UsageError(
                    f"The sound began at {stream.rate_hz} Hz, not {rate_hz}. End it before another begins."
                )
            number = stream.push(pcm16)
            self._stream = stream
            return number

    def end_audio(self) -> None:
        """What :meth:`push_audio` brought is complete."""
        with self._changed:
            stream, self._stream = self._stream, None
            if stream is not None:
                stream.end()

    def stream(self, rate_hz: int) -> SoundStream:
        """A stream of sound of the caller's own, beside those of others and :meth:`push_audio`'s.

        Raises:
            UsageError: the rate is out of range.
        """
        return SoundStream(self, rate_hz)

    def interrupt(self) -> float:
        """Fall silent and forget all that waits to be said. Returns how many seconds of sound were cut.

        Sound and lips are at rest within 0.1 s.
        """
        with self._changed:
            events, lost = self._cut()
        self._tell(events)
        return lost / RATE_HZ

    def _cut(self) -> tuple[list[Event], int]:
        """Interrupt; returns what is to be told of it, and how many samples were cut."""
        at = sample_at(self._next, self.rate, RATE_HZ)
        events = [
            Event("interrupted", u.number, self._heard_s(u, at), sample=at)
            for u in self._utterances
            if not _over(u, at)
        ]
        self._utterances.clear()
        self._stream = None
        lost = self._line.cut(at)
        self._script.forget()
        self._retire()
        self._drawn.clear()
        if self._last_drawn:
            steps = max(int(_SILENCE_S * self.rate) - 1, 0)
            self._ease = deque(1 - (k + 1) / (steps + 1) for k in range(steps))
        self._last_drawn = False
        if self._script.anything and not self._face.own_mouth:  # whatever the words had the face express passes
            self._glide_until = self._next + ceil(_GLIDE_S * self.rate)
        self._counts.interrupts += 1
        self._changed.notify_all()
        return events, lost

    def set_expression(self, spec: str) -> None:
        """Let the face pass into an expression, as :func:`beavervision.expression.parse` reads it; at once, also amid speech.

        It stays until another is set. The face of a camera has it only while it is drawn.

        Raises:
            UsageError: it is not understood, or the session is closed.
        """
        with self._changed:
            self._touch()
            self._script.set(spec)
            if not self._face.own_mouth:
                self._glide_until = self._next + ceil(_GLIDE_S * self.rate)
            self._changed.notify_all()

    def push_picture(self, picture: Picture) -> None:
        """The next picture of the camera; of those that come between two moments the last counts.

        Raises:
            UsageError: the session has an avatar, the size is not the session's, or the session is closed.
        """
        with self._changed:
            self._touch()
            if self._camera is None:
                raise UsageError("This session shows an avatar. Open one with a camera to send pictures.")
            self._camera.push(picture, self._now_s())

    async def frames(self) -> AsyncGenerator[Moment, None]:
        """The moments, each at its time, until the session is closed. One caller at a time; while there is none, time stands still.

        Raises:
            UsageError: somebody else takes them.
            BeaverVisionError: drawing failed.
        """
        with self._taking():
            while not self._closed:
                for at_s in self._waits():
                    await self.clock.sleep_until(at_s)
                if not self._closed:
                    yield self.take()

    def moments(self) -> Generator[Moment, None, None]:
        """The same for callers without an event loop: it blocks the calling thread."""
        with self._taking():
            while not self._closed:
                for at_s in self._waits():
                    self.clock.wait_until(at_s)
                if not self._closed:
                    yield self.take()

    def facts(self) -> dict[str, Any]:
        """What the session does and how well, ready for JSON. Times are in ms."""
        with self._changed:
            c = self._counts
            behind, delays, says = sorted(c.behind_s), sorted(c.delay_s), sorted(c.say_s)
            here = sample_at(self._next, self.rate, RATE_HZ)
            return {
                "state": self._state(here),
                "rate": str(self.rate),
                "size_px": list(self.size_px),
                "pictures": {"due": c.due, "drawn": c.drawn, "dropped": c.dropped, "late": c.late},
                "delay_ms": {
                    "camera": None if self._camera is None else _ms(self._camera.delay_s),
                    "play_out": _ms(self.delay_s),
                    "look_ahead": _ms(self._look_ahead_s),
                    "work": _ms(WORK_S),
                    "measured_p50": _at(delays, 0.5),
                    "measured_p95": _at(delays, 0.95),
                },
                "say_ms": {"p50": _at(says, 0.5), "p95": _at(says, 0.95)},
                "late_ms": {"p50": _at(behind, 0.5), "p95": _at(behind, 0.95)},
                "skew_ms": _ms(c.skew_s),
                "draw_ms": _ms(self._block_s),
                "block": round(c.drawn / c.blocks, 2) if c.blocks else None,
                "queued_ms": _ms(max(self._line.head - here, 0) / RATE_HZ),
                "interrupts": c.interrupts,
            }

    def close(self) -> None:
        """End the session; returns when its threads have ended. Closing again does nothing."""
        with self._changed:
            self._closed = True
            if self._ended:
                return
            self._ended = True
            self._utterances.clear()
            self._stream = None
            speaking = self._speaking
            self._changed.notify_all()
        if speaking is not None and not speaking.cancel():
            with suppress(Exception):
                speaking.result()
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join()
        self._retire()
        self._close_retired()
        self._leave()

    def _leave(self) -> None:
        self._engine.forget(self)
        metrics.forget_live(self.id)

    # Sound in -----------------------------------------------------------------------------------

    def _touch(self) -> None:
        if self._closed:
            raise UsageError("The session is closed. Open another.")
        self.touched_s = self.clock.now()

    def _now_s(self) -> float:
        """Where the session's time stands; before the beginning and in a pause, at the next moment."""
        return float(self._next / self.rate) if self._origin_s is None else self.clock.now() - self._origin_s

    def _push(self, stream: SoundStream, pcm16: bytes) -> int:
        with self._changed:
            self._touch()
            on_time = round((self._now_s() + self.delay_s) * RATE_HZ)
            # Before anything of it is taken in: who is refused may push the same again.
            count = len(pcm16) * RATE_HZ // (2 * stream.rate_hz) + _HELD_BACK
            self._line.check_room(max(self._line.head, on_time) + count, self._kept_from())
            utterance = self._open(stream)
            if utterance is None:
                utterance = _Utterance(next(self._numbers), self.clock.now(), converter=Converter(stream.rate_hz))
                self._utterances.append(utterance)
                stream.utterance, stream.quiet = utterance, 0
            assert utterance.converter is not None
            self._take_in(stream, utterance, utterance.converter.push(stream.parser.push(pcm16)))
            self._changed.notify_all()
            return utterance.number

    def _end(self, stream: SoundStream) -> None:
        with self._changed:
            utterance = self._open(stream)
            stream.utterance, stream.parser = None, Pcm16()
            if utterance is None:
                return
            assert utterance.converter is not None
            utterance.complete = True
            self._changed.notify_all()
            with suppress(BusyError):  # the very last samples, after some that were refused
                self._take_in(stream, utterance, utterance.converter.end())

    def _take_in(self, stream: SoundStream, utterance: _Utterance, pcm: F32) -> None:
        """Put a stream's next samples on the line, where they belong or as soon after it as there is room."""
        if not len(pcm):
            return
        on_time = round((self._now_s() + self.delay_s) * RATE_HZ)
        if utterance.start is None or stream.due < sample_at(self._next, self.rate, RATE_HZ):
            stream.due = on_time
        due = stream.due
        self._write(utterance, self._caught_up(stream, pcm, on_time), due)

    def _caught_up(self, stream: SoundStream, pcm: F32, on_time: int) -> F32:
        """`pcm` without so much of its silence as others' sound delays it by.

        A pause amid a sentence stays, and so does one of sound that came before its time (after `on_time`) and waits anyway.
        """
        behind = max(self._line.head - stream.due, 0)
        kept: list[F32] = []
        for block in pieces(pcm, BLOCK):
            silent = stream.pauses.silent(block)
            spare = silent and stream.quiet >= _PAUSE and stream.due < on_time + _WAITS
            left_out = min(behind, len(block)) if spare else 0
            behind -= left_out
            kept.append(block[left_out:])
            stream.quiet = stream.quiet + len(block) if silent else 0
            stream.due += len(block)
        return np.concatenate(kept)

    def _open(self, stream: SoundStream) -> _Utterance | None:
        """What a stream speaks; None before its first sound, and after an interruption."""
        return stream.utterance if stream.utterance in self._utterances else None

    def _kept_from(self) -> int:
        """The first sample that may still be needed."""
        return sample_at(self._next, self.rate, RATE_HZ) - HISTORY

    def _write(self, utterance: _Utterance, pcm: F32, due: int, phones: Sequence[Phone] = ()) -> None:
        """Put samples on the line, at number `due` or as soon after it as there is room.

        `phones` are in them, on the utterance's clock.
        """
        if not len(pcm):
            return
        start = self._line.write(pcm, due, self._kept_from())
        self._broken = False
        self._line.tell(phones, start - utterance.written)
        utterance.written += len(pcm)
        self._draw_anew(start)
        if utterance.start is None:
            utterance.start = start
        utterance.stop = start + len(pcm)
        if utterance.chunks is None:
            self._arrivals.append((start, self._now_s()))

    def _draw_anew(self, start: int) -> None:
        """Forget what was drawn as if there were silence from sample `start` on."""
        run = self._run
        if run is None or sample_at(run.base, self.rate, RATE_HZ) + run.heard <= start:
            return
        self._retire()
        for i in [i for i in self._drawn if self._needed(i + 1) > start]:
            del self._drawn[i]

    def _more_to_come(self) -> bool:
        return any(not u.complete for u in self._utterances)

    def _speak_on(self) -> None:
        """Let the next piece of text be synthesised, if there is one and room for it."""
        if self.clock.inline or self._speaking is not None or self._to_speak() is None:
            return
        self._speaking = self._engine.submit(self._speak)

    def _to_speak(self) -> _Utterance | None:
        ahead = self._line.head - sample_at(self._next, self.rate, RATE_HZ)
        if self._closed or ahead > _SPEAK_AHEAD_S * RATE_HZ:
            return None
        return next((u for u in self._utterances if u.chunks is not None and not u.complete), None)

    def _speak(self) -> None:
        """Synthesise one piece of text."""
        with self._changed:
            utterance = self._to_speak()
        if utterance is not None:
            assert utterance.chunks is not None
            chunk: SpeechChunk | None = None
            failed: BaseException | None = None
            try:
                chunk = next(utterance.chunks, None)
            except Exception as error:
                failed = error
                _log.warning("session %s cannot say utterance %d: %s", self.id, utterance.number, error)
            with self._changed:
                if utterance in self._utterances:  # not interrupted meanwhile
                    if chunk is None:
                        if utterance.converter is not None:
                            self._write(utterance, utterance.converter.end(), self._line.head)
                        utterance.complete = True
                    else:
                        utterance.converter = utterance.converter or Converter(chunk.audio.rate_hz)
                        lead_s = WORK_S + float(2 / self.rate)
                        anew = utterance.start is None or self._broken
                        due = round((self._now_s() + lead_s) * RATE_HZ) if anew else self._line.head
                        self._write(utterance, utterance.converter.push(chunk.audio.pcm[0]), due, chunk.phones)
                        if utterance.told is not None and utterance.start is not None:
                            utterance.told.pass_on(self._script, utterance.start / RATE_HZ)
            if failed is not None:
                self._tell([Event("failed", utterance.number, message=str(failed))])
        with self._changed:
            self._speaking = None
            self._speak_on()
            self._changed.notify_all()

    # Moments out --------------------------------------------------------------------------------

    @contextmanager
    def _taking(self) -> Iterator[None]:
        with self._changed:
            self._touch()
            if self._origin_s is not None:
                raise UsageError("Somebody takes this session's pictures already. Share them behind one encoder.")
            self._origin_s = self.clock.now() - float(self._next / self.rate)
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._origin_s = None
                self.touched_s = self.clock.now()
        if self._failed is not None:
            raise self._failed

    def _waits(self) -> Iterator[float]:
        """The times to wait for until the next moment is due; without a worker, work is done in between."""
        due_s = self._due_s(self._next)
        while self.clock.inline and self.clock.now() < due_s - _TICK_S:
            yield self.clock.now() + _TICK_S
            self._work_now()
        yield due_s

    def _due_s(self, index: int) -> float:
        assert self._origin_s is not None
        return self._origin_s + float(index / self.rate)

    def take(self) -> Moment:
        """The next moment at once: for callers that keep the time themselves, between :meth:`frames`'s beginning and end."""
        if self.clock.inline:
            self._work_now()
        with self._changed:
            n = self._next
            due_s = self._due_s(n)
            now_s = self.clock.now()
            start, stop = sample_at(n, self.rate, RATE_HZ), sample_at(n + 1, self.rate, RATE_HZ)
            if self._line.head < stop and self._more_to_come():
                self._line.pad(stop, start - HISTORY)
                self._broken = True
            pcm = self._line.read(start, stop)
            picture, fresh = self._picture(n, now_s - due_s > float(1 / self.rate))
            self._next = n + 1
            events = self._progress(stop, now_s)
            speaking = any(u.begun for u in self._utterances)
            self._count(start, n, now_s - due_s, fresh)
            self._speak_on()
            self._changed.notify_all()
        self._tell(events)
        return Moment(picture, Audio(pcm[None], RATE_HZ, start), n, n / self.rate, due_s, fresh, speaking)

    def _picture(self, n: int, late: bool) -> tuple[Picture, bool]:
        """The picture of moment `n`, and whether it is the right one; `late`: it would be too late anyway."""
        run, drawn = self._run, self._drawn.pop(n, None)
        for old in [i for i in self._drawn if i < n - _LATE]:
            del self._drawn[old]
        if late and self._last is not None:
            return self._last, False
        if drawn is not None:
            self._ease.clear()
            for old in [i for i in self._drawn if i < n]:
                del self._drawn[old]
            self._last, self._look = drawn
            self._last_drawn = True
            return self._last, True
        for older in range(n - 1, n - 1 - _LATE, -1):
            if older in self._drawn and not self._ease:
                self._last, self._look = self._drawn.pop(older)
                self._last_drawn = True
                self._counts.late += 1
                return self._last, True
        if run is not None and n >= run.first and self._last_drawn and not self._ease:
            assert self._last is not None
            return self._last, False
        rest = self._idles.pop(n, None) or self._idle(n)
        self._idles = {i: picture for i, picture in self._idles.items() if i > n}
        if self._ease and self._last is not None:
            self._last = _blend(self._last, rest, self._ease.popleft())
            return self._last, True
        self._last, self._last_drawn = rest, False
        return rest, True

    def _idle(self, n: int) -> Picture:
        """The picture of moment `n` while nothing is drawn, with the expression that the face has come to."""
        picture, look, points = self._face.idle(n), self._look, self._face.rest_px(n)
        if look is None or points is None:
            return picture
        if self._shown_idle is None or self._shown_idle[0] is not picture or self._shown_idle[1] is not look:
            shown = expressed(picture, points, look.controls[0], look.head[0], load_basis())
            self._shown_idle = (picture, look, shown)
        return self._shown_idle[2]

    def _draw_idle(self, n: int) -> None:
        picture = self._idle(n)
        with self._changed:
            if n >= self._next:
                self._idles[n] = picture

    def _progress(self, stop: int, now_s: float) -> list[Event]:
        """Which utterances begin or end before sample `stop`."""
        events: list[Event] = []
        for u in tuple(self._utterances):
            if not u.begun and u.start is not None and u.start < stop:
                u.begun = True
                events.append(Event("started", u.number, sample=u.start))
                if u.chunks is not None:
                    self._counts.say_s.append(now_s - u.since_s)
                    metrics.LIVE_SAY_SECONDS.observe(now_s - u.since_s)
            if _over(u, stop):
                self._utterances.remove(u)
                events.append(Event("finished", u.number, self._heard_s(u, u.stop), sample=u.stop))
        while self._arrivals and self._arrivals[0][0] < stop:
            _, since_s = self._arrivals.popleft()
            if self._origin_s is not None:
                delay_s = now_s - self._origin_s - since_s
                self._counts.delay_s.append(delay_s)
                metrics.LIVE_DELAY_SECONDS.labels(self.id).observe(delay_s)
        return events

    def _count(self, start: int, n: int, behind_s: float, fresh: bool) -> None:
        if self._closed:
            return
        c = self._counts
        c.due += 1
        metrics.LIVE_PICTURES_DUE.labels(self.id).inc()
        if not fresh:
            c.dropped += 1
            metrics.LIVE_PICTURES_DROPPED.labels(self.id).inc()
        c.behind_s.append(behind_s)
        c.skew_s = max(c.skew_s, abs(start / RATE_HZ - float(n / self.rate)), key=abs)
        metrics.LIVE_SKEW_SECONDS.labels(self.id).set(c.skew_s)

    def _state(self, here: int) -> str:
        if self._closed:
            return "closed"
        if self._origin_s is None:
            return "paused"
        return "speaking" if self._line.head > here and self._utterances else "idle"

    @staticmethod
    def _heard_s(utterance: _Utterance, at: int) -> float:
        if utterance.start is None:
            return 0.0
        return max(min(at, utterance.stop) - utterance.start, 0) / RATE_HZ

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            for listener in tuple(self._listeners):
                listener(event)

    # Drawing ------------------------------------------------------------------------------------

    def _work(self) -> None:
        """The worker's thread."""
        try:
            while True:
                with self._changed:
                    if self._closed:
                        break
                    job, wait_s = self._plan()
                    if job is None:
                        self._changed.wait(wait_s)
                        continue
                job()
        except BaseException as error:
            _log.exception("session %s failed", self.id)
            self._fail(error)
        finally:
            self._retire()
            self._close_retired()

    def _work_now(self) -> None:
        """All that can be done at this moment, in the caller's thread."""
        while not self._closed:
            with self._changed:
                to_say = self._to_speak()
                job = self._speak if to_say is not None else self._plan()[0]
            if job is None:
                return
            job()

    def _fail(self, error: BaseException) -> None:
        if isinstance(error, BeaverVisionError):
            failed: BaseException = error
        else:
            failed = BeaverVisionError(
                f"The live session failed unexpectedly ({type(error).__name__}: {error}). "
                "This is a defect of the program: please report it with what led to it."
            )
            failed.__cause__ = error
        with self._changed:
            self._failed, self._closed = failed, True
            self._changed.notify_all()
        self._leave()

    def _plan(self) -> tuple[Callable[[], None] | None, float | None]:
        """What to do now, or None and how many seconds until that may change (None: when something happens)."""
        if self._retired:
            return self._close_retired, None
        if self._origin_s is None:
            return None, None
        now_s = self.clock.now() - self._origin_s
        if (look := self._face.look(now_s)) is not None:
            return look, None
        run = self._run or self._begin(now_s)
        if run is None:
            n = max(self._next, max(self._idles, default=-1) + 1)
            if self._look is None or n >= self._next + _BLOCK:
                return None, None
            return lambda: self._draw_idle(n), None
        n = run.next
        if n >= self._next + _AHEAD:
            return None, None
        if (ready_s := self._face.ready_s(n)) > now_s:
            return None, ready_s - now_s
        # The first that can be in time; where its sound is not there yet, the last whose sound is, to be shown late.
        useful = max(self._next, ceil((now_s + min(self._block_s, _LONGEST_S)) * self.rate))
        if useful > n and self._more_to_come():
            useful = max(min(useful, self._heard_until() - 1), n)
        block = _FIRST_BLOCK if n == run.first else _BLOCK if n - useful >= _BLOCK else 1
        if self._camera is not None:
            block = 1
        elif useful > n:
            block = min(useful + 1 - n, _CATCH_UP)
        if useful <= n and self._line.head < self._needed(n + block):
            block = 1
        if self._line.head < self._needed(n + block) and self._more_to_come():
            # Nothing is drawn for as long as sound may still come in time to be heard where it belongs.
            give_up_s = self._line.head / RATE_HZ - float(1 / self.rate)
            if now_s < give_up_s:
                return None, give_up_s - now_s
        run.asked, run.useful_from = range(run.asked.stop, n + block), useful
        return lambda: self._draw(run), None

    def _heard_until(self) -> int:
        """One after the last picture whose sound is there, with all that its drawing must hear."""
        return int((self._line.head - self._needs) * self.rate / RATE_HZ)

    def _needed(self, stop: int) -> int:
        """One after the last sample that the pictures before `stop` must have heard."""
        return sample_at(stop, self.rate, RATE_HZ) + self._needs

    def _begin(self, now_s: float) -> _Run | None:
        """A drawing, if there is sound that may be speech."""
        here = sample_at(self._next, self.rate, RATE_HZ)
        line = self._line
        survey = self._face.survey()
        if survey is None or (line.loud_until <= here and self._glide_until <= self._next):
            return None
        first = self._next
        if self._glide_until <= self._next:
            first = int((line.loud_from / RATE_HZ - _EARLY_S) * self.rate)
            if first >= self._next + _AHEAD:
                return None
        first = max(first, self._next, ceil((now_s + _SOON_S) * self.rate), max(self._drawn, default=-1) + 1)
        # Sound that was heard before it is gone through; and where a drawing is continued, so is the motion of its mouth.
        goes_on = (self._last_drawn or bool(self._drawn)) and not self._face.own_mouth
        warm = min(_WARM, first) if goes_on else 0
        context = min(warm + ceil(Fraction(self._engine.pipeline.timing.left_context_ms) / 1000 * self.rate), first)
        if not np.any(line.read(*(sample_at(i, self.rate, RATE_HZ) for i in (first - context, first)))):
            warm = context = 0
        # The stages count from `base`, where the session's and their own numbers of samples differ by a constant.
        base = (first - context) // self._period * self._period
        run = _Run(first, base, first, range(first - warm, first - warm))
        run.level = 0.0 if self._face.own_mouth else 1.0
        script = _Later(self._script, float(base / self.rate))
        stages = self._engine.pipeline.live(
            survey,
            self.rate,
            self._sound_of(run),
            between=(_Shown(run), _From(self._drawn[first - 1][1] if first - 1 in self._drawn else self._look)),
            script=script,
            seed=self._seed,
        )
        clips = self._face.clips(base, lambda: run.asked, lambda i: i < run.useful_from)
        for stage in stages:
            clips = stage(clips)
        run.clips = clips
        self._run = run
        self._counts.runs += 1
        return run

    def _sound_of(self, run: _Run) -> Iterator[Audio]:
        base = sample_at(run.base, self.rate, RATE_HZ)
        while True:
            with self._changed:
                limit = self._needed(run.asked.stop) - base
                if run.heard >= limit:
                    raise AssertionError("hearing asks for more sound than it declares")
                start, run.heard = run.heard, limit
                pcm = self._line.read(base + start, base + limit)
                phones = self._line.phones(base + start, base + limit, base)
            yield Audio(pcm[None], RATE_HZ, start, phones)

    def _draw(self, run: _Run) -> None:
        """Draw the pictures that were asked for."""
        asked = run.asked
        begin_s, cpu_s = self.clock.now(), time.thread_time()
        clip = next(run.clips)
        spent_s, cpu_s = self.clock.now() - begin_s, time.thread_time() - cpu_s
        self._block_s += 0.2 * (spent_s - self._block_s)
        at_rest = self._at_rest(clip, asked) and asked.stop >= self._glide_until
        with self._changed:
            self._counts.blocks += 1
            useful = len(asked) - sum(i < run.useful_from for i in asked)
            if useful and not at_rest:
                self._engine.drew(cpu_s / useful)
            if self._run is not run:
                return
            for at, (i, picture) in enumerate(zip(asked, clip.frames.pictures, strict=True)):
                if i >= max(run.useful_from, self._next - _LATE):
                    self._drawn[i] = picture, _look_at(clip, at)
                    self._counts.drawn += 1
            run.next = asked.stop
            quiet = self._line.loud_until <= sample_at(asked.stop, self.rate, RATE_HZ)
            run.quiet = run.quiet + len(asked) if quiet and at_rest else 0
            run.leaves = run.quiet >= _LINGER
            run.voiceless = run.voiceless + len(asked) if _voiceless(clip) and at_rest else 0
            if not quiet and run.voiceless > _NOISE_S * self.rate:
                at = sample_at(asked.stop, self.rate, RATE_HZ)
                self._line.hush(at - RATE_HZ, at)
            before, run.look = run.look, _look_at(clip, len(clip) - 1)
            settled = _apart(run.look, before) < _SETTLED or run.quiet > _UNSETTLED_S * self.rate
            if run.quiet and (run.level == 0 if self._face.own_mouth else settled):
                self._retire()

    def _at_rest(self, clip: Clip, asked: range) -> bool:
        """Whether the lips of the last picture are where they are without speech."""
        drawn = clip.drawn[-1] if clip.drawn else None
        rest = self._face.rest_px(asked[-1])
        if drawn is None or rest is None:
            return True
        eyes_px = float(np.linalg.norm(rest[263, :2] - rest[33, :2]))
        return float(np.abs(drawn - rest).max()) < _REST * eyes_px

    def _retire(self) -> None:
        with self._changed:
            if self._run is not None:
                self._retired.append(self._run)
                self._run = None

    def _close_retired(self) -> None:
        with self._changed:
            retired, self._retired = self._retired, []
        for run in retired:
            close = getattr(run.clips, "close", None)
            if close is not None:
                close()


@dataclass(frozen=True, slots=True)
class _Shown:
    """How much of the drawing shows: nothing of pictures that would come too late, little where the own mouth is left or met."""

    run: _Run
    name: str = "shown"

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        run = self.run
        for clip in clips:
            assert clip.track is not None
            strength = clip.track.strength.copy()
            for i in range(len(clip)):
                run.level = max(run.level - _FADE, 0.0) if run.leaves else min(run.level + _FADE, 1.0)
                strength[i] *= run.level * (run.base + clip.frames.start + i >= run.useful_from)
            yield replace(clip, track=replace(clip.track, strength=strength))


@dataclass(frozen=True, slots=True)
class _From:
    """A drawing's expression begins with the one that the face has, and passes into what is wanted."""

    look: Expression | None
    name: str = "from"

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        away: tuple[F32, F32] | None = None
        done = 0
        for clip in clips:
            wanted = clip.expression or _NO_LOOK
            if away is None:
                has = self.look or _NO_LOOK
                away = has.controls[0] - wanted.controls[0], has.head[0] - wanted.head[0]
            t = np.minimum(np.arange(done, done + len(clip), dtype=np.float32) / float(_GLIDE_S * clip.frames.rate), 1)
            left = (1 - t * t * (3 - 2 * t))[:, None]
            done += len(clip)
            if left.any() and (away[0].any() or away[1].any()):
                eased = Expression(wanted.controls + left * away[0], wanted.head + left * away[1])
                clip = replace(clip, expression=eased)
            yield clip


_NO_LOOK = Expression(np.zeros((1, BLENDSHAPES), np.float32), STILL[None])


def _voiceless(clip: Clip) -> bool:
    return clip.heard is not None and float(clip.heard.voice.max()) < 0.5


def _look_at(clip: Clip, at: int) -> Expression | None:
    """The expression of a picture; None if it is nothing."""
    if clip.expression is None:
        return None
    look = Expression(clip.expression.controls[at : at + 1], clip.expression.head[at : at + 1])
    return look if _apart(look, None) > _SETTLED else None


def _apart(a: Expression | None, b: Expression | None) -> float:
    a, b = a or _NO_LOOK, b or _NO_LOOK
    return max(float(np.abs(a.controls - b.controls).max()), float(np.abs(a.head - b.head).max()))


def _period(rate: Fraction) -> int:
    """So many pictures take a whole number of samples."""
    return (RATE_HZ / rate).denominator


def _over(utterance: _Utterance, at: int) -> bool:
    return utterance.complete and (utterance.start is None or utterance.stop <= at)


def _blend(a: Picture, b: Picture, share: float) -> Picture:
    """`share` of `a`, the rest of `b`."""

    def mixed(x: U8, y: U8) -> U8:
        return np.asarray(cv2.addWeighted(x, share, y, 1 - share, 0), np.uint8)

    return replace(b, y=mixed(a.y, b.y), u=mixed(a.u, b.u), v=mixed(a.v, b.v))


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _at(values: list[float], share: float) -> float | None:
    return _ms(values[min(int(share * len(values)), len(values) - 1)]) if values else None
