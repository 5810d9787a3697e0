"""Slow, huge and too many connections: refused cleanly, while a neighbour's stream goes on."""

import asyncio
import contextlib
import resource
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx
import pytest

from ascendra.v1 import inference_pb2, inference_pb2_grpc
from services.common.access import Access
from services.common.channels import MAX_MESSAGE_BYTES, MAX_METADATA_BYTES, open_channel
from services.gateway.app import build_app
from services.gateway.config import GatewayConfig
from services.gateway.gateway import Gateway
from services.gateway.http_server import start_http_server
from tests.component.security.conftest import Fortress
from tests.support.gateway_process import GatewayProcess
from tests.support.local_router import text_request, until
from tests.support.router_process import RouterProcess
from tests.support.scripted_worker import ScriptedWorker

KEY = (("authorization", "Bearer a-key"),)
IDLE_CONNECTIONS = 10_000
ALLOWED_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0]


@contextlib.asynccontextmanager
async def gateway(**options: object) -> AsyncIterator[tuple[str, int]]:
    """Run a gateway without a router; yields host and port."""
    config = GatewayConfig(routers=("127.0.0.1:1",), **options)  # type: ignore[arg-type]
    running = Gateway(config, Access())
    server = await start_http_server("127.0.0.1:0", build_app(running), limits=config.http_limits())
    host, _, port = server.address.rpartition(":")
    try:
        yield host, int(port)
    finally:
        await server.stop()
        await running.close()


async def say(address: tuple[str, int], *parts: bytes, pause_s: float = 0.0) -> bytes:
    """Send parts, with pauses between, until the other side closes; return what it said."""
    reader, writer = await asyncio.open_connection(*address)
    heard = bytearray()

    async def listen() -> None:
        with contextlib.suppress(ConnectionError):
            while part := await reader.read(1 << 16):
                heard.extend(part)

    listening = asyncio.create_task(listen())
    try:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.wait([listening], timeout=pause_s)
                if listening.done():
                    break
        await asyncio.wait_for(listening, 30)
        return bytes(heard)
    finally:
        writer.close()


LIVE = b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


async def test_slow_clients_are_cut_off() -> None:
    """Heads and bodies that trickle, and connections that say nothing, end in time; the others are served."""
    async with gateway(head_timeout_s=1.5, body_timeout_s=1.5) as address:
        trickle = [LIVE[i : i + 1] for i in range(len(LIVE))]
        slow = [asyncio.create_task(say(address, *trickle, pause_s=0.1)) for _ in range(50)]
        silent = [asyncio.create_task(say(address)) for _ in range(50)]
        body = asyncio.create_task(say(address, POST + b"content-length: 99\r\n\r\n", *[b"{"] * 50, pause_s=0.1))
        blank = asyncio.create_task(say(address, LIVE + b"\r\n", *[b"\r\n"] * 50, pause_s=0.1))
        for _ in range(20):
            assert b" 200 " in await say(address, LIVE + b"\r\n")
        assert all(b" 408 " in answer for answer in await asyncio.gather(*slow))
        assert await asyncio.gather(*silent) == [b""] * 50
        assert b" 408 " in await body
        assert b" 200 " in await blank


async def test_a_slow_second_request_is_cut_off() -> None:
    """A connection that was used properly gets no more time for the next head than a new one."""
    async with gateway(head_timeout_s=1.5, keep_alive_s=60) as address:
        first = LIVE.replace(b"connection: close\r\n", b"") + b"\r\n"
        answer = await say(address, first, *[LIVE[i : i + 1] for i in range(30)], pause_s=0.1)
        assert answer.count(b"HTTP/1.1") == 2
        assert b" 200 " in answer
        assert b" 408 " in answer


@pytest.mark.parametrize("kind", ["one header", "many headers", "url", "trickled", "no end of line"])
async def test_huge_heads_are_refused(kind: str) -> None:
    """Whatever is too large about it, however it comes, the answer says so; the next connection is served."""
    big = b"x" * 40_000
    parts = {
        "one header": [LIVE + b"big: " + big + b"\r\n\r\n"],
        "many headers": [LIVE + b"".join(b"h%d: 1\r\n" % i for i in range(101)) + b"\r\n"],
        "url": [LIVE.replace(b"/live", b"/live?" + big) + b"\r\n"],
        "trickled": [LIVE, *[b"big: " + b"x" * 4000 + b"\r\n"] * 10],
        "no end of line": [LIVE + b"big: ", *[big] * 50],
    }[kind]
    async with gateway() as address:
        answer = await say(address, *parts)
        assert b" 431 " in answer or not answer  # what is cut off while sending may not be there to read it
        assert b" 431 " in answer or kind == "no end of line"
        assert b" 200 " in await say(address, LIVE + b"\r\n")


