"""What a client has not read yet. Writers never wait: what a slow reader leaves is merged, and it is bounded."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Protocol

from ascendra.v1 import common_pb2, inference_pb2
from services.common.errors import ServiceError


class Sink(Protocol):
    """Where a request's stream goes."""

    def accepted(self, accepted: inference_pb2.Accepted) -> None:
        """Say that the request was taken."""

    def tokens(
        self, offset: int, token_ids: Sequence[int], text: str, logprobs: Iterable[common_pb2.PositionLogprobs] = ()
    ) -> bool:
        """Append tokens; False when the reader is too far behind and the request should be given up."""

    def finished(self, text: str, finished: inference_pb2.Finished) -> None:
        """Append the last text and the last message."""

    def failed(self, error: ServiceError) -> None:
        """End the stream with a status."""

    def abandoned(self) -> None:
        """Take note that the caller is gone: nothing more will come."""


class Pending:
    """Unread part of one request's stream, merged into at most one message and an error."""

    __slots__ = ("accepted", "end", "error", "logprobs", "offset", "plain", "text", "token_ids")

    def __init__(self) -> None:
        self.accepted: inference_pb2.Accepted | None = None
        self.offset = 0
        self.token_ids: list[int] = []
        self.text = ""
        self.logprobs: list[common_pb2.PositionLogprobs] = []
        self.end: inference_pb2.Finished | None = None
        self.error: ServiceError | None = None
        self.plain = True
        """Nothing but tokens and text."""

    def accept(self, accepted: inference_pb2.Accepted) -> None:
        """Say that the request was taken."""
        self.accepted = accepted
        self.plain = False

    def add_tokens(
        self, offset: int, token_ids: Sequence[int], text: str, logprobs: Iterable[common_pb2.PositionLogprobs]
    ) -> None:
        """Append tokens that follow those already here."""
        if not self.token_ids:
            self.offset = offset
        self.token_ids += token_ids
        self.text += text
        if logprobs:
            self.logprobs.extend(logprobs)
            self.plain = False

    def finish(self, text: str, finished: inference_pb2.Finished) -> None:
        """Append the last text and the last message."""
        self.text += text
        if not self.token_ids:
            self.offset = finished.usage.completion_tokens
        self.end = finished
        self.plain = False

    def fail(self, error: ServiceError) -> None:
        """End the stream with a status."""
        self.error = error
        self.plain = False

    @property
    def has_response(self) -> bool:
        """There is something to say beside an error."""
        return bool(self.token_ids or self.text) or self.accepted is not None or self.end is not None

    def response(self) -> inference_pb2.GenerateResponse:
        """Return it as one message."""
        return inference_pb2.GenerateResponse(
            accepted=self.accepted,
            token_offset=self.offset,
            token_ids=self.token_ids,
            text=self.text,
            logprobs=self.logprobs,
            finished=self.end,
        )


class Mailbox:
    """The stream of one Generate call. The first token leaves at once; later ones merge only behind a busy reader."""

    __slots__ = ("_pending", "_unread_limit", "_waiter")

    def __init__(self, unread_limit: int) -> None:
        """Make an empty mailbox that holds at most `unread_limit` tokens."""
        self._unread_limit = unread_limit
        self._pending: Pending | None = None
        self._waiter: asyncio.Future[None] | None = None

    def accepted(self, accepted: inference_pb2.Accepted) -> None:
        """Say that the request was taken."""
        self._open().accept(accepted)

    def tokens(
        self, offset: int, token_ids: Sequence[int], text: str, logprobs: Iterable[common_pb2.PositionLogprobs] = ()
    ) -> bool:
        """Append tokens; False when the limit is passed."""
        pending = self._open()
        pending.add_tokens(offset, token_ids, text, logprobs)
        return len(pending.token_ids) <= self._unread_limit

    def finished(self, text: str, finished: inference_pb2.Finished) -> None:
        """Append the last text and the last message."""
        self._open().finish(text, finished)

    def failed(self, error: ServiceError) -> None:
        """End the stream with a status."""
        self._open().fail(error)

    def abandoned(self) -> None:
        """Nobody reads any more."""

    async def take(self) -> Pending:
        """Return everything unread, waiting until there is something."""
        while self._pending is None:
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        pending, self._pending = self._pending, None
        return pending

    def _open(self) -> Pending:
        if self._pending is None:
            self._pending = Pending()
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)
        return self._pending
