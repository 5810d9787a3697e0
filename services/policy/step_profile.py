"""Fits a step-time model to steps recorded in a sweep, and judges it on the last of them."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from services.policy.step_fit import BinFit, bin_from_scaled, scaled_features, spread_and_safety, step_problem
from services.policy.step_time import StepShape, StepTimeBin, StepTimeModel

Step: TypeAlias = tuple[StepShape, float]
"""What a step computed, and its seconds."""
_FEATURE_COUNT = 5
_MIN_STEPS = 40
"""Steps below which a bin is not fitted on its own."""
_ROUNDS = 4
"""Of fitting with less weight for what stood out in the round before."""
_PRIOR_STEPS = 1e-3
"""Weight of "it costs nothing" for a feature: only what no step has is decided by it."""


class ImpossibleFit(ValueError):
    """No physically possible model explains the steps; the message says why."""


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a model predicts steps it has not seen."""

    steps: int
    mape: float
    """Mean of |predicted - measured| / measured."""
    bias: float
    """Mean of predicted / measured, less 1: above 0 it is pessimistic."""
    coverage: float
    """Share of steps within the planned time (predicted times the safety factor)."""


@dataclass(frozen=True, slots=True)
class ProfileFit:
    """A model and how good it is."""

    model: StepTimeModel
    held_out: dict[str, Quality]
    """By range of step size, and "all"."""


def fit_profile(
    steps: Sequence[Step],
    *,
    source: str,
    bin_limit_tokens: int = 512,
    held_out_share: float = 0.2,
    quantile: float = 0.98,
) -> ProfileFit:
    """Fit a model to the first steps and judge it on the last.

    Args:
        steps: in order of time.
        source: what the model says of its origin.
        bin_limit_tokens: size at which the second set of coefficients begins, where both have enough steps.
        held_out_share: share of the steps, the last ones, that only judge.
        quantile: of measured over predicted step time that the safety factor covers at least.

    Raises:
        ImpossibleFit: too few steps, one that cannot have happened, or times that no possible model explains.
    """
    for shape, step_s in steps:
        if problem := step_problem(shape, step_s):
            raise ImpossibleFit(f"a step is impossible: {problem}")
    split = round(len(steps) * (1 - held_out_share))
    seen, unseen = steps[:split], steps[split:]
    if len(seen) < _MIN_STEPS or not unseen:
        raise ImpossibleFit(f"{len(steps)} steps are too few: measure longer")
    small = [step for step in seen if _tokens(step) <= bin_limit_tokens]
    large = [step for step in seen if _tokens(step) > bin_limit_tokens]
    if min(len(small), len(large)) < _MIN_STEPS:
        bins = [_fit_bin(seen, 0)]
    else:
        bins = [_fit_bin(small, bin_limit_tokens), _fit_bin(large, 0)]
    model = StepTimeModel(tuple(bins), source=source, samples=len(seen))
    log_sigma, safety = spread_and_safety([step_s / model.step_s(shape) for shape, step_s in seen], quantile)
    model = replace(model, log_sigma=log_sigma, safety_factor=safety)
    return ProfileFit(model, _judge_by_bin(model, unseen))


def judge(model: StepTimeModel, steps: Sequence[Step]) -> Quality:
    """Return how well a model predicts some steps, at least one."""
    ratios = [model.step_s(shape) / step_s for shape, step_s in steps]
    return Quality(
        steps=len(ratios),
        mape=statistics.fmean(abs(ratio - 1) for ratio in ratios),
        bias=statistics.fmean(ratios) - 1,
        coverage=statistics.fmean(ratio * model.safety_factor >= 1 for ratio in ratios),
    )


def _judge_by_bin(model: StepTimeModel, steps: Sequence[Step]) -> dict[str, Quality]:
    found = {"all": judge(model, steps)}
    for bin in model.bins if len(model.bins) > 1 else ():
        if inside := [step for step in steps if model.bin_of(_tokens(step)) is bin]:
            name = f"<= {bin.max_tokens}" if bin.max_tokens else f"> {model.bins[-2].max_tokens}"
            found[f"{name} tokens"] = judge(model, inside)
    return found


def _fit_bin(steps: Sequence[Step], max_tokens: int) -> StepTimeBin:
    """Return the coefficients that fit best relative to each step's time, outliers apart. Raises ImpossibleFit."""
    predicted = [step_s for _, step_s in steps]
    weights = [1.0] * len(steps)
    problem = ""
    bin = StepTimeBin(max_tokens, 0.0)
    for _ in range(_ROUNDS):
        fit = BinFit()
        for (shape, step_s), predicted_s, weight in zip(steps, predicted, weights, strict=True):
            fit.add(scaled_features(shape), step_s, weight / (step_s * predicted_s), keep=1.0)
        solution, problem = fit.solve(np.zeros(_FEATURE_COUNT), _PRIOR_STEPS)
        bin = bin_from_scaled(max_tokens, solution)
        model = StepTimeModel((replace(bin, max_tokens=0),))
        predicted = [max(model.step_s(shape), 1e-6) for shape, _ in steps]
        residuals = [math.log(step_s / expected_s) for (_, step_s), expected_s in zip(steps, predicted, strict=True)]
        weights = _robust_weights(residuals)
    if problem:
        where = f"steps of at most {max_tokens} tokens" if max_tokens else "the largest steps"
        raise ImpossibleFit(f"no possible model explains {where}: {problem}")
    return bin


def _robust_weights(residuals: Sequence[float]) -> list[float]:
    spread = 1.4826 * statistics.median(map(abs, residuals))
    tolerated = 2.5 * max(spread, 0.01)
    return [1.0 if abs(r) <= tolerated else (tolerated / abs(r)) ** 2 for r in residuals]


def _tokens(step: Step) -> int:
    return step[0].prefill_tokens + step[0].decodes
