"""Moves running streams away from workers that are about to break their cadence; services.policy.relief decides."""

import asyncio
import heapq
import math
import time
from collections.abc import Mapping
from dataclasses import replace

from services.common.logging import get_logger
from services.policy.placement import COMPARED
from services.policy.relief import Cadence, Relief, ReliefLedger, RunningStream, best_relief
from services.router import metrics
from services.router.dispatcher import Dispatcher
from services.router.instance import Placed
from services.router.mover import MovePlan, Mover
from services.router.worker_link import WorkerLink

log = get_logger()

KIND = "relief"
_INTERVAL_S = 0.1
_CAUSE = "tbt_risk"


class StreamRelief:
    """Looks at all running streams ten times a second."""

    def __init__(self, dispatcher: Dispatcher, mover: Mover) -> None:
        self._dispatcher = dispatcher
        self._mover = mover
        self._policy = dispatcher.config.relief_policy
        self._ledger = ReliefLedger(self._policy)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            try:
                self.round(time.monotonic())
            except Exception:
                log.exception("relief_failed")  # streams stay where they are until the next round

    def round(self, now_s: float) -> None:
        """Move the streams for which it is worth it."""
        links = {link.worker_id: link for link in self._dispatcher.links() if link.attached}
        self._ledger.forget(links)
        gaps_s: dict[str, float] = {}
        unsteady = []
        for link in links.values():
            streams = _running(link)
            home = self._cadence(link, now_s)
            gap_s = gaps_s[link.worker_id] = home.gap_s()
            breaks = any(
                stream.tbt_s < gap_s and home.bears_out(stream.tbt_s, self._policy) for stream in streams.values()
            )
            if self._ledger.breaking(link.worker_id, breaks, now_s):
                unsteady.append((link, home, streams))
        if unsteady:
            takers = [link for link in links.values() if link.takes_requests(now_s)]
            # One of them may be the home; a round must not cost (unsteady workers x all workers).
            steadiest = heapq.nsmallest(COMPARED + 1, takers, key=lambda link: gaps_s[link.worker_id])
            for link, home, streams in unsteady:
                others = {other.worker_id: other for other in steadiest if other is not link}
                self._relieve(link, home, streams, others, now_s)

    def _relieve(
        self,
        link: WorkerLink,
        home: Cadence,
        streams: dict[str, RunningStream],
        others: Mapping[str, WorkerLink],
        now_s: float,
    ) -> None:
        def cost_s(stream: RunningStream, target: Cadence) -> float:
            plan = self._plan(stream.request_id, others[target.view.worker_id])
            return plan.cost_s if plan is not None else math.inf

        while True:
            targets = [self._cadence(other, now_s) for other in others.values() if other.takes_requests(now_s)]
            relief, stay = best_relief(home, streams.values(), targets, now_s, self._policy, cost_s)
            if relief is None:
                for outcome, count in stay.items():
                    metrics.RUNNING_MOVES.labels(cause=_CAUSE, outcome=outcome).inc(count)
                return
            if not self._ledger.take(now_s):
                metrics.RUNNING_MOVES.labels(cause=_CAUSE, outcome="over_budget").inc()
                return
            self._move(relief, others[relief.target])
            home = home.without(streams.pop(relief.request_id))
            # What has left still shows in the worker's reports for a while: it has to break for as long again.
            self._ledger.breaking(link.worker_id, False, now_s)

    def _move(self, relief: Relief, target: WorkerLink) -> None:
        plan = self._plan(relief.request_id, target)
        assert plan is not None, "it had a cost a moment ago"
        plan.request.reliefs += 1
        self._mover.start(plan, relief.reason)
        metrics.RUNNING_MOVES.labels(cause=_CAUSE, outcome="moved").inc()

    def _plan(self, request_id: str, target: WorkerLink) -> MovePlan | None:
        return self._mover.plan(self._dispatcher.live[request_id], target, KIND)

    def _cadence(self, link: WorkerLink, now_s: float) -> Cadence:
        view = self._dispatcher.placer.view(link, now_s)
        # A copy: whoever predicts next changes the queue of the view.
        return Cadence(replace(view, queue=list(view.queue)), link.instance.budget, link.instance.observed_step_s)


def _running(link: WorkerLink) -> dict[str, RunningStream]:
    """Return this router's streams on a worker that may move, by id."""
    return {
        placed.request.spec.request_id: _stream(placed)
        for placed in link.placed.values()
        if placed.delivered and not placed.moving and not placed.request.spec.pinned and not placed.request.ended
    }


def _stream(placed: Placed) -> RunningStream:
    request = placed.request
    generated = len(request.generated)
    return RunningStream(
        request_id=request.spec.request_id,
        tbt_s=request.spec.slo.tbt_s,
        context_tokens=request.spec.prompt_tokens + generated,
        left_tokens=request.spec.sampling.max_tokens - generated,
        settled_s=placed.submitted_s,
        hops=request.reliefs,
    )
