"""Copies of streams for sinks: real sinks on real sockets beside a router and scripted workers."""

import asyncio
import contextlib
import os
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import grpc
import grpc.aio
import pytest
from prometheus_client import REGISTRY

from ascendra import FinishReason, SinkEnd, TokenSink, serve_sink
from ascendra.cli.tether import tethered
from ascendra.v1 import inference_pb2
from services.router.config import SinkConfig
from tests.support.local_router import Collected, LocalRouter, local_router, text_request, until
from tests.support.scripted_worker import ScriptedWorker

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "token_sink.py"
EXPECTED = [66 + i % 26 for i in range(2000)]


class Recorder(TokenSink):
    """Keeps what it receives; takes nothing while `open` is clear."""

    def __init__(self) -> None:
        self.token_ids: defaultdict[str, dict[int, int]] = defaultdict(dict)
        self.texts: defaultdict[str, str] = defaultdict(str)
        self.gaps: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        self.ends: dict[str, SinkEnd] = {}
        self.calls = 0
        self.open = asyncio.Event()
        self.open.set()

    async def on_tokens(self, request_id: str, offset: int, token_ids: Sequence[int], text: str) -> None:
        """Keep tokens by offset."""
        await self.open.wait()
        self.calls += 1
        self.token_ids[request_id].update(enumerate(token_ids, offset))
        self.texts[request_id] += text

    async def on_gap(self, request_id: str, first_offset: int, end_offset: int) -> None:
        """Keep a gap."""
        self.gaps[request_id].append((first_offset, end_offset))

    async def on_finished(self, request_id: str, text: str, end: SinkEnd) -> None:
        """Keep the end."""
        self.texts[request_id] += text
        self.ends[request_id] = end

    def tokens(self, request_id: str) -> list[int]:
        """Return a request's tokens; fails when an offset is missing."""
        found = self.token_ids[request_id]
        assert sorted(found) == list(range(len(found)))
        return [found[offset] for offset in sorted(found)]


@contextlib.asynccontextmanager
async def cluster(
    tokenizer: Path, workers: Sequence[ScriptedWorker], sinks: dict[str, SinkConfig]
) -> AsyncIterator[LocalRouter]:
    """Start the workers and a router with sinks."""
    for worker in workers:
        await worker.start()
    try:
        async with local_router(tokenizer, [worker.address for worker in workers], sinks=sinks) as router:
            await router.attached(len(workers))
            yield router
    finally:
        for worker in workers:
            await worker.stop()


def metric(name: str, sink: str) -> float:
    """Return a sink's metric."""
    value = REGISTRY.get_sample_value(f"ascendra_router_sink_{name}", {"sink": sink})
    assert value is not None
    return value


async def test_a_sink_hears_what_the_caller_hears(tokenizer_directory: Path) -> None:
    """Tokens, text and end reach every named sink once, through Generate and Session; others hear nothing."""
    speech, audit = Recorder(), Recorder()
    async with serve_sink(speech, "127.0.0.1:0") as one, serve_sink(audit, "127.0.0.1:0") as two:
        sinks = {"speech": SinkConfig(address=one), "audit": SinkConfig(address=two)}
        async with cluster(tokenizer_directory, [ScriptedWorker()], sinks) as router:
            plain = await router.collect(text_request(max_tokens=40, request_id="a", sinks=["speech", "audit"]))
            await router.collect(text_request(max_tokens=5, request_id="quiet"))
            call = router.inference.Session()  # type: ignore[call-arg]  # written through the call
            start = inference_pb2.SessionStart(
                handle=1, request=text_request(max_tokens=30, request_id="b", sinks=["audit", "audit"])
            )
            await call.write(inference_pb2.SessionRequest(start=start))
            await call.done_writing()
            async for _ in call:
                pass
            await until(lambda: "a" in speech.ends and set(audit.ends) == {"a", "b"})
            await until(lambda: metric("behind_tokens", "audit") == 0)
            assert metric("acknowledged_tokens_total", "audit") == 70
            assert metric("connected", "audit") == 1
    assert plain.token_ids == speech.tokens("a") == audit.tokens("a") == EXPECTED[:40]
    assert plain.text == speech.texts["a"] == audit.texts["a"]
    assert audit.tokens("b") == EXPECTED[:30]
    assert set(speech.token_ids) == {"a"}
    assert speech.ends["a"] == SinkEnd(FinishReason.LENGTH, 40)
    assert not audit.gaps


