"""The outbox: one message per step, order kept, bounds."""

import asyncio
import time

from ascendra.v1 import common_pb2, worker_pb2
from services.worker.outbox import MAX_PENDING_MESSAGES, MAX_PENDING_STEPS, MAX_PENDING_TOKENS, Outbox


def pong(ping_id: int) -> worker_pb2.AttachResponse:
    """Return some message."""
    return worker_pb2.AttachResponse(pong=worker_pb2.Pong(ping_id=ping_id))


async def test_what_one_loop_iteration_says_is_one_message() -> None:
    """Tokens of several requests, ends and telemetry of a step merge."""
    outbox = Outbox()
    ended_s = time.monotonic() - 0.5
    outbox.put_telemetry(common_pb2.StepTelemetry(step=3), ended_s)
    outbox.put_tokens(1, [10, 11])
    outbox.put_tokens(2, [20])
    outbox.put_ended(worker_pb2.RequestEnded(handle=2, reason=common_pb2.FINISH_REASON_STOP))
    outbox.put_started([4])
    message = await outbox.next(1.0)
    assert message is not None
    step = message.step
    assert step.sequence == 1
    assert (list(step.handles), list(step.token_counts), list(step.token_ids)) == ([1, 2], [2, 1], [10, 11, 20])
    assert (step.ended[0].handle, list(step.started_handles)) == (2, [4])
    assert step.telemetry[0].age_s >= 0.5
    assert await outbox.next(0.02) is None


async def test_other_messages_keep_their_place_between_tokens() -> None:
    """What is said after some tokens arrives after them and before later ones."""
    outbox = Outbox()
    outbox.put_tokens(1, [10])
    outbox.put(pong(1))
    outbox.put_tokens(1, [11])
    kinds = []
    for _ in range(3):
        message = await outbox.next(1.0)
        assert message is not None
        kinds.append((message.WhichOneof("message"), list(message.step.token_ids), message.step.sequence))
    assert kinds == [("step", [10], 1), ("pong", [], 0), ("step", [11], 2)]


async def test_telemetry_alone_is_sent_after_a_moment() -> None:
    """A step without tokens is reported too."""
    outbox = Outbox()
    outbox.put_telemetry(common_pb2.StepTelemetry(step=1), time.monotonic())
    message = await outbox.next(5.0)
    assert message is not None
    assert [step.step for step in message.step.telemetry] == [1]


async def test_a_slow_reader_gets_merged_messages_and_bounded_telemetry() -> None:
    """While nobody reads, steps merge into one message that keeps every token and the newest telemetry."""
    outbox = Outbox()
    for number in range(2000):
        outbox.put_telemetry(common_pb2.StepTelemetry(step=number), time.monotonic())
        outbox.put_tokens(1, [number])
        if number % 100 == 0:
            await asyncio.sleep(0)
    message = await outbox.next(1.0)
    assert message is not None
    assert list(message.step.token_ids) == list(range(2000))
    assert [step.step for step in message.step.telemetry] == list(range(2000 - MAX_PENDING_STEPS, 2000))
    assert not outbox.overflowed


async def test_overflow_is_noticed() -> None:
    """Too many tokens, or too many messages, that nobody reads end the stream."""
    tokens, messages = Outbox(), Outbox()
    tokens.put_tokens(1, range(MAX_PENDING_TOKENS + 1))
    for number in range(MAX_PENDING_MESSAGES + 1):
        messages.put(pong(number))
    assert tokens.overflowed
    assert messages.overflowed


async def test_a_closed_outbox_is_read_to_its_end() -> None:
    """What was said before the close is still delivered; then next() returns at once."""
    outbox = Outbox()
    outbox.put(pong(1))
    outbox.put_tokens(1, [5])
    outbox.close()
    first, second = await outbox.next(1.0), await outbox.next(1.0)
    assert first is not None
    assert first.WhichOneof("message") == "pong"
    assert second is not None
    assert list(second.step.token_ids) == [5]
    async with asyncio.timeout(0.5):
        assert await outbox.next(10.0) is None


async def test_silence_is_reported_in_time() -> None:
    """next() returns None after its timeout, so that a heartbeat can be sent."""
    outbox = Outbox()
    started_s = time.monotonic()
    assert await outbox.next(0.05) is None
    assert 0.04 <= time.monotonic() - started_s < 2
