"""The clients that are compared: straight on the worker, plain Generate, one Session, and SSE through a gateway.

Each keeps `streams` requests running and notes when each token reaches it. They are as lean as Python allows, so that
what they share (the machine) is left to what is measured.
"""

import array
import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field

from ascendra.v1 import common_pb2, inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from services.common.channels import open_channel

PROMPT_TOKENS = 16
FIRST_TOKEN_ID = 10


@dataclass
class Arrivals:
    """When each token of each stream reached the client."""

    run: str = "run"
    """Distinguishes this run's request ids."""
    times: list["array.array[float]"] = field(default_factory=list)
    """One array a stream: entry k is the monotonic arrival of token k, in seconds."""
    errors: list[str] = field(default_factory=list)

    def request_id(self, stream: int) -> str:
        """Return the id of a stream's request."""
        return f"{self.run}-{stream}"

    def started(self) -> int:
        """Return how many streams have their first token."""
        return sum(1 for times in self.times if times)


Client = Callable[[Sequence[str], int, int, bool, Arrivals], Coroutine[None, None, None]]
"""(addresses, streams, tokens a stream, tokens_only, where to note arrivals); runs until cancelled or all ended."""


def prompt_of(stream: int) -> list[int]:
    """Return a short prompt of its own for each stream."""
    return [FIRST_TOKEN_ID + (stream * 7 + i * 13) % 200 for i in range(PROMPT_TOKENS)]


def sampling_of(tokens: int) -> common_pb2.SamplingParameters:
    """Greedy, for exactly this many tokens."""
    return common_pb2.SamplingParameters(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def submit(handle: int, token_ids: Sequence[int], tokens: int) -> worker_pb2.Submit:
    """Return what a router would send for a fresh request."""
    ids = array.array("I", token_ids).tobytes()
    slo = common_pb2.Slo(ttft_ms=60_000, tbt_ms=1_000)
    return worker_pb2.Submit(
        handle=handle, request_id=f"bench-{handle}", attempt=1, token_ids=ids, sampling=sampling_of(tokens), slo=slo
    )


async def attach_messages(
    router_id: str, submits: Sequence[worker_pb2.Submit]
) -> AsyncIterator[worker_pb2.AttachRequest]:
    """Say hello, submit everything, then keep the stream open."""
    yield worker_pb2.AttachRequest(hello=worker_pb2.Hello(router_id=router_id, protocol_version=1))
    for item in submits:
        yield worker_pb2.AttachRequest(submit=item)
    await asyncio.Event().wait()


async def direct(addresses: Sequence[str], streams: int, tokens: int, tokens_only: bool, arrivals: Arrivals) -> None:
    """Be the router: one Attach stream a worker carries all requests."""
    arrivals.times = [array.array("d") for _ in range(streams)]

    async def one(index: int, address: str) -> None:
        mine = range(index, streams, len(addresses))
        submits = [submit(stream + 1, prompt_of(stream), tokens) for stream in mine]
        async with open_channel(address) as channel:
            call = worker_pb2_grpc.WorkerServiceStub(channel).Attach(attach_messages("bench-direct", submits))
            try:
                async for message in call:
                    note_step(message, arrivals)
            finally:
                call.cancel()

    async with asyncio.TaskGroup() as group:
        for index, address in enumerate(addresses):
            group.create_task(one(index, address))


def note_step(message: worker_pb2.AttachResponse, arrivals: Arrivals) -> None:
    """Note the tokens of one message of a worker."""
    now_s = time.monotonic()
    kind = message.WhichOneof("message")
    if kind == "failed":
        arrivals.errors.append(message.failed.message)
    elif kind == "step":
        for handle, count in zip(message.step.handles, message.step.token_counts, strict=True):
            times = arrivals.times[handle - 1]
            for _ in range(count):
                times.append(now_s)


def generate_request(request_id: str, stream: int, tokens: int, tokens_only: bool) -> inference_pb2.GenerateRequest:
    """Return the request of one stream."""
    return inference_pb2.GenerateRequest(
        request_id=request_id,
        tokens=inference_pb2.TokenPrompt(token_ids=array.array("I", prompt_of(stream)).tobytes()),
        sampling=sampling_of(tokens),
        slo=common_pb2.Slo(ttft_ms=60_000, tbt_ms=1_000),
        tokens_only=tokens_only,
    )


async def generate(addresses: Sequence[str], streams: int, tokens: int, tokens_only: bool, arrivals: Arrivals) -> None:
    """One Generate call a stream, spread over the routers."""
    arrivals.times = [array.array("d") for _ in range(streams)]
    channels = [open_channel(address) for address in addresses]
    stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in channels]

    async def one(stream: int) -> None:
        times = arrivals.times[stream]
        call = stubs[stream % len(stubs)].Generate(
            generate_request(arrivals.request_id(stream), stream, tokens, tokens_only)
        )
        try:
            async for message in call:
                now_s = time.monotonic()
                for _ in message.token_ids:
                    times.append(now_s)
        except Exception as error:
            arrivals.errors.append(str(error))
            raise
        finally:
            call.cancel()

    try:
        async with asyncio.TaskGroup() as group:
            for stream in range(streams):
                group.create_task(one(stream))
    finally:
        for channel in channels:
            await channel.close(None)


