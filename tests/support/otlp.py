"""A collector of spans: the real OTLP/gRPC service, which keeps what it gets."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc.aio
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True, slots=True)
class Received:
    """A span as it came."""

    service: str
    raw: trace_pb2.Span

    @property
    def name(self) -> str:
        """What it is called."""
        return self.raw.name

    @property
    def attributes(self) -> dict[str, Any]:
        """Its attributes as plain values."""
        return _plain(self.raw.attributes)

    @property
    def events(self) -> list[str]:
        """Names of its events, in order."""
        return [event.name for event in self.raw.events]

    def event(self, name: str) -> dict[str, Any]:
        """Return the attributes of its first event of a name."""
        return _plain(next(event for event in self.raw.events if event.name == name).attributes)

    @property
    def failed(self) -> bool:
        """Whether it ended in an error."""
        return bool(self.raw.status.code == trace_pb2.Status.STATUS_CODE_ERROR)

    def is_child_of(self, other: "Received") -> bool:
        """Whether the other one is its parent."""
        return self.raw.trace_id == other.raw.trace_id and self.raw.parent_span_id == other.raw.span_id

    def links_to(self, other: "Received") -> bool:
        """Whether it is linked to the other one."""
        return other.raw.span_id in [link.span_id for link in self.raw.links]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the spans of everybody."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self._arrived = asyncio.Event()

    async def Export(self, request: trace_service_pb2.ExportTraceServiceRequest, context: Any) -> Any:
        """Take spans in."""
        for resource in request.resource_spans:
            service = _plain(resource.resource.attributes)["service.name"]
            self.spans += [Received(service, span) for scope in resource.scope_spans for span in scope.spans]
        self._arrived.set()
        return trace_service_pb2.ExportTraceServiceResponse()

    def named(self, prefix: str) -> list[Received]:
        """Return the spans whose names begin so, by their start."""
        return sorted((s for s in self.spans if s.name.startswith(prefix)), key=lambda s: s.raw.start_time_unix_nano)

    async def until(self, condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
        """Wait for spans until something is so. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._arrived.clear()
                await self._arrived.wait()


@contextlib.asynccontextmanager
async def collector(listen: str) -> AsyncIterator[tuple[Collector, str]]:
    """Run a collector on host:port or unix:PATH; yield it and its address for `otlp-endpoint`."""
    server, servicer = grpc.aio.server(), Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port(listen)
    await server.start()
    try:
        yield servicer, listen if listen.startswith("unix:") else f"http://{listen.rpartition(':')[0]}:{port}"
    finally:
        await server.stop(0)


def _plain(attributes: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)
