"""What the API costs a job."""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the service needs the extra serve")

from tests.test_serve import face, started

__all__ = ["face"]  # a fixture


@pytest.mark.slow
def test_the_api_takes_less_than_three_percent_of_a_job(
    tmp_path: Path, face: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first byte of the request to the last of the answer, but for the time that the worker had the job."""
    for name in [name for name in os.environ if name.startswith("BEAVERVISION_")]:
        monkeypatch.delenv(name)
    server = started(tmp_path, serve_wait_s="600")
    try:
        shares = []
        for _ in range(3):
            began_s = time.monotonic()
            text = "Papa moved away, and nobody ever asked him why he did so. " * 4
            answer = server.lipsync({"video": face, "text": text, "consent": "true"})
            whole_s = time.monotonic() - began_s
            assert answer.status == 200, answer
            started_s, ended_s = (
                datetime.fromisoformat(answer.json[name]).timestamp() for name in ("started", "ended")
            )
            shares.append((whole_s - (ended_s - started_s)) / whole_s)
    finally:
        server.kill()
    assert sorted(shares)[1] < 0.03, shares
