"""Streams through a router over real sockets, from a worker that follows a script."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from ascendra.v1 import cluster_pb2, common_pb2, inference_pb2, worker_pb2
from tests.support.local_router import Collected, LocalRouter, local_router, metadata_of, text_request, until
from tests.support.scripted_worker import ScriptedWorker


@pytest.fixture
async def worker() -> AsyncIterator[ScriptedWorker]:
    """A started worker."""
    worker = ScriptedWorker()
    await worker.start()
    yield worker
    await worker.stop()


@pytest.fixture
async def router(worker: ScriptedWorker, tokenizer_directory: Path) -> AsyncIterator[LocalRouter]:
    """A router attached to it."""
    async with local_router(tokenizer_directory, [worker.address]) as router:
        await router.attached(1)
        yield router


async def test_a_stream_arrives_whole(router: LocalRouter) -> None:
    """Every token arrives once and in order, with text, usage and a receipt."""
    done = await router.collect(text_request(max_tokens=50))
    assert done.token_ids == [66 + i % 26 for i in range(50)]
    assert done.text == router.router.codec.decode(done.token_ids)
    assert done.accepted.prompt_tokens > 0
    assert done.accepted.move_contract == common_pb2.MOVE_CONTRACT_EXACT
    finished = done.finished
    assert finished.reason == common_pb2.FINISH_REASON_LENGTH
    assert finished.usage.completion_tokens == 50
    assert [attempt.worker_id for attempt in finished.receipt.attempts] == ["w1"]
    assert finished.receipt.ttft_ms > 0


async def test_leaving_aborts_at_the_worker(router: LocalRouter, worker: ScriptedWorker) -> None:
    """A client that cancels has its request aborted at the worker at once, and acknowledged."""
    call = router.inference.Generate(text_request(max_tokens=2000))
    await call.read()
    call.cancel()
    await until(lambda: bool(worker.cancelled))
    await until(lambda: not router.router.dispatcher.live)


async def test_a_lost_worker_ends_nothing(router: LocalRouter, worker: ScriptedWorker) -> None:
    """A stream whose worker drops it goes on, without gap or repetition, when the worker is back."""
    worker.step_s = 0.01
    call = router.inference.Generate(text_request(max_tokens=40))
    token_ids: list[int] = []
    async for response in call:
        token_ids += response.token_ids
        if len(token_ids) == 10 and worker.streams == 1:
            worker.drop_stream()
    assert token_ids == [66 + i % 26 for i in range(40)]
    assert worker.streams == 2
    assert worker.submitted[-1].generated_tokens >= 10


async def test_a_session_carries_many(router: LocalRouter) -> None:
    """A session multiplexes requests; each handle's stream is whole."""
    requests = [
        inference_pb2.SessionRequest(start=inference_pb2.SessionStart(handle=h, request=text_request(max_tokens=h)))
        for h in range(1, 21)
    ]

    async def outgoing() -> AsyncIterator[inference_pb2.SessionRequest]:
        for request in requests:
            yield request
        await asyncio.sleep(0)

    tokens: dict[int, list[int]] = {h: [] for h in range(1, 21)}
    finished = {}
    async for response in router.inference.Session(outgoing()):
        columns, position = response.tokens, 0
        for handle, offset, count in zip(columns.handles, columns.token_offsets, columns.token_counts, strict=True):
            assert offset == len(tokens[handle])
            tokens[handle] += columns.token_ids[position : position + count]
            position += count
        for item in response.items:
            if item.response.token_ids:
                assert item.response.token_offset == len(tokens[item.handle])
            tokens[item.handle] += item.response.token_ids
            if item.response.HasField("finished"):
                finished[item.handle] = item.response.finished
    assert tokens == {h: [66 + i % 26 for i in range(h)] for h in range(1, 21)}
    assert all(finished[h].usage.completion_tokens == h for h in tokens)


