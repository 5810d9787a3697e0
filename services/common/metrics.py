"""Building blocks of the services' metrics: labels with bounded values, histograms cheap enough for every token."""

from bisect import bisect_left
from collections.abc import Container, Iterable

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

TTFT_BUCKETS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0)
TBT_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
OTHER = "other"
"""Stands for every label value that is not known beforehand."""


def bounded(value: str, known: Container[str]) -> str:
    """Return a label value, or OTHER when it is not a known one: what users send must not make time series."""
    return value if value in known else OTHER


class ClassHistogram(Collector):
    """A histogram by SLO class, at a tenth of the cost of the library's: it may be fed once a token."""

    def __init__(self, name: str, documentation: str, buckets_s: Iterable[float]) -> None:
        self._name = name
        self._documentation = documentation
        self._limits_s = sorted(buckets_s)
        self._series: dict[str, list[float]] = {}

    def straddle(self, objectives_s: Iterable[float]) -> None:
        """Make each objective a bucket's limit, so that the share that met it is read off exactly.

        What was counted under other limits is dropped.
        """
        limits_s = sorted({*self._limits_s, *objectives_s})
        if limits_s != self._limits_s:
            self._limits_s = limits_s
            self._series = {}

    def observe(self, slo_class: str, seconds: float) -> None:
        """Count one time. Classes come from the configuration."""
        series = self._series.get(slo_class)
        if series is None:
            series = self._series[slo_class] = [0.0] * (len(self._limits_s) + 2)
        series[bisect_left(self._limits_s, seconds)] += 1
        series[-1] += seconds

    def collect(self) -> Iterable[Metric]:
        """Return the histogram."""
        family = HistogramMetricFamily(self._name, self._documentation, labels=["slo_class"])
        names = [*map(str, self._limits_s), "+Inf"]
        for slo_class, (*counts, total_s) in self._series.items():
            cumulated = 0.0
            buckets = []
            for name, count in zip(names, counts, strict=True):
                cumulated += count
                buckets.append((name, cumulated))
            family.add_metric([slo_class], buckets, total_s)
        return [family]
