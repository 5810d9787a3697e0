"""What the router does when workers misbehave: faults over real sockets, by script."""

import asyncio
import re
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest

from ascendra.v1 import cluster_pb2, common_pb2, inference_pb2, worker_pb2
from services.policy.state import Role
from services.router.config import RouterConfig
from tests.support.local_router import (
    Collected,
    LocalRouter,
    cluster,
    local_router,
    metadata_of,
    status_of,
    text_request,
    until,
)
from tests.support.scripted_worker import ScriptedWorker

EXPECTED = [66 + i % 26 for i in range(2000)]


async def until_tokens(router: LocalRouter, count: int) -> None:
    """Wait until the one live request has so many tokens."""

    def reached() -> bool:
        return any(len(request.generated) >= count for request in router.router.dispatcher.live.values())

    await until(reached)


async def test_a_missing_message_moves_the_stream(tokenizer_directory: Path) -> None:
    """A hole in the worker's sequence is noticed; the stream goes on elsewhere without gap or repetition."""
    one, two = ScriptedWorker("w1"), ScriptedWorker("w2")
    one.step_s = two.step_s = 0.01
    async with cluster(tokenizer_directory, one, two) as router:
        task = asyncio.create_task(router.collect(text_request(max_tokens=60)))
        await until_tokens(router, 5)
        serving = one if one.submitted else two
        serving.send_step(sequence=10_000)
        done = await task
    assert done.token_ids == EXPECTED[:60]
    assert len(done.finished.receipt.attempts) == 2
    assert "missing" in done.finished.receipt.attempts[1].reason


