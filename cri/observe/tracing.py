"""OpenTelemetry: spans of calls and of what they are made of, sent to a collector by OTLP over gRPC.

Imported only where a collector is configured: the SDK and the exporter take some 9 MiB. Refuses to hold up a call:
spans wait in a bounded queue, and what a collector that is away does not take is dropped. Invariant: a caller's trace
context (W3C `traceparent` in the gRPC metadata) is the parent of the call's span.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, cast

from cri.config import TracingSection
from cri.errors import CallFailed
from cri.intercept import Call
from cri.trace import Phase, subject
from cri.version import NAME, VERSION

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

_QUEUE = 4096
_EXPORT_S = 5.0
# How long the daemon's end waits for the collector: of a full queue each of eight batches has _EXPORT_S otherwise.
_LAST_S = 2.0
_DELAY_MS = 1000
_CARRIED = frozenset({"traceparent", "tracestate"})
# rpc.grpc.status_code as OpenTelemetry's conventions have it.
_CANCELLED = 1


class Tracing:
    """cri.trace.Tracer and cri.intercept.Observer."""

    def __init__(self, provider: TracerProvider, exporter: SpanExporter) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._trace = trace
        self._provider = provider
        self._exporter = exporter
        self._tracer = provider.get_tracer(NAME, VERSION)
        self._propagator = TraceContextTextMapPropagator()

    def span(self, name: str, attributes: Mapping[str, str | int]) -> AbstractContextManager[object]:
        if not self._trace.get_current_span().get_span_context().is_valid:
            return nullcontext()  # no call: the daemon's own work
        return self._tracer.start_as_current_span(name, attributes=attributes, record_exception=False)

    def present(self) -> object:
        span = self._trace.get_current_span()
        return span if span.get_span_context().is_valid else None

    def span_of(self, above: object, name: str, attributes: Mapping[str, str | int]) -> AbstractContextManager[object]:
        context = self._trace.set_span_in_context(cast("Span", above))
        return self._tracer.start_as_current_span(name, context, attributes=attributes, record_exception=False)

    def phases(self, phases: Sequence[Phase]) -> None:
        if not self._trace.get_current_span().is_recording():
            return
        above: dict[str, Span] = {}
        for name, of, since, end in phases:
            context = self._trace.set_span_in_context(above[of]) if of in above else None
            span = self._tracer.start_span(name, context, start_time=since)
            span.end(end)
            above.setdefault(name, span)

    def ids(self) -> tuple[str, str]:
        context = self._trace.get_current_span().get_span_context()
        return (f"{context.trace_id:032x}", f"{context.span_id:016x}") if context.is_valid else ("", "")

    @contextmanager
    def call(self, call: Call) -> Iterator[None]:
        """The span of one that streams is sent when it ends. It is not the present one meanwhile: a generator shares
        its context with whoever asks for the next item, and may be closed in another."""
        carrier = {key: str(value) for key, value in call.metadata if key in _CARRIED}
        span = self._tracer.start_span(
            f"{call.service}/{call.name}",
            self._propagator.extract(carrier),
            kind=self._trace.SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": call.service, "rpc.method": call.name},
        )
        using = self._trace.use_span(span, record_exception=False, set_status_on_exception=False)
        with nullcontext() if call.streaming else using:
            code = 0
            try:
                yield
            except CallFailed as error:
                code = error.code.value[0]
                span.set_status(self._trace.StatusCode.ERROR, str(error))
                raise
            except (asyncio.CancelledError, GeneratorExit):
                code = _CANCELLED
                raise
            finally:
                span.set_attribute("rpc.grpc.status_code", code)
                for kind, id_ in subject().items():
                    span.set_attribute(f"{kind}.id", id_)
                span.end()

    def close(self) -> None:
        """Sends what is left, for a bounded time; blocks."""
        enough = threading.Timer(_LAST_S, self._exporter.shutdown)  # what is under way then, and what waits, is dropped
        enough.start()
        try:
            self._provider.shutdown()
        finally:
            enough.cancel()


def open_tracing(section: TracingSection) -> Tracing:
    """Spans to `section.endpoint`."""
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio

    # A collector that is away is no news a second time, and no error of this node's.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    resource = Resource.create({"service.name": NAME, "service.version": VERSION})
    provider = TracerProvider(ParentBasedTraceIdRatio(section.ratio), resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(
        endpoint=section.endpoint, insecure=not section.endpoint.startswith("https://"), timeout=_EXPORT_S
    )
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=_QUEUE, schedule_delay_millis=_DELAY_MS))
    return Tracing(provider, exporter)