async def test_a_refusal_names_the_field(router: LocalRouter) -> None:
    """Bad input is INVALID_ARGUMENT with the field in the message."""
    request = text_request()
    request.sampling.temperature = -1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await router.collect(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "temperature" in str(caught.value.details())


async def test_a_client_that_does_not_read_is_bounded(worker: ScriptedWorker, tokenizer_directory: Path) -> None:
    """Beyond the limit its request is given up and aborted; a neighbour's stream is whole meanwhile."""
    worker.step_s = 0.001
    worker.top_logprobs = 20  # long messages fill the transport's window soon
    async with local_router(tokenizer_directory, [worker.address], max_unread_tokens=50) as router:
        await router.attached(1)
        slow = router.inference.Generate(text_request(max_tokens=2000))
        await until(lambda: len(worker.submitted) == 1)
        neighbour = asyncio.create_task(router.collect(text_request(max_tokens=1000)))
        await until(lambda: len(worker.cancelled) == 1, timeout_s=40)
        assert (await neighbour).token_ids == [66 + i % 26 for i in range(1000)]
        collected = Collected()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for response in slow:
                collected.add(response)
    assert metadata_of(caught.value)["ascendra-reason"] == "SLOW_READER"
    assert 50 < len(collected.token_ids) < 2000


async def test_workers_of_a_dns_name_are_found(worker: ScriptedWorker, tokenizer_directory: Path) -> None:
    """Every address of the name is a worker."""
    port = worker.address.rpartition(":")[2]
    async with local_router(tokenizer_directory, [], worker_dns=f"localhost:{port}") as router:
        await router.attached(1)
        assert len((await router.collect(text_request(max_tokens=3))).token_ids) == 3


async def test_what_the_engine_relegates_is_reported(router: LocalRouter, worker: ScriptedWorker) -> None:
    """Relegation is the worker's order; the receipt and Explain tell of it."""
    worker.hold = True
    task = asyncio.create_task(router.collect(text_request(max_tokens=3, request_id="late")))
    await until(lambda: len(worker.submitted) == 1)
    worker.send_step(relegated_handles=[worker.submitted[0].handle])
    await until(lambda: router.router.dispatcher.live["late"].relegated)
    worker.hold = False
    assert (await task).finished.receipt.relegated
    explained = await router.cluster.Explain(cluster_pb2.ExplainRequest(request_id="late"))
    assert [decision.kind for decision in explained.decisions] == ["place", "relegate"]
    assert explained.state == "finished"
    assert explained.HasField("receipt")


async def test_a_request_may_appear_twice_in_one_message(router: LocalRouter, worker: ScriptedWorker) -> None:
    """A busy worker merges steps: an end belongs to a request's last tokens; what follows a stop string is void."""
    worker.hold = True
    decode = router.router.codec.decode
    stopping = text_request(max_tokens=10)
    stopping.sampling.stop.append(decode([67]).encode())
    tasks = []
    for request in (text_request(max_tokens=10), stopping):
        before = len(worker.submitted)
        tasks.append(asyncio.create_task(router.collect(request)))
        await until(lambda before=before: len(worker.submitted) > before)  # type: ignore[misc]
    handles = [submit.handle for submit in worker.submitted]
    reason = common_pb2.FINISH_REASON_STOP
    worker.send_step(
        handles=[*handles, *handles],
        token_counts=[2, 2, 1, 1],
        token_ids=[66, 67, 66, 67, 68, 68],
        ended=[worker_pb2.RequestEnded(handle=handle, reason=reason, stop_token_id=68) for handle in handles],
    )
    ended, stopped = await asyncio.gather(*tasks)
    assert (ended.token_ids, ended.text) == ([66, 67, 68], decode([66, 67]))
    assert (ended.finished.reason, ended.finished.stop_token_id) == (reason, 68)
    assert (stopped.token_ids, stopped.text) == ([66, 67], decode([66]))
    assert stopped.finished.stop_string == decode([67])
