"""An OpenTelemetry collector in memory: takes spans by OTLP over gRPC and keeps them, or is away for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc


@dataclass
class Collector(trace_service_pb2_grpc.TraceServiceServicer):  # type: ignore[misc]  # generated, without types
    """`endpoint` is what a node is configured with; `resources` are what the spans say they are of. One that is `stuck`
    takes calls, which are counted, and answers none."""

    endpoint: str = ""
    spans: list[Any] = field(default_factory=list)
    resources: list[dict[str, str]] = field(default_factory=list)
    stuck: bool = False
    calls: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def Export(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.calls += 1
        while self.stuck and context.is_active():
            time.sleep(0.01)
        with self._lock:
            for one in request.resource_spans:
                self.resources.append({item.key: item.value.string_value for item in one.resource.attributes})
                self.spans += [span for scope in one.scope_spans for span in scope.spans]
        return trace_service_pb2.ExportTraceServiceResponse()

    def of(self, trace_id: str) -> list[Any]:
        """The spans of a trace, by their begin."""
        with self._lock:
            found = [span for span in self.spans if span.trace_id.hex() == trace_id]
        return sorted(found, key=lambda span: int(span.start_time_unix_nano))

    def paths(self, trace_id: str) -> set[str]:
        """Each span of the trace with its parents: "call > part > part of it"."""
        spans = {span.span_id: span for span in self.of(trace_id)}

        def path(span: Any) -> str:
            above = spans.get(span.parent_span_id)
            return f"{path(above)} > {span.name}" if above is not None else str(span.name)

        return {path(span) for span in spans.values()}


def attributes(span: Any) -> dict[str, str | int]:
    """A span's, as plain values."""
    return {item.key: item.value.string_value or int(item.value.int_value) for item in span.attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector that serves."""
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    collector.endpoint = f"http://127.0.0.1:{port}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()
