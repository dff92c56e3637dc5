"""What the service tells those who watch it: logs, and traces by OTLP (the extra otel).

A trace begins with the request (or with the trace that its ``traceparent`` header names) and goes on in the worker: the
job, its steps, and below the drawing the stages, which work at the same time.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

from beavervision.errors import UsageError
from beavervision.serve.version import program_version
from beavervision.settings import Settings

_SEND_MS = 1000  # between two sendings
_HTTP_S = 5
_TRACE: ContextVar[str] = ContextVar("trace", default="")  # of the span at work


def set_up_logs(settings: Settings, process: str) -> None:
    """Log to the standard error output: warnings as text, or with ``serve_log = "json"`` everything as documents."""
    handler = logging.StreamHandler(sys.stderr)
    if settings.serve_log == "json":
        handler.setFormatter(_Documents(process))
    else:
        handler.setFormatter(logging.Formatter(f"{process}: %(message)s"))
    logging.basicConfig(
        level=logging.INFO if settings.serve_log == "json" else logging.WARNING, handlers=[handler], force=True
    )


class _Documents(logging.Formatter):
    """One JSON document a line, with the fields that Google's Cloud Logging knows."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        document: dict[str, Any] = {
            "severity": record.levelname,
            "message": record.getMessage(),
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "logger": record.name,
            "process": self._process,
        }
        if record.exc_info:
            document["message"] += "\n" + self.formatException(record.exc_info)
        for name, field in (("http", "httpRequest"), ("labels", "logging.googleapis.com/labels")):
            if (value := getattr(record, name, None)) is not None:
                document[field] = value
        if trace := getattr(record, "trace", "") or _TRACE.get():
            document["logging.googleapis.com/trace"] = trace.split("-")[1]
            document["logging.googleapis.com/spanId"] = trace.split("-")[2]
        return json.dumps(document, default=str)


class Span:
    """A span at work; without tracing it does nothing."""

    def __init__(self, tell: Callable[[str, Any], None] | None = None, traceparent: str = "") -> None:
        self._tell, self.traceparent = tell, traceparent

    def set(self, name: str, value: Any) -> None:
        if self._tell is not None and value is not None:
            self._tell(name, value)


class Traces:
    """The traces of one process: sent to ``serve_otlp``, or nowhere.

    Raises:
        UsageError: the extra is missing.
    """

    def __init__(self, settings: Settings, process: str) -> None:
        self._provider: Any = None
        if not settings.serve_otlp:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise UsageError("Traces need an extra: pip install 'beavervision[otel]'.") from error
        named = {"service.name": "beavervision", "service.version": program_version(), "service.instance.id": process}
        self._provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=f"{settings.serve_otlp.rstrip('/')}/v1/traces", timeout=_HTTP_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=_SEND_MS))
        self._tracer: Any = self._provider.get_tracer("beavervision")

    @contextmanager
    def span(
        self, name: str, parent: str = "", *, server: bool = False, facts: Mapping[str, Any] | None = None
    ) -> Iterator[Span]:
        """A span for the time of the block, below `parent` (a traceparent); one that raises is marked as failed."""
        if self._provider is None:
            yield Span()
            return
        from opentelemetry import trace

        kind = trace.SpanKind.SERVER if server else trace.SpanKind.INTERNAL
        with self._tracer.start_as_current_span(name, _context(parent), kind, dict(facts or {})) as span:
            context = span.get_span_context()
            told = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
            token = _TRACE.set(told)
            try:
                yield Span(span.set_attribute, told)
            finally:
                _TRACE.reset(token)

    def past(self, name: str, parent: str, began_s: float, ended_s: float, facts: Mapping[str, Any]) -> str:
        """Tell of a span that is over (times since the epoch); its traceparent."""
        if self._provider is None:
            return ""
        span = self._tracer.start_span(name, _context(parent), attributes=dict(facts), start_time=int(began_s * 1e9))
        span.end(int(ended_s * 1e9))
        context = span.get_span_context()
        return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"

    def close(self) -> None:
        """Send what waits."""
        if self._provider is not None:
            self._provider.shutdown()


def current() -> str:
    """The traceparent of the span at work; empty without one."""
    return _TRACE.get()


def _context(parent: str) -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": parent} if parent else {})
