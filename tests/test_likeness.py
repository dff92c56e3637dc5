"""One person or another."""

from __future__ import annotations

import numpy as np
import pytest

from beavervision.media import F32, Picture
from beavervision.models.face import FaceNets
from beavervision.models.likeness import likeness, unlike
from beavervision.models.mesh import fit_pose
from beavervision.stages.detect import FaceChoice, survey
from tests.faces import moved, portrait, somebody_else


def look(picture: Picture) -> F32:
    (seen,) = survey([picture], FaceNets(), FaceChoice()).references
    points = seen.face.points_px
    return likeness(seen.rgb, seen.region, points, fit_pose(points))


@pytest.mark.parametrize("seen", [moved(40, 30), moved(zoom=0.6), moved(turn_deg=20), moved(zoom=1.3)])
def test_the_same_person_elsewhere_is_alike(seen: Picture) -> None:
    assert unlike(look(seen), look(portrait())[None]) < 0.7


def test_somebody_else_is_not() -> None:
    both = np.stack([look(portrait()), look(moved(30, 20))])
    assert unlike(look(somebody_else()), both) > 1
    assert unlike(look(somebody_else()), np.stack([*both, look(somebody_else())])) < 0.1
    assert unlike(look(somebody_else()), both[:0]) == np.inf
