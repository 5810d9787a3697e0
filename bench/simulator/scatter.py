"""Times that scatter as they were measured to: their distribution, and how alike those are that follow each other."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

LAST_SCORE = 3.25
"""Normal score of the outermost quantiles that are kept: one value in 1,700 lies beyond."""
SCORE_STEP = 0.25
SCORES = tuple(SCORE_STEP * place - LAST_SCORE for place in range(round(2 * LAST_SCORE / SCORE_STEP) + 1))
_FEWEST = 30


@dataclass(frozen=True, slots=True)
class Scatter:
    """A distribution by its quantiles at `SCORES`, and the correlation of the normal scores of neighbours."""

    quantiles_s: tuple[float, ...]
    correlation: float = 0.0

    def __post_init__(self) -> None:
        if len(self.quantiles_s) != len(SCORES):
            raise ValueError(f"expected {len(SCORES)} quantiles, got {len(self.quantiles_s)}")
        if not -1 < self.correlation < 1:
            raise ValueError(f"correlation must lie between -1 and 1, got {self.correlation:g}")

    @classmethod
    def of(cls, series: Sequence[Sequence[float]]) -> "Scatter":
        """Return what series of measured times in seconds, each in its order, have in common.

        Raises:
            ValueError: fewer than 30 times.
        """
        values = np.sort(np.concatenate([np.asarray(one, dtype=float) for one in series] or [np.empty(0)]))
        if len(values) < _FEWEST:
            raise ValueError(f"too few times to tell how they scatter: {len(values)}")
        ranks = [NormalDist().cdf(score) for score in SCORES]
        before, after = [], []
        for one in series:
            scores = _scores(values, one)
            before += scores[:-1]
            after += scores[1:]
        correlation = float(np.corrcoef(before, after)[0, 1]) if len(before) > 1 and values[0] < values[-1] else 0.0
        quantiles = np.quantile(values, ranks)
        return cls(tuple(round(float(value), 6) for value in quantiles), round(min(max(correlation, -0.99), 0.99), 3))

    def at(self, score: float) -> float:
        """Return the value at a normal score; beyond the outermost quantiles theirs."""
        place = (min(max(score, -LAST_SCORE), LAST_SCORE) + LAST_SCORE) / SCORE_STEP
        below = min(int(place), len(self.quantiles_s) - 2)
        low, high = self.quantiles_s[below], self.quantiles_s[below + 1]
        return low + (place - below) * (high - low)


class ScatterWalk:
    """Draws of a scatter, one after the other: their normal scores are an autoregressive walk with unit variance."""

    def __init__(self, scatter: Scatter, rng: random.Random) -> None:
        self._scatter = scatter
        self._fresh = math.sqrt(1 - scatter.correlation**2)
        self._rng = rng
        self._score = rng.gauss(0, 1)

    def next(self) -> float:
        """Return the next value."""
        self._score = self._scatter.correlation * self._score + self._fresh * self._rng.gauss(0, 1)
        return self._scatter.at(self._score)


def _scores(ordered: npt.NDArray[np.float64], values: Sequence[float]) -> list[float]:
    """Return the normal score of each value among all, which are in ascending order."""
    normal = NormalDist()
    return [normal.inv_cdf((rank - 0.5) / len(ordered)) for rank in np.searchsorted(ordered, values, "right").tolist()]
