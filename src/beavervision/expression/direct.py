"""The stage that decides, picture by picture, what the face is to express: asked for, heard, or simply alive.

It stands after hearing and before drawing and sets :attr:`beavervision.media.Clip.expression`; the pixels are moved
elsewhere. Memory is constant, and the values do not depend on how the stream is cut into clips.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from beavervision.expression.alive import Blinks, Gestures, Manner, Sway
from beavervision.expression.controls import GROWTH, VALUES, look_of
from beavervision.expression.script import Script
from beavervision.expression.style import Style
from beavervision.expression.voice import Listener
from beavervision.media import BLENDSHAPES, F32, Clip, Expression
from beavervision.models.face import blendshape_names

ASKED_HZ = 11.0  # how fast a face passes into what is asked for: 90 % of the way in 0.35 s,
FELT_HZ = 4.0  # and into a mood that was found in words and voice, in 1 s,
FELT_PER_S = 1.5  # at most so much of a control (a tenth of the head's degrees) a second
_VOICE_SHARE = 0.3  # of the voice in how glad a sentence is, where its words are known
_VOICE_ALONE = 0.45  # and where they are not
_MOOD = 0.75  # the intensity of the strongest mood
_UNASKED = 0.6  # the strength of the accents of a face that is merely alive
_SHUT = 0.3  # more of the source's own blink than its open eyes have: its eyes count as shut
_LIDS_PER_S = 0.1  # so fast open eyes may become narrower
_RANGES = np.array([1.0] * BLENDSHAPES + [10.0, 10.0, 10.0, 0.1, 0.1, 0.1], np.float32)
_BLINK = tuple(blendshape_names().index(f"eyeBlink{side}") for side in ("Left", "Right"))
_WEIGHT, _FEEL, _AUTO = VALUES, VALUES + 1, VALUES + 2  # of what glides: the track's weight, the mood's, auto


class Direct:
    """The direction of one run.

    Args:
        script: what is asked for; consumed by the run.
        alive: blink, breathe, sway and stress words unasked, as stills need it.
        seed: of what happens unasked; the same seed and stream give the same values.
        style: the manner of a speaker.
        ahead_s: how far beyond a picture its feature rows may be used, at most what the lip-sync model is given.
    """

    name = "direct"

    def __init__(
        self,
        script: Script,
        *,
        alive: bool = False,
        seed: int = 0,
        style: Style | None = None,
        ahead_s: float = 0.12,
    ) -> None:
        self._script = script
        self._alive = alive
        self._seed = seed
        self._manner = Manner() if style is None else style.manner
        self._rest = np.zeros(VALUES, np.float32) if style is None else look_of(style.rest)
        self._ahead_s = ahead_s

    def __call__(self, clips: Iterator[Clip]) -> Iterator[Clip]:
        manner = self._manner
        listener = Listener(self._ahead_s)
        blinks, gestures, sway = (
            Blinks(self._seed, manner.blinks_per_min),
            Gestures(self._seed),
            Sway(self._seed, manner),
        )
        lids = _Lids()
        glide: _Glide | None = None
        mood = _Glide(np.zeros(VALUES, np.float32), FELT_HZ, FELT_PER_S * _RANGES)
        for clip in clips:
            if clip.heard is None or clip.audio is None:
                raise ValueError("direction needs clips that were heard")
            dt_s = float(1 / clip.frames.rate)
            looks = np.empty((len(clip), VALUES), np.float32)
            for i in range(len(clip)):
                time_s = float((clip.frames.start + i) / clip.frames.rate)
                asked = self._script.at(time_s)
                target = np.append(
                    asked.wanted.look, [float(asked.follows_track), float(asked.follows_mood), asked.wanted.auto]
                )
                glide = glide or _Glide(target, ASKED_HZ)
                now = glide.to(target, dt_s)
                look = self._rest + now[:VALUES]
                if asked.moved is not None:
                    look += asked.moved * now[_WEIGHT]
                auto = float(now[_AUTO])
                heard = listener.hear(clip, i, mood=auto > 0)
                if auto > 0 or mood.moves:
                    feeling = _mood(asked.valence, heard.arousal) * np.float32(auto * now[_FEEL])
                    look += mood.to(feeling, dt_s)
                liveliness = max(auto, _UNASKED * self._alive) * manner.brows
                if heard.stress and liveliness > 0:
                    gestures.begin(time_s, heard.stress * liveliness)
                look += gestures.at(time_s)
                if self._alive:
                    look += sway.at(time_s)
                if self._alive or auto > 0:
                    look[list(_BLINK)] += np.float32(blinks.at(time_s, heard.phrase_end, lids.shut(clip, i)))
                looks[i] = look
            yield replace(clip, expression=_expression(looks))


class _Glide:
    """Follows a target without overshoot or jump in its speed: a critically damped spring, stepped exactly."""

    def __init__(self, start: F32, per_s: float, most_per_s: F32 | None = None) -> None:
        self._value = start.astype(np.float64)
        self._speed = np.zeros_like(self._value)
        self._per_s = per_s
        self._most_per_s = most_per_s

    @property
    def moves(self) -> bool:
        """Whether it is anywhere but at zero."""
        return bool(self._value.any())

    def to(self, target: F32, dt_s: float) -> F32:
        off = self._value - target
        fade = np.exp(-self._per_s * dt_s)
        push = (self._speed + self._per_s * off) * dt_s
        after = target + (off + push) * fade
        speed = (self._speed - self._per_s * push) * fade
        if self._most_per_s is not None:
            step = np.clip(after - self._value, -self._most_per_s * dt_s, self._most_per_s * dt_s)
            after, speed = self._value + step, np.clip(speed, -self._most_per_s, self._most_per_s)
        after = np.where(np.abs(after - target) < 1e-4, target, after)  # it arrives
        self._value, self._speed = after, speed
        return np.asarray(after, np.float32)


_MOODS = {name: look_of({name: 1.0}) for name in ("happy", "excited", "sad", "angry", "calm")}


def _mood(valence: float | None, arousal: float) -> F32:
    """The look of a mood: how glad (of the words, and a little of the voice) and how lively (Russell's circumplex, 1980)."""
    glad = _VOICE_ALONE * arousal
    if valence is not None:
        glad = (1 - _VOICE_SHARE) * valence + _VOICE_SHARE * max(arousal, -0.3)
    up, lively, flat = max(glad, 0.0), max(arousal, 0.0), max(-arousal, 0.0)
    down = max(-glad, 0.0) if valence is not None else 0.0  # a flat voice alone is calm, not sad
    parts = {
        "happy": up * (1 - 0.6 * lively),
        "excited": up * 0.6 * lively,
        "sad": down * (1 - lively),
        "angry": down * lively,
        "calm": 0.6 * flat * (1 - up - down),
    }
    total = np.zeros(VALUES, np.float32)
    for name, weight in parts.items():
        if weight:
            total += _MOODS[name] * np.float32(_MOOD * weight)
    return total


class _Lids:
    """Whether the source's own eyes are shut, against how open they were."""

    def __init__(self) -> None:
        self._open = 1.0

    def shut(self, clip: Clip, i: int) -> bool:
        face = None if clip.track is None else clip.track.faces[i]
        if face is None:
            return False
        closed = float(face.blendshapes[list(_BLINK)].mean())
        self._open = min(closed, self._open + _LIDS_PER_S / float(clip.frames.rate))
        return closed > self._open + _SHUT


def _expression(looks: F32) -> Expression | None:
    if not looks.any():
        return None
    head = looks[:, BLENDSHAPES:].copy()
    head[:, GROWTH - BLENDSHAPES] += 1
    return Expression(np.clip(looks[:, :BLENDSHAPES], -1, 1), head)
