"""Late binding: what no worker has room for waits in the router, and ends whatever happens."""

import asyncio
from pathlib import Path

import grpc
import grpc.aio
import pytest

from ascendra.v1 import cluster_pb2, common_pb2, inference_pb2, worker_pb2
from services.policy.late_binding import LateBindingPolicy
from services.policy.state import Role
from services.router import metrics
from services.router.config import LATE
from tests.support.local_router import Collected, LocalRouter, cluster, metadata_of, status_of, text_request, until
from tests.support.scripted_worker import ScriptedWorker

EXPECTED = [66 + i % 26 for i in range(100)]
REFUSE = inference_pb2.OVERLOAD_ACTION_REFUSE
ONE_EACH = {"placement": LATE, "late_binding": LateBindingPolicy(max_committed=1), "rescue": False}


def request(request_id: str, ttft_ms: float = 600_000, **fields: object) -> inference_pb2.GenerateRequest:
    """Return a short request."""
    asked = text_request(max_tokens=3, request_id=request_id, **fields)  # type: ignore[arg-type]
    asked.slo.ttft_ms = ttft_ms
    return asked


def held(router: LocalRouter) -> int:
    """Return how many requests the router keeps."""
    assert router.router.binder is not None
    return len(router.router.binder)


async def fill(router: LocalRouter, *asked: inference_pb2.GenerateRequest) -> "list[asyncio.Task[Collected]]":
    """Send requests one by one, each taken in before the next."""
    tasks = []
    for one in asked:
        tasks.append(asyncio.create_task(router.collect(one)))
        await until(lambda one=one: one.request_id in router.router.dispatcher.live)  # type: ignore[misc]
    return tasks


async def kinds(router: LocalRouter, request_id: str) -> list[str]:
    """Return the decisions about a request."""
    explained = await router.cluster.Explain(cluster_pb2.ExplainRequest(request_id=request_id))
    return [decision.kind for decision in explained.decisions]


async def test_what_no_worker_has_room_for_waits_in_the_router(tokenizer_directory: Path) -> None:
    """Two are committed, one to each worker; the others wait, are drawn by deadline, and say why they went there."""
    workers = [ScriptedWorker("a"), ScriptedWorker("b")]
    for worker in workers:
        worker.hold = True
    async with cluster(tokenizer_directory, *workers, **ONE_EACH) as router:
        tasks = await fill(router, *(request(f"r{i}", 600_000 - 1000 * i) for i in range(6)))
        await until(lambda: held(router) == 4)
        assert [len(worker.submitted) for worker in workers] == [1, 1]
        status = await router.cluster.GetStatus(cluster_pb2.GetStatusRequest())
        assert (status.held_requests, status.live_requests) == (4, 6)
        assert metrics.HELD._value.get() == 4
        [family] = metrics.HELD_BACKLOG.collect()
        assert family.samples[0].value > 0
        waiting = await router.cluster.Explain(cluster_pb2.ExplainRequest(request_id="r5"))
        assert (waiting.state, [decision.kind for decision in waiting.decisions]) == ("waiting", ["hold"])
        workers[1].hold = False
        done = await asyncio.gather(*tasks[1:])
        workers[0].hold = False
        await tasks[0]
        explained = await router.cluster.Explain(cluster_pb2.ExplainRequest(request_id="r5"))
    assert all(one.token_ids == EXPECTED[:3] for one in done)
    first = {worker.submitted[0].request_id for worker in workers}
    assert first == {"r0", "r1"}
    assert [submit.request_id for submit in workers[1].submitted[1:]] == ["r5", "r4", "r3", "r2"]
    hold, place = explained.decisions
    assert (hold.kind, place.kind, place.to_worker_id) == ("hold", "place", "b")
    assert place.rule.startswith("late binding: first in the order")
    assert {candidate.worker_id for candidate in place.candidates} == {"a", "b"}
    assert place.predicted_ttft_s > 0
    assert metrics.HELD._value.get() == 0


async def test_a_held_request_can_be_cancelled(tokenizer_directory: Path) -> None:
    """Its client leaves: it is gone, no worker hears of it, the next one takes its turn."""
    worker = ScriptedWorker()
    worker.hold = True
    async with cluster(tokenizer_directory, worker, **ONE_EACH) as router:
        tasks = await fill(router, *(request(f"r{i}") for i in range(3)))
        await until(lambda: held(router) == 2)
        tasks[1].cancel()
        await until(lambda: held(router) == 1)
        worker.hold = False
        await asyncio.gather(tasks[0], tasks[2])
        await until(lambda: not router.router.dispatcher.live)
    assert [submit.request_id for submit in worker.submitted] == ["r0", "r2"]


async def test_a_workers_death_costs_nobody(tokenizer_directory: Path) -> None:
    """What was committed there moves at once; what was held is drawn by the other worker."""
    workers = [ScriptedWorker("a"), ScriptedWorker("b")]
    for worker in workers:
        worker.hold = True
    async with cluster(tokenizer_directory, *workers, **ONE_EACH) as router:
        tasks = await fill(router, *(request(f"r{i}") for i in range(5)))
        await until(lambda: held(router) == 3)
        dying = next(worker for worker in workers if worker.submitted[0].request_id == "r0")
        other = next(worker for worker in workers if worker is not dying)
        await dying.stop()
        await until(lambda: len(other.submitted) == 2)
        other.hold = False
        done = await asyncio.gather(*tasks)
        moved = await kinds(router, "r0")
    assert all(one.token_ids == EXPECTED[:3] for one in done)
    assert moved == ["hold", "place", "move"]
    assert len(other.submitted) == 5


