"""The Attach stream on real engines: errors that harm nobody else, withdrawals, cancellation, several routers."""

import asyncio
import json
import random
import time

import grpc
import pytest

from ascendra.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from services.common.channels import open_channel
from tests.support.attach_client import AttachClient
from tests.support.worker_process import WorkerFleet

pytestmark = pytest.mark.engine

_random = random.Random(7)


def prompt(tokens: int) -> list[int]:
    """Return random ids that are in the vocabulary of every worker."""
    return [_random.randrange(3, 500) for _ in range(tokens)]


def greedy(**fields: object) -> common_pb2.SamplingParameters:
    """Return greedy parameters with something added."""
    return common_pb2.SamplingParameters(temperature=0.0, ignore_eos=True, **fields)  # type: ignore[arg-type]


def sampled(**fields: object) -> common_pb2.SamplingParameters:
    """Return sampling parameters."""
    return common_pb2.SamplingParameters(**fields)  # type: ignore[arg-type]


async def test_welcome_describes_the_worker(fleet: WorkerFleet) -> None:
    """Welcome carries what a router needs: role, sizes, policies, step-time model."""
    async with AttachClient(fleet.address("cpu")) as client:
        welcome = client.welcome
    assert welcome.worker_id == "cpu"
    assert welcome.role == common_pb2.ROLE_LOW_PRIORITY
    assert (welcome.model, welcome.engine, welcome.max_model_len) == ("tiny", "cpu", 1024)
    assert (welcome.vocab_size, welcome.max_num_seqs, welcome.max_num_batched_tokens) == (512, 16, 256)
    assert welcome.kv_capacity_tokens > 1024
    assert welcome.policy.value_function == "edf"
    assert welcome.step_time_model.bins


async def test_bad_submissions_name_the_field_and_disturb_nobody(fleet: WorkerFleet) -> None:
    """Each bad request is refused with its field named, while a neighbour's tokens are as if it were alone."""
    good = prompt(50)
    cases: list[tuple[str, list[int], common_pb2.SamplingParameters]] = [
        ("token_ids", [5, 512], greedy()),
        ("token_ids", [4_000_000_000], greedy()),
        ("token_ids", [], greedy()),
        ("token_ids", prompt(1024), greedy()),
        ("sampling.temperature", good, sampled(temperature=-1.0)),
        ("sampling.temperature", good, sampled(temperature=float("nan"))),
        ("sampling.top_p", good, sampled(top_p=0.0)),
        ("sampling.top_k", good, sampled(top_k=-5)),
        ("sampling.min_p", good, sampled(min_p=2.0)),
        ("sampling.presence_penalty", good, greedy(presence_penalty=3.0)),
        ("sampling.repetition_penalty", good, greedy(repetition_penalty=0.0)),
        ("sampling.logprobs", good, greedy(logprobs=21)),
        ("sampling.min_tokens", good, greedy(min_tokens=17)),
        ("sampling.stop_token_ids", good, greedy(stop_token_ids=[512])),
        ("sampling.allowed_token_ids", good, greedy(allowed_token_ids=[4_000_000_000])),
        ("sampling.logit_bias", good, greedy(logit_bias={3: 101.0})),
        ("sampling.logit_bias", good, greedy(logit_bias={512: 1.0})),
        ("", good, greedy(structured_output=common_pb2.StructuredOutput(json_schema="{not json"))),
        ("", good, greedy(structured_output=common_pb2.StructuredOutput(regex="(unclosed"))),
        ("", good, greedy(structured_output=common_pb2.StructuredOutput(regex=r"\p{L}+"))),
    ]
    async with AttachClient(fleet.address("cpu")) as client:
        alone = await client.submit(good, max_tokens=60).finish()
        neighbour = client.submit(good, max_tokens=60)
        bad = [client.submit(ids, sampling=parameters) for _, ids, parameters in cases]
        bad.append(client.submit(good, max_tokens=5, generated=5))
        bad.append(client.submit(good, max_tokens=0))
        for stream in [*bad, neighbour]:
            await stream.finish()
        assert neighbour.token_ids == alone.token_ids
        for stream, field in zip(
            bad, [*(field for field, _, _ in cases), "sampling.max_tokens", "sampling.max_tokens"], strict=True
        ):
            assert stream.failed is not None, field
            assert stream.failed.code == grpc.StatusCode.INVALID_ARGUMENT.value[0], stream.failed
            assert field in stream.failed.message
            assert not stream.token_ids
        after = await client.submit(good, max_tokens=60).finish()
        assert after.token_ids == alone.token_ids


