"""What the client offers beside streams, over a real socket."""

import asyncio
import contextlib
import os
import signal
import threading
import time

import pytest

import ascendra
from ascendra import AsyncClient, Client
from ascendra.v1 import cluster_pb2, common_pb2
from tests.support import scripted_router as scripted
from tests.support.scripted_router import Pause, ScriptedRouter, counting, tokens


async def test_requests_carry_the_deadline_and_the_metadata() -> None:
    """The time limit is the gRPC deadline as well; the client's metadata goes with every call."""
    metadata = {"authorization": "Bearer k"}
    async with scripted.serve(counting(1)) as router, AsyncClient(router.address, metadata=metadata) as client:
        await client.generate("x", timeout_s=20)
    assert router.metadata[0]["authorization"] == "Bearer k"
    assert 0 < router.time_remaining_s[0] <= 20.1  # gRPC rounds what it sends up


async def test_requests_go_to_the_routers_in_turn() -> None:
    """Several addresses share the load."""
    async with (
        scripted.serve(counting(1)) as first,
        scripted.serve(counting(1)) as second,
        AsyncClient([first.address, second.address]) as client,
    ):
        for _ in range(6):
            await client.generate("x")
    assert (len(first.requests), len(second.requests)) == (3, 3)


async def test_a_session_uses_one_stream_and_a_new_one_after_a_break() -> None:
    """All requests share a stream; when it has broken, the next request opens another."""
    async with (
        scripted.serve(counting(2)) as router,
        AsyncClient(router.address) as client,
        client.session() as session,
    ):
        await asyncio.gather(*(session.generate("x") for _ in range(5)))
        assert router.sessions == 1
        router.script = scripted.in_order(scripted.always(scripted.Break()), counting(2))
        assert (await session.generate("x")).token_ids == [0, 1]
        assert router.sessions == 2


async def test_a_closed_session_fails_its_requests() -> None:
    """Nothing waits for ever on a session that was closed."""
    async with scripted.serve(counting(1000, pause_s=0.01)) as router, AsyncClient(router.address) as client:
        session = client.session()
        waiting = asyncio.create_task(session.generate("x", request_id="r1"))
        await router.until(lambda router: bool(router.requests))
        await session.close()
        with pytest.raises(ascendra.UnavailableError, match="closed"):
            await waiting
        with pytest.raises(ascendra.UnavailableError, match="closed"):
            await session.generate("x")
        await router.until_cancelled("r1")


@pytest.mark.parametrize("others", [0, 1])
async def test_many_requests_of_a_session_outlive_a_router_that_is_down(others: int) -> None:
    """However many wait to be sent, each goes on to a router that is up, or fails long before its time limit."""
    down = ScriptedRouter(counting(1))
    await down.start()
    await down.stop()
    async with scripted.serve(counting(2)) as up:
        addresses = [down.address, up.address][: 1 + others]
        async with AsyncClient(addresses) as client, client.session() as session, asyncio.timeout(60):
            requests = [session.generate("x", timeout_s=100) for _ in range(1500)]
            outcomes = await asyncio.gather(*requests, return_exceptions=True)
    if others:
        assert {outcome.text for outcome in outcomes if not isinstance(outcome, BaseException)} == {" 0 1"}
    expected = ascendra.Completion if others else ascendra.UnavailableError
    assert {type(outcome) for outcome in outcomes} == {expected}


@pytest.mark.parametrize("kind", ["stream", "session", "status", "watch"])
async def test_a_closed_client_ends_its_calls(kind: str) -> None:
    """Whatever is in flight fails at once and is cancelled on the server, and nothing works after it."""
    received = asyncio.Event()
    async with scripted.serve(counting(1000, pause_s=0.01)) as router:
        client = AsyncClient(router.address, retry=ascendra.RetryPolicy(initial_backoff_s=30, max_backoff_s=30))
        requests = client.session() if kind == "session" else client

        async def use() -> None:
            if kind == "status":
                router.status_pause_s = 60
                received.set()
                await client.status()
            elif kind == "watch":
                async for _ in client.watch_status(60):
                    received.set()
            else:
                async for chunk in requests.stream("x", request_id="r1"):
                    if chunk.token_ids:
                        received.set()

        async with asyncio.timeout(2):
            using = asyncio.create_task(use())
            await received.wait()
            await client.close()
            with pytest.raises(ascendra.UnavailableError, match="the client is closed"):
                await using
            if kind in ("stream", "session"):
                await router.until_cancelled("r1")
            for call in (requests.generate("x", request_id="r2"), client.status(), anext(client.watch_status())):
                with pytest.raises(ascendra.UnavailableError, match="the client is closed") as caught:
                    await call
                assert caught.value.request_id in ("r2", "")


