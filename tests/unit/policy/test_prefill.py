"""The fast prediction of first tokens against the exact walk."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.policy.prefill import predict_in_order, prefill_pace, walk
from services.policy.state import QueuedRequest, Slo
from services.policy.step_time import A100_LLAMA3_8B, StepShape
from services.policy.token_budget import BudgetPolicy, DecodeLoad


def queue_of(lengths: list[int]) -> list[QueuedRequest]:
    """Return a queue of fresh prompts."""
    slo = Slo(ttft_s=2.0, tbt_s=0.1)
    return [QueuedRequest(request_id=str(i), arrival_s=0.0, prompt_tokens=n, slo=slo) for i, n in enumerate(lengths)]


@given(
    st.lists(st.integers(1, 6000), min_size=1, max_size=25),
    st.integers(0, 60),
    st.integers(100, 2500),
    st.sampled_from([BudgetPolicy(), BudgetPolicy(kind="static", static_tokens=512)]),
)
def test_fast_path_is_close_to_the_walk(lengths: list[int], decodes: int, context: int, policy: BudgetPolicy) -> None:
    """Every request's predicted first token is within 10% and one and a half steps of the chunk-by-chunk walk."""
    queue, load = queue_of(lengths), DecodeLoad(decodes, decodes * context)
    pace = prefill_pace(A100_LLAMA3_8B, load, policy, 0.1)
    fast_s = [estimate.mean_s for estimate in predict_in_order(queue, pace)]
    exact_s = walk(queue, A100_LLAMA3_8B, load, policy, 0.1)
    for fast, exact in zip(fast_s, exact_s, strict=True):
        assert fast == pytest.approx(exact, rel=0.10, abs=1.5 * pace.step_s)


@pytest.mark.parametrize("tokens", [1, 100, 400])
def test_alone_on_an_idle_instance_is_one_step(tokens: int) -> None:
    """A prompt that fits into a small step takes exactly that step."""
    pace = prefill_pace(A100_LLAMA3_8B, DecodeLoad(), BudgetPolicy())
    (estimate,) = predict_in_order(queue_of([tokens]), pace)
    assert estimate.mean_s == pytest.approx(A100_LLAMA3_8B.step_s(StepShape(tokens)))


@given(st.lists(st.integers(1, 4000), min_size=2, max_size=10))
def test_predictions_never_fall_along_the_queue(lengths: list[int]) -> None:
    """Whoever is served later is not predicted earlier, and wait plus prefill is the whole."""
    pace = prefill_pace(A100_LLAMA3_8B, DecodeLoad(30, 30_000), BudgetPolicy(), 0.1)
    estimates = predict_in_order(queue_of(lengths), pace)
    large = [e.mean_s for e in estimates if e.mean_s > pace.step_s]
    assert large == sorted(large)
    assert all(math.isclose(e.wait_s + e.prefill_s, e.mean_s) for e in estimates)


def test_work_ahead_delays_the_first() -> None:
    """Prefill in progress counts before the queue."""
    pace = prefill_pace(A100_LLAMA3_8B, DecodeLoad(30, 30_000), BudgetPolicy(), 0.1)
    (free,), (behind,) = predict_in_order(queue_of([500]), pace), predict_in_order(queue_of([500]), pace, 1.0)
    assert behind.mean_s >= free.mean_s + 1.0
