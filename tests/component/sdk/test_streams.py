"""Streams over a real socket; the same promises for a stream of one's own and for a session."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import pytest

import ascendra
from ascendra import AsyncClient, RetryPolicy, Session
from ascendra.v1 import inference_pb2
from services.common import errors
from tests.support import scripted_router as scripted
from tests.support.scripted_router import Break, EndWithoutFinish, Fail, Pause, ScriptedRouter, counting, tokens

Connect = Callable[..., contextlib.AbstractAsyncContextManager[AsyncClient | Session]]

QUICK_RETRY = RetryPolicy(initial_backoff_s=0.01, max_backoff_s=0.05)


@pytest.fixture(params=["stream", "session"])
def connect(request: pytest.FixtureRequest) -> Connect:
    """How to reach the routers: with a stream for each request, or with a session."""

    @contextlib.asynccontextmanager
    async def connect(*routers: ScriptedRouter | str) -> AsyncIterator[AsyncClient | Session]:
        addresses = [router if isinstance(router, str) else router.address for router in routers]
        async with AsyncClient(addresses, retry=QUICK_RETRY, timeout_s=30) as client:
            if request.param == "stream":
                yield client
                return
            async with client.session() as session:
                yield session

    return connect


async def test_generate_returns_the_whole_completion(connect: Connect) -> None:
    """Text, ids, usage and receipt of a completion arrive."""
    async with scripted.serve(counting(5)) as router, connect(router) as client:
        completion = await client.generate("hello", request_id="r1")
    assert completion.text == " 0 1 2 3 4"
    assert completion.token_ids == [0, 1, 2, 3, 4]
    assert completion.request_id == "r1"
    assert completion.finish_reason is ascendra.FinishReason.LENGTH
    assert completion.usage == ascendra.Usage(prompt_tokens=3, cached_prompt_tokens=0, completion_tokens=5)
    receipt = completion.receipt
    assert receipt.target == ascendra.Slo(ttft_ms=500, tbt_ms=50)
    assert receipt.pool is ascendra.Role.HIGH
    assert [attempt.worker_id for attempt in receipt.attempts] == ["w0", "w1"]
    assert not receipt.met
    assert router.requests[0].text == "hello"


async def test_stream_yields_contiguous_chunks_and_an_end(connect: Connect) -> None:
    """Chunks continue each other; only the last one is finished."""
    async with scripted.serve(counting(20, pause_s=0.001)) as router, connect(router) as client:
        chunks = [chunk async for chunk in client.stream("hello")]
    assert [token_id for chunk in chunks for token_id in chunk.token_ids] == list(range(20))
    position = 0
    for chunk in chunks:
        assert chunk.token_offset == position
        position += len(chunk.token_ids)
    assert [chunk.finished is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_many_requests_at_once(connect: Connect) -> None:
    """A hundred concurrent streams stay apart."""
    async with scripted.serve(counting(10, pause_s=0.001)) as router, connect(router) as client:
        completions = await asyncio.gather(*(client.generate("x", request_id=f"r{i}") for i in range(100)))
    assert {completion.text for completion in completions} == {" 0 1 2 3 4 5 6 7 8 9"}
    assert [completion.request_id for completion in completions] == [f"r{i}" for i in range(100)]


async def test_a_gap_in_the_offsets_is_an_error(connect: Connect) -> None:
    """A lost token is never passed over."""
    script = scripted.always(tokens(0, 1), tokens(2, 3), scripted.finished(3))
    async with scripted.serve(script) as router, connect(router) as client:
        with pytest.raises(ascendra.ProtocolError, match="lost: expected offset 1, received 2"):
            await client.generate("x")


async def test_a_repeated_token_is_an_error(connect: Connect) -> None:
    """A token that comes twice is never passed on."""
    script = scripted.always(tokens(0, 1, 2), tokens(1, 2), scripted.finished(2))
    async with scripted.serve(script) as router, connect(router) as client:
        with pytest.raises(ascendra.ProtocolError, match="twice: expected offset 2, received 1"):
            await client.generate("x")


async def test_an_error_keeps_its_type_and_attributes(connect: Connect) -> None:
    """The server's reason, retry advice and message reach the caller."""
    error = errors.ResourceExhausted("no worker can make 500 ms", reason="OBJECTIVE_OUT_OF_REACH", retry_after_ms=250)
    async with scripted.serve(scripted.always(Fail(error))) as router, connect(router) as client:
        with pytest.raises(ascendra.ResourceExhaustedError, match="no worker can make 500 ms") as caught:
            await client.generate("x", request_id="r1")
    assert caught.value.reason == "OBJECTIVE_OUT_OF_REACH"
    assert caught.value.retry_after_ms == 250
    assert caught.value.request_id == "r1"
    assert not caught.value.retry_safe
    assert len(router.requests) == 1


async def test_a_safe_failure_before_the_first_token_is_retried(connect: Connect) -> None:
    """The caller sees nothing of a failure that a repetition cures."""
    fail = scripted.always(Fail(errors.Unavailable("no capacity", retry_safe=True)))
    async with scripted.serve(scripted.in_order(fail, fail, counting(3))) as router, connect(router) as client:
        completion = await client.generate("x")
    assert completion.token_ids == [0, 1, 2]
    assert len(router.requests) == 3


