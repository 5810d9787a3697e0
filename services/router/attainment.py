"""Share of requests that kept their objectives over a sliding window, by SLO class."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from ascendra.v1 import cluster_pb2

WINDOW_S = 60.0
_MAX_SAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class _Sample:
    ended_s: float
    ttft_s: float
    p99_gap_s: float
    ttft_met: bool
    tbt_met: bool


class Attainment:
    """Samples of the last WINDOW_S seconds, at most 10,000 a class."""

    def __init__(self) -> None:
        self._samples: dict[str, deque[_Sample]] = {}

    def record(
        self, slo_class: str, ended_s: float, ttft_s: float, p99_gap_s: float, *, ttft_met: bool, tbt_met: bool
    ) -> None:
        """Add a request that ended; one that was refused or failed met neither objective."""
        samples = self._samples.setdefault(slo_class, deque(maxlen=_MAX_SAMPLES))
        samples.append(_Sample(ended_s, ttft_s, p99_gap_s, ttft_met, tbt_met))

    def status(self, now_s: float) -> list[cluster_pb2.AttainmentStatus]:
        """Return the figures of each class with samples in the window."""
        result = []
        for slo_class, samples in sorted(self._samples.items()):
            while samples and samples[0].ended_s < now_s - WINDOW_S:
                samples.popleft()
            if samples:
                result.append(_status(slo_class, list(samples)))
        return result


def _status(slo_class: str, samples: list[_Sample]) -> cluster_pb2.AttainmentStatus:
    n = len(samples)
    ttfts = np.array([sample.ttft_s for sample in samples if np.isfinite(sample.ttft_s)])
    gaps = np.array([sample.p99_gap_s for sample in samples])
    return cluster_pb2.AttainmentStatus(
        slo_class=slo_class,
        requests=n,
        joint=sum(sample.ttft_met and sample.tbt_met for sample in samples) / n,
        ttft=sum(sample.ttft_met for sample in samples) / n,
        tbt=sum(sample.tbt_met for sample in samples) / n,
        ttft_p50_s=float(np.quantile(ttfts, 0.5)) if len(ttfts) else 0.0,
        ttft_p99_s=float(np.quantile(ttfts, 0.99)) if len(ttfts) else 0.0,
        gap_p99_s=float(np.quantile(gaps, 0.99)),
    )
