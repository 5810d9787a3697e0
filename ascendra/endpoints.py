"""The routers a client knows: one channel each, used in turn."""

import asyncio
import contextlib
import weakref
from collections.abc import Mapping, Sequence
from typing import cast

import grpc
import grpc.aio

from ascendra.errors import CLOSED, InvalidArgumentError, UnavailableError
from ascendra.tls import Stamp, Tls
from ascendra.v1 import cluster_pb2_grpc, inference_pb2_grpc

_OPTIONS = [
    ("grpc.max_send_message_length", 16 << 20),
    ("grpc.max_receive_message_length", 16 << 20),
    # Without it a slow reader's window grows and the router buffers without bound.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name the time that one attempt to connect may take: a handshake over a long way, or a busy peer.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]

Addresses = str | Sequence[str]
"""One router or several: host:port or unix:PATH."""


Credentials = grpc.ChannelCredentials | Tls


class Endpoint:
    """One router."""

    def __init__(self, address: str, credentials: Credentials | None) -> None:
        self.address = address
        if credentials is None:
            self.channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        elif isinstance(credentials, Tls):
            options = [*_OPTIONS, *credentials.options()]
            self.channel = grpc.aio.secure_channel(address, credentials.credentials(), options=options)
        else:
            self.channel = grpc.aio.secure_channel(address, credentials, options=_OPTIONS)
        self.inference = cast("inference_pb2_grpc.InferenceServiceAsyncStub", _inference_stub(self.channel))
        self.cluster = cast("cluster_pb2_grpc.ClusterServiceAsyncStub", _cluster_stub(self.channel))

    def is_down(self) -> bool:
        """Whether the last attempt to connect failed; asking makes an idle channel connect."""
        return self.channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.TRANSIENT_FAILURE


class Endpoints:
    """Round robin over the routers, passing over those that are down while another is not.

    Channels are made at first use, on the loop that uses them, and anew when certificates have changed: calls in
    progress end on the old ones.
    """

    def __init__(
        self, addresses: Addresses, credentials: Credentials | None, metadata: Mapping[str, str] | None
    ) -> None:
        self.addresses = [addresses] if isinstance(addresses, str) else list(addresses)
        if not self.addresses or not all(self.addresses):
            raise InvalidArgumentError("addresses: give at least one router, as host:port or unix:PATH")
        self.metadata = tuple((metadata or {}).items())
        self._credentials = credentials
        self._stamp: Stamp = ()
        self._endpoints: list[Endpoint] = []
        self._replaced: list[Endpoint] = []
        # gRPC does not end the calls of a channel that is closed.
        self._calls: weakref.WeakSet[grpc.aio.Call] = weakref.WeakSet()
        self._closed = False
        self._closing = asyncio.Event()
        self._next = 0

    def __len__(self) -> int:
        return len(self.addresses)

    def pick(self) -> Endpoint:
        """Return the router for the next call. Raises UnavailableError when closed."""
        order = self.in_turn()
        return next((endpoint for endpoint in order if not endpoint.is_down()), order[0])

    def in_turn(self) -> list[Endpoint]:
        """Return every router once, starting with the next one. Raises UnavailableError when closed."""
        if self._closed:
            raise closed_error()
        if not self._endpoints or self._stamp != self._present_stamp():
            self._connect()
        start = self._next % len(self._endpoints)
        self._next += 1
        return self._endpoints[start:] + self._endpoints[:start]

    def _connect(self) -> None:
        stamp = self._present_stamp()
        try:
            made = [Endpoint(address, self._credentials) for address in self.addresses]
        except InvalidArgumentError:
            if not self._endpoints:
                raise
            return  # new files are just being written
        self._stamp = stamp
        self._replaced += self._endpoints
        self._endpoints = made

    def _present_stamp(self) -> Stamp:
        return self._credentials.stamp() if isinstance(self._credentials, Tls) else ()

    def end_with_us(self, call: grpc.aio.Call) -> None:
        """Cancel a call in `close`, if it is still in progress then."""
        self._calls.add(call)

    def ended_call(self) -> bool:
        """Whether `close` caused the CancelledError that a call just raised, not a cancellation of this task."""
        task = asyncio.current_task()
        return self._closed and not (task is not None and task.cancelling())

    async def pause(self, wait_s: float, request_id: str) -> None:
        """Wait before a request is repeated. Raises UnavailableError when closed meanwhile."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), wait_s)
            raise closed_error(request_id)

    async def close(self) -> None:
        """Close the channels; calls in flight end with an error."""
        self._closed = True
        self._closing.set()
        for call in list(self._calls):
            call.cancel()
        endpoints, self._endpoints, self._replaced = [*self._endpoints, *self._replaced], [], []
        await asyncio.gather(*(endpoint.channel.close(None) for endpoint in endpoints))


def closed_error(request_id: str = "") -> UnavailableError:
    """Return the error of a call on a client that was closed."""
    return UnavailableError("the client is closed", reason=CLOSED, request_id=request_id)


def _inference_stub(channel: grpc.aio.Channel) -> object:
    return inference_pb2_grpc.InferenceServiceStub(channel)


def _cluster_stub(channel: grpc.aio.Channel) -> object:
    return cluster_pb2_grpc.ClusterServiceStub(channel)