async def test_huge_bodies_are_refused() -> None:
    """By their declared length, and by what comes where none is declared."""
    async with gateway(max_body_bytes=1000) as address:
        assert b" 413 " in await say(address, POST + b"connection: close\r\ncontent-length: 1001\r\n\r\n")
        chunk = b"3e8\r\n" + b"x" * 1000 + b"\r\n"
        chunked = POST + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
        assert b" 413 " in await say(address, chunked + chunk, chunk)


async def test_connections_are_limited() -> None:
    """One more than allowed is told so; it may come again when another has left."""
    async with gateway(max_connections=20) as address:
        held = [await asyncio.open_connection(*address) for _ in range(20)]
        assert b" 503 " in await say(address, LIVE + b"\r\n")
        held[0][1].close()
        async with asyncio.timeout(20):
            while b" 200 " not in await say(address, LIVE + b"\r\n"):
                pass
        for _, writer in held:
            writer.close()


async def test_huge_calls_to_a_router_are_refused(fortress: Fortress) -> None:
    """Headers and messages beyond the limits, too many and too long names; the neighbour's stream goes on."""
    async with fortress.neighbour(), open_channel(fortress.address, fortress.certificates.client("client")) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)

        async def code(request: inference_pb2.GenerateRequest, *metadata: tuple[str, str]) -> grpc.StatusCode:
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                async for _ in stub.Generate(request, metadata=(*KEY, *metadata), timeout=30):
                    pass
            return raised.value.code()

        exhausted, wrong = grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT
        assert await code(text_request(), ("x-big", "x" * (MAX_METADATA_BYTES + 1))) is exhausted
        assert await code(text_request("x" * (MAX_MESSAGE_BYTES - 1000))) is exhausted
        tokens = inference_pb2.GenerateRequest()
        tokens.tokens.token_ids = bytes(MAX_MESSAGE_BYTES - 1000)
        assert await code(tokens) is wrong
        assert await code(text_request(tenant="x" * 129)) is grpc.StatusCode.PERMISSION_DENIED
        assert await code(text_request(session_id="x" * 129)) is wrong
        assert await code(text_request(traceparent="x" * 129)) is wrong
        assert await code(text_request(request_id="x" * 129)) is wrong
        assert await code(text_request(sinks=["x"] * 17)) is wrong


@pytest.mark.parametrize("target", ["gateway", "router"])
async def test_idle_connections_harm_nobody(target: str, tokenizer_directory: Path, tmp_path: Path) -> None:
    """10,000 connections that say nothing, to the gateway or to the router; a stream through both goes on."""
    worker = ScriptedWorker()
    worker.step_s = 0.02
    await worker.start()
    with (
        RouterProcess(tmp_path, model=tokenizer_directory, model_name="tiny", workers=[worker.address]) as router,
        GatewayProcess(tmp_path / "gateway.log", [router.address]) as gateway,
    ):
        await asyncio.wait_for(worker.attached.wait(), 30)
        received: list[str] = []
        stream = asyncio.create_task(read_stream(f"http://{gateway.address}", received))
        await until(lambda: len(received) > 3)
        host, _, port = {"gateway": gateway.address, "router": router.address}[target].rpartition(":")
        writers = await connect(host, int(port), min(IDLE_CONNECTIONS, ALLOWED_FILES - 500))
        before = len(received)
        await until(lambda: len(received) > before + 10)
        assert not stream.done()
        health = await asyncio.to_thread(httpx.get, f"http://{gateway.address}/health", verify=False)
        assert health.status_code == 200
        for writer in writers:
            writer.transport.abort()
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
    await worker.stop()


async def read_stream(url: str, received: list[str]) -> None:
    """Stream a completion that takes a while."""
    ask = {"prompt": "x", "max_tokens": 1900, "stream": True}
    async with (
        httpx.AsyncClient(base_url=url, timeout=60, verify=False) as http,
        http.stream("POST", "/v1/completions", json=ask) as answer,
    ):
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                received.append(line)


async def connect(host: str, port: int, count: int) -> list[asyncio.StreamWriter]:
    """Open connections and leave them alone."""
    writers: list[asyncio.StreamWriter] = []
    for start in range(0, count, 200):
        some = range(min(200, count - start))
        opened = await asyncio.gather(*(asyncio.open_connection(host, port) for _ in some))
        writers += [writer for _, writer in opened]
    return writers
