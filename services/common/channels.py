"""gRPC channel and server options: the one place that spells them (misspelt ones are accepted silently)."""

import grpc
import grpc.aio

MAX_MESSAGE_BYTES = 16 << 20
"""Largest message on any hop: a prompt of 4 Mi token ids."""

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
]

CLIENT_OPTIONS: Options = [*_MESSAGE_SIZE, *_FLOW_CONTROL, *_CLIENT_KEEPALIVE, *_RECONNECT]
SERVER_OPTIONS: Options = [*_MESSAGE_SIZE, *_FLOW_CONTROL, *_SERVER_KEEPALIVE, ("grpc.so_reuseport", 0)]


def open_channel(address: str) -> grpc.aio.Channel:
    """Open a plaintext channel to host:port or unix:PATH. Must be called on the loop that uses it."""
    return grpc.aio.insecure_channel(address, options=CLIENT_OPTIONS)
