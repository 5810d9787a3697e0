"""The router in virtual time: what it knows of each worker, and the decisions that services.policy takes from it."""

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from bench.simulator.card import PredictionCard
from bench.simulator.cluster import Cluster
from bench.simulator.instance import StepReport
from bench.simulator.request import SimRequest
from bench.simulator.view import RoutedRequest, WorkerState
from services.policy.offload import OffloadAction, OffloadCandidate, OffloadPolicy, decide_offload, is_at_risk
from services.policy.order import OrderPolicy, order_waiting
from services.policy.placement import PlacementPolicy, PlacementState, place
from services.policy.prefill import predict_in_order
from services.policy.roles import RoleController, RolePolicy, assign_roles
from services.policy.state import InstanceView, QueuedRequest, Role
from services.policy.step_time import StepShape
from services.policy.tickets import TicketLedger, TicketPolicy, choose_for_ticket
from services.policy.token_budget import BudgetPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalancePolicy:
    """Move waiting requests from the most to the least loaded instance, by load alone."""

    gap_s: float = 0.3
    """Act when their queued work differs by more than this."""
    interval_s: float = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadroomPolicy:
    """One-shot routing by predicted TTFT and TBT against the request's objectives."""

    pack: bool = True
    """Take the instance with the least headroom that still makes it (best fit); else the most."""
    explore: float = 0.01
    """Share of requests placed at random, as online predictors need."""
    ttft_weight: float = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterPolicy:
    """What a placing router does."""

    placement: PlacementPolicy
    budget: BudgetPolicy
    """As the workers', to predict them."""
    order: OrderPolicy
    """As the workers', to predict them."""
    headroom: HeadroomPolicy | None = None
    """Replaces the placement."""
    offload: OffloadPolicy | None = None
    rescue: bool = False
    """Offload to LP and unified instances as well."""
    tickets: TicketPolicy | None = None
    rebalance: RebalancePolicy | None = None
    deadline_priority: bool = False
    """Send the deadline as vLLM priority."""
    roles: RolePolicy | None = None
    """HPs follow the offload pressure."""


ROLE_INTERVAL_S = 2.0
TICKET_HOLDERS = 4
"""Most LPs that are asked for a request in one go, the most backlogged first."""


