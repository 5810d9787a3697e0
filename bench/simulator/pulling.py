"""Late binding: requests wait in one ordered set at the router, and instances pull from it when they have room."""

import math
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from bench.simulator.cluster import Cluster
from bench.simulator.instance import StepReport
from bench.simulator.request import SimRequest
from bench.simulator.router import WorkerState
from services.policy.order import OrderPolicy
from services.policy.relegation import NONE, RelegatedTurns, moore_hodgson


@dataclass(frozen=True, slots=True, kw_only=True)
class PullPolicy:
    """When an instance has room, and who goes next."""

    order: OrderPolicy
    committed_steps: float = 2.0
    """An instance pulls while less than this many full steps of prefill are queued there, the running one included."""
    max_committed: int = 8
    """Most requests queued at one instance."""
    caution: float = 1.0
    """Predicted times are multiplied by this before they are held against deadlines."""
    refresh_s: float = 0.01
    """Whom to give up is decided anew at most this often."""


class PullingRouter:
    """Holds waiting requests back until an instance can start them."""

    def __init__(self, cluster: Cluster, states: Sequence[WorkerState], policy: PullPolicy) -> None:
        self._cluster = cluster
        self._states = states
        self._policy = policy
        self._waiting: list[SimRequest] = []
        """Those that one idle instance could still serve in time, by deadline."""
        self._late: deque[SimRequest] = deque()
        """The others, in the order in which they became late."""
        self._given_up: set[int] = set()
        """Of the waiting, by identity: those that the last schedule leaves out."""
        self._turns = RelegatedTurns(policy.order.relegated_share)
        self._scheduled_s = -math.inf

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        """Keep a request, and start it at once where there is room."""
        insort(self._waiting, request, key=_deadline)
        self._pump(self._states, now_s)

    def on_report(self, index: int, report: StepReport, now_s: float) -> None:
        """Take in a report; the instance may have room now."""
        state = self._states[index]
        state.take_in(report, now_s)
        self._turns.earn(report.step_s)
        if self._waiting or self._late:
            self._pump((state,), now_s)

    def on_withdrawn(self, request: SimRequest, gone: bool, now_s: float) -> None:
        """Never: what was bound stays."""
        raise AssertionError("a pulling router withdraws nothing")

    def _pump(self, states: Sequence[WorkerState], now_s: float) -> None:
        """Fill the instances that have room, emptiest first."""
        open_states = [state for state in states if self._has_room(state)]
        while open_states and (self._waiting or self._late):
            state = min(open_states, key=_work)
            request = self._next(state, now_s)
            state.add(request)
            self._cluster.send(request, state.index)
            if not self._has_room(state):
                open_states.remove(state)

    def _has_room(self, state: WorkerState) -> bool:
        view = state.view
        if len(view.queue) >= self._policy.max_committed or view.decodes + len(view.queue) >= view.max_num_seqs:
            return False
        return state.work_s < self._policy.committed_steps * state.pace.capacity_s

    def _next(self, state: WorkerState, now_s: float) -> SimRequest:
        order = self._policy.order
        if self._late and self._turns.credit_s > 0 and now_s - self._late[0].arrival_s >= order.relegated_after_s:
            self._turns.spend(state.pace.remaining_work_s(self._late[0]))
            return self._late.popleft()
        if order.relegation != NONE and now_s - self._scheduled_s >= self._policy.refresh_s:
            self._scheduled_s = now_s
            self._schedule(now_s)
        for place, request in enumerate(self._waiting):
            if id(request) not in self._given_up:
                return self._waiting.pop(place)
        if self._waiting:
            # Given up for others that are gone by now, and still in time.
            return self._waiting.pop(0)
        return self._late.popleft()

    def _schedule(self, now_s: float) -> None:
        """Choose anew the fewest, longest requests without which all others make their deadlines."""
        states, policy = self._states, self._policy
        count = len(states)
        caution = policy.caution
        pace = min(states, key=_work).pace
        hop_s = states[0].view.hop_s
        rooms_s, works_s, waiting = [], [], []
        for request in self._waiting:
            work_s = pace.remaining_work_s(request)
            alone_s = caution * pace.finish_s(work_s)
            room_s = request.deadline_s - now_s - hop_s
            if room_s < alone_s:
                request.relegated = request.was_relegated = True
                self._late.append(request)
                continue
            waiting.append(request)
            # The pool works on many at once, but each request by itself takes as long as on one instance.
            rooms_s.append(room_s - alone_s * (1 - 1 / count))
            works_s.append(work_s)
        self._waiting = waiting
        committed_s = math.fsum(state.work_s for state in states)
        speed = math.fsum(state.pace.capacity_s / state.pace.step_s for state in states) / caution
        dropped = moore_hodgson(rooms_s, works_s, lambda work_s: work_s / speed, committed_s)
        self._given_up = {id(waiting[place]) for place in dropped}


def _work(state: WorkerState) -> float:
    return state.work_s


def _deadline(request: SimRequest) -> float:
    return request.deadline_s
