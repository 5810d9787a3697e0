"""Steps that are shorter while nobody who waits needs long ones."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.policy.calm import calm_bound_s
from services.policy.prefill import prefill_pace
from services.policy.state import QueuedRequest, Slo
from services.policy.step_time import A100_LLAMA3_8B
from services.policy.token_budget import STATIC, BudgetPolicy, DecodeLoad

NOW_S, TBT_S = 50.0, 0.1
LOAD = DecodeLoad(30, 30_000)
POLICY = BudgetPolicy(delivery_s=0.01)


def waiting(name: str, tokens: int, left_s: float, **state: Any) -> QueuedRequest:
    """Return a request whose deadline is `left_s` from now."""
    slo = Slo(ttft_s=left_s, tbt_s=TBT_S)
    return QueuedRequest(request_id=name, arrival_s=NOW_S, prompt_tokens=tokens, slo=slo, **state)


def bound_s(queue: list[QueuedRequest], policy: BudgetPolicy = POLICY, given_up: tuple[str, ...] = ()) -> float:
    """Return the bound of a step that may last 90 ms."""
    return calm_bound_s(policy, A100_LLAMA3_8B, LOAD, 0.09, TBT_S, queue, given_up, NOW_S)


def test_steps_are_calm_while_all_have_time() -> None:
    """Twice the delay of delivery less, and at most 30% of the objective; those that were given up hurry nobody."""
    assert bound_s([waiting("a", 2000, 10.0)]) == pytest.approx(0.07)
    assert bound_s([waiting("a", 2000, 10.0)], replace(POLICY, delivery_s=0.05)) == pytest.approx(0.06)
    assert bound_s([waiting("a", 2000, 10.0), waiting("b", 2000, 0.3)]) == 0.09
    late = waiting("late", 9000, 0.1)
    assert bound_s([waiting("a", 2000, 10.0), late], given_up=("late",)) == pytest.approx(0.07)
    assert bound_s([waiting("a", 2000, 10.0), waiting("late", 9000, 0.1, relegated=True)]) == pytest.approx(0.07)


def test_calm_can_be_turned_off() -> None:
    """By its factor, by a static budget, and where there are no decodes to protect."""
    queue = [waiting("a", 2000, 10.0)]
    assert bound_s(queue, replace(POLICY, calm_factor=0.0)) == 0.09
    assert bound_s(queue, replace(POLICY, kind=STATIC)) == 0.09
    assert calm_bound_s(POLICY, A100_LLAMA3_8B, LOAD, math.inf, TBT_S, queue, (), NOW_S) == math.inf
    with pytest.raises(ValueError, match="calm_factor"):
        BudgetPolicy(calm_factor=-1.0)


@given(st.lists(st.tuples(st.integers(1, 4000), st.floats(0.05, 10.0)), min_size=1, max_size=8))
def test_calm_steps_leave_everybody_time(queue: list[tuple[int, float]]) -> None:
    """A calm step is planned only while everybody would make it with time to spare if all further steps were calm."""
    ordered = sorted((waiting(f"q{i}", *one) for i, one in enumerate(queue)), key=lambda one: one.deadline_s)
    if bound_s(ordered) == 0.09:
        return
    pace = prefill_pace(A100_LLAMA3_8B, LOAD, POLICY, TBT_S - 0.02)
    work_s = 0.0
    for request in ordered:
        work_s += pace.remaining_work_s(request)
        assert pace.finish_s(work_s) < 0.75 * request.slo.ttft_s
