"""What is concluded from a report: progress of started requests, and the step that runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.policy.state import InstanceView, QueuedRequest, Role, Slo
from services.policy.step_time import A100_LLAMA3_8B
from services.policy.telemetry import OTHERS, note_counted, see_step, share_out_progress


def request(name: str, tokens: int, *, started: bool = False) -> QueuedRequest:
    """Return a request that the last report counts."""
    slo = Slo(ttft_s=1.0, tbt_s=0.1)
    return QueuedRequest(request_id=name, arrival_s=0.0, prompt_tokens=tokens, slo=slo, started=started, counted=True)


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.booleans()), max_size=12),
    st.integers(0, 50_000),
)
def test_the_count_is_shared_out_whole(requests: list[tuple[int, bool]], reported: int) -> None:
    """Own requests and others add up to what was reported, unless what cannot have been computed is more."""
    sent = [request(f"r{i}", tokens, started=started) for i, (tokens, started) in enumerate(requests)]
    others = share_out_progress(sent, reported, 5.0)
    left = [one.remaining_tokens for one in sent]
    assert all(left)
    total = sum(left) + (others.remaining_tokens if others else 0)
    assert total == max(reported, sum(1 if one.started else one.prompt_tokens for one in sent))
    assert others is None or (others.request_id == OTHERS and others.started)
    again = share_out_progress(sent, reported, 5.0)
    assert (again, [one.remaining_tokens for one in sent]) == (others, left)


def test_who_was_given_up_has_progressed_last() -> None:
    """Of two started ones, the step served the one that can make it, though the other was sent first."""
    given_up, kept = request("given up", 8000, started=True), request("kept", 1000, started=True)
    given_up.relegated = True
    share_out_progress([given_up, kept], 8400, 5.0)
    assert (given_up.remaining_tokens, kept.remaining_tokens) == (8000, 400)


def test_what_the_report_cannot_know_keeps_its_tokens() -> None:
    """A request that an idle instance has begun since the report has everything left to compute."""
    new = request("new", 2000, started=True)
    new.counted = False
    assert share_out_progress([new], 0, 5.0) is None
    assert new.remaining_tokens == 2000


def test_a_count_that_was_read_wrongly_is_mended_by_the_next() -> None:
    """A prompt that an earlier count was thought to hold has not been computed after all; nobody else is queued."""
    first, second = request("first", 3000, started=True), request("second", 400, started=True)
    second.arrival_s = 0.5
    share_out_progress([first, second], 2, 5.0)
    assert share_out_progress([first, second], 2800, 5.1) is None
    assert (first.remaining_tokens, second.remaining_tokens) == (2400, 400)
    stream = request("stream", 1000, started=True)
    stream.last_token_s, stream.computed_tokens = 4.9, 999  # its KV cache came from elsewhere
    others = share_out_progress([stream], 300, 5.2)
    assert (stream.remaining_tokens, others and others.remaining_tokens) == (1, 299)


def test_a_report_counts_what_came_before_its_step() -> None:
    """An engine takes requests in between two steps: one that came during a step is not in the report of its end."""
    before, during, began = request("before", 700), request("during", 900), request("began", 300, started=True)
    sent = [(before, 0.99), (during, 1.05), (began, 1.01)]
    for one, _ in sent:
        one.counted = False
    note_counted(sent, began_s=1.06, hop_s=0.05)  # a step from 1.03 to 1.13 at the engine
    assert [one.counted for one, _ in sent] == [True, False, True]
    note_counted(sent, began_s=1.16, hop_s=0.05)
    assert during.counted


@pytest.mark.parametrize(
    ("busy", "first_sent_s", "elapsed_s", "tokens"),
    [(True, 9.0, 0.53, 700), (False, 9.9, 0.1, 300), (False, None, None, 0)],
)
def test_when_the_running_step_began(
    busy: bool, first_sent_s: float | None, elapsed_s: float | None, tokens: int
) -> None:
    """At the report of a busy instance; when its first request came to an idle one; never without either."""
    view = InstanceView(worker_id="w", role=Role.LOW, model=A100_LLAMA3_8B, hop_s=0.03)
    sent = [request("first", 300)] if first_sent_s is not None else []
    see_step(view, 10.0, busy=busy, began_s=9.5, queued_tokens=700, sent=sent, first_sent_s=first_sent_s or 0.0)
    assert view.step_elapsed_s == (elapsed_s if elapsed_s is None else pytest.approx(elapsed_s))
    assert view.step_queued_tokens == tokens


def test_the_running_step_serves_who_came_during_the_one_before() -> None:
    """The news that a request started names it for the step that runs now, which the last report knows nothing of."""
    view = InstanceView(worker_id="w", role=Role.LOW, model=A100_LLAMA3_8B)
    counted, came = request("counted", 100), request("came", 500, started=True)
    came.counted = False
    for busy, queued_tokens in ((True, 100), (False, 0)):
        see_step(
            view, 10.0, busy=busy, began_s=9.97, queued_tokens=queued_tokens, sent=[counted, came], first_sent_s=9.9
        )
        assert view.step_elapsed_s == pytest.approx(0.03)
        assert view.step_queued_tokens == queued_tokens + 500
