"""Late binding in the router: requests wait here, and workers draw them when they have room.

A thin shell over services.policy.late_binding. Each router has a set of its own and knows of the others what workers
report as queued; what two routers commit to one worker at the same time, its engine orders.
"""

import asyncio
import heapq
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ascendra.v1 import cluster_pb2, common_pb2
from services.common.errors import Unavailable
from services.common.logging import get_logger
from services.policy.admission import retry_delay_s, waited_too_long
from services.policy.late_binding import Binding, Committed, Draw, WaitingSet
from services.policy.order import OrderPolicy
from services.policy.prefill import newcomer_work_s
from services.policy.state import QueuedRequest
from services.policy.tickets import TicketPolicy
from services.router import metrics
from services.router.dispatcher import Dispatcher
from services.router.rebalancer import Rebalancer
from services.router.request import DecisionRecord, LiveRequest
from services.router.rounds import run_rounds
from services.router.worker_link import WorkerLink

log = get_logger()

_SHOWN = 16
"""Most workers that a decision shows: it is kept as long as its request lives."""
_STALE_S = 1.0
"""A worker that has said nothing for longer draws only when there is no other."""
_SHORT_ROUND_S = 0.001
"""A draw that took no longer is not followed by a pause."""
_ROUND_SHARE = 0.2
"""Most of the time that longer ones may take."""


@dataclass(slots=True)
class _Held:
    request: LiveRequest
    queued: QueuedRequest
    since_s: float