async def test_a_request_that_an_error_lost_ends(tokenizer_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the router's own while it moves a request leaves it nowhere: its client gets a status soon."""
    one, two = ScriptedWorker("w1"), ScriptedWorker("w2")
    one.step_s = two.step_s = 0.01

    def broken(*_: object) -> None:
        raise RuntimeError("placement is broken")

    async with cluster(tokenizer_directory, one, two) as router:
        task = asyncio.create_task(router.collect(text_request(max_tokens=500)))
        await until_tokens(router, 5)
        with monkeypatch.context() as patched:
            patched.setattr(router.router.dispatcher.placer, "choose", broken)
            (one if one.submitted else two).send_step(sequence=10_000)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asyncio.wait_for(task, 10)
        assert status_of(caught.value) == (grpc.StatusCode.UNAVAILABLE, "ADRIFT", "false")
        assert not router.router.dispatcher.live
        assert (await router.collect(text_request(max_tokens=5))).token_ids == EXPECTED[:5]


async def test_repeated_and_unknown_frames_are_dropped(tokenizer_directory: Path) -> None:
    """A message seen before, and tokens for handles nobody has, change nothing."""
    worker = ScriptedWorker()
    worker.step_s = 0.005
    async with cluster(tokenizer_directory, worker) as router:
        task = asyncio.create_task(router.collect(text_request(max_tokens=60)))
        await until_tokens(router, 5)
        worker.send_step(sequence=1, handles=[1], token_counts=[1], token_ids=[200])
        worker.send_step(handles=[999], token_counts=[1], token_ids=[200])
        assert (await task).token_ids == EXPECTED[:60]
        assert worker.streams == 1


async def test_a_silent_worker_is_left(tokenizer_directory: Path) -> None:
    """No message for 0.8 s: its requests go on elsewhere within a second, if this process itself is not held up."""
    one, two = ScriptedWorker("w1"), ScriptedWorker("w2")
    one.step_s = two.step_s = 0.01
    async with cluster(tokenizer_directory, one, two, silence_s=RouterConfig.silence_s) as router:
        held_up_s = 0.0

        async def measure_lag() -> None:
            nonlocal held_up_s
            while True:
                before_s = time.monotonic()
                await asyncio.sleep(0.01)
                held_up_s += max(time.monotonic() - before_s - 0.02, 0)

        lag = asyncio.create_task(measure_lag())
        task = asyncio.create_task(router.collect(text_request(max_tokens=80)))
        await until_tokens(router, 5)
        serving = one if one.submitted else two
        serving.flowing.clear()
        done = await task
        serving.flowing.set()
        lag.cancel()
    assert done.token_ids == EXPECTED[:80]
    found = re.search(r"silent for ([0-9.]+) s", done.finished.receipt.attempts[1].reason)
    assert found is not None
    # Lateness is allowed for twice, see services.policy.liveness.
    assert RouterConfig.silence_s <= float(found[1]) + 0.05 <= 1.05 + 3 * held_up_s


async def test_a_stalled_engine_is_left(tokenizer_directory: Path) -> None:
    """Heartbeats go on but steps stand still with work queued: the same."""
    one, two = ScriptedWorker("w1"), ScriptedWorker("w2")
    one.step_s = two.step_s = 0.01
    async with cluster(tokenizer_directory, one, two, stall_s=0.5, stall_unknown_s=0.5) as router:
        task = asyncio.create_task(router.collect(text_request(max_tokens=80)))
        await until_tokens(router, 5)
        serving = one if one.submitted else two
        serving.freeze_steps = True
        done = await task
    assert done.token_ids == EXPECTED[:80]
    assert "stand still" in done.finished.receipt.attempts[1].reason


async def test_a_stream_says_when_less_was_kept_than_promised(tokenizer_directory: Path) -> None:
    """Exact while all workers keep everything; continuous in the receipt once it went on where logits differ."""
    one = ScriptedWorker("one")
    keeps = worker_pb2.Continuation(keyed_noise=True, carried_penalties=True, dtype="bfloat16")
    two = ScriptedWorker("two", continuation=keeps)
    one.step_s = 0.01
    async with cluster(tokenizer_directory, one) as router:
        task = asyncio.create_task(router.collect(text_request(max_tokens=200)))
        await until_tokens(router, 5)
        await two.start()
        router.router.pool.register(two.address, 60.0)
        await router.attached(2)
        later = await router.collect(text_request(max_tokens=1))
        await one.stop()
        done = await task
        await two.stop()
    assert done.token_ids == EXPECTED[:200]
    assert done.accepted.move_contract == common_pb2.MOVE_CONTRACT_EXACT
    assert done.finished.receipt.move_contract == common_pb2.MOVE_CONTRACT_CONTINUOUS
    assert later.accepted.move_contract == common_pb2.MOVE_CONTRACT_CONTINUOUS
    assert "bfloat16" in later.accepted.move_contract_reason


async def test_pinned_streams_end_with_a_hint(tokenizer_directory: Path) -> None:
    """Guided decoding is not moved after its first token: UNAVAILABLE, not safe to retry blindly."""
    worker = ScriptedWorker()
    worker.step_s = 0.01
    async with cluster(tokenizer_directory, worker) as router:
        request = text_request(max_tokens=500)
        request.sampling.structured_output.regex = "a+"
        collected = Collected()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for response in router.inference.Generate(request):
                collected.add(response)
                if len(collected.token_ids) == 5:
                    worker.drop_stream()
        assert status_of(caught.value) == (grpc.StatusCode.UNAVAILABLE, "PINNED", "false")
        assert collected.accepted.move_contract == common_pb2.MOVE_CONTRACT_PINNED
        assert not collected.accepted.resume_cursor


async def test_without_moves_started_streams_end(tokenizer_directory: Path) -> None:
    """`move-running: false` ends started streams, while those without a token are still served."""
    worker = ScriptedWorker()
    worker.step_s = 0.01
    async with cluster(tokenizer_directory, worker, move_running=False) as router:
        started = asyncio.create_task(router.collect(text_request(max_tokens=500)))
        await until_tokens(router, 3)
        worker.hold = True
        waiting = asyncio.create_task(router.collect(text_request(max_tokens=10)))
        await until(lambda: len(worker.submitted) == 2)
        worker.drop_stream()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await started
        assert status_of(caught.value) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST", "false")
        worker.hold = False
        assert (await waiting).token_ids == EXPECTED[:10]


async def test_no_worker_is_said_in_time(tokenizer_directory: Path) -> None:
    """Without any worker a request waits a little, then is refused as safe to retry."""
    async with local_router(tokenizer_directory, [], no_worker_wait_s=0.2) as router:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.collect(text_request())
        assert status_of(caught.value) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER", "true")
        assert not router.router.dispatcher.live


async def test_a_worker_that_refuses_is_avoided(tokenizer_directory: Path) -> None:
    """A full or failing worker's requests go to another; the circuit of a failing one opens."""
    bad, good = ScriptedWorker("a"), ScriptedWorker("b")
    bad.refuse = (13, "internal error", "INTERNAL")
    keys = {"placement": "round_robin", "breaker_failures": 2, "breaker_open_s": 30.0}
    async with cluster(tokenizer_directory, bad, good, **keys) as router:
        for _ in range(8):
            assert (await router.collect(text_request(max_tokens=5))).token_ids == EXPECTED[:5]
        status = await router.cluster.GetStatus(cluster_pb2.GetStatusRequest())
    assert len(bad.submitted) == 2
    health = {worker.worker_id: worker.health for worker in status.workers}
    assert health == {"a": cluster_pb2.WORKER_HEALTH_TRIPPED, "b": cluster_pb2.WORKER_HEALTH_READY}


@pytest.mark.parametrize("drops", [False, True])
async def test_a_trial_that_fails_opens_the_circuit_for_longer(tokenizer_directory: Path, drops: bool) -> None:
    """Whether it refuses or dies: one request is tried, then none for twice the pause."""
    bad, good = ScriptedWorker("a"), ScriptedWorker("b")
    bad.refuse = None if drops else (13, "internal error", "INTERNAL")
    bad.drop_on_submit = drops
    keys = {"placement": "round_robin", "breaker_failures": 1, "breaker_open_s": 0.2}
    async with cluster(tokenizer_directory, bad, good, **keys) as router:
        until_s = asyncio.get_running_loop().time() + 1.3
        while asyncio.get_running_loop().time() < until_s:
            assert (await router.collect(text_request(max_tokens=2))).token_ids == EXPECTED[:2]
    assert 2 <= len(bad.submitted) <= 4


async def test_a_workers_verdict_on_input_is_final(tokenizer_directory: Path) -> None:
    """INVALID_ARGUMENT from the engine reaches the client and is not tried elsewhere."""
    one, two = ScriptedWorker("a"), ScriptedWorker("b")
    one.refuse = two.refuse = (3, "sampling.x must be y", "INVALID_ARGUMENT")
    async with cluster(tokenizer_directory, one, two) as router:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.collect(text_request())
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == "sampling.x must be y"
        status = await router.cluster.GetStatus(cluster_pb2.GetStatusRequest())
        assert not status.attainment, "it says nothing of what was promised"
    assert len(one.submitted) + len(two.submitted) == 1


async def test_a_parked_request_is_served_when_the_circuit_lets_one_through(tokenizer_directory: Path) -> None:
    """Nobody comes up and nothing else happens: it is placed as soon as the only worker may be tried again."""
    worker = ScriptedWorker()
    worker.refuse = (13, "internal error", "INTERNAL")
    keys = {"breaker_failures": 1, "breaker_open_s": 0.3, "no_worker_wait_s": 10.0}
    async with cluster(tokenizer_directory, worker, **keys) as router:
        tasks = [asyncio.create_task(router.collect(text_request(max_tokens=8))) for _ in range(3)]
        await until(lambda: router.router.pool.links()[0].breaker.tripped)
        worker.refuse = None
        assert [one.token_ids for one in await asyncio.wait_for(asyncio.gather(*tasks), 5)] == [EXPECTED[:8]] * 3


async def test_trials_in_between_do_not_prolong_the_wait_for_a_worker(tokenizer_directory: Path) -> None:
    """Whoever is a trial and fails waits on, for as long as it had left."""
    worker = ScriptedWorker()
    worker.refuse = (13, "internal error", "INTERNAL")
    keys = {"breaker_failures": 1, "breaker_open_s": 0.3, "no_worker_wait_s": 0.7, "max_moves": 50}
    async with cluster(tokenizer_directory, worker, **keys) as router:
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(router.collect(text_request()), 10)
        assert status_of(caught.value) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER", "true")
        assert asyncio.get_running_loop().time() - began_s < 1.3
    assert len(worker.submitted) == 2


async def test_time_limits_hold(tokenizer_directory: Path) -> None:
    """timeout_ms and the call's deadline end a request, which is aborted at the worker."""
    worker = ScriptedWorker()
    worker.hold = True
    async with cluster(tokenizer_directory, worker) as router:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.collect(text_request(timeout_ms=100))
        assert status_of(caught.value) == (grpc.StatusCode.DEADLINE_EXCEEDED, "TIMEOUT", "true")
        await until(lambda: len(worker.cancelled) == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.collect(text_request(), timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: len(worker.cancelled) == 2)


async def test_a_drained_worker_hands_its_waiting_requests_over(tokenizer_directory: Path) -> None:
    """DrainWorker withdraws what has not started and places it elsewhere."""
    one, two = ScriptedWorker("a"), ScriptedWorker("b")
    one.hold = two.hold = True
    async with cluster(tokenizer_directory, one, two) as router:
        task = asyncio.create_task(router.collect(text_request(max_tokens=8)))
        await until(lambda: bool(one.submitted or two.submitted))
        source, target = (one, two) if one.submitted else (two, one)
        target.hold = False
        await router.cluster.DrainWorker(cluster_pb2.DrainWorkerRequest(worker_id=source.welcome.worker_id))
        assert (await task).token_ids == EXPECTED[:8]
        assert source.withdrawn
        status = await router.cluster.GetStatus(cluster_pb2.GetStatusRequest())
    health = {worker.worker_id: worker.health for worker in status.workers}
    assert health[source.welcome.worker_id] == cluster_pb2.WORKER_HEALTH_DRAINING


async def test_requests_at_risk_are_offloaded(tokenizer_directory: Path) -> None:
    """A request that its LP worker would miss is withdrawn, submitted to HP, and explained."""
    low = ScriptedWorker("low", role=Role.LOW, policy=worker_pb2.SchedulingPolicy(value_function="fcfs"))
    high = ScriptedWorker("high", role=Role.HIGH)
    low.hold = True
    async with cluster(tokenizer_directory, low, high, tickets=False, hp_fill=0.0) as router:
        slow = [asyncio.create_task(router.collect(long_request())) for _ in range(6)]
        await until(lambda: len(low.submitted) == 6)
        request = text_request(max_tokens=5, request_id="saved")
        request.slo.ttft_ms = 600
        done = await router.collect(request)
        explained = await router.cluster.Explain(cluster_pb2.ExplainRequest(request_id="saved"))
        low.hold = False
        await asyncio.gather(*slow)
    assert done.token_ids == EXPECTED[:5]
    assert done.finished.receipt.pool == common_pb2.ROLE_HIGH_PRIORITY
    assert [decision.kind for decision in explained.decisions] == ["place", "offload"]
    assert [submit.request_id for submit in high.submitted] == ["saved"]
    assert low.withdrawn == [low.submitted[6].handle]


def long_request() -> inference_pb2.GenerateRequest:
    """Return a request with a long prompt and all the time in the world."""
    request = text_request("word " * 350, max_tokens=2)
    request.slo.ttft_ms = 600_000
    return request


async def drawn_from_a_backlog(
    directory: Path, low: ScriptedWorker, high: ScriptedWorker
) -> cluster_pb2.GetStatusResponse:
    """Let HP draw from an LP that does not move, then have it move; everybody ends. Returns the router's status."""
    low.hold = True
    async with cluster(directory, low, high, offload=False, hp_fill=0.0) as router:
        text = "word " * 300
        tasks = [asyncio.create_task(router.collect(text_request(text, max_tokens=5))) for _ in range(12)]
        await until(lambda: len(high.submitted) >= 2)
        low.hold = False
        for done in await asyncio.gather(*tasks):
            assert done.token_ids == EXPECTED[:5]
        return await router.cluster.GetStatus(cluster_pb2.GetStatusRequest())


async def test_idle_hp_takes_work_on_tickets(tokenizer_directory: Path) -> None:
    """With a backlog on LP and nothing urgent, HP draws waiting requests."""
    low, high = ScriptedWorker("low", role=Role.LOW), ScriptedWorker("high", role=Role.HIGH)
    status = await drawn_from_a_backlog(tokenizer_directory, low, high)
    assert status.counters["tickets"] == len(high.submitted)
    assert status.counters["offloads"] == 0


async def test_requests_that_fail_while_they_are_asked_back_move(tokenizer_directory: Path) -> None:
    """Their HP expects them when their worker's engine dies: they are submitted there once, and nobody is lost."""
    low, high = ScriptedWorker("low", role=Role.LOW), ScriptedWorker("high", role=Role.HIGH)
    low.fails_withdrawals = True
    status = await drawn_from_a_backlog(tokenizer_directory, low, high)
    assert status.counters["moves"] >= 2
    assert low.streams == 1  # its stream did not break over it


async def test_refusal_when_nobody_can_make_it(tokenizer_directory: Path) -> None:
    """REFUSE gets RESOURCE_EXHAUSTED with the reason and a delay; the default is served all the same."""
    worker = ScriptedWorker()
    worker.hold = True
    async with cluster(tokenizer_directory, worker) as router:
        backlog = [asyncio.create_task(router.collect(text_request("word " * 350, max_tokens=2))) for _ in range(20)]
        await until(lambda: len(worker.submitted) == 20)
        refused = text_request(on_overload=inference_pb2.OVERLOAD_ACTION_REFUSE)
        refused.slo.ttft_ms = 50
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.collect(refused)
        assert status_of(caught.value) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", "true")
        assert int(metadata_of(caught.value)["retry-after-ms"]) > 0
        refused.on_overload = inference_pb2.OVERLOAD_ACTION_RELEGATE
        served = asyncio.create_task(router.collect(refused))
        worker.hold = False
        await served
        await asyncio.gather(*backlog)


@pytest.mark.parametrize("relegated", [False, True])
async def test_a_refusal_was_asked_for_whoever_gives_up_first(tokenizer_directory: Path, relegated: bool) -> None:
    """It waits beyond its objective: it is refused, also where its engine gave it up before the router looked."""
    worker = ScriptedWorker()
    worker.hold = True
    async with cluster(tokenizer_directory, worker) as router:
        asked = text_request("word " * 100, on_overload=inference_pb2.OVERLOAD_ACTION_REFUSE)
        asked.slo.ttft_ms = 1000
        task = asyncio.create_task(router.collect(asked))
        await until(lambda: len(worker.submitted) == 1)
        if relegated:
            worker.send_step(relegated_handles=[worker.submitted[0].handle])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(task, 5)
        assert status_of(caught.value)[1] == "OVERLOADED"


async def test_unacknowledged_cancellations_are_noticed(tokenizer_directory: Path) -> None:
    """A worker that does not let go in time is held to account; others are unharmed."""
    worker = ScriptedWorker()
    worker.ignore_cancel = True
    async with cluster(tokenizer_directory, worker, cancel_timeout_s=0.2, breaker_failures=1) as router:
        call = router.inference.Generate(text_request(max_tokens=2000))
        await call.read()
        call.cancel()
        link = router.router.pool.links()[0]
        await until(lambda: link.breaker.tripped)


async def test_a_worker_of_another_model_is_not_used(tokenizer_directory: Path) -> None:
    """A worker that serves something else is shown as not usable and gets nothing."""
    worker = ScriptedWorker("other", model="another")
    await worker.start()
    async with local_router(tokenizer_directory, [worker.address], no_worker_wait_s=0.1) as router:
        await asyncio.wait_for(worker.attached.wait(), 10)
        with pytest.raises(grpc.aio.AioRpcError):
            await router.collect(text_request())
        status = await router.cluster.GetStatus(cluster_pb2.GetStatusRequest())
    assert "another" in status.workers[0].policy
    assert not worker.submitted
    await worker.stop()


async def test_registered_workers_are_found_and_forgotten(tokenizer_directory: Path) -> None:
    """A worker that announces itself is attached; one that stopped announcing and is gone is forgotten."""
    worker = ScriptedWorker()
    await worker.start()
    async with local_router(tokenizer_directory, []) as router:
        request = cluster_pb2.RegisterWorkerRequest(address=worker.address, worker_id="w1", ttl_ms=500)
        await router.cluster.RegisterWorker(request)
        await router.attached(1)
        assert (await router.collect(text_request(max_tokens=3))).token_ids == EXPECTED[:3]
        await worker.stop()
        await until(lambda: not router.router.pool.links())


async def test_roles_change_while_serving(tokenizer_directory: Path) -> None:
    """SetRole answers when the worker confirms."""
    worker = ScriptedWorker(role=Role.UNIFIED)
    async with cluster(tokenizer_directory, worker) as router:
        request = cluster_pb2.SetRoleRequest(worker_id="w1", role=common_pb2.ROLE_HIGH_PRIORITY)
        assert (await router.cluster.SetRole(request)).role == common_pb2.ROLE_HIGH_PRIORITY
        request.worker_id = "nobody"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.cluster.SetRole(request)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_elastic_roles_split_the_workers(tokenizer_directory: Path) -> None:
    """Under elastic roles unified workers become one HP and LPs, and the next is chosen when the HP goes."""
    workers = [ScriptedWorker(f"w{i}") for i in range(4)]
    async with cluster(tokenizer_directory, *workers, elastic_roles=True) as router:

        def roles() -> list[Role]:
            return sorted(link.instance.view.role for link in router.router.pool.links() if link.attached)

        await until(lambda: roles() == [Role.HIGH, Role.LOW, Role.LOW, Role.LOW])
        high = next(link for link in router.router.pool.links() if link.instance.view.role is Role.HIGH)
        await next(worker for worker in workers if worker.welcome.worker_id == high.worker_id).stop()
        await until(lambda: roles() == [Role.HIGH, Role.LOW, Role.LOW])
        assert (await router.collect(text_request(max_tokens=5))).token_ids == EXPECTED[:5]