async def test_a_handle_in_use_is_refused(fleet: WorkerFleet) -> None:
    """A second request under a live handle fails; the first goes on."""
    async with AttachClient(fleet.address("emulated")) as client:
        stream = client.submit(prompt(10), max_tokens=20)
        await stream.first_token.wait()
        again = worker_pb2.Submit(handle=stream.handle, token_ids=b"\x05\x00\x00\x00")
        client.send(worker_pb2.AttachRequest(submit=again))
        await client.until(lambda: bool(client.of_kind("failed")))
        assert "handle" in client.of_kind("failed")[0].message
        await client.until(lambda: stream.ended is not None)
        assert len(stream.token_ids) == 20


async def test_withdraw_is_atomic(fleet: WorkerFleet) -> None:
    """What is withdrawn never started and gets nothing; what is kept runs to its end; nothing is both or neither."""
    async with AttachClient(fleet.address("emulated-slots")) as client:
        running = [client.submit(prompt(20), max_tokens=30) for _ in range(2)]
        for stream in running:
            await stream.first_token.wait()
        waiting = [client.submit(prompt(20), max_tokens=4) for _ in range(6)]
        answer = await client.withdraw(*running, *waiting[1:])
        assert set(answer.kept_handles) == {stream.handle for stream in running}
        assert set(answer.withdrawn_handles) == {stream.handle for stream in waiting[1:]}
        await asyncio.gather(*(stream.finish() for stream in [*running, waiting[0]]))
        assert [len(stream.token_ids) for stream in running] == [30, 30]
        assert len(waiting[0].token_ids) == 4
        assert not any(stream.token_ids or stream.started for stream in waiting[1:])


@pytest.mark.parametrize("worker", ["cpu", "cpu-async", "emulated-slots"])
async def test_withdraw_races_with_the_start(fleet: WorkerFleet, worker: str) -> None:
    """Withdrawals that race with scheduling split every batch into withdrawn without a token and kept with all."""
    async with AttachClient(fleet.address(worker)) as client:
        for size in range(1, 9):
            batch = [client.submit(prompt(30), max_tokens=3) for _ in range(size)]
            if size % 2:
                await asyncio.sleep(0.002 * size)
            answer = await client.withdraw(*batch)
            await asyncio.gather(*(stream.finish() for stream in batch))
            withdrawn = set(answer.withdrawn_handles)
            assert withdrawn | set(answer.kept_handles) == {stream.handle for stream in batch}
            for stream in batch:
                assert stream.withdrawn == (stream.handle in withdrawn)
                assert len(stream.token_ids) == (0 if stream.withdrawn else 3)


async def test_cancel_frees_the_slot_within_two_steps(fleet: WorkerFleet) -> None:
    """Cancelled is said when the engine has let go: the next step but one runs without the request."""
    async with AttachClient(fleet.address("emulated-slots")) as client:
        streams = [client.submit(prompt(20), max_tokens=2000) for _ in range(2)]
        for stream in streams:
            await stream.first_token.wait()
        successor = client.submit(prompt(20), max_tokens=2000)
        before = client.telemetry[-1].step
        client.cancel(streams[0])
        await streams[0].finish()
        count = len(streams[0].token_ids)
        await client.until(lambda: successor.started)
        assert (
            client.telemetry[-1].step <= before + 4
        )  # two steps until it is out, one to start the successor, one on its way
        await client.until(lambda: len(streams[1].token_ids) > 30)
        assert len(streams[0].token_ids) == count
        client.cancel(streams[1], successor)
        await successor.finish()


async def test_the_stock_scheduler_keeps_what_it_is_asked_back(fleet: WorkerFleet) -> None:
    """Without our scheduler nothing can be withdrawn atomically, so everything is kept; cancelling works."""
    async with AttachClient(fleet.address("emulated-priority")) as client:
        assert client.welcome.policy.value_function == "edf"
        running = [client.submit(prompt(20), max_tokens=3000) for _ in range(2)]
        waiting = client.submit(prompt(20), max_tokens=3)
        await running[0].first_token.wait()
        answer = await client.withdraw(waiting)
        assert list(answer.kept_handles) == [waiting.handle]
        client.cancel(*running)
        await waiting.finish()
        assert len(waiting.token_ids) == 3


