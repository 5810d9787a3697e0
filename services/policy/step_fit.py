"""Learns a step-time model from the steps an engine runs, while it runs them."""

import math
from collections import deque

import numpy as np

from services.policy.step_time import A100_LLAMA3_8B, StepShape, StepTimeBin, StepTimeModel

_SCALES = (1.0, 512.0, 32.0, 32_768.0, 1e6)
"""One unit of each feature (step, prefill tokens, decodes, decode context, prefill context products) in the fit."""
_FEATURES = ("step", "prefill token", "decode", "decode context token", "prefill context product")
_MAX_STEP_S = 60.0
_REFIT_STEPS = 32
_RATIO_WINDOW = 1024
_SAFETY_SIGMAS = 2.75
"""Spreads of step time that the safety factor covers at least."""
_CLIP = 0.5
"""Largest log(measured / predicted) that one step may teach."""


class _BinFit:
    """Exponentially forgetting least squares of relative error in one bin."""

    def __init__(self) -> None:
        size = len(_SCALES)
        self.moments = [[0.0] * size for _ in range(size)]
        self.targets = [0.0] * size
        self.weight = 0.0
        self.steps = 0

    def add(self, features: tuple[float, ...], step_s: float, weight: float, keep: float) -> None:
        """Add one step; `keep` is what the steps before it are multiplied by."""
        targets = self.targets
        for i, (row, feature) in enumerate(zip(self.moments, features, strict=True)):
            weighted = weight * feature
            for j in range(i, len(features)):
                row[j] = keep * row[j] + weighted * features[j]
            targets[i] = keep * targets[i] + weighted * step_s
        self.weight = keep * self.weight + 1.0
        self.steps += 1

    def solve(self, prior: np.ndarray, prior_weight: float) -> tuple[np.ndarray, np.ndarray]:
        """Return the non-negative and the unconstrained solution, drawn to `prior` where the steps say little."""
        upper = np.array(self.moments)
        moments = upper + np.triu(upper, 1).T
        targets = np.array(self.targets)
        # Ridge in units of what each feature contributes: unseen features keep their prior, seen ones hardly feel it.
        ridge = prior_weight * np.maximum(np.diag(moments) / max(self.weight, 1.0), 1e-3 * moments[0, 0] + 1e-12)
        moments += np.diag(ridge)
        targets += ridge * prior
        free = np.linalg.solve(moments, targets)
        solution = free
        active = np.ones(len(prior), dtype=bool)
        while (solution < 0).any():
            active &= solution > 0
            solution = np.zeros_like(prior)
            if active.any():
                solution[active] = np.linalg.solve(moments[np.ix_(active, active)], targets[active])
        return solution, free


