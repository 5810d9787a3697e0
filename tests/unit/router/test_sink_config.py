"""Sinks in the router's configuration file."""

from pathlib import Path

import pytest

from services.common.config import ConfigError, resolve
from services.router.config import RouterConfig, SinkConfig


def read(directory: Path, sinks: str) -> RouterConfig:
    """Return the configuration of a file with these sinks."""
    file = directory / "router.yaml"
    file.write_text(f"sinks: {sinks}\n")
    return resolve(RouterConfig, file=file)


def test_sinks_are_read_by_name(tmp_path: Path) -> None:
    """Each has an address, and limits with defaults."""
    config = read(tmp_path, "{moderation: {address: 'host:1', max-buffered-tokens: 5000}, log: {address: 'unix:x'}}")
    assert config.sinks == {
        "moderation": SinkConfig(address="host:1", max_buffered_tokens=5000),
        "log": SinkConfig(address="unix:x"),
    }


@pytest.mark.parametrize(
    ("sink", "named"),
    [
        ("{}", "address"),
        ("{address: ''}", "address"),
        ("{address: 'a:1', max-buffered-tokens: 1}", "max-buffered-tokens"),
        ("{address: 'a:1', ack-timeout-s: 0.0}", "ack-timeout-s"),
        ("{address: 'a:1', adress: 'b:1'}", "adress"),
    ],
)
def test_a_bad_sink_is_refused(tmp_path: Path, sink: str, named: str) -> None:
    """The message names the sink and the key."""
    with pytest.raises(ConfigError, match=rf"sinks\.audit.*{named}"):
        read(tmp_path, f"{{audit: {sink}}}")
