"""Reports to a service that comes and goes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from ascendra.v1 import predictor_pb2, predictor_pb2_grpc
from services.common.channels import open_channel
from services.common.reporting import write_reports


class Listener(predictor_pb2_grpc.PredictorServiceServicer):
    """Keeps who reported."""

    def __init__(self) -> None:
        self.heard: asyncio.Queue[str] = asyncio.Queue()

    async def ReportTelemetry(
        self, request_iterator: AsyncIterator[predictor_pb2.ReportTelemetryRequest], context: Any
    ) -> predictor_pb2.ReportTelemetryResponse:
        """Listen."""
        async for report in request_iterator:
            self.heard.put_nowait(report.worker_id)
        return predictor_pb2.ReportTelemetryResponse()


async def for_ever(report: Callable[[], Awaitable[None]]) -> None:
    """Report again whenever that fails, at once."""
    while True:
        with contextlib.suppress(grpc.aio.AioRpcError):
            await report()


async def test_what_is_due_stays_due_until_there_is_a_connection(tmp_path: Path) -> None:
    """Calls that fail, before and while the service comes, take nothing; the first that does not takes all."""
    address = f"unix:{tmp_path}/listener.sock"
    due = ["one", "two"]

    def next_due() -> predictor_pb2.ReportTelemetryRequest | None:
        return predictor_pb2.ReportTelemetryRequest(worker_id=due.pop(0)) if due else None

    async with open_channel(address) as channel:
        stub = predictor_pb2_grpc.PredictorServiceStub(channel)

        async def report() -> None:
            await write_reports(stub.ReportTelemetry(), next_due, 0.01)  # type: ignore[call-arg]

        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError):
                await report()
        assert due == ["one", "two"]

        server, listener = grpc.aio.server(), Listener()  # type: ignore[abstract]
        predictor_pb2_grpc.add_PredictorServiceServicer_to_server(listener, server)
        server.add_insecure_port(address)
        await server.start()
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:
            reporting = tasks.create_task(for_ever(report))
            assert [await listener.heard.get() for _ in range(2)] == ["one", "two"]
            reporting.cancel()
        await server.stop(0)
