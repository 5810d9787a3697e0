"""The shared server: statuses, health and reflection over a real socket."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ascendra.v1 import inference_pb2 as pb
from ascendra.v1 import inference_pb2_grpc
from services.common.channels import open_channel
from services.common.errors import ResourceExhausted
from services.common.grpc_server import GrpcServer, start_grpc_server
from services.common.http_status import start_http_status


class Faulty(inference_pb2_grpc.InferenceServiceServicer):
    """Fails in the two ways a handler can."""

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """Refuse with a reason."""
        raise ResourceExhausted("too many", reason="TENANT_LIMIT", retry_safe=True, retry_after_ms=1500)

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        """Stream one message, then fail with a secret."""
        yield pb.GenerateResponse(text="a")
        raise ValueError("secret")


def register(server: grpc.aio.Server) -> Sequence[str]:
    """Add the faulty servicer."""
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(Faulty(), server)  # type: ignore[abstract]
    return ["ascendra.v1.InferenceService"]


@pytest.fixture
async def server() -> AsyncIterator[GrpcServer]:
    """A server on a free port."""
    started = await start_grpc_server("127.0.0.1:0", register)
    yield started
    await started.stop(0)


async def test_service_errors_carry_reason_and_retry_delay(server: GrpcServer) -> None:
    """A refusal arrives with flat metadata and google.rpc details."""
    async with open_channel(server.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await inference_pb2_grpc.InferenceServiceStub(channel).ListModels(pb.ListModelsRequest())
    error = caught.value
    trailing: Any = error.trailing_metadata()
    metadata: dict[str, Any] = dict(trailing)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert metadata["ascendra-reason"] == "TENANT_LIMIT"
    assert metadata["ascendra-retry-safe"] == "true"
    assert metadata["retry-after-ms"] == "1500"
    details = status_pb2.Status.FromString(metadata["grpc-status-details-bin"]).details
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in details)
    assert retry.retry_delay.ToMilliseconds() == 1500


async def test_unexpected_exceptions_leak_nothing(server: GrpcServer) -> None:
    """A bug becomes INTERNAL without the exception's text, after what was streamed before."""
    async with open_channel(server.address) as channel:
        call = inference_pb2_grpc.InferenceServiceStub(channel).Generate(pb.GenerateRequest())
        texts = []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for message in call:
                texts.append(message.text)
    assert texts == ["a"]
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == "internal error"


async def test_health_watch_is_live(server: GrpcServer) -> None:
    """A watcher hears each change, and the end of a stopping server does not wait for it."""
    async with open_channel(server.address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="ascendra.v1.InferenceService"))
        statuses = [(await watch.read()).status]
        await server.set_serving(False)
        statuses.append((await watch.read()).status)
        watch.cancel()
    assert statuses == [health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING]


async def test_http_health_follows_readiness_and_metrics_are_served() -> None:
    """/health is readiness, /live is the process, /metrics is Prometheus text."""
    ready = asyncio.Event()
    http = await start_http_status("127.0.0.1:0", ready.is_set)
    try:
        async with httpx.AsyncClient(base_url=f"http://{http.address}", trust_env=False) as client:
            assert (await client.get("/health")).status_code == 503
            ready.set()
            assert (await client.get("/health")).status_code == 200
            assert (await client.get("/live")).status_code == 200
            assert "python_info" in (await client.get("/metrics")).text
    finally:
        await http.stop()
