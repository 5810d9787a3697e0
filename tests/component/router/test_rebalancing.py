"""Waiting requests move to whoever still makes them, or are refused when they asked for that."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from ascendra.v1 import cluster_pb2, common_pb2, inference_pb2, worker_pb2
from services.policy.admission import AdmissionPolicy
from services.policy.offload import OffloadPolicy
from services.policy.state import Role
from services.router.config import Tenant
from tests.support.local_router import LocalRouter, cluster, metadata_of, status_of, text_request, until
from tests.support.scripted_worker import ScriptedWorker

FIRST_COME = worker_pb2.SchedulingPolicy(value_function="fcfs")
REFUSE, RELEGATE = inference_pb2.OVERLOAD_ACTION_REFUSE, inference_pb2.OVERLOAD_ACTION_RELEGATE


def timed_request(ttft_ms: float, **fields: object) -> inference_pb2.GenerateRequest:
    """Return a short request with a TTFT objective."""
    request = text_request(max_tokens=3, **fields)  # type: ignore[arg-type]
    request.slo.ttft_ms = ttft_ms
    return request


@asynccontextmanager
async def one_is_busy(
    tokenizer: Path, busy: ScriptedWorker, idle: ScriptedWorker, **keys: object
) -> AsyncIterator[LocalRouter]:
    """Run two workers, one with a long backlog that does not move, the other with nothing; the busy one is next."""
    busy.hold = True
    async with cluster(tokenizer, busy, idle, placement="round_robin", **keys) as router:
        backlog = []
        for count in range(1, 21):
            long = text_request("word " * 350, max_tokens=2)
            long.slo.ttft_ms = 600_000
            backlog.append(asyncio.create_task(router.collect(long)))
            await until(lambda count=count: len(busy.submitted) == count)  # type: ignore[misc]
            await router.collect(timed_request(600_000))
        try:
            yield router
        finally:
            busy.hold = False
            await asyncio.gather(*backlog)


@pytest.mark.parametrize("role", [Role.UNIFIED, Role.LOW])
async def test_a_request_at_risk_is_rescued_by_a_peer(tokenizer_directory: Path, role: Role) -> None:
    """Without any HP it is withdrawn and submitted to the idle worker; the move has its own kind."""
    busy = ScriptedWorker("a-busy", role=role, policy=FIRST_COME)
    idle = ScriptedWorker("b-idle", role=role, policy=FIRST_COME)
    async with one_is_busy(tokenizer_directory, busy, idle) as router:
        done = await router.collect(timed_request(2000, request_id="saved"))
        explained = await router.cluster.Explain(cluster_pb2.ExplainRequest(request_id="saved"))
        status = await router.cluster.GetStatus(cluster_pb2.GetStatusRequest())
    assert len(done.token_ids) == 3
    assert [decision.kind for decision in explained.decisions] == ["place", "rescue"]
    assert (explained.decisions[1].from_worker_id, explained.decisions[1].to_worker_id) == ("a-busy", "b-idle")
    assert status.counters["rescue"] == 1
    assert busy.withdrawn == [busy.submitted[20].handle]
    assert [attempt.worker_id for attempt in done.finished.receipt.attempts] == ["a-busy", "b-idle"]


async def test_without_rescue_a_request_at_risk_stays(tokenizer_directory: Path) -> None:
    """It is found to be lost, and served late where it waits."""
    busy = ScriptedWorker("a-busy", policy=FIRST_COME)
    idle = ScriptedWorker("b-idle", policy=FIRST_COME)
    async with one_is_busy(tokenizer_directory, busy, idle, rescue=False) as router:
        task = asyncio.create_task(router.collect(timed_request(500)))
        await until(lambda: router.router.rebalancer.unsaved > 0)
        busy.hold = False
        done = await task
    assert [attempt.worker_id for attempt in done.finished.receipt.attempts] == ["a-busy"]
    assert not busy.withdrawn


@pytest.mark.parametrize("role", [Role.UNIFIED, Role.LOW])
async def test_a_waiting_request_that_became_hopeless_is_refused(tokenizer_directory: Path, role: Role) -> None:
    """It looked good on arrival; once nobody can make it any more it is withdrawn and refused with a delay."""
    worker = ScriptedWorker(role=role)
    worker.hold = True
    async with cluster(tokenizer_directory, worker) as router:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.collect(timed_request(500, on_overload=REFUSE))
    assert status_of(caught.value) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "true")
    assert "no instance makes its objective" in (caught.value.details() or "")
    assert int(metadata_of(caught.value)["retry-after-ms"]) > 0
    assert worker.withdrawn == [worker.submitted[0].handle]


@pytest.mark.parametrize("role", [Role.UNIFIED, Role.LOW, Role.HIGH])
async def test_waits_of_those_who_would_be_refused_are_bounded(tokenizer_directory: Path, role: Role) -> None:
    """Past the bound the one that chose refusal is refused, whatever the offload rule says; the other is served."""
    worker = ScriptedWorker(role=role)
    worker.hold = True
    keys = {"admission_policy": AdmissionPolicy(max_wait_s=0.4), "offload_policy": OffloadPolicy(hop_limit=0)}
    async with cluster(tokenizer_directory, worker, **keys) as router:
        stays = asyncio.create_task(router.collect(timed_request(300, on_overload=RELEGATE)))
        await until(lambda: len(worker.submitted) == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.collect(timed_request(300, on_overload=REFUSE))
        assert status_of(caught.value) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "true")
        assert "over the limit of 0.4 s" in (caught.value.details() or "")
        assert int(metadata_of(caught.value)["retry-after-ms"]) > 0
        worker.hold = False
        assert len((await stays).token_ids) == 3
    assert worker.withdrawn == [worker.submitted[1].handle]


async def test_tbt_objectives_are_kept_apart(tokenizer_directory: Path) -> None:
    """With tbt_bins the like join the like, however many they are."""
    workers = [ScriptedWorker("a"), ScriptedWorker("b")]
    for worker in workers:
        worker.hold = True
    async with cluster(tokenizer_directory, *workers, placement="tbt_bins", rescue=False) as router:
        tasks = []
        for count, tbt_ms in enumerate((50, 200, 50, 50, 50, 200), start=1):
            request = timed_request(600_000)
            request.slo.tbt_ms = tbt_ms
            tasks.append(asyncio.create_task(router.collect(request)))
            await until(lambda count=count: sum(len(w.submitted) for w in workers) == count)  # type: ignore[misc]
        for worker in workers:
            worker.hold = False
        await asyncio.gather(*tasks)
    assert [{submit.slo.tbt_ms for submit in worker.submitted} for worker in workers] == [{50.0}, {200.0}]


async def test_a_tenant_gets_what_its_configuration_allows(tokenizer_directory: Path) -> None:
    """An objective below its floor is raised, and the receipt says so; a class that is not its own is refused."""
    tenants = {"small": Tenant(slo_classes=("batch",), min_ttft_ms=4000, min_tbt_ms=150)}
    async with cluster(tokenizer_directory, ScriptedWorker(), tenants=tenants) as router:
        done = await router.collect(timed_request(100, tenant="small"))
        assert done.finished.receipt.target == common_pb2.Slo(ttft_ms=4000, tbt_ms=200)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.collect(text_request(tenant="small", slo_class="interactive"))
        assert status_of(caught.value)[:2] == (grpc.StatusCode.INVALID_ARGUMENT, "CLASS_NOT_ALLOWED")
