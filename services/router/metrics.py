"""The router's metrics, `ascendra_router_*`; seconds and totals, label values bounded by configuration or by code."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.common.errors import ServiceError
from services.common.metrics import TBT_BUCKETS_S, TTFT_BUCKETS_S, ClassHistogram, bounded

REASONS = {
    "adrift", "bad_cursor", "bad_handle", "cancelled", "class_not_allowed", "concurrent_requests", "context_length",
    "deadline_exceeded", "draining", "encode_queue", "engine_died", "engine_error", "finished", "internal",
    "invalid_argument", "kv_export", "live_limit", "no_chat_template", "no_worker", "not_found", "other_tenant",
    "overloaded", "pinned", "queue_full", "refused", "request_id_in_use", "request_rate", "resource_exhausted",
    "session_limit", "slow_reader", "text", "text_too_long", "timeout", "token_rate", "too_many_moves",
    "too_many_tenants", "too_many_tokens", "unanswered", "unavailable", "unknown_class", "unknown_model",
    "unknown_sink", "worker_lost",
}  # fmt: skip
"""Outcomes and reasons that become label values; any other is counted as "other"."""

REQUESTS = Counter("ascendra_router_requests", "Requests that ended.", ["slo_class", "outcome"])
TENANT_REQUESTS = Counter(
    "ascendra_router_tenant_requests", "Requests that ended, by configured tenant.", ["tenant", "outcome"]
)
SLO_JUDGED = Counter(
    "ascendra_router_slo_judged_requests",
    "Requests judged by their objectives: all that ended but those cancelled or invalid.",
    ["slo_class"],
)
SLO_MET = Counter(
    "ascendra_router_slo_met_requests",
    "Requests that were served and met an objective: ttft, tbt (p99 gap), or both (joint).",
    ["slo_class", "objective"],
)
OBJECTIVES = Gauge("ascendra_router_slo_objective_seconds", "Objectives of a class.", ["slo_class", "objective"])
TTFT = ClassHistogram("ascendra_router_ttft_seconds", "Arrival at the router to first token.", TTFT_BUCKETS_S)
TBT = ClassHistogram("ascendra_router_tbt_seconds", "Gap between consecutive tokens of a request.", TBT_BUCKETS_S)
QUEUE_WAIT = ClassHistogram(
    "ascendra_router_queue_wait_seconds", "Arrival at the router to the start of the prefill.", TTFT_BUCKETS_S
)
TOKENS = Counter("ascendra_router_tokens", "Tokens delivered to streams.")
DECISIONS = Counter(
    "ascendra_router_decisions",
    "Decisions: place, offload, rescue, ticket, relegate, refuse, move and others",
    ["kind"],
)
TRANSFERS = Counter(
    "ascendra_router_transfers",
    "Waiting requests asked back from a worker, by purpose; too_late: their prefill had started.",
    ["kind", "outcome"],
)
TICKETS = Counter("ascendra_router_tickets", "Tickets of HP workers: issued, granted to an LP, redeemed.", ["event"])
REFUSALS = Counter("ascendra_router_refusals", "Requests refused, by reason and gRPC status.", ["reason", "status"])
DROPPED_FRAMES = Counter("ascendra_router_dropped_frames", "Tokens or messages of workers not taken.", ["reason"])
CANCEL_TIMEOUTS = Counter("ascendra_router_cancel_timeouts", "Cancellations that no worker acknowledged in time.")
WITHDRAW_TIMEOUTS = Counter("ascendra_router_withdraw_timeouts", "Withdrawals that no worker answered in time.")
KV_MOVES = Counter(
    "ascendra_router_kv_moves",
    "Moves by KV cache: read, failed (computed instead), timeout, refused by the source, lost with a worker, dropped "
    "(its request ended, or was placed elsewhere).",
    ["outcome"],
)
MOVE_SECONDS = Histogram(
    "ascendra_router_move_seconds",
    "Last token of a moved stream's attempt to the first token of the next one, by kv or replay.",
    ["method"],
    buckets=(0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0),
)
RUNNING_MOVES = Counter(
    "ascendra_router_running_moves",
    "Streams with tokens that moved, or should have: the cause, and what became of it.",
    ["cause", "outcome"],
)
WITHDRAW_SECONDS = Histogram(
    "ascendra_router_withdraw_seconds",
    "From asking a worker for waiting requests to its answer.",
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
TOKENIZE_SECONDS = Histogram(
    "ascendra_router_tokenize_seconds",
    "From a prompt's arrival to its token ids, with the wait for a thread.",
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1),
)
LINK_LOSSES = Counter("ascendra_router_link_losses", "Worker streams that ended, or could not be opened.")
LIVE = Gauge("ascendra_router_live_requests", "Requests being served.")
LIVE_LIMIT = Gauge("ascendra_router_live_requests_limit", "Requests served at once; more are refused.")
PARKED = Gauge("ascendra_router_parked_requests", "Requests waiting for any worker.")
HELD = Gauge("ascendra_router_held_requests", "Requests kept until a worker has room (late binding).")
HELD_RELEGATED = Gauge("ascendra_router_held_relegated_requests", "Of these, served behind all others.")
HELD_BACKLOG = Gauge(
    "ascendra_router_held_backlog_seconds", "Time that one worker would take for the prefills of all held requests."
)
HOLD_SECONDS = Histogram(
    "ascendra_router_hold_seconds", "Wait in the router until a worker had room (late binding).", buckets=TTFT_BUCKETS_S
)
LOOP_LAG = Gauge("ascendra_router_event_loop_lag_seconds", "Largest lateness of a timer in the last second.")
PREDICTOR_CONNECTED = Gauge(
    "ascendra_router_predictor_connected", "1 while the predictor's models stream in; NaN: none is configured."
)
PREDICTION_POLICY = Gauge("ascendra_router_prediction_policy", "1 for the source of TTFT predictions.", ["policy"])
DECISION_LOG_DROPPED = Counter(
    "ascendra_router_decision_log_dropped", "Decisions not written because the disk is slow."
)
ROUND_SECONDS = Histogram(
    "ascendra_router_round_seconds",
    "One round of offload and ticket decisions.",
    buckets=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
)


def configure(objectives_s: Mapping[str, tuple[float, float]], live_limit: int) -> None:
    """Fit the metrics to the configuration.

    Args:
        objectives_s: (TTFT, TBT) by SLO class, in seconds.
        live_limit: requests served at once.
    """
    ttfts_s = [ttft_s for ttft_s, _ in objectives_s.values()]
    TTFT.straddle(ttfts_s)
    QUEUE_WAIT.straddle(ttfts_s)
    TBT.straddle(tbt_s for _, tbt_s in objectives_s.values())
    for slo_class, (ttft_s, tbt_s) in objectives_s.items():
        OBJECTIVES.labels(slo_class, "ttft").set(ttft_s)
        OBJECTIVES.labels(slo_class, "tbt").set(tbt_s)
        SLO_JUDGED.labels(slo_class)
        for objective in ("ttft", "tbt", "joint"):
            SLO_MET.labels(slo_class, objective)
    LIVE_LIMIT.set(live_limit)


def ended(slo_class: str, tenant: str, outcome: str) -> None:
    """Count the end of a request; the tenant is a configured one or OTHER."""
    outcome = bounded(outcome, REASONS)
    REQUESTS.labels(slo_class, outcome).inc()
    TENANT_REQUESTS.labels(tenant, outcome).inc()


def judged(slo_class: str, *, ttft_met: bool, tbt_met: bool) -> None:
    """Count a request by whether it met its objectives."""
    SLO_JUDGED.labels(slo_class).inc()
    if ttft_met:
        SLO_MET.labels(slo_class, "ttft").inc()
    if tbt_met:
        SLO_MET.labels(slo_class, "tbt").inc()
    if ttft_met and tbt_met:
        SLO_MET.labels(slo_class, "joint").inc()


def refused(error: ServiceError) -> None:
    """Count a request that was refused."""
    REFUSALS.labels(bounded(error.reason.lower(), REASONS), error.code.name).inc()


class WorkerRow(NamedTuple):
    """An attached worker as the router sees it."""

    worker_id: str
    role: str
    queued: int
    """This router's requests there without a token yet."""
    waiting: int
    """Requests of all routers waiting in the engine."""
    running: int
    kv_usage: float
    committed_s: float
    """Prefill work queued there."""
    backlog_s: float
    """Until all that is queued there has its first token."""
    age_s: float
    """Since its last message."""
    model_age_s: float | None
    """Of what the predictor knows of it; None: nothing."""
    round_trip_s: float