async def session(addresses: Sequence[str], streams: int, tokens: int, tokens_only: bool, arrivals: Arrivals) -> None:
    """One Session a router carries all its streams."""
    arrivals.times = [array.array("d") for _ in range(streams)]

    async def one(index: int, address: str) -> None:
        async def messages() -> AsyncIterator[inference_pb2.SessionRequest]:
            for stream in range(index, streams, len(addresses)):
                request = generate_request(arrivals.request_id(stream), stream, tokens, tokens_only)
                start = inference_pb2.SessionStart(handle=stream + 1, request=request)
                yield inference_pb2.SessionRequest(start=start)
            await asyncio.Event().wait()

        async with open_channel(address) as channel:
            call = inference_pb2_grpc.InferenceServiceStub(channel).Session(messages())
            try:
                async for message in call:
                    note_session(message, arrivals)
            finally:
                call.cancel()

    async with asyncio.TaskGroup() as group:
        for index, address in enumerate(addresses):
            group.create_task(one(index, address))


def note_session(message: inference_pb2.SessionResponse, arrivals: Arrivals) -> None:
    """Note the tokens of one message of a session."""
    now_s = time.monotonic()
    columns = message.tokens
    for handle, count in zip(columns.handles, columns.token_counts, strict=True):
        times = arrivals.times[handle - 1]
        for _ in range(count):
            times.append(now_s)
    for item in message.items:
        for _ in item.response.token_ids:
            arrivals.times[item.handle - 1].append(now_s)
    arrivals.errors.extend(error.message for error in message.errors)


async def sse(addresses: Sequence[str], streams: int, tokens: int, tokens_only: bool, arrivals: Arrivals) -> None:
    """One HTTP connection a stream, spread over the gateways; its text is always made."""
    arrivals.times = [array.array("d") for _ in range(streams)]

    async def one(stream: int) -> None:
        times = arrivals.times[stream]
        async with http_connection(addresses[stream % len(addresses)]) as (reader, writer):
            writer.write(completion_request(arrivals.request_id(stream), prompt_of(stream), tokens))
            while line := await reader.readline():
                if line.startswith(b"data: {"):
                    times.append(time.monotonic())
                    # Not text that is this word.
                    if line.startswith(b'data: {"error"') or b'"finish_reason":"error"' in line:
                        arrivals.errors.append(line.decode())
                elif line.startswith(b"HTTP/1.1 ") and not line.startswith(b"HTTP/1.1 200 "):
                    arrivals.errors.append(line.decode())

    async with asyncio.TaskGroup() as group:
        for stream in range(streams):
            group.create_task(one(stream))


@contextlib.asynccontextmanager
async def http_connection(address: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection; it is reset at the end, as by a client that is killed."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def completion_request(request_id: str, prompt: Sequence[int], tokens: int) -> bytes:
    """Return an HTTP request for a streamed completion of exactly so many tokens, with its usage."""
    body = {
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    content = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-type: application/json\r\n"
        f"x-slo-ttft-ms: 60000\r\nx-slo-tpot-ms: 5000\r\nx-request-id: {request_id}\r\n"
        f"content-length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


CLIENTS: dict[str, Client] = {"direct": direct, "generate": generate, "session": session, "sse": sse}
