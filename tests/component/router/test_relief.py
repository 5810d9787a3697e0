"""Running streams that leave a worker before it breaks their cadence."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from ascendra.v1 import cluster_pb2, inference_pb2
from services.policy.relief import ReliefPolicy
from tests.support.local_router import Collected, LocalRouter, cluster, text_request, until
from tests.support.scripted_worker import ScriptedWorker

EXPECTED = [66 + offset % 26 for offset in range(400)]
POLICY = ReliefPolicy(sustain_s=0.2, settle_s=0.2, moves_per_s=1.0, burst=3)


def request(number: int, tbt_ms: float = 100.0, **fields: Any) -> inference_pb2.GenerateRequest:
    """Return a request for a long stream."""
    message = text_request(f"count {number}", max_tokens=150, request_id=f"r{number}", **fields)
    message.slo.tbt_ms = tbt_ms
    return message


async def start(
    router: LocalRouter, worker: ScriptedWorker, *asked: inference_pb2.GenerateRequest
) -> "list[asyncio.Task[Collected]]":
    """Start streams while this worker is the only one."""
    tasks = [asyncio.create_task(router.collect(message)) for message in asked]
    await until(lambda: sum(r.has_tokens for r in router.router.dispatcher.live.values()) == len(asked))
    assert len(worker.submitted) == len(asked)
    return tasks


def moved_total() -> float:
    """Return the streams moved for their cadence so far."""
    labels = {"cause": "tbt_risk", "outcome": "moved"}
    return REGISTRY.get_sample_value("ascendra_router_running_moves_total", labels) or 0.0


async def slow_and_fast(
    router: LocalRouter, slow: ScriptedWorker, fast: ScriptedWorker, count: int
) -> "list[asyncio.Task[Collected]]":
    """Start streams on the slow worker while it is fast, then let it become slow and the other one join."""
    tasks = await start(router, slow, *(request(number) for number in range(count)))
    slow.step_s = 0.25
    await fast.start()
    router.router.pool.register(fast.address, 60.0)
    await router.attached(2)
    return tasks


async def test_streams_leave_a_worker_that_became_slow(tokenizer_directory: Path) -> None:
    """They go on elsewhere, whole, and Explain says why; those without a tight objective stay."""
    slow, fast = ScriptedWorker("slow"), ScriptedWorker("fast")
    before = moved_total()
    async with cluster(tokenizer_directory, slow, relief_policy=POLICY) as router:
        tasks = await slow_and_fast(router, slow, fast, 2)
        patient = asyncio.create_task(router.collect(request(9, tbt_ms=5000.0)))
        done = await asyncio.gather(*tasks)
        explained = await router.cluster.Explain(cluster_pb2.ExplainRequest(request_id="r0"))
        slow.step_s = 0.002
        assert (await patient).token_ids == EXPECTED[:150]
        status = await router.cluster.GetStatus(cluster_pb2.GetStatusRequest())
        await fast.stop()
    for one in done:
        assert one.token_ids == EXPECTED[:150]
        attempts = one.finished.receipt.attempts
        assert [attempt.worker_id for attempt in attempts] == ["slow", "fast"]
        assert attempts[1].reason.startswith("relief: gaps of ")
        assert attempts[1].first_token_offset > 0
        assert "by replay" in attempts[1].reason
    assert [decision.kind for decision in explained.decisions] == ["place", "relief"]
    assert status.counters["reliefs"] == moved_total() - before == 2
    assert len(slow.cancelled) >= 2


@pytest.mark.parametrize("keys", [{"relief": False}, {"move_running": False}], ids=str)
async def test_relief_can_be_turned_off(tokenizer_directory: Path, keys: dict[str, Any]) -> None:
    """Then a stream stays where it is, however slow."""
    slow, fast = ScriptedWorker("slow"), ScriptedWorker("fast")
    async with cluster(tokenizer_directory, slow, relief_policy=POLICY, **keys) as router:
        (task,) = await slow_and_fast(router, slow, fast, 1)
        live = router.router.dispatcher.live["r0"]
        seen = len(live.generated)
        await until(lambda: len(live.generated) >= seen + 6)
        slow.step_s = 0.002
        done = await task
        await fast.stop()
    assert len(done.finished.receipt.attempts) == 1


async def test_there_is_no_storm(tokenizer_directory: Path) -> None:
    """Many streams at risk leave one after the other: the burst, then the rate."""
    slow, fast = ScriptedWorker("slow"), ScriptedWorker("fast")
    before = moved_total()
    async with cluster(tokenizer_directory, slow, relief_policy=POLICY) as router:
        tasks = await slow_and_fast(router, slow, fast, 12)
        loop = asyncio.get_running_loop()
        await until(lambda: moved_total() > before)
        first_s = loop.time()
        await until(lambda: moved_total() - before >= 5)
        assert moved_total() - before <= POLICY.burst + POLICY.moves_per_s * (loop.time() - first_s) + 1
        slow.step_s = 0.002
        for one in await asyncio.gather(*tasks):
            assert one.token_ids == EXPECTED[:150]
        await fast.stop()
