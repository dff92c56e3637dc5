"""Results in Google Cloud Storage, against an emulator of it: the storage alone, and a job of a real server."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the service needs the extra serve")
pytest.importorskip("google.cloud.storage", reason="needs the extra gcp")
pytest.importorskip("gcp_storage_emulator.server", reason="needs the extra dev")

from gcp_storage_emulator import server as emulator
from google.cloud import storage

from beavervision.errors import OutputError, UsageError
from beavervision.serve import bucket as bucket_module
from beavervision.serve.bucket import BucketStorage
from tests.test_serve import face, started

__all__ = ["face"]  # a fixture
# Of the emulator's own sockets and of the libraries.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def gcs() -> Iterator[Any]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="videos")
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("BEAVERVISION_")]:
            patch.delenv(name)
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        yield storage.Client()
    server.stop()


def names(gcs: Any) -> list[str]:
    return sorted(blob.name for blob in gcs.list_blobs("videos"))


def test_blobs_are_put_fetched_and_removed(gcs: Any, tmp_path: Path) -> None:
    here = BucketStorage("gs://videos/a/b", tmp_path / "here")
    there = BucketStorage("gs://videos/a/b", tmp_path / "there")
    for key in ("j1/in/video", "j1/out/a.mp4", "j1x/in/video", "j2/in/video"):
        (tmp_path / "new").write_text(key)
        here.put(tmp_path / "new", key)
        assert not (tmp_path / "new").exists()
    assert names(gcs) == ["a/b/j1/in/video", "a/b/j1/out/a.mp4", "a/b/j1x/in/video", "a/b/j2/in/video"]
    assert there.fetch("j1/out/a.mp4").read_text() == here.fetch("j1/out/a.mp4").read_text() == "j1/out/a.mp4"
    groups = dict(there.groups())
    assert sorted(groups) == ["j1", "j1x", "j2"]
    assert all(abs(changed_s - time.time()) < 60 for changed_s in groups.values())
    here.remove("j1/in")
    with pytest.raises(FileNotFoundError):
        there.fetch("j1/in/video")
    here.remove("j1")
    assert names(gcs) == ["a/b/j1x/in/video", "a/b/j2/in/video"]
    assert not (tmp_path / "here" / "j1").exists()
    here.remove("j1")
    for key in ("../a", "", "a/../b"):
        with pytest.raises(ValueError, match="no key"):
            here.fetch(key)
    # A copy of what another server removed goes with the next look at the bucket.
    os.utime(tmp_path / "there" / "j1", (0, 0))
    assert sorted(dict(there.groups())) == ["j1x", "j2"]
    assert not (tmp_path / "there" / "j1").exists()
    for key in ("j1x", "j2"):
        here.remove(key)


def test_local_copies_take_only_so_much(gcs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket_module, "_IN_USE_S", 60.0)
    made = BucketStorage("gs://videos/room", tmp_path / "cache", cache_bytes=2500)
    for number in range(4):
        (tmp_path / "new").write_bytes(bytes(1000))
        made.put(tmp_path / "new", f"j{number}/in/video")
        os.utime(tmp_path / "cache" / f"j{number}" / "in" / "video", (number, number))
    kept = sorted(path.parts[-3] for path in (tmp_path / "cache").rglob("video"))
    assert kept == ["j2", "j3"]
    assert made.fetch("j0/in/video").stat().st_size == 1000
    for number in range(4):
        made.remove(f"j{number}")


def test_what_cannot_be_reached_is_told(gcs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no bucket none"):
        BucketStorage("gs://none", tmp_path)
    for url in ("videos", "s3://videos", "gs:///a"):
        with pytest.raises(UsageError, match="gs://BUCKET/FOLDER"):
            BucketStorage(url, tmp_path)
    made = BucketStorage("gs://videos", tmp_path / "cache")
    with pytest.raises(OutputError, match="gs://videos"):
        made.put(tmp_path / "missing", "j/in/video")
    assert names(gcs) == []


def test_a_job_keeps_its_files_in_the_bucket(gcs: Any, tmp_path: Path, face: bytes) -> None:
    server = started(tmp_path, serve_storage="gs://videos/jobs")
    try:
        answer = server.lipsync({"video": face, "text": "Hi.", "consent": "true"})
        assert answer.status == 200, answer
        (name,) = names(gcs)
        assert name.startswith(f"jobs/{answer.json['id']}/out/")
        for path in (tmp_path / "files").rglob("*.mp4"):
            path.unlink()  # as on another machine
        link = answer.json["video_url"].removeprefix(f"http://{server.address}")
        whole = server.call("GET", link)
        part = server.call("GET", link, range="bytes=4-7")
        assert (whole.status, part.status, part.body) == (200, 206, b"ftyp")
        assert len(whole.body) == gcs.bucket("videos").get_blob(name).size
        assert server.call("DELETE", f"/api/v1/jobs/{answer.json['id']}").status == 204
        assert names(gcs) == []
    finally:
        server.kill()
