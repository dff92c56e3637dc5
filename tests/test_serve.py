"""The service as clients meet it: a real server process, real workers, HTTP over loopback."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra serve")

from beavervision.errors import UsageError
from beavervision.evaluate.samples import portrait as sample_portrait
from beavervision.serve.access import Links, add_key
from beavervision.serve.jobs import JobTable, State
from beavervision.serve.service import Service
from beavervision.settings import Settings
from beavervision.stages.decode import probe
from tests.answers import PATIENCE_S, Answer, multipart, until

LONG = "Papa moved away, and nobody ever asked him why he did so. " * 30
UPLOAD_MB = 2


@dataclass(slots=True)
class Server:
    """A server process on a folder of its own."""

    folder: Path
    process: subprocess.Popen[str]
    address: str
    headers: dict[str, str] = field(default_factory=dict)

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            sent = self.headers | {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def lipsync(self, fields: dict[str, bytes | str], **headers: str) -> Answer:
        body, kind = multipart(fields)
        return self.call("POST", "/api/v1/lipsync", body, content_type=kind, **headers)

    def get(self, path: str) -> Any:
        answer = self.call("GET", path)
        assert answer.status == 200, answer
        return answer.json

    def job(self, job_id: str) -> Any:
        return self.get(f"/api/v1/jobs/{job_id}")

    def files(self) -> list[str]:
        """What lies in the folders of jobs and of requests."""
        return sorted(
            str(p.relative_to(self.folder)) for top in ("files", "scratch") for p in (self.folder / top).glob("*")
        )

    def ended(self, code: int = 0) -> None:
        assert self.process.wait(PATIENCE_S) == code

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def started(folder: Path, **settings: str) -> Server:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "BEAVERVISION_SERVE_FOLDER": str(folder),
        "BEAVERVISION_SERVE_PORT": "0",
        "BEAVERVISION_SERVE_MAX_UPLOAD_MB": str(UPLOAD_MB),
        "BEAVERVISION_SERVE_MAX_TEXT_CHARS": str(len(LONG)),
        "BEAVERVISION_SERVE_QUEUE": "2",
        "BEAVERVISION_SERVE_WAIT_S": str(PATIENCE_S),
        "BEAVERVISION_DEVICE": "cpu",
        "BEAVERVISION_PRESET": "ultrafast",
        **{f"BEAVERVISION_{name.upper()}": value for name, value in settings.items()},
    }
    command = [sys.executable, "-m", "beavervision", "serve"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    said = process.stdout.readline()
    process.stdout.close()
    found = re.search(r"http://(\S+:\d+)", said)
    assert found, f"the server said {said!r} and ended with {process.wait()}"
    server = Server(folder, process, found[1])
    until(lambda: server.call("GET", "/readyz").status == 200)
    return server


@pytest.fixture(scope="module")
def face() -> bytes:
    """A face in few bytes."""
    with sample_portrait() as path, Image.open(path) as picture:
        small = io.BytesIO()
        picture.convert("RGB").resize((256, 256)).save(small, "JPEG", quality=92)
    return small.getvalue()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("BEAVERVISION_")]:
            patch.delenv(name)
        made = started(tmp_path_factory.mktemp("serve"))
    yield made
    made.kill()


@pytest.fixture
def asked(server: Server, face: bytes) -> Iterator[Callable[..., Any]]:
    """Queues a job; what it makes is deleted in the end."""
    made = []

    def ask(text: str = LONG, **headers: str) -> Any:
        answer = server.lipsync({"video": face, "text": text, "consent": "true"}, prefer="respond-async", **headers)
        assert answer.status == 202, answer
        assert answer.headers["location"] == f"/api/v1/jobs/{answer.json['id']}"
        assert answer.headers["preference-applied"] == "respond-async"
        made.append(answer.json["id"])
        return answer.json

    yield ask
    for job_id in made:
        server.call("DELETE", f"/api/v1/jobs/{job_id}")


def drawing(server: Server, job_id: str) -> None:
    until(lambda: server.job(job_id)["progress"]["pictures"] > 0)


# --- a job, from the request to the video -----------------------------------------------------------------------------


def test_a_request_answers_with_the_address_of_the_video(server: Server, tmp_path: Path) -> None:
    with sample_portrait() as path:
        answer = server.lipsync(
            {
                "video": path.read_bytes(),
                "text": "Hello there.",
                "settings": '{"speed": 1.5, "language": "en"}',
                "consent": "true",
            }
        )
    assert answer.status == 200, answer
    job = answer.json
    assert (job["state"], job["attempts"], job["progress"]["stage"], job["error"]) == ("succeeded", 1, "done", None)
    link = urlsplit(job["video_url"])
    assert link.netloc == server.address
    address = f"{link.path}?{link.query}"

    video = server.call("GET", address)
    assert (video.status, video.headers["content-type"]) == (200, "video/mp4")
    (tmp_path / "a.mp4").write_bytes(video.body)
    info = probe(tmp_path / "a.mp4")
    assert (info.width_px, info.frames) == (512, job["progress"]["pictures"])
    assert server.call("HEAD", address).headers["content-length"] == str(len(video.body))

    part = server.call("GET", address, range="bytes=100-199")
    assert (part.status, part.body) == (206, video.body[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(video.body)}"
    for beyond in (f"bytes={len(video.body)}-", "bytes=-0"):
        refused = server.call("GET", address, range=beyond)
        assert (refused.status, refused.json["code"]) == (416, "range")
        assert refused.headers["content-range"] == f"bytes */{len(video.body)}"
    for none in ("bytes=abc", "bytes=5-2", "items=0-5", "bytes="):
        whole = server.call("GET", address, range=none)
        assert (whole.status, whole.body) == (200, video.body), none
    two = server.call("GET", address, range="bytes=0-1, -2")
    assert two.status == 206 and two.headers["content-type"].startswith("multipart/byteranges")
    one = server.call("GET", address, range=f"bytes={len(video.body)}-, 3-5, -0")
    assert (one.status, one.body) == (206, video.body[3:6]), "those beyond the end are left out"
    version = video.headers["etag"]
    for wanted, given, status in (("3-5", version, 206), ("3-5", '"old"', 200), (f"{len(video.body)}-", '"old"', 200)):
        answer = server.call("GET", address, range=f"bytes={wanted}", if_range=given)
        assert answer.status == status, (wanted, given)

    tampered = address[:-1] + ("0" if address[-1] != "0" else "1")
    later = re.sub(r"expires=\d+", lambda m: f"expires={int(m[0][8:]) + 60}", address)
    for wrong in (tampered, later, f"{link.path}?expires=1", address.replace(job["id"], "0" * 24)):
        refused = server.call("GET", wrong)
        assert (refused.status, refused.json["code"]) == (403, "link_invalid"), wrong
    signer = Links((server.folder / "secret").read_bytes().strip(), -1)
    expired = server.call("GET", f"{link.path}?{signer.sign(link.path)[0]}")
    assert (expired.status, expired.json["code"]) == (403, "link_expired")
    assert parse_qs(link.query).keys() == {"expires", "signature"}

    report = server.get(f"/api/v1/jobs/{job['id']}/report")
    assert report["track"]["pictures"]["ok"] == info.frames
    assert str(server.folder) not in json.dumps(report)
    assert not (server.folder / "files" / job["id"] / "in").exists()

    assert [j["id"] for j in server.get("/api/v1/jobs?state=succeeded")["jobs"]] == [job["id"]]
    assert server.call("DELETE", f"/api/v1/jobs/{job['id']}").status == 204
    assert server.call("GET", address).json["code"] == "gone"
    assert server.files() == []


def test_a_killed_workers_job_is_taken_up_again_and_finishes(server: Server, asked: Callable[..., Any]) -> None:
    job = asked("Papa moved away. " * 3)
    restarts = server.get("/api/v1/status")["workers"][0]["restarts"]
    connection = http.client.HTTPConnection(server.address, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("GET", f"/api/v1/jobs/{job['id']}/events")
        stream = connection.getresponse()
        assert stream.headers["content-type"].startswith("text/event-stream")
        killed, told = False, []
        for line in stream:
            if not line.startswith(b"data: "):
                continue
            told.append(json.loads(line[6:]))
            if not killed and told[-1]["progress"]["pictures"]:
                os.kill(server.get("/api/v1/status")["workers"][0]["pid"], signal.SIGKILL)
                killed = True
    assert killed
    assert (told[-1]["state"], told[-1]["attempts"]) == ("succeeded", 2)
    assert told[-1]["video_url"]
    assert {one["state"] for one in told} >= {"running", "succeeded"}
    assert server.get("/api/v1/status")["workers"][0]["restarts"] == restarts + 1
    assert server.call("GET", f"/api/v1/jobs/{job['id']}/result").status == 200
    assert server.files() == [f"files/{job['id']}"]


def test_a_cancelled_job_stops_and_leaves_nothing(server: Server, asked: Callable[..., Any]) -> None:
    job = asked()
    drawing(server, job["id"])
    cancelled = server.call("POST", f"/api/v1/jobs/{job['id']}/cancel")
    began_s = time.monotonic()
    assert (cancelled.status, cancelled.json["state"]) == (200, "cancelled")
    until(lambda: server.files() == [])
    assert time.monotonic() - began_s < 2  # one, where the machine is free
    assert server.call("GET", f"/api/v1/jobs/{job['id']}/result").json["code"] == "no_result"
    assert server.call("POST", f"/api/v1/jobs/{job['id']}/cancel").json["state"] == "cancelled"
    after = asked("Hi.")
    until(lambda: server.job(after["id"])["state"] == "succeeded")


def test_only_so_many_wait_and_a_key_is_one_job(server: Server, asked: Callable[..., Any], face: bytes) -> None:
    first = asked(idempotency_key="k1")
    until(lambda: server.job(first["id"])["state"] == "running")
    assert asked(idempotency_key="k1")["id"] == first["id"]
    other = server.lipsync({"video": face, "text": "Other.", "consent": "true"}, idempotency_key="k1")
    assert (other.status, other.json["code"]) == (422, "idempotency")
    second = asked()
    asked()
    full = server.lipsync({"video": face, "text": "Hi.", "consent": "true"})
    assert (full.status, full.json["code"]) == (503, "queue_full")
    assert int(full.headers["retry-after"]) >= 1
    assert server.call("GET", "/readyz").status == 503
    assert server.call("DELETE", f"/api/v1/jobs/{second['id']}").status == 204
    assert server.call("GET", "/readyz").status == 200


def test_a_job_that_fails_says_why_to_the_request_that_waits(server: Server) -> None:
    gray = io.BytesIO()
    Image.new("RGB", (128, 128), (90, 90, 90)).save(gray, "PNG")
    answer = server.lipsync({"video": gray.getvalue(), "text": "Hi.", "consent": "true"})
    assert (answer.status, answer.json["code"]) == (422, "no_face")
    assert answer.json["detail"].startswith("The video: no face was found. Use ")
    job = server.get(answer.json["job"])
    assert (job["state"], job["error"]["code"]) == ("failed", "no_face")
    assert server.files() == []


# --- what is refused --------------------------------------------------------------------------------------------------


def picture(width: int, height: int) -> bytes:
    made = io.BytesIO()
    Image.new("1", (width, height)).save(made, "PNG")
    return made.getvalue()


GOOD = {"text": "Hi.", "consent": "true"}


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"settings": '{"sped": 2}'}, 422, "invalid"),
        ({"settings": '{"speed": 3}'}, 422, "invalid"),
        ({"settings": '{"speed": NaN}'}, 422, "invalid"),
        ({"settings": '{"face": "2,2"}'}, 422, "invalid"),
        ({"settings": "{"}, 422, "invalid"),
        ({"settings": '{"voice": "nobody"}'}, 422, "usage"),
        ({"settings": '{"model": "none"}'}, 422, "model"),
        ({"settings": '{"model": "wav2lip"}'}, 403, "licence"),
        ({"settings": '{"restore": "none"}'}, 422, "model"),
        ({"settings": '{"boxes": "none"}'}, 422, "model"),
        ({"settings": '{"whole_box": true}'}, 422, "usage"),
        ({"settings": '{"expression": "gleeful"}'}, 422, "usage"),
        ({"settings": '{"phones": [{"ipa": "h", "start_ms": 0, "end_ms": 9}]}'}, 422, "usage"),
        ({"settings": '{"phones": [{"ipa": "h", "start_ms": -1, "end_ms": 9}]}'}, 422, "invalid"),
        ({"text": "Привет."}, 422, "text"),
        ({"text": "Hello [wild] you."}, 422, "text"),
        ({"consent": "false"}, 422, "consent"),
        ({"audio": b"x"}, 422, "usage"),
        ({"text": "🙂"}, 422, "text"),
        ({"text": LONG + "more"}, 422, "text"),
        ({"text": "x" * (4 * len(LONG) + 1)}, 413, "too_large"),
        ({"url": "http://localhost/"}, 422, "unknown_field"),
        ({"video": b"x" * (UPLOAD_MB << 20) + b"x"}, 413, "too_large"),
        ({"video": b"no video at all"}, 422, "media"),
        ({"video": b""}, 422, "media"),
        (
            {"video": b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"},
            422,
            "media",
        ),
        ({"video": b"ffconcat version 1.0\nfile '/etc/passwd'\n"}, 422, "media"),
        ({"video": picture(20_000, 20_000)}, 422, "media"),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_a_bad_request_is_refused_and_leaves_nothing(
    server: Server, face: bytes, fields: dict[str, bytes | str], status: int, code: str
) -> None:
    answer = server.lipsync({"video": face, **GOOD, **fields})
    assert (answer.status, answer.json["code"]) == (status, code), answer
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json["type"] == f"urn:beavervision:problem:{code}"
    assert answer.json["status"] == status
    assert answer.json["title"]
    assert answer.json["detail"].endswith(".")
    assert not re.search(
        r"--[a-z]|beavervision [a-z]+|Extra inputs", answer.json["detail"]
    )  # words of the command line
    assert str(server.folder) not in answer.body.decode()
    assert server.files() == []


def test_requests_that_are_no_upload_are_refused(server: Server, face: bytes) -> None:
    body, kind = multipart({"video": face, **GOOD})
    upload = "/api/v1/lipsync"
    cases = [
        (server.call("POST", upload, b"{}", content_type="application/json"), 415, "not_multipart"),
        (server.call("POST", upload, body[: len(body) // 2], content_type=kind), 400, "malformed"),
        (server.call("POST", upload, b"rubbish", content_type=kind), 400, "malformed"),
        (
            server.call("POST", upload, body, content_type=f"multipart/form-data; boundary={'b' * 300}"),
            400,
            "malformed",
        ),
        (server.lipsync({"text": "Hi.", "consent": "true"}), 422, "usage"),
        (server.lipsync({"video": face, "consent": "true"}), 422, "usage"),
    ]
    for answer, status, code in cases:
        assert (answer.status, answer.json["code"]) == (status, code), answer
    assert server.files() == []


def test_an_endless_upload_is_stopped_on_the_way(server: Server) -> None:
    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="video"\r\n\r\n'
        for _ in range(64):
            yield bytes(1 << 20)

    connection = http.client.HTTPConnection(server.address, timeout=PATIENCE_S)
    with contextlib.closing(connection), contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.request(
            "POST",
            "/api/v1/lipsync",
            endless(),
            {"content-type": "multipart/form-data; boundary=b"},
            encode_chunked=True,
        )
        assert connection.getresponse().status == 413
    until(lambda: server.files() == [])


@pytest.mark.parametrize("wanted", ["2,2", "left\n", ""])
def test_a_face_that_is_none_is_told_which_there_are(server: Server, face: bytes, wanted: str) -> None:
    answer = server.lipsync({"video": face, **GOOD, "settings": json.dumps({"face": wanted})})
    (error,) = answer.json["errors"]
    assert error["field"] == "face"
    assert error["message"].startswith("it is one of largest, speaker, left")


def test_an_upload_that_breaks_off_is_no_defect(server: Server) -> None:
    def count(status: int) -> int:
        page = server.call("GET", "/metrics").body.decode()
        line = rf'^beavervision_http_seconds_count{{method="POST",route="/api/v1/lipsync",status="{status}"}} (\d+)'
        found = re.search(line, page, re.MULTILINE)
        return int(found[1]) if found else 0

    broken, defects = count(400), count(500)
    host, _, port = server.address.partition(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /api/v1/lipsync HTTP/1.1\r\nHost: {server.address}\r\nContent-Length: 1000\r\n"
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n".encode())
        until(lambda: server.files() != [])
    until(lambda: count(400) == broken + 1)
    assert count(500) == defects
    until(lambda: server.files() == [])


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code"),
    [
        ("GET", "/nowhere", {}, 404, "no_page"),
        ("PUT", "/api/v1/jobs", {}, 405, "method"),
        ("GET", f"/api/v1/jobs/{'0' * 24}", {}, 404, "no_job"),
        ("DELETE", f"/api/v1/jobs/{'0' * 24}", {}, 404, "no_job"),
        ("GET", f"/api/v1/jobs/{'0' * 24}/events", {}, 404, "no_job"),
        ("GET", "/api/v1/jobs/..%2f..%2fsecret", {}, 404, "no_page"),
        ("GET", "/api/v1/jobs/me", {}, 422, "invalid"),
        ("GET", "/api/v1/jobs?limit=0", {}, 422, "invalid"),
        ("POST", "/api/v1/speech", {"content-length": str(1 << 20)}, 413, "too_large"),
        ("POST", "/api/v1/speech", {"transfer-encoding": "chunked"}, 411, "length_required"),
        ("GET", "/api/v1/jobs", {"host": "evil.example"}, 403, "not_local"),
        ("GET", "/api/v1/jobs", {"origin": "http://evil.example"}, 403, "origin"),
    ],
)
def test_every_error_is_a_problem_document(
    server: Server, method: str, path: str, headers: dict[str, str], status: int, code: str
) -> None:
    answer = server.call(method, path, **headers)
    assert (answer.status, answer.json["code"], answer.json["status"]) == (status, code, status)
    assert answer.headers["content-type"] == "application/problem+json"
    assert "access-control-allow-origin" not in answer.headers


# --- the rest of the API ----------------------------------------------------------------------------------------------


def test_speech_comes_with_the_times_of_its_phones(server: Server) -> None:
    wanted = json.dumps({"text": "Hello there.", "speed": 1.2}).encode()
    said = server.call("POST", "/api/v1/speech", wanted, content_type="application/json")
    assert said.status == 200, said
    sound = base64.b64decode(said.json["audio_base64"])
    with wave.open(io.BytesIO(sound)) as file:
        assert file.getnframes() / file.getframerate() == pytest.approx(said.json["seconds"], abs=1e-3)
    phones = said.json["phones"]
    assert phones[0]["ipa"] == "h"
    assert phones[-1]["end_ms"] <= said.json["seconds"] * 1000
    alone = server.call("POST", "/api/v1/speech", wanted, content_type="application/json", accept="audio/wav")
    assert (alone.headers["content-type"], alone.body) == ("audio/wav", sound)
    for body in (b'{"text": "\xff"}', b"[" * 30_000):
        none = server.call("POST", "/api/v1/speech", body, content_type="application/json")
        assert (none.status, none.json["code"]) == (400, "malformed")
    bad = server.call("POST", "/api/v1/speech", b'{"text": "Hi.", "colour": 1}', content_type="application/json")
    assert (bad.status, bad.json["errors"]) == (422, [{"field": "body.colour", "message": "there is no such field"}])


def test_phones_that_speech_told_lead_the_lips_of_its_sound(server: Server, face: bytes) -> None:
    said = server.call("POST", "/api/v1/speech", b'{"text": "Pam!"}', content_type="application/json").json
    sound, phones = base64.b64decode(said["audio_base64"]), said["phones"]

    def asked(phones: list[dict[str, Any]]) -> Any:
        return server.lipsync(
            {"video": face, "audio": sound, "consent": "true", "settings": json.dumps({"phones": phones})}
        )

    done = asked(phones)
    assert done.status == 200, done
    assert server.get(f"/api/v1/jobs/{done.json['id']}/report")["speech"]["phones"] == len(phones) == 3
    assert server.call("DELETE", f"/api/v1/jobs/{done.json['id']}").status == 204
    refused = asked(phones[::-1])
    assert (refused.status, refused.json["code"]) == (422, "usage")
    assert "before the end of the one before" in refused.json["detail"]
    assert server.files() == []


def test_what_there_is_can_be_listed(server: Server) -> None:
    assert any(not voice["unavailable"] for voice in server.get("/api/v1/voices"))
    models = {model["name"]: model for model in server.get("/api/v1/models")}
    assert (models["beaver"]["usable"], models["wav2lip"]["usable"]) == (True, False)
    assert server.get("/healthz") == server.get("/readyz") == {"status": "ok"}
    document = server.get("/api/v1/openapi.json")
    form = document["paths"]["/api/v1/lipsync"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert form["schema"]["properties"]["settings"]["additionalProperties"] is False
    assert form["schema"]["properties"]["settings"]["examples"]


def test_status_and_metrics_are_measured(server: Server, asked: Callable[..., Any]) -> None:
    job = asked("Hi.")
    until(lambda: server.job(job["id"])["state"] == "succeeded")
    status = server.get("/api/v1/status")
    assert status["succeeded"] >= 1
    assert status["response_p50_s"] > 0
    assert status["processed_hours"] > 0
    assert 0 < status["memory"][0]["used_bytes"] < status["memory"][0]["budget_bytes"]
    name = 'beavervision_jobs_total{outcome="succeeded",worker="worker-0"} '
    until(lambda: name in server.call("GET", "/metrics").body.decode(), 5)
    page = server.call("GET", "/metrics").body.decode()
    kinds = re.findall(r"^# TYPE (\S+) ", page, re.MULTILINE)
    assert "beavervision_pictures_total" in kinds
    assert len(kinds) == len(set(kinds))
    assert 'beavervision_http_seconds_count{method="GET",route="/api/v1/jobs/{job_id}",status="200"}' in page
    events = [json.loads(line) for line in (server.folder / "audit.jsonl").read_text().splitlines()]
    mine = [event for event in events if event.get("job") == job["id"]]
    assert [event["event"] for event in mine] == ["accepted", "ended"]
    assert (mine[0]["owner"], mine[0]["address"], mine[0]["consent"]) == ("local", "127.0.0.1", True)


# --- keys, and the end of a server ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"serve_host": "0.0.0.0"}, "--new-key"), ({"model": "none"}, "one of: beaver"), ({"voice": "none"}, "no voice")],
)
def test_what_cannot_be_served_is_refused_at_the_start(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Service(Settings(serve_folder=tmp_path, data_dir=tmp_path, **setting))
    assert list(tmp_path.iterdir()) == []


def test_a_server_drains_and_the_next_one_goes_on(tmp_path: Path, face: bytes) -> None:
    keys = {name: add_key(tmp_path / "keys", name) for name in ("ann", "bob")}
    assert all(key not in (tmp_path / "keys").read_text() for key in keys.values())
    fields: dict[str, bytes | str] = {"video": face, "consent": "true"}
    server = started(tmp_path)
    try:
        command = [sys.executable, "-m", "beavervision", "serve", "--folder", tmp_path, "--port", "0"]
        second = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
        assert (second.returncode, "is served already" in second.stderr) == (2, True), second
        refused = server.lipsync(fields | {"text": "Hi."})
        assert (refused.status, refused.json["code"]) == (401, "no_key")
        server.headers = {"authorization": f"Bearer {keys['ann']}"}
        running = server.lipsync(fields | {"text": "Papa moved away. " * 4}, prefer="respond-async").json["id"]
        waiting = server.lipsync(fields | {"text": LONG}, prefer="respond-async").json["id"]
        bob = server.call("GET", f"/api/v1/jobs/{running}", authorization=f"Bearer {keys['bob']}")
        assert (bob.status, bob.json["code"]) == (404, "no_job")
        drawing(server, running)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: server.get("/api/v1/status")["draining"])
        late = server.lipsync(fields | {"text": "Hi."})
        assert (late.status, late.json["code"]) == (503, "draining")
        server.ended()
    finally:
        server.kill()
    table = JobTable(f"sqlite:///{tmp_path / 'jobs.sqlite'}", attempts=3, lease_s=15)
    assert [state_of(table, job_id) for job_id in (running, waiting)] == [State.SUCCEEDED, State.QUEUED]

    server = started(tmp_path)
    try:
        server.headers = {"authorization": f"Bearer {keys['ann']}"}
        drawing(server, waiting)
        worker = server.get("/api/v1/status")["workers"][0]["pid"]
    finally:
        server.kill()
    until(lambda: not Path(f"/proc/{worker}").exists() if sys.platform == "linux" else True)
    until(lambda: state_of(table, waiting) is State.QUEUED)
    job = table.get(waiting)
    assert job is not None
    assert job.attempts == 0
    table.close()


def state_of(table: JobTable, job_id: str) -> State | None:
    job = table.get(job_id)
    return None if job is None else job.state
