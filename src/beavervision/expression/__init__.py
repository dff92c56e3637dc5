"""Which expression a face has, and when: named controls, presets, keyframes, marks in texts, moods heard, life of stills.

    script = Script("happy:0.6")
    for clip in Direct(script, alive=True)(heard_clips):
        ...  # clip.expression

What moves the pixels is a stage of its own; this package only decides.
"""

from beavervision.expression.controls import AUTO, PRESETS, Known, Wanted, known, parse
from beavervision.expression.custom import Custom, ExpressionStore
from beavervision.expression.custom import learn as learn_custom
from beavervision.expression.direct import Direct
from beavervision.expression.marks import Marked
from beavervision.expression.script import Script
from beavervision.expression.style import Style
from beavervision.expression.track import EASINGS, Key, Track

__all__ = [
    "AUTO",
    "EASINGS",
    "PRESETS",
    "Custom",
    "Direct",
    "ExpressionStore",
    "Key",
    "Known",
    "Marked",
    "Script",
    "Style",
    "Track",
    "Wanted",
    "known",
    "learn_custom",
    "parse",
]
