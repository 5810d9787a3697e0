"""What a router makes of a bad network to its workers."""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.router.config import RouterConfig
from tests.support.fault_proxy import FaultProxy, proxies
from tests.support.local_router import Collected, LocalRouter, local_router, text_request, until
from tests.support.scripted_worker import ScriptedWorker

EXPECTED = [66 + offset % 26 for offset in range(2000)]
STREAMS, TOKENS = 6, 120


@asynccontextmanager
async def site(tokenizer: Path) -> AsyncIterator[tuple[LocalRouter, list[FaultProxy]]]:
    """Run two workers, a proxy in front of each, and a router that knows the proxies only."""
    workers = [ScriptedWorker("a"), ScriptedWorker("b")]
    # Socket paths are limited to about a hundred bytes, which pytest's own directories use up.
    with tempfile.TemporaryDirectory(prefix="ascendra-") as folder:
        for worker in workers:
            worker.step_s = 0.01
            await worker.start(f"unix:{folder}/{worker.welcome.worker_id}.sock")
        async with proxies([worker.address for worker in workers]) as network:
            addresses = [proxy.address for proxy in network]
            async with local_router(tokenizer, addresses, silence_s=RouterConfig.silence_s) as router:
                await router.attached(2)
                yield router, network
        for worker in workers:
            await worker.stop()


async def slow(network: list[FaultProxy]) -> None:
    """Add 50 ms each way."""
    for proxy in network:
        proxy.latency_s = 0.05
    await asyncio.sleep(0.3)


async def narrow(network: list[FaultProxy]) -> None:
    """Let 4 kB/s through."""
    for proxy in network:
        proxy.bytes_per_s = 4000.0
    await asyncio.sleep(0.3)


async def reset(network: list[FaultProxy]) -> None:
    """Break one worker's connections, then the other's."""
    for proxy in network:
        proxy.reset()
        await asyncio.sleep(0.4)


async def cut(network: list[FaultProxy]) -> None:
    """Cut one worker off for longer than it takes to be noticed."""
    network[0].cut()
    await asyncio.sleep(1.5)
    network[0].heal()


@pytest.mark.parametrize("fault", [slow, narrow, reset, cut], ids=lambda fault: fault.__name__)
async def test_streams_survive(tokenizer_directory: Path, fault: Callable[[list[FaultProxy]], Awaitable[None]]) -> None:
    """Every stream gets exactly its tokens, and afterwards both workers are in use again."""
    async with site(tokenizer_directory) as (router, network):
        tasks = [
            asyncio.create_task(router.collect(text_request(f"{number}", max_tokens=TOKENS)))
            for number in range(STREAMS)
        ]
        live = router.router.dispatcher.live
        await until(lambda: sum(len(request.generated) > 3 for request in live.values()) == STREAMS)
        await fault(network)
        done = await asyncio.gather(*tasks)
        for proxy in network:
            proxy.latency_s = proxy.bytes_per_s = 0.0
        links = router.router.pool.links()
        await until(lambda: all(link.takes_requests(time.monotonic()) for link in links))
    assert [one.token_ids for one in done] == [EXPECTED[:TOKENS]] * STREAMS
    assert any(moved(one) for one in done) == (fault in (reset, cut))


def moved(done: Collected) -> bool:
    """Return whether a stream went on elsewhere after its first token."""
    return any(attempt.first_token_offset > 0 for attempt in done.finished.receipt.attempts)


async def test_a_worker_is_dialled_anew_after_a_cut(tokenizer_directory: Path) -> None:
    """A connection that leads nowhere is not waited for: once the way is free the worker is attached within seconds."""
    async with site(tokenizer_directory) as (router, network):
        link = next(link for link in router.router.pool.links() if link.address == network[0].address)
        network[0].cut()
        await until(lambda: not link.attached)
        network[0].forget()
        network[0].heal()
        healed_s = time.monotonic()
        await until(lambda: link.attached)
        # gRPC's keepalive would notice after 25 s.
        assert time.monotonic() - healed_s < 15
