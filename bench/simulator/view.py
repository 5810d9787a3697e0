"""What the router knows of its requests and of each worker, in virtual time: what it sent, and what reports said."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.simulator.cluster import Cluster
from bench.simulator.instance import StepReport
from bench.simulator.request import SimRequest
from services.policy.prefill import PrefillPace, StepInProgress, instance_pace, newcomer_work_s, step_in_progress
from services.policy.state import InstanceView, QueuedRequest
from services.policy.telemetry import note_counted, see_step, share_out_progress
from services.policy.tickets import TicketPolicy, ticket_room
from services.policy.token_budget import BudgetPolicy
from services.router.estimates import Ahead, newcomer_ahead


@dataclass(slots=True, kw_only=True, eq=False)
class RoutedRequest(QueuedRequest):
    """A request on a worker, or on its way there, as the router knows it."""

    sim: SimRequest
    submitted_s: float = math.inf
    """When it was sent there; infinite: not yet."""
    decided_s: float = -math.inf
    """When it was last placed, moved, or refused a move."""
    moving: bool = False
    """A withdrawal of it is under way."""

    @classmethod
    def arrived(cls, sim: SimRequest) -> "RoutedRequest":
        """Return a request that just came in."""
        return cls(
            request_id=sim.request_id,
            arrival_s=sim.arrival_s,
            prompt_tokens=sim.prompt_tokens,
            priority=sim.priority,
            slo=sim.slo,
            prefix=sim.prefix_hashes,
            sim=sim,
        )

    def submit(self, cluster: Cluster, index: int, now_s: float) -> None:
        """Send it to a worker."""
        self.submitted_s = self.decided_s = now_s
        self.sim.relegated = self.relegated
        cluster.send(self.sim, index)

    @property
    def may_leave(self) -> bool:
        """Whether its worker can still give it back, and was not asked to."""
        return not (self.started or self.moving or self.submitted_s == math.inf)

    def elsewhere(self, *, urgent: bool = False, ticketed: bool = False) -> "RoutedRequest":
        """Return it as it will be on the worker that it moves to."""
        return replace(self, urgent=urgent, ticketed=ticketed, submitted_s=math.inf, moving=False, counted=False)


class WorkerState:
    """What the router knows of one worker; predictions are kept until something changes."""

    __slots__ = (
        "_before_last",
        "_began_s",
        "_busy",
        "_coming",
        "_obstacle",
        "_obstacle_tbt_s",
        "_others",
        "_pace",
        "_queued_tokens",
        "_sent",
        "_work_s",
        "budget",
        "index",
        "view",
    )

    def __init__(self, index: int, view: InstanceView, budget: BudgetPolicy) -> None:
        self.index = index
        self.view = view
        self.budget = budget
        self._sent: dict[str, RoutedRequest] = {}
        self._coming: dict[str, RoutedRequest] = {}
        self._others: list[QueuedRequest] = []
        self._busy = False
        self._began_s = 0.0
        self._queued_tokens = 0
        self._pace: PrefillPace | None = None
        self._work_s: float | None = None
        self._obstacle: str | None = None
        self._obstacle_tbt_s = 0.0
        self._before_last: int | None = None

    @property
    def pace(self) -> PrefillPace:
        """How fast it prefills beside its present decodes."""
        if self._pace is None:
            self._pace = instance_pace(self.view, self.budget)
        return self._pace

    @property
    def work_s(self) -> float:
        """Prefill work queued there, in seconds; not of relegated requests, which wait behind whatever comes."""
        if self._work_s is None:
            pace = self.pace
            self._work_s = sum(pace.remaining_work_s(request) for request in self.view.queue if not request.relegated)
        return self._work_s

    @property
    def sent(self) -> list[RoutedRequest]:
        """The requests there that have no token yet, first sent first."""
        return list(self._sent.values())

    def running(self, now_s: float) -> StepInProgress:
        """What the running step leaves to a request sent now."""
        sent = self.sent
        see_step(
            self.view,
            now_s,
            busy=self._busy,
            began_s=self._began_s,
            queued_tokens=self._queued_tokens,
            sent=sent,
            first_sent_s=sent[0].submitted_s if sent else 0.0,
        )
        return step_in_progress(self.view, self.pace)

    def ttft_s(self, request: QueuedRequest, now_s: float) -> float:
        """Seconds to a new request's first token behind everything queued there."""
        pace = self.pace
        own_s = newcomer_work_s(self.view, pace, request)
        return self.running(now_s).newcomer(pace, self.work_s, own_s, self.view.hop_s).mean_s

    def ahead(self, now_s: float) -> Ahead:
        """Return what a request that moves there would wait for."""
        self.running(now_s)
        return newcomer_ahead(self.view, self.budget, now_s, self.pace)

    def obstacle(self, policy: TicketPolicy, tbt_s: float) -> str:
        """Return what `ticket_room` says of it."""
        if self._obstacle is None or self._obstacle_tbt_s != tbt_s:
            self._obstacle, self._obstacle_tbt_s = ticket_room(self.view, self.pace, policy, tbt_s), tbt_s
        return self._obstacle

    @property
    def may_give(self) -> bool:
        """Whether it has a request that a ticket may take."""
        return self._tokens_before_last >= 0

    @property
    def can_give(self) -> bool:
        """Whether it may have one, besides, that its next step will not reach: in some order of its queue."""
        return self._tokens_before_last >= self.pace.budget_tokens

    @property
    def _tokens_before_last(self) -> int:
        """Prefill tokens before the one that a ticket may take, if the smallest of those comes last; -1: none may."""
        if self._before_last is None:
            tokens, smallest = 0, -1
            for request in self.view.queue:
                leaves = isinstance(request, RoutedRequest) and request.may_leave
                if not (leaves or request.started):
                    continue
                own = request.remaining_tokens
                tokens += own
                if leaves and not (request.ticketed or request.urgent) and (smallest < 0 or own < smallest):
                    smallest = own
            self._before_last = tokens - smallest if smallest >= 0 else -1
        return self._before_last

    def ask_back(self, request: RoutedRequest) -> None:
        """Note that it was asked to give a request back."""
        request.moving = True
        self._before_last = None

    def keep(self, request: RoutedRequest, now_s: float) -> None:
        """Note that it could not: the request had started."""
        request.moving, request.decided_s = False, now_s
        self._before_last = None

    def add(self, request: QueuedRequest) -> None:
        """Count a request that is about to be sent there."""
        assert isinstance(request, RoutedRequest)
        self.view.expects(request)
        self.view.receives(request)
        self._sent[request.request_id] = request
        self.view.queue.append(request)
        self._obstacle = None
        self._before_last = None
        if self._work_s is not None and not request.relegated:
            self._work_s += self.pace.remaining_work_s(request)

    def expect(self, request: RoutedRequest) -> None:
        """Count a request that is about to be moved there."""
        self.view.expects(request)
        self._coming[request.request_id] = request
        self._changed()

    def expect_no_more(self, request: RoutedRequest) -> None:
        """Stop counting a move: it comes, or not at all."""
        del self._coming[request.request_id]
        self._changed()

    def discard(self, request: RoutedRequest) -> None:
        """Forget a request that was handed back."""
        self._sent.pop(request.request_id, None)
        self.view.returns(request)
        self._changed()

    def find(self, sim: SimRequest) -> RoutedRequest | None:
        """Return a request that was sent there and has no token yet, as far as known."""
        return self._sent.get(sim.request_id)

    def take_in_scheduled(self, started: Sequence[SimRequest], relegated: Sequence[SimRequest], now_s: float) -> None:
        """Apply what was said at the start of a step."""
        for sim in started:
            if request := self._sent.get(sim.request_id):
                request.started = True
        for sim in relegated:
            if request := self._sent.get(sim.request_id):
                request.relegated = True
        self._share_out(now_s)

    def take_in(self, report: StepReport, now_s: float) -> None:
        """Apply a report at the end of a step."""
        view = self.view
        view.decodes = report.decodes
        view.decode_context_tokens = report.decode_context_tokens
        view.min_tbt_s = report.min_tbt_s
        view.kv_used_tokens = report.kv_used_tokens
        view.model = report.model or view.model
        if report.delivery_s and report.delivery_s != self.budget.delivery_s:
            self.budget = replace(self.budget, delivery_s=report.delivery_s)
        self._busy = report.busy
        self._queued_tokens = report.queued_tokens
        self._began_s = now_s - report.age_s
        sent = ((request, request.submitted_s) for request in self._sent.values())
        note_counted(sent, self._began_s - report.step_s, view.hop_s)
        for sim in report.first_tokens:
            if routed := self._sent.pop(sim.request_id, None):
                view.receives(routed)
        self._pace = None
        self._share_out(now_s)

    def _share_out(self, now_s: float) -> None:
        others = share_out_progress(self._sent.values(), self._queued_tokens, now_s)
        self._others = [others] if others else []
        self._changed()

    def _changed(self) -> None:
        self.view.queue = [*self._sent.values(), *self._others, *self._coming.values()]
        self._work_s = None
        self._obstacle = None
        self._before_last = None
