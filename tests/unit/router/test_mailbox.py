"""Mailboxes: the first token at once, merging only behind a busy reader, bounded."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from ascendra.v1 import inference_pb2
from services.common.errors import ResourceExhausted
from services.router.mailbox import Mailbox


async def test_a_waiting_reader_gets_the_first_token_at_once() -> None:
    """No timer holds it: it arrives in the loop's next turn."""
    mailbox = Mailbox(10)
    reader = asyncio.create_task(mailbox.take())
    await asyncio.sleep(0)
    mailbox.tokens(0, [7], "x")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert reader.done()
    assert reader.result().response() == inference_pb2.GenerateResponse(token_ids=[7], text="x")


async def test_a_busy_reader_gets_everything_in_one_message() -> None:
    """What came while it was away is merged, the end included."""
    mailbox = Mailbox(10)
    mailbox.accepted(inference_pb2.Accepted(request_id="r"))
    mailbox.tokens(0, [1], "a")
    mailbox.tokens(1, [2, 3], "b")
    mailbox.finished("c", inference_pb2.Finished())
    response = (await mailbox.take()).response()
    assert response.accepted.request_id == "r"
    assert (response.token_offset, list(response.token_ids), response.text) == (0, [1, 2, 3], "abc")
    assert response.HasField("finished")


async def test_the_limit_is_said() -> None:
    """A writer hears when the reader is too far behind."""
    mailbox = Mailbox(3)
    assert mailbox.tokens(0, [1, 2, 3], "")
    assert not mailbox.tokens(3, [4], "")


async def test_errors_come_after_what_was_delivered() -> None:
    """A stream that fails still hands over its tokens."""
    mailbox = Mailbox(10)
    mailbox.tokens(0, [1], "a")
    mailbox.failed(ResourceExhausted("no"))
    pending = await mailbox.take()
    assert pending.has_response
    assert pending.error is not None


@settings(max_examples=100, deadline=None)
@given(reads=st.lists(st.booleans(), max_size=30))
def test_any_reading_pattern_gives_the_same_stream(reads: list[bool]) -> None:
    """However the reader keeps up, offsets are contiguous and nothing is lost."""

    async def run() -> None:
        mailbox = Mailbox(1000)
        got: list[int] = []
        written = 0
        for read in [*reads, True]:
            mailbox.tokens(written, [written], "")
            written += 1
            if read:
                pending = await mailbox.take()
                assert pending.offset == len(got)
                got += pending.token_ids
        assert got == list(range(written))

    asyncio.run(run())
