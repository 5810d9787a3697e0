"""Late binding in virtual time: requests wait at the router until an instance draws them."""

from collections.abc import Sequence
from typing import cast

from bench.simulator.cluster import Cluster
from bench.simulator.instance import StepReport
from bench.simulator.request import SimRequest
from bench.simulator.view import RoutedRequest, WorkerState
from services.policy.late_binding import LateBindingPolicy, WaitingSet
from services.policy.order import OrderPolicy
from services.policy.tickets import TicketPolicy


class PullingRouter:
    """Holds waiting requests back until an instance can start them."""

    def __init__(
        self,
        cluster: Cluster,
        states: Sequence[WorkerState],
        policy: LateBindingPolicy,
        order: OrderPolicy,
        tickets: TicketPolicy | None,
    ) -> None:
        self._cluster = cluster
        self._states = states
        self._by_id = {state.view.worker_id: state for state in states}
        self._waiting = WaitingSet(policy, order, tickets)

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        """Keep a request, and start it at once where there is room."""
        self._waiting.add(RoutedRequest.arrived(request))
        self._draw(self._states, now_s)

    def on_scheduled(
        self, index: int, started: Sequence[SimRequest], relegated: Sequence[SimRequest], now_s: float
    ) -> None:
        """Take note of who started and who was given up."""
        self._states[index].take_in_scheduled(started, relegated, now_s)

    def on_report(self, index: int, report: StepReport, now_s: float) -> None:
        """Take in a report; the instance may have room now."""
        state = self._states[index]
        state.take_in(report, now_s)
        self._waiting.earn(report.step_s)
        if self._waiting:
            self._draw((state,), now_s)

    def on_withdrawn(self, request: SimRequest, gone: bool, now_s: float) -> None:
        """Never: what was bound stays."""
        raise AssertionError("a pulling router withdraws nothing")

    def _draw(self, among: Sequence[WorkerState], now_s: float) -> None:
        for queued in self._waiting.refresh(self._states, now_s):
            cast("RoutedRequest", queued).sim.was_relegated = True
        for binding in self._waiting.draw(self._states, now_s, among):
            cast("RoutedRequest", binding.request).submit(self._cluster, self._by_id[binding.worker_id].index, now_s)
