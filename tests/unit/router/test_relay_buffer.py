"""The buffer of one sink: bounded whatever happens, and every offset is delivered, in a gap, or still to come."""

from hypothesis import given, settings
from hypothesis import strategies as st

from ascendra.v1 import common_pb2, sink_pb2
from services.router.relay_buffer import RelayBuffer, Stream

END = sink_pb2.RelayEnd(reason=common_pb2.FINISH_REASON_LENGTH)
LIMIT = 100


def ack(item: sink_pb2.RelayItem) -> sink_pb2.RelayAck:
    """Acknowledge an item."""
    return sink_pb2.RelayAck(
        handle=item.handle,
        request_id=item.request_id,
        token_offset=item.token_offset + len(item.token_ids),
        ended=item.HasField("end"),
    )


def fill(buffer: RelayBuffer, stream: Stream, count: int) -> None:
    """Append tokens one by one; the id of each is its offset."""
    for offset in range(stream.next_offset, stream.next_offset + count):
        buffer.append(stream, offset, [offset], chr(97 + offset % 26))


def taken(buffer: RelayBuffer) -> list[sink_pb2.RelayItem]:
    """Return what the buffer sends now."""
    batch = buffer.take(LIMIT)
    return list(batch.items) if batch is not None else []


def test_tokens_and_text_arrive_in_order_and_are_forgotten_when_acknowledged() -> None:
    """Text without tokens travels with the next ones, held-back text with the end; nothing is left behind."""
    buffer = RelayBuffer(LIMIT)
    stream = buffer.open("r")
    buffer.append(stream, 0, (), "x")
    fill(buffer, stream, 3)
    buffer.finish(stream, "!", END)
    items = taken(buffer)
    assert [(list(i.token_ids), i.token_offset, i.text, i.HasField("end")) for i in items] == [
        ([0, 1, 2], 0, "xabc", False),
        ([], 3, "!", True),
    ]
    buffer.acknowledge(map(ack, items))
    assert (buffer.behind, buffer.in_flight, buffer.acknowledged, buffer.dropped) == (0, 0, 3, 0)
    buffer.send_again()
    assert taken(buffer) == []


def test_what_was_not_acknowledged_is_sent_again_in_the_same_items() -> None:
    """After a broken connection exactly the unacknowledged items return, before newer ones, and the end after all."""
    buffer = RelayBuffer(LIMIT)
    stream = buffer.open("r")
    sent = []
    for _ in range(3):
        fill(buffer, stream, 2)
        sent += taken(buffer)
    buffer.finish(stream, "", END)
    sent += taken(buffer)
    buffer.acknowledge([ack(sent[0])])
    buffer.send_again()
    assert taken(buffer) == sent[1:]


def test_a_full_buffer_drops_the_oldest_and_says_which() -> None:
    """What is in flight stays; older unsent tokens go; the item after them carries the gap, also when sent again."""
    buffer = RelayBuffer(LIMIT)
    stream = buffer.open("r")
    fill(buffer, stream, 10)
    first = taken(buffer)
    fill(buffer, stream, 300)
    assert buffer.behind <= LIMIT
    rest = taken(buffer)
    gap = rest[0].gap
    assert (gap.first_offset, gap.end_offset) == (10, rest[0].token_offset)
    assert buffer.dropped == gap.end_offset - gap.first_offset > 100
    buffer.send_again()
    again = taken(buffer)
    assert again[: len(first)] == first
    assert again[len(first)] == rest[0]


def test_ends_are_dropped_last_and_counted() -> None:
    """A sink that is away for ever costs bounded memory: requests lost without an end are told as a number."""
    buffer = RelayBuffer(LIMIT)
    for number in range(LIMIT + 50):
        stream = buffer.open(str(number))
        fill(buffer, stream, 3)
        buffer.finish(stream, "", END)
    assert buffer.behind <= LIMIT
    batch = buffer.take(LIMIT)
    assert batch is not None
    assert batch.lost_requests == buffer.dropped_requests == 50
    assert batch.items[0].gap == sink_pb2.RelayGap(first_offset=0, end_offset=3)


OPERATIONS = st.lists(st.sampled_from(["one", "many", "take", "ack", "break"]), max_size=60)


@settings(max_examples=60, deadline=None)
@given(OPERATIONS)
def test_every_offset_is_delivered_or_in_a_gap(operations: list[str]) -> None:
    """Whatever the order of tokens, sends, acknowledgements and breaks, a sink that follows offsets misses nothing."""
    buffer = RelayBuffer(LIMIT)
    streams = [buffer.open("a"), buffer.open("b", 7)]
    accounted = {1: 0, 2: 7}
    unacknowledged: list[sink_pb2.RelayItem] = []

    def send() -> bool:
        items = taken(buffer)
        for item in items:
            begin = item.gap.first_offset if item.HasField("gap") else item.token_offset
            assert begin <= accounted[item.handle], "no hole without a gap"
            end_offset = item.token_offset + len(item.token_ids)
            accounted[item.handle] = max(accounted[item.handle], end_offset)
        unacknowledged.extend(items)
        return bool(items)

    for number, operation in enumerate(operations):
        match operation:
            case "one" | "many":
                fill(buffer, streams[number % 2], 1 if operation == "one" else 45)
            case "take":
                send()
            case "ack" if unacknowledged:
                buffer.acknowledge([ack(unacknowledged.pop(0))])
            case "break":
                unacknowledged.clear()
                buffer.send_again()
        assert 0 <= buffer.in_flight <= buffer.behind <= LIMIT
    for stream in streams:
        buffer.finish(stream, "", END)
    while unacknowledged or send():
        buffer.acknowledge(map(ack, unacknowledged))
        unacknowledged.clear()
    assert accounted == {stream.handle: stream.next_offset for stream in streams}
    assert (buffer.behind, buffer.in_flight) == (0, 0)
