"""Spans for OpenTelemetry over OTLP/gRPC: off, and not even imported, unless an endpoint is configured.

Spans are handed to a thread that exports them in batches; what it cannot keep up with is dropped, nothing waits for it.
Everything that has no option here is set by the standard variables: OTEL_EXPORTER_OTLP_HEADERS, OTEL_BSP_..., ...
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from services.common import span_names
from services.common.config import ConfigError
from services.common.logging import get_logger

if TYPE_CHECKING:
    from opentelemetry import trace as otel

log = get_logger()

Value = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, Value]
_CLOSE_S = 2.0
"""Time for the last spans to be exported, in seconds."""


class Span:
    """One span. Costs nothing but its calls when the trace is not sampled."""

    __slots__ = ("_span", "traceparent")

    def __init__(self, span: "otel.Span") -> None:
        self._span = span
        context = span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"
        """What makes others' spans its children, sampled or not as this one."""

    @property
    def recording(self) -> bool:
        """Whether what is said here reaches anybody."""
        return self._span.is_recording()

    def event(self, name: str, attributes: Attributes | None = None) -> None:
        """Say that something happened now."""
        self._span.add_event(name, attributes)

    def set(self, attributes: Attributes) -> None:
        """Add attributes."""
        self._span.set_attributes(attributes)

    def end(self, error: str = "") -> None:
        """End the span.

        Args:
            error: why what it describes failed, as one word; empty when it did not.
        """
        if error and self._span.is_recording():
            from opentelemetry.trace import StatusCode

            self._span.set_attribute(span_names.ERROR_TYPE, error)
            self._span.set_status(StatusCode.ERROR, error)
        self._span.end()


class Tracer:
    """Makes the spans of one service process."""

    def __init__(self, service: str, instance_id: str, endpoint: str, sample_ratio: float) -> None:
        """Connect lazily and start the exporting thread. Raises ConfigError when the packages are missing."""
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise ConfigError(f"otlp-endpoint needs the packages of the extra 'otel': {error}") from error
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._kinds = {
            "server": trace.SpanKind.SERVER,
            "client": trace.SpanKind.CLIENT,
        }
        self._provider = TracerProvider(
            sampler=ParentBased(TraceIdRatioBased(sample_ratio)),
            resource=Resource.create({"service.name": f"ascendra-{service}", "service.instance.id": instance_id}),
            shutdown_on_exit=False,
        )
        # TLS is for https; a socket of this machine has none.
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("unix:") or None)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("ascendra")

    def start(
        self,
        name: str,
        kind: str,
        attributes: Attributes,
        *,
        traceparent: str = "",
        tracestate: str = "",
        replaces: Span | None = None,
        age_s: float = 0.0,
    ) -> Span:
        """Start a span.

        Args:
            kind: "server" or "client".
            traceparent: W3C context of its parent; empty or malformed: it begins a trace.
            replaces: a span that this one takes the place of; they are linked.
            age_s: seconds since what it describes began.
        """
        carrier = {"traceparent": traceparent, "tracestate": tracestate} if traceparent else {}
        links = []
        if replaces is not None:
            why = {span_names.LINK: span_names.REPLACES}
            links.append(self._trace.Link(replaces._span.get_span_context(), why))
        span = self._tracer.start_span(
            name,
            context=self._propagator.extract(carrier),
            kind=self._kinds[kind],
            attributes=attributes,
            links=links,
            start_time=time.time_ns() - int(age_s * 1e9) if age_s else None,
        )
        return Span(span)

    async def close(self) -> None:
        """Export what is left, for a limited time."""
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # nobody waits any more: the loop is closed
                loop.call_soon_threadsafe(done.set)

        # Not one of the loop's own threads: those are waited for, however long the collector does not answer.
        threading.Thread(target=shut_down, name="tracer-close", daemon=True).start()
        try:
            async with asyncio.timeout(_CLOSE_S):
                await done.wait()
        except TimeoutError:
            log.warning("spans_lost", waited_s=_CLOSE_S)


def make_tracer(service: str, instance_id: str, endpoint: str, sample_ratio: float) -> Tracer | None:
    """Return a service's tracer; None without an endpoint. Raises ConfigError."""
    return Tracer(service, instance_id, endpoint, sample_ratio) if endpoint else None
