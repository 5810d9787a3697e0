"""The predictor's metrics."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

STEPS = Counter("ascendra_predictor_steps", "Steps learned from.")
REFUSED_STEPS = Counter("ascendra_predictor_refused_steps", "Steps refused because they cannot have happened.")
OUTCOMES = Counter("ascendra_predictor_outcomes", "Outcomes learned from.")
REFUSED_OUTCOMES = Counter("ascendra_predictor_refused_outcomes", "Outcomes not learned from, by reason.", ["reason"])
REFUSED_MODELS = Counter("ascendra_predictor_refused_warm_starts", "Warm-start models that cannot be.")
WORKERS = Gauge("ascendra_predictor_workers", "Workers remembered, by state of their model.", ["confidence"])
WATCHERS = Gauge("ascendra_predictor_watchers", "Streams that follow the models.")
SNAPSHOTS = Counter("ascendra_predictor_snapshots", "Snapshots published.")
STEP_MAPE = Gauge("ascendra_predictor_step_mape", "Mean absolute relative error of step times, over workers.")
BIAS = Gauge(
    "ascendra_predictor_ttft_bias_ratio",
    "Mean of (predicted - actual) / actual time to first token, by load slice; below 0 is optimistic.",
    ["slice"],
)
JUDGED = Gauge("ascendra_predictor_ttft_judged", "Predictions that coverage and bias rest on, by slice.", ["slice"])
COVERAGE = Gauge(
    "ascendra_predictor_ttft_coverage", "Share of first tokens within the stated 90% bound, by load slice.", ["slice"]
)
ASSESS_SECONDS = Histogram(
    "ascendra_predictor_assess_seconds",
    "Time to answer an Assess question.",
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1),
)


class ModelRow(NamedTuple):
    """A worker's model."""

    worker_id: str
    age_s: float
    """Since its last telemetry."""
    demoted: bool
    """It drifted: recent predictions were worse than they claimed."""
    step_mape: float
    step_bias: float


class ModelGauges(Collector):
    """Gauges by worker, read when scraped, so that workers that left leave no labels behind."""

    def __init__(self) -> None:
        self.rows: Callable[[], Iterable[ModelRow]] = list

    def collect(self) -> Iterable[Metric]:
        """Return the gauges."""
        labels = ["worker"]
        age = GaugeMetricFamily(
            "ascendra_predictor_telemetry_age_seconds", "Time since a worker's last telemetry.", labels=labels
        )
        demoted = GaugeMetricFamily(
            "ascendra_predictor_model_drifted",
            "1 for a worker whose model is not used until it is better.",
            labels=labels,
        )
        mape = GaugeMetricFamily(
            "ascendra_predictor_worker_step_mape", "Mean absolute relative error of its step times.", labels=labels
        )
        bias = GaugeMetricFamily(
            "ascendra_predictor_worker_step_bias_ratio", "Mean relative error; below 0 is optimistic.", labels=labels
        )
        for row in self.rows():
            age.add_metric([row.worker_id], row.age_s)
            demoted.add_metric([row.worker_id], row.demoted)
            mape.add_metric([row.worker_id], row.step_mape)
            bias.add_metric([row.worker_id], row.step_bias)
        return [age, demoted, mape, bias]


MODELS = ModelGauges()
REGISTRY.register(MODELS)
