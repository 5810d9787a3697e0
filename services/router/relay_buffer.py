"""What one sink has not acknowledged: bounded, oldest dropped first, every loss on record. No clock, no I/O."""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ascendra.v1 import sink_pb2

_ITEM_TOKENS = 32
"""Tokens of one request that share an item while the sink is behind."""


@dataclass(slots=True)
class _Item:
    stream: "Stream"
    offset: int
    token_ids: list[int]
    text: str

    @property
    def end_offset(self) -> int:
        return self.offset + len(self.token_ids)


@dataclass(slots=True, eq=False)
class Stream:
    """The copy of one request's stream for one sink."""

    handle: int
    request_id: str
    next_offset: int = 0
    """After the last token appended."""
    end: sink_pb2.RelayEnd | None = None
    end_sent: bool = False
    unsent: int = 0
    """Items not sent on this connection."""
    tail: _Item | None = None
    """The last unsent item, while it may grow."""
    held_text: str = ""
    """Text that came without tokens; goes with the next item."""
    sent: "deque[_Item]" = field(default_factory=deque)
    """Not acknowledged."""
    gaps: dict[int, int] = field(default_factory=dict)
    """Dropped ranges not acknowledged: end -> first offset."""

    def lose(self, first: int, end: int) -> None:
        """Record a dropped range, joined with its neighbours."""
        for other_end, other_first in list(self.gaps.items()):
            if other_end == first or other_first == end:
                del self.gaps[other_end]
                first, end = min(first, other_first), max(end, other_end)
        self.gaps[end] = first


class RelayBuffer:
    """Copies of streams on their way to one sink. An item weighs its tokens, an end weighs one.

    Attributes:
        sent, acknowledged, dropped: tokens since the start; tokens sent again count again.
        in_flight: weight sent and not acknowledged.
        behind: weight not acknowledged, sent or not; never above the limit.
    """

    def __init__(self, max_tokens: int) -> None:
        self._limit = max_tokens
        self._streams: dict[int, Stream] = {}
        self._unsent: deque[_Item] = deque()
        self._ends: deque[Stream] = deque()
        self._handles = 0
        self._lost_requests = 0
        self.sent = self.acknowledged = self.dropped = self.dropped_requests = 0
        self.in_flight = self.behind = 0

    def open(self, request_id: str, offset: int = 0) -> Stream:
        """Begin the copy of a request's stream, whose first token has that offset."""
        self._handles += 1
        stream = self._streams[self._handles] = Stream(self._handles, request_id, offset)
        return stream

    def append(self, stream: Stream, offset: int, token_ids: Sequence[int], text: str) -> None:
        """Add tokens that follow those of before; text without tokens waits for the next ones."""
        if not token_ids:
            stream.held_text += text
            return
        tail = stream.tail
        if tail is not None and len(tail.token_ids) < _ITEM_TOKENS:
            tail.token_ids += token_ids
            tail.text += stream.held_text + text
        else:
            stream.tail = item = _Item(stream, offset, list(token_ids), stream.held_text + text)
            stream.unsent += 1
            self._unsent.append(item)
        stream.held_text = ""
        stream.next_offset = offset + len(token_ids)
        self.behind += len(token_ids)
        self._shrink()

    def finish(self, stream: Stream, text: str, end: sink_pb2.RelayEnd) -> None:
        """End a stream; `text` is what was held back."""
        stream.end, stream.tail = end, None
        stream.held_text += text
        self._ends.append(stream)
        self.behind += 1
        self._shrink()

    def take(self, most: int) -> sink_pb2.RelayBatch | None:
        """Return what to send now, None for nothing; stops when in_flight reaches the limit's half.

        Args:
            most: tokens in the batch, but for the last item.
        """
        room = min(self._limit // 2 - self.in_flight, most)
        batch = sink_pb2.RelayBatch(lost_requests=self._lost_requests)
        while self._unsent and room > 0:
            item = self._unsent.popleft()
            stream = item.stream
            stream.unsent -= 1
            if stream.tail is item:
                stream.tail = None
            stream.sent.append(item)
            self._add(batch, stream, item.offset, token_ids=item.token_ids, text=item.text)
            self.sent += len(item.token_ids)
            self.in_flight += len(item.token_ids)
            room -= len(item.token_ids)
        for _ in range(len(self._ends)):
            stream = self._ends.popleft()
            if stream.unsent or room <= 0:
                self._ends.append(stream)
                continue
            stream.end_sent = True
            self._add(batch, stream, stream.next_offset, text=stream.held_text, end=stream.end)
            self.in_flight += 1
            room -= 1
        self._lost_requests = 0
        return batch if batch.items or batch.lost_requests else None

    def acknowledge(self, acks: Iterable[sink_pb2.RelayAck]) -> None:
        """Let go of what the sink has dealt with; what it says of unknown streams is ignored."""
        for ack in acks:
            stream = self._streams.get(ack.handle)
            if stream is None or stream.request_id != ack.request_id:
                continue
            while stream.sent and stream.sent[0].end_offset <= ack.token_offset:
                tokens = len(stream.sent.popleft().token_ids)
                self.acknowledged += tokens
                self._gone(tokens)
            if stream.gaps:
                stream.gaps = {end: first for end, first in stream.gaps.items() if end > ack.token_offset}
            if ack.ended and stream.end_sent and not stream.sent:
                self._gone(1)
                del self._streams[stream.handle]

    def send_again(self) -> None:
        """Put what was sent and not acknowledged back in front: the connection broke."""
        again: list[_Item] = []
        for stream in self._streams.values():
            again += stream.sent
            stream.unsent += len(stream.sent)
            stream.sent.clear()
            if stream.end_sent:
                stream.end_sent = False
                self._ends.appendleft(stream)
        self._unsent.extendleft(reversed(again))
        self.in_flight = 0

    def _gone(self, weight: int) -> None:
        self.in_flight -= weight
        self.behind -= weight

    @staticmethod
    def _add(
        batch: sink_pb2.RelayBatch,
        stream: Stream,
        offset: int,
        *,
        token_ids: Sequence[int] = (),
        text: str,
        end: sink_pb2.RelayEnd | None = None,
    ) -> None:
        first = stream.gaps.get(offset)
        gap = None if first is None else sink_pb2.RelayGap(first_offset=first, end_offset=offset)
        batch.items.add(
            handle=stream.handle,
            request_id=stream.request_id,
            token_offset=offset,
            token_ids=token_ids,
            text=text,
            gap=gap,
            end=end,
        )

    def _shrink(self) -> None:
        """Drop the oldest unsent tokens, then the oldest unsent ends, until the limit is kept."""
        while self.behind > self._limit and self._unsent:
            item = self._unsent.popleft()
            stream, tokens = item.stream, len(item.token_ids)
            stream.unsent -= 1
            if stream.tail is item:
                stream.tail = None
            stream.lose(item.offset, item.end_offset)
            self.dropped += tokens
            self.behind -= tokens
        while self.behind > self._limit and self._ends:
            stream = self._ends.popleft()
            self.behind -= 1
            self.dropped_requests += 1
            self._lost_requests += 1
            self._forget_unended(stream)

    def _forget_unended(self, stream: Stream) -> None:
        """Drop a stream whose end will not be sent, with what of it is in flight."""
        for item in stream.sent:
            self._gone(len(item.token_ids))
            self.dropped += len(item.token_ids)
        del self._streams[stream.handle]
