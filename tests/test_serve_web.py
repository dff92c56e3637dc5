"""The web pages and the previews as HTTP has them; tests/test_serve_browser.py has them in a browser."""

from __future__ import annotations

import asyncio
import io
import re
import zipfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra serve")

from beavervision.evaluate.samples import portrait as sample_portrait
from beavervision.serve.app import create_app
from beavervision.serve.preview import Previewer
from beavervision.serve.schema import JobOut, LipsyncSettings, ProblemOut
from beavervision.serve.service import Service
from beavervision.settings import Settings
from tests.answers import Answer, multipart

WEB = files("beavervision") / "serve" / "web"
NAMES = sorted(entry.name for entry in WEB.iterdir())
PREVIEW = "/api/v1/expressions/preview"


class Client:
    """Calls an ASGI application."""

    def __init__(self, app: Any) -> None:
        self._app = app

    def call(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        return asyncio.run(self._call(method, path, body, headers))

    async def _call(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        sent: list[Any] = []
        named = {"host": "localhost", "content-length": str(len(body))} | headers
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "client": ("127.0.0.1", 50_000),
            "server": ("127.0.0.1", 8000),
            "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in named.items()],
        }

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        head = {k.decode().lower(): v.decode() for k, v in sent[0]["headers"]}
        return Answer(sent[0]["status"], head, b"".join(m.get("body", b"") for m in sent[1:]))

    def preview(self, picture: bytes, **fields: str) -> Answer:
        body, kind = multipart({"expression": "happy:0.8", **fields, "video": picture})
        return self.call("POST", PREVIEW, body, content_type=kind)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(Settings(serve_folder=tmp_path_factory.mktemp("web"), serve_max_upload_mb=3))
    yield made
    made.close()


@pytest.fixture(scope="module")
def client(service: Service) -> Client:
    return Client(create_app(service))


@pytest.fixture(scope="module")
def face() -> bytes:
    with sample_portrait() as path:
        return path.read_bytes()


# --- the pages --------------------------------------------------------------------------------------------------------


def test_a_page_lets_nothing_run_but_its_own_files(client: Client) -> None:
    page = client.call("GET", "/")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert "camera=(self)" in page.headers["permissions-policy"]


def test_a_page_is_asked_for_again_and_its_files_are_not(client: Client) -> None:
    page = client.call("GET", "/")
    assert page.headers["cache-control"] == "no-cache"
    again = client.call("GET", "/", if_none_match=f'"other", {page.headers["etag"]}')
    assert (again.status, again.body) == (304, b"")
    assert client.call("GET", "/", if_none_match='"other"').status == 200
    addresses = re.findall(r'(?:href|src)="(/web/[^"]+)"', page.body.decode())
    kinds = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    assert {Path(address).suffix for address in addresses} == set(kinds)
    for address in addresses:
        part = client.call("GET", address)
        assert (part.status, part.headers["content-type"].split(";")[0]) == (200, kinds[Path(address).suffix])
        assert part.body == (WEB / Path(address).name).read_bytes()
        assert "immutable" in part.headers["cache-control"]
        assert part.headers["x-content-type-options"] == "nosniff"
    assert client.call("GET", str(Path(addresses[0]).with_name("sample.png"))).body.startswith(b"\x89PNG")


def test_other_versions_and_other_files_are_refused(client: Client) -> None:
    page = client.call("GET", "/").body.decode()
    version = re.findall(r"/web/([0-9a-f]{16})/", page)[0]
    for path in (
        "/web/0000000000000000/app.js",
        f"/web/{version}/index.html",
        f"/web/{version}/nothing.js",
        f"/web/{version}/../pages.py",
        "/web/",
    ):
        refused = client.call("GET", path)
        assert (refused.status, refused.json["code"]) == (404, "no_page"), path
    assert client.call("POST", "/").json["code"] == "method"


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".html")])
def test_a_page_has_nothing_inline(name: str) -> None:
    text = (WEB / name).read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=|javascript:", text)
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for attribute in ("for", "aria-labelledby", "aria-describedby"):
        for named in re.findall(rf'\b{attribute}="([^"]+)"', text):
            assert set(named.split()) <= set(ids), named


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith((".html", ".js", ".css", ".svg"))])
def test_nothing_is_loaded_from_elsewhere(name: str) -> None:
    text = (WEB / name).read_text()
    elsewhere = set(re.findall(r"https?://[^\s\"'`)]+", text)) - {"http://www.w3.org/2000/svg"}
    assert not elsewhere
    for imported in re.findall(r'(?:from|import) "\./([^"]+)"', text):
        assert imported in NAMES