async def test_ending_the_stream_aborts_its_requests(fleet: WorkerFleet) -> None:
    """When a router goes away its slots are free for others, whose own requests go on."""
    async with AttachClient(fleet.address("emulated-slots"), "stays") as staying:
        leaving = AttachClient(fleet.address("emulated-slots"), "leaves")
        async with leaving:
            gone = [leaving.submit(prompt(20), max_tokens=5000) for _ in range(2)]
            for stream in gone:
                await stream.first_token.wait()
            waiting = staying.submit(prompt(20), max_tokens=5)
            await staying.until(lambda: bool(staying.telemetry) and staying.telemetry[-1].waiting == 1)
        await waiting.finish()
        assert len(waiting.token_ids) == 5


async def test_routers_hear_of_their_own_requests_only(fleet: WorkerFleet) -> None:
    """Two routers may use the same handles; each gets its own tokens, and both get the telemetry of all steps."""
    async with (
        AttachClient(fleet.address("emulated"), "a") as first,
        AttachClient(fleet.address("emulated"), "b") as second,
    ):
        ids = prompt(100)
        mine = [first.submit(ids[:40], max_tokens=10), first.submit(ids[:41], max_tokens=10)]
        yours = [second.submit(ids[:50], max_tokens=10), second.submit(ids[:51], max_tokens=10)]
        await asyncio.gather(*(stream.finish() for stream in [*mine, *yours]))
        repeated = await first.submit(ids[:50], max_tokens=10).finish()
        assert [stream.handle for stream in mine] == [stream.handle for stream in yours]
        assert repeated.token_ids == yours[0].token_ids != mine[0].token_ids
        for client in (first, second):
            numbers = [step.sequence for step in client.steps]
            assert numbers == list(range(1, len(numbers) + 1))
            steps = [step.step for step in client.telemetry]
            assert steps == sorted(set(steps))


async def test_a_step_is_one_message(fleet: WorkerFleet) -> None:
    """The tokens of all requests of a step, and its telemetry, travel together."""
    async with AttachClient(fleet.address("emulated")) as client:
        streams = [client.submit(prompt(10), max_tokens=40) for _ in range(20)]
        await asyncio.gather(*(stream.finish() for stream in streams))
        with_tokens = [step for step in client.steps if step.handles]
        full = [step for step in with_tokens if len(step.handles) == 20]
        assert len(with_tokens) <= 1.5 * 42
        assert len(full) >= 25
        assert sum(bool(step.telemetry) for step in full) >= 0.7 * len(full)


async def test_ping_and_heartbeat(fleet: WorkerFleet) -> None:
    """Ping is answered by Pong, and an idle worker says that it is alive."""
    async with AttachClient(fleet.address("cpu")) as client:
        client.send(worker_pb2.AttachRequest(ping=worker_pb2.Ping(ping_id=77)))
        await client.until(lambda: bool(client.of_kind("pong")))
        assert client.of_kind("pong")[0].ping_id == 77
        await client.until(lambda: len(client.of_kind("heartbeat")) >= 2, timeout_s=10)


@pytest.mark.parametrize(
    "first",
    [
        worker_pb2.AttachRequest(ping=worker_pb2.Ping(ping_id=1)),
        worker_pb2.AttachRequest(hello=worker_pb2.Hello(router_id="r", protocol_version=9)),
    ],
    ids=["no-hello", "wrong-version"],
)
async def test_attach_needs_a_hello(fleet: WorkerFleet, first: worker_pb2.AttachRequest) -> None:
    """A stream that does not begin with a Hello of this protocol is refused."""
    channel = open_channel(fleet.address("cpu"))
    call = worker_pb2_grpc.WorkerServiceStub(channel).Attach(iter([first]))
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call.read()
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "hello" in str(refused.value.details())
    await channel.close(None)


async def test_a_constraint_that_takes_long_to_parse_holds_nobody_up(fleet: WorkerFleet) -> None:
    """Its request waits for it; the worker goes on answering, and a neighbour's tokens go on."""
    pattern = {"type": "string", "pattern": "^(a{1,99}){1,99}$"}
    schema = json.dumps({"type": "array", "prefixItems": [pattern] * 12})
    sampling = greedy(structured_output=common_pb2.StructuredOutput(json_schema=schema))
    async with AttachClient(fleet.address("cpu")) as client:
        slow = asyncio.create_task(client.submit(prompt(50), max_tokens=3, sampling=sampling).finish())
        longest_s, began_s, rounds = 0.0, time.monotonic(), 0
        while not slow.done():
            asked_s = time.monotonic()
            await client.submit(prompt(20), max_tokens=2).finish()
            longest_s, rounds = max(longest_s, time.monotonic() - asked_s), rounds + 1
        parsing_s = time.monotonic() - began_s
        assert (await slow).failed is None
    assert rounds > 5
    assert longest_s < parsing_s / 2, "it was answered only once the constraint was parsed"
