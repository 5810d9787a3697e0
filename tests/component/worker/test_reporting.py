"""What a worker tells others by itself: steps to the predictor, its address to routers."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from ascendra.v1 import cluster_pb2, cluster_pb2_grpc, predictor_pb2, predictor_pb2_grpc
from tests.support.attach_client import AttachClient
from tests.support.worker_process import WorkerFleet

pytestmark = pytest.mark.engine


class RecordingPredictor(predictor_pb2_grpc.PredictorServiceServicer):
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.reports: list[predictor_pb2.ReportTelemetryRequest] = []
        self.arrived = asyncio.Event()

    async def ReportTelemetry(
        self, request_iterator: AsyncIterator[predictor_pb2.ReportTelemetryRequest], context: Any
    ) -> predictor_pb2.ReportTelemetryResponse:
        """Record."""
        async for report in request_iterator:
            self.reports.append(report)
            self.arrived.set()
        return predictor_pb2.ReportTelemetryResponse()

    async def wait_for_step(self, least: int) -> None:
        """Wait until a step of at least this number was reported."""
        async with asyncio.timeout(60):
            while not any(step.step >= least for report in self.reports for step in report.steps):
                self.arrived.clear()
                await self.arrived.wait()


class RecordingRouter(cluster_pb2_grpc.ClusterServiceServicer):
    """Keeps who registered."""

    def __init__(self) -> None:
        self.registered: asyncio.Queue[cluster_pb2.RegisterWorkerRequest] = asyncio.Queue()

    async def RegisterWorker(
        self, request: cluster_pb2.RegisterWorkerRequest, context: Any
    ) -> cluster_pb2.RegisterWorkerResponse:
        """Record."""
        self.registered.put_nowait(request)
        return cluster_pb2.RegisterWorkerResponse(router_id="r")


async def test_steps_reach_the_predictor_whenever_it_is_there(fleet: WorkerFleet) -> None:
    """Reports begin with the model in use, are without a hole, and go on when the predictor comes back."""
    last_step = 0
    for _ in range(2):
        server, predictor = grpc.aio.server(), RecordingPredictor()  # type: ignore[abstract]
        predictor_pb2_grpc.add_PredictorServiceServicer_to_server(predictor, server)
        server.add_insecure_port(f"unix:{fleet.directory / 'predictor.sock'}")
        await server.start()
        async with AttachClient(fleet.address("mortal")) as client:
            await client.submit(list(range(3, 90)), max_tokens=30).finish()
            await client.until(lambda: bool(client.telemetry))
            incarnation, last_step = client.welcome.incarnation, client.telemetry[-1].step
        await predictor.wait_for_step(last_step)
        await server.stop(0)
        first = predictor.reports[0]
        assert (first.worker_id, first.incarnation) == ("mortal", incarnation)
        assert first.warm_start.bins
        steps = [step for report in predictor.reports for step in report.steps]
        numbers = [step.step for step in steps]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert len(numbers) >= 10  # those on their way when the predictor left are lost
        assert all(step.age_s >= 0 and step.step_s > 0 for step in steps)


async def test_a_worker_keeps_registering(fleet: WorkerFleet) -> None:
    """The configured router hears id and address again and again, within the time to live."""
    server, router = grpc.aio.server(), RecordingRouter()  # type: ignore[abstract]
    cluster_pb2_grpc.add_ClusterServiceServicer_to_server(router, server)
    server.add_insecure_port(f"unix:{fleet.directory / 'router.sock'}")
    await server.start()
    async with asyncio.timeout(30):
        announcements = [await router.registered.get() for _ in range(3)]
    await server.stop(0)
    for announcement in announcements:
        assert announcement.worker_id == "mortal"
        assert announcement.address == fleet.address("mortal")
        assert announcement.ttl_ms == 900
