"""vLLM's scheduler with our order, token budget and telemetry.

Overrides `__init__`, `schedule` and `update_from_output` only, and touches only `waiting`, `running`, `requests` and
`max_num_scheduled_tokens`: what the policy wants is expressed by the order of these lists and by the budget.
"""

import time
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from ascendra.v1 import common_pb2
from services.policy.order import may_evict
from services.policy.state import QueuedRequest, Slo
from services.policy.step_time import StepShape, StepTimeModel
from services.worker.engine.contract import EngineLoad, StepReport
from services.worker.engine.core.control import Control, install_control
from services.worker.engine.core.kv_transfer import KvTransfer, imports_kv, kv_is_here
from services.worker.engine.core.planner import DecodeState, StepPlan, StepPlanner
from services.worker.engine.core.prefix_lookup import PrefixLookup
from services.worker.engine.core.process import isolate_engine_core
from services.worker.engine.core.reporting import ReportSocket
from services.worker.engine.settings import PolicySettings

install_control()

_NEVER_S = 1e9
"""Objective of a request that states none."""


@dataclass(slots=True)
class _Step:
    """A step that was scheduled and whose output is not in yet."""

    scheduled_s: float
    continues: bool
    """The engine was busy since the step before: what passed in between belongs to this one."""
    shape: StepShape
    token_budget: int
    preempted: list[str] = field(default_factory=list)


