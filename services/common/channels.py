"""gRPC channel and server options: the one place that spells them (misspelt ones are accepted silently)."""

import grpc
import grpc.aio

from ascendra.tls import Stamp, Tls

MAX_MESSAGE_BYTES = 16 << 20
"""Largest message on any hop: a prompt of 4 Mi token ids."""

MAX_METADATA_BYTES = 16 << 10
"""Headers of one call."""
MAX_CONNECTIONS = 16_384
"""Connections of one server."""

Options = list[tuple[str, int]]

_MESSAGE_SIZE: Options = [
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
]
_FLOW_CONTROL: Options = [
    # Without it a slow reader's window grows and the server buffers without bound.
    ("grpc.http2.bdp_probe", 0),
]
_CLIENT_KEEPALIVE: Options = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SERVER_KEEPALIVE: Options = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]
_RECONNECT: Options = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    # Despite its name the time that one attempt to connect may take: a handshake over a long way, or a busy peer.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # A channel that is opened anew must not find the connection of the one it replaces, which may lead nowhere.
    ("grpc.use_local_subchannel_pool", 1),
]

_SERVER_LIMITS: Options = [
    # Above the soft limit calls are refused at random, above the hard one always: one limit, kept.
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_concurrent_streams", 8192),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.server_handshake_timeout_ms", 20_000),
    # Clients open a new connection when they need one again.
    ("grpc.max_connection_idle_ms", 300_000),
]

CLIENT_OPTIONS: Options = [*_MESSAGE_SIZE, *_FLOW_CONTROL, *_CLIENT_KEEPALIVE, *_RECONNECT]
SERVER_OPTIONS: Options = [
    *_MESSAGE_SIZE,
    *_FLOW_CONTROL,
    *_SERVER_KEEPALIVE,
    *_SERVER_LIMITS,
    ("grpc.so_reuseport", 0),
]


def open_channel(address: str, tls: Tls | None = None) -> grpc.aio.Channel:
    """Open a channel to host:port or unix:PATH. Must be called on the loop that uses it.

    Args:
        tls: None: plaintext, as sockets of this machine always are.
    """
    if tls is None or address.startswith("unix:"):
        return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
    return grpc.aio.secure_channel(address, tls.credentials(), options=[*CLIENT_OPTIONS, *tls.options()])


class Connector:
    """The channel to one address. It is made again when the certificates have changed. Used on one loop."""

    def __init__(self, address: str, tls: Tls | None = None) -> None:
        self.address = address
        self._tls = tls
        self._stamp: Stamp = ()
        self._channel: grpc.aio.Channel | None = None

    async def channel(self) -> grpc.aio.Channel:
        """Return the channel; to be asked before every attempt to connect, with no call in progress."""
        stamp = self._tls.stamp() if self._tls else ()
        if self._channel is None or stamp != self._stamp:
            await self.close()
            self._channel = open_channel(self.address, self._tls)
            self._stamp = stamp
        return self._channel

    async def close(self) -> None:
        """Close the channel and cancel its calls."""
        if self._channel is not None:
            await self._channel.close(None)
            self._channel = None
