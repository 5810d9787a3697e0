"""What gaps gain on their way from the engine to the reader."""

import random

from hypothesis import given
from hypothesis import strategies as st

from services.policy.delivery import MAX_ALLOWANCE_S, DeliverySpread


def spread_of(inflations_s: list[float], step_s: float = 0.05) -> DeliverySpread:
    """Return a spread that has seen these."""
    spread = DeliverySpread()
    for inflation_s in inflations_s:
        spread.observe(step_s + inflation_s, step_s)
    return spread


def test_nothing_is_claimed_before_enough_steps() -> None:
    """A few late tokens at the start are no measurement."""
    assert spread_of([0.02] * 63).allowance_s() == 0.0


def test_allowance_covers_99_gaps_of_100() -> None:
    """It is the 99th percentile of what gaps gain: rare stalls beyond it do not shrink every step."""
    rng = random.Random(1)
    inflations_s = [abs(rng.gauss(0, 0.003)) for _ in range(512)]
    allowance_s = spread_of(inflations_s).allowance_s()
    covered = sum(inflation_s <= allowance_s for inflation_s in inflations_s) / len(inflations_s)
    assert 0.985 <= covered <= 0.995


def test_a_path_that_recovers_is_forgiven() -> None:
    """Only the last steps count."""
    assert spread_of([0.02] * 512 + [0.001] * 512).allowance_s() < 0.0011


@given(st.lists(st.floats(-1, 10), min_size=64, max_size=200))
def test_allowance_is_bounded(inflations_s: list[float]) -> None:
    """Whatever is measured, prefill keeps most of the step."""
    assert 0.0 <= spread_of(inflations_s).allowance_s() <= MAX_ALLOWANCE_S
