"""A network between router and workers that is slow, narrow, cut, or resets its connections."""

import asyncio
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer

from ascendra import AsyncClient
from tests.support.cluster import Site, attached, running
from tests.support.fault_proxy import FaultProxy, proxies
from tests.support.load import Load, random_prompts, undisturbed
from tests.support.tiny_model import VOCAB_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]

WORKERS = ["lp-0", "lp-1", "hp"]
STREAMS = 20
CUT_S, RESETS, BETWEEN_RESETS_S = 2.0, 4, 1.0


async def test_streams_survive_a_bad_network(site: Site, tokenizer: Tokenizer) -> None:
    """Under each fault, and through its beginning and end, every stream gets exactly its tokens."""
    async with proxies([site.address(worker_id) for worker_id in WORKERS]) as network:
        router = site.router_at([proxy.address for proxy in network], silence_s=0.8)
        async with running(router, workers=3) as client, client.session() as session:
            prompts = random_prompts(16, (10, 600), seed=51, vocab_size=VOCAB_SIZE)
            cases = await undisturbed(client, prompts, 120)
            async with Load([client, session], cases, tokenizer, streams=STREAMS, tokens=(10, 120), seed=51) as load:
                await _slow(network, load)
                await _narrow(network, load)
                await _resetting(network, load)
                await attached(client, 3)
                await _busy(client, WORKERS[0])  # after the resets it may be on trial, and serve nobody yet
                await _cut(network[0], load)
                await attached(client, 3)
                await load.further(10)
            assert (await client.status()).live_requests == 0
    assert load.failures == []
    reasons = [
        attempt.reason
        for recording in load.recordings
        if recording.moved_running and recording.finished is not None
        for attempt in recording.finished.receipt.attempts[1:]
    ]
    assert any("silent" in reason for reason in reasons), "nothing moved because of the cut"
    assert any("silent" not in reason for reason in reasons), "nothing moved because of a reset"


async def _busy(client: AsyncClient, worker_id: str) -> None:
    """Wait until a worker runs several streams."""
    async with asyncio.timeout(60):
        async for status in client.watch_status(0.1):
            if any(worker.worker_id == worker_id and worker.running >= 3 for worker in status.workers):
                return


async def _slow(network: Sequence[FaultProxy], load: Load) -> None:
    for proxy in network:
        proxy.latency_s = 0.1
    await load.further(STREAMS)
    for proxy in network:
        proxy.latency_s = 0.0


async def _narrow(network: Sequence[FaultProxy], load: Load) -> None:
    for proxy in network:
        proxy.bytes_per_s = 8_000.0
    await load.further(STREAMS)
    for proxy in network:
        proxy.bytes_per_s = 0.0


async def _resetting(network: Sequence[FaultProxy], load: Load) -> None:
    for number in range(RESETS):
        network[number % len(network)].reset()
        await asyncio.sleep(BETWEEN_RESETS_S)
    await load.further(STREAMS)


async def _cut(proxy: FaultProxy, load: Load) -> None:
    proxy.cut()
    await asyncio.sleep(CUT_S)
    await load.further(STREAMS // 2)
    proxy.heal()
