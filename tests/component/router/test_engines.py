"""Routers with real workers: vLLM on CPU and the emulated engine under vLLM's own scheduler."""

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from ascendra.v1 import cluster_pb2, common_pb2, inference_pb2
from tests.support.local_router import LocalRouter, local_router, text_request, until
from tests.support.tiny_model import shared_tiny_model
from tests.support.worker_process import WorkerFleet, cpu_worker, emulated_worker

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model() -> Path:
    """The tiny model."""
    return shared_tiny_model()


@pytest.fixture(scope="module")
def fleet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerFleet]:
    """Two CPU workers and two emulated ones, restarted when they die."""
    emulated: dict[str, Any] = {"served_model_name": "emulated", "vocab_size": 512, "prefix_caching": False}
    workers = {
        "cpu-a": cpu_worker(model),
        "cpu-b": cpu_worker(model),
        "low": emulated_worker(role="low", **emulated),
        "high": emulated_worker(role="high", **emulated),
    }
    with WorkerFleet(tmp_path_factory.mktemp("fleet"), workers, restart=True) as fleet:
        yield fleet


@contextlib.asynccontextmanager
async def router_of(fleet: WorkerFleet, model: Path, name: str, *workers: str) -> AsyncIterator[LocalRouter]:
    """Run a router attached to some of the fleet."""
    addresses = [fleet.address(worker) for worker in workers]
    async with local_router(model, addresses, model_name=name) as router:
        await router.attached(len(workers))
        yield router


def sampled(text: str, max_tokens: int, seed: int) -> inference_pb2.GenerateRequest:
    """Return a request with seeded sampling and a penalty."""
    request = text_request(text, max_tokens=max_tokens)
    request.sampling.temperature = 1.0
    request.sampling.seed = seed
    request.sampling.frequency_penalty = 0.5
    request.sampling.ignore_eos = True
    return request


async def test_streams_agree_between_workers(fleet: WorkerFleet, model: Path) -> None:
    """Greedy and seeded streams of one worker equal those of the other, token by token and in text."""
    requests = [sampled(f"prompt {i}", 24, i) for i in range(3)] + [text_request("the same", max_tokens=24)]
    outputs = []
    for worker in ("cpu-a", "cpu-b"):
        async with router_of(fleet, model, "tiny", worker) as router:
            outputs.append([await router.collect(request) for request in requests])
            for done in outputs[-1]:
                assert done.text == router.router.codec.decode(done.token_ids)
                assert done.finished.usage.completion_tokens == len(done.token_ids)
    assert [done.token_ids for done in outputs[0]] == [done.token_ids for done in outputs[1]]


async def test_a_killed_worker_costs_no_token(fleet: WorkerFleet, model: Path) -> None:
    """kill -9 of a worker in mid-stream: every stream goes on elsewhere and ends token-exact."""
    requests = [sampled(f"count {i}", 200, 100 + i) for i in range(4)]
    async with router_of(fleet, model, "tiny", "cpu-a", "cpu-b") as router:
        expected = await asyncio.gather(*(router.collect(request) for request in requests))
        tasks = [asyncio.create_task(router.collect(request)) for request in requests]
        dispatcher = router.router.dispatcher
        await until(lambda: sum(len(r.generated) >= 10 for r in dispatcher.live.values()) == 4, timeout_s=60)
        victim = dispatcher.where(next(iter(dispatcher.live.values())))
        assert victim is not None
        os.kill(fleet.pid(victim[0].worker_id), signal.SIGKILL)
        moved = await asyncio.gather(*tasks)
    assert [done.token_ids for done in moved] == [done.token_ids for done in expected]
    assert [done.text for done in moved] == [done.text for done in expected]
    assert any(len(done.finished.receipt.attempts) == 2 for done in moved)
    assert all(done.finished.receipt.move_contract == common_pb2.MOVE_CONTRACT_EXACT for done in moved)


async def test_load_on_lp_reaches_hp(fleet: WorkerFleet, model: Path) -> None:
    """More prompts than LP serves in time: some are offloaded or drawn by tickets, and all end whole."""
    async with router_of(fleet, model, "emulated", "low", "high") as router:
        requests = []
        for i in range(30):
            request = text_request(f"{i} " + "word " * 300, max_tokens=20)
            request.slo.ttft_ms = 2000
            request.sampling.ignore_eos = True
            requests.append(request)
        done = await asyncio.gather(*(router.collect(request) for request in requests))
        status = await router.cluster.GetStatus(cluster_pb2.GetStatusRequest())
    assert all(len(one.token_ids) == 20 for one in done)
    pools = {one.finished.receipt.pool for one in done}
    assert pools == {common_pb2.ROLE_LOW_PRIORITY, common_pb2.ROLE_HIGH_PRIORITY}
    assert status.counters["offloads"] + status.counters["tickets"] > 0
    assert status.prediction_policy == "worker_model"


async def test_cancelling_frees_the_engine(fleet: WorkerFleet, model: Path) -> None:
    """After its client left, a request is gone from the engine."""
    async with router_of(fleet, model, "emulated", "low") as router:
        calls = [router.inference.Generate(text_request(f"{i}", max_tokens=4000)) for i in range(5)]
        for call in calls:
            await call.read()
            await call.read()
        for call in calls:
            call.cancel()
        link = router.router.pool.links()[0]
        await until(lambda: not link.placed and not link.instance.running and not link.instance.waiting)
