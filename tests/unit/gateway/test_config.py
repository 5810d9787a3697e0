"""The gateway's configuration."""

from pathlib import Path
from typing import Any

import pytest

from services.common.config import ConfigError, resolve
from services.gateway.config import GatewayConfig

SHIPPED = Path(__file__).resolve().parents[3] / "deploy" / "config" / "gateway.yaml"


def test_the_shipped_file_is_accepted() -> None:
    """Every key of deploy/config/gateway.yaml exists, and its routers are read."""
    assert resolve(GatewayConfig, file=SHIPPED).routers == ("127.0.0.1:7100",)


@pytest.mark.parametrize(
    "flags",
    [
        {"routers": ""},
        {"max_choices": "0"},
        {"request_timeout_s": "0"},
        {"attainment_target": "1.5"},
        {"listen": "127.0.0.1"},
        {"listen": "127.0.0.1:70000"},
        {"listen": "unix:/run/gateway"},
    ],
)
def test_impossible_values_are_refused(flags: dict[str, Any]) -> None:
    """The message names the key."""
    with pytest.raises(ConfigError, match=next(iter(flags)).replace("_", "-")):
        resolve(GatewayConfig, flags=flags)


@pytest.mark.parametrize("listen", ["8000", ":8000"])
def test_every_interface_must_be_asked_for(listen: str) -> None:
    """A port alone would be open to other machines without a word."""
    with pytest.raises(ConfigError, match=f"listen: {listen} names no host"):
        resolve(GatewayConfig, flags={"listen": listen})
