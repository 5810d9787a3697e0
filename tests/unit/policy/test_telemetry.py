"""What is concluded from a report: progress of started requests, and the step that runs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.policy.state import InstanceView, QueuedRequest, Role, Slo
from services.policy.step_time import A100_LLAMA3_8B
from services.policy.telemetry import OTHERS, see_step, share_out_progress


def request(name: str, tokens: int, *, started: bool = False) -> QueuedRequest:
    """Return a request as it was sent."""
    return QueuedRequest(
        request_id=name, arrival_s=0.0, prompt_tokens=tokens, slo=Slo(ttft_s=1.0, tbt_s=0.1), started=started
    )


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.booleans()), max_size=12),
    st.integers(0, 50_000),
)
def test_the_count_is_shared_out_whole(requests: list[tuple[int, bool]], reported: int) -> None:
    """Own requests and others add up to what was reported, unless what cannot have been computed is more."""
    sent = [request(f"r{i}", tokens, started=started) for i, (tokens, started) in enumerate(requests)]
    others = share_out_progress([(one, True) for one in sent], reported, 5.0)
    left = [one.remaining_tokens for one in sent]
    assert all(left)
    total = sum(left) + (others.remaining_tokens if others else 0)
    assert total == max(reported, sum(1 if one.started else one.prompt_tokens for one in sent))
    assert others is None or (others.request_id == OTHERS and others.started)
    again = share_out_progress([(one, True) for one in sent], reported, 5.0)
    assert (again, [one.remaining_tokens for one in sent]) == (others, left)


def test_who_was_given_up_has_progressed_last() -> None:
    """Of two started ones, the step served the one that can make it, though the other was sent first."""
    given_up, kept = request("given up", 8000, started=True), request("kept", 1000, started=True)
    given_up.relegated = True
    share_out_progress([(given_up, True), (kept, True)], 8400, 5.0)
    assert (given_up.remaining_tokens, kept.remaining_tokens) == (8000, 400)


def test_what_the_report_cannot_know_keeps_its_tokens() -> None:
    """A request that an idle instance has begun since the report has everything left to compute."""
    new = request("new", 2000, started=True)
    assert share_out_progress([(new, False)], 0, 5.0) is None
    assert new.remaining_tokens == 2000


@pytest.mark.parametrize(
    ("busy", "first_sent_s", "elapsed_s", "tokens"),
    [(True, 9.0, 0.53, 700), (False, 9.9, 0.1, 300), (False, None, None, 0)],
)
def test_when_the_running_step_began(
    busy: bool, first_sent_s: float | None, elapsed_s: float | None, tokens: int
) -> None:
    """At the report of a busy instance; when its first request came to an idle one; never without either."""
    view = InstanceView(worker_id="w", role=Role.LOW, model=A100_LLAMA3_8B, hop_s=0.03)
    first = request("first", 300) if first_sent_s is not None else None
    see_step(view, 10.0, busy=busy, began_s=9.5, queued_tokens=700, first=first, first_sent_s=first_sent_s or 0.0)
    assert view.step_elapsed_s == (elapsed_s if elapsed_s is None else pytest.approx(elapsed_s))
    assert view.step_queued_tokens == tokens
