"""What was decided about requests and how they ended: for Explain, the decision log, metrics and traces."""

import time
from collections import Counter, OrderedDict

from ascendra.v1 import cluster_pb2
from services.common.metrics import bounded
from services.router import metrics
from services.router.attainment import Attainment
from services.router.config import RouterConfig
from services.router.decision_log import DecisionLog
from services.router.request import DecisionRecord, LiveRequest, State

_BY_CLIENT = ("cancelled", "invalid_argument")
"""Ends that say nothing of an objective: the client asked for it, or for what no engine can do."""
EXPLAINED_REQUESTS = 2000
"""Ended requests that are remembered."""


class History:
    """Remembers decisions and ends of one router."""

    def __init__(self, config: RouterConfig, decision_log: DecisionLog) -> None:
        self.attainment = Attainment()
        self.counters: Counter[str] = Counter()
        """Decisions, by kind."""
        self._tenants = config.tenants
        self._decision_log = decision_log
        self._ended: OrderedDict[str, tuple[str, cluster_pb2.ExplainResponse]] = OrderedDict()

    def record(self, request: LiveRequest, record: DecisionRecord) -> None:
        """Remember, count and log a decision."""
        request.decide(record)
        if request.trace is not None:
            request.trace.decided(record)
        metrics.DECISIONS.labels(kind=record.kind).inc()
        self.counters[record.kind] += 1
        self._decision_log.write(request, record)

    def note(self, request: LiveRequest, kind: str, rule: str, from_worker_id: str = "") -> None:
        """Remember a decision that sends the request nowhere."""
        at_s = time.monotonic() - request.arrival_s
        self.record(request, DecisionRecord(at_s, kind, rule, from_worker_id))

    def end(self, request: LiveRequest, outcome: str) -> None:
        """Remember, count and log how a request ended, and judge it by its objectives unless its client ended it."""
        spec = request.spec
        metrics.ended(spec.slo_class, bounded(spec.tenant, self._tenants), outcome)
        self._decision_log.write_end(request, outcome, time.monotonic())
        if request.trace is not None:
            request.trace.ends(request, outcome)
        self._ended[spec.request_id] = spec.tenant, explanation(request)
        while len(self._ended) > EXPLAINED_REQUESTS:
            self._ended.popitem(last=False)
        if outcome not in _BY_CLIENT:
            self._judge(request, served=request.state is State.FINISHED)

    def ended(self, request_id: str) -> tuple[str, cluster_pb2.ExplainResponse] | None:
        """Return the tenant of a request that ended recently, and the decisions about it."""
        return self._ended.get(request_id)

    def _judge(self, request: LiveRequest, *, served: bool) -> None:
        ttft_s, p99_gap_s, slo = request.ttft_s, request.p99_gap_s(), request.spec.slo
        ttft_met, tbt_met = served and ttft_s <= slo.ttft_s, served and p99_gap_s <= slo.tbt_s
        slo_class = request.spec.slo_class
        metrics.judged(slo_class, ttft_met=ttft_met, tbt_met=tbt_met)
        self.attainment.record(slo_class, time.monotonic(), ttft_s, p99_gap_s, ttft_met=ttft_met, tbt_met=tbt_met)


def explanation(request: LiveRequest) -> cluster_pb2.ExplainResponse:
    """Return the decisions about a request so far, with its receipt once it ended."""
    state = "waiting" if request.state is State.RECEIVED else str(request.state)
    return cluster_pb2.ExplainResponse(
        request_id=request.spec.request_id,
        decisions=[record.to_proto() for record in request.decisions],
        receipt=request.receipt() if request.ended else None,
        state=state,
    )
