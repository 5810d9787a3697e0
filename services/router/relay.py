"""Copies of token streams for configured sinks. Requests only append; each sink has a task of its own."""

import asyncio
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import grpc
import grpc.aio

from ascendra.errors import InvalidArgumentError
from ascendra.tls import Tls
from ascendra.v1 import common_pb2, inference_pb2, sink_pb2, sink_pb2_grpc
from services.common.channels import Connector
from services.common.errors import ServiceError
from services.common.logging import get_logger
from services.router import metrics
from services.router.config import SinkConfig
from services.router.mailbox import Sink
from services.router.relay_buffer import RelayBuffer, Stream

log = get_logger()

_Call: TypeAlias = "grpc.aio.StreamStreamCall[sink_pb2.RelayRequest, sink_pb2.RelayResponse]"
_BACKOFF_S = (0.1, 5.0)
"""First and longest pause between two connections."""
_WELCOME_TIMEOUT_S = 10.0
_BATCH_TOKENS = 4096
_FLUSH_POLL_S = 0.01


class _SinkLost(Exception):
    """The connection is over; the message says why."""


class SinkRelay:
    """The stream to one sink."""

    def __init__(self, name: str, config: SinkConfig, router_id: str, tls: Tls | None = None) -> None:
        """Prepare; `run` connects.

        Args:
            tls: how to connect where the sink's configuration does not say.
        """
        self.name = name
        self.connected = False
        self.buffer = RelayBuffer(config.max_buffered_tokens)
        self._config = config
        self._tls = tls if config.tls is None else config.tls.as_client()
        self._hello = sink_pb2.RelayHello(router_id=router_id, incarnation=secrets.token_hex(8), sink=name)
        self._work = asyncio.Event()
        self._progress_s = 0.0

    def open(self, request_id: str, offset: int) -> Stream:
        """Begin the copy of a request's stream."""
        return self.buffer.open(request_id, offset)

    def append(self, stream: Stream, offset: int, token_ids: Sequence[int], text: str) -> None:
        """Add tokens; never waits."""
        self.buffer.append(stream, offset, token_ids, text)
        self._work.set()

    def finish(self, stream: Stream, text: str, end: sink_pb2.RelayEnd) -> None:
        """End a stream; never waits."""
        self.buffer.finish(stream, text, end)
        self._work.set()

    async def run(self) -> None:
        """Keep the sink connected until cancelled."""
        connector = Connector(self._config.address, self._tls)
        pause_s = _BACKOFF_S[0]
        try:
            while True:
                began_s = time.monotonic()
                why = await self._follow(connector)
                log.warning("sink_lost", sink=self.name, address=self._config.address, why=why)
                lasted = time.monotonic() - began_s > _BACKOFF_S[1]
                pause_s = _BACKOFF_S[0] if lasted else min(pause_s * 2, _BACKOFF_S[1])
                await asyncio.sleep(pause_s)
        finally:
            await connector.close()

    async def _follow(self, connector: Connector) -> str:
        """Serve one connection and return why it ended: whatever a sink does must not harm the router."""
        try:
            channel = await connector.channel()
        except InvalidArgumentError as error:
            return error.message
        stub: sink_pb2_grpc.TokenSinkServiceAsyncStub = sink_pb2_grpc.TokenSinkServiceStub(channel)
        call: _Call = stub.Relay()  # type: ignore[call-arg]  # written through the call
        why = "closed"
        try:
            await self._greet(call)
            log.info("sink_connected", sink=self.name, address=self._config.address)
            self.connected = True
            self._work.set()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._write(call))
                tasks.create_task(self._read(call))
                tasks.create_task(self._watch())
        except* Exception as errors:
            why = _why(errors)
        finally:
            self.connected = False
            call.cancel()
            self.buffer.send_again()
        return why

    async def _greet(self, call: _Call) -> None:
        try:
            async with asyncio.timeout(_WELCOME_TIMEOUT_S):
                await call.write(sink_pb2.RelayRequest(hello=self._hello))
                if not isinstance(await call.read(), sink_pb2.RelayResponse):
                    raise _SinkLost("it ended the stream instead of answering")
        except TimeoutError:
            raise _SinkLost(f"no answer in {_WELCOME_TIMEOUT_S:g} s") from None

    async def _write(self, call: _Call) -> None:
        while True:
            await self._work.wait()
            if not self.buffer.in_flight:
                self._progress_s = time.monotonic()
            batch = self.buffer.take(_BATCH_TOKENS)
            if batch is None:
                self._work.clear()
            else:
                await call.write(sink_pb2.RelayRequest(batch=batch))

    async def _read(self, call: _Call) -> None:
        while isinstance(response := await call.read(), sink_pb2.RelayResponse):
            self._progress_s = time.monotonic()
            self.buffer.acknowledge(response.acks)
            self._work.set()
        raise _SinkLost("it ended the stream")

    async def _watch(self) -> None:
        """Give up a connection on which nothing was acknowledged for too long; also ends a write that waits."""
        limit_s = self._config.ack_timeout_s
        while True:
            await asyncio.sleep(limit_s / 4)
            if self.buffer.in_flight and time.monotonic() - self._progress_s > limit_s:
                raise _SinkLost(f"nothing acknowledged for {limit_s:g} s")