class OnlineStepTimeFit:
    """Online fit of the step-time model of one engine.

    Per step about 10 us; every 32nd refits. Forgets with a memory of `memory_steps`, faster while it is clearly wrong,
    so that it recovers from a machine that changed. `model()` is always physically possible.
    """

    def __init__(
        self, warm_start: StepTimeModel | None = None, *, memory_steps: int = 2000, quantile: float = 0.99
    ) -> None:
        """Start from a profile.

        Args:
            warm_start: model to begin with; None starts from a profile that is scaled to the first steps.
            memory_steps: steps over which old ones lose most of their weight.
            quantile: of measured / predicted step time that the safety factor covers.
        """
        self._prior = warm_start or A100_LLAMA3_8B
        self._bins = [_BinFit() for _ in self._prior.bins]
        self._keep = 1.0 - 1.0 / memory_steps
        self._quantile = quantile
        self._fitted = self._prior
        self._model = self._prior
        self._scale = 0.0
        """Slow log ratio of measured over the prior's step times: what unseen features are scaled by."""
        self._correction = 0.0
        """Fast log ratio of measured over the fit's step times."""
        self._spread = self._prior.log_sigma
        self._ratios: deque[float] = deque(maxlen=_RATIO_WINDOW)
        self._accepted = False
        self.samples = 0
        self.refused_steps = 0
        self.note = ""
        """Why the last fit or step was refused; empty when the model in use is the last fit."""

    def observe(self, shape: StepShape, step_s: float) -> bool:
        """Learn from one step; False if it cannot be a step (and why, in `note`)."""
        problem = _nonsense(shape, step_s)
        if problem:
            self.refused_steps += 1
            self.note = f"refused a step: {problem}"
            return False
        raw_s = max(self._fitted.step_s(shape), 1e-6)
        predicted_s = raw_s * math.exp(self._correction)
        self._ratios.append(step_s / predicted_s)
        residual = math.log(step_s / raw_s) - self._correction
        self.samples += 1
        self._follow(residual, math.log(step_s / max(self._prior.step_s(shape), 1e-6)))

        features = (
            1.0,
            shape.prefill_tokens / 512.0,
            shape.decodes / 32.0,
            shape.decode_context_tokens / 32_768.0,
            shape.prefill_context_products / 1e6,
        )
        size = abs(residual)
        tolerated = 2.5 * max(self._spread, 0.01)
        robust = 1.0 if size <= tolerated else tolerated / size
        changed = abs(self._correction) > max(0.15, 2 * self._spread)
        bin = self._bins[self._index(shape.prefill_tokens + shape.decodes)]
        bin.add(features, step_s, robust / (predicted_s * predicted_s), self._keep**20 if changed else self._keep)
        if self.samples % _REFIT_STEPS == 0:
            self._refit()
        return True

    def model(self) -> StepTimeModel:
        """Return the present model: the last accepted fit, corrected by recent residuals, with the measured spread."""
        return self._model

    def _index(self, tokens: int) -> int:
        for index, bin in enumerate(self._prior.bins):
            if tokens <= bin.max_tokens:
                return index
        return len(self._prior.bins) - 1

    def _follow(self, residual: float, prior_ratio: float) -> None:
        """Update the correction (decay 0.99, clipped), the spread and the prior's scale."""
        clipped = min(max(residual, -_CLIP), _CLIP)
        rate = max(0.01, 1.0 / self.samples if self.samples < 100 else 0.0)
        self._correction += rate * clipped
        self._spread += 0.01 * (min(abs(residual), 3 * self._spread + 0.02) * 1.2533 - self._spread)
        self._scale += rate * min(max(prior_ratio - self._scale, -3.0), 3.0)

    def _refit(self) -> None:
        """Fit every bin anew, refuse what cannot be, and publish the model."""
        self.note = ""
        bins = tuple(
            self._fit_bin(index, fit, prior)
            for index, (fit, prior) in enumerate(zip(self._bins, self._prior.bins, strict=True))
        )
        fitted = StepTimeModel(bins, source="online")
        old = self._fitted
        if bins != old.bins:
            # What the correction had learned about the old fit is now in the new one.
            self._correction *= 0.5 if self._accepted else 0.0
            self._accepted = True
            self._fitted = fitted
        self._publish()

    def _fit_bin(self, index: int, fit: _BinFit, prior: StepTimeBin) -> StepTimeBin:
        scale = math.exp(self._scale)
        expected = np.array([max(c, 0.0) * unit * scale for c, unit in zip(_slopes(prior), _SCALES, strict=True)])
        if fit.steps < 8:
            return _bin(prior.max_tokens, expected)
        solution, free = fit.solve(expected, prior_weight=2.0)
        present = self._fitted.bins[index]
        problem = _impossible(free, fit)
        if problem or not np.isfinite(solution).all():
            self.note = f"refused a fit: {problem or 'not finite'}"
            return present
        return _bin(prior.max_tokens, solution)

    def _publish(self) -> None:
        factor = math.exp(self._correction)
        bins = tuple(
            StepTimeBin(
                b.max_tokens, b.a0 * factor, b.a1 * factor, b.a2 * factor, b.a3 * factor, b.a4 * factor, b.a5 * factor
            )
            for b in self._fitted.bins
        )
        ordered = sorted(self._ratios)
        tail = ordered[min(int(self._quantile * len(ordered)), len(ordered) - 1)]
        # A request fails by its worst gap in a hundred: the tail of a window of steps alone is too short to tell.
        tail = max(tail, math.exp(_SAFETY_SIGMAS * self._spread))
        weight = min(len(ordered) / 256, 1.0)
        safety = weight * min(max(tail, 1.02), 2.0) + (1 - weight) * self._prior.safety_factor
        self._model = StepTimeModel(
            bins, safety_factor=safety, log_sigma=self._spread, source="online", samples=self.samples
        )


def _nonsense(shape: StepShape, step_s: float) -> str:
    """Say why a step cannot have happened; empty if it can."""
    if not (math.isfinite(step_s) and 0 < step_s <= _MAX_STEP_S):
        return f"step_s must be above 0 and at most {_MAX_STEP_S:g}, got {step_s}"
    counts = (shape.prefill_tokens, shape.decodes, shape.decode_context_tokens, shape.prefill_context_products)
    if min(counts) < 0 or max(counts[:3]) > 1e8 or counts[3] > 1e14:
        return f"token counts are out of range: {counts}"
    if shape.prefill_tokens + shape.decodes == 0:
        return "it computed no token"
    return ""


def _impossible(free: np.ndarray, fit: _BinFit) -> str:
    """Say which feature the unconstrained fit wants to shorten steps, beyond what noise explains."""
    mean_square = fit.moments[0][0] / max(fit.weight, 1.0)
    for i, name in enumerate(_FEATURES):
        typical = math.sqrt(fit.moments[i][i] / max(fit.weight, 1.0) / mean_square) if mean_square > 0 else 0.0
        share = free[i] * typical * math.sqrt(mean_square)
        if share < -0.5:
            return f"steps would get shorter by the {name}"
    return ""


def _slopes(bin: StepTimeBin) -> tuple[float, ...]:
    return (bin.a0, bin.prefill_token_s, bin.a1 + bin.a3, bin.a4, bin.a5)


def _bin(max_tokens: int, solution: np.ndarray) -> StepTimeBin:
    step_s, prefill_s, decode_s, context_s, product_s = (
        float(value) / unit for value, unit in zip(solution, _SCALES, strict=True)
    )
    return StepTimeBin(max_tokens, step_s, 0.0, prefill_s, decode_s, context_s, product_s)
