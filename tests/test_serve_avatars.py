"""Avatars: a face uploaded once, looked at once, used by many jobs."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("fastapi", reason="the service needs the extra serve")

from beavervision.media import BLENDSHAPES, POINTS, Face, FaceState, FaceTrack, Reference, Region
from beavervision.pipeline import Look
from beavervision.serve.avatars import Avatars
from beavervision.serve.jobs import NewJob, new_id
from beavervision.serve.looks import load_choice, load_look, save_look
from beavervision.serve.place import Place
from beavervision.serve.supervisor import Supervisor
from beavervision.settings import Settings
from beavervision.stages.detect import FaceChoice, Survey
from tests.answers import multipart, until
from tests.test_serve import Server, face, started

__all__ = ["face"]  # a fixture


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("BEAVERVISION_")]:
            patch.delenv(name)
        made = started(tmp_path_factory.mktemp("serve"), serve_max_avatars="2", serve_mark="1")
    yield made
    made.kill()


def upload(server: Server, fields: dict[str, bytes | str], **headers: str) -> Any:
    body, kind = multipart(fields)
    return server.call("POST", "/api/v1/avatars", body, content_type=kind, **headers)


def test_an_avatar_is_looked_at_once_and_used_by_jobs(server: Server, face: bytes) -> None:
    made = upload(server, {"video": face, "name": "Eileen", "face": "left", "consent": "true"})
    assert made.status == 201, made
    avatar = made.json
    assert made.headers["location"] == avatar["links"]["self"] == f"/api/v1/avatars/{avatar['id']}"
    assert (avatar["state"], avatar["name"], avatar["kind"], avatar["people"]) == ("ready", "Eileen", "still", 1)
    assert (avatar["width_px"], avatar["height_px"], avatar["face"]) == (256, 256, "left")
    assert [a["id"] for a in server.get("/api/v1/avatars")] == [avatar["id"]]
    picture = server.call("GET", avatar["links"]["picture"])
    assert Image.open(io.BytesIO(picture.body)).size == (256, 256)

    survey = server.folder / "files" / f"avatar-{avatar['id']}" / "out" / "look.npz"
    read_before = survey.stat().st_atime_ns, survey.stat().st_mtime_ns
    job = server.lipsync({"avatar": avatar["id"], "text": "Hi."})  # the consent came with the avatar
    assert (job.status, job.json["state"], job.json["kind"]) == (200, "succeeded", "lipsync"), job
    assert server.call("GET", job.json["links"]["result"]).status == 200
    assert survey.stat().st_mtime_ns == read_before[1]
    looked = [j for j in server.get("/api/v1/jobs")["jobs"] if j["kind"] == "avatar"]
    assert [(j["state"], j["video_url"], "result" in j["links"]) for j in looked] == [("succeeded", None, False)]
    assert server.call("GET", f"/api/v1/jobs/{looked[0]['id']}/result").json["code"] == "no_result"

    cases: list[tuple[dict[str, bytes | str], int, str]] = [
        ({"avatar": avatar["id"], "video": face, "text": "Hi."}, 422, "usage"),
        ({"avatar": "0" * 24, "text": "Hi."}, 404, "no_avatar"),
        ({"avatar": "../x", "text": "Hi."}, 404, "no_avatar"),
        ({"avatar": avatar["id"], "text": "Hi.", "settings": '{"face": "left"}'}, 422, "usage"),
        ({"avatar": avatar["id"], "audio": b"x"}, 422, "consent"),  # the voice's is still to be given
    ]
    for fields, status, code in cases:
        answer = server.lipsync(fields)
        assert (answer.status, answer.json["code"]) == (status, code), answer

    assert server.call("DELETE", f"/api/v1/avatars/{avatar['id']}").status == 204
    assert server.call("GET", avatar["links"]["picture"]).json["code"] == "no_avatar"
    assert not survey.parent.parent.exists()
    events = [json.loads(line) for line in (server.folder / "audit.jsonl").read_text().splitlines()]
    mine = [e for e in events if e.get("avatar") == avatar["id"]]
    assert [e["event"] for e in mine] == ["avatar", "avatar_deleted"]
    assert mine[0]["consent"] is True


def test_what_cannot_be_an_avatar_is_refused_and_leaves_nothing(server: Server, face: bytes) -> None:
    gray = io.BytesIO()
    Image.new("RGB", (128, 128), (90, 90, 90)).save(gray, "PNG")
    cases: list[tuple[dict[str, bytes | str], int, str]] = [
        ({"video": face}, 422, "consent"),
        ({"consent": "true"}, 422, "usage"),
        ({"video": face, "consent": "true", "name": "x" * 101}, 422, "invalid"),
        ({"video": face, "consent": "true", "face": "nobody"}, 422, "invalid"),
        ({"video": face, "consent": "true", "text": "Hi."}, 422, "unknown_field"),
        ({"video": face, "consent": "true", "audio": b"x"}, 422, "unknown_field"),
        ({"video": b"no video", "consent": "true"}, 422, "media"),
        ({"video": gray.getvalue(), "consent": "true"}, 422, "no_face"),
        ({"video": face, "consent": "true", "face": "7"}, 422, "no_face"),
    ]
    for fields, status, code in cases:
        answer = upload(server, fields)
        assert (answer.status, answer.json["code"]) == (status, code), answer
        assert "--" not in answer.json["detail"]
    assert server.get("/api/v1/avatars") == []
    until(lambda: not list((server.folder / "files").glob("avatar-*")))


def test_an_avatar_whose_look_is_cancelled_or_fails_leaves_no_files(server: Server, face: bytes) -> None:
    gray = io.BytesIO()
    Image.new("RGB", (128, 128), (90, 90, 90)).save(gray, "PNG")
    failing = upload(server, {"video": gray.getvalue(), "consent": "true"}, prefer="respond-async").json
    until(lambda: server.get(failing["links"]["self"])["state"] == "failed")
    assert server.get(failing["links"]["self"])["error"]["code"] == "no_face"
    until(lambda: not list((server.folder / "files").glob("avatar-*")))
    assert server.call("DELETE", failing["links"]["self"]).status == 204
    waiting = upload(server, {"video": face, "consent": "true"}, prefer="respond-async").json
    if "job" in waiting["links"]:  # else the worker was faster
        stopped = server.call("POST", f"{waiting['links']['job']}/cancel").json
        if stopped["state"] == "cancelled":
            assert server.call("GET", waiting["links"]["self"]).json["code"] == "no_avatar"
            until(lambda: not list((server.folder / "files").glob("avatar-*")))
    for avatar in server.get("/api/v1/avatars"):
        assert server.call("DELETE", avatar["links"]["self"]).status == 204


def test_only_so_many_and_deleting_one_on_the_way(server: Server, face: bytes) -> None:
    ids = [upload(server, {"video": face, "consent": "true"}, prefer="respond-async").json["id"] for _ in range(2)]
    full = upload(server, {"video": face, "consent": "true"})
    assert (full.status, full.json["code"]) == (409, "avatars")
    early = server.lipsync({"avatar": ids[1], "text": "Hi."})
    assert (early.status, early.json.get("code")) in ((409, "avatar_not_ready"), (200, None))
    for avatar_id in ids:
        assert server.call("DELETE", f"/api/v1/avatars/{avatar_id}").status == 204
    until(lambda: not list((server.folder / "files").glob("avatar-*")))
    assert server.get("/api/v1/avatars") == []


def test_an_upload_that_is_repeated_with_its_key_is_one_avatar(server: Server, face: bytes) -> None:
    fields: dict[str, bytes | str] = {"video": face, "consent": "true"}
    first = upload(server, fields, idempotency_key="a1")
    again = upload(server, fields, idempotency_key="a1")
    assert (first.status, again.status) == (201, 201), (first, again)
    assert again.json["id"] == first.json["id"]
    assert len(server.get("/api/v1/avatars")) == 1
    for other in (
        upload(server, {**fields, "name": "B"}, idempotency_key="a1"),
        server.lipsync(fields, idempotency_key="a1"),
    ):
        assert (other.status, other.json["code"]) == (422, "idempotency")
    assert server.call("DELETE", f"/api/v1/avatars/{first.json['id']}").status == 204
    gone = upload(server, fields, idempotency_key="a1")
    assert (gone.status, gone.json["code"]) == (404, "no_avatar")


def a_face(rng: np.random.Generator) -> Face:
    return Face(rng.normal(size=(POINTS, 3)).astype(np.float32), rng.random(BLENDSHAPES, np.float32), 0.7)


def a_look() -> Look:
    rng = np.random.default_rng(1)
    references = tuple(
        Reference(
            Region(2 * n, 4, 32, 20 + 2 * n), rng.integers(0, 256, (20 + 2 * n, 32, 3), dtype=np.uint8), a_face(rng)
        )
        for n in range(3)
    )
    states = (FaceState.OK, FaceState.LOST, FaceState.CUT, FaceState.PROFILE)
    track = FaceTrack((a_face(rng), None, None, a_face(rng)), states, np.array([1, 0, 0, 0], np.float32), (0, 0, 1, 1))
    return Look(Survey(FaceChoice(place=(0.25, 0.5)), references, 4), track)


def same(one: Face | None, other: Face | None) -> bool:
    if one is None or other is None:
        return one is other
    points = np.array_equal(one.points_px, other.points_px) and np.array_equal(one.blendshapes, other.blendshapes)
    return points and one.confidence == other.confidence


def test_a_look_comes_back_as_it_was(tmp_path: Path) -> None:
    there = a_look()
    save_look(there, tmp_path / "a.npz")
    back = load_look(tmp_path / "a.npz")
    assert (back.survey.choice, back.survey.faces_seen) == (there.survey.choice, 4)
    assert load_choice(tmp_path / "a.npz") == there.survey.choice
    assert len(back.survey.references) == 3
    for one, other in zip(there.survey.references, back.survey.references, strict=True):
        assert one.region == other.region
        assert same(one.face, other.face)
        np.testing.assert_array_equal(one.rgb, other.rgb)
    before, after = there.track, back.track
    assert before is not None and after is not None
    assert (before.states, before.shot) == (after.states, after.shot)
    assert all(same(one, other) for one, other in zip(before.faces, after.faces, strict=True))
    np.testing.assert_array_equal(before.strength, after.strength)
    save_look(Look(there.survey, None), tmp_path / "c.npz")
    assert load_look(tmp_path / "c.npz").track is None
    whole = (tmp_path / "a.npz").read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"PK" + bytes(100)):
        (tmp_path / "b.npz").write_bytes(damaged)
        with pytest.raises(FileNotFoundError):
            load_look(tmp_path / "b.npz")


def test_avatars_that_nobody_looked_at_are_swept_away_and_ready_ones_stay(tmp_path: Path) -> None:
    settings = Settings(serve_folder=tmp_path)
    place = Place.open(settings)

    def new(job: bool, ready: bool) -> str:
        avatar_id, job_id = new_id(), new_id()
        for name in ("video", "survey", "picture"):
            (tmp_path / name).write_text("x")
        place.avatars.add(avatar_id, "me", "a", job_id, tmp_path / "video")
        if job:
            place.table.add(NewJob(job_id, "me", {"kind": "avatar"}, "f"), 10)
        if ready:
            assert place.avatars.ready(avatar_id, tmp_path / "survey", tmp_path / "picture", {"kind": "still"})
        os.utime(tmp_path / "files" / f"avatar-{avatar_id}", (0, 0))
        return avatar_id

    waiting, ready, lost = new(True, False), new(False, True), new(False, False)
    Supervisor(settings, place).sweep()
    assert {row.id for row in place.avatars.list("me")} == {waiting, ready}
    groups = {name for name, _ in place.storage.groups()}
    assert {Avatars.id_of(group) for group in groups} == {waiting, ready}
    assert lost not in {Avatars.id_of(group) for group in groups}
    place.avatars.remove(ready)
    (tmp_path / "survey").write_text("x")
    (tmp_path / "picture").write_text("x")
    assert not place.avatars.ready(ready, tmp_path / "survey", tmp_path / "picture", {})  # removed on the way
    assert {Avatars.id_of(name) for name, _ in place.storage.groups()} == {waiting}
    place.table.close()
