"""The predictor's metrics."""

from prometheus_client import Counter, Gauge, Histogram

STEPS = Counter("ascendra_predictor_steps", "Steps learned from.")
REFUSED_STEPS = Counter("ascendra_predictor_refused_steps", "Steps refused because they cannot have happened.")
OUTCOMES = Counter("ascendra_predictor_outcomes", "Outcomes learned from.")
REFUSED_OUTCOMES = Counter("ascendra_predictor_refused_outcomes", "Outcomes not learned from, by reason.", ["reason"])
REFUSED_MODELS = Counter("ascendra_predictor_refused_warm_starts", "Warm-start models that cannot be.")
WORKERS = Gauge("ascendra_predictor_workers", "Workers remembered, by state of their model.", ["confidence"])
WATCHERS = Gauge("ascendra_predictor_watchers", "Streams that follow the models.")
SNAPSHOTS = Counter("ascendra_predictor_snapshots", "Snapshots published.")
STEP_MAPE = Gauge("ascendra_predictor_step_mape", "Mean absolute relative error of step times, over workers.")
COVERAGE = Gauge(
    "ascendra_predictor_ttft_coverage", "Share of first tokens within the stated 90% bound, by load slice.", ["slice"]
)
ASSESS_SECONDS = Histogram(
    "ascendra_predictor_assess_seconds",
    "Time to answer an Assess question.",
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1),
)
