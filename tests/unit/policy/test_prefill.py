"""The fast prediction of first tokens against the exact walk."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.policy.prefill import (
    NO_STEP,
    instance_pace,
    predict_in_order,
    prefill_pace,
    step_in_progress,
    walk,
)
from services.policy.state import InstanceView, QueuedRequest, Role, Slo
from services.policy.step_time import A100_LLAMA3_8B, StepShape, StepTimeModel
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


def view_in_step(elapsed_s: float, queued_tokens: int, decodes: int = 30) -> InstanceView:
    """Return an instance whose running step began with so many tokens queued."""
    return InstanceView(
        worker_id="w",
        role=Role.UNIFIED,
        model=A100_LLAMA3_8B,
        decodes=decodes,
        decode_context_tokens=decodes * 1000,
        min_tbt_s=0.1,
        step_elapsed_s=elapsed_s,
        step_queued_tokens=queued_tokens,
    )


@given(st.integers(0, 5000), st.floats(0.0, 0.5))
def test_the_running_step_ends_within_one_step_and_serves_what_was_queued(tokens: int, elapsed_s: float) -> None:
    """What is left of it is never longer than a full step, and its work never more than there was."""
    view = view_in_step(elapsed_s, tokens)
    pace = instance_pace(view, BudgetPolicy())
    running = step_in_progress(view, pace)
    assert 0 <= running.left_s <= pace.step_s + 1e-9
    assert running.work_s <= pace.work_s(tokens) + 1e-9


def test_a_newcomer_waits_for_the_running_step_and_then_for_what_it_leaves() -> None:
    """Half way through a full step of three, its first token comes two and a half steps and its own later."""
    pace = instance_pace(view_in_step(0.0, 0), BudgetPolicy())
    view = view_in_step(0.5 * pace.step_s, 3 * pace.budget_tokens)
    queue = queue_of([3 * pace.budget_tokens, 100])
    queue[0].started = True
    first, newcomer = predict_in_order(queue, pace, running=step_in_progress(view, pace))
    assert first.mean_s == pytest.approx(2.5 * pace.step_s, rel=0.1)
    alone_s = pace.finish_s(pace.work_s(100))
    assert newcomer.mean_s == pytest.approx(2.5 * pace.step_s + alone_s, rel=0.1)
    assert newcomer.hop_s == pytest.approx(0.5 * pace.step_s, rel=0.1)


def test_a_step_that_should_be_over_gave_way_to_the_next() -> None:
    """Reports come late: after one and a half steps of decodes the newcomer waits for half of the second."""
    view = view_in_step(0.0, 0)
    pace = instance_pace(view, BudgetPolicy())
    step_s = pace.finish_s(0.0)
    assert step_in_progress(view_in_step(1.5 * step_s, 0), pace).left_s == pytest.approx(0.5 * step_s)


def test_an_instance_without_work_takes_a_newcomer_at_once() -> None:
    """Whatever it ran is over when nothing was left to run."""
    view = view_in_step(0.2, 50, decodes=0)
    assert step_in_progress(view, instance_pace(view, BudgetPolicy())).left_s == 0.0
    idle = InstanceView(worker_id="w", role=Role.UNIFIED, model=A100_LLAMA3_8B)
    assert step_in_progress(idle, instance_pace(idle, BudgetPolicy())) == NO_STEP


@given(st.integers(0, 60), st.floats(0.0, 5.0), st.floats(0.0, 5.0))
def test_work_within_a_time_is_the_inverse_of_the_time_of_work(decodes: int, time_s: float, work_s: float) -> None:
    """What is done in time is within the limit, and the limit is done in time: exactly within one bin of the model."""
    model = StepTimeModel((A100_LLAMA3_8B.bins[0], replace(A100_LLAMA3_8B.bins[1], a0=0.02)))
    pace = prefill_pace(model, DecodeLoad(decodes, decodes * 500), BudgetPolicy(), 0.1)
    within_s = pace.work_within_s(time_s)
    if pace.finish_s(work_s) <= time_s:
        assert work_s <= within_s
    if within_s > 0:
        assert pace.finish_s(within_s - 2e-9) <= time_s + 1e-6
