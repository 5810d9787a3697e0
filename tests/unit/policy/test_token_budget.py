"""The token budget keeps steps within their bound."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.policy.step_time import A100_LLAMA3_8B, StepShape, StepTimeModel
from services.policy.token_budget import BudgetPolicy, Chunk, DecodeLoad, largest_prefill, prefill_budget, step_bound_s
from tests.unit.policy.strategies import loads, models

chunk_lists = st.lists(st.tuples(st.integers(1, 4000), st.integers(0, 8000)), max_size=5)


def shape_of(load: DecodeLoad, tokens: int, chunks: list[Chunk]) -> StepShape:
    """Return the step that prefills the first `tokens` tokens of the chunks."""
    products, left = 0, tokens
    for wanted, context in chunks:
        products += min(wanted, left) * context
        left -= min(wanted, left)
    return StepShape(tokens, load.decodes, load.context_tokens, products)


@given(models, loads, st.floats(0.005, 0.3), chunk_lists)
def test_planned_step_keeps_the_bound(
    model: StepTimeModel, load: DecodeLoad, bound_s: float, chunks: list[Chunk]
) -> None:
    """No planned step exceeds the bound unless the floor alone, beside these decodes, does."""
    policy = BudgetPolicy(delivery_s=0.001)
    budget = prefill_budget(policy, model, load, bound_s, chunks)
    if budget > policy.floor_tokens:
        assert model.planned_step_s(shape_of(load, budget, chunks)) <= bound_s - policy.delivery_s + 1e-9
    assert policy.floor_tokens <= budget <= max(policy.max_tokens - load.decodes, policy.floor_tokens)


@given(models, loads, st.floats(0.005, 0.3), chunk_lists)
def test_no_larger_prefill_would_fit(
    model: StepTimeModel, load: DecodeLoad, limit_s: float, chunks: list[Chunk]
) -> None:
    """Of all prefills up to the cap, the largest that fits is found, across the jump between bins too."""
    most = 2048
    found = largest_prefill(model, load, limit_s, most, chunks)
    for larger in {found + 1, found + 7, 512 - load.decodes, 513 - load.decodes, most}:
        if found < larger <= most:
            assert model.step_s(shape_of(load, larger, chunks)) > limit_s - 1e-7


def test_context_of_chunks_shrinks_the_budget() -> None:
    """A chunk far into a long prompt attends to what came before, so fewer tokens fit."""
    load = DecodeLoad(20, 20_000)
    fresh = prefill_budget(BudgetPolicy(), A100_LLAMA3_8B, load, 0.1)
    deep = prefill_budget(BudgetPolicy(), A100_LLAMA3_8B, load, 0.1, [(4000, 16_000)])
    assert deep < 0.8 * fresh


def test_bound_follows_the_oldest_last_token() -> None:
    """The bound is the smallest slack, never more than an objective; a lost gap asks for its plain objective."""
    assert step_bound_s([(9.98, 0.1), (9.95, 0.1)], 10.0) == pytest.approx(0.05)
    assert step_bound_s([(10.5, 0.1)], 10.0) == 0.1
    assert step_bound_s([(9.0, 0.1), (10.0, 0.2)], 10.0) == 0.1
    assert step_bound_s([], 10.0) == math.inf


def test_without_decodes_the_cap_holds() -> None:
    """With no gap to protect, a step prefills up to the cap."""
    assert prefill_budget(BudgetPolicy(max_tokens=4096), A100_LLAMA3_8B, DecodeLoad(), math.inf) == 4096


def test_static_budget_counts_decodes() -> None:
    """A static budget is for the whole step, and never below the floor."""
    policy = BudgetPolicy(kind="static", static_tokens=512, floor_tokens=16)
    assert prefill_budget(policy, A100_LLAMA3_8B, DecodeLoad(100, 1), 0.01) == 412
    assert prefill_budget(policy, A100_LLAMA3_8B, DecodeLoad(600, 1), 0.01) == 16
