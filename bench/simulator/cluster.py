"""The event loop: arrivals, messages that take time, engine steps; and a router that decides."""

import gc
import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from bench.metrics import Outcome, RequestRecord, attains
from bench.simulator.engine import EngineConfig
from bench.simulator.instance import Instance, StepReport, StepTimeTruth
from bench.simulator.request import SimRequest
from bench.simulator.scatter import Scatter
from bench.workloads import WorkloadRequest
from services.policy.state import Role
from services.policy.step_time import A100_LLAMA3_8B, StepTimeModel


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The simulated hardware and network; the same for every policy that is compared."""

    instances: int = 8
    engine: EngineConfig = field(default_factory=EngineConfig)
    believed: StepTimeModel = A100_LLAMA3_8B
    """What the policies plan with at first."""
    learn: bool = True
    """Workers fit the model to their own steps."""
    truth: StepTimeTruth = field(default_factory=lambda: StepTimeTruth(model=A100_LLAMA3_8B))
    hop_s: float = 0.001
    """Router to worker, and back to the caller."""
    staleness_s: float = 0.002
    """Age of a worker's report when the router uses it, beyond the hop."""
    delivery: Scatter | None = None
    """From a step's end to its tokens' arrival at their callers, as measured; replaces `hop_s` there."""
    rooms: Sequence[tuple[float, Sequence[float]]] = ()
    """(Time, room in seconds that each instance's dynamic budget leaves in gaps from then on), as live workers learn it
    from how late their tokens come; without it, what the system's policy says."""
    drain_s: float = 600.0
    """The run ends this long after the last arrival; what is not finished then is unfinished."""
    seed: int = 0


class Router(Protocol):
    """Decides where requests go. Called by the cluster; answers through `Cluster.send`, `withdraw` and `refuse`."""

    def on_arrival(self, request: SimRequest, now_s: float) -> None:
        """A request came in."""

    def on_scheduled(
        self, index: int, started: Sequence[SimRequest], relegated: Sequence[SimRequest], now_s: float
    ) -> None:
        """A worker's notice came in: whom its new step started, whom it gave up."""

    def on_report(self, index: int, report: StepReport, now_s: float) -> None:
        """A worker's report came in."""

    def on_withdrawn(self, request: SimRequest, gone: bool, now_s: float) -> None:
        """A worker answered a withdrawal: the request is out of its queue, or it had started and stays."""


_Event = tuple[float, int, Callable[..., None], tuple[Any, ...]]
"""(time, sequence number, what to call, with what)."""


