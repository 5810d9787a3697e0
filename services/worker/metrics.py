"""The worker's own metrics; vLLM's stand beside them under their own names."""

from collections.abc import Callable, Iterable

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from ascendra.v1 import common_pb2
from services.common.metrics import TBT_BUCKETS_S

LIVE = Gauge("ascendra_worker_live_requests", "Unfinished requests of all routers.")
ROUTERS = Gauge("ascendra_worker_attached_routers", "Attached routers.")
FAILED = Counter("ascendra_worker_failed_requests", "Requests refused or failed, by reason.", ["reason"])
WITHDRAWN = Counter("ascendra_worker_withdrawn_requests", "Requests taken back before they started.")
WITHDRAW_KEPT = Counter("ascendra_worker_withdraw_kept_requests", "Requests asked back too late.")
RELEGATED = Counter("ascendra_worker_relegated_requests", "Requests relegated by the engine.")
KV_EXPORTED = Counter("ascendra_worker_kv_exports", "Running requests taken out with their KV cache.")
KV_FAILED = Counter("ascendra_worker_kv_read_failures", "Requests whose KV cache could not be read elsewhere.")
PREEMPTED = Counter("ascendra_worker_preempted_requests", "Preemptions.")
OVERFLOWS = Counter("ascendra_worker_router_overflows", "Streams ended because the router did not read.")
STEP_SECONDS = Histogram(
    "ascendra_worker_step_seconds",
    "Wall time of engine steps.",
    buckets=TBT_BUCKETS_S,
)
STEP_TOKENS = Histogram(
    "ascendra_worker_step_prefill_tokens",
    "Prefill tokens of engine steps.",
    buckets=(0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192),
)
TOKEN_BUDGET = Gauge("ascendra_worker_token_budget", "Token budget of the last step.")
QUEUED_PREFILL_TOKENS = Gauge("ascendra_worker_queued_prefill_tokens", "Prefill tokens still to compute.")
TELEMETRY_DROPPED = Counter("ascendra_worker_telemetry_dropped_steps", "Steps not reported to the predictor.")
STEP_LOG_DROPPED = Counter("ascendra_worker_step_log_dropped", "Steps not written because the disk is slow.")


class WorkerInfo(Collector):
    """What the worker is, read when scraped: roles change."""

    def __init__(self) -> None:
        self.facts: Callable[[], dict[str, str]] = dict

    def collect(self) -> Iterable[Metric]:
        """Return the facts as labels."""
        info = InfoMetricFamily(
            "ascendra_worker", "1, with worker, role, model_name, engine_kind and vllm_version as labels."
        )
        if facts := self.facts():
            info.add_metric([], facts)
        return [info]


INFO = WorkerInfo()
REGISTRY.register(INFO)


def observe_step(step: common_pb2.StepTelemetry) -> None:
    """Count an engine step."""
    STEP_SECONDS.observe(step.step_s)
    STEP_TOKENS.observe(step.prefill_tokens)
    TOKEN_BUDGET.set(step.token_budget)
    QUEUED_PREFILL_TOKENS.set(step.queued_prefill_tokens)
    if step.preempted:
        PREEMPTED.inc(step.preempted)
