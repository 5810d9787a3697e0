"""How wrong TTFT predictions are, by load: residual quantiles, coverage and bias, judged before they are learned."""

import enum
import math
from collections import deque
from dataclasses import dataclass, field
from functools import cache

SLICE_LIMITS_S: tuple[tuple[str, float], ...] = (("idle", 0.02), ("busy", 0.5), ("saturated", 0.0))
"""Load slices: name and most seconds of queue ahead; 0 is no limit."""
LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
P50, P90 = LEVELS.index(0.5), LEVELS.index(0.9)
_PRIOR_SIGMA = (0.10, 0.20, 0.30)
"""Spread of log(actual / predicted) assumed in each slice before outcomes are seen."""
_NORMAL = (-1.6449, -1.2816, -0.6745, 0.0, 0.6745, 1.2816, 1.6449, 2.3263)


class Confidence(enum.IntEnum):
    """How far an estimate can be trusted; values as in the proto."""

    CALIBRATED = 1
    FITTED = 2
    PRIOR = 3
    DEMOTED = 4


@dataclass(frozen=True, slots=True)
class ResidualSlice:
    """Quantiles of actual / predicted remaining TTFT among predictions with a like queue ahead."""

    name: str
    max_queue_ahead_s: float
    """0: no limit."""
    levels: tuple[float, ...]
    ratios: tuple[float, ...]
    """Never decreasing."""
    samples: int = 0

    def ratio(self, level: float) -> float:
        """Return the quantile at a level, interpolated."""
        return _interpolate(level, self.levels, self.ratios)


@cache
def prior_slices() -> tuple[ResidualSlice, ...]:
    """Return the residuals assumed before anything was learned."""
    return tuple(
        ResidualSlice(name, limit_s, LEVELS, tuple(math.exp(sigma * z) for z in _NORMAL))
        for (name, limit_s), sigma in zip(SLICE_LIMITS_S, _PRIOR_SIGMA, strict=True)
    )


def slice_index(queue_ahead_s: float) -> int:
    """Return the index of the load slice of a prediction with so many seconds of queue ahead."""
    for index, (_, limit_s) in enumerate(SLICE_LIMITS_S):
        if limit_s and queue_ahead_s <= limit_s:
            return index
    return len(SLICE_LIMITS_S) - 1


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How well predictions did in the recent window; each judged before it was learned from."""

    samples: int = 0
    median_ape: float = 0.0
    mape: float = 0.0
    p90_ape: float = 0.0
    bias: float = 0.0
    """Mean of (predicted - actual) / actual; negative is optimistic."""
    coverage_p90: float = 0.0


class AccuracyWindow:
    """Errors of the last predictions."""

    def __init__(self, size: int = 512) -> None:
        self._errors: deque[float] = deque(maxlen=size)
        self._covered: deque[bool] = deque(maxlen=size)
        self.samples = 0

    def judge(self, predicted: float, actual: float, bound_p90: float) -> bool:
        """Record one prediction against what happened; return whether it was within its 90% bound."""
        covered = actual <= bound_p90
        self._errors.append((predicted - actual) / actual)
        self._covered.append(covered)
        self.samples += 1
        return covered

    def accuracy(self) -> Accuracy:
        """Return the figures of the window."""
        if not self._errors:
            return Accuracy()
        apes = sorted(map(abs, self._errors))
        n = len(apes)
        return Accuracy(
            samples=self.samples,
            median_ape=apes[n // 2],
            mape=math.fsum(apes) / n,
            p90_ape=apes[min(int(0.9 * n), n - 1)],
            bias=math.fsum(self._errors) / n,
            coverage_p90=sum(self._covered) / n,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationPolicy:
    """Windows and thresholds of the calibration."""

    window: int = 512
    """Outcomes kept by slice."""
    min_samples: int = 50
    """Outcomes before a slice counts as calibrated."""
    prior_samples: int = 20
    """Weight of the prior among the outcomes, while they are few."""
    demote_below: float = 0.70
    """Recent coverage of the 90% bound that demotes the model ..."""
    restore_above: float = 0.85
    """... and the one that restores it."""
    recent: int = 60
    """Outcomes that "recent" averages over."""
    adapt: float = 0.003
    """How fast the level behind the stated 90% bound follows misses (adaptive conformal inference). Bounds are stated
    anew after some hundred outcomes only: a level that follows faster overshoots, and coverage falls."""


class DriftAlarm:
    """Demotes a model whose recent predictions leave their 90% bound too often; restores it when they keep it again."""

    def __init__(self, what: str, policy: CalibrationPolicy | None = None) -> None:
        self.policy = policy or CalibrationPolicy()
        self.demoted = False
        self.note = ""
        """Why it is demoted; empty if it is not."""
        self._what = what
        self._recent_coverage = 0.9
        self._judged = 0

    def judge(self, covered: bool) -> None:
        """Take in whether one prediction was within its bound."""
        policy = self.policy
        self._judged += 1
        self._recent_coverage += (covered - self._recent_coverage) / policy.recent
        if not self.demoted and self._judged >= policy.recent // 2 and self._recent_coverage < policy.demote_below:
            self.demoted = True
            share = f"{self._recent_coverage:.0%}"
            self.note = f"demoted: {share} of recent {self._what} were within the stated 90% bound"
        elif self.demoted and self._recent_coverage > policy.restore_above:
            self.demoted = False
            self.note = ""


@dataclass(slots=True)
class _Slice:
    """One load slice's outcomes."""

    ratios: deque[float]
    accuracy: AccuracyWindow
    level_p90: float = 0.9
    since_summary: int = 0
    summary: ResidualSlice | None = field(default=None)