class PlacingRouter:
    """Places each request on arrival; may move it while it waits."""

    def __init__(
        self,
        cluster: Cluster,
        states: Sequence[WorkerState],
        policy: RouterPolicy,
        seed: int,
        card: PredictionCard | None = None,
    ) -> None:
        self._cluster = cluster
        self._card = card
        self._states = states
        self._by_id = {state.view.worker_id: state for state in states}
        self._views = [state.view for state in states]
        self._policy = policy
        self._controller = RoleController(policy.roles, len(states)) if policy.roles else None
        self._high: list[WorkerState] = []
        self._low: list[WorkerState] = []
        self._split()
        self.role_changes: list[tuple[float, int]] = []
        """(Time, number of HPs from then on)."""
        self._urgent_work_s = 0.0
        self._offloads = self._unsaved = 0
        self._roles_s = 0.0
        self._placement = PlacementState(rng=random.Random(seed))
        self._rng = random.Random(seed + 1)
        self._ledger = TicketLedger(policy.tickets) if policy.tickets else None
        self._tightest_tbt_s = math.inf
        self._transfers: dict[str, tuple[RoutedRequest, WorkerState]] = {}
        """By id: a request as it will be where it moves to, and that worker."""
        self._rebalanced_s = 0.0
        self.moves = 0
        self.refused_moves = 0
        self.ticket_moves = 0

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        """Place a request."""
        self._tightest_tbt_s = min(self._tightest_tbt_s, request.slo.tbt_s)
        if self._policy.deadline_priority:
            request.priority = round(request.deadline_s * 1e3)
        routed = RoutedRequest.arrived(request)
        state = self._choose(routed, now_s)
        self._send(routed, state, now_s)
        self._judge(state, now_s)
        if self._ledger:
            self._draw(now_s)

    def on_scheduled(
        self, index: int, started: Sequence[SimRequest], relegated: Sequence[SimRequest], now_s: float
    ) -> None:
        """Take note of who started and who was given up."""
        self._states[index].take_in_scheduled(started, relegated, now_s)

    def on_report(self, index: int, report: StepReport, now_s: float) -> None:
        """Take in a report and see who should move."""
        state = self._states[index]
        if self._card:
            for sim in report.first_tokens:
                self._card.first_token(sim, now_s)
        state.take_in(report, now_s)
        self._judge(state, now_s)
        if self._ledger and state.view.role is Role.HIGH:
            self._draw(now_s)
        if self._policy.rebalance:
            self._rebalance(self._policy.rebalance, now_s)
        if self._controller and now_s - self._roles_s >= ROLE_INTERVAL_S:
            self._follow_pressure(self._controller, now_s)

    def on_withdrawn(self, request: SimRequest, gone: bool, now_s: float) -> None:
        """Send a withdrawn request on; leave one that had started where it is."""
        there, target = self._transfers.pop(request.request_id)
        target.expect_no_more(there)
        source = self._states[request.worker]
        here = source.find(request)
        if gone and here is not None:
            self.moves += 1
            source.discard(here)
            there.relegated = here.relegated
            self._send(there, target, now_s)
            return
        self.refused_moves += 1
        if here is not None:
            source.keep(here, now_s)

    def _send(self, request: RoutedRequest, state: WorkerState, now_s: float) -> None:
        if self._card:
            self._card.sends(state, request, self._policy.order, now_s)
        state.add(request)
        request.submit(self._cluster, state.index, now_s)

    def _choose(self, request: RoutedRequest, now_s: float) -> WorkerState:
        if self._policy.headroom:
            return self._by_headroom(request, self._policy.headroom, now_s)

        def ttft_s(view: InstanceView, request: QueuedRequest, _budget: BudgetPolicy) -> float:
            return self._by_id[view.worker_id].ttft_s(request, now_s)

        placement = place(
            request, self._views, self._policy.placement, self._placement, self._policy.budget, predict=ttft_s
        )
        assert placement.worker_id is not None
        return self._by_id[placement.worker_id]

    def _by_headroom(self, request: QueuedRequest, policy: HeadroomPolicy, now_s: float) -> WorkerState:
        if self._rng.random() < policy.explore:
            return self._rng.choice(self._states)
        positive: list[tuple[float, WorkerState]] = []
        rest: list[tuple[float, WorkerState]] = []
        for state in self._states:
            view = state.view
            context = view.decode_context_tokens + request.prompt_tokens
            step_s = view.model.step_s(StepShape(0, view.decodes + len(view.queue) + 1, context))
            ttft_room = (request.slo.ttft_s - state.ttft_s(request, now_s)) / request.slo.ttft_s
            tbt_room = (request.slo.tbt_s - step_s) / request.slo.tbt_s
            room = policy.ttft_weight * ttft_room + (1 - policy.ttft_weight) * tbt_room
            (positive if ttft_room >= 0 and tbt_room >= 0 else rest).append((room, state))
        if positive and policy.pack:
            return min(positive, key=_room)[1]
        return max(positive or rest, key=_room)[1]

    def _move(self, request: RoutedRequest, there: RoutedRequest, target: WorkerState) -> None:
        self._states[request.sim.worker].ask_back(request)
        self._transfers[request.request_id] = (there, target)
        target.expect(there)
        self._cluster.withdraw(request.sim)

    def _ordered(self, state: WorkerState, now_s: float) -> list[QueuedRequest]:
        view = state.view
        return order_waiting(view.queue, now_s, state.pace, self._policy.order).ordered

    def _judge(self, state: WorkerState, now_s: float) -> None:
        """Offload what would miss on an LP or unified worker and makes it elsewhere."""
        policy = self._policy.offload
        if policy is None or state.view.role is Role.HIGH or not state.view.queue:
            return
        ordered = self._ordered(state, now_s)
        pace = state.pace
        step_s, hop_s = pace.step_s, state.view.hop_s
        estimates = predict_in_order(ordered, pace, running=state.running(now_s))
        for request, estimate in zip(ordered, estimates, strict=True):
            if not is_at_risk(request, estimate, now_s, step_s, hop_s, policy) or request.started:
                continue
            # Others than those sent here are on their way here.
            if not isinstance(request, RoutedRequest) or request.moving or request.submitted_s == math.inf:
                continue
            if request.hops >= policy.hop_limit or now_s - request.decided_s < policy.settle_s:
                continue  # the rule's own tests, spared the cost of the candidates
            decision = decide_offload(
                request, estimate, self._candidates(state, request, now_s), now_s, step_s, policy, request.decided_s
            )
            if decision.action is OffloadAction.OFFLOAD and decision.target is not None:
                target = self._by_id[decision.target]
                there = request.elsewhere(urgent=target.view.role is Role.HIGH)
                there.hops += 1
                if there.urgent:
                    self._offloads += 1
                    self._urgent_work_s += target.pace.work_s(request.prompt_tokens)
                self._move(request, there, target)
            elif decision.action is OffloadAction.RELEGATE and not request.relegated:
                request.decided_s = now_s
                self._unsaved += 1

    def _candidates(self, home: WorkerState, request: QueuedRequest, now_s: float) -> list[OffloadCandidate]:
        """Return the workers that a request may move to: HP by offload, by rescue the least loaded other."""
        takers = list(self._high)
        if self._policy.rescue and len(self._low) > 1:
            takers.append(min((peer for peer in self._low if peer is not home), key=_work))
        return [OffloadCandidate(taker.view.worker_id, taker.ahead(now_s).estimate(request)) for taker in takers]

    def _split(self) -> None:
        self._high = [state for state in self._states if state.view.role is Role.HIGH]
        self._low = [state for state in self._states if state.view.role is not Role.HIGH]

    def _follow_pressure(self, controller: RoleController, now_s: float) -> None:
        """Set the roles that the offload pressure since the last call asks for, as the router's RoleKeeper does."""
        busy_share = self._urgent_work_s / ((now_s - self._roles_s) * max(len(self._high), 1))
        unsaved_share = self._unsaved / max(self._unsaved + self._offloads, 1)
        self._urgent_work_s, self._offloads, self._unsaved, self._roles_s = 0.0, 0, 0, now_s
        decision = controller.update(now_s, len(self._states), busy_share, unsaved_share)
        roles = {state.view.worker_id: state.view.role for state in self._states}
        changed = False
        for worker_id, role in assign_roles(list(roles), decision.hp_count, roles).items():
            if role is not roles[worker_id]:
                changed = True
                state = self._by_id[worker_id]
                state.view.role = role
                self._cluster.set_role(state.index, role)
        if changed:
            self._split()
            self.role_changes.append((now_s, decision.hp_count))

    def _draw(self, now_s: float) -> None:
        """Let HP instances with nothing urgent draw waiting work."""
        ledger = self._ledger
        assert ledger is not None
        tbt_s = self._tightest_tbt_s
        ledger.issue(((state.view.worker_id, state.obstacle(ledger.policy, tbt_s)) for state in self._high), now_s)
        if not ledger.free:
            return
        backlogged = [state for state in self._low if state.may_give and state.work_s > state.pace.capacity_s]
        holders = heapq.nlargest(TICKET_HOLDERS, backlogged, key=_work)
        if not any(state.can_give for state in holders):
            return
        backlogs_s = {state.view.worker_id: state.work_s - state.pace.capacity_s for state in holders}
        orders: dict[str, list[QueuedRequest]] = {}
        while backlogs_s and (granted := ledger.grant(backlogs_s, 0.1, now_s)):
            for ticket in granted:
                holder = self._by_id[ticket.holder]
                if ticket.holder not in orders:
                    orders[ticket.holder] = self._ordered(holder, now_s)
                open_ = [one for one in orders[ticket.holder] if _is_here(one)]
                chosen = choose_for_ticket(open_, holder.pace.budget_tokens, self._by_id[ticket.issuer].view)
                if chosen is None:
                    ledger.release(ticket.ticket_id)
                    backlogs_s.pop(ticket.holder, None)
                elif isinstance(chosen, RoutedRequest) and ledger.redeem(ticket.ticket_id, now_s):
                    self.ticket_moves += 1
                    self._move(chosen, chosen.elsewhere(ticketed=True), self._by_id[ticket.issuer])

    def _rebalance(self, policy: RebalancePolicy, now_s: float) -> None:
        if now_s - self._rebalanced_s < policy.interval_s:
            return
        self._rebalanced_s = now_s
        works_s = [(_staying_s(state), state) for state in self._states]
        (most_s, busiest), (least_s, idlest) = max(works_s, key=_room), min(works_s, key=_room)
        gap_s = most_s - least_s
        for request in reversed(busiest.sent):
            work_s = busiest.pace.remaining_work_s(request)
            if gap_s <= policy.gap_s or request.started:
                break
            if not request.moving and work_s < gap_s / 2:
                gap_s -= 2 * work_s
                self._move(request, request.elsewhere(), idlest)


def _room(entry: tuple[float, WorkerState]) -> float:
    return entry[0]


def _is_here(request: QueuedRequest) -> bool:
    """Whether a request counts where a ticket looks for one: those on their way, here or away, do not."""
    return request.started or (isinstance(request, RoutedRequest) and request.may_leave)


def _staying_s(state: WorkerState) -> float:
    """Return the work there and on its way there, in seconds, but for what is asked back."""
    return state.work_s - sum(state.pace.remaining_work_s(request) for request in state.sent if request.moving)


def _work(state: WorkerState) -> float:
    return state.work_s
