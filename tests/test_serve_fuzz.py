"""The API against requests made from its own description: whatever comes, it answers, as it says it does, and lives."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra serve")
pytest.importorskip("schemathesis", reason="needs the extra dev")

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable

from tests.media_factory import beeps, make_sound
from tests.test_serve import Server, started, until

SHORT, WHOLE = 8, 80  # requests for an operation, of each kind
ERRORS_THAT_PASS = ("queue_full", "busy")  # 503 with Retry-After: what the service says when it has enough to do


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("BEAVERVISION_")]:
            patch.delenv(name)
        made = started(tmp_path_factory.mktemp("serve"), serve_wait_s="0.2", serve_queue="64")
    yield made
    made.kill()


@pytest.fixture(scope="module")
def uploads(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """What is sent where the description asks for a file: a picture, one without a face, sound, and no media at all."""
    gray = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 90, 90)).save(gray, "PNG")
    sound = make_sound(tmp_path_factory.mktemp("sound") / "a.wav", beeps(4000, 8000, [Fraction(0)]), 8000)
    return [gray.getvalue(), sound.read_bytes(), b"", b"GIF89a"]


@pytest.fixture(scope="module")
def jobs(server: Server, uploads: list[bytes]) -> list[str]:
    """Ids for requests to be about: of a job that failed, one that was cancelled, and nobody's."""
    ids = []
    for _ in range(2):
        fields: dict[str, bytes | str] = {"video": uploads[0], "text": "Hi.", "consent": "true"}
        ids.append(server.lipsync(fields, prefer="respond-async").json["id"])
    server.call("POST", f"/api/v1/jobs/{ids[1]}/cancel")
    until(lambda: server.job(ids[0])["state"] == "failed")
    return [*ids, "0" * 24]


def fuzz(server: Server, uploads: list[bytes], jobs: list[str], count: int) -> Counter[int]:
    """Send `count` requests of each kind for every operation; how often each status came."""
    schemathesis.openapi.format("binary", st.sampled_from(uploads) | st.binary(max_size=64))
    schema = schemathesis.openapi.from_url(f"http://{server.address}/api/v1/openapi.json")
    checks = schemathesis.checks
    kept = [checks.not_a_server_error, checks.status_code_conformance, checks.content_type_conformance]
    kept += [checks.response_schema_conformance]
    seen: Counter[int] = Counter()

    def usable(case: Any, left_out: str, plain: bool) -> Any:
        """With what the description cannot say: exactly one of text and audio, and consent."""
        case.body = {**case.body, "text": "Hi.", "audio": uploads[1], "consent": True}
        del case.body[left_out]
        if plain:  # names of voices and models are seldom guessed
            case.body.pop("settings", None)
        return case

    with requests.Session() as session:
        for result in schema.get_all_operations():
            operation = result.ok()
            paths = [{}]
            if "{job_id}" in operation.path:
                paths += [{"path_parameters": {"job_id": job}} for job in jobs if operation.method != "delete"]
            lipsync = operation.path.endswith("/lipsync")
            for mode in schemathesis.GenerationMode:
                cases = st.one_of(operation.as_strategy(generation_mode=mode, **path) for path in paths)
                if lipsync and mode is schemathesis.GenerationMode.POSITIVE:
                    cases = st.builds(usable, cases, st.sampled_from(("text", "audio")), st.booleans())

                @seed(5)
                @settings(
                    max_examples=count,
                    deadline=None,
                    database=None,
                    phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck),
                )
                @given(case=cases)
                def send(case: Any) -> None:
                    response = case.call(session=session, timeout=60)
                    seen[response.status_code] += 1
                    if response.status_code == 503 and response.json()["code"] in ERRORS_THAT_PASS:
                        return
                    case.validate_response(response, checks=kept)

                with suppress(Unsatisfiable):  # there is no wrong way to ask for what takes no parameters
                    send()
    return seen


def check(server: Server, seen: Counter[int]) -> None:
    assert seen[200] > 20
    assert seen[422] > 20
    assert server.process.poll() is None
    assert server.get("/readyz") == {"status": "ok"}
    assert [worker["restarts"] for worker in server.get("/api/v1/status")["workers"]] == [0]
    until(lambda: server.get("/api/v1/status")["queued"] == server.get("/api/v1/status")["running"] == 0)
    until(lambda: list((server.folder / "scratch").iterdir()) == [])


def test_requests_made_from_the_description_are_answered_as_it_says(
    server: Server, uploads: list[bytes], jobs: list[str]
) -> None:
    seen = fuzz(server, uploads, jobs, SHORT)
    assert seen.total() >= 150
    check(server, seen)


@pytest.mark.slow
def test_many_requests_made_from_the_description(
    server: Server, uploads: list[bytes], jobs: list[str], tmp_path: Path
) -> None:
    seen = fuzz(server, uploads, jobs, WHOLE)
    print(seen)
    assert seen.total() >= 1000
    check(server, seen)
