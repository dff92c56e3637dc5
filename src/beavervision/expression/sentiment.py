"""Whether a sentence is glad or sad, from a small lexicon of our own; English only.

Each word of the lexicon has a weight from -3 to 3. A negation within three words before turns a weight round and halves it, an
intensifier before it makes it larger, and what follows a "but" counts double against what precedes it. Sentences of other languages
are neutral: there the voice alone decides.
"""

from __future__ import annotations

import math
import re
from functools import cache

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")

_LEXICON = """
3: amazing awesome brilliant delighted ecstatic excellent excellently fantastic incredible incredibly joyful love
   magnificent marvellous outstanding overjoyed perfect perfectly phenomenal spectacular splendid superb terrific
   thrilled triumph triumphant wonderful wonderfully best beautiful gorgeous bliss
2: achieve achieved achievement admire adore amused amusing applaud bless blessed bravo bright celebrate celebrated
   celebration charming cheer cheerful congratulate congratulations cute delicious delight enjoy enjoyed enjoying
   enthusiastic excited exciting friend friends fun funny generous glad good goodness gratitude great greatest happily
   happiness happy healthy hero honour hug impressive inspire inspiring joy kind kindness laugh laughed laughing
   laughter lovely loved loving lucky nice optimistic paradise peace peaceful pleasant pleased pleasure praise pretty
   prize proud proudly reward smile smiled smiles smiling success successful successfully sunshine sweet thank
   thankful thanks treasure victory warm welcome win winner winning won wow yay hooray joyous
1: able accept agree benefit better brave calm care clear comfort comfortable confident cool easy effective fair
   favourite fine free fresh gain gift gentle grow hope hopeful hoping ideal improve improved improvement interested
   interesting like liked new okay progress promise proper ready recommend relax relaxed rich safe smart solved strong
   support sure true trust useful valuable well willing wise worth
-1: alone bored boring busy careful cheap cold concern concerned confused confusing cost cry dark delay delayed
   difficult doubt dull empty error expensive fault forget forgot hard issue lack late leave limit lonely lose loss
   mess miss missed mistake mistaken nervous never odd old poor pressure problem problems quit risk serious sick slow
   sorry strange stuck tired tough trouble uncertain unclear unfortunate unfortunately unlikely unsure upset warn
   warning weak weird worried worry wrong
-2: abuse accident afraid anger angry annoyed annoying anxious argue ashamed attack bad badly blame bleed blood broke
   broken burn cancel cancelled cheat crash cried cruel crying damage damaged danger dangerous defeat defeated
   depressed depressing desperate destroy died dies die dirty disappoint disappointed disappointing disappointment
   disease disgust dismal dying enemy evil fail failed failing fails failure fear fight fraud furious gloomy grief
   guilty harm hate hated hates hopeless hurt hurts ill illness injured insult jealous kill killed lie lied lies lost
   mad miserable misery mourn nasty negative pain painful panic pity poison rejected rude ruin ruined sad sadly
   sadness scared shame shock shocking steal stolen stole stupid suffer suffered suffering terrified threat tragedy tears
   ugly unhappy victim violence violent war waste weep wept worse wound
-3: agony appalling atrocious awful catastrophe catastrophic dead death deadly despair devastated devastating disaster
   disastrous disgusting dreadful enraged hateful heartbreaking heartbroken hell hideous horrible horrific horrifying
   killing murder murdered nightmare outrage outrageous rage terrible terribly terror torture tragic worst
"""
_NEGATIONS = """not no never none nobody nothing neither nor without hardly barely cannot can't don't doesn't didn't won't wouldn't
    isn't aren't wasn't weren't couldn't shouldn't haven't hasn't hadn't ain't"""
_STRONGER = "very really so extremely absolutely totally completely truly deeply utterly super quite"
_SCALE = 4.0  # a total of so much counts as half of the way to the end of the scale, roughly


@cache
def _weights() -> dict[str, float]:
    weights: dict[str, float] = {}
    weight = 0.0
    for word in _LEXICON.split():
        if word.endswith(":"):
            weight = float(word[:-1])
        else:
            weights[word] = weight
    return weights


def valence(text: str) -> float:
    """How glad `text` is: from -1, most sad or angry, over 0, neutral, to 1, most glad."""
    words = _WORD.findall(text.lower().replace("’", "'"))
    weights, negations, stronger = _weights(), _NEGATIONS.split(), _STRONGER.split()
    total = 0.0
    for i, word in enumerate(words):
        if word == "but":
            total *= 0.5
        weight = weights.get(word, 0.0)
        before = words[max(i - 3, 0) : i]
        if weight and word not in negations:
            if any(w in negations for w in before):
                weight *= -0.5
            if before and before[-1] in stronger:
                weight *= 1.35
            total += weight
    total *= 1.0 + 0.1 * min(text.count("!"), 3)
    return total / math.sqrt(total * total + _SCALE) if total else 0.0
