"""A router's end of `WorkerService.Attach`, for tests: submits, and collects what each request received."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, Self

import grpc.aio
import numpy as np

from ascendra.v1 import common_pb2, worker_pb2, worker_pb2_grpc
from services.common.channels import open_channel


def encode_ids(token_ids: list[int]) -> bytes:
    """Return ids as they travel."""
    return np.asarray(token_ids, dtype="<u4").tobytes()


@dataclass
class Stream:
    """What one request received."""

    handle: int
    submitted_s: float
    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    logprobs: list[common_pb2.PositionLogprobs] = field(default_factory=list)
    ended: worker_pb2.RequestEnded | None = None
    failed: worker_pb2.RequestFailed | None = None
    cancelled: bool = False
    withdrawn: bool = False
    started: bool = False
    relegated: bool = False
    done: asyncio.Event = field(default_factory=asyncio.Event)
    first_token: asyncio.Event = field(default_factory=asyncio.Event)

    async def finish(self, timeout_s: float = 60.0) -> Self:
        """Wait for the request's end."""
        async with asyncio.timeout(timeout_s):
            await self.done.wait()
        return self


class AttachClient:
    """One attached router."""

    def __init__(self, address: str, router_id: str = "router-test") -> None:
        self._channel = open_channel(address)
        self._router_id = router_id
        self._outgoing: asyncio.Queue[worker_pb2.AttachRequest | None] = asyncio.Queue()
        self._handles = itertools.count(1)
        self._reader: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()
        self._withdraw_ids = itertools.count(1)
        self.welcome = worker_pb2.Welcome()
        self.streams: dict[int, Stream] = {}
        self.steps: list[worker_pb2.StepOutput] = []
        self.telemetry: list[common_pb2.StepTelemetry] = []
        self.messages: list[worker_pb2.AttachResponse] = []
        self.status: grpc.StatusCode | None = None

    async def __aenter__(self) -> Self:
        stub = worker_pb2_grpc.WorkerServiceStub(self._channel)
        self._call = stub.Attach(self._requests(), wait_for_ready=True)
        hello = worker_pb2.Hello(router_id=self._router_id, protocol_version=1)
        self.send(worker_pb2.AttachRequest(hello=hello))
        self._reader = asyncio.create_task(self._read())
        await self.until(lambda: bool(self.welcome.worker_id))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the stream."""
        self._outgoing.put_nowait(None)
        self._call.cancel()
        if self._reader is not None:
            await asyncio.gather(self._reader, return_exceptions=True)
        await self._channel.close(None)

    def send(self, message: worker_pb2.AttachRequest) -> None:
        """Send a message."""
        self._outgoing.put_nowait(message)

    def submit(
        self,
        token_ids: list[int],
        *,
        max_tokens: int | None = 16,
        ttft_ms: float = 0.0,
        tbt_ms: float = 0.0,
        age_ms: float = 0.0,
        generated: int = 0,
        sampling: common_pb2.SamplingParameters | None = None,
        **fields: Any,
    ) -> Stream:
        """Submit a request, greedy and ignoring end-of-sequence unless told otherwise."""
        handle = next(self._handles)
        parameters = sampling or common_pb2.SamplingParameters(temperature=0.0, ignore_eos=True)
        if max_tokens is not None:
            parameters.max_tokens = max_tokens
        stream = self.streams[handle] = Stream(handle, time.monotonic())
        submit = worker_pb2.Submit(
            handle=handle,
            request_id=f"{self._router_id}-{handle}",
            attempt=1,
            token_ids=encode_ids(token_ids),
            generated_tokens=generated,
            sampling=parameters,
            slo=common_pb2.Slo(ttft_ms=ttft_ms, tbt_ms=tbt_ms),
            age_ms=age_ms,
            **fields,
        )
        self.send(worker_pb2.AttachRequest(submit=submit))
        return stream

    def cancel(self, *streams: Stream) -> None:
        """Cancel requests."""
        self.send(worker_pb2.AttachRequest(cancel=worker_pb2.Cancel(handles=[stream.handle for stream in streams])))

    async def withdraw(self, *streams: Stream, timeout_s: float = 30.0) -> worker_pb2.Withdrawn:
        """Take requests back and return the answer."""
        withdraw_id = next(self._withdraw_ids)
        handles = [stream.handle for stream in streams]
        self.send(worker_pb2.AttachRequest(withdraw=worker_pb2.Withdraw(withdraw_id=withdraw_id, handles=handles)))
        answers: list[worker_pb2.Withdrawn] = []

        def answered() -> bool:
            answers[:] = [
                message.withdrawn
                for message in self.messages
                if message.WhichOneof("message") == "withdrawn" and message.withdrawn.withdraw_id == withdraw_id
            ]
            return bool(answers)

        await self.until(answered, timeout_s)
        return answers[0]

    async def export_kv(self, stream: Stream, timeout_s: float = 30.0) -> worker_pb2.KvExported:
        """Take a running request out with its KV cache and return the answer."""
        export_id = next(self._withdraw_ids)
        self.send(worker_pb2.AttachRequest(export_kv=worker_pb2.ExportKv(export_id=export_id, handle=stream.handle)))
        answers: list[worker_pb2.KvExported] = []

        def answered() -> bool:
            answers[:] = [one for one in self.of_kind("kv_exported") if one.export_id == export_id]
            return bool(answers)

        await self.until(answered, timeout_s)
        return answers[0]

    def release_kv(self, *streams: Stream) -> None:
        """Say that nobody reads the KV of exported requests any more."""
        handles = [stream.handle for stream in streams]
        self.send(worker_pb2.AttachRequest(release_kv=worker_pb2.ReleaseKv(handles=handles)))

    async def kv_free(self, timeout_s: float = 30.0) -> None:
        """Wait until the worker says that no KV block is in use."""
        seen = len(self.messages)
        await self.until(lambda: any(beat.kv_usage == 0 for beat in self.since(seen, "heartbeat")), timeout_s)

    def since(self, seen: int, kind: str) -> list[Any]:
        """Return the messages of one kind after so many of all."""
        return [getattr(one, kind) for one in self.messages[seen:] if one.WhichOneof("message") == kind]

    async def until(self, condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Wait until something the worker says makes the condition true."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                if self._reader is not None and self._reader.done():
                    raise ConnectionError(f"the stream ended: {self.status}")
                self._changed.clear()
                await self._changed.wait()

    def of_kind(self, kind: str) -> list[Any]:
        """Return the messages of one kind, in order."""
        return [getattr(message, kind) for message in self.messages if message.WhichOneof("message") == kind]

    async def _requests(self) -> AsyncIterator[worker_pb2.AttachRequest]:
        while (message := await self._outgoing.get()) is not None:
            yield message

    async def _read(self) -> None:
        try:
            async for response in self._call:
                self.messages.append(response)
                self._take(response)
                self._changed.set()
        except grpc.aio.AioRpcError as error:
            self.status = error.code()
        finally:
            self._changed.set()

    def _take(self, response: worker_pb2.AttachResponse) -> None:
        match response.WhichOneof("message"):
            case "welcome":
                self.welcome = response.welcome
            case "step":
                self._take_step(response.step)
            case "failed":
                self._end(response.failed.handle, failed=response.failed)
            case "cancelled":
                for handle in response.cancelled.handles:
                    self._end(handle, cancelled=True)
            case "withdrawn":
                for handle in response.withdrawn.withdrawn_handles:
                    self._end(handle, withdrawn=True)

    def _take_step(self, step: worker_pb2.StepOutput) -> None:
        self.steps.append(step)
        self.telemetry.extend(step.telemetry)
        now_s, offset = time.monotonic(), 0
        for handle, count in zip(step.handles, step.token_counts, strict=True):
            stream = self.streams[handle]
            stream.token_ids.extend(step.token_ids[offset : offset + count])
            stream.times_s.extend([now_s] * count)
            stream.first_token.set()
            offset += count
        for entry in step.logprobs:
            self.streams[entry.handle].logprobs.extend(entry.positions)
        for handle in step.started_handles:
            self.streams[handle].started = True
        for handle in step.relegated_handles:
            self.streams[handle].relegated = True
        for ended in step.ended:
            self._end(ended.handle, ended=ended)

    def _end(self, handle: int, **how: Any) -> None:
        stream = self.streams[handle]
        for name, value in how.items():
            setattr(stream, name, value)
        stream.done.set()
