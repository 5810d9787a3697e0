"""The gateway as a process."""

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from tests.support import scripted_router as scripted
from tests.support.gateway_process import GatewayProcess
from tests.support.scripted_router import counting


async def test_drain_lets_a_stream_end(tmp_path: Path) -> None:
    """After SIGTERM the stream in progress ends as if nothing were, and the process leaves with status 0."""
    secret = "a prompt that nobody else may read"
    async with scripted.serve(counting(20, pause_s=0.05)) as router:
        with GatewayProcess(tmp_path / "log", [router.address], settle_s=0.05, drain_timeout_s=20) as gateway:
            async with httpx.AsyncClient(base_url=f"http://{gateway.address}", timeout=30) as client:
                body = {"prompt": secret, "stream": True}
                async with client.stream("POST", "/v1/completions", json=body) as answer:
                    lines = answer.aiter_lines()
                    received = [await anext(lines)]
                    gateway.process.terminate()
                    received += [line async for line in lines]
            assert await asyncio.to_thread(gateway.process.wait, 30) == 0
    events = [json.loads(line[6:]) for line in received if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == "".join(f" {i}" for i in range(20))
    assert received[-2:] == ["data: [DONE]", ""]
    log = gateway.log_file.read_text()
    entry = json.loads(next(line for line in log.splitlines() if '"request"' in line))
    assert (entry["status"], entry["completion_tokens"]) == (200, 20)
    assert secret not in log


def test_wrong_configuration_is_refused(tmp_path: Path) -> None:
    """Plaintext keys end the start with status 2; a port in use is an error too."""
    keys = tmp_path / "keys.yaml"
    keys.write_text("team: [plaintext]\n")
    with pytest.raises(RuntimeError, match="sha256sum"):
        GatewayProcess(tmp_path / "log", ["127.0.0.1:1"], api_keys_file=keys).__enter__()
    with GatewayProcess(tmp_path / "first", ["127.0.0.1:1"]) as first:
        second = GatewayProcess(tmp_path / "second", ["127.0.0.1:1"], listen=first.address)
        with pytest.raises(RuntimeError, match="in use"):
            second.__enter__()
        assert second.process.returncode == 2
        assert "Traceback" not in second.log_file.read_text()


def test_processes_share_a_port(tmp_path: Path) -> None:
    """With reuse_port, one process serves on while the other one leaves."""
    with GatewayProcess(tmp_path / "first", ["127.0.0.1:1"], reuse_port=True) as first:
        address = first.address
        with GatewayProcess(tmp_path / "second", ["127.0.0.1:1"], reuse_port=True, listen=address) as second:
            assert second.address == address
            assert first.stop() == 0
            assert httpx.get(f"http://{address}/live", verify=False).status_code == 200
