"""Calibration of first-token predictions."""

import math
import random

import pytest

from services.policy.calibration import (
    LEVELS,
    P90,
    SLICE_LIMITS_S,
    AccuracyWindow,
    Calibration,
    Confidence,
    prior_slices,
    slice_index,
)

QUEUE_AHEAD_S = (0.0, 0.2, 3.0)


def feed(
    calibration: Calibration, rng: random.Random, count: int, *, bias: float = 1.0, sigma: float = 0.2, slice: int = 2
) -> float:
    """Feed outcomes predict-then-learn; return the share within the bound stated just before each."""
    covered = 0
    for _ in range(count):
        predicted_s = rng.uniform(0.05, 2.0)
        actual_s = predicted_s * bias * math.exp(rng.gauss(0, sigma))
        covered += actual_s <= predicted_s * calibration.slices()[slice].ratios[P90]
        assert calibration.learn(QUEUE_AHEAD_S[slice], predicted_s, actual_s)
    return covered / count


@pytest.mark.parametrize("slice", [0, 1, 2])
@pytest.mark.parametrize(("bias", "sigma"), [(1.0, 0.05), (1.3, 0.2), (0.8, 0.5)])
def test_stated_ninety_per_cent_is_ninety_per_cent(slice: int, bias: float, sigma: float) -> None:
    """After a short start, 87 to 93% of outcomes are within the bound, in every slice, biased or wide."""
    calibration, rng = Calibration(), random.Random(3)
    feed(calibration, rng, 300, bias=bias, sigma=sigma, slice=slice)
    assert 0.87 <= feed(calibration, rng, 1500, bias=bias, sigma=sigma, slice=slice) <= 0.93
    assert calibration.accuracy(slice).bias == pytest.approx(math.exp(sigma**2 / 2) - 1, abs=0.12)


def test_coverage_holds_while_the_machine_drifts() -> None:
    """A bias that grows by half over 2,000 outcomes is followed."""
    calibration, rng = Calibration(), random.Random(4)
    feed(calibration, rng, 200)
    shares = [feed(calibration, rng, 100, bias=1 + 0.025 * k) for k in range(20)]
    assert 0.85 <= sum(shares) / len(shares) <= 0.95


def test_a_sudden_change_demotes_and_learning_restores() -> None:
    """First tokens twice as late as before demote the model with a reason; once learned it is trusted again."""
    calibration, rng = Calibration(), random.Random(5)
    feed(calibration, rng, 300, sigma=0.1)
    assert calibration.confidence(2) is Confidence.CALIBRATED
    feed(calibration, rng, 30, bias=2.0, sigma=0.1)
    assert calibration.confidence(2) is Confidence.DEMOTED
    assert "stated 90% bound" in calibration.note
    feed(calibration, rng, 600, bias=2.0, sigma=0.1)
    assert calibration.confidence(2) is Confidence.CALIBRATED
    assert calibration.note == ""


def test_slices_are_learned_apart() -> None:
    """Outcomes of one load do not move the others, which keep their prior."""
    calibration = Calibration()
    feed(calibration, random.Random(6), 200, bias=3.0, slice=2)
    slices = calibration.slices()
    assert slices[:2] == prior_slices()[:2]
    assert slices[2].ratio(0.5) == pytest.approx(3.0, rel=0.1)
    assert calibration.accuracy(0).samples == 0


def test_quantiles_never_fall() -> None:
    """Ratios rise with the level whatever was learned."""
    calibration, rng = Calibration(), random.Random(7)
    for _ in range(20):
        feed(calibration, rng, 7, bias=rng.uniform(0.1, 5), sigma=1.0)
        ratios = calibration.slices()[2].ratios
        assert list(ratios) == sorted(ratios)
        assert len(ratios) == len(LEVELS)


@pytest.mark.parametrize(
    "numbers",
    [(math.nan, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0), (1.0, 1.0, math.inf), (-1.0, 1.0, 1.0), (1.0, 1e9, 1.0)],
)
def test_impossible_outcomes_teach_nothing(numbers: tuple[float, float, float]) -> None:
    """They are refused and leave everything as it was."""
    calibration = Calibration()
    assert not calibration.learn(*numbers)
    assert calibration.slices() == prior_slices()


def test_slice_limits_belong_to_the_lower_slice() -> None:
    """A queue of exactly the limit is still in the slice."""
    assert [slice_index(s) for s in (0.0, SLICE_LIMITS_S[0][1], SLICE_LIMITS_S[1][1], 1e6)] == [0, 0, 1, 2]


def test_accuracy_of_known_errors() -> None:
    """Figures of a window with known errors."""
    window = AccuracyWindow(4)
    for predicted, bound in ((9.0, 9.5), (1.1, 1.2), (0.9, 0.95), (1.2, 1.3), (1.0, 1.0)):
        window.judge(predicted, 1.0, bound)
    accuracy = window.accuracy()
    assert (accuracy.samples, accuracy.coverage_p90) == (5, 0.75)
    assert accuracy.mape == pytest.approx(0.1)
    assert accuracy.bias == pytest.approx(0.05)
