"""A router in the test's own process and loop, served over a real socket."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc.aio

from ascendra import Tls
from ascendra.v1 import cluster_pb2_grpc, inference_pb2, inference_pb2_grpc
from services.common.channels import open_channel
from services.router.app import Router
from services.router.config import RouterConfig
from tests.support.scripted_worker import ScriptedWorker


class LocalRouter:
    """A started router and stubs that talk to it."""

    def __init__(
        self, router: Router, channel: grpc.aio.Channel, stop: asyncio.Event, task: "asyncio.Task[int]"
    ) -> None:
        self.router = router
        self.stop = stop
        self.task = task
        self.inference: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        self.cluster: cluster_pb2_grpc.ClusterServiceAsyncStub = cluster_pb2_grpc.ClusterServiceStub(channel)

    async def attached(self, count: int) -> None:
        """Wait until so many workers are attached."""
        await until(lambda: sum(link.attached for link in self.router.pool.links()) >= count)

    async def collect(self, request: inference_pb2.GenerateRequest, **call: Any) -> "Collected":
        """Run one request to its end."""
        collected = Collected()
        async for response in self.inference.Generate(request, **call):
            collected.add(response)
        return collected


class Collected:
    """What a stream delivered, with its offsets checked."""

    def __init__(self) -> None:
        self.messages = 0
        self.token_ids: list[int] = []
        self.text = ""
        self.accepted = inference_pb2.Accepted()
        self.finished = inference_pb2.Finished()

    def add(self, response: inference_pb2.GenerateResponse) -> None:
        """Take a message in; fails on a gap or a repetition."""
        self.messages += 1
        if response.HasField("accepted"):
            self.accepted = response.accepted
        if response.token_ids:
            assert response.token_offset == len(self.token_ids), "offsets are contiguous"
        self.token_ids += response.token_ids
        self.text += response.text
        if response.HasField("finished"):
            self.finished = response.finished


@contextlib.asynccontextmanager
async def local_router(model: Path, workers: Sequence[str], **keys: Any) -> AsyncIterator[LocalRouter]:
    """Run a router; keywords are fields of RouterConfig, and `client`: certificates for the stubs."""
    client: Tls | None = keys.pop("client", None)
    settings: dict[str, Any] = {
        "listen": "127.0.0.1:0",
        "metrics_listen": "",
        "model": str(model),
        "model_name": "tiny",
        "workers": tuple(workers),
        "settle_s": 0.0,
        "drain_timeout_s": 2.0,
        # Generous: a test that is not about detection must not see a busy machine taken for a dead worker.
        "silence_s": 3.0,
        "stall_s": 15.0,
    }
    config = RouterConfig(**(settings | keys))
    router, stop = Router(config), asyncio.Event()
    task = asyncio.create_task(router.run(stop))
    started = asyncio.create_task(router.started.wait())
    await asyncio.wait([started, task], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()
    channel = open_channel(router.address, client)
    try:
        yield LocalRouter(router, channel, stop, task)
    finally:
        await channel.close(None)
        stop.set()
        await task


@contextlib.asynccontextmanager
async def cluster(tokenizer: Path, *workers: ScriptedWorker, **keys: Any) -> AsyncIterator[LocalRouter]:
    """Start the workers and a router attached to all of them."""
    for worker in workers:
        await worker.start()
    try:
        async with local_router(tokenizer, [worker.address for worker in workers], **keys) as router:
            await router.attached(len(workers))
            yield router
    finally:
        for worker in workers:
            await worker.stop()


def status_of(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str, str]:
    """Return code, reason and retry-safe of an error."""
    metadata = metadata_of(error)
    return error.code(), metadata["ascendra-reason"], metadata["ascendra-retry-safe"]


def metadata_of(error: grpc.aio.AioRpcError) -> dict[str, str]:
    """Return an error's trailing metadata."""
    trailing: Any = error.trailing_metadata()
    return {key: value for key, value in trailing or () if isinstance(value, str)}


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Wait for a condition; fails after timeout_s."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the condition is anything a test can see
            await asyncio.sleep(0.005)


def text_request(text: str = "hello", *, max_tokens: int = 20, **fields: Any) -> inference_pb2.GenerateRequest:
    """Return a greedy request."""
    request = inference_pb2.GenerateRequest(text=text, **fields)
    request.sampling.max_tokens = max_tokens
    request.sampling.temperature = 0
    return request