def test_the_description_has_examples_that_hold(client: Client) -> None:
    document = client.call("GET", "/api/v1/openapi.json").json
    assert document["security"] == [{"key": []}, {}], "a key, or none where there are none"
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    for operation in operations:
        problem = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemOut"}}}
        assert operation["responses"]["4XX"]["content"] == operation["responses"]["5XX"]["content"] == problem
    for path in ("/api/v1/lipsync", "/api/v1/avatars", PREVIEW):
        form = document["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        told = {name: field for name, field in form["properties"].items() if field["type"] == "string"}
        unexplained = [n for n, f in told.items() if not f.keys() & {"format", "enum", "examples"}]
        assert not unexplained, path
    settings = document["paths"]["/api/v1/lipsync"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    for example in settings["properties"]["settings"]["examples"]:
        LipsyncSettings.model_validate(example)
    for example in document["components"]["schemas"]["ProblemOut"]["examples"]:
        ProblemOut.model_validate(example)
    for example in document["components"]["schemas"]["JobOut"]["examples"]:
        progress = {"step": None, "remaining_s": None} | example["progress"]
        JobOut.model_validate({"error": None} | example | {"progress": progress})
    events = document["paths"]["/api/v1/jobs/{job_id}/events"]["get"]["responses"]["200"]["content"]
    assert list(events) == ["text/event-stream"]


def test_the_limits_are_told(client: Client) -> None:
    limits = client.call("GET", "/api/v1/status").json["limits"]
    defaults = Settings()
    assert limits == {
        "upload_mb": 3,
        "text_chars": defaults.serve_max_text_chars,
        "media_s": defaults.serve_max_media_s,
        "side_px": defaults.serve_max_side_px,
        "keep_hours": defaults.serve_keep_hours,
        "consent": True,
    }


def test_the_pages_are_in_the_wheel(tmp_path: Path) -> None:
    wheel = pytest.importorskip("hatchling.builders.wheel", reason="needs hatchling")
    root = Path(__file__).parents[1]
    if not (root / "pyproject.toml").is_file():
        pytest.skip("not a source tree")
    (built,) = wheel.WheelBuilder(str(root)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(built) as archive:
        inside = {Path(name).name for name in archive.namelist() if name.startswith("beavervision/serve/web/")}
    assert inside == set(NAMES)


# --- previews ---------------------------------------------------------------------------------------------------------


def opened(answer: Answer) -> np.ndarray:
    assert (answer.status, answer.headers["content-type"]) == (200, "image/jpeg"), answer.body[:300]
    return np.asarray(Image.open(io.BytesIO(answer.body)).convert("RGB")).astype(int)


def test_a_preview_changes_the_face_alone(client: Client, service: Service, face: bytes) -> None:
    still = opened(client.preview(face, expression="neutral:0"))
    happy = opened(client.preview(face, expression="happy:0.9"))
    assert still.shape == happy.shape == (512, 512, 3)
    changed = np.abs(still - happy).max(axis=2) > 24
    rows, columns = np.nonzero(changed)
    assert changed.sum() > 200
    # the head of the sample portrait
    assert rows.min() > 40 and rows.max() < 260 and columns.min() > 150 and columns.max() < 360
    strong, weak = (np.abs(still - opened(client.preview(face, expression=f"happy:{v}"))).sum() for v in (1, 0.3))
    assert strong > 1.5 * weak
    close = opened(client.preview(face, expression="happy:0.9", view="face", side_px="128"))
    assert close.shape == (128, 128, 3)
    assert not list(service.place.scratch.iterdir())


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"expression": "gleeful:0.5"}, "usage"),
        ({"expression": "happy:7"}, "usage"),
        ({"side_px": "99999"}, "invalid"),
        ({"view": "back"}, "invalid"),
        ({"colour": "red"}, "unknown_field"),
    ],
)
def test_a_preview_that_makes_no_sense_is_refused(
    client: Client, face: bytes, fields: dict[str, str], code: str
) -> None:
    refused = client.preview(face, **fields)
    assert (refused.status, refused.json["code"]) == (422, code)


def png(side_px: int) -> bytes:
    data = io.BytesIO()
    Image.new("L", (side_px, side_px), 90).save(data, "PNG")
    return data.getvalue()


def test_pictures_that_cannot_be_previewed_say_why(client: Client, service: Service, face: bytes) -> None:
    for picture, code in ((b"no picture", "media"), (png(64), "no_face"), (png(2000), "media"), (face[:5000], "media")):
        refused = client.preview(picture)
        assert (refused.status, refused.json["code"]) == (422, code)
        assert str(service.settings.serve_folder) not in refused.body.decode()
    assert client.preview(bytes((4 << 20) + 1)).json["code"] == "too_large"
    assert not list(service.place.scratch.iterdir())


def test_a_killed_previewer_is_started_again(client: Client, service: Service, face: bytes) -> None:
    before = opened(client.preview(face))
    process = service.previewer._process
    assert process is not None
    process.kill()
    process.wait()
    assert np.array_equal(before, opened(client.preview(face)))


def test_a_picture_that_kills_the_previewer_is_told_as_such(
    monkeypatch: pytest.MonkeyPatch, service: Service, face: bytes, tmp_path: Path
) -> None:
    (tmp_path / "face.png").write_bytes(face)
    monkeypatch.setattr("beavervision.serve.preview._COMMAND", ["false"])
    previewer = Previewer()
    with pytest.raises(Exception, match="cannot be previewed within the limits"):
        previewer.show(tmp_path / "face.png", "1", "largest", service.look("happy"), "face", 64)
    previewer.close()
