"""The router in virtual time: what it knows of each worker, and the decisions that services.policy takes from it."""

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from bench.simulator.cluster import Cluster
from bench.simulator.instance import StepReport
from bench.simulator.request import SimRequest
from services.policy.offload import OffloadAction, OffloadCandidate, OffloadPolicy, decide_offload
from services.policy.order import OrderPolicy, order_waiting
from services.policy.placement import PlacementPolicy, PlacementState, place
from services.policy.prefill import PrefillPace, TtftEstimate, instance_pace, predict_in_order
from services.policy.roles import RoleController, RolePolicy, assign_roles
from services.policy.state import InstanceView, QueuedRequest, Role
from services.policy.step_time import StepShape
from services.policy.tickets import TicketLedger, TicketPolicy, choose_for_ticket
from services.policy.token_budget import BudgetPolicy


class WorkerState:
    """What the router knows of one worker; predictions are kept until something changes."""

    __slots__ = ("_budget", "_pace", "_work_s", "index", "last_report_s", "step_s", "view")

    def __init__(self, index: int, view: InstanceView, budget: BudgetPolicy) -> None:
        self.index = index
        self.view = view
        self.step_s = 0.0
        self.last_report_s = 0.0
        self._budget = budget
        self._pace: PrefillPace | None = None
        self._work_s: float | None = None

    @property
    def pace(self) -> PrefillPace:
        """How fast it prefills beside its present decodes."""
        if self._pace is None:
            self._pace = instance_pace(self.view, self._budget)
        return self._pace

    @property
    def work_s(self) -> float:
        """Prefill work queued there, in seconds; not of relegated requests, which wait behind whatever comes."""
        if self._work_s is None:
            pace = self.pace
            self._work_s = sum(pace.remaining_work_s(request) for request in self.view.queue if not request.relegated)
        return self._work_s

    def ttft_s(self, request: QueuedRequest) -> float:
        """Seconds to a new request's first token behind everything queued there."""
        pace = self.pace
        return self.view.hop_s + pace.finish_s(self.work_s + pace.remaining_work_s(request))

    def add(self, request: QueuedRequest) -> None:
        """Count a request sent there, in flight included."""
        self.view.queue.append(request)
        if self._work_s is not None and not request.relegated:
            self._work_s += self.pace.remaining_work_s(request)

    def discard(self, request: SimRequest) -> None:
        """Forget a request that left the queue."""
        if request in self.view.queue:
            self.view.queue.remove(request)
            self._work_s = None

    def take_in(self, report: StepReport, now_s: float) -> None:
        """Apply a report."""
        view = self.view
        view.decodes = report.decodes
        view.decode_context_tokens = report.decode_context_tokens
        view.min_tbt_s = report.min_tbt_s
        view.kv_used_tokens = report.kv_used_tokens
        view.model = report.model or view.model
        self.step_s = report.step_s
        self.last_report_s = now_s
        for request in report.first_tokens:
            if request in view.queue:
                view.queue.remove(request)
        view.queue += [request for request in report.requeued if request not in view.queue]
        self._pace = self._work_s = None


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
    relegate_unsafe: bool = True
    """Relegate what the offload rule says that no instance can save."""
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

    def __init__(self, cluster: Cluster, states: Sequence[WorkerState], policy: RouterPolicy, seed: int) -> None:
        self._cluster = cluster
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
        self._targets: dict[str, WorkerState] = {}
        self._judged_s: dict[str, float] = {}
        self._rebalanced_s = 0.0
        self.moves = 0
        self.refused_moves = 0
        self.ticket_moves = 0

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        """Place a request."""
        self._tightest_tbt_s = min(self._tightest_tbt_s, request.slo.tbt_s)
        if self._policy.deadline_priority:
            request.priority = round(request.deadline_s * 1e3)
        state = self._choose(request)
        state.add(request)
        self._judged_s[request.request_id] = now_s
        self._cluster.send(request, state.index)
        if self._policy.offload:
            self._judge(state, now_s)
        if self._ledger:
            self._draw(now_s)

    def on_report(self, index: int, report: StepReport, now_s: float) -> None:
        """Take in a report and see who should move."""
        state = self._states[index]
        state.take_in(report, now_s)
        if self._policy.offload and state.view.role is not Role.HIGH and state.view.queue:
            self._judge(state, now_s)
        if self._ledger and state.view.role is Role.HIGH:
            self._draw(now_s)
        if self._policy.rebalance:
            self._rebalance(self._policy.rebalance, now_s)
        if self._controller and now_s - self._roles_s >= ROLE_INTERVAL_S:
            self._follow_pressure(self._controller, now_s)

    def on_withdrawn(self, request: SimRequest, gone: bool, now_s: float) -> None:
        """Send a withdrawn request on; leave one that had started where it is."""
        target = self._targets.pop(request.request_id)
        source = self._states[request.worker]
        self._judged_s[request.request_id] = now_s
        if gone:
            self.moves += 1
            self._cluster.send(request, target.index)
            return
        self.refused_moves += 1
        request.urgent = request.ticketed = False
        request.hops -= 1
        target.discard(request)
        if not request.token_times_s:
            source.add(request)

    def _choose(self, request: SimRequest) -> WorkerState:
        if self._policy.headroom:
            return self._by_headroom(request, self._policy.headroom)
        key = str(request.prefix_hashes[0]) if request.prefix_hashes else ""
        placement = place(
            request, self._views, self._policy.placement, self._placement, self._policy.budget, key, self._ttft_s
        )
        assert placement.worker_id is not None
        return self._by_id[placement.worker_id]

    def _ttft_s(self, view: InstanceView, request: QueuedRequest, budget: BudgetPolicy) -> float:
        return self._by_id[view.worker_id].ttft_s(request)

    def _by_headroom(self, request: SimRequest, policy: HeadroomPolicy) -> WorkerState:
        if self._rng.random() < policy.explore:
            return self._rng.choice(self._states)
        positive: list[tuple[float, WorkerState]] = []
        rest: list[tuple[float, WorkerState]] = []
        for state in self._states:
            view = state.view
            context = view.decode_context_tokens + request.prompt_tokens
            step_s = view.model.step_s(StepShape(0, view.decodes + len(view.queue) + 1, context))
            ttft_room = (request.slo.ttft_s - state.ttft_s(request)) / request.slo.ttft_s
            tbt_room = (request.slo.tbt_s - step_s) / request.slo.tbt_s
            room = policy.ttft_weight * ttft_room + (1 - policy.ttft_weight) * tbt_room
            (positive if ttft_room >= 0 and tbt_room >= 0 else rest).append((room, state))
        if positive and policy.pack:
            return min(positive, key=_room)[1]
        return max(positive or rest, key=_room)[1]

    def _move(self, request: SimRequest, target: WorkerState) -> None:
        source = self._states[request.worker]
        source.discard(request)
        request.hops += 1
        target.add(request)
        self._targets[request.request_id] = target
        self._cluster.withdraw(request)

    def _ordered(self, state: WorkerState, now_s: float) -> list[SimRequest]:
        view = state.view
        result = order_waiting(view.queue, now_s, state.pace, self._policy.order, view.role)
        return cast("list[SimRequest]", result.ordered)

    def _judge(self, state: WorkerState, now_s: float) -> None:
        """Offload what would miss here and makes it elsewhere."""
        policy = self._policy.offload
        assert policy is not None
        ordered = self._ordered(state, now_s)
        step_s = state.pace.step_s
        hop_s = state.view.hop_s
        for request, estimate in zip(ordered, predict_in_order(ordered, state.pace), strict=True):
            # The rule's own first test, spared the cost of the candidates: most requests are not at risk.
            margin_s = max(policy.margin_steps * step_s + hop_s, policy.margin_share * request.slo.ttft_s)
            if now_s + policy.caution * estimate.mean_s <= request.deadline_s - margin_s or request.started:
                continue
            if request.moving or request.hops >= policy.hop_limit:
                continue
            candidates = [OffloadCandidate(high.view.worker_id, _urgent_estimate(high, request)) for high in self._high]
            if self._policy.rescue and len(self._low) > 1:
                peer = min((peer for peer in self._low if peer is not state), key=_work)
                candidates.append(OffloadCandidate(peer.view.worker_id, _peer_estimate(peer, request)))
            decision = decide_offload(
                request, estimate, candidates, now_s, step_s, policy, self._judged_s.get(request.request_id, -math.inf)
            )
            if decision.action is OffloadAction.OFFLOAD and decision.target is not None:
                target = self._by_id[decision.target]
                request.urgent = target.view.role is Role.HIGH
                if self._ledger and request.urgent:
                    self._ledger.revoke(decision.target)
                if request.urgent:
                    self._offloads += 1
                    self._urgent_work_s += target.pace.work_s(request.prompt_tokens)
                self._move(request, target)
            elif decision.action is OffloadAction.RELEGATE:
                self._unsaved += 1
                if self._policy.relegate_unsafe:
                    request.relegated = request.was_relegated = True

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
        ledger.issue((state.view for state in self._high), self._tightest_tbt_s, now_s)
        if not ledger.free:
            return
        backlogged = (state for state in self._low if state.work_s > state.pace.capacity_s and _may_give(state))
        backlogs_s = {
            state.view.worker_id: state.work_s - state.pace.capacity_s
            for state in heapq.nlargest(TICKET_HOLDERS, backlogged, key=_work)
        }
        while backlogs_s and (granted := ledger.grant(backlogs_s, 0.1, now_s)):
            for ticket in granted:
                holder = self._by_id[ticket.holder]
                ordered = [request for request in self._ordered(holder, now_s) if not request.moving]
                chosen = choose_for_ticket(ordered, holder.pace.budget_tokens)
                if chosen is None:
                    ledger.release(ticket.ticket_id)
                    backlogs_s.pop(ticket.holder, None)
                elif isinstance(chosen, SimRequest) and ledger.redeem(ticket.ticket_id, now_s):
                    chosen.ticketed = True
                    self.ticket_moves += 1
                    self._move(chosen, self._by_id[ticket.issuer])

    def _rebalance(self, policy: RebalancePolicy, now_s: float) -> None:
        if now_s - self._rebalanced_s < policy.interval_s:
            return
        self._rebalanced_s = now_s
        busiest = max(self._states, key=_work)
        idlest = min(self._states, key=_work)
        gap_s = busiest.work_s - idlest.work_s
        for request in reversed(busiest.view.queue):
            work_s = busiest.pace.remaining_work_s(request)
            if gap_s <= policy.gap_s or request.started:
                break
            if isinstance(request, SimRequest) and not request.moving and work_s < gap_s / 2:
                gap_s -= 2 * work_s
                self._move(request, idlest)


