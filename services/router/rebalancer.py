"""Moves waiting requests: before they miss, to idle HP on tickets, away from a worker that drains.

Every such move is two-phase: withdraw, wait until the worker says that the request was never scheduled, then submit.
"""

import asyncio
import heapq
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from ascendra.v1 import cluster_pb2, worker_pb2
from services.common.logging import get_logger
from services.policy.admission import retry_delay_s, waited_too_long
from services.policy.offload import OffloadAction, OffloadCandidate, decide_offload, is_at_risk
from services.policy.placement import COMPARED
from services.policy.prefill import PrefillPace, TtftEstimate, instance_pace
from services.policy.state import QueuedRequest, Role
from services.policy.tickets import TicketLedger, TicketPolicy, choose_for_ticket, ticket_room
from services.router import metrics
from services.router.config import LATE
from services.router.dispatcher import Dispatcher
from services.router.estimates import Ahead, in_order, newcomer_ahead
from services.router.instance import Placed
from services.router.request import DecisionRecord
from services.router.rounds import run_rounds
from services.router.worker_link import WorkerLink

log = get_logger()

_SHORTEST_PAUSE_S = 0.004
"""Between two rounds."""
_ROUND_SHARE = 0.1
"""Most of the time that rounds may take."""


@dataclass(slots=True)
class Transfer:
    """A withdrawal on its way."""

    placed: Placed
    kind: str
    """"offload", "rescue", "ticket", "refuse" or "move"."""
    rule: str
    target: WorkerLink | None = None
    """None: placed anew (a drain), or refused."""
    predicted: tuple[float, float] | None = None
    """(Seconds to the first token, seconds of queue ahead) at the target."""
    candidates: list[cluster_pb2.Candidate] = field(default_factory=list)
    """Where it waited first, then where it could have gone."""
    retry_after_s: float = 0.0
    """Of a refusal."""
    expires_s: float = 0.0
    """When the withdrawal is given up."""


@dataclass(slots=True)
class _Queue:
    """A worker's waiting requests in the order of its engine."""

    link: WorkerLink
    ordered: list[QueuedRequest]
    estimates: list[TtftEstimate]
    pace: PrefillPace
    placed: dict[str, Placed]


class _Targets:
    """Where requests could go in this round, with what each would wait for there; computed when first asked for."""

    def __init__(self, dispatcher: Dispatcher, links: Sequence[WorkerLink], now_s: float) -> None:
        self.links = {link.worker_id: link for link in links}
        self._dispatcher = dispatcher
        self._now_s = now_s
        self._ahead: dict[str, Ahead] = {}
        self._near: list[WorkerLink] | None = None
        """The least busy ones: a round must not cost (those at risk x all workers)."""

    def candidates(self, queued: QueuedRequest, home: WorkerLink) -> list[OffloadCandidate]:
        """Return the workers that a request may move to: HP by offload, others by rescue."""
        config = self._dispatcher.config
        return [
            OffloadCandidate(link.worker_id, self._of(link).estimate(queued))
            for link in self._nearest()
            if link is not home and (config.offload if link.instance.view.role is Role.HIGH else config.rescue)
        ]

    def _nearest(self) -> list[WorkerLink]:
        if self._near is None:
            # One of them may be a request's home.
            self._near = heapq.nsmallest(COMPARED + 1, self.links.values(), key=lambda link: self._of(link).work_s)
        return self._near

    def best_s(self, queued: QueuedRequest) -> float:
        """Return the seconds to a request's first token if it came anew; infinite when nobody takes requests."""
        return min((self._of(link).estimate(queued).mean_s for link in self._nearest()), default=math.inf)

    def take(self, queued: QueuedRequest, target: WorkerLink) -> TtftEstimate:
        """Count a request that goes there from now on, and return its prediction."""
        ahead = self._of(target)
        predicted = ahead.estimate(queued)
        ahead.take(queued)
        return predicted

    def _of(self, link: WorkerLink) -> Ahead:
        ahead = self._ahead.get(link.worker_id)
        if ahead is None:
            view = self._dispatcher.placer.view(link, self._now_s)
            ahead = self._ahead[link.worker_id] = newcomer_ahead(view, link.instance.budget, self._now_s)
        return ahead