async def test_without_any_worker_held_requests_fail_in_time(tokenizer_directory: Path) -> None:
    """All workers are gone: held requests end with a status that says when to retry."""
    worker = ScriptedWorker()
    worker.hold = True
    async with cluster(tokenizer_directory, worker, no_worker_wait_s=0.2, **ONE_EACH) as router:
        tasks = await fill(router, request("r0"), request("r1"))
        await until(lambda: held(router) == 1)
        await worker.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await tasks[1]
        assert status_of(caught.value) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER", "true")
        await asyncio.gather(tasks[0], return_exceptions=True)
        assert not router.router.dispatcher.live


@pytest.mark.parametrize("refuse", [False, True])
async def test_a_held_request_that_became_hopeless(tokenizer_directory: Path, refuse: bool) -> None:
    """It is served behind all others, or refused with a delay if it asked for that."""
    policy = worker_pb2.SchedulingPolicy(value_function="edf", token_budget="dynamic", relegation="moore_hodgson")
    worker = ScriptedWorker(policy=policy)
    worker.hold = True
    async with cluster(tokenizer_directory, worker, **ONE_EACH) as router:
        fields = {"on_overload": REFUSE} if refuse else {}
        tasks = await fill(router, request("first"), request("lost", 300, **fields), request("later"))
        await until(lambda: router.router.rebalancer.unsaved == 1)
        if refuse:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await tasks[1]
            assert status_of(caught.value) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "true")
            assert int(metadata_of(caught.value)["retry-after-ms"]) > 0
        worker.hold = False
        done = await asyncio.gather(*tasks, return_exceptions=True)
    served = [submit.request_id for submit in worker.submitted]
    assert served == (["first", "later"] if refuse else ["first", "later", "lost"])
    if not refuse:
        assert worker.submitted[-1].relegated
        assert isinstance(done[1], Collected)
        assert done[1].finished.receipt.relegated


async def test_others_work_on_a_worker_counts(tokenizer_directory: Path) -> None:
    """A worker that reports more queued than this router sent there has no room; the other one draws."""
    workers = [ScriptedWorker("a"), ScriptedWorker("b")]
    async with cluster(tokenizer_directory, *workers, placement=LATE, silence_s=1000.0) as router:
        step = common_pb2.StepTelemetry(step=1, step_s=0.1, queued_prefill_tokens=50_000, running=9)
        workers[0].send_step(telemetry=[step])
        instances = {link.worker_id: link.instance for link in router.router.pool.links()}
        await until(lambda: instances["a"].queued_prefill_tokens == 50_000)
        workers[0].flowing.clear()  # a heartbeat of an idle worker would take that back
        for index in range(6):
            await router.collect(request(f"r{index}"))
        workers[0].flowing.set()
    assert not workers[0].submitted
    assert len(workers[1].submitted) == 6


async def test_hp_draws_urgent_and_ticketed_work(tokenizer_directory: Path) -> None:
    """LP is full: HP takes what LP would miss as urgent, and, while idle, others on tickets; both say so."""
    policy = worker_pb2.SchedulingPolicy(value_function="edf", token_budget="dynamic", relegation="moore_hodgson")
    low = ScriptedWorker("lp", role=Role.LOW, policy=policy)
    high = ScriptedWorker("hp", role=Role.HIGH, policy=policy)
    low.hold = True
    async with cluster(tokenizer_directory, low, high, offload=False, **ONE_EACH) as router:
        long = [request(f"long{i}", text="word " * 350) for i in range(4)]
        tasks = await fill(router, *long)
        await router.collect(request("ticketed"))
        await router.collect(request("tight", 400))
        status = await router.cluster.GetStatus(cluster_pb2.GetStatusRequest())
        low.hold = False
        await asyncio.gather(*tasks)
    assert {"ticketed", "tight"} <= {submit.request_id for submit in high.submitted}
    assert status.counters["tickets"] > 0
    assert status.counters["tickets"] + status.counters["offloads"] == len(high.submitted)


async def test_a_drained_router_ends_what_it_holds(tokenizer_directory: Path) -> None:
    """A stopping router fails what no worker had room for, as retryable."""
    worker = ScriptedWorker()
    worker.hold = True
    async with cluster(tokenizer_directory, worker, drain_timeout_s=0.2, **ONE_EACH) as router:
        tasks = await fill(router, request("r0"), request("r1"))
        await until(lambda: held(router) == 1)
        router.stop.set()
        failed = await asyncio.gather(*tasks, return_exceptions=True)
    for error in failed:
        assert isinstance(error, grpc.aio.AioRpcError)
        assert status_of(error) == (grpc.StatusCode.UNAVAILABLE, "DRAINING", "true")