class WorkerGauges(Collector):
    """Gauges by worker, read when scraped, so that workers that left leave no labels behind."""

    def __init__(self) -> None:
        self.rows: Callable[[], Iterable[WorkerRow]] = list
        self.healths: Callable[[], Mapping[str, int]] = dict
        """Known workers by state."""

    def collect(self) -> Iterable[Metric]:
        """Return the gauges."""
        prefix, labels = "ascendra_router", ["worker"]
        workers = GaugeMetricFamily(f"{prefix}_workers", "Known workers, by state.", labels=["health"])
        for health, count in self.healths().items():
            workers.add_metric([health], count)
        families = {
            "queued": GaugeMetricFamily(
                f"{prefix}_worker_queued", "This router's requests there without a token.", labels=labels
            ),
            "waiting": GaugeMetricFamily(
                f"{prefix}_worker_waiting", "Requests waiting in a worker's engine.", labels=labels
            ),
            "running": GaugeMetricFamily(
                f"{prefix}_worker_running", "Requests resident in a worker's engine.", labels=labels
            ),
            "kv_usage": GaugeMetricFamily(
                f"{prefix}_worker_kv_usage_ratio", "Share of a worker's KV cache in use.", labels=labels
            ),
            "committed_s": GaugeMetricFamily(
                f"{prefix}_worker_committed_seconds", "Prefill work queued on a worker.", labels=labels
            ),
            "age_s": GaugeMetricFamily(
                f"{prefix}_telemetry_age_seconds", "Time since a worker's last message.", labels=labels
            ),
            "model_age_s": GaugeMetricFamily(
                f"{prefix}_model_age_seconds", "Age of the steps a worker's learned model rests on.", labels=labels
            ),
            "round_trip_s": GaugeMetricFamily(
                f"{prefix}_round_trip_seconds", "Round trip of a worker's stream.", labels=labels
            ),
        }
        backlog = GaugeMetricFamily(
            f"{prefix}_backlog_seconds",
            "Predicted time until everything queued on a worker has its first token: what to scale on.",
            labels=["worker", "role"],
        )
        for row in self.rows():
            backlog.add_metric([row.worker_id, row.role], row.backlog_s)
            for name, family in families.items():
                value = getattr(row, name)
                if value is not None:
                    family.add_metric([row.worker_id], value)
        return [workers, backlog, *families.values()]