class Rebalancer:
    """Runs rounds of decisions when something changed, and at least every `decide_interval_ms`."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._config = dispatcher.config
        self._changed = asyncio.Event()
        self._transfers: dict[tuple[str, int], list[Transfer]] = {}
        # Under late binding HP draws what waits in the router; what is committed to an LP starts at once.
        tickets = self._config.tickets and self._config.placement != LATE
        self._ledger = TicketLedger(self._config.ticket_policy if tickets else TicketPolicy(leases=0))
        self.unsaved = 0
        """Requests at risk that nobody could take."""
        self.offloads = 0
        """Requests offloaded to HP."""
        self.urgent_work_s = 0.0
        """Prefill work sent to HP as urgent, in seconds."""
        dispatcher.work_changed = self._changed.set

    async def run(self) -> None:
        """Decide until cancelled."""
        await run_rounds(self._timed_round, self._changed, self._config.decide_interval_ms / 1000, _pause_s)

    def round(self, now_s: float) -> None:
        """Take one round of decisions."""
        self._dispatcher.place_parked("a worker takes requests again")
        self._dispatcher.expire_parked(now_s)
        self._dispatcher.end_adrift(now_s)
        self._expire(now_s)
        waiting = [link for link in self._dispatcher.links() if link.attached and link.instance.has_queue]
        if not waiting:
            return
        takers = [link for link in self._dispatcher.links() if link.takes_requests(now_s)]
        targets = _Targets(self._dispatcher, takers, now_s)
        for link in waiting:
            self._refuse_late(link, targets, now_s)
        queues = [self._queue(link, now_s) for link in waiting if link.instance.view.role is not Role.HIGH]
        for queue in queues:
            self._leave_at_risk(queue, targets, now_s)
        low = [queue for queue in queues if queue.link.instance.view.role is Role.LOW]
        if low:
            self._tickets(low, [link for link in takers if link.instance.view.role is Role.HIGH], now_s)

    def drain_waiting(self, link: WorkerLink) -> None:
        """Take back everything that a draining worker has not started."""
        leaving = [p for p in link.instance.queue if not p.queued.started and not p.withdrawing]
        self._withdraw(link, [Transfer(placed, "move", "its worker drains") for placed in leaving])

    def on_withdrawn(self, link: WorkerLink, withdrawn: worker_pb2.Withdrawn) -> None:
        """Carry out the moves whose requests were handed back; give up the others."""
        gone = set(withdrawn.withdrawn_handles)
        transfers = self._transfers.pop((link.address, withdrawn.withdraw_id), ())
        if transfers:
            asked_s = transfers[0].expires_s - self._config.withdraw_timeout_s
            metrics.WITHDRAW_SECONDS.observe(time.monotonic() - asked_s)
        for transfer in transfers:
            self._settle(link, transfer, handed_back=transfer.placed.handle in gone)
        self._changed.set()

    def on_lost(self, link: WorkerLink) -> None:
        """Forget withdrawals that nobody will answer: the dispatcher moves their requests."""
        for key in [key for key in self._transfers if key[0] == link.address]:
            for transfer in self._transfers.pop(key):
                metrics.TRANSFERS.labels(transfer.kind, "worker_lost").inc()
                if transfer.target is not None:
                    transfer.target.instance.expect_no_more(transfer.placed.request.spec.request_id)

    def _timed_round(self, now_s: float) -> None:
        with metrics.ROUND_SECONDS.time():
            self.round(now_s)

    def _queue(self, link: WorkerLink, now_s: float) -> _Queue:
        view = self._dispatcher.placer.view(link, now_s)
        order = self._dispatcher.placer.order_policy(link)
        ordered, estimates, pace = in_order(view, now_s, order, link.instance.budget)
        placed = {placed.queued.request_id: placed for placed in link.instance.queue}
        return _Queue(link, ordered, estimates, pace, placed)

    def _leave_at_risk(self, queue: _Queue, targets: _Targets, now_s: float) -> None:
        """Send those at risk to whoever still makes it; refuse those whom nobody saves if they asked for that."""
        leaving: list[Transfer] = []
        policy = self._config.offload_policy
        step_s = queue.link.instance.step_s or queue.pace.step_s
        hop_s = queue.link.instance.view.hop_s
        for queued, estimate in zip(queue.ordered, queue.estimates, strict=True):
            placed = queue.placed.get(queued.request_id)
            if placed is None or queued.started or placed.withdrawing or placed.request.has_tokens:
                continue
            if not is_at_risk(queued, estimate, now_s, step_s, hop_s, policy):
                continue
            if queued.hops >= policy.hop_limit or now_s - placed.decided_s < policy.settle_s:
                continue  # it stays: nobody needs to be predicted for that
            candidates = targets.candidates(queued, queue.link)
            decision = decide_offload(queued, estimate, candidates, now_s, step_s, policy, placed.decided_s)
            if decision.action is OffloadAction.OFFLOAD and decision.target is not None:
                target = targets.links[decision.target]
                kind = "offload" if target.instance.view.role is Role.HIGH else "rescue"
                shown = self._shown(placed, queue.link.worker_id, estimate, candidates, now_s)
                predicted = targets.take(queued, target)
                numbers = (predicted.mean_s, predicted.wait_s)
                leaving.append(Transfer(placed, kind, decision.reason, target, numbers, shown))
            elif decision.action is OffloadAction.RELEGATE:
                if not queued.relegated:  # its engine may have given it up before
                    placed.decided_s = now_s
                    self.unsaved += 1
                if placed.request.spec.refuse_hopeless:
                    best_s = min([estimate.mean_s, *(c.estimate.mean_s for c in candidates)])
                    delay_s = retry_delay_s(best_s, queued.slo)
                    leaving.append(Transfer(placed, "refuse", decision.reason, retry_after_s=delay_s))
        self._withdraw(queue.link, leaving)

    def _shown(
        self, placed: Placed, home: str, estimate: TtftEstimate, candidates: Sequence[OffloadCandidate], now_s: float
    ) -> list[cluster_pb2.Candidate]:
        """Return what a decision was made from, for Explain."""
        age_s = now_s - placed.request.arrival_s
        left_s = placed.request.spec.slo.ttft_s - age_s
        return [
            cluster_pb2.Candidate(
                worker_id=c.worker_id,
                predicted_ttft_s=age_s + c.estimate.mean_s,
                miss_ttft=self._dispatcher.predictions.miss_probability(
                    c.worker_id, c.estimate.wait_s, c.estimate.mean_s, left_s
                ),
                excluded="it waits here and would miss" if c.worker_id == home else "",
            )
            for c in (OffloadCandidate(home, estimate), *candidates)
        ]

    def _refuse_late(self, link: WorkerLink, targets: _Targets, now_s: float) -> None:
        """Refuse what waited beyond the bound and asked to be refused in overload."""
        policy = self._config.admission_policy
        open_ = {
            placed.queued.request_id: placed
            for placed in link.instance.queue
            if placed.request.spec.refuse_hopeless and not placed.withdrawing and not placed.request.has_tokens
        }
        leaving: list[Transfer] = []
        for request_id in waited_too_long((placed.queued for placed in open_.values()), now_s, policy):
            placed = open_[request_id]
            reason = f"it waited {now_s - placed.request.arrival_s:.1f} s, over the limit of {policy.max_wait_s:g} s"
            delay_s = retry_delay_s(targets.best_s(placed.queued), placed.queued.slo)
            leaving.append(Transfer(placed, "refuse", reason, retry_after_s=delay_s))
        self._withdraw(link, leaving)

    def _tickets(self, queues: Sequence[_Queue], high: Sequence[WorkerLink], now_s: float) -> None:
        if self._ledger.policy.leases <= 0 or not high:
            return
        objectives_s = [p.request.spec.slo.tbt_s for queue in queues for p in queue.placed.values()]
        tbt_s = min(objectives_s, default=0.0)
        views = ((self._dispatcher.placer.view(link, now_s), link.instance.budget) for link in high)
        rooms = (
            (view.worker_id, ticket_room(view, instance_pace(view, budget), self._ledger.policy, tbt_s))
            for view, budget in views
        )
        issued = self._ledger.issue(rooms, now_s)
        metrics.TICKETS.labels("issued").inc(len(issued))
        backlogs_s = {
            queue.link.worker_id: queue.pace.finish_s(
                sum(queue.pace.remaining_work_s(queued) for queued in queue.ordered if not queued.started)
            )
            for queue in queues
            if any(not queued.started for queued in queue.ordered)
        }
        waiting = sum(len(queue.ordered) for queue in queues)
        request_s = sum(backlogs_s.values()) / max(waiting, 1)
        by_id = {queue.link.worker_id: queue for queue in queues}
        targets = {link.worker_id: link for link in high}
        while backlogs_s and (granted := self._ledger.grant(backlogs_s, request_s, now_s)):
            metrics.TICKETS.labels("granted").inc(len(granted))
            for ticket in granted:
                queue, target = by_id[ticket.holder], targets.get(ticket.issuer)
                if target is None:  # it left since it issued the ticket
                    self._ledger.revoke(ticket.issuer)
                    continue
                open_ = [q for q in queue.ordered if self._may_leave(queue, q)]
                chosen = choose_for_ticket(open_, queue.pace.budget_tokens, target.instance.view)
                if chosen is None:
                    self._ledger.release(ticket.ticket_id)
                    backlogs_s.pop(ticket.holder, None)
                elif self._ledger.redeem(ticket.ticket_id, now_s):
                    metrics.TICKETS.labels("redeemed").inc()
                    self._draw(queue, chosen, target, now_s)

    def _draw(self, queue: _Queue, chosen: QueuedRequest, target: WorkerLink, now_s: float) -> None:
        """Move a waiting request for a ticket."""
        predicted = self._newcomer_ahead(target, now_s).estimate(chosen)
        placed, numbers = queue.placed[chosen.request_id], (predicted.mean_s, predicted.wait_s)
        self._withdraw(queue.link, [Transfer(placed, "ticket", "an HP worker has room", target, numbers)])

    def _newcomer_ahead(self, link: WorkerLink, now_s: float) -> Ahead:
        return newcomer_ahead(self._dispatcher.placer.view(link, now_s), link.instance.budget, now_s)

    def _may_leave(self, queue: _Queue, queued: QueuedRequest) -> bool:
        """Started requests stay in the list: they take their part of the next step."""
        placed = queue.placed.get(queued.request_id)
        if placed is None or queued.started:
            return queued.started
        return not placed.withdrawing and not placed.request.has_tokens

    def _withdraw(self, link: WorkerLink, leaving: list[Transfer]) -> None:
        if not leaving:
            return
        expires_s = time.monotonic() + self._config.withdraw_timeout_s
        withdraw_id = link.withdraw([transfer.placed for transfer in leaving])
        for transfer in leaving:
            transfer.placed.withdrawing = True
            transfer.expires_s = expires_s
            if transfer.target is not None:
                urgent, ticketed = transfer.kind == "offload", transfer.kind == "ticket"
                transfer.target.instance.expect(transfer.placed.request.queued(urgent=urgent, ticketed=ticketed))
        self._transfers[link.address, withdraw_id] = leaving

    def _settle(self, link: WorkerLink, transfer: Transfer, *, handed_back: bool) -> None:
        placed, request = transfer.placed, transfer.placed.request
        if transfer.target is not None:
            transfer.target.instance.expect_no_more(request.spec.request_id)
        found = self._dispatcher.where(request)
        if request.ended or found is None or found[1] is not placed:
            metrics.TRANSFERS.labels(transfer.kind, "ended").inc()
            return  # it ended, or its worker was lost, while the answer was on its way
        placed.withdrawing = False
        placed.decided_s = time.monotonic()
        metrics.TRANSFERS.labels(transfer.kind, "handed_back" if handed_back else "too_late").inc()
        if not handed_back:
            self._dispatcher.history.note(request, "withdraw_refused", "its prefill had started", link.worker_id)
            return
        self._dispatcher.unplace(request)
        if transfer.kind == "refuse":
            self._dispatcher.refuse(request, transfer.rule, transfer.retry_after_s)
            return
        target = transfer.target
        if target is None or not target.takes_requests(placed.decided_s):
            self._dispatcher.place(request, "move", transfer.rule, avoid=link)
            return
        if transfer.kind in ("offload", "rescue"):
            request.hops += 1
        if transfer.kind == "offload":
            self.offloads += 1
            self.urgent_work_s += self._newcomer_ahead(target, placed.decided_s).pace.work_s(
                placed.queued.prompt_tokens
            )
        at_s = placed.decided_s - request.arrival_s
        record = DecisionRecord(at_s, transfer.kind, transfer.rule, link.worker_id, candidates=transfer.candidates)
        urgent, ticketed = transfer.kind == "offload", transfer.kind == "ticket"
        self._dispatcher.submit(request, target, record, urgent=urgent, ticketed=ticketed, predicted=transfer.predicted)

    def _expire(self, now_s: float) -> None:
        for key, transfers in list(self._transfers.items()):
            if transfers[0].expires_s > now_s:
                continue
            del self._transfers[key]
            metrics.WITHDRAW_TIMEOUTS.inc()
            for transfer in transfers:
                metrics.TRANSFERS.labels(transfer.kind, "timeout").inc()
                # It may still be handed back later; then nobody knows the request any more, so it must not stay there.
                placed, request = transfer.placed, transfer.placed.request
                if transfer.target is not None:
                    transfer.target.instance.expect_no_more(request.spec.request_id)
                found = self._dispatcher.where(request)
                if not request.ended and found is not None and found[1] is placed:
                    self._dispatcher.abandon(request, "its worker did not answer a withdrawal")


def _pause_s(took_s: float) -> float:
    return max(_SHORTEST_PAUSE_S, took_s / _ROUND_SHARE)