class PolicyScheduler:
    """Mixin over vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        isolate_engine_core()
        super().__init__(*args, **kwargs)
        scheduler: Any = self
        ours = scheduler.vllm_config.additional_config["ascendra"]
        warm_start = ours["step_time_model"]
        self.planner = StepPlanner(
            PolicySettings(**ours["policy"]),
            max_num_batched_tokens=scheduler.max_num_scheduled_tokens,
            max_num_seqs=scheduler.scheduler_config.max_num_seqs,
            warm_start=StepTimeModel.from_dict(warm_start) if warm_start else None,
        )
        self.control = Control(self)
        self.kv_transfer = KvTransfer(self)
        self._prefixes = PrefixLookup(scheduler.kv_cache_manager)
        self._reports = ReportSocket(ours["reports"])
        self._queued: dict[str, QueuedRequest] = {}
        self._last_token_s: dict[str, float] = {}
        self._in_flight: dict[int, _Step] = {}
        self._steps = 0
        self._pause_allowed = True
        self._step_ended_s = 0.0
        self._preemptions: dict[str, int] = {}
        self._load: EngineLoad | None = None

    @staticmethod
    def standing(request: Request) -> dict[str, Any]:
        """Return what the front end said of a request (fields of RequestStanding)."""
        extra = request.sampling_params.extra_args if request.sampling_params else None
        return (extra or {}).get("ascendra") or {}

    def queued(self, request: Request) -> QueuedRequest:
        """Return the policy's view of a request; kept, because relegation is remembered in it."""
        queued = self._queued.get(request.request_id)
        if queued is None:
            queued = self._queued[request.request_id] = _queued_request(request, self.standing(request))
        return queued

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Plan the step, let vLLM schedule it, and note what it does."""
        scheduler: Any = self
        now_s = time.monotonic()
        withheld: list[Request] = []
        paused: list[Request] = []
        relegated: list[str] = []
        plan: StepPlan | None = None
        if self.planner.is_stock:
            scheduler.max_num_scheduled_tokens = self.planner.static_budget
        else:
            plan = self._plan(now_s)
            relegated = self._relegate(plan)
            withheld, paused = self._arrange(plan)
            scheduler.max_num_scheduled_tokens = plan.token_budget
        startable = self._waiting_to_start()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        # In vain: nobody came in their place although there was room in the step, so blocks or slots are short.
        idle_tokens = scheduler.max_num_scheduled_tokens - output.total_num_scheduled_tokens
        self._pause_allowed = not paused or self._waiting_to_start() < startable or idle_tokens <= 0
        scheduler.waiting.extend(withheld)
        scheduler.running.extend(paused)
        self._note_step(output, now_s, plan, relegated)
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """Take vLLM's account of the step, then learn from it and report it."""
        kv_failed = self._kv_failed(model_runner_output)
        result = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        now_s = time.monotonic()
        self._last_token_s.update(dict.fromkeys(scheduler_output.num_scheduled_tokens, now_s))
        for request_id in scheduler_output.finished_req_ids:
            self._forget(request_id)
        step = self._in_flight.pop(id(scheduler_output), None)
        if step is not None:
            step_s = now_s - (self._step_ended_s if step.continues else max(step.scheduled_s, self._step_ended_s))
            self._step_ended_s = now_s
            self._steps += 1
            self.planner.learn(step.shape, step_s)
            telemetry = self._telemetry(step, step_s, now_s)
            self._reports.send(StepReport(step=telemetry, ended_s=now_s, preempted=step.preempted, kv_failed=kv_failed))
            self._load = None
        elif kv_failed or self._load_changed():
            self._reports.send(StepReport(kv_failed=kv_failed, load=self._load))
        return result

    def _plan(self, now_s: float) -> StepPlan:
        scheduler: Any = self
        prefills = []
        waiting = []
        blocked = []
        decodes = []
        last_token_s = self._last_token_s
        for request in scheduler.running:
            queued = self.queued(request)
            if request.is_prefill_chunk:
                queued.started = True
                queued.computed_tokens = request.num_computed_tokens
                prefills.append(queued)
            else:
                last_s = last_token_s.get(request.request_id) or self.standing(request).get("last_token_s") or now_s
                decodes.append(DecodeState(last_s, queued.slo.tbt_s, request.num_computed_tokens))
        for request in scheduler.waiting:
            queued = self.queued(request)
            if imports_kv(request):
                queued.computed_tokens = request.num_tokens - 1
                waiting.append(queued)
                continue
            if request.status == RequestStatus.PREEMPTED:
                queued.started = True
                queued.prompt_tokens = request.num_tokens
                if request.num_output_tokens:
                    queued.last_token_s = self._last_token_s.get(request.request_id, now_s)
            queued.computed_tokens = self._prefixes.computed_tokens(request, now_s)
            waiting.append(queued)
            if _compiles(request):
                blocked.append(queued)
        moved = []
        for request in kv_is_here(scheduler):
            queued = self.queued(request)
            queued.computed_tokens = min(request.num_computed_tokens, request.num_tokens - 1)
            moved.append(queued)
        # Those whose KV is read, or whose constraint is compiled, wait in lists of vLLM's own, and start first.
        coming = scheduler.get_request_counts()[1] - len(scheduler.waiting)
        return self.planner.plan(
            now_s,
            prefills,
            waiting,
            decodes,
            in_flight=bool(self._in_flight),
            may_pause=self._pause_allowed and not self._may_evict(),
            coming=coming,
            moved=moved,
            blocked=blocked,
        )

    def _waiting_to_start(self) -> int:
        """Return how many wait for no more than a place in a step."""
        scheduler: Any = self
        return len(scheduler.waiting) + len(scheduler.finished_recving_kv_req_ids)

    def _may_evict(self) -> bool:
        scheduler: Any = self
        free_blocks = (1 - scheduler.kv_cache_manager.usage) * int(scheduler.cache_config.num_gpu_blocks or 0)
        most_tokens = scheduler.scheduler_config.max_num_batched_tokens
        return may_evict(free_blocks, len(scheduler.running), most_tokens, int(scheduler.block_size))

    def _relegate(self, plan: StepPlan) -> list[str]:
        """Mark whom the policy gave up; return their ids as the front end knows them."""
        if not plan.order.newly_relegated:
            return []
        given_up = set(plan.order.newly_relegated)
        relegated = []
        scheduler: Any = self
        for request in (*scheduler.waiting, *(other for other in scheduler.running if other.is_prefill_chunk)):
            queued = self.queued(request)
            if queued.request_id in given_up and not queued.relegated:
                queued.relegated = True
                relegated.append(self.standing(request).get("request_id", ""))
        return relegated

    def _arrange(self, plan: StepPlan) -> tuple[list[Request], list[Request]]:
        """Put the lists into the order of the plan; return the waiting and the resident requests taken out of it."""
        scheduler: Any = self
        if not plan.order.ordered:
            return [], []  # nothing but decodes
        rank = {id(queued): index for index, queued in enumerate(plan.order.ordered)}

        def place(request: Request) -> int:
            return rank[id(self.queued(request))]

        # vLLM serves `running` in list order and preempts from its end: decodes first, then prefills as ordered.
        decodes = [request for request in scheduler.running if not request.is_prefill_chunk]
        prefills = [request for request in scheduler.running if request.is_prefill_chunk]
        out = set(map(id, plan.paused))
        paused = [request for request in prefills if id(self.queued(request)) in out]
        active = [request for request in prefills if id(self.queued(request)) not in out]
        scheduler.running[:] = decodes + sorted(active, key=place)
        # Reading KV takes no part of a step, so nobody loses by going second.
        ordered = [request for request in scheduler.waiting if imports_kv(request)]
        ordered += sorted((request for request in scheduler.waiting if not imports_kv(request)), key=place)
        scheduler.waiting.clear()
        scheduler.waiting.extend(ordered[: plan.admissions])
        return ordered[plan.admissions :], paused

    def _note_step(self, output: Any, now_s: float, plan: StepPlan | None, relegated: list[str]) -> None:
        scheduler: Any = self
        started = []
        for new in output.scheduled_new_reqs:
            request = scheduler.requests[new.req_id]
            queued = self.queued(request)
            if not queued.started:
                queued.started = True
                started.append(self.standing(request).get("request_id", ""))
        if plan is not None and plan.order.promoted:
            self._charge_promoted(output, plan.order.promoted)
        if started or relegated:
            self._reports.send(StepReport(started=started, relegated=relegated))
        if output.total_num_scheduled_tokens:
            self._in_flight[id(output)] = _Step(
                scheduled_s=now_s,
                continues=bool(output.scheduled_cached_reqs.req_ids),
                shape=self._shape(output),
                token_budget=scheduler.max_num_scheduled_tokens,
                preempted=self._preempted(),
            )

    def _charge_promoted(self, output: Any, promoted: list[str]) -> None:
        scheduler: Any = self
        for request_id, tokens in output.num_scheduled_tokens.items():
            queued = self._queued.get(request_id)
            if queued is not None and queued.request_id in promoted:
                before = scheduler.requests[request_id].num_computed_tokens - tokens
                self.planner.charge_promoted(tokens, before)

    def _shape(self, output: Any) -> StepShape:
        scheduler: Any = self
        prefill = decodes = context = products = 0
        requests = scheduler.requests
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = requests[request_id]
            before = request.num_computed_tokens - tokens
            if tokens == 1 and before > 0 and not request.is_prefill_chunk:
                decodes += 1
                context += before
            else:
                prefill += tokens
                products += tokens * before
        return StepShape(prefill, decodes, context, products)

    def _preempted(self) -> list[str]:
        scheduler: Any = self
        found = []
        for request in scheduler.waiting:
            if request.num_preemptions > self._preemptions.get(request.request_id, 0):
                self._preemptions[request.request_id] = request.num_preemptions
                found.append(self.standing(request).get("request_id", ""))
        return found

    def _telemetry(self, step: _Step, step_s: float, now_s: float) -> common_pb2.StepTelemetry:
        scheduler: Any = self
        unfinished = [*scheduler.waiting, *(request for request in scheduler.running if request.is_prefill_chunk)]
        queued_prefill = sum(
            request.num_tokens - self._prefixes.computed_tokens(request, now_s)
            for request in unfinished
            if not imports_kv(request)
        )
        return common_pb2.StepTelemetry(
            step=self._steps,
            prefill_tokens=step.shape.prefill_tokens,
            decodes=step.shape.decodes,
            decode_context_tokens=step.shape.decode_context_tokens,
            prefill_context_products=step.shape.prefill_context_products,
            step_s=step_s,
            token_budget=step.token_budget,
            waiting=len(scheduler.waiting),
            queued_prefill_tokens=max(queued_prefill, 0),
            running=len(scheduler.running),
            kv_usage=scheduler.kv_cache_manager.usage,
            preempted=len(step.preempted),
            delivery_s=self.planner.delivery_s,
        )

    def _kv_failed(self, model_runner_output: Any) -> list[str]:
        """Return the requests whose KV could not be read, as the front end knows them."""
        output = getattr(model_runner_output, "kv_connector_output", None)
        return [self.standing(request).get("request_id", "") for request in self.kv_transfer.unread(output)]

    def _load_changed(self) -> bool:
        """Tell whether the load is another than when last asked, in steps that computed nothing."""
        scheduler: Any = self
        before = self._load
        running, waiting = scheduler.get_request_counts()
        self._load = EngineLoad(waiting=waiting, running=running, kv_usage=scheduler.kv_cache_manager.usage)
        return self._load != before

    def _forget(self, request_id: str) -> None:
        for table in (self._queued, self._last_token_s, self._preemptions):
            table.pop(request_id, None)
        self._prefixes.forget(request_id)


