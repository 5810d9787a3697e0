"""Handles of KV caches, and workers with and without NIXL."""

import socket

import orjson
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from services.worker import config as config_module
from services.worker.config import WorkerConfig
from services.worker.engine.kv_transfer import encode_handle, is_loopback, read_handle, reserved_port

EXPORTED = {"params": {"remote_block_ids": [[4, 9]], "remote_host": "h"}, "tokens": 200, "blocks": 2, "generated": 5}


def test_a_handle_fits_its_request_only() -> None:
    """What travels comes back whole; for another number of tokens, or with blocks missing, it is no handle."""
    handle = encode_handle(EXPORTED)
    assert read_handle(handle, 200) == EXPORTED["params"]
    assert read_handle(handle, 199) is None
    assert read_handle(encode_handle(EXPORTED | {"blocks": 3}), 200) is None


@given(st.binary() | st.recursive(st.none() | st.integers(-9, 9) | st.text(), st.lists).map(orjson.dumps))
def test_nonsense_is_no_handle(data: bytes) -> None:
    """Whatever another worker sends, nothing is raised."""
    assert read_handle(data, 1) is None


def test_kv_is_handed_over_only_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto: with NIXL, our scheduler and a real engine; never when it is off."""

    def wanted(**keys: object) -> bool:
        return WorkerConfig(model="m", **keys).engine_settings().kv_transfer is not None  # type: ignore[arg-type]

    monkeypatch.setattr(config_module, "nixl_installed", lambda: True)
    assert wanted()
    assert not wanted(kv_transfer="off")
    assert not wanted(scheduler="stock")
    assert not wanted(engine="emulated")
    assert not wanted(tensor_parallel_size=2)
    monkeypatch.setattr(config_module, "nixl_installed", lambda: False)
    assert not wanted()
    with pytest.raises(ValueError, match="kv-lease-s"):
        WorkerConfig(model="m", kv_lease_s=5)


def test_loopback_addresses() -> None:
    """Only these keep the transfer library off other interfaces."""
    assert is_loopback("127.0.0.1")
    assert is_loopback("localhost")
    assert is_loopback("::1")
    assert not is_loopback("10.0.0.7")
    assert not is_loopback("worker-1")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_reserved_port_is_the_connectors_alone(host: str) -> None:
    """Others cannot bind it; ZeroMQ, with which the connector listens, can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with reserved_port(host) as port, zmq.Context() as context, context.socket(zmq.ROUTER) as listener:
        with socket.socket(family) as other, pytest.raises(OSError, match="in use"):
            other.bind((host, port))
        listener.setsockopt(zmq.IPV6, family == socket.AF_INET6)
        listener.bind(f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}")
    with socket.create_server((host, port), family=family):
        pass  # free again
