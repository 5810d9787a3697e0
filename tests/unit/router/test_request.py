"""The request's state machine: offsets, attempts, times, receipts."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascendra.v1 import common_pb2
from services.policy.state import Slo
from services.router.mailbox import Mailbox
from services.router.request import MAX_DECISIONS, DecisionRecord, Delta, Drop, LiveRequest, RequestSpec, State

LOW = common_pb2.ROLE_LOW_PRIORITY
HIGH = common_pb2.ROLE_HIGH_PRIORITY


def make(max_tokens: int = 100, **fields: Any) -> LiveRequest:
    """Return a request that arrived at 10 s."""
    spec = RequestSpec(
        request_id="r",
        prompt=bytes(8),
        sampling=common_pb2.SamplingParameters(max_tokens=max_tokens, seed=7),
        slo=Slo(ttft_s=1.0, tbt_s=0.1),
        **fields,
    )
    return LiveRequest(spec, 10.0, None, Mailbox(100))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_drops_and_repetitions_never_break_the_offsets(data: st.DataObject) -> None:
    """Frames repeated, overlapping, skipped or of an old attempt: what is forwarded is contiguous and right."""
    request = make(max_tokens=60)
    attempt = request.place("w", LOW, "")
    forwarded: list[int] = []
    for step in range(data.draw(st.integers(1, 40))):
        if data.draw(st.booleans()) and step % 7 == 3:
            attempt = request.place("other", HIGH, "moved")
        number = data.draw(st.sampled_from([attempt, attempt, attempt, attempt - 1]))
        offset = max(len(forwarded) + data.draw(st.integers(-3, 2)), 0)
        frame = list(range(offset, offset + data.draw(st.integers(1, 4))))
        before = len(forwarded)
        taken = request.tokens(number, offset, frame, 11.0 + step)
        if isinstance(taken, Drop):
            assert len(request.generated) == before
            continue
        assert number == attempt
        assert offset <= before
        assert taken.offset == before
        forwarded += taken.token_ids
    assert forwarded == list(range(len(forwarded)))
    assert list(request.generated) == forwarded


def test_why_tokens_are_dropped() -> None:
    """Stale attempts, repetitions, gaps and late tokens are told apart."""
    request = make()
    first = request.place("a", LOW, "placed")
    assert request.tokens(first, 0, [1, 2], 10.5) == Delta(0, [1, 2], "", False)
    assert request.tokens(first, 0, [1, 2], 10.6) is Drop.REPEATED
    assert request.tokens(first, 3, [9], 10.6) is Drop.GAP
    request.fence()
    assert request.tokens(first, 2, [3], 10.6) is Drop.STALE_ATTEMPT
    second = request.place("b", LOW, "moved")
    assert request.tokens(first, 2, [3], 10.6) is Drop.STALE_ATTEMPT
    assert request.tokens(second, 1, [2, 3], 10.7) == Delta(2, [3], "", False)
    request.finish(common_pb2.FINISH_REASON_STOP)
    assert request.tokens(second, 3, [4], 10.8) is Drop.ENDED


def test_states_follow_events() -> None:
    """RECEIVED, WAITING, PREFILL, DECODE, FINISHED; a stale start changes nothing."""
    request = make()
    states: list[State] = [request.state]
    first = request.place("a", LOW, "")
    states.append(request.state)
    request.fence()
    second = request.place("b", HIGH, "")
    assert not request.started(first, 1.5)
    states.append(request.state)
    assert request.started(second, 2.0)
    assert not request.started(second, 3.0)
    states.append(request.state)
    request.tokens(second, 0, [1], 10.2)
    states.append(request.state)
    request.finish(common_pb2.FINISH_REASON_LENGTH)
    states.append(request.state)
    assert states == [
        State.RECEIVED,
        State.WAITING,
        State.WAITING,
        State.PREFILL,
        State.DECODE,
        State.FINISHED,
    ]


def test_receipts_say_what_was_achieved() -> None:
    """TTFT, gaps, attempts, first pool, seed and both verdicts."""
    request = make()
    request.place("a", LOW, "placed")
    request.fence()
    second = request.place("b", HIGH, "offloaded")
    request.tokens(second, 0, [1], 10.5)
    for i in range(1, 10):
        request.tokens(second, i, [1], 10.5 + 0.05 * i)
    request.fence()
    third = request.place("c", LOW, "moved")
    request.tokens(third, 10, [1], 11.45)
    receipt = request.finish(common_pb2.FINISH_REASON_STOP)[1].receipt
    assert receipt.ttft_ms == pytest.approx(500)
    assert receipt.max_gap_ms == pytest.approx(500)
    assert receipt.mean_gap_ms == pytest.approx(95)
    assert receipt.ttft_met
    assert not receipt.tbt_met
    assert receipt.pool == HIGH
    assert [(a.number, a.worker_id, a.first_token_offset) for a in receipt.attempts] == [
        (1, "a", 0),
        (2, "b", 0),
        (3, "c", 10),
    ]
    assert receipt.seed == 7


def test_tokens_beyond_the_limit_are_not_forwarded() -> None:
    """max_tokens holds even when a worker goes on."""
    request = make(max_tokens=3)
    attempt = request.place("a", LOW, "")
    assert request.tokens(attempt, 0, [1, 2, 3, 4, 5], 10.5) == Delta(0, [1, 2, 3], "", True)


def test_a_continuation_carries_what_was_generated() -> None:
    """The next attempt is sent the prompt and the tokens, ages instead of times, and counts from the same start."""
    request = make()
    first = request.place("a", LOW, "")
    request.tokens(first, 0, [5, 6], 10.5)
    request.fence()
    request.place("b", LOW, "moved")
    submit = request.submission(3, 10.6)
    assert submit.token_ids == bytes(8) + (5).to_bytes(4, "little") + (6).to_bytes(4, "little")
    assert (submit.generated_tokens, submit.attempt, submit.handle) == (2, 2, 3)
    assert submit.age_ms == pytest.approx(600)
    assert submit.last_token_age_ms == pytest.approx(100)
    assert request.queued().prompt_tokens == 4


def test_decisions_are_bounded() -> None:
    """A request that bounces for ever does not grow for ever."""
    request = make()
    for i in range(2 * MAX_DECISIONS):
        request.decide(DecisionRecord(float(i), "move", ""))
    assert len(request.decisions) == MAX_DECISIONS
    assert request.decisions[-1].at_s == 2 * MAX_DECISIONS - 1
