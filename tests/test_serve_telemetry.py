"""What those who run the service see: traces, logs, metrics of devices, and the dashboard that shows them."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the service needs the extra serve")

from beavervision import metrics
from beavervision.engine.gpus import GpuWatch
from beavervision.errors import UsageError
from beavervision.serve import exposition, telemetry
from beavervision.serve.telemetry import Traces, set_up_logs
from beavervision.settings import Settings
from tests.answers import until
from tests.test_serve import face, started

__all__ = ["face"]  # a fixture

DASHBOARD = Path(__file__).parents[1] / "deploy" / "grafana" / "beavervision.json"


# --- traces -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def collector() -> Iterator[tuple[str, list[Any]]]:
    """An OTLP receiver: its address, and the spans that came."""
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                import gzip

                body = gzip.decompress(body)
            told = ExportTraceServiceRequest.FromString(body)
            for resource in told.resource_spans:
                for scope in resource.scope_spans:
                    spans.extend(scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", spans
    server.shutdown()
    thread.join()
    server.server_close()


def test_one_trace_goes_from_the_request_to_the_stages(
    tmp_path: Path, face: bytes, collector: tuple[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("BEAVERVISION_")]:
        monkeypatch.delenv(name)
    address, spans = collector
    server = started(tmp_path, serve_otlp=address)
    caller = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    try:
        fields: dict[str, bytes | str] = {"video": face, "text": "Hi.", "consent": "true"}
        job = server.lipsync(fields, traceparent=caller).json
        until(lambda: {"job", "POST", "drawing"} <= {span.name for span in spans})
    finally:
        server.kill()
    mine = [span for span in spans if span.trace_id.hex() == caller.split("-")[1]]
    by_name = {span.name: span for span in mine}
    assert {"POST", "job", "loading", "looking", "drawing", "storing", "stage lipsync", "stage encode"} <= set(by_name)

    def parent(name: str) -> bytes:
        return bytes(by_name[name].parent_span_id)

    assert parent("POST").hex() == caller.split("-")[2]
    assert parent("job") == by_name["POST"].span_id
    assert parent("drawing") == by_name["job"].span_id
    assert parent("stage lipsync") == by_name["drawing"].span_id
    facts = {a.key: a.value for a in by_name["job"].attributes}
    assert facts["job.id"].string_value == job["id"]
    assert facts["job.state"].string_value == "succeeded"
    stage = {a.key: a.value.double_value for a in by_name["stage lipsync"].attributes}
    assert stage["wall_ms"] > 0
    assert by_name["drawing"].end_time_unix_nano > by_name["drawing"].start_time_unix_nano
    route = {a.key: a.value for a in by_name["POST"].attributes}
    assert route["http.route"].string_value == "/api/v1/lipsync"


def test_without_tracing_spans_cost_nothing_and_a_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    traces = Traces(Settings(), "test")
    with traces.span("a", "rubbish") as span:
        span.set("b", 1)
        assert (span.traceparent, telemetry.current()) == ("", "")
    assert traces.past("a", "", 0, 1, {}) == ""
    traces.close()
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(UsageError, match=r"beavervision\[otel\]"):
        Traces(Settings(serve_otlp="http://127.0.0.1:1"), "test")


# --- logs -------------------------------------------------------------------------------------------------------------


def test_logs_are_documents_as_cloud_logging_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        set_up_logs(Settings(serve_log="json"), "server")
        token = telemetry._TRACE.set("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        logging.getLogger("beavervision.serve").info("a %s", "b", extra={"labels": {"job": "1"}})
        telemetry._TRACE.reset(token)
        try:
            raise ValueError("x\ny")
        except ValueError:
            logging.getLogger("other").exception("failed")
        set_up_logs(Settings(), "server")
        logging.getLogger("beavervision.serve").info("not told")
        logging.getLogger("beavervision.serve").warning("told")
    finally:
        root.handlers[:], level = before
        root.setLevel(level)
    first, second, third = told.getvalue().splitlines()
    document = json.loads(first)
    assert (document["severity"], document["message"], document["process"]) == ("INFO", "a b", "server")
    assert document["logging.googleapis.com/labels"] == {"job": "1"}
    assert document["logging.googleapis.com/trace"] == "0af7651916cd43dd8448eb211c80319c"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+\+00:00", document["time"])
    failed = json.loads(second)
    assert failed["severity"] == "ERROR"
    assert "ValueError: x\ny" in failed["message"]
    assert third == "server: told"
    with pytest.raises(UsageError, match="serve_log"):
        Settings(serve_log="xml")


def test_a_server_logs_requests_without_their_signatures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("BEAVERVISION_")]:
        monkeypatch.delenv(name)
    real = subprocess.Popen
    with (tmp_path / "log").open("wb") as log:
        monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: real(*a, **(k | {"stderr": log})))
        server = started(tmp_path / "serve", serve_log="json")
        try:
            server.call("GET", f"/api/v1/jobs/{'0' * 24}/result?expires=1&signature=secret")
            until(lambda: "/result" in (tmp_path / "log").read_text())
        finally:
            server.kill()
    lines = (tmp_path / "log").read_text().splitlines()
    documents = [json.loads(line) for line in lines if line.startswith("{")]
    (asked,) = [d for d in documents if "result" in d.get("httpRequest", {}).get("requestUrl", "")]
    assert (asked["httpRequest"]["status"], asked["httpRequest"]["requestMethod"]) == (403, "GET")
    assert not any("secret" in line for line in lines)


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_the_utilisation_of_gpus_is_what_their_driver_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    answers = {"GPU-b": 40}

    def rates(handle: str) -> Any:
        if handle not in answers:
            raise NVMLError
        return SimpleNamespace(gpu=answers[handle])

    def handle(uuid: str) -> str:
        if uuid == "GPU-c":
            raise NVMLError
        return uuid

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=handle,
        nvmlDeviceGetUtilizationRates=rates,
    )
    uuids = {"cuda:0": "a", "cuda:1": "b", "cuda:2": "c"}
    cuda = SimpleNamespace(get_device_properties=lambda device: SimpleNamespace(uuid=uuids[device]))
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    GpuWatch(["cpu", "cuda:0", "cuda:1", "cuda:2"]).measure()
    assert metrics.DEVICE_UTILISATION.labels("cuda:1")._value.get() == 0.4
    metrics.DEVICE_UTILISATION.clear()

    def no_driver() -> None:
        raise NVMLError

    nvml.nvmlInit = no_driver
    GpuWatch(["cuda:0"]).measure()
    GpuWatch(["cpu"]).measure()
    assert "utilisation_ratio{" not in metrics.exposition().decode()


def test_the_memory_of_every_process_is_told_with_its_device(tmp_path: Path) -> None:
    used, budget = "beavervision_device_memory_used_bytes", "beavervision_device_memory_budget_bytes"
    lines = "".join(
        f'# TYPE {name} gauge\n{name}{{device="cuda:7"}} {value}\n' for name, value in ((used, 5), (budget, 9))
    )
    (tmp_path / "worker-3.prom").write_text(lines)
    live = metrics.DEVICE_MEMORY_USED_BYTES.labels("cuda:8"), metrics.DEVICE_MEMORY_BUDGET_BYTES.labels("cuda:8")
    for gauge, value in zip(live, (3, 4), strict=True):  # what live sessions use, in the server itself
        gauge.set(value)
    told = [(m.worker, m.device, m.used_bytes, m.budget_bytes) for m in exposition.memory(tmp_path)]
    for metric in (metrics.DEVICE_MEMORY_USED_BYTES, metrics.DEVICE_MEMORY_BUDGET_BYTES):
        metric.remove("cuda:8")
    assert ("worker-3", "cuda:7", 5, 9) in told
    assert ("server", "cuda:8", 3, 4) in told


def test_every_metric_of_the_dashboard_exists() -> None:
    board = json.loads(DASHBOARD.read_text())
    known: dict[str, set[str]] = {}
    for collector in metrics.REGISTRY._collector_to_names:
        labels = set(getattr(collector, "_labelnames", ()))
        for name in metrics.REGISTRY._collector_to_names[collector]:
            known[name] = labels | {"worker", "le", "job", "instance", "quantile"}
    expressions = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    assert len(expressions) >= 15
    named = set()
    for expression in expressions:
        for name in re.findall(r"\bbeavervision_\w+", expression):
            assert name in known, f"{name} in {expression}"
            named.add(name)
        labels = re.findall(r"(\w+)\s*=~?\"", expression)
        for group in re.findall(r"\b(?:by|without)\s*\(([^)]*)\)", expression):
            labels += [label.strip() for label in group.split(",")]
        used = set().union(*(known[n] for n in re.findall(r"\bbeavervision_\w+", expression)))
        assert set(labels) <= used, expression
    for wanted in (
        "stage_wall_seconds",
        "queue_depth",
        "batch_size",
        "device_memory_used",
        "device_utilisation",
        "jobs_",
    ):
        assert any(wanted in name for name in named), wanted
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in board["panels"]:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