async def test_an_unknown_sink_is_refused(tokenizer_directory: Path) -> None:
    """Only configured names count: another name, or an address, is NOT_FOUND and names the field."""
    async with serve_sink(Recorder(), "127.0.0.1:0") as address:
        sinks = {"audit": SinkConfig(address=address)}
        async with cluster(tokenizer_directory, [ScriptedWorker()], sinks) as router:
            for name in ("nobody", address):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await router.collect(text_request(sinks=["audit", name]))
                assert caught.value.code() is grpc.StatusCode.NOT_FOUND
                assert "sinks" in (caught.value.details() or "")


async def test_a_stalled_sink_harms_nobody_and_learns_what_it_missed(tokenizer_directory: Path) -> None:
    """The caller gets everything while a sink takes nothing; its buffer is bounded, drops are counted, gaps told."""
    sink = Recorder()
    sink.open.clear()
    async with serve_sink(sink, "127.0.0.1:0") as address:
        sinks = {"slow": SinkConfig(address=address, max_buffered_tokens=200)}
        async with cluster(tokenizer_directory, [ScriptedWorker()], sinks) as router:
            await until(lambda: metric("connected", "slow") == 1)
            done = await asyncio.gather(
                *(router.collect(text_request(max_tokens=500, request_id=f"r{n}", sinks=["slow"])) for n in range(3))
            )
            assert [one.token_ids for one in done] == [EXPECTED[:500]] * 3
            assert 0 < metric("behind_tokens", "slow") <= 200
            dropped = metric("dropped_tokens_total", "slow")
            assert dropped >= 1500 - 200
            sink.open.set()
            await until(lambda: len(sink.ends) == 3)
            await until(lambda: metric("behind_tokens", "slow") == 0)
    missing = 0
    for request_id in sink.ends:
        offsets = set(sink.token_ids[request_id])
        for first, end in sink.gaps[request_id]:
            assert offsets.isdisjoint(range(first, end))
            offsets.update(range(first, end))
            missing += end - first
        assert offsets == set(range(500))
    assert missing == dropped


async def test_a_sink_that_dies_and_returns_misses_nothing(tokenizer_directory: Path) -> None:
    """What was not acknowledged is sent again: at least once, with the same offsets."""
    first, second = Recorder(), Recorder()
    worker = ScriptedWorker()
    worker.step_s = 0.005
    async with contextlib.AsyncExitStack() as stack:
        address = await stack.enter_async_context(serve_sink(first, "127.0.0.1:0"))
        sinks = {"audit": SinkConfig(address=address)}
        async with cluster(tokenizer_directory, [worker], sinks) as router:
            await until(lambda: metric("connected", "audit") == 1)
            stream = asyncio.create_task(router.collect(text_request(max_tokens=200, request_id="r", sinks=["audit"])))
            await until(lambda: len(first.token_ids["r"]) > 10)
            first.open.clear()  # what comes now is taken by nobody
            await until(lambda: metric("behind_tokens", "audit") > 10)
            await stack.aclose()
            await until(lambda: metric("connected", "audit") == 0)
            async with serve_sink(second, address):
                done = await stream
                await until(lambda: "r" in second.ends)
                await until(lambda: metric("behind_tokens", "audit") == 0)
            assert metric("sent_tokens_total", "audit") > metric("acknowledged_tokens_total", "audit") == 200
    together = first.token_ids["r"] | second.token_ids["r"]
    assert [together[offset] for offset in range(200)] == done.token_ids == EXPECTED[:200]
    assert not second.gaps


async def test_offsets_continue_across_a_move(tokenizer_directory: Path) -> None:
    """A request whose worker dies goes on elsewhere; its sink sees one stream without hole or repetition."""
    sink, workers = Recorder(), [ScriptedWorker("w1"), ScriptedWorker("w2")]
    for worker in workers:
        worker.step_s = 0.005
    async with serve_sink(sink, "127.0.0.1:0") as address:
        sinks = {"audit": SinkConfig(address=address)}
        async with cluster(tokenizer_directory, workers, sinks) as router:
            stream = asyncio.create_task(router.collect(text_request(max_tokens=100, request_id="r", sinks=["audit"])))
            await until(lambda: len(sink.token_ids["r"]) > 10)
            next(worker for worker in workers if worker.submitted).drop_stream()
            done = await stream
            await until(lambda: "r" in sink.ends)
    assert len(done.finished.receipt.attempts) == 2
    assert sink.tokens("r") == done.token_ids == EXPECTED[:100]
    assert sink.texts["r"] == done.text
    assert not sink.gaps


