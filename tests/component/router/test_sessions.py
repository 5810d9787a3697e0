"""Sessions: refusals, cancellations and slow readers of one handle harm no other."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from ascendra.v1 import common_pb2, inference_pb2
from tests.support.local_router import LocalRouter, local_router, text_request, until
from tests.support.scripted_worker import ScriptedWorker


class Client:
    """A session's client side."""

    def __init__(self, router: LocalRouter) -> None:
        self.outgoing: asyncio.Queue[inference_pb2.SessionRequest | None] = asyncio.Queue()
        self.call = router.inference.Session(self._requests())
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, inference_pb2.Finished] = {}
        self.errors: dict[int, inference_pb2.SessionError] = {}

    def start(self, handle: int, request: inference_pb2.GenerateRequest) -> None:
        """Start a request."""
        start = inference_pb2.SessionStart(handle=handle, request=request)
        self.outgoing.put_nowait(inference_pb2.SessionRequest(start=start))

    def cancel(self, handle: int) -> None:
        """Cancel one."""
        cancel = inference_pb2.SessionCancel(handle=handle)
        self.outgoing.put_nowait(inference_pb2.SessionRequest(cancel=cancel))

    async def read(self) -> None:
        """Take everything in until the session ends."""
        async for response in self.call:
            self.take(response)

    def take(self, response: inference_pb2.SessionResponse) -> None:
        """Take a message in; fails on a gap or a repetition."""
        columns, position = response.tokens, 0
        for handle, offset, count in zip(columns.handles, columns.token_offsets, columns.token_counts, strict=True):
            self._add(handle, offset, columns.token_ids[position : position + count])
            position += count
        for item in response.items:
            self._add(item.handle, item.response.token_offset, item.response.token_ids)
            if item.response.HasField("finished"):
                self.finished[item.handle] = item.response.finished
        for error in response.errors:
            self.errors[error.handle] = error

    def _add(self, handle: int, offset: int, token_ids: Sequence[int]) -> None:
        tokens = self.tokens.setdefault(handle, [])
        if token_ids:
            assert offset == len(tokens)
            tokens += token_ids

    async def _requests(self) -> AsyncIterator[inference_pb2.SessionRequest]:
        while (request := await self.outgoing.get()) is not None:
            yield request


@pytest.fixture
async def worker() -> AsyncIterator[ScriptedWorker]:
    """A started worker."""
    worker = ScriptedWorker()
    await worker.start()
    yield worker
    await worker.stop()


@pytest.fixture
async def router(worker: ScriptedWorker, tokenizer_directory: Path) -> AsyncIterator[LocalRouter]:
    """A router attached to it, with small limits."""
    keys = {"session_max_requests": 5, "max_unread_tokens": 200}
    async with local_router(tokenizer_directory, [worker.address], **keys) as router:
        await router.attached(1)
        yield router


async def test_errors_concern_one_handle(router: LocalRouter) -> None:
    """Bad input, a bad handle and one too many are refused with reason and code; the neighbour's stream is whole."""
    client = Client(router)
    client.start(1, text_request(max_tokens=60))
    bad = text_request()
    bad.sampling.top_p = 7
    client.start(2, bad)
    client.start(0, text_request())
    for handle in range(3, 9):
        client.start(handle, text_request(max_tokens=30))
    client.outgoing.put_nowait(None)
    await client.read()
    assert client.tokens[1] == [66 + i % 26 for i in range(60)]
    assert client.errors[2].code == 3
    assert "top_p" in client.errors[2].message
    assert client.errors[0].reason == "BAD_HANDLE"
    refused = [error for error in client.errors.values() if error.reason == "SESSION_LIMIT"]
    assert refused
    assert all(error.code == 8 and error.retry_safe for error in refused)


async def test_cancelling_is_acknowledged(router: LocalRouter, worker: ScriptedWorker) -> None:
    """A cancelled handle ends with CANCELLED and is aborted at the worker; the other goes on."""
    worker.step_s = 0.01
    client = Client(router)
    client.start(1, text_request(max_tokens=1000))
    client.start(2, text_request(max_tokens=50))
    reader = asyncio.create_task(client.read())
    await until(lambda: len(client.tokens.get(1, [])) > 3)
    client.cancel(1)
    client.outgoing.put_nowait(None)
    await reader
    assert client.finished[1].reason == common_pb2.FINISH_REASON_CANCELLED
    assert client.tokens[2] == [66 + i % 26 for i in range(50)]
    assert len(worker.cancelled) == 1


async def test_a_broken_session_aborts_its_requests(router: LocalRouter, worker: ScriptedWorker) -> None:
    """When the client goes away, everything of it is aborted."""
    client = Client(router)
    for handle in range(1, 5):
        client.start(handle, text_request(max_tokens=2000))
    await until(lambda: len(worker.submitted) == 4)
    client.call.cancel()
    await until(lambda: len(worker.cancelled) == 4)
    assert not router.router.dispatcher.live


async def test_a_session_that_does_not_read_is_bounded(worker: ScriptedWorker, tokenizer_directory: Path) -> None:
    """Its requests are given up beyond the limit; a neighbour on another channel is not disturbed."""
    worker.step_s = 0.001
    async with local_router(tokenizer_directory, [worker.address], max_unread_tokens=200) as router:
        await router.attached(1)
        slow = Client(router)
        for handle in range(1, 31):
            slow.start(handle, text_request(max_tokens=2000))
        await until(lambda: len(worker.submitted) == 30)
        neighbour = await router.collect(text_request(max_tokens=100))
        assert neighbour.token_ids == [66 + i % 26 for i in range(100)]
        await until(lambda: len(worker.cancelled) >= 25, timeout_s=40)
        slow.outgoing.put_nowait(None)
        await slow.read()
    assert all(error.reason == "SLOW_READER" for error in slow.errors.values())
    assert len(slow.errors) >= 25
