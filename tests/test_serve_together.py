"""Two servers on one database and one bucket: any worker takes a job, any server shows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the service needs the extra serve")
pytest.importorskip("pg8000", reason="needs the extra postgres")
pytest.importorskip("google.cloud.storage", reason="needs the extra gcp")
pytest.importorskip("gcp_storage_emulator.server", reason="needs the extra dev")

from tests.answers import until
from tests.test_serve import face, started
from tests.test_serve_bucket import gcs, names, pytestmark
from tests.test_serve_postgres import database

__all__ = ["database", "face", "gcs", "pytestmark"]  # fixtures, and the warnings of the emulator


@pytest.mark.slow
def test_jobs_and_avatars_are_everybodys(tmp_path: Path, face: bytes, database: str, gcs: Any) -> None:
    shared = {"serve_database": database, "serve_storage": "gs://videos/all", "serve_secret": "s", "serve_queue": "64"}
    one = started(tmp_path / "one", **shared)
    other = started(tmp_path / "other", **shared)
    try:
        fields: dict[str, bytes | str] = {"video": face, "text": "Papa moved away. " * 3, "consent": "true"}
        ids = [one.lipsync(fields, prefer="respond-async").json["id"] for _ in range(6)]
        until(lambda: all(other.job(job_id)["state"] == "succeeded" for job_id in ids), 180)
        for job_id in ids:
            link = one.job(job_id)["video_url"].removeprefix(f"http://{one.address}")
            assert other.call("GET", link).body[4:8] == b"ftyp"
        workers = {}
        for server in (one, other):
            lines = (server.folder / "audit.jsonl").read_text().splitlines()
            workers[server.address] = [e["job"] for e in map(json.loads, lines) if e["event"] == "ended"]
        assert sorted(job for jobs in workers.values() for job in jobs) == sorted(ids)  # each once
        assert all(workers.values()), "one server did everything"
        for job_id in ids:
            assert other.call("DELETE", f"/api/v1/jobs/{job_id}").status == 204
        assert names(gcs) == []
    finally:
        one.kill()
        other.kill()