class SyncPolicyScheduler(PolicyScheduler, Scheduler):
    """For engines with one step in flight."""


class AsyncPolicyScheduler(PolicyScheduler, AsyncScheduler):
    """For engines that schedule a step while the one before it runs."""


def make_scheduler(**kwargs: Any) -> Any:
    """Build the scheduler that fits the engine: what `scheduler_cls` names, called by the engine core."""
    asynchronous = kwargs["vllm_config"].scheduler_config.async_scheduling
    return (AsyncPolicyScheduler if asynchronous else SyncPolicyScheduler)(**kwargs)


def _compiles(request: Request) -> bool:
    """Tell whether a request's constraint is still being compiled."""
    constraint = request.structured_output_request
    return constraint is not None and constraint.grammar is None


def _queued_request(request: Request, standing: dict[str, Any]) -> QueuedRequest:
    return QueuedRequest(
        request_id=standing.get("name") or request.request_id,
        arrival_s=standing.get("arrival_s") or time.monotonic(),
        prompt_tokens=request.num_tokens,
        slo=Slo(ttft_s=standing.get("ttft_slo_s") or _NEVER_S, tbt_s=standing.get("tbt_slo_s") or _NEVER_S),
        priority=standing.get("priority", 0),
        relegated=standing.get("relegated", False),
        last_token_s=standing.get("last_token_s", 0.0),
    )