@pytest.mark.parametrize("kind", ["stream", "session"])
async def test_a_closed_client_does_not_wait_to_repeat(kind: str) -> None:
    """What waits for its next attempt fails at once too, with the id of its request."""
    client = AsyncClient("127.0.0.1:1", retry=ascendra.RetryPolicy(initial_backoff_s=60, max_backoff_s=60))
    requests = client.session() if kind == "session" else client
    async with asyncio.timeout(5):
        waiting = asyncio.create_task(requests.generate("x", request_id="r1"))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        await client.close()
        with pytest.raises(ascendra.UnavailableError, match="the client is closed") as caught:
            await waiting
    assert caught.value.request_id == "r1"


async def test_a_closed_session_does_not_wait_to_repeat() -> None:
    """Only its own requests: one of the client's other session, and a caller's cancellation, are what they were."""
    retry = ascendra.RetryPolicy(initial_backoff_s=60, max_backoff_s=60)
    async with asyncio.timeout(5), AsyncClient("127.0.0.1:1", retry=retry) as client:
        sessions = [client.session(), client.session()]
        waiting = [asyncio.create_task(one.generate("x", request_id="r1")) for one in (*sessions, sessions[0])]
        await asyncio.sleep(0.5)
        waiting[2].cancel()
        await asyncio.sleep(0)
        await sessions[0].close()
        with pytest.raises(ascendra.UnavailableError, match="the session is closed") as caught:
            await waiting[0]
        assert caught.value.request_id == "r1"
        with pytest.raises(asyncio.CancelledError):
            await waiting[2]
        assert not waiting[1].done()
        await client.close()
        with pytest.raises(ascendra.UnavailableError, match="the client is closed"):
            await waiting[1]


async def test_a_cancellation_by_the_caller_stays_one_when_the_client_is_closed() -> None:
    """It is told from the one that closing makes."""
    async with scripted.serve(scripted.always(Pause(60))) as router:
        client = AsyncClient(router.address)
        waiting = asyncio.create_task(client.generate("x"))
        await router.until(lambda router: bool(router.requests))
        waiting.cancel()
        await client.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting


async def test_text_and_tokens() -> None:
    """tokenize takes text or messages; detokenize is its reverse; models are listed."""
    async with scripted.serve(counting(1)) as router, AsyncClient(router.address) as client:
        assert await client.tokenize("ab") == [97, 98]
        assert await client.tokenize(messages=[{"role": "user", "content": "b"}]) == [98]
        assert await client.detokenize([97, 98]) == "ab"
        assert [model.name for model in await client.models()] == ["tiny"]


async def test_the_cluster_can_be_read_and_changed() -> None:
    """Status once and again; roles and drains by worker id."""
    async with scripted.serve(counting(1)) as router, AsyncClient(router.address) as client:
        assert [worker.worker_id for worker in (await client.status()).workers] == ["w0", "w1"]
        seen = 0
        async with contextlib.aclosing(client.watch_status(0.1)) as statuses:
            async for status in statuses:
                assert status.router_id == "router-0"
                seen += 1
                if seen == 3:
                    break
        assert await client.set_role("w1", ascendra.Role.LOW) is ascendra.Role.LOW
        assert await client.set_role("w1", "high") is ascendra.Role.HIGH
        assert await client.drain("w0") == 3
        with pytest.raises(ascendra.NotFoundError, match="no worker 'w9'"):
            await client.drain("w9")
        with pytest.raises(ascendra.InvalidArgumentError, match="low, high, unified"):
            await client.set_role("w1", "fast")


async def test_explain_asks_every_router() -> None:
    """Only the router that served a request can explain it; the client finds it."""
    async with scripted.serve(counting(1)) as first, scripted.serve(counting(1)) as second:
        async with AsyncClient(second.address) as client:
            await client.generate("x", request_id="r1")
        async with AsyncClient([first.address, second.address]) as client:
            for _ in range(2):
                assert [decision.kind for decision in (await client.explain("r1")).decisions] == ["place", "offload"]
            with pytest.raises(ascendra.NotFoundError):
                await client.explain("r2")


async def test_control_calls_pass_over_a_router_that_is_down() -> None:
    """A status comes from any router that answers."""
    down = ScriptedRouter(counting(1))
    await down.start()
    await down.stop()
    async with scripted.serve(counting(1)) as router, AsyncClient([down.address, router.address]) as client:
        for _ in range(3):
            assert (await client.status()).router_id == "router-0"


