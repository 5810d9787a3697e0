"""All requests of one client process on one stream: one message per wake-up carries what became ready for all."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence

from ascendra.v1 import common_pb2, inference_pb2
from services.common.errors import InvalidArgument, ResourceExhausted, ServiceError
from services.common.logging import get_logger
from services.router import metrics
from services.router.config import RouterConfig
from services.router.dispatcher import Dispatcher
from services.router.ingress import CallInfo, Ingress
from services.router.mailbox import Pending
from services.router.request import LiveRequest

log = get_logger()

MAX_UNREAD_TOKENS = 1 << 18
"""Of one session, all requests together."""


class Outbox:
    """What the client has not read, by handle. Writers never wait."""

    def __init__(self, unread_limit: int) -> None:
        """Make an empty outbox that holds at most `unread_limit` tokens of one request."""
        self._unread_limit = unread_limit
        self._pending: dict[int, Pending] = {}
        self._unread = 0
        self._waiter: asyncio.Future[None] | None = None
        self._closed = False

    def open(self, handle: int) -> Pending:
        """Return what is unread of a handle, to be added to."""
        pending = self._pending.get(handle)
        if pending is None:
            pending = self._pending[handle] = Pending()
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)
        return pending

    def holds(self, handle: int) -> bool:
        """Return whether something of a handle is unread."""
        return handle in self._pending

    def added(self, pending: Pending, tokens: int) -> bool:
        """Count tokens; False when a limit is passed."""
        self._unread += tokens
        return len(pending.token_ids) <= self._unread_limit and self._unread <= MAX_UNREAD_TOKENS

    def close(self) -> None:
        """Nothing will be added; the reader gets what is here, then None."""
        self._closed = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> inference_pb2.SessionResponse | None:
        """Return everything unread as one message, waiting until there is something; None when closed and empty."""
        while not self._pending:
            if self._closed:
                return None
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        pending, self._pending, self._unread = self._pending, {}, 0
        return _response(pending)


def _response(pending: dict[int, Pending]) -> inference_pb2.SessionResponse:
    response = inference_pb2.SessionResponse()
    handles, offsets, counts, token_ids, texts = [], [], [], [], []
    for handle, one in pending.items():
        if one.plain:
            handles.append(handle)
            offsets.append(one.offset)
            counts.append(len(one.token_ids))
            token_ids += one.token_ids
            texts.append(one.text)
            continue
        if one.has_response:
            response.items.add(handle=handle, response=one.response())
        if one.error is not None:
            error = one.error
            response.errors.add(
                handle=handle,
                code=error.code.value[0],
                message=error.message,
                reason=error.reason,
                retry_safe=error.retry_safe,
                retry_after_ms=error.retry_after_ms,
            )
    if handles:
        tokens = response.tokens
        tokens.handles.extend(handles)
        tokens.token_offsets.extend(offsets)
        tokens.token_counts.extend(counts)
        tokens.token_ids.extend(token_ids)
        tokens.texts.extend(texts)
    return response


class HandleSink:
    """The stream of one handle."""

    __slots__ = ("_handle", "_session")

    def __init__(self, session: "Session", handle: int) -> None:
        self._session = session
        self._handle = handle

    def accepted(self, accepted: inference_pb2.Accepted) -> None:
        """Say that the request was taken."""
        self._session.outbox.open(self._handle).accept(accepted)

    def tokens(
        self, offset: int, token_ids: Sequence[int], text: str, logprobs: Iterable[common_pb2.PositionLogprobs] = ()
    ) -> bool:
        """Append tokens; False when a limit is passed."""
        outbox = self._session.outbox
        pending = outbox.open(self._handle)
        pending.add_tokens(offset, token_ids, text, logprobs)
        return outbox.added(pending, len(token_ids))

    def finished(self, text: str, finished: inference_pb2.Finished) -> None:
        """Append the last text and the last message."""
        self._session.outbox.open(self._handle).finish(text, finished)
        self._session.forget(self._handle)

    def failed(self, error: ServiceError) -> None:
        """End the stream with an error."""
        self._session.outbox.open(self._handle).fail(error)
        self._session.forget(self._handle)

    def abandoned(self) -> None:
        """Nobody reads any more."""


class Session:
    """One client's stream."""

    def __init__(
        self,
        config: RouterConfig,
        ingress: Ingress,
        dispatcher: Dispatcher,
        call: CallInfo,
        closing: asyncio.Event,
    ) -> None:
        self.outbox = Outbox(config.max_unread_tokens)
        self._limit = config.session_max_requests
        self._ingress = ingress
        self._dispatcher = dispatcher
        # Ids and time limits belong to single requests here, not to the call.
        shared = {key: value for key, value in call.metadata.items() if key != "x-request-id"}
        self._call = CallInfo(shared, caller=call.caller)
        self._closing = closing
        self._starting: dict[int, asyncio.Task[None]] = {}
        self._live: dict[int, LiveRequest] = {}
        self._reading = True

    async def run(
        self, requests: AsyncIterator[inference_pb2.SessionRequest]
    ) -> AsyncIterator[inference_pb2.SessionResponse]:
        """Yield responses until the client has closed its side and everything has ended, or the router stops."""
        reader = asyncio.create_task(self._read(requests), name="session-reader")
        closer = asyncio.create_task(self._close_when_told(), name="session-closer")
        try:
            while (response := await self.outbox.take()) is not None:
                yield response
        finally:
            tasks = [reader, closer, *self._starting.values()]
            for task in tasks:
                task.cancel()
            for request in list(self._live.values()):
                self._dispatcher.cancel(request)
            await asyncio.gather(*tasks, return_exceptions=True)

    def forget(self, handle: int) -> None:
        """Free a handle whose request ended."""
        self._live.pop(handle, None)
        self._close_if_over()

    async def _read(self, requests: AsyncIterator[inference_pb2.SessionRequest]) -> None:
        try:
            async for request in requests:
                kind = request.WhichOneof("message")
                if kind == "start":
                    self._start(request.start)
                elif kind == "cancel":
                    self._cancel(request.cancel.handle)
                else:
                    log.warning("session_message_ignored")
        finally:
            self._reading = False
            self._close_if_over()

    async def _close_when_told(self) -> None:
        await self._closing.wait()
        self.outbox.close()

    def _close_if_over(self) -> None:
        if not self._reading and not self._live and not self._starting:
            self.outbox.close()

    def _start(self, start: inference_pb2.SessionStart) -> None:
        handle = start.handle
        if handle == 0 or handle in self._live or handle in self._starting or self.outbox.holds(handle):
            # The stream of a handle that is in use must not hear of it: this ends the session's request only.
            error = InvalidArgument(f"start.handle must be above 0 and not in use, got {handle}", reason="BAD_HANDLE")
            if handle == 0:
                self.outbox.open(0).fail(error)
            else:
                log.warning("session_handle_in_use", handle=handle)
                self._abort(handle, error)
            return
        if len(self._live) + len(self._starting) >= self._limit:
            error_: ServiceError = ResourceExhausted(
                f"a session serves at most {self._limit} requests at once", reason="SESSION_LIMIT", retry_safe=True
            )
            metrics.refused(error_)
            self.outbox.open(handle).fail(error_)
            return
        arrival_s = time.monotonic()
        self._starting[handle] = asyncio.create_task(self._admit(handle, start.request, arrival_s))

    async def _admit(self, handle: int, message: inference_pb2.GenerateRequest, arrival_s: float) -> None:
        sink = HandleSink(self, handle)
        try:
            request = await self._ingress.admit(message, sink, arrival_s, self._call)
            if not request.ended:
                self._live[handle] = request
        except ServiceError as error:
            self.outbox.open(handle).fail(error)
        except Exception:
            log.exception("session_start_failed")
            self.outbox.open(handle).fail(ServiceError("internal error"))
        finally:
            if self._starting.get(handle) is asyncio.current_task():
                del self._starting[handle]
            self._close_if_over()

    def _cancel(self, handle: int) -> None:
        task = self._starting.pop(handle, None)
        if task is not None:
            task.cancel()
            finished = inference_pb2.Finished(reason=common_pb2.FINISH_REASON_CANCELLED)
            self.outbox.open(handle).finish("", finished)
            return
        request = self._live.get(handle)
        if request is not None:
            self._dispatcher.cancel(request, acknowledge=True)

    def _abort(self, handle: int, error: ServiceError) -> None:
        """End a handle's request because the client broke the protocol with it."""
        task = self._starting.pop(handle, None)
        if task is not None:
            task.cancel()
        request = self._live.get(handle)
        if request is not None:
            self._dispatcher.fail(request, error)
        else:
            self.outbox.open(handle).fail(error)
