"""Learns a step-time model from the steps an engine runs, while it runs them."""

import math
from bisect import bisect_left
from collections import deque
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from services.policy.step_time import A100_LLAMA3_8B, StepShape, StepTimeBin, StepTimeModel

_Vector: TypeAlias = npt.NDArray[np.float64]
_SCALES = (1.0, 512.0, 32.0, 32_768.0, 1e6)
"""One unit of each feature (step, prefill tokens, decodes, decode context, prefill context products) in the fit."""
_FEATURES = ("step", "prefill token", "decode", "decode context token", "prefill context product")
_MAX_STEP_S = 60.0
_REFIT_STEPS = 32
_KIND = 5
"""Steps of a kind, the last ones, whose median tells what contradicts the fit from an outlier."""
_PATIENCE = 4
"""Steps before a contradiction leads to another fit."""
_RECENT = 64
"""Steps that the correction and the detection of a changed machine look at."""
_RATIO_WINDOW = 1024
"""Steps by which the spread is judged, and never more than half of all so far: the first ones were predicted by a
profile of another machine, and would speak for a wide spread until the window is full."""
_SAFETY_SIGMAS = 3.0
"""Spreads of step time that the safety factor covers at least: one step in some 740 is longer. A request of 50
tokens fails by its worst gap: in simulation 2.5 cost 2 to 6% of requests at spreads of 0.1 to 0.2, and 3.3 few."""
_MAX_SAFETY = 2.5
_CLIP = 0.5
"""Largest log(measured / predicted) that one step may teach."""
_MAX_CONSTRAINT_ERROR = 0.01
"""Mean squared relative error that forbidding negative coefficients may add."""
_MAX_ERROR = 0.36
"""Mean squared relative error above which the features explain nothing."""


class BinFit:
    """Exponentially forgetting least squares of relative error in one bin."""

    def __init__(self) -> None:
        size = len(_SCALES)
        self.moments = [[0.0] * size for _ in range(size)]
        self.targets = [0.0] * size
        self.square = 0.0
        """Sum of weighted squared step times."""
        self.weight = 0.0

    def add(self, features: tuple[float, ...], step_s: float, importance: float, keep: float) -> None:
        """Add one step, weighted by `importance`; the weight of the steps before it is multiplied by `keep`."""
        targets = self.targets
        for i, (row, feature) in enumerate(zip(self.moments, features, strict=True)):
            weighted = importance * feature
            for j in range(i, len(features)):
                row[j] = keep * row[j] + weighted * features[j]
            targets[i] = keep * targets[i] + weighted * step_s
        self.square = keep * self.square + importance * step_s * step_s
        self.weight = keep * self.weight + 1.0

    def forget(self, keep: float) -> None:
        """Multiply the weight of all steps so far by `keep`."""
        self.moments = [[keep * moment for moment in row] for row in self.moments]
        self.targets = [keep * target for target in self.targets]
        self.square *= keep
        self.weight *= keep

    def solve(self, prior: _Vector, prior_steps: float) -> tuple[_Vector, str]:
        """Return non-negative coefficients drawn to `prior` where the steps say little, and why they are no good."""
        upper = np.array(self.moments)
        moments = upper + np.triu(upper, 1).T
        targets = np.array(self.targets)
        # Ridge in units of what each feature contributes: unseen features keep their prior, seen ones hardly feel it.
        ridge = (prior_steps / self.weight) * np.maximum(np.diag(moments), 1e-3 * moments[0, 0])
        ridged, aims = moments + np.diag(ridge), targets + ridge * prior
        free: _Vector = np.linalg.solve(ridged, aims)
        solution = free
        active = np.ones(len(prior), dtype=bool)
        while (solution < 0).any():
            active &= solution > 0
            solution = np.zeros_like(prior)
            if active.any():
                solution[active] = np.linalg.solve(ridged[np.ix_(active, active)], aims[active])

        def error(c: _Vector) -> float:
            return float(c @ moments @ c - 2 * targets @ c + self.square) / self.weight

        if not np.isfinite(solution).all():
            return solution, "it is not finite"
        if error(solution) > error(free) + _MAX_CONSTRAINT_ERROR:
            shares = free * np.sqrt(np.diag(moments) / self.weight)
            return solution, f"steps would get shorter with each {_FEATURES[int(np.argmin(shares))]}"
        if error(solution) > _MAX_ERROR:
            return solution, f"step times scatter by {math.sqrt(error(solution)):.0%} around it"
        return solution, ""