class Binder:
    """Holds new requests until a worker draws them. Times are seconds on the router's monotonic clock."""

    def __init__(self, dispatcher: Dispatcher, rebalancer: Rebalancer) -> None:
        """Hold nothing yet; `run` lets workers draw.

        Args:
            rebalancer: hears of urgent work, which the split between LP and HP follows.
        """
        self._dispatcher = dispatcher
        self._rebalancer = rebalancer
        self._config = dispatcher.config
        self._held: dict[str, _Held] = {}
        self._waiting = WaitingSet(self._config.late_binding, OrderPolicy(), self._ticket_policy())
        self._changed = asyncio.Event()
        self._alone_since_s: float | None = None
        dispatcher.binder = self

    def __len__(self) -> int:
        """Return how many requests are held."""
        return len(self._held)

    def __contains__(self, request_id: str) -> bool:
        """Whether a request is held."""
        return request_id in self._held

    def backlog_tokens(self) -> int:
        """Return the prefill tokens that a newcomer waits for here."""
        return self._waiting.backlog_tokens()

    def held_tokens(self) -> int:
        """Return the prefill tokens of all that is held, relegated requests included."""
        return sum(held.queued.remaining_tokens for held in self._held.values())

    def hold(self, request: LiveRequest, why: str) -> None:
        """Keep a request that has not started anywhere until a worker has room."""
        held = _Held(request, request.queued(), time.monotonic())
        self._held[request.spec.request_id] = held
        self._waiting.add(held.queued)
        self._dispatcher.history.note(request, "hold", why)
        self._publish()
        self._changed.set()

    def release(self, request_id: str) -> None:
        """Let go of a request that ended."""
        if self._held.pop(request_id, None) is not None:
            self._waiting.discard(request_id)
            self._publish()

    def on_steps(self, steps: Iterable[common_pb2.StepTelemetry]) -> None:
        """Take note that a worker moved on: it may have room."""
        for step in steps:
            self._waiting.earn(step.step_s)
        if self._held:
            self._changed.set()

    async def run(self) -> None:
        """Let workers draw until cancelled."""
        await run_rounds(self.round, self._changed, self._config.decide_interval_ms / 1000, _pause_s)

    def round(self, now_s: float) -> None:
        """Let the workers that have room draw."""
        if not self._held:
            self._alone_since_s = None
            return
        links = {link.worker_id: link for link in self._dispatcher.links() if link.takes_requests(now_s)}
        if not links:
            self._give_up(now_s)
            return
        self._alone_since_s = None
        placer = self._dispatcher.placer
        pool = [Committed.of(placer.view(link, now_s), link.instance.budget) for link in links.values()]
        pool = [one for one in pool if one.view.report_age_s <= _STALE_S] or pool
        self._follow(placer.order_policy(links[pool[0].view.worker_id]))
        for queued in self._waiting.refresh(pool, now_s):
            self._relegate(self._held[queued.request_id], pool)
        self._refuse_late(pool, now_s)
        ahead = {one.view.worker_id: one.work_s for one in pool}
        for binding in self._waiting.draw(pool, now_s):
            try:
                self._bind(binding, links, pool, ahead, now_s)
            except Exception:
                log.exception("bind_failed", request_id=binding.request.request_id)
                self._waiting.add(binding.request)
        self._publish()

    def _follow(self, order: OrderPolicy) -> None:
        """Order the set as the engines order theirs."""
        if order != self._waiting.order:
            self._waiting = WaitingSet(self._config.late_binding, order, self._ticket_policy())
            for held in self._held.values():
                self._waiting.add(held.queued)

    def _ticket_policy(self) -> TicketPolicy | None:
        return self._config.ticket_policy if self._config.tickets else None

    def _bind(
        self,
        binding: Binding,
        links: Mapping[str, WorkerLink],
        pool: Sequence[Committed],
        ahead_s: dict[str, float],
        now_s: float,
    ) -> None:
        """Submit a request to the worker that drew it."""
        held = self._held[binding.request.request_id]
        request, queued = held.request, held.queued
        work_s = 0.0
        candidates = []
        age_s = now_s - request.arrival_s
        least_busy = heapq.nsmallest(_SHOWN - 1, pool, key=lambda one: ahead_s[one.view.worker_id])
        chosen = [one for one in pool if one.view.worker_id == binding.worker_id]
        for one in {one.view.worker_id: one for one in (*chosen, *least_busy)}.values():
            worker_id, pace = one.view.worker_id, one.pace
            own_s = newcomer_work_s(one.view, pace, queued)
            ttft_s = one.view.hop_s + pace.finish_s(ahead_s[worker_id] + own_s)
            left_s = queued.slo.ttft_s - age_s
            missed = self._dispatcher.predictions.miss_probability(worker_id, ahead_s[worker_id], ttft_s, left_s)
            candidates.append(
                cluster_pb2.Candidate(
                    worker_id=worker_id,
                    predicted_ttft_s=age_s + ttft_s,
                    miss_ttft=missed,
                    cached_tokens=one.view.cached_tokens(queued),
                )
            )
            if worker_id == binding.worker_id:
                work_s = own_s
        ahead_s[binding.worker_id] += work_s
        urgent = binding.draw is Draw.URGENT
        if urgent:
            self._rebalancer.offloads += 1
            self._rebalancer.urgent_work_s += work_s
        record = DecisionRecord(age_s, binding.draw, f"late binding: {binding.rule}", candidates=candidates)
        self._dispatcher.submit(
            request,
            links[binding.worker_id],
            record,
            urgent=urgent,
            ticketed=binding.draw is Draw.TICKET,
            relegated=queued.relegated,
        )
        del self._held[request.spec.request_id]
        metrics.HOLD_SECONDS.observe(now_s - held.since_s)

    def _relegate(self, held: _Held, pool: Iterable[Committed]) -> None:
        """Mark a request that no worker serves in time any more, or refuse it if it asked for that."""
        request = held.request
        request.relegated = True
        self._rebalancer.unsaved += 1
        if request.spec.refuse_hopeless:
            self._refuse(held, "no instance makes its objective", pool)
        else:
            self._dispatcher.history.note(request, "relegate", "no instance makes its objective")

    def _refuse_late(self, pool: Iterable[Committed], now_s: float) -> None:
        """Refuse what waited beyond the bound and asked to be refused in overload."""
        policy = self._config.admission_policy
        asked = (held.queued for held in self._held.values() if held.request.spec.refuse_hopeless)
        for request_id in waited_too_long(asked, now_s, policy):
            self._refuse(self._held[request_id], f"it waited over the limit of {policy.max_wait_s:g} s", pool)

    def _refuse(self, held: _Held, why: str, pool: Iterable[Committed]) -> None:
        queued = held.queued
        best_s = min((one.pace.finish_s(one.work_s + one.pace.remaining_work_s(queued)) for one in pool), default=0.0)
        self._dispatcher.refuse(held.request, why, retry_delay_s(best_s, queued.slo))

    def _give_up(self, now_s: float) -> None:
        """Fail what waited too long while no worker took requests."""
        if self._alone_since_s is None:
            self._alone_since_s = now_s
        limit_s = self._config.no_worker_wait_s
        if now_s - self._alone_since_s < limit_s:
            return
        for held in [held for held in self._held.values() if now_s - held.since_s >= limit_s]:
            error = Unavailable(
                f"no worker took requests for {limit_s:g} s",
                reason="NO_WORKER",
                retry_safe=True,
                retry_after_ms=1000,
            )
            self._dispatcher.fail(held.request, error)

    def _publish(self) -> None:
        metrics.HELD.set(len(self._held))
        metrics.HELD_RELEGATED.set(self._waiting.relegated)


def _pause_s(took_s: float) -> float:
    return took_s / _ROUND_SHARE if took_s > _SHORT_ROUND_S else 0.0