SinkRow = tuple[str, bool, int, int, int, int, int]
"""Sink, connected, tokens sent, acknowledged and dropped, requests lost, tokens behind."""


class SinkMetrics(Collector):
    """Counts by sink, read when scraped: the names are those of the configuration."""

    def __init__(self) -> None:
        self.rows: Callable[[], Iterable[SinkRow]] = list

    def collect(self) -> Iterable[Metric]:
        """Return counters and gauges."""
        prefix, labels = "ascendra_router_sink", ["sink"]
        connected = GaugeMetricFamily(f"{prefix}_connected", "1 while copies stream to the sink.", labels=labels)
        sent = CounterMetricFamily(f"{prefix}_sent_tokens", "Tokens sent, repetitions included.", labels=labels)
        acknowledged = CounterMetricFamily(f"{prefix}_acknowledged_tokens", "Tokens it has dealt with.", labels=labels)
        dropped = CounterMetricFamily(
            f"{prefix}_dropped_tokens", "Tokens dropped: it was behind or away.", labels=labels
        )
        lost = CounterMetricFamily(f"{prefix}_lost_requests", "Requests whose end was dropped.", labels=labels)
        behind = GaugeMetricFamily(f"{prefix}_behind_tokens", "Tokens and ends not acknowledged.", labels=labels)
        families = (connected, sent, acknowledged, dropped, lost, behind)
        for name, *values in self.rows():
            for index, value in enumerate(values):
                families[index].add_metric([name], value)
        return families


WORKERS = WorkerGauges()
SINKS = SinkMetrics()
REGISTRY.register(TTFT)
REGISTRY.register(TBT)
REGISTRY.register(QUEUE_WAIT)
REGISTRY.register(WORKERS)
REGISTRY.register(SINKS)
