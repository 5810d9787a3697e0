"""The router's metrics, `ascendra_router_*`; seconds and totals, label values bounded by configuration."""

from bisect import bisect_left
from collections.abc import Callable, Iterable

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

TBT_BUCKETS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
TTFT_BUCKETS_S = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 20.0, 30.0, 60.0)

REQUESTS = Counter("ascendra_router_requests", "Requests that ended.", ["slo_class", "outcome"])
TTFT = Histogram(
    "ascendra_router_ttft_seconds", "Arrival at the router to first token.", ["slo_class"], buckets=TTFT_BUCKETS_S
)
TOKENS = Counter("ascendra_router_tokens", "Tokens delivered to streams.")
DECISIONS = Counter(
    "ascendra_router_decisions", "Decisions: place, offload, ticket, relegate, refuse, move, ...", ["kind"]
)
REFUSALS = Counter("ascendra_router_refusals", "Requests refused.", ["reason"])
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
LINK_LOSSES = Counter("ascendra_router_link_losses", "Worker streams that ended, or could not be opened.")
LIVE = Gauge("ascendra_router_live_requests", "Requests being served.")
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
PREDICTOR_CONNECTED = Gauge("ascendra_router_predictor_connected", "1 while the predictor's models stream in.")
PREDICTION_POLICY = Gauge("ascendra_router_prediction_policy", "1 for the source of TTFT predictions.", ["policy"])
DECISION_LOG_DROPPED = Counter(
    "ascendra_router_decision_log_dropped", "Decisions not written because the disk is slow."
)
ROUND_SECONDS = Histogram(
    "ascendra_router_round_seconds",
    "One round of offload and ticket decisions.",
    buckets=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1),
)


class GapHistogram(Collector):
    """Gaps between tokens; a tenth of the cost of a library histogram, for it is fed once a token."""

    def __init__(self) -> None:
        self.counts = [0] * (len(TBT_BUCKETS_S) + 1)
        self.total_s = 0.0

    def observe(self, gap_s: float) -> None:
        """Count one gap."""
        self.counts[bisect_left(TBT_BUCKETS_S, gap_s)] += 1
        self.total_s += gap_s

    def collect(self) -> Iterable[Metric]:
        """Return the histogram."""
        family = HistogramMetricFamily("ascendra_router_tbt_seconds", "Gap between consecutive tokens of a request.")
        buckets = []
        cumulated = 0
        for limit, count in zip((*map(str, TBT_BUCKETS_S), "+Inf"), self.counts, strict=True):
            cumulated += count
            buckets.append((limit, cumulated))
        family.add_metric([], buckets, self.total_s)
        return [family]


WorkerRow = tuple[str, str, float, float, float, float, float]
"""Worker id, role, requests waiting there; prefill work of these, backlog, telemetry age, round trip in seconds."""


class WorkerGauges(Collector):
    """Gauges by worker, read when scraped, so that workers that left leave no labels behind."""

    def __init__(self) -> None:
        self.rows: Callable[[], Iterable[WorkerRow]] = list

    def collect(self) -> Iterable[Metric]:
        """Return the gauges."""
        waiting = GaugeMetricFamily("ascendra_router_worker_waiting", "Requests queued on a worker.", labels=["worker"])
        work = GaugeMetricFamily(
            "ascendra_router_worker_committed_seconds", "Prefill work queued on a worker.", labels=["worker"]
        )
        age = GaugeMetricFamily(
            "ascendra_router_telemetry_age_seconds", "Time since a worker's last message.", labels=["worker"]
        )
        trip = GaugeMetricFamily("ascendra_router_round_trip_seconds", "Round trip of the stream.", labels=["worker"])
        backlog = GaugeMetricFamily(
            "ascendra_router_backlog_seconds",
            "Predicted time until everything queued on a worker has its first token: what to scale on.",
            labels=["worker", "role"],
        )
        for worker_id, role, queued, work_s, backlog_s, age_s, round_trip_s in self.rows():
            waiting.add_metric([worker_id], queued)
            work.add_metric([worker_id], work_s)
            backlog.add_metric([worker_id, role], backlog_s)
            age.add_metric([worker_id], age_s)
            trip.add_metric([worker_id], round_trip_s)
        return [waiting, work, backlog, age, trip]


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


GAPS = GapHistogram()
WORKERS = WorkerGauges()
SINKS = SinkMetrics()
REGISTRY.register(GAPS)
REGISTRY.register(WORKERS)
REGISTRY.register(SINKS)
