"""Risk of many requests on many instances."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.policy.order import OrderPolicy, order_waiting
from services.policy.prefill import predict_in_order, prefill_pace
from services.policy.relegation import RULES
from services.policy.risk import RiskInstance, RiskTable, assess
from services.policy.state import QueuedRequest, Slo
from services.policy.step_time import A100_LLAMA3_8B
from services.policy.token_budget import BudgetPolicy, DecodeLoad
from services.policy.value_functions import VALUE_FUNCTIONS

INSTANCE = RiskInstance(model=A100_LLAMA3_8B, decodes=30, decode_context_tokens=30_000, min_tbt_s=0.1)


def assess_all(
    tokens: list[int],
    ages_s: list[float],
    home: list[int],
    value: str = "llf",
    relegation: str = "none",
    slo_s: float = 2.0,
) -> RiskTable:
    """Assess requests on two like instances."""
    n = len(tokens)
    columns = (np.array(home), np.array(tokens), np.array(ages_s), np.full(n, slo_s), np.full(n, 0.1))
    return assess([INSTANCE, INSTANCE], *columns, value=value, relegation=relegation)


@given(
    st.lists(st.tuples(st.integers(1, 5000), st.floats(0, 3)), min_size=1, max_size=15),
    st.sampled_from(sorted(VALUE_FUNCTIONS)),
    st.sampled_from(RULES),
)
def test_agrees_with_the_one_order(queue: list[tuple[int, float]], value: str, relegation: str) -> None:
    """What is not given up is predicted as order_waiting and predict_in_order say."""
    tokens, ages_s = [t for t, _ in queue], [round(age, 3) + i * 1e-4 for i, (_, age) in enumerate(queue)]
    requests = [
        QueuedRequest(request_id=str(i), arrival_s=-age, prompt_tokens=t, slo=Slo(ttft_s=2.0, tbt_s=0.1))
        for i, (t, age) in enumerate(zip(tokens, ages_s, strict=True))
    ]
    pace = prefill_pace(A100_LLAMA3_8B, DecodeLoad(30, 30_000), BudgetPolicy(), 0.1)
    order = order_waiting(requests, 0.0, pace, OrderPolicy(value_function=value, relegation=relegation))
    kept = [r for r in order.ordered if r.request_id not in order.newly_relegated]
    table = assess_all(tokens, ages_s, [0] * len(queue), value, relegation)
    for request, estimate in zip(kept, predict_in_order(kept, pace), strict=True):
        row = int(request.request_id)
        assert table.ttft_mean_s[row, 0] == pytest.approx(ages_s[row] + estimate.mean_s, rel=1e-6)


def test_probabilities_and_quantiles_are_ordered() -> None:
    """Bounds rise, probabilities are within 0 and 1 and grow with the queue."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 4000, 60).tolist()
    table = assess_all(tokens, rng.uniform(0, 1, 60).tolist(), rng.integers(-1, 2, 60).tolist(), "edf", "moore_hodgson")
    assert (table.ttft_p50_s <= table.ttft_p90_s).all()
    assert (table.tbt_mean_s <= table.tbt_p90_s).all()
    for column in (table.miss_ttft, table.miss_tbt):
        assert ((column >= 0) & (column <= 1)).all()
    order = np.argsort(table.laxity_s[:, 0])
    assert table.miss_ttft[order[:10], 0].mean() > table.miss_ttft[order[-10:], 0].mean()
    assert np.allclose(table.laxity_s, 2.0 - table.ttft_mean_s)


def test_idle_and_hopeless_requests_are_told_apart() -> None:
    """An old long prompt misses nearly surely, a fresh short one hardly ever."""
    table = assess_all([6000, 100], [1.9, 0.0], [-1, -1])
    assert table.miss_ttft[0].min() > 0.99
    assert table.miss_ttft[1].max() < 0.01
    assert table.latest_move_s[0].max() < 0 < table.latest_move_s[1].min()


def test_no_requests_and_no_instances() -> None:
    """Empty questions have empty answers."""
    assert assess_all([], [], []).ttft_mean_s.shape == (0, 2)
    empty = np.array([], dtype=np.int64)
    none = assess([], empty, empty, empty.astype(float), empty.astype(float), empty.astype(float))
    assert none.miss_ttft.shape == (0, 0)


def test_a_thousand_requests_on_eight_instances_take_milliseconds() -> None:
    """The best of several runs stays far below what a step takes."""
    rng, n = np.random.default_rng(0), 1000
    arguments = (
        rng.integers(-1, 8, n), rng.integers(50, 4000, n), rng.uniform(0, 1, n), np.full(n, 2.0), np.full(n, 0.1),
    )  # fmt: skip
    durations_s = []
    for _ in range(8):
        began_s = time.process_time()
        assess([INSTANCE] * 8, *arguments)
        durations_s.append(time.process_time() - began_s)
    assert min(durations_s) < 0.02
