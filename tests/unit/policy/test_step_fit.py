"""The online fit learns, forgets, and refuses nonsense."""

import csv
import math
import random
import statistics
import time
from pathlib import Path

import pytest

from services.policy.step_fit import OnlineStepTimeFit
from services.policy.step_time import A100_LLAMA3_8B, StepShape, StepTimeBin, StepTimeModel

RECORDED = Path(__file__).with_name("cpu_steps.csv")
TRUE = StepTimeModel((StepTimeBin(0, 0.008, 0.0, 1.2e-4, 2e-5, 2e-7, 3e-9),), safety_factor=1.0)


def shapes(rng: random.Random) -> StepShape:
    """Draw a step as a busy engine runs them."""
    decodes = rng.randint(0, 60)
    prefill = 0 if decodes and rng.random() < 0.3 else rng.randint(1, 1500)
    return StepShape(prefill, decodes, decodes * rng.randint(200, 2000), prefill * rng.randint(0, 2000))


def teach(
    fit: OnlineStepTimeFit, steps: int, *, factor: float = 1.0, sigma: float = 0.03, outliers: float = 0.0
) -> None:
    """Feed steps of the true machine, `factor` times as slow, with noise and rare steps eight times as long."""
    rng = random.Random(5)
    for _ in range(steps):
        shape = shapes(rng)
        spike = 8.0 if rng.random() < outliers else 1.0
        assert fit.observe(shape, factor * TRUE.step_s(shape) * math.exp(rng.gauss(0, sigma)) * spike)


def median_error(model: StepTimeModel, factor: float = 1.0) -> float:
    """Return the median relative error over fresh steps."""
    rng = random.Random(6)
    drawn = [shapes(rng) for _ in range(300)]
    return statistics.median(abs(model.step_s(s) / (factor * TRUE.step_s(s)) - 1) for s in drawn)


@pytest.mark.parametrize("warm", [A100_LLAMA3_8B, None])
def test_recovers_known_coefficients_under_noise_and_outliers(warm: StepTimeModel | None) -> None:
    """From a wrong profile, 1,500 noisy steps with outliers give the true step times within 2%."""
    fit = OnlineStepTimeFit(warm)
    assert median_error(fit.model()) > 0.1
    teach(fit, 1500, outliers=0.005)
    assert median_error(fit.model()) < 0.02
    assert fit.model().bins[-1].a2 == pytest.approx(1.2e-4, rel=0.05)
    assert not fit.model().problems()
    assert fit.note == ""


def test_follows_a_machine_that_became_three_times_slower() -> None:
    """After a change, 400 steps bring the error below 10%."""
    fit = OnlineStepTimeFit(A100_LLAMA3_8B)
    teach(fit, 1500)
    teach(fit, 400, factor=3.0)
    assert median_error(fit.model(), 3.0) < 0.10


@pytest.mark.parametrize("sigma", [0.03, 0.1])
def test_rare_prefills_are_no_outliers(sigma: float) -> None:
    """On a CPU, far from the profile: eight prefills after many decodes tell what a prefill token costs."""
    rng, fit = random.Random(1), OnlineStepTimeFit(A100_LLAMA3_8B)
    slow = StepTimeModel((StepTimeBin(0, 0.045, 0.0, 2.1e-3, 1e-3, 1e-5, 0.0),), safety_factor=1.0)
    for prefill in [0] * 60 + [rng.randint(60, 150) for _ in range(8)]:
        shape = StepShape(prefill, 2, 800)
        fit.observe(shape, slow.step_s(shape) * math.exp(rng.gauss(0, sigma)))
    shape = StepShape(100, 2, 800)
    assert fit.model().step_s(shape) == pytest.approx(slow.step_s(shape), rel=0.12)


def test_steps_of_a_real_engine() -> None:
    """A CPU worker's steps as recorded beside other work: prefills are predicted well soon, and planned safely.

    110M parameters on one shared core; far from the profile, and few of the steps have prefill.
    """
    fit, errors, planned = OnlineStepTimeFit(), [], []
    with RECORDED.open(encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file)):
            counts = (int(row[name]) for name in ("prefill_tokens", "decodes", "decode_context_tokens"))
            shape, step_s = StepShape(*counts), float(row["step_s"])
            model = fit.model()
            if number >= 40 and shape.prefill_tokens:
                errors.append(abs(math.log(step_s / model.step_s(shape))))
                planned.append(step_s <= model.planned_step_s(shape))
            fit.observe(shape, step_s)
    assert len(errors) > 100
    assert statistics.median(errors) < 0.12
    assert statistics.quantiles(errors, n=10)[-1] < 0.25
    assert statistics.fmean(planned) > 0.98


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.2])
def test_safety_factor_follows_the_measured_spread(sigma: float) -> None:
    """The safety factor covers about 3 sigma, and log_sigma is measured."""
    fit = OnlineStepTimeFit(A100_LLAMA3_8B)
    teach(fit, 3000, sigma=sigma)
    model = fit.model()
    assert model.log_sigma == pytest.approx(sigma, rel=0.35)
    assert math.exp(2.2 * sigma) < model.safety_factor < math.exp(4 * sigma) + 0.03


