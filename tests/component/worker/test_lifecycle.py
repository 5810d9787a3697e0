"""Death, drain and observation of a worker."""

import asyncio
import os
import signal
import time
import urllib.error
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ascendra.v1 import worker_pb2
from services.common.channels import open_channel
from tests.support.attach_client import AttachClient
from tests.support.worker_process import WorkerFleet, is_running

pytestmark = pytest.mark.engine

PROMPT = list(range(3, 60))


def get(url: str) -> tuple[int, str]:
    """Return status and body of a page."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def health(address: str) -> int:
    """Return the gRPC health of a worker."""
    channel = open_channel(address)
    try:
        request = health_pb2.HealthCheckRequest(service="ascendra.v1.WorkerService")
        answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=10)
        return int(answer.status)
    finally:
        await channel.close(None)


async def restarted(fleet: WorkerFleet, old_pid: int) -> None:
    """Wait until the mortal worker is back."""

    def back() -> None:
        deadline_s = time.monotonic() + 60
        while fleet.pid("mortal") == old_pid:
            assert time.monotonic() < deadline_s, "the worker was not restarted"
            time.sleep(0.05)

    await asyncio.to_thread(back)


async def test_kill_of_the_engine_core(fleet: WorkerFleet) -> None:
    """When the engine core is killed every request fails retryably and soon, and the fleet restarts the worker."""
    old_pid = fleet.pid("mortal")
    async with AttachClient(fleet.address("mortal")) as client:
        incarnation = client.welcome.incarnation
        streams = [client.submit(PROMPT, max_tokens=4000) for _ in range(5)]
        for stream in streams:
            await stream.first_token.wait()
        os.kill(fleet.engine_core_pid("mortal"), signal.SIGKILL)
        await asyncio.gather(*(stream.finish(10) for stream in streams))
        for stream in streams:
            assert stream.failed is not None
            assert stream.failed.code == grpc.StatusCode.UNAVAILABLE.value[0]
            assert stream.failed.reason == "ENGINE_DIED"
    await restarted(fleet, old_pid)
    exited = fleet.wait_for("worker_exited", pid=old_pid)
    assert exited["status"] == 70
    assert exited["restart"]
    async with AttachClient(fleet.address("mortal")) as client:
        assert client.welcome.incarnation != incarnation
        assert len((await client.submit(PROMPT, max_tokens=5).finish()).token_ids) == 5


async def test_sigterm_of_the_engine_core_is_no_normal_end(fleet: WorkerFleet) -> None:
    """A core that is told to stop ends its streams "normally"; the worker reports them as failed, retry safe."""
    old_pid = fleet.pid("mortal")
    async with AttachClient(fleet.address("mortal")) as client:
        stream = client.submit(PROMPT, max_tokens=4000)
        await stream.first_token.wait()
        os.kill(fleet.engine_core_pid("mortal"), signal.SIGTERM)
        await stream.finish(15)
        assert stream.failed is not None
        assert stream.failed.reason == "ENGINE_DIED"
    await restarted(fleet, old_pid)


async def test_kill_of_the_front_end_leaves_no_orphan(fleet: WorkerFleet) -> None:
    """When the front end is killed its engine core goes with it."""
    old_pid, core = fleet.pid("mortal"), fleet.engine_core_pid("mortal")
    os.kill(old_pid, signal.SIGKILL)
    deadline_s = time.monotonic() + 20
    while is_running(core):
        assert time.monotonic() < deadline_s, "the engine core outlived its front end"
        await asyncio.sleep(0.05)
    await restarted(fleet, old_pid)


async def test_drain_refuses_new_finishes_old_and_cancels_late(fleet: WorkerFleet) -> None:
    """BeginDrain: new requests are refused retryably, short ones finish, long ones are cancelled at the timeout."""
    old_pid = fleet.pid("mortal")
    http = f"http://{fleet.http('mortal')}"
    assert (await asyncio.to_thread(get, f"{http}/health"))[0] == 200
    async with AttachClient(fleet.address("mortal")) as client:
        short, long = client.submit(PROMPT, max_tokens=25), client.submit(PROMPT, max_tokens=5000)
        await short.first_token.wait()
        await long.first_token.wait()
        client.send(worker_pb2.AttachRequest(begin_drain=worker_pb2.BeginDrain(timeout_ms=2500)))
        await client.until(lambda: bool(client.of_kind("draining")))
        assert client.of_kind("draining")[0].remaining_ms == 2500
        late = await client.submit(PROMPT, max_tokens=5).finish()
        assert late.failed is not None
        assert (late.failed.code, late.failed.reason) == (grpc.StatusCode.UNAVAILABLE.value[0], "DRAINING")
        assert (await asyncio.to_thread(get, f"{http}/health"))[0] == 503
        assert (await asyncio.to_thread(get, f"{http}/live"))[0] == 200
        assert await health(fleet.address("mortal")) == health_pb2.HealthCheckResponse.NOT_SERVING
        await short.finish()
        assert len(short.token_ids) == 25
        await long.finish()
        assert long.failed is not None
        assert (long.failed.code, long.failed.reason) == (grpc.StatusCode.UNAVAILABLE.value[0], "DRAINING")
    os.kill(fleet.engine_core_pid("mortal"), signal.SIGKILL)
    await restarted(fleet, old_pid)
    assert await health(fleet.address("mortal")) == health_pb2.HealthCheckResponse.SERVING


async def test_sigterm_drains(fleet: WorkerFleet) -> None:
    """SIGTERM to a worker is announced, lets running requests finish, and ends the process with status 0."""
    pid = fleet.pid("leaver")
    async with AttachClient(fleet.address("leaver")) as client:
        stream = client.submit(PROMPT, max_tokens=40)
        await stream.first_token.wait()
        os.kill(pid, signal.SIGTERM)
        await client.until(lambda: bool(client.of_kind("draining")))
        late = await client.submit(PROMPT, max_tokens=5).finish()
        assert late.failed is not None
        assert late.failed.reason == "DRAINING"
        await stream.finish()
        assert len(stream.token_ids) == 40
    exited = await asyncio.to_thread(fleet.wait_for, "worker_exited", pid=pid, timeout_s=30)
    assert exited["status"] == 0


async def test_metrics(fleet: WorkerFleet) -> None:
    """vLLM's metrics keep their names and ours stand beside them."""
    async with AttachClient(fleet.address("cpu")) as client:
        await client.submit(PROMPT, max_tokens=5).finish()
        status, body = await asyncio.to_thread(get, f"http://{fleet.http('cpu')}/metrics")
    assert status == 200
    for name in ("vllm:num_requests_running", "vllm:kv_cache_usage_perc", "ascendra_worker_step_seconds_bucket"):
        assert name in body
    assert "ascendra_worker_attached_routers 1.0" in body
