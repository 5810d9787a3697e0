"""What gaps gain on their way from the engine to the reader."""

import random

import pytest
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


def test_room_is_made_for_what_happens_often_enough() -> None:
    """One gap in a hundred fails most requests of 100 tokens: room for it costs less."""
    rng = random.Random(1)
    inflations_s = [rng.uniform(0, 0.002) for _ in range(990)] + [0.008] * 10
    assert spread_of(inflations_s).allowance_s() == pytest.approx(0.008)


def test_rare_stalls_do_not_shrink_every_step() -> None:
    """A stall in a thousand steps fails fewer requests than room for it would."""
    rng = random.Random(1)
    inflations_s = [rng.uniform(0, 0.002) for _ in range(1023)] + [0.025]
    assert spread_of(inflations_s).allowance_s() < 0.0021


@pytest.mark.parametrize("steps", [64, 200, 500, 1024])
def test_the_first_stall_is_no_rate(steps: int) -> None:
    """It is one in a window, however few steps were seen before: room of 25 ms would cost a quarter of the capacity."""
    rng = random.Random(2)
    assert spread_of([rng.uniform(0, 0.002) for _ in range(steps - 1)] + [0.025]).allowance_s() < 0.0021


@pytest.mark.parametrize("late", [1, 10, 64])
def test_room_is_not_made_for_what_it_cannot_save(late: int) -> None:
    """A gap that gains more than the most room there is stays late: room for the others is as it was without it."""
    rng = random.Random(3)
    usual = [rng.uniform(0, 0.002) for _ in range(900)] + [0.008] * 10
    assert spread_of(usual + [0.2] * late).allowance_s() == spread_of(usual).allowance_s() == pytest.approx(0.008)
    assert spread_of([0.2] * 1024).allowance_s() == 0.0


def test_room_is_made_at_once_for_what_always_happens() -> None:
    """A path that adds 20 ms to every other gap is known after 64 steps."""
    assert spread_of([0.02, -0.02] * 32).allowance_s() == pytest.approx(0.02)


def test_a_path_that_recovers_is_forgiven() -> None:
    """Only the last steps count."""
    assert spread_of([0.02] * 1024 + [0.001] * 1024).allowance_s() < 0.0011


@given(st.lists(st.floats(-1, 10), min_size=64, max_size=200))
def test_allowance_is_bounded(inflations_s: list[float]) -> None:
    """Whatever is measured, prefill keeps most of the step."""
    assert 0.0 <= spread_of(inflations_s).allowance_s() <= MAX_ALLOWANCE_S
