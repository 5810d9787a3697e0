"""Late binding: requests wait in one ordered set at the router, and instances pull from it when they have room."""

from collections.abc import Sequence
from dataclasses import dataclass

from bench.simulator.cluster import Cluster
from bench.simulator.instance import StepReport
from bench.simulator.request import SimRequest
from bench.simulator.router import WorkerState
from services.policy.order import OrderPolicy
from services.policy.relegation import NONE, RelegatedTurns, long_prompt_weight, moore_hodgson


@dataclass(frozen=True, slots=True, kw_only=True)
class PullPolicy:
    """When an instance has room, and who goes next."""

    order: OrderPolicy
    committed_steps: float = 1.0
    """An instance pulls while less than this many full steps of prefill are queued there."""
    max_committed: int = 8
    """Most requests queued at one instance."""
    caution: float = 1.1
    """Predicted times are multiplied by this before they are held against deadlines."""
    refresh_s: float = 0.02
    """The set is ordered anew at most this often, besides when requests arrive."""


class PullingRouter:
    """Holds waiting requests back until an instance can start them."""

    def __init__(self, cluster: Cluster, states: Sequence[WorkerState], policy: PullPolicy) -> None:
        self._cluster = cluster
        self._states = states
        self._policy = policy
        self._hopeful: list[SimRequest] = []
        """By deadline, first last."""
        self._relegated: list[SimRequest] = []
        """By arrival, first last."""
        self._turns = RelegatedTurns(policy.order.relegated_share)
        self._earned_s = 0.0
        self._pruned_s = 0.0

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        """Keep a request, and start it at once where there is room."""
        self._insert(request)
        self._pump(self._states, now_s)

    def on_report(self, index: int, report: StepReport, now_s: float) -> None:
        """Take in a report; the instance may have room now."""
        state = self._states[index]
        state.take_in(report, now_s)
        for request in report.relegated:
            request.relegated = True
        self._turns.earn(report.step_s / len(self._states))
        if self._hopeful or self._relegated:
            self._pump((state,), now_s)

    def on_withdrawn(self, request: SimRequest, gone: bool, now_s: float) -> None:
        """Never: what was bound stays."""
        raise AssertionError("a pulling router withdraws nothing")

    def _insert(self, request: SimRequest) -> None:
        queue = self._hopeful
        place = len(queue)
        while place and queue[place - 1].deadline_s < request.deadline_s:
            place -= 1
        queue.insert(place, request)

    def _pump(self, states: Sequence[WorkerState], now_s: float) -> None:
        """Fill the instances that have room, emptiest first."""
        open_states = [state for state in states if self._has_room(state)]
        while open_states and (self._hopeful or self._relegated):
            state = min(open_states, key=_work)
            request = self._next(state, now_s)
            if request is None:
                return
            state.add(request)
            self._cluster.send(request, state.index)
            if not self._has_room(state):
                open_states.remove(state)

    def _has_room(self, state: WorkerState) -> bool:
        view = state.view
        if len(view.queue) >= self._policy.max_committed or view.decodes + len(view.queue) >= view.max_num_seqs:
            return False
        return state.work_s < self._policy.committed_steps * state.pace.capacity_s

    def _next(self, state: WorkerState, now_s: float) -> SimRequest | None:
        order = self._policy.order
        if self._relegated:
            oldest = self._relegated[-1]
            if self._turns.credit_s > 0 and now_s - oldest.arrival_s >= order.relegated_after_s:
                self._turns.spend(state.pace.remaining_work_s(oldest))
                return self._relegated.pop()
        if order.relegation != NONE and now_s - self._pruned_s >= self._policy.refresh_s:
            self._pruned_s = now_s
            self._prune(now_s)
        if self._hopeful:
            return self._hopeful.pop()
        return self._relegated.pop() if self._relegated else None

    def _prune(self, now_s: float) -> None:
        """Relegate the fewest, longest requests without which all others make their deadlines."""
        queue = self._hopeful
        count = len(self._states)
        typical = min(self._states, key=_work)
        pace = typical.pace
        fairness = self._policy.order.fairness
        rooms_s, works_s, scores = [], [], []
        for request in reversed(queue):
            work_s = pace.remaining_work_s(request)
            # The pool works on many at once, but each request by itself takes as long as on one instance.
            alone_s = pace.finish_s(work_s) * (1 - 1 / count)
            rooms_s.append(request.deadline_s - now_s - typical.view.hop_s - self._policy.caution * alone_s)
            works_s.append(work_s / count)
            scores.append(work_s * long_prompt_weight(request.request_id, fairness))
        committed_s = sum(state.work_s for state in self._states) / count
        factor = self._policy.caution * (pace.overhead_s + pace.capacity_s) / pace.capacity_s
        dropped = moore_hodgson(rooms_s, works_s, lambda work_s: factor * work_s, committed_s, scores)
        if not dropped:
            return
        newest_first = len(queue) - 1
        gone = {newest_first - place for place in dropped}
        for place in gone:
            queue[place].relegated = queue[place].was_relegated = True
        self._relegated += [queue[place] for place in gone]
        self._relegated.sort(key=_arrival, reverse=True)
        self._hopeful = [request for place, request in enumerate(queue) if place not in gone]


def _work(state: WorkerState) -> float:
    return state.work_s


def _arrival(request: SimRequest) -> float:
    return request.arrival_s