async def test_a_resumed_stream_is_mirrored_from_where_it_goes_on(tokenizer_directory: Path) -> None:
    """When a caller leaves, its sink hears of it; when the caller resumes, offsets begin where the caller stopped."""
    sink, worker = Recorder(), ScriptedWorker()
    worker.step_s = 0.005
    async with serve_sink(sink, "127.0.0.1:0") as address:
        sinks = {"audit": SinkConfig(address=address)}
        async with cluster(tokenizer_directory, [worker], sinks) as router:
            request = text_request(max_tokens=60, request_id="r", sinks=["audit"])
            call, received = router.inference.Generate(request), Collected()
            async for response in call:
                received.add(response)
                if len(received.token_ids) >= 10:
                    break
            call.cancel()
            await until(lambda: "r" in sink.ends)
            assert sink.ends["r"].reason is FinishReason.CANCELLED
            sink.ends.clear()
            request.resume.cursor = received.accepted.resume_cursor
            request.resume.token_ids = b"".join(token.to_bytes(4, "little") for token in received.token_ids)
            request.resume.text_bytes = len(received.text.encode())
            async for response in router.inference.Generate(request):
                received.add(response)
            await until(lambda: "r" in sink.ends)
    assert sink.ends["r"] == SinkEnd(FinishReason.LENGTH, 60)
    assert sink.tokens("r") == received.token_ids == EXPECTED[:60]


async def test_a_connection_without_acknowledgements_is_replaced(tokenizer_directory: Path) -> None:
    """A sink that hangs loses its connection after ack_timeout_s and gets the same again on the next one."""
    sink = Recorder()
    sink.open.clear()
    async with serve_sink(sink, "127.0.0.1:0") as address:
        sinks = {"audit": SinkConfig(address=address, ack_timeout_s=0.3)}
        async with cluster(tokenizer_directory, [ScriptedWorker()], sinks) as router:
            await router.collect(text_request(max_tokens=20, request_id="r", sinks=["audit"]))
            await until(lambda: metric("sent_tokens_total", "audit") >= 40)
            sink.open.set()
            await until(lambda: "r" in sink.ends)
            await until(lambda: metric("behind_tokens", "audit") == 0)
    assert sink.tokens("r") == EXPECTED[:20]


class Stumbling(Recorder):
    """Fails once, in the middle of a stream."""

    stumbled = False

    async def on_tokens(self, request_id: str, offset: int, token_ids: Sequence[int], text: str) -> None:
        """Fail at the first item above offset 0, then go on."""
        if offset > 0 and not self.stumbled:
            self.stumbled = True
            raise RuntimeError("stumbled")
        assert not set(range(offset, offset + len(token_ids))) & set(self.token_ids[request_id]), "taken twice"
        await super().on_tokens(request_id, offset, token_ids, text)


async def test_what_a_sink_failed_on_comes_again(tokenizer_directory: Path) -> None:
    """An exception of the sink costs a reconnect and nothing else; what it had taken before is not repeated to it."""
    sink = Stumbling()
    async with serve_sink(sink, "127.0.0.1:0") as address:
        sinks = {"audit": SinkConfig(address=address)}
        async with cluster(tokenizer_directory, [ScriptedWorker()], sinks) as router:
            done = await router.collect(text_request(max_tokens=150, request_id="r", sinks=["audit"]))
            await until(lambda: "r" in sink.ends)
    assert sink.stumbled
    assert sink.tokens("r") == done.token_ids == EXPECTED[:150]
    assert sink.texts["r"] == done.text


async def test_the_example_is_a_sink_and_its_death_harms_nobody(tokenizer_directory: Path) -> None:
    """The example prints a request's end; killed in the middle of another, it takes nothing from the caller."""
    environment = os.environ | {"ASCENDRA_SINK_LISTEN": "127.0.0.1:0", "PYTHONUNBUFFERED": "1"}
    process = await asyncio.create_subprocess_exec(
        *tethered([sys.executable, str(EXAMPLE)]),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(60):
            address = (await process.stdout.readline()).decode().split()[-1]
            worker = ScriptedWorker()
            async with cluster(tokenizer_directory, [worker], {"console": SinkConfig(address=address)}) as router:
                await router.collect(text_request(max_tokens=8, request_id="first", sinks=["console"]))
                while b"length" not in await process.stdout.readline():
                    pass
                worker.step_s = 0.005
                stream = asyncio.create_task(router.collect(text_request(max_tokens=150, sinks=["console"])))
                await process.stdout.readline()
                process.kill()
                assert (await stream).token_ids == EXPECTED[:150]
                await until(lambda: metric("connected", "console") == 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
