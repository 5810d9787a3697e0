"""Late binding with two routers that share nothing: short queues at the workers, and every token once."""

import asyncio
import contextlib

import pytest
from tokenizers import Tokenizer

from ascendra import AsyncClient, Slo
from tests.support.attach_client import AttachClient
from tests.support.cluster import Site, running
from tests.support.load import Case, Recording, random_prompts, undisturbed
from tests.support.tiny_model import VOCAB_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]

WORKERS = ["lp-0", "lp-1", "hp"]
TOKENS = 10
MAX_COMMITTED = 2


async def test_two_routers_hold_what_workers_have_no_room_for(site: Site, tokenizer: Tokenizer) -> None:
    """A burst through both: each holds its part, queues stay within both routers' limits, LP and HP serve, all ends."""
    prompts = random_prompts(24, (3000, 4000), seed=31, vocab_size=VOCAB_SIZE)
    options = {"placement": "late", "late_binding": {"max-committed": MAX_COMMITTED}}
    routers = [site.router(WORKERS, **options) for _ in range(2)]
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(running(*routers, workers=3))
        each = [await stack.enter_async_context(AsyncClient(router.address)) for router in routers]
        observers = [
            await stack.enter_async_context(AttachClient(site.fleet.address(worker_id), f"observer-{worker_id}"))
            for worker_id in WORKERS
        ]
        asked = [
            Case(prompt, (0,) * TOKENS).options() | {"slo": Slo(ttft_ms=30_000, tbt_ms=200), "request_id": f"l{i}"}
            for i, prompt in enumerate(prompts)
        ]
        recordings = await asyncio.gather(*(Recording().follow(client.stream(**one)) for one in asked))
        statuses = [await one.status() for one in each]
        explained = [await each[index % 2].explain(f"l{index}") for index in range(2)]
        expected = await undisturbed(client, prompts, TOKENS)
        waiting = [max((step.waiting for step in observer.telemetry), default=0) for observer in observers]
    for case, recording in zip(expected, recordings, strict=True):
        recording.check(case.expected, tokenizer)
    assert all(status.counters["hold"] >= len(prompts) // 2 for status in statuses)
    assert {worker for recording in recordings for worker in recording.workers} == set(WORKERS)
    assert sum(status.counters["tickets"] for status in statuses) > 0
    assert max(waiting) <= len(routers) * MAX_COMMITTED
    for explanation in explained:
        kinds = [decision.kind for decision in explanation.decisions]
        assert kinds[0] == "hold"
        assert kinds[1] in ("place", "ticket", "offload")
