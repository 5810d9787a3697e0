"""Addresses that a service listens on."""

import socket


class CannotListen(Exception):
    """An address cannot be had; the message names it and says why."""


def host_and_port(address: str) -> tuple[str, int]:
    """Split host:port. Raises ValueError."""
    host, _, port = address.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        raise ValueError(f"expected host:port with a port up to 65535, got {address!r}")
    return host.strip("[]"), int(port)


def check_http_address(key: str, address: str) -> None:
    """Raise ValueError, naming the key, for what is not host:port."""
    try:
        host, _ = host_and_port(address)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    if not host:
        raise ValueError(f"{key}: {address} names no host; 127.0.0.1 is for this machine only, 0.0.0.0 for others too")


def bind(address: str, *, reuse_port: bool = False) -> socket.socket:
    """Return a socket bound to host:port (port 0 picks one). Raises CannotListen."""
    listener: socket.socket | None = None
    try:
        host, port = host_and_port(address)
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, where = min(found, key=lambda one: one[0] != socket.AF_INET)
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if reuse_port:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(where)
    except (OSError, ValueError) as error:
        if listener is not None:
            listener.close()
        raise CannotListen(f"{address}: {getattr(error, 'strerror', None) or error}") from error
    return listener