class Relays:
    """All sinks of a router."""

    def __init__(self, sinks: Mapping[str, SinkConfig], router_id: str, tls: Tls | None = None) -> None:
        self._relays = {name: SinkRelay(name, config, router_id, tls) for name, config in sinks.items()}
        self.names = frozenset(sinks)
        """The configured sinks."""
        metrics.SINKS.rows = self._rows

    def mirror(self, names: Iterable[str], request_id: str, offset: int, sink: Sink) -> "Mirror":
        """Return a sink that hands everything on to `sink` and a copy to the named ones.

        Args:
            offset: of the first token that will come.

        Raises:
            KeyError: a name is not configured.
        """
        return Mirror(sink, [self._relays[name] for name in dict.fromkeys(names)], request_id, offset)

    async def run(self) -> None:
        """Keep every sink connected until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for relay in self._relays.values():
                tasks.create_task(relay.run(), name=f"sink-{relay.name}")

    async def flush(self, timeout_s: float) -> None:
        """Wait until the sinks that are connected have acknowledged everything, for at most timeout_s seconds."""
        until_s = time.monotonic() + timeout_s
        while any(relay.connected and relay.buffer.behind for relay in self._relays.values()):
            if time.monotonic() > until_s:
                return
            await asyncio.sleep(_FLUSH_POLL_S)

    def _rows(self) -> Iterable[metrics.SinkRow]:
        for name, relay in self._relays.items():
            buffer = relay.buffer
            counts = (buffer.sent, buffer.acknowledged, buffer.dropped, buffer.dropped_requests, buffer.behind)
            yield name, relay.connected, *counts


class Mirror:
    """A request's sink with copies: it begins when the request is accepted."""

    __slots__ = ("_copies", "_offset", "_relays", "_request_id", "_sink")

    def __init__(self, sink: Sink, relays: Sequence[SinkRelay], request_id: str, offset: int) -> None:
        self._sink = sink
        self._relays = relays
        self._request_id = request_id
        self._offset = offset
        self._copies: list[tuple[SinkRelay, Stream]] = []

    def accepted(self, accepted: inference_pb2.Accepted) -> None:
        """Say that the request was taken."""
        self._sink.accepted(accepted)
        self._copies = [(relay, relay.open(self._request_id, self._offset)) for relay in self._relays]

    def tokens(
        self, offset: int, token_ids: Sequence[int], text: str, logprobs: Iterable[common_pb2.PositionLogprobs] = ()
    ) -> bool:
        """Append tokens; False when the caller is too far behind, whatever the sinks are."""
        for relay, stream in self._copies:
            relay.append(stream, offset, token_ids, text)
        return self._sink.tokens(offset, token_ids, text, logprobs)

    def finished(self, text: str, finished: inference_pb2.Finished) -> None:
        """Append the last text and the last message."""
        self._sink.finished(text, finished)
        self._end(text, sink_pb2.RelayEnd(reason=finished.reason))

    def failed(self, error: ServiceError) -> None:
        """End the stream with a status."""
        self._sink.failed(error)
        self._end("", sink_pb2.RelayEnd(reason=common_pb2.FINISH_REASON_ERROR, error=error.reason))

    def abandoned(self) -> None:
        """End the stream: its caller is gone."""
        self._sink.abandoned()
        self._end("", sink_pb2.RelayEnd(reason=common_pb2.FINISH_REASON_CANCELLED))

    def _end(self, text: str, end: sink_pb2.RelayEnd) -> None:
        copies, self._copies = self._copies, []
        for relay, stream in copies:
            relay.finish(stream, text, end)


def _why(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return _why(error.exceptions[0])
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error) or type(error).__name__
