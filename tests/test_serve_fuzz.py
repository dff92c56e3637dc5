"""The API against requests made from its own description: whatever comes, it answers, as it says it does, and lives."""

from __future__ import annotations

import io
import json
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

from beavervision.evaluate.samples import portrait as sample_portrait
from tests.answers import multipart, until
from tests.media_factory import beeps, make_sound
from tests.test_serve import Server, started

SHORT, WHOLE = 3, 40  # requests for an operation, of each kind
ERRORS_THAT_PASS = ("queue_full", "busy")  # 503 with Retry-After: what the service says when it has enough to do


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("BEAVERVISION_")]:
            patch.delenv(name)
        made = started(tmp_path_factory.mktemp("serve"), serve_wait_s="0.2", serve_queue="64", live_idle_s="600")
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
def known(server: Server, uploads: list[bytes]) -> dict[str, list[str]]:
    """What requests can be about, by the name of the parameter, beside what is made up: a job that failed, one that was
    cancelled, an avatar, a live session."""
    fields: dict[str, bytes | str] = {"video": uploads[0], "text": "Hi.", "consent": "true"}
    jobs = [server.lipsync(fields, prefer="respond-async").json["id"] for _ in range(2)]
    server.call("POST", f"/api/v1/jobs/{jobs[1]}/cancel")
    until(lambda: server.job(jobs[0])["state"] == "failed")
    found = {"job_id": jobs}
    with sample_portrait() as path:
        body, kind = multipart({"video": path.read_bytes(), "consent": "true"})
    avatar = server.call("POST", "/api/v1/avatars", body, content_type=kind)
    assert avatar.status in (201, 202), avatar
    found["avatar_id"] = [avatar.json["id"]]
    wanted = json.dumps({"camera": True, "consent": True, "size_px": 128, "fps": 10}).encode()
    session = server.call("POST", "/api/v1/sessions", wanted, content_type="application/json")
    if session.status == 201:  # with the extra live
        found["session_id"] = [session.json["id"]]
    return found


@schemathesis.serializer("application/sdp", "application/trickle-ice-sdpfrag")
def as_text(context: Any, value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "replace")


def fuzz(server: Server, uploads: list[bytes], known: dict[str, list[str]], count: int) -> Counter[int]:
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
            paths: list[dict[str, Any]] = [{}]
            name = next((name for name in known if f"{{{name}}}" in operation.path), "")
            if not operation.path.endswith("}") or operation.method != "delete":
                paths += [{"path_parameters": {name: value}} for value in known.get(name, ())]
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
    assert seen[200] > 10
    assert seen[422] > 20
    assert server.process.poll() is None
    assert server.get("/readyz") == {"status": "ok"}
    assert [worker["restarts"] for worker in server.get("/api/v1/status")["workers"]] == [0]
    until(lambda: server.get("/api/v1/status")["queued"] == server.get("/api/v1/status")["running"] == 0)
    until(lambda: list((server.folder / "scratch").iterdir()) == [])


def test_requests_made_from_the_description_are_answered_as_it_says(
    server: Server, uploads: list[bytes], known: dict[str, list[str]]
) -> None:
    seen = fuzz(server, uploads, known, SHORT)
    assert seen.total() >= 150
    check(server, seen)


@pytest.mark.slow
def test_many_requests_made_from_the_description(
    server: Server, uploads: list[bytes], known: dict[str, list[str]], tmp_path: Path
) -> None:
    seen = fuzz(server, uploads, known, WHOLE)
    print(seen)
    assert seen.total() >= 1000
    check(server, seen)