def test_what_was_predicted_before_the_first_fit_is_soon_forgotten() -> None:
    """A machine six times as slow as the profile: some hundred steps later the safety factor is that of its noise."""
    fit = OnlineStepTimeFit(A100_LLAMA3_8B)
    teach(fit, 200, factor=6.0, sigma=0.03)
    assert fit.model().safety_factor < 1.2


def test_predictions_stay_unbiased_under_wide_noise() -> None:
    """With sigma 0.2 the typical error stays small and the safety factor is what grows."""
    fit = OnlineStepTimeFit(A100_LLAMA3_8B)
    teach(fit, 3000, sigma=0.2)
    assert median_error(fit.model()) < 0.08


def test_samples_count_those_behind_the_warm_start() -> None:
    """A fit that goes on from a learned model never claims fewer steps than that model."""
    first = OnlineStepTimeFit(A100_LLAMA3_8B)
    teach(first, 320)
    second = OnlineStepTimeFit(first.model())
    assert second.samples == first.model().samples == 320
    teach(second, 32)
    assert second.model().samples == 352


def test_unseen_features_keep_the_scaled_profile() -> None:
    """After decodes only, on a machine twice as slow, prefill is predicted twice as slow as the profile says."""
    fit = OnlineStepTimeFit(A100_LLAMA3_8B)
    for i in range(600):
        shape = StepShape(0, 20 + i % 30, (20 + i % 30) * 1000)
        fit.observe(shape, 2 * A100_LLAMA3_8B.step_s(shape))
    shape = StepShape(400)
    assert fit.model().step_s(shape) == pytest.approx(2 * A100_LLAMA3_8B.step_s(shape), rel=0.15)


@pytest.mark.parametrize(
    ("shape", "step_s"),
    [
        (StepShape(10), math.nan),
        (StepShape(10), math.inf),
        (StepShape(10), 0.0),
        (StepShape(10), -1.0),
        (StepShape(10), 1e6),
        (StepShape(-1, 2), 0.1),
        (StepShape(0, 0), 0.1),
        (StepShape(10**12), 0.1),
    ],
)
def test_impossible_steps_are_refused(shape: StepShape, step_s: float) -> None:
    """A step that cannot be is counted, explained and not learned."""
    fit = OnlineStepTimeFit(A100_LLAMA3_8B)
    assert not fit.observe(shape, step_s)
    assert (fit.refused_steps, fit.samples) == (1, 0)
    assert "refused a step" in fit.note
    assert fit.model() is A100_LLAMA3_8B


def test_a_falling_fit_is_refused_with_its_reason() -> None:
    """Steps that get shorter with each prefill token yield no such model."""
    fit, rng = OnlineStepTimeFit(A100_LLAMA3_8B), random.Random(1)
    for _ in range(1000):
        prefill = rng.randint(600, 2000)
        fit.observe(StepShape(prefill, 1, 100), 0.5 - 2e-4 * prefill)
    assert "shorter with each prefill token" in fit.note
    assert not fit.model().problems()


def test_scatter_is_refused_with_its_reason() -> None:
    """Step times that have nothing to do with the features yield no model."""
    fit, rng, notes = OnlineStepTimeFit(A100_LLAMA3_8B), random.Random(1), set()
    for _ in range(1000):
        fit.observe(shapes(rng), rng.uniform(0.001, 1.0))
        if fit.samples >= 8:  # the first fit
            notes.add(fit.note)
    assert any("scatter" in note for note in notes)
    assert all(notes), "a fit was accepted"


def test_observe_is_cheap() -> None:
    """A step costs far below a millisecond, refits included."""
    fit = OnlineStepTimeFit(A100_LLAMA3_8B)
    started_s = time.process_time()
    teach(fit, 1000)
    assert (time.process_time() - started_s) / 1000 < 500e-6
