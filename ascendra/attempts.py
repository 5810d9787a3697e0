"""One request over its attempts: offsets checked, repeated before the first token, resumed after it.

`AsyncClient` and `Session` differ only in how an attempt is opened.
"""

import random
import struct
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import Protocol

from ascendra import wire
from ascendra.errors import AscendraError, DeadlineExceededError, ProtocolError
from ascendra.retry import RetryPolicy
from ascendra.types import Chunk, Completion, PositionLogprobs
from ascendra.v1 import inference_pb2

_LEAST_S = 0.001
"""Shortest time limit of an attempt, in seconds: on the wire 0 stands for none."""


class Attempt(Protocol):
    """One attempt at a request."""

    resume_cursor: bytes
    """Set before the first chunk when the stream can be resumed elsewhere."""
    prompt_tokens: int
    """Length of the prompt in tokens; set before the first chunk."""

    async def read(self) -> Chunk | None:
        """Return the next chunk, or None after the last. Raises AscendraError."""

    def cancel(self) -> None:
        """Give up; does nothing when the attempt has ended. Never waits."""


OpenAttempt = Callable[[inference_pb2.GenerateRequest, float], Awaitable[Attempt]]
"""Opens an attempt at a request with a time limit in seconds."""


class Progress:
    """What the caller has received of a request so far."""

    def __init__(self, request: inference_pb2.GenerateRequest) -> None:
        self._request = request
        self._token_ids: list[int] = []
        self._text_bytes = 0
        self.resume_cursor = b""

    @property
    def started(self) -> bool:
        """Whether the caller has seen anything."""
        return bool(self._token_ids) or self._text_bytes > 0

    def add(self, chunk: Chunk) -> None:
        """Take the next chunk. Raises ProtocolError when it does not continue what came before."""
        expected = len(self._token_ids)
        if chunk.token_ids:
            check_contiguous(expected, chunk, self._request.request_id)
        else:
            chunk.token_offset = expected
        self._token_ids.extend(chunk.token_ids)
        self._text_bytes += len(chunk.text.encode())

    def next_request(self, timeout_s: float) -> inference_pb2.GenerateRequest:
        """Return the request of the next attempt: the original one, or what continues it."""
        request = self._request
        request.timeout_ms = wire.milliseconds("timeout_s", max(timeout_s, _LEAST_S))
        if self.started:
            request.resume.cursor = self.resume_cursor
            request.resume.token_ids = struct.pack(f"<{len(self._token_ids)}I", *self._token_ids)
            request.resume.text_bytes = self._text_bytes
        return request


def check_contiguous(expected: int, chunk: Chunk, request_id: str) -> None:
    """Raise ProtocolError when the tokens of a chunk do not start at the expected offset."""
    if chunk.token_offset != expected:
        problem = "were lost" if chunk.token_offset > expected else "came twice"
        raise ProtocolError(
            f"tokens {problem}: expected offset {expected}, received {chunk.token_offset}", request_id=request_id
        )


async def run_request(
    request: inference_pb2.GenerateRequest,
    open_attempt: OpenAttempt,
    *,
    timeout_s: float,
    retry: RetryPolicy,
    pause: Callable[[float, str], Awaitable[None]],
    routers: int,
) -> AsyncGenerator[Chunk]:
    """Yield the chunks of a request. Raises AscendraError.

    A failed attempt is repeated while the caller has seen nothing and a repetition is safe; after that it is resumed
    where the router gave a cursor, after a `pause` of some seconds. `routers` is the number of routers that attempts go
    to in turn.
    """
    deadline = time.monotonic() + timeout_s
    progress = Progress(request)
    failures = 0
    while True:
        attempt: Attempt | None = None
        try:
            remaining_s = deadline - time.monotonic()
            attempt = await open_attempt(progress.next_request(remaining_s), remaining_s)
            while (chunk := await attempt.read()) is not None:
                progress.add(chunk)
                chunk.prompt_tokens = attempt.prompt_tokens
                failures = 0
                yield chunk
            return
        except AscendraError as error:
            error.request_id = error.request_id or request.request_id
            failures += 1
            if attempt is not None and attempt.resume_cursor:
                progress.resume_cursor = attempt.resume_cursor
            wait_s = None
            if not progress.started or progress.resume_cursor:
                wait_s = retry.wait_s(
                    error, failures, started=progress.started, others=routers - failures, jitter=random.random()
                )
            if wait_s is None or time.monotonic() + wait_s >= deadline:
                raise
        finally:
            if attempt is not None:
                attempt.cancel()
        await pause(wait_s, request.request_id)


async def collect(request_id: str, chunks: AsyncIterator[Chunk]) -> Completion:
    """Gather the chunks of a request into a completion."""
    token_ids: list[int] = []
    logprobs: list[PositionLogprobs] = []
    texts: list[str] = []
    async for chunk in chunks:
        token_ids.extend(chunk.token_ids)
        logprobs.extend(chunk.logprobs)
        texts.append(chunk.text)
        if chunk.finished is not None:
            end = chunk.finished
            return Completion(
                request_id=request_id,
                text="".join(texts),
                token_ids=token_ids,
                logprobs=logprobs,
                finish_reason=end.reason,
                stop_string=end.stop_string,
                stop_token_id=end.stop_token_id,
                usage=end.usage,
                receipt=end.receipt,
            )
    raise ProtocolError("the stream ended without an end message", request_id=request_id)


def time_limit_error(request_id: str, timeout_s: float) -> DeadlineExceededError:
    """Return the error of a request that passed its limit in the client."""
    return DeadlineExceededError(f"the time limit of {timeout_s:g} s passed", request_id=request_id)