async def test_an_unsafe_failure_is_not_retried(connect: Connect) -> None:
    """Without the server's word that it is safe, nothing is repeated."""
    fail = scripted.always(Fail(errors.Unavailable("worker lost")))
    async with scripted.serve(scripted.in_order(fail, counting(3))) as router, connect(router) as client:
        with pytest.raises(ascendra.UnavailableError, match="worker lost"):
            await client.generate("x")
    assert len(router.requests) == 1


async def test_retries_are_bounded(connect: Connect) -> None:
    """A failure that stays is reported after the policy's number of attempts."""
    fail = scripted.always(Fail(errors.Unavailable("no capacity", retry_safe=True)))
    async with scripted.serve(fail) as router, connect(router) as client:
        with pytest.raises(ascendra.UnavailableError, match="no capacity"):
            await client.generate("x")
    assert len(router.requests) == QUICK_RETRY.max_attempts


async def test_a_pinned_stream_is_not_retried_after_the_first_token(connect: Connect) -> None:
    """Without a cursor, a stream that broke after a token fails."""

    def script(request: inference_pb2.GenerateRequest) -> list[scripted.Step]:
        return [scripted.accepted(request, cursor=b""), tokens(0, 0), Pause(0.2), Break()]

    seen: list[int] = []
    async with scripted.serve(script) as router, connect(router) as client:
        with pytest.raises(ascendra.UnavailableError):
            async for chunk in client.stream("x"):
                seen.extend(chunk.token_ids)
    assert seen == [0]
    assert len(router.requests) == 1


async def test_a_broken_stream_is_resumed_through_another_router(connect: Connect) -> None:
    """After the first token the stream goes on where it broke, with nothing lost or repeated."""
    broken = scripted.always(tokens(0, 0), tokens(1, 1, text="é"), Pause(0.2), Break())
    async with (
        scripted.serve(broken) as first,
        scripted.serve(counting(4)) as second,
        connect(first, second) as client,
    ):
        completion = await client.generate("x", request_id="r1")
    assert completion.token_ids == [0, 1, 2, 3]
    assert completion.text == " 0é 2 3"
    [resumed] = second.requests
    assert resumed.request_id == "r1"
    assert resumed.text == "x"
    assert resumed.resume.cursor == scripted.CURSOR
    assert scripted.resumed_ids(resumed) == (0, 1)
    assert resumed.resume.text_bytes == 4


async def test_a_router_that_is_down_is_passed_over(connect: Connect) -> None:
    """With several addresses, one that refuses connections costs nothing but a moment."""
    async with scripted.serve(counting(2)) as router:
        down = ScriptedRouter(counting(1))
        await down.start()
        await down.stop()
        async with connect(down, router) as client:
            for _ in range(4):
                assert (await client.generate("x")).token_ids == [0, 1]


async def test_no_router_is_one_clear_error(connect: Connect) -> None:
    """The message says which address could not be reached."""
    down = ScriptedRouter(counting(1))
    await down.start()
    await down.stop()
    async with connect(down) as client:
        with pytest.raises(ascendra.UnavailableError, match=f"no connection to the router at {down.address}"):
            await client.generate("x")


async def test_leaving_the_loop_cancels_on_the_server(connect: Connect) -> None:
    """A break out of the loop is enough."""
    async with scripted.serve(counting(1000, pause_s=0.01)) as router, connect(router) as client:
        async for chunk in client.stream("x", request_id="r1"):
            if chunk.token_ids:
                break
        await router.until_cancelled("r1")


async def test_cancelling_the_task_cancels_on_the_server(connect: Connect) -> None:
    """A cancelled caller leaves nothing running."""
    async with scripted.serve(counting(1000, pause_s=0.01)) as router, connect(router) as client:
        task = asyncio.create_task(client.generate("x", request_id="r1"))
        await router.until(lambda router: bool(router.requests))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await router.until_cancelled("r1")


async def test_the_time_limit_ends_a_slow_stream(connect: Connect) -> None:
    """A limit that passes is a DeadlineExceededError, the request is cancelled, and the limit was sent."""
    async with scripted.serve(scripted.always(Pause(60))) as router, connect(router) as client:
        with pytest.raises(ascendra.DeadlineExceededError):
            await client.generate("x", request_id="r1", timeout_s=0.3)
        await router.until_cancelled("r1")
    assert 0 < router.requests[0].timeout_ms <= 300


async def test_retries_end_with_the_time_limit(connect: Connect) -> None:
    """A wait that the limit does not leave time for is not begun."""
    fail = scripted.always(Fail(errors.Unavailable("no capacity", retry_safe=True, retry_after_ms=60_000)))
    async with scripted.serve(fail) as router, connect(router) as client:
        async with asyncio.timeout(10):
            with pytest.raises(ascendra.UnavailableError, match="no capacity"):
                await client.generate("x", timeout_s=20)
    assert len(router.requests) == 1


async def test_an_end_without_finish_is_an_error() -> None:
    """A stream that just stops is not taken for a completion."""
    script = scripted.always(tokens(0, 1), EndWithoutFinish())
    async with scripted.serve(script) as router, AsyncClient(router.address) as client:
        with pytest.raises(ascendra.ProtocolError, match="without an end message"):
            await client.generate("x")


async def test_a_slow_reader_loses_nothing(connect: Connect) -> None:
    """What arrives while nobody reads is kept, in order."""
    async with scripted.serve(counting(500)) as router, connect(router) as client:
        seen: list[int] = []
        async for chunk in client.stream("x"):
            if not seen:
                await asyncio.sleep(0.3)
            seen.extend(chunk.token_ids)
    assert seen == list(range(500))