class Cluster:
    """Virtual time."""

    def __init__(
        self, config: ClusterConfig, instances: Sequence[Instance], give_up_after: int | None = None, warmup: int = 0
    ) -> None:
        """Start at time 0.

        Args:
            give_up_after: end the run once more requests than this, the first `warmup` aside, are sure to have missed.
            warmup: requests, first to arrive, whose misses do not count.
        """
        self.config = config
        self.instances = instances
        self.gave_up = False
        self._misses_left = math.inf if give_up_after is None else give_up_after
        self._counted_from_s = 0.0
        self._warmup = warmup
        self.now_s = 0.0
        self.events = 0
        self.preemptions = 0
        self.router: Router
        self._end_s = 0.0
        self._requests: list[SimRequest] = []
        self._heap: list[_Event] = []
        self._sequence = itertools.count()

    def run(self, workload: Sequence[WorkloadRequest], router: Router) -> list[RequestRecord]:
        """Serve a workload to its end and return what its callers saw, in order of arrival."""
        self.begin(workload, router)
        # A run makes next to no garbage, and looking for it takes a quarter of the time.
        collecting = gc.isenabled()
        gc.disable()
        try:
            while self.advance(1_000_000):
                pass
        finally:
            if collecting:
                gc.enable()
        for instance in self.instances:
            instance.engine.part_streams()
        self.preemptions = sum(request.preemptions for request in self._requests)
        return [self._record(request) for request in self._requests]

    def begin(self, workload: Sequence[WorkloadRequest], router: Router) -> None:
        """Prepare to serve a workload."""
        self.router = router
        requests = self._requests = [_sim_request(item) for item in workload]
        requests.sort(key=lambda request: request.arrival_s)
        self._end_s = requests[-1].arrival_s + self.config.drain_s if requests else 0.0
        self._counted_from_s = requests[self._warmup].arrival_s if self._warmup < len(requests) else math.inf
        self._next_arrival(iter(requests))
        for at_s, rooms_s in self.config.rooms:
            self.at(at_s, self._leave_rooms, rooms_s)

    def advance(self, most: int) -> bool:
        """Serve on for so many events; returns whether there is more to do."""
        heap, end_s = self._heap, self._end_s
        for _ in range(most):
            if not heap:
                return False
            now_s, _, call, arguments = heapq.heappop(heap)
            if now_s > end_s:
                return False
            self.now_s = now_s
            self.events += 1
            call(*arguments)
            if self._misses_left < 0:
                self.gave_up = True
                return False
        return True

    def at(self, time_s: float, call: Callable[..., None], *arguments: Any) -> None:
        """Call something at a time."""
        heapq.heappush(self._heap, (time_s, next(self._sequence), call, arguments))

    def send(self, request: SimRequest, index: int) -> None:
        """Send a request to a worker."""
        request.worker = index
        self.at(self.now_s + self.config.hop_s, self._deliver, request, self.instances[index])

    def withdraw(self, request: SimRequest) -> None:
        """Ask the request's worker to give it back; `on_withdrawn` has the answer."""
        self.at(self.now_s + self.config.hop_s, self._ask, request, self.instances[request.worker])

    def set_role(self, index: int, role: Role) -> None:
        """Change a worker's role, from the step after next on."""
        self.at(self.now_s + self.config.hop_s, setattr, self.instances[index], "role", role)

    def refuse(self, request: SimRequest) -> None:
        """Turn a request away."""
        request.outcome = Outcome.REFUSED

    def _next_arrival(self, arrivals: Any) -> None:
        request = next(arrivals, None)
        if request is not None:
            self.at(request.arrival_s, self._arrive, request, arrivals)

    def _arrive(self, request: SimRequest, arrivals: Any) -> None:
        self._next_arrival(arrivals)
        if self.instances[0].engine.fits(request):
            self.router.on_arrival(request, self.now_s)
        else:
            self.refuse(request)

    def _deliver(self, request: SimRequest, instance: Instance) -> None:
        if instance.step is None:
            instance.engine.add(request)
            self._start(instance)
        else:
            instance.inbox.append(request)

    def _start(self, instance: Instance) -> None:
        end_s = instance.start_step(self.now_s)
        if end_s is None:
            return
        self.at(end_s, self._finish, instance)
        assert instance.step is not None
        started, relegated = instance.step.admitted, instance.relegated
        if started or relegated:
            heard_s = self.now_s + self.config.hop_s + self.config.staleness_s
            self.at(heard_s, self._scheduled, instance.index, started, relegated)

    def _scheduled(self, index: int, started: Sequence[SimRequest], relegated: Sequence[SimRequest]) -> None:
        self.router.on_scheduled(index, started, relegated, self.now_s)

    def _leave_rooms(self, rooms_s: Sequence[float]) -> None:
        for instance, room_s in zip(self.instances, rooms_s, strict=True):
            instance.leave_room(room_s)

    def _finish(self, instance: Instance) -> None:
        report = instance.finish_step(self.now_s)
        report.age_s = self.config.staleness_s
        if self._misses_left < math.inf:
            self._misses_left -= sum(self._is_miss(request) for request in report.finished)
        self.at(
            self.now_s + self.config.hop_s + self.config.staleness_s,
            self._report,
            instance.index,
            report,
        )
        # Between two steps the engine core takes in what came: requests, then withdrawals as utility calls.
        for request in instance.inbox:
            instance.engine.add(request)
        instance.inbox.clear()
        if instance.withdrawals:
            for request in instance.withdrawals:
                self._answer(request, instance)
            instance.withdrawals.clear()
        self._start(instance)

    def _is_miss(self, request: SimRequest) -> bool:
        return request.arrival_s >= self._counted_from_s and not attains(self._record(request))

    def _report(self, index: int, report: StepReport) -> None:
        self.router.on_report(index, report, self.now_s)

    def _ask(self, request: SimRequest, instance: Instance) -> None:
        if instance.step is None:
            self._answer(request, instance)
        else:
            instance.withdrawals.append(request)

    def _answer(self, request: SimRequest, instance: Instance) -> None:
        gone = instance.engine.withdraw(request)
        self.at(self.now_s + self.config.hop_s, self._answered, request, gone)

    def _answered(self, request: SimRequest, gone: bool) -> None:
        self.router.on_withdrawn(request, gone, self.now_s)

    def _record(self, request: SimRequest) -> RequestRecord:
        outcome = request.outcome
        if outcome is not Outcome.REFUSED:
            done = request.generated_tokens >= request.output_tokens
            outcome = Outcome.FINISHED if done else Outcome.UNFINISHED
        return RequestRecord(
            request_id=request.request_id,
            arrival_s=request.arrival_s,
            prompt_tokens=request.input_tokens,
            ttft_slo_s=request.slo.ttft_s,
            tbt_slo_s=request.slo.tbt_s,
            outcome=outcome,
            token_times_s=request.token_times_s(self.instances[request.worker].delivered_s),
            slo_class=request.slo_class,
            relegated=request.was_relegated,
        )


def _sim_request(item: WorkloadRequest) -> SimRequest:
    return SimRequest(
        request_id=item.request_id,
        arrival_s=item.arrival_s,
        prompt_tokens=item.prompt_tokens,
        slo=item.slo,
        output_tokens=item.output_tokens,
        input_tokens=item.prompt_tokens,
        total_tokens=item.prompt_tokens,
        slo_class=item.slo_class,
        prefix_hashes=item.prefix_hashes,
    )