class Calibration:
    """Residuals of one worker's TTFT predictions by load slice, learned as outcomes arrive in time order."""

    def __init__(self, policy: CalibrationPolicy | None = None) -> None:
        self.policy = policy or CalibrationPolicy()
        self._slices = [
            _Slice(deque(maxlen=self.policy.window), AccuracyWindow(self.policy.window)) for _ in SLICE_LIMITS_S
        ]
        self._priors = prior_slices()
        self._alarm = DriftAlarm("TTFTs", self.policy)

    def learn(
        self,
        queue_ahead_s: float,
        predicted_s: float,
        actual_s: float,
        stated_p90_s: float = 0.0,
        stated_p50_s: float = 0.0,
    ) -> bool:
        """Judge a prediction by its outcome, then learn from it; False if the numbers cannot be.

        Args:
            predicted_s: predicted remaining time to first token, mean.
            actual_s: what it took from the same instant.
            stated_p90_s: 90% bound that was given out; 0: what this calibration would have stated.
            stated_p50_s: median that was given out; 0: what this calibration would have stated.
        """
        numbers = (queue_ahead_s, predicted_s, actual_s, stated_p90_s, stated_p50_s)
        if not all(map(math.isfinite, numbers)) or min(numbers) < 0 or not 0 < predicted_s < 3600:
            return False
        if not 0 < actual_s < 3600:
            return False
        index = slice_index(queue_ahead_s)
        own = self._slices[index]
        ratios = self._summary(index).ratios
        bound_s = stated_p90_s or predicted_s * ratios[P90]
        covered = own.accuracy.judge(stated_p50_s or predicted_s * ratios[P50], actual_s, bound_s)
        self._alarm.judge(covered)
        step = self.policy.adapt
        own.level_p90 = min(max(own.level_p90 + step * ((not covered) - 0.1), 0.75), 0.99)
        own.ratios.append(actual_s / predicted_s)
        own.since_summary += 1
        return True

    @property
    def demoted(self) -> bool:
        """Recent predictions left their stated bound too often."""
        return self._alarm.demoted

    @property
    def note(self) -> str:
        """Why it is demoted; empty if it is not."""
        return self._alarm.note

    def slices(self) -> tuple[ResidualSlice, ...]:
        """Return the residual quantiles of every slice."""
        return tuple(self._summary(index) for index in range(len(self._slices)))

    def accuracy(self, index: int) -> Accuracy:
        """Return the figures of one slice."""
        return self._slices[index].accuracy.accuracy()

    def confidence(self, index: int) -> Confidence:
        """Return how far to trust the residuals of one slice."""
        if self.demoted:
            return Confidence.DEMOTED
        enough = len(self._slices[index].ratios) >= self.policy.min_samples
        return Confidence.CALIBRATED if enough else Confidence.FITTED

    def _summary(self, index: int) -> ResidualSlice:
        own = self._slices[index]
        prior = self._priors[index]
        if not own.ratios:
            return prior
        if own.summary is None or own.since_summary >= max(len(own.ratios) // 16, 1):
            own.summary = self._summarise(own, prior)
            own.since_summary = 0
        return own.summary

    def _summarise(self, own: _Slice, prior: ResidualSlice) -> ResidualSlice:
        """Return the quantiles of the window, blended with the prior while outcomes are few."""
        ordered = sorted(own.ratios)
        weight = len(ordered) / (len(ordered) + self.policy.prior_samples)
        if len(ordered) >= self.policy.window // 2:
            weight = 1.0
        ratios = []
        largest = 0.0
        for level, prior_ratio in zip(LEVELS, prior.ratios, strict=True):
            used = own.level_p90 if level == LEVELS[P90] else level
            largest = max(largest, weight * _quantile(ordered, used) + (1 - weight) * prior_ratio)
            ratios.append(largest)
        return ResidualSlice(prior.name, prior.max_queue_ahead_s, LEVELS, tuple(ratios), own.accuracy.samples)


def _quantile(ordered: list[float], level: float) -> float:
    """Return a quantile as conformal prediction takes it: of n + 1 places."""
    place = level * (len(ordered) + 1) - 1
    low = min(max(int(place), 0), len(ordered) - 1)
    high = min(low + 1, len(ordered) - 1)
    share = min(max(place - low, 0.0), 1.0)
    return ordered[low] * (1 - share) + ordered[high] * share


def _interpolate(x: float, xs: tuple[float, ...], ys: tuple[float, ...]) -> float:
    if x <= xs[0]:
        return ys[0]
    for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return ys[-1]
