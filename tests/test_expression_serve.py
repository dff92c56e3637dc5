"""What of the expressions the service takes and refuses, without a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the serve extra")

from pydantic import ValidationError

from beavervision.errors import BeaverVisionError
from beavervision.expression import Custom, ExpressionStore, Style
from beavervision.expression.alive import Manner
from beavervision.serve.schema import LipsyncSettings
from beavervision.serve.service import Service
from beavervision.settings import Settings

STYLE = Style(1.2, {"mouthSmile": 0.2}, Manner()).as_dict()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Service:
    folder = tmp_path_factory.mktemp("service")
    ExpressionStore(folder / "data").add(Custom("house-smile", {"mouthSmileLeft": 0.4}))
    return Service(Settings(data_dir=folder / "data", serve_folder=folder / "serve"))


def settings(**fields: Any) -> LipsyncSettings:
    return LipsyncSettings.model_validate_json(json.dumps(fields))


def test_settings_of_expression_reach_the_worker_as_the_pipeline_takes_them(service: Service) -> None:
    asked = settings(
        expression="happy:0.6,house-smile",
        expression_track=[{"time_s": 0, "expression": "sad"}, {"time_s": 2.5, "expression": {"browUp": 0.5}, "ease": "in"}],
        style=STYLE,
        alive=False,
    )  # fmt: skip
    service._understood(asked)
    dumped = asked.model_dump(exclude_none=True)
    assert dumped["alive"] is False and dumped["style"] == STYLE
    assert dumped["expression_track"][0] == {"time_s": 0.0, "expression": "sad", "ease": "in-out"}
    assert json.loads(json.dumps(dumped)) == dumped, "it goes through the table of jobs"
    assert not {"expression", "expression_track", "style", "alive"} & set(settings().model_dump(exclude_none=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"expression": "hapy"},
        {"expression": "happy:7"},
        {"expression_track": [{"time_s": 0, "expression": "auto"}]},
        {"expression_track": [{"time_s": 2, "expression": "sad"}, {"time_s": 1, "expression": "sad"}]},
        {"expression_track": [{"time_s": 0, "expression": {"happy": 10**400}}]},
        {"style": {"format": "other"}},
        {"style": STYLE | {"amplitude": 10**400}},
        {"style": STYLE | {"rest": {"mouthSmile": [1]}}},
    ],
)
def test_what_cannot_be_understood_is_refused_before_it_is_queued(service: Service, fields: dict[str, Any]) -> None:
    with pytest.raises(BeaverVisionError):
        service._understood(settings(**fields))


def test_what_a_style_does_not_know_is_not_kept(service: Service) -> None:
    assert service._understood(settings(style=STYLE | {"more": float("nan")})).style == STYLE


@pytest.mark.parametrize(
    "fields",
    [
        {"style": "/etc/passwd"},
        {"expression_track": "/etc/passwd"},
        {"expression_track": []},
        {"expression_track": [{"time_s": -1, "expression": "sad"}]},
        {"expression_track": [{"time_s": 0, "expression": "sad", "ease": "bounce"}]},
        {"expression": "x" * 2000},
        {"alive": "perhaps"},
    ],
)
def test_settings_of_the_wrong_kind_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings(**fields)


def test_the_list_of_expressions_has_those_of_the_house(service: Service) -> None:
    listed = {expression.name: expression for expression in service.expressions()}
    assert listed["house-smile"].kind == "custom" and listed["happy"].kind == "preset"
    assert (listed["browUp"].low, listed["browUp"].high) == (-1, 1)


def test_marks_are_checked_and_not_spoken(service: Service, tmp_path: Path) -> None:
    service._check_text("[house-smile] Hello there.", settings())
    with pytest.raises(BeaverVisionError, match="hapy"):
        service._check_text("[hapy] Hello there.", settings())
    with pytest.raises(BeaverVisionError, match="empty"):
        service._check_text("[happy]", settings())
    assert service._spoken("[happy] Hello there.").strip() == "Hello there."
