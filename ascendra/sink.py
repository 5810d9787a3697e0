"""Receive copies of token streams from routers: derive from TokenSink and serve it with `serve_sink`."""

import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from ascendra.types import FinishReason
from ascendra.v1 import sink_pb2, sink_pb2_grpc
from ascendra.wire import finish_reason_from_wire

_OPTIONS = [
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", 16 << 20),
    # Without it the window grows while the sink is behind, and the server buffers without bound.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
]
_REMEMBERED = 1 << 16
"""Streams whose offsets are remembered, to recognise what is sent again."""
_ENDED = -1


@dataclass(frozen=True, slots=True)
class SinkEnd:
    """How a mirrored stream ended."""

    reason: FinishReason
    completion_tokens: int
    """Tokens of the completion, the missing ones included."""
    error: str = ""
    """Machine-readable reason, with FinishReason.ERROR."""


class TokenSink:
    """What to do with copies of token streams; override what you need.

    Calls for one router come one after the other and in order for each request, so a slow method holds the sink back:
    the router then keeps a bounded buffer and drops the oldest tokens, which `on_gap` reports; callers never notice.
    An exception ends the router's stream: the router connects again and repeats what was not dealt with. After such a
    repetition, or when a caller resumes a stream through another router, tokens may come twice: the offset tells.
    """

    async def on_tokens(self, request_id: str, offset: int, token_ids: Sequence[int], text: str) -> None:
        """Take tokens of a request.

        Args:
            offset: of the first one in the completion.
            text: new text; may lag the tokens; empty when the request is for tokens only.
        """

    async def on_finished(self, request_id: str, text: str, end: SinkEnd) -> None:
        """Take the end of a request; `text` is what was still held back."""

    async def on_gap(self, request_id: str, first_offset: int, end_offset: int) -> None:
        """Take note that tokens first_offset to end_offset - 1, and their text, were dropped and will not come."""

    async def on_lost(self, requests: int) -> None:
        """Take note that the ends of so many requests were dropped and will not come."""


@contextlib.asynccontextmanager
async def serve_sink(
    sink: TokenSink, listen: str = "127.0.0.1:7400", credentials: grpc.ServerCredentials | None = None
) -> AsyncIterator[str]:
    """Serve a sink on host:port (port 0 picks one) or unix:PATH while the context is open; yields the address.

    Args:
        credentials: for TLS, made with `grpc.ssl_server_credentials`; None: plaintext.

    Raises RuntimeError when the address cannot be had.
    """
    server = grpc.aio.server(options=_OPTIONS)
    sink_pb2_grpc.add_TokenSinkServiceServicer_to_server(_Servicer(sink), server)
    port = server.add_insecure_port(listen) if credentials is None else server.add_secure_port(listen, credentials)
    await server.start()
    try:
        yield listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"
    finally:
        await server.stop(None)


class _Servicer(sink_pb2_grpc.TokenSinkServiceServicer):
    def __init__(self, sink: TokenSink) -> None:
        self._sink = sink
        self._next_offsets: OrderedDict[tuple[str, int], int] = OrderedDict()

    async def Relay(
        self, request_iterator: AsyncIterator[sink_pb2.RelayRequest], context: Any
    ) -> AsyncIterator[sink_pb2.RelayResponse]:
        """Serve one router."""
        incarnation = ""
        async for request in request_iterator:
            if request.WhichOneof("message") == "hello":
                incarnation = request.hello.incarnation
                yield sink_pb2.RelayResponse()
                continue
            if not incarnation:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "hello must come first")
            if request.batch.lost_requests:
                await self._sink.on_lost(request.batch.lost_requests)
            acks: dict[int, sink_pb2.RelayAck] = {}
            for item in request.batch.items:
                acks[item.handle] = await self._deal_with(incarnation, item)
            yield sink_pb2.RelayResponse(acks=acks.values())

    async def _deal_with(self, incarnation: str, item: sink_pb2.RelayItem) -> sink_pb2.RelayAck:
        """Pass on what is new in an item."""
        key = (incarnation, item.handle)
        next_offset = self._next_offsets.get(key, 0)
        end_offset = item.token_offset + len(item.token_ids)
        if item.HasField("gap") and next_offset != _ENDED and item.gap.end_offset > next_offset:
            first_offset = max(item.gap.first_offset, next_offset)
            await self._sink.on_gap(item.request_id, first_offset, item.gap.end_offset)
            self._remember(key, item.gap.end_offset)
        if item.token_ids and next_offset != _ENDED and end_offset > next_offset:
            await self._sink.on_tokens(item.request_id, item.token_offset, list(item.token_ids), item.text)
            self._remember(key, end_offset)
        if item.HasField("end") and next_offset != _ENDED:
            end = SinkEnd(finish_reason_from_wire(item.end.reason), end_offset, item.end.error)
            await self._sink.on_finished(item.request_id, "" if item.token_ids else item.text, end)
            self._remember(key, _ENDED)
        return sink_pb2.RelayAck(
            handle=item.handle, request_id=item.request_id, token_offset=end_offset, ended=item.HasField("end")
        )

    def _remember(self, key: tuple[str, int], next_offset: int) -> None:
        self._next_offsets[key] = next_offset
        self._next_offsets.move_to_end(key)
        if len(self._next_offsets) > _REMEMBERED:
            self._next_offsets.popitem(last=False)
