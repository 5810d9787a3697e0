"""The health probe of the containers, against a real gRPC server."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from services.common.grpc_server import GrpcServer, start_grpc_server
from services.common.health_probe import main, probe
from services.common.http_status import start_http_status


@pytest.fixture
async def server() -> AsyncIterator[GrpcServer]:
    started = await start_grpc_server("127.0.0.1:0", lambda _: [], serving=False)
    yield started
    await started.stop(0)


async def test_exit_status_follows_health(server: GrpcServer, capsys: pytest.CaptureFixture[str]) -> None:
    """The probe fails until the server says it is serving, and says why."""
    assert await asyncio.to_thread(main, [server.address, "--timeout-s", "30"]) == 1
    assert "NOT_SERVING" in capsys.readouterr().err
    await server.set_serving(True)
    assert await asyncio.to_thread(main, [server.address, "--timeout-s", "30"]) == 0


async def test_unknown_service_is_not_healthy(server: GrpcServer) -> None:
    """A service that the server does not have is named in the answer."""
    await server.set_serving(True)
    assert (await asyncio.to_thread(probe, server.address, service="no.Such", timeout_s=30.0)).startswith("NOT_FOUND")


async def test_health_pages(capsys: pytest.CaptureFixture[str]) -> None:
    """A URL is asked over HTTP: the status decides, and what the page says of a failure is passed on."""
    ready = False
    http = await start_http_status("127.0.0.1:0", lambda: ready)
    url = f"http://{http.address}/health"
    try:
        assert await asyncio.to_thread(main, [url, "--timeout-s", "30"]) == 1
        assert "503: not ready" in capsys.readouterr().err
        ready = True
        assert await asyncio.to_thread(main, [url, "--timeout-s", "30"]) == 0
    finally:
        await http.stop()
    assert await asyncio.to_thread(main, [url, "--timeout-s", "2"]) == 1


def test_unreachable_server_is_not_healthy() -> None:
    """Nobody listening is a failure within the time limit, not a wait without end."""
    assert main(["127.0.0.1:1", "--timeout-s", "2"]) == 1
