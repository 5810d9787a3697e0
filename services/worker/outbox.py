"""What waits to be written to one router: tokens and telemetry merge while the router is slow, so nothing piles up."""

import asyncio
import time
from collections import deque
from collections.abc import Sequence

from ascendra.v1 import common_pb2, worker_pb2

MAX_PENDING_STEPS = 512
"""Telemetry of older steps is dropped for a router that does not read."""
MAX_PENDING_TOKENS = 1 << 18
MAX_PENDING_MESSAGES = 1 << 14
_TELEMETRY_HOLD_S = 0.005
"""Telemetry waits this long for the tokens of its step, which take another way from the engine core."""


class _PendingStep:
    """A StepOutput under construction."""

    def __init__(self) -> None:
        self.output = worker_pb2.StepOutput()
        self.ended_s: deque[float] = deque()


class Outbox:
    """Messages for one router, in order. Never blocks a writer; `overflowed` says that the router reads too slowly."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._messages: deque[worker_pb2.AttachResponse | _PendingStep] = deque()
        self._wake = asyncio.Event()
        self._wake_scheduled = False
        self._hold: asyncio.TimerHandle | None = None
        self._sequence = 0
        self._pending_tokens = 0
        self.overflowed = False
        self.closed = False

    def put(self, message: worker_pb2.AttachResponse) -> None:
        """Append a message behind everything said before."""
        self._messages.append(message)
        if len(self._messages) > MAX_PENDING_MESSAGES:
            self.overflowed = True
        self._schedule_wake()

    def put_tokens(
        self, handle: int, token_ids: Sequence[int], logprobs: Sequence[common_pb2.PositionLogprobs] = ()
    ) -> None:
        """Add new tokens of a request to the present step."""
        output = self._step().output
        output.handles.append(handle)
        output.token_counts.append(len(token_ids))
        output.token_ids.extend(token_ids)
        if logprobs:
            output.logprobs.add(handle=handle, positions=logprobs)
        self._pending_tokens += len(token_ids)
        if self._pending_tokens > MAX_PENDING_TOKENS:
            self.overflowed = True
        self._schedule_wake()

    def put_ended(self, ended: worker_pb2.RequestEnded) -> None:
        """Say that a request ended, after its tokens."""
        self._step().output.ended.append(ended)
        self._schedule_wake()

    def put_started(self, handles: Sequence[int]) -> None:
        """Say that requests were scheduled for the first time."""
        self._step().output.started_handles.extend(handles)
        self._schedule_wake()

    def put_relegated(self, handles: Sequence[int]) -> None:
        """Say that the engine relegated requests."""
        self._step().output.relegated_handles.extend(handles)
        self._schedule_wake()

    def put_kv_failed(self, handles: Sequence[int]) -> None:
        """Say that the KV of requests could not be read."""
        self._step().output.kv_failed_handles.extend(handles)
        self._schedule_wake()

    def put_telemetry(self, step: common_pb2.StepTelemetry, ended_s: float) -> None:
        """Add a step's telemetry; it goes with the tokens of the step if they follow at once."""
        pending = self._step()
        pending.output.telemetry.append(step)
        pending.ended_s.append(ended_s)
        if len(pending.ended_s) > MAX_PENDING_STEPS:
            del pending.output.telemetry[0]
            pending.ended_s.popleft()
        if self._hold is None and not self._wake_scheduled:
            self._hold = self._loop.call_later(_TELEMETRY_HOLD_S, self._wake_now)

    def close(self) -> None:
        """Let the reader of the outbox finish with what is in it."""
        self.closed = True
        self._wake_now()

    async def next(self, timeout_s: float) -> worker_pb2.AttachResponse | None:
        """Return the next message; None after timeout_s of silence, or at once when closed and empty."""
        if not self._messages or not self._wake.is_set():
            if self.closed:
                return self._pop() if self._messages else None
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()
            except TimeoutError:
                return None
        if not self._messages:
            self._wake.clear()
            return None
        message = self._pop()
        if not self._messages:
            self._wake.clear()
        return message

    def _pop(self) -> worker_pb2.AttachResponse:
        message = self._messages.popleft()
        if not isinstance(message, _PendingStep):
            return message
        self._sequence += 1
        self._pending_tokens -= len(message.output.token_ids)
        message.output.sequence = self._sequence
        now_s = time.monotonic()
        for step, ended_s in zip(message.output.telemetry, message.ended_s, strict=True):
            step.age_s = max(now_s - ended_s, 0.0)
        return worker_pb2.AttachResponse(step=message.output)

    def _step(self) -> _PendingStep:
        if self._messages and isinstance(last := self._messages[-1], _PendingStep):
            return last
        pending = _PendingStep()
        self._messages.append(pending)
        return pending

    def _schedule_wake(self) -> None:
        # All request tasks that one engine step woke run in this loop iteration: one message for all of them.
        if not self._wake_scheduled:
            self._wake_scheduled = True
            self._loop.call_soon(self._wake_now)

    def _wake_now(self) -> None:
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None
        self._wake_scheduled = False
        self._wake.set()