async def test_the_request_carries_every_option() -> None:
    """Options arrive as given."""
    async with scripted.serve(counting(1)) as router, AsyncClient(router.address) as client:
        await client.generate(
            messages=[ascendra.Message("user", "hi")],
            sampling=ascendra.SamplingParams(temperature=0, max_tokens=5, stop=["\n"], logit_bias={3: -1.0}),
            slo=ascendra.Slo(ttft_ms=300),
            slo_class="chat",
            priority=-2,
            tenant="t",
            session_id="s",
            model="tiny",
            on_overload="refuse",
            sinks=["log"],
        )
    [request] = router.requests
    assert request.chat.messages[0].content == "hi"
    assert request.sampling.temperature == 0
    assert request.sampling.HasField("temperature")
    assert list(request.sampling.stop) == [b"\n"]
    assert dict(request.sampling.logit_bias) == {3: -1.0}
    assert request.slo == common_pb2.Slo(ttft_ms=300)
    assert (request.slo_class, request.priority, request.tenant) == ("chat", -2, "t")
    assert (request.session_id, request.model, list(request.sinks)) == ("s", "tiny", ["log"])


def test_the_blocking_client_does_the_same(router_in_a_thread: ScriptedRouter) -> None:
    """Generate, stream, leave a stream early, and read the cluster without an event loop."""
    with Client(router_in_a_thread.address) as client, Client(router_in_a_thread.address) as other:
        assert client.generate("x").text == " 0 1 2 3 4"
        assert "".join(chunk.text for chunk in client.stream("x")) == " 0 1 2 3 4"
        router_in_a_thread.script = counting(1000, pause_s=0.01)
        for chunk in client.stream("x", request_id="left"):
            if chunk.token_ids:
                break
        assert other.tokenize("a") == [97]
        assert other.detokenize([97]) == "a"
        assert isinstance(other.status(), cluster_pb2.GetStatusResponse)
        assert next(client.watch_status(0.1)).router_id == "router-0"
        with pytest.raises(ascendra.NotFoundError):
            client.explain("nothing")
    assert "left" in router_in_a_thread.cancelled


@pytest.mark.parametrize("others", [0, 1])
def test_a_blocking_client_may_be_closed_by_another_thread(router_in_a_thread: ScriptedRouter, others: int) -> None:
    """Threads that wait for it get an error, at once, whether or not another client goes on using the loop."""
    router_in_a_thread.script = scripted.always(tokens(0, 0), Pause(60))
    errors: list[BaseException] = []
    started = threading.Event()

    def generate() -> None:
        try:
            client.generate("x")
        except BaseException as error:
            errors.append(error)

    def stream() -> None:
        try:
            for _ in client.stream("x"):
                started.set()
        except BaseException as error:
            errors.append(error)

    with contextlib.ExitStack() as stack:
        for _ in range(others):
            stack.enter_context(Client(router_in_a_thread.address))
        client = Client(router_in_a_thread.address)
        threads = [threading.Thread(target=target, daemon=True) for target in (generate, stream)]
        for thread in threads:
            thread.start()
        assert started.wait(10)
        begun_s = time.monotonic()
        client.close()
        for thread in threads:
            thread.join(2)
        assert time.monotonic() - begun_s < 2
        assert [str(error) for error in errors] == ["the client is closed"] * 2
        with pytest.raises(ascendra.UnavailableError, match="the client is closed"):
            client.generate("x")
        with pytest.raises(ascendra.UnavailableError, match="the client is closed"):
            list(client.stream("x"))


def test_a_blocking_client_that_waits_to_repeat_is_closed_too() -> None:
    """The end of the loop ends what is in no call just then."""
    errors: list[BaseException] = []

    def generate() -> None:
        try:
            client.generate("x")
        except BaseException as error:
            errors.append(error)

    client = Client("127.0.0.1:1", retry=ascendra.RetryPolicy(initial_backoff_s=60, max_backoff_s=60))
    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    time.sleep(0.5)
    client.close()
    thread.join(2)
    assert [str(error) for error in errors] == ["the client is closed"]


def test_an_interrupt_of_the_blocking_client_cancels_on_the_server(
    router_in_a_thread: ScriptedRouter, python_handles_sigint: None
) -> None:
    """Ctrl-C while a chunk is awaited ends the stream on both sides, and the client goes on working."""
    router_in_a_thread.script = scripted.always(tokens(0, 0), Pause(60))
    with Client(router_in_a_thread.address) as client:
        with pytest.raises(KeyboardInterrupt):
            for chunk in client.stream("x", request_id="interrupted"):
                assert chunk.token_ids
                threading.Timer(0.2, os.kill, [os.getpid(), signal.SIGINT]).start()
        assert client.tokenize("a") == [97]
    assert "interrupted" in router_in_a_thread.cancelled