class LastValues:
    """The last values of a series, side by side in memory: with many engines they are out of the processor's cache."""

    def __init__(self, most: int) -> None:
        """Start empty.

        Args:
            most: values to keep.
        """
        self._most = most
        self._values: _Vector = np.empty(2 * most)
        self._end = 0
        self._count = 0

    def __len__(self) -> int:
        """Return how many there are."""
        return self._count

    def append(self, value: float, most: int) -> None:
        """Add a value and forget all but the last `most` of those since `clear`."""
        if self._end == len(self._values):
            self._end = self._most
            self._values[: self._most] = self._values[self._most :]
        self._values[self._end] = value
        self._end += 1
        self._count = min(self._count + 1, most, self._most)

    def clear(self) -> None:
        """Forget all."""
        self._count = 0

    def values(self) -> _Vector:
        """Return them, oldest first; valid until the next one."""
        return self._values[self._end - self._count : self._end]


class OnlineStepTimeFit:
    """Online fit of the step-time model of one engine.

    About 20 us a step; every 32nd refits, and where steps of a kind contradict the fit, a few of them. Forgets slowly,
    and at once when recent steps show that the machine changed.
    `model()` is always physically possible: what is not is refused, and `note` says why.
    """

    def __init__(
        self, warm_start: StepTimeModel | None = None, *, memory_steps: int = 2000, quantile: float = 0.98
    ) -> None:
        """Start from a profile.

        Args:
            warm_start: model to begin with; None begins with a public profile, scaled to the first steps.
            memory_steps: steps over which old ones lose most of their weight.
            quantile: of measured / predicted step time that the safety factor covers.
        """
        self._prior = warm_start or A100_LLAMA3_8B
        self._limits = [bin.max_tokens for bin in self._prior.bins[:-1]]
        self._bins = [BinFit() for _ in self._prior.bins]
        self._kinds = [(deque[float](maxlen=_KIND), deque[float](maxlen=_KIND)) for _ in self._prior.bins]
        """Last residuals by bin, of steps without prefill and with."""
        self._fitted_at = 0
        """`samples` at the last fit."""
        self._keep = 1.0 - 1.0 / memory_steps
        self._quantile = quantile
        self._fitted = self._prior
        self._model = self._prior
        self._correction = 0.0
        """Log ratio of recently measured over the fit's step times."""
        self._spread = self._prior.log_sigma
        self._ratios = LastValues(_RATIO_WINDOW)
        self._recent: deque[tuple[StepShape, float]] = deque(maxlen=_RECENT)
        self.samples = self._prior.samples
        """Steps learned from, those behind the warm start included."""
        self.refused_steps = 0
        self.note = ""
        """Why the last fit or step was refused; empty when the model in use is the last fit."""

    def observe(self, shape: StepShape, step_s: float) -> bool:
        """Learn from one step; False if it cannot be a step (and why, in `note`)."""
        problem = step_problem(shape, step_s)
        if problem:
            self.refused_steps += 1
            self.note = f"refused a step: {problem}"
            return False
        predicted_s = max(self._fitted.step_s(shape), 1e-6) * math.exp(self._correction)
        ratio = step_s / predicted_s
        residual = math.log(ratio)
        self._ratios.append(ratio, max(_RECENT, (self.samples - self._prior.samples) // 2))
        self._recent.append((shape, step_s))
        self._correction += 0.01 * min(max(residual, -_CLIP), _CLIP)
        self.samples += 1

        index = bisect_left(self._limits, shape.prefill_tokens + shape.decodes)
        kind = self._kinds[index][shape.prefill_tokens > 0]
        kind.append(residual)
        # What all of its kind show is no outlier, however rare they are: some prefills among thousands of decodes.
        typical = sorted(kind)[len(kind) // 2]
        features = scaled_features(shape)
        size = abs(residual - typical)
        spread = max(self._spread, 0.01)
        tolerated = 2.5 * spread
        robust = 1.0 if size <= tolerated else (tolerated / size) ** 2
        self._bins[index].add(features, step_s, robust / (step_s * predicted_s), self._keep)
        contradicted = len(kind) > _KIND // 2 and abs(typical) > spread and self.samples - self._fitted_at >= _PATIENCE
        if contradicted or self.samples % _REFIT_STEPS == 0 or len(self._recent) == _REFIT_STEPS // 4:
            self._refit()
        return True

    def model(self) -> StepTimeModel:
        """Return the present model: the last accepted fit, corrected by recent residuals, with the measured spread."""
        return self._model

    def _recent_bias(self, model: StepTimeModel) -> float:
        """Return the median of log(measured / predicted) over recent steps."""
        ratios = sorted([step_s / max(model.step_s(shape), 1e-6) for shape, step_s in self._recent])
        return math.log(ratios[len(ratios) // 2])

    def _refit(self) -> None:
        """Fit every bin anew, refuse what cannot be, and publish the model."""
        self.note = ""
        self._fitted_at = self.samples
        if abs(self._recent_bias(self._model)) > max(0.12, self._spread) and len(self._recent) == _RECENT:
            for bin in self._bins:
                bin.forget(0.02)
            self._ratios.clear()
        scale = math.exp(self._recent_bias(self._prior))
        self._fitted = StepTimeModel(
            tuple(self._fit_bin(index, scale) for index in range(len(self._bins))), source="online"
        )
        bias = self._recent_bias(self._fitted)
        noise = 2.5 * self._spread / math.sqrt(len(self._recent))
        self._correction = math.copysign(max(abs(bias) - noise, 0.0), bias)
        self._publish()

    def _fit_bin(self, index: int, scale: float) -> StepTimeBin:
        """Return a bin's new coefficients, or those in use when the new ones cannot be."""
        fit, prior = self._bins[index], self._prior.bins[index]
        expected = np.array([max(c, 0.0) * unit * scale for c, unit in zip(_slopes(prior), _SCALES, strict=True)])
        if fit.weight < 1:
            return bin_from_scaled(prior.max_tokens, expected)
        solution, problem = fit.solve(expected, prior_steps=2.0)
        if problem:
            self.note = f"refused a fit: {problem}"
            return bin_from_scaled(prior.max_tokens, np.maximum(_scaled(self._fitted.bins[index]), 0.0))
        return bin_from_scaled(prior.max_tokens, solution)

    def _publish(self) -> None:
        factor = math.exp(self._correction)
        bins = tuple(bin_from_scaled(bin.max_tokens, factor * _scaled(bin)) for bin in self._fitted.bins)
        safety = self._prior.safety_factor
        count = len(self._ratios)
        if count:
            spread, measured = spread_and_safety(self._ratios.values(), self._quantile)
            weight = min(count / 256, 1.0)
            self._spread += weight * (spread - self._spread)
            safety += weight * (measured - safety)
        self._model = StepTimeModel(
            bins, safety_factor=safety, log_sigma=self._spread, source="online", samples=self.samples
        )


def scaled_features(shape: StepShape) -> tuple[float, ...]:
    """Return the features of a step in the units of the fit."""
    return (
        1.0,
        shape.prefill_tokens / 512.0,
        shape.decodes / 32.0,
        shape.decode_context_tokens / 32_768.0,
        shape.prefill_context_products / 1e6,
    )


def spread_and_safety(ratios: npt.ArrayLike, quantile: float) -> tuple[float, float]:
    """Return the standard deviation of log(measured / predicted) and the safety factor that these ratios ask for.

    Args:
        ratios: measured over predicted step times, shape (n,), at least one.
        quantile: of the ratios that the factor covers at least.
    """
    ordered = np.sort(ratios)
    count = len(ordered)
    low, middle, high, upper, tail = (
        float(ordered[min(int(level * count), count - 1)]) for level in (0.16, 0.5, 0.84, 0.9, quantile)
    )
    # The window is too short to show the tail that matters: it is drawn out from the spread above the median.
    measured = max(tail, (upper / middle) ** (_SAFETY_SIGMAS / 1.2816))
    return math.log(high / low) / 2, min(max(measured, 1.02), _MAX_SAFETY)


def step_problem(shape: StepShape, step_s: float) -> str:
    """Say why a step cannot have happened; empty if it can."""
    if not (math.isfinite(step_s) and 0 < step_s <= _MAX_STEP_S):
        return f"step_s must be above 0 and at most {_MAX_STEP_S:g}, got {step_s}"
    counts = (shape.prefill_tokens, shape.decodes, shape.decode_context_tokens, shape.prefill_context_products)
    if min(counts) < 0 or max(counts[:3]) > 1e8 or counts[3] > 1e14:
        return f"token counts are out of range: {counts}"
    if shape.prefill_tokens + shape.decodes == 0:
        return "it computed no token"
    return ""


def _slopes(bin: StepTimeBin) -> tuple[float, ...]:
    return (bin.a0, bin.prefill_token_s, bin.a1 + bin.a3, bin.a4, bin.a5)


def _scaled(bin: StepTimeBin) -> _Vector:
    return np.array([slope * unit for slope, unit in zip(_slopes(bin), _SCALES, strict=True)])


def bin_from_scaled(max_tokens: int, solution: _Vector) -> StepTimeBin:
    """Return a bin from coefficients in the units of the fit."""
    step_s, prefill_s, decode_s, context_s, product_s = (
        float(value) / unit for value, unit in zip(solution, _SCALES, strict=True)
    )
    return StepTimeBin(max_tokens, step_s, 0.0, prefill_s, decode_s, context_s, product_s)
