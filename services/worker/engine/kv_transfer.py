"""Handing KV caches over through vLLM's NIXL connector: its configuration, and the handles that travel."""

import importlib.util
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import orjson

from services.worker.engine.settings import KvTransferSettings

_ALIASES = ("_api", "_bindings")
_PROGRESS_PAUSE_US = 1000
"""Pause of NIXL's progress thread between two looks at its queues. Its Python API hard-codes none, which costs every
engine a core: a GPU node has it, an engine on CPU has not."""


def nixl_installed() -> bool:
    """Tell whether some build of NIXL can be imported."""
    return any(importlib.util.find_spec(name) is not None for name in ("nixl", "nixl_cu12"))


def provide_nixl() -> None:
    """Let vLLM import `nixl` where only the build for CUDA 12 is installed, which needs no CUDA for CPU memory.

    The package of that name installs the builds for all versions of CUDA and chooses one of them.
    """
    if importlib.util.find_spec("nixl") is not None:
        return
    # Read by UCX when it is loaded; vLLM would set it if it were first (its nixl_utils says why).
    os.environ.setdefault("UCX_RCACHE_MAX_UNRELEASED", "1024")
    sys.modules["nixl"] = importlib.import_module("nixl_cu12")
    for name in _ALIASES:
        sys.modules[f"nixl.{name}"] = importlib.import_module(f"nixl_cu12.{name}")
    api = sys.modules["nixl._api"]
    api.nixlBind = _PacedBindings(api.nixlBind)  # type: ignore[attr-defined]


class _PacedBindings:
    """NIXL's bindings, but agents pause between looks at their queues."""

    def __init__(self, bindings: ModuleType) -> None:
        self._bindings = bindings

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bindings, name)

    def nixlAgent(self, name: str, config: Any) -> Any:
        """Create an agent whose progress thread pauses."""
        config.pthrDelay = _PROGRESS_PAUSE_US
        return self._bindings.nixlAgent(name, config)


@contextmanager
def reserved_port(host: str) -> Iterator[int]:
    """Choose a port that nobody else is given until the connector listens on it.

    The connector waits without a limit when it cannot: vLLM's start would hang. ZeroMQ listens with SO_REUSEADDR, which
    two sockets that have it may share while neither listens; a port of the kernel's choice is never one that is bound.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((host, 0))
        yield int(holder.getsockname()[1])


def connector_config(settings: KvTransferSettings, engine: str, port: int) -> dict[str, Any]:
    """Return vLLM's kv_transfer_config, after telling the connector by environment where it listens."""
    os.environ["VLLM_NIXL_SIDE_CHANNEL_HOST"] = settings.host
    os.environ["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(port)
    if is_loopback(settings.host):
        # UCX would listen on every interface; within a host it uses shared memory, and this for its connections.
        os.environ.setdefault("UCX_NET_DEVICES", "lo")
    return {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_both",
        "kv_buffer_device": "cpu" if engine == "cpu" else "cuda",
        # What cannot be read is computed: a request never fails for a transfer that did.
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kv_lease_duration": settings.lease_s},
    }


def is_loopback(host: str) -> bool:
    """Tell whether an address is reached from its own host only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def encode_handle(exported: dict[str, Any]) -> bytes:
    """Return the opaque form of what the engine core said of an export."""
    return orjson.dumps(exported)


def read_handle(handle: bytes, tokens: int) -> dict[str, Any] | None:
    """Return the connector's parameters for a request of so many tokens.

    None when they do not fit it: the connector asserts that the blocks cover the prompt, which would end the engine.
    """
    try:
        exported = orjson.loads(handle)
        fits = exported["tokens"] == tokens and exported["blocks"] == len(exported["params"]["remote_block_ids"][0])
        return dict(exported["params"]) if fits else None
    except (orjson.JSONDecodeError, KeyError, IndexError, TypeError, ValueError):
        return None
