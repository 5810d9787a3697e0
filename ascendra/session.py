"""A session: all requests of one process on one gRPC stream, at a fraction of the cost of a stream for each.

A link is one such stream. When it breaks, its requests go on over a new link, to the next router: repeated where the
caller has seen nothing, resumed where it has.
"""

import asyncio
import contextlib
import copy
import itertools
from collections import deque
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Self, Unpack

import grpc
import grpc.aio

from ascendra import wire
from ascendra.attempts import check_contiguous, collect, run_request, time_limit_error
from ascendra.endpoints import Endpoints, closed_error
from ascendra.errors import (
    CLOSED,
    AscendraError,
    ProtocolError,
    UnavailableError,
    from_rpc_error,
    from_status,
    lost_connection,
)
from ascendra.retry import RetryPolicy
from ascendra.types import Chunk, Completion, RequestOptions
from ascendra.v1 import inference_pb2


class Session:
    """Carries many requests on one stream. Made by `AsyncClient.session`; used from that client's event loop."""

    def __init__(self, endpoints: Endpoints, *, timeout_s: float, retry: RetryPolicy) -> None:
        self._endpoints = endpoints
        self._timeout_s = timeout_s
        self._retry = retry
        self._link: _Link | None = None
        self._pauses: set[asyncio.Future[None]] = set()
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the stream; requests in flight fail and are cancelled on the server."""
        self._closed = True
        for pause in self._pauses:
            pause.cancel()
        if self._link is not None:
            await self._link.close()

    async def generate(self, prompt: str | None = None, **options: Unpack[RequestOptions]) -> Completion:
        """Return one completion; as `AsyncClient.generate`."""
        request = wire.build_request(prompt, options)
        async with contextlib.aclosing(self._run(request, options)) as chunks:
            return await collect(request.request_id, chunks)

    def stream(self, prompt: str | None = None, **options: Unpack[RequestOptions]) -> AsyncGenerator[Chunk]:
        """Yield a completion as it is generated; as `AsyncClient.stream`."""
        return self._run(wire.build_request(prompt, options), options)

    def _run(self, request: inference_pb2.GenerateRequest, options: RequestOptions) -> AsyncGenerator[Chunk]:
        return run_request(
            request,
            self._open_attempt,
            timeout_s=options.get("timeout_s", self._timeout_s),
            retry=self._retry,
            pause=self._pause,
            routers=len(self._endpoints),
        )

    async def _pause(self, wait_s: float, request_id: str) -> None:
        """Wait before a request is repeated. Raises UnavailableError when session or client is closed meanwhile."""
        pause = asyncio.ensure_future(self._endpoints.pause(wait_s, request_id))
        self._pauses.add(pause)
        try:
            await asyncio.wait([pause])
        finally:
            pause.cancel()
            self._pauses.discard(pause)
        if pause.cancelled():
            raise _session_closed(request_id)
        pause.result()

    async def _open_attempt(self, request: inference_pb2.GenerateRequest, timeout_s: float) -> "_Mailbox":
        if self._closed:
            raise _session_closed(request.request_id)
        if self._link is None or self._link.ended:
            self._link = _Link(self._endpoints)
        return self._link.start(request, timeout_s)


def _session_closed(request_id: str) -> UnavailableError:
    return UnavailableError("the session is closed", reason=CLOSED, request_id=request_id)


class _Mailbox:
    """An attempt on a link: holds what arrived and was not read yet.

    What a slow reader leaves is merged into one chunk, so the mailbox is bounded by the length of the completion.
    """

    __slots__ = ("_ended", "_error", "_link", "_loop", "_pending", "_timer", "_waiter", "handle",
                 "prompt_tokens", "request", "resume_cursor", "sent")  # fmt: skip

    def __init__(self, link: "_Link", handle: int, request: inference_pb2.GenerateRequest, timeout_s: float) -> None:
        self.handle = handle
        self.request = request
        self.sent = False
        self.resume_cursor = b""
        self.prompt_tokens = 0
        self._link = link
        self._pending: Chunk | None = None
        self._ended = False
        self._error: AscendraError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(max(timeout_s, 0), self._expire, timeout_s)

    async def read(self) -> Chunk | None:
        """Return what has arrived, or None after the last chunk. Raises AscendraError."""
        while self._pending is None:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            self._waiter = self._loop.create_future()
            await self._waiter
        chunk, self._pending = self._pending, None
        return chunk

    def put(self, chunk: Chunk) -> None:
        """Take the next chunk."""
        if self._ended:
            return
        pending = self._pending
        if pending is None:
            self._pending = chunk
        else:
            try:
                _merge(pending, chunk, self.request.request_id)
            except ProtocolError as error:
                self.fail(error)
                return
        self._ended = chunk.finished is not None
        self._wake()

    def put_response(self, response: inference_pb2.GenerateResponse) -> None:
        """Take a response that does not fit the columns."""
        if response.HasField("accepted"):
            self.resume_cursor = response.accepted.resume_cursor
            self.prompt_tokens = response.accepted.prompt_tokens
        if response.token_ids or response.text or response.HasField("finished"):
            self.put(wire.chunk_from_wire(response))

    def fail(self, error: AscendraError) -> None:
        """End with an error, after what has arrived."""
        if not self._ended:
            self._ended = True
            self._error = error
            self._wake()

    def cancel(self) -> None:
        """Leave the link, cancelling the request there unless it has ended."""
        self._timer.cancel()
        self._link.leave(self, ended=self._ended and not isinstance(self._error, ProtocolError))
        self._ended = True

    def _expire(self, timeout_s: float) -> None:
        if not self._ended:
            self._link.leave(self, ended=False)
            self.fail(time_limit_error(self.request.request_id, timeout_s))

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Link:
    """One stream to one router, read and written by a task each."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.ended = False
        endpoint = endpoints.pick()
        self._endpoints = endpoints
        self._address = endpoint.address
        self._call = endpoint.inference.Session(None, metadata=endpoints.metadata)
        endpoints.end_with_us(self._call)
        self._mailboxes: dict[int, _Mailbox] = {}
        self._handles = itertools.count(1)
        # Handles, as a request that leaves unsent must not be kept; None only wakes the writer, for the cancels.
        self._starts: asyncio.Queue[int | None] = asyncio.Queue()
        self._cancels: deque[int] = deque()  # at most one for each request that was sent
        self._reader = asyncio.create_task(self._read(), name=f"session-read-{self._address}")
        self._writer = asyncio.create_task(self._write(), name=f"session-write-{self._address}")

    def start(self, request: inference_pb2.GenerateRequest, timeout_s: float) -> _Mailbox:
        """Start a request with a time limit in seconds."""
        mailbox = _Mailbox(self, next(self._handles), request, timeout_s)
        self._mailboxes[mailbox.handle] = mailbox
        self._starts.put_nowait(mailbox.handle)
        return mailbox

    def leave(self, mailbox: _Mailbox, *, ended: bool) -> None:
        """Forget a request, and cancel it on the server unless it has ended there."""
        if self._mailboxes.pop(mailbox.handle, None) is None or ended or not mailbox.sent or self.ended:
            return
        self._cancels.append(mailbox.handle)
        if self._starts.empty():
            self._starts.put_nowait(None)

    async def close(self) -> None:
        """End the stream."""
        self._end(UnavailableError("the session was closed", reason=CLOSED))
        self._call.cancel()
        await asyncio.gather(self._reader, self._writer, return_exceptions=True)

    async def _read(self) -> None:
        error: AscendraError = lost_connection(self._address, "the router ended the session")
        try:
            while isinstance(response := await self._call.read(), inference_pb2.SessionResponse):
                self._deliver(response)
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure, address=self._address)
        except ProtocolError as failure:
            error = failure
        except asyncio.CancelledError:
            if not self._endpoints.ended_call():
                raise
            error = closed_error()
        finally:
            self._end(error)
            self._writer.cancel()
            self._call.cancel()

    async def _write(self) -> None:
        # The reader hears how the call ended; a write to an ended call says only that it has.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                handle = await self._starts.get()
                while self._cancels:
                    cancel = inference_pb2.SessionCancel(handle=self._cancels.popleft())
                    await self._call.write(inference_pb2.SessionRequest(cancel=cancel))
                mailbox = self._mailboxes.get(handle) if handle is not None else None
                if mailbox is not None:
                    mailbox.sent = True
                    start = inference_pb2.SessionStart(handle=mailbox.handle, request=mailbox.request)
                    await self._call.write(inference_pb2.SessionRequest(start=start))

    def _deliver(self, response: inference_pb2.SessionResponse) -> None:
        mailboxes = self._mailboxes
        tokens = response.tokens
        token_ids = list(tokens.token_ids)
        begin = 0
        columns = zip(tokens.handles, tokens.token_offsets, tokens.token_counts, tokens.texts, strict=True)
        try:
            for handle, offset, count, text in columns:
                end = begin + count
                mailbox = mailboxes.get(handle)
                if mailbox is not None:
                    mailbox.put(Chunk(offset, token_ids[begin:end], text))
                begin = end
        except ValueError:
            raise ProtocolError("the columns of a session message differ in length") from None
        for item in response.items:
            if (mailbox := mailboxes.get(item.handle)) is not None:
                mailbox.put_response(item.response)
        for failed in response.errors:
            if (mailbox := mailboxes.get(failed.handle)) is not None:
                mailbox.fail(
                    from_status(
                        failed.code,
                        failed.message,
                        reason=failed.reason,
                        retry_safe=failed.retry_safe,
                        retry_after_ms=failed.retry_after_ms,
                        request_id=mailbox.request.request_id,
                    )
                )

    def _end(self, error: AscendraError) -> None:
        self.ended = True
        for mailbox in self._mailboxes.values():
            own = copy.copy(error)
            own.request_id = mailbox.request.request_id
            mailbox.fail(own)


def _merge(pending: Chunk, chunk: Chunk, request_id: str) -> None:
    """Append a chunk to the one before it. Raises ProtocolError when it does not continue it."""
    if chunk.token_ids:
        check_contiguous(pending.token_offset + len(pending.token_ids), chunk, request_id)
        if not pending.token_ids:
            pending.token_offset = chunk.token_offset
        pending.token_ids = [*pending.token_ids, *chunk.token_ids]
        pending.logprobs = [*pending.logprobs, *chunk.logprobs]
    pending.text += chunk.text
    pending.finished = chunk.finished
