"""Addresses that a service listens on."""

import socket
from pathlib import Path

import pytest

from services.common.grpc_server import start_grpc_server
from services.common.http_status import start_http_status
from services.common.listening import CannotListen, bind, host_and_port
from services.common.tls import TlsConfig, check_listener


def test_an_address_is_split() -> None:
    """The brackets of IPv6 belong to the notation."""
    assert host_and_port("127.0.0.1:80") == ("127.0.0.1", 80)
    assert host_and_port("[::1]:0") == ("::1", 0)
    assert host_and_port("8000") == ("", 8000)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:", "host:http", "127.0.0.1:70000", "127.0.0.1:-1", "h:²"])
def test_what_has_no_port_is_refused(address: str) -> None:
    """In the configuration as well as where it is used."""
    with pytest.raises(ValueError, match="expected host:port"):
        host_and_port(address)
    with pytest.raises(ValueError, match="listen: expected host:port"):
        check_listener(address, TlsConfig(), insecure=True)
    with pytest.raises(CannotListen, match="expected host:port"):
        bind(address)


async def test_a_port_in_use_is_named() -> None:
    """By every server of a service."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(CannotListen, match=f"{address}: Address already in use"):
            await start_http_status(address, lambda: True)
        with pytest.raises(CannotListen, match=f"{address}: Address already in use"):
            await start_grpc_server(address, lambda _: [])


async def test_a_socket_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """The reason is in gRPC's own log line."""
    with pytest.raises(CannotListen, match=f"unix:{tmp_path}/none/socket: Failed to bind"):
        await start_grpc_server(f"unix:{tmp_path}/none/socket", lambda _: [])
