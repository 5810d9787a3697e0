"""The offline fit recovers what was measured, says how good it is, and refuses what cannot be."""

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.policy.step_profile import ImpossibleFit, Step, fit_profile
from services.policy.step_time import StepShape, StepTimeBin, StepTimeModel

MACHINES = st.builds(
    StepTimeBin,
    max_tokens=st.just(0),
    a0=st.floats(2e-3, 2e-2),
    a1=st.just(0.0),
    a2=st.floats(2e-5, 2e-4),
    a3=st.floats(0.0, 1e-4),
    a4=st.floats(0.0, 3e-7),
    a5=st.floats(0.0, 1e-8),
)


def measured(machine: StepTimeBin, count: int = 400, *, sigma: float = 0.02, spikes: float = 0.0) -> list[Step]:
    """Run steps of all kinds on a machine: prefill alone, decodes alone, both; rarely one takes five times as long."""
    model, rng = StepTimeModel((machine,)), random.Random(3)
    steps = []
    for _ in range(count):
        decodes = rng.choice([0, 1, 8, 64])
        prefill = 0 if decodes and rng.random() < 0.4 else round(math.exp(rng.uniform(2, 7.6)))
        shape = StepShape(prefill, decodes, decodes * rng.randint(30, 2000), prefill * rng.choice([0, 0, 500, 3000]))
        factor = math.exp(rng.gauss(0, sigma)) * (5.0 if rng.random() < spikes else 1.0)
        steps.append((shape, model.step_s(shape) * factor))
    return steps


@settings(max_examples=30, deadline=None)
@given(machine=MACHINES)
def test_recovers_any_possible_machine(machine: StepTimeBin) -> None:
    """Noise and outliers aside, step times are met within 3%, and the safety factor covers the noise."""
    fit = fit_profile(measured(machine, spikes=0.01), source="profile:test")
    truth = StepTimeModel((machine,))
    ratios = [fit.model.step_s(shape) / truth.step_s(shape) for shape, _ in measured(machine, 100)]
    assert sorted(abs(ratio - 1) for ratio in ratios)[90] < 0.03
    assert fit.model.problems() == []
    assert 0.01 < fit.model.log_sigma < 0.04
    quality = fit.held_out["all"]
    assert quality.steps == 80
    assert quality.mape < 0.08
    assert quality.coverage >= 0.9
    assert StepTimeModel.from_dict(fit.model.to_dict()) == fit.model


def test_two_ranges_have_their_own_coefficients() -> None:
    """A machine with a bend at 512 tokens is fitted on either side; the quality is told apart."""
    small, large = StepTimeBin(512, 0.01, a2=5e-5), StepTimeBin(0, 0.002, a2=1.2e-4)
    rng = random.Random(4)
    shapes = [StepShape(rng.randint(10, 2000), rng.randint(0, 9), rng.randint(0, 9000)) for _ in range(400)]
    truth = StepTimeModel((small, large))
    steps = [(shape, truth.step_s(shape) * math.exp(rng.gauss(0, 0.01))) for shape in shapes]
    fit = fit_profile(steps, source="profile:test")
    assert [bin.prefill_token_s for bin in fit.model.bins] == pytest.approx([5e-5, 1.2e-4], rel=0.05)
    assert set(fit.held_out) == {"all", "<= 512 tokens", "> 512 tokens"}
    assert max(quality.mape for quality in fit.held_out.values()) < 0.02


def test_held_out_steps_are_the_last_and_teach_nothing() -> None:
    """A machine that changes at the end gives the first model, and says that it is wrong now."""
    machine = StepTimeBin(0, 0.01, a2=1e-4)
    steady = measured(machine)
    changed = [*steady[:320], *((shape, 1.5 * step_s) for shape, step_s in steady[320:])]
    fit, wrong = (fit_profile(steps, source="profile:test") for steps in (steady, changed))
    assert wrong.model == fit.model
    assert wrong.held_out["all"].bias == pytest.approx(1 / 1.5 - 1, abs=0.03)
    assert wrong.held_out["all"].coverage < 0.1 < 0.9 < fit.held_out["all"].coverage


def test_impossible_fits_say_why() -> None:
    """Steps that get shorter with more decodes, pure noise, no time at all, and too few are refused."""
    rng = random.Random(5)
    shapes = [StepShape(0, decodes, decodes * 100) for decodes in range(1, 101)]
    falling = [(shape, 0.1 - 9e-4 * shape.decodes) for shape in shapes]
    with pytest.raises(ImpossibleFit, match="shorter with each decode"):
        fit_profile(falling[::2] + falling[1::2], source="")
    with pytest.raises(ImpossibleFit, match="scatter"):
        fit_profile([(shape, 0.01 * math.exp(rng.gauss(0, 1.5))) for shape in shapes], source="")
    with pytest.raises(ImpossibleFit, match="step_s must be above 0"):
        fit_profile([(shape, 0.0) for shape in shapes], source="")
    with pytest.raises(ImpossibleFit, match="20 steps are too few"):
        fit_profile(falling[:20], source="")