def _urgent_estimate(state: WorkerState, request: QueuedRequest) -> TtftEstimate:
    """Predict a request on an HP instance that serves urgent requests first."""
    pace = state.pace
    ahead = [queued for queued in state.view.queue if queued.started or queued.urgent]
    ahead_s = sum(pace.remaining_work_s(queued) for queued in ahead)
    wait_s = pace.finish_s(ahead_s) if ahead_s > 0 else 0.0
    done_s = pace.finish_s(ahead_s + pace.remaining_work_s(request))
    # Withdrawal waits for the rest of a step at home; the new engine's step in progress comes first as well.
    hop_s = 3 * state.view.hop_s + 0.5 * state.step_s
    return TtftEstimate(hop_s + done_s, min(wait_s, done_s), done_s - min(wait_s, done_s), hop_s)


def _peer_estimate(state: WorkerState, request: QueuedRequest) -> TtftEstimate:
    """Predict a request behind everything that can make it on another LP or unified instance."""
    hop_s = 3 * state.view.hop_s + 0.5 * state.step_s
    done_s = state.pace.finish_s(state.work_s + state.pace.remaining_work_s(request))
    wait_s = min(state.pace.finish_s(state.work_s), done_s) if state.work_s > 0 else 0.0
    return TtftEstimate(hop_s + done_s, wait_s, done_s - wait_s, hop_s)


def _room(entry: tuple[float, WorkerState]) -> float:
    return entry[0]


def _may_give(state: WorkerState) -> bool:
    """Whether an LP has a request that a ticket could take."""
    return any(
        not (request.started or request.ticketed or request.urgent or cast("SimRequest", request).moving)
        for request in state.view.queue
    )


def _work(state: WorkerState) -> float:
    return state.work_s
