"""One simulated worker: the engine, the in-engine policy that plans its steps, and how long they really take."""

import math
import random
from dataclasses import dataclass, field, replace
from typing import cast

from bench.simulator.engine import Engine, EngineConfig, Step
from bench.simulator.request import SimRequest
from bench.simulator.scatter import Scatter, ScatterWalk
from services.policy.calm import calm_bound_s
from services.policy.elastic_batch import decode_cap
from services.policy.order import OrderPolicy, may_evict, order_waiting, resident_first
from services.policy.prefill import prefill_pace
from services.policy.relegation import RelegatedTurns
from services.policy.state import Role
from services.policy.step_fit import OnlineStepTimeFit
from services.policy.step_time import StepShape, StepTimeModel
from services.policy.token_budget import BudgetPolicy, DecodeLoad, least_gap_s, prefill_budget

_LEAST_STEP_S = 0.001
CHUNKS_CONSIDERED = 64
"""Requests whose context the budget looks at; more than fit into any step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimeTruth:
    """How long steps really take, whatever the policies believe."""

    model: StepTimeModel
    bias: float = 1.0
    """Real steps take this many times what the model says."""
    jitter_sigma: float = 0.03
    """Standard deviation of log(step time)."""
    overhead_s: float = 0.0005
    """Between two steps, while the device waits: input preparation, sampling, output processing."""
    measured_excess: tuple[Scatter, Scatter] | None = None
    """What steps without and with prefill take beyond the model, as measured; replaces jitter and overhead."""

    def step_s(self, shape: StepShape, rng: random.Random) -> float:
        """Draw the seconds from one step's start to the next one's."""
        if self.measured_excess is not None:
            excess_s = self.measured_excess[shape.prefill_tokens > 0].at(rng.gauss(0, 1))
            return max(self.model.step_s(shape) * self.bias + excess_s, _LEAST_STEP_S)
        factor = self.bias
        if self.jitter_sigma:
            factor *= math.exp(rng.gauss(-0.5 * self.jitter_sigma**2, self.jitter_sigma))
        return self.model.step_s(shape) * factor + self.overhead_s


@dataclass(slots=True)
class StepReport:
    """What a worker tells the router at a step end."""

    first_tokens: list[SimRequest] = field(default_factory=list)
    """Requests that left the queue of prefills, by a first token or by their only one."""
    finished: list[SimRequest] = field(default_factory=list)
    """Requests that generated their last token."""
    decodes: int = 0
    decode_context_tokens: int = 0
    min_tbt_s: float = 0.0
    kv_used_tokens: int = 0
    step_s: float = 0.0
    busy: bool = False
    """There is more to do: the next step starts."""
    queued_tokens: int = 0
    """Prefill tokens left to compute."""
    age_s: float = 0.0
    """How long it lay at the worker before it was sent."""
    model: StepTimeModel | None = None
    """What the worker plans with now."""
    delivery_s: float = 0.0
    """Room that its dynamic budget leaves in gaps; 0: a static one."""


@dataclass(slots=True)
class Resident:
    """The running requests between two steps."""

    decodes: list[SimRequest] = field(default_factory=list)
    """Those that are no streams: no step gives them their next token for now."""
    partial: list[SimRequest] = field(default_factory=list)
    """Begun and not complete prefills."""
    load: DecodeLoad = field(default_factory=DecodeLoad)
    tightest_s: float = math.inf
    """Smallest TBT objective of the decodes."""
    bound_s: float = math.inf
    """Longest that the next step may take for every decode's gap to hold."""


class Instance:
    """A worker in virtual time. The cluster calls `start_step` when it may and `finish_step` when that step is over."""

    def __init__(
        self,
        index: int,
        role: Role,
        config: EngineConfig,
        believed: StepTimeModel,
        truth: StepTimeTruth,
        order: OrderPolicy | None,
        budget: BudgetPolicy | None,
        seed: int,
        learn: bool = True,
        sees_prefixes: bool = False,
        hop_s: float = 0.0,
        delivery: Scatter | None = None,
    ) -> None:
        """Start empty.

        Args:
            order: how waiting requests are ordered; None leaves vLLM's order.
            budget: how the token budget is chosen; None leaves vLLM's `max_num_batched_tokens`.
            learn: fit the step-time model to the steps that it takes, from `believed` on.
            sees_prefixes: know what the prefix cache saves the waiting requests.
            hop_s: from a step's end to its tokens' arrival at their callers.
            delivery: the same as measured; replaces `hop_s`.
        """
        self.index = index
        self.worker_id = f"w{index:03d}"
        self.role = role
        self.engine = Engine(config)
        self.model = believed
        self.step: Step | None = None
        self.busy_s = 0.0
        self.inbox: list[SimRequest] = []
        """Came while a step runs; the engine, and the report of the step's end, know of them only then."""
        self.withdrawals: list[SimRequest] = []
        """Asked for while a step runs; answered at its end."""
        self.relegated: list[SimRequest] = []
        """Given up at the start of the running step."""
        self._config = config
        self._sees_prefixes = sees_prefixes
        self._truth = truth
        self._order = order
        self._budget = budget
        self._rng = random.Random(f"{seed}:{index}")
        self._turns = RelegatedTurns(order.relegated_share if order else 0.0)
        self._promoted: set[str] = set()
        self._paused: list[SimRequest] = []
        self._pause_allowed = True
        self._resident = Resident()
        self._step_s = 0.0
        self._shape = StepShape()
        self._fit = OnlineStepTimeFit(believed) if learn else None
        self.delivered_s: list[float] = []
        """When the tokens of each step reached their callers, by its number."""
        self._hop_s = hop_s
        self._delays = ScatterWalk(delivery, random.Random(f"{seed}:{index}:delivery")) if delivery else None

    def start_step(self, now_s: float) -> float | None:
        """Schedule a step; returns when it will be over, or None when there is nothing to do."""
        engine = self.engine
        if not engine.residents and not engine.waiting:
            return None
        self.relegated = []
        if self._sees_prefixes:
            engine.look_up(now_s)
        budget = self._config.max_num_batched_tokens if self._budget is None else self._plan(now_s, self._budget)
        step = self.step = engine.schedule(budget)
        # In vain: nobody came in their place although there was room in the step, so blocks or slots are short.
        idle_tokens = budget - step.prefill_tokens - step.decodes
        self._pause_allowed = not self._paused or bool(step.admitted) or idle_tokens <= 0
        if self._paused:
            engine.running += self._paused
            self._paused.clear()
        if self._promoted:
            self._charge_promoted(step)
        self._shape = StepShape(
            step.prefill_tokens, step.decodes, step.decode_context_tokens, step.prefill_context_products
        )
        self._step_s = self._truth.step_s(self._shape, self._rng)
        return now_s + self._step_s

    def leave_room(self, delivery_s: float) -> None:
        """Leave so much room in gaps from the next step on."""
        if self._budget is not None:
            self._budget = replace(self._budget, delivery_s=max(delivery_s, BudgetPolicy().delivery_s))

    def finish_step(self, now_s: float) -> StepReport:
        """End the step in progress: tokens come out."""
        step = self.step
        assert step is not None
        self.step = None
        self.busy_s += self._step_s
        self._turns.earn(self._step_s)
        if self._fit is not None and (step.decodes or step.prefill_tokens):
            self._fit.observe(self._shape, self._step_s)
            self.model = self._fit.model()
        delivered_s = now_s + (self._delays.next() if self._delays else self._hop_s)
        # Messages of a worker do not overtake each other.
        self.delivered_s.append(max(self.delivered_s[-1], delivered_s) if self.delivered_s else delivered_s)
        engine = self.engine
        finished, first_tokens = engine.complete(step, now_s)
        resident = self._resident = self._survey(now_s)
        return StepReport(
            first_tokens=first_tokens,
            finished=finished,
            decodes=resident.load.decodes,
            decode_context_tokens=resident.load.context_tokens,
            min_tbt_s=resident.tightest_s if resident.load.decodes else 0.0,
            kv_used_tokens=engine.kv_used_tokens,
            step_s=self._step_s,
            busy=bool(engine.residents or engine.waiting),
            queued_tokens=engine.waiting_tokens + sum([request.remaining_tokens for request in resident.partial]),
            model=self.model,
            delivery_s=self._budget.delivery_s if self._budget is not None else 0.0,
        )

    def _survey(self, now_s: float) -> Resident:
        """Look through the running requests at a step end; the next step starts then."""
        streams = self.engine.streams
        decodes: list[SimRequest] = []
        partial: list[SimRequest] = []
        context = streams.context_tokens
        bound_s = tightest_s = math.inf
        least_s = least_gap_s(self.model)
        for tbt_s in streams.objectives:
            if tbt_s > least_s:
                tightest_s = min(tightest_s, tbt_s)
                bound_s = min(bound_s, _slack_s(now_s, tbt_s, now_s))
        for request in self.engine.running:
            if not request.decoding:
                partial.append(request)
                continue
            decodes.append(request)
            context += request.total_tokens
            tbt_s = request.slo.tbt_s
            if tbt_s > least_s:
                tightest_s = min(tightest_s, tbt_s)
                bound_s = min(bound_s, _slack_s(request.last_token_s, tbt_s, now_s))
        load = DecodeLoad(len(streams) + len(decodes), context)
        return Resident(decodes, partial, load, tightest_s, bound_s)

    def _plan(self, now_s: float, policy: BudgetPolicy) -> int:
        """Order the requests and return the token budget of the next step, as the in-engine scheduler does."""
        resident = self._resident
        if self.role is Role.HIGH:
            self.engine.max_num_seqs = self._elastic_cap(resident)
        ordered = self._arrange(now_s, resident, policy)
        engine, config = self.engine, self._config
        may_pause = self._pause_allowed and not may_evict(
            engine.free_blocks, engine.residents, config.max_num_batched_tokens, config.block_tokens
        )
        pausing = may_pause and self._order is not None and self._order.pause_started
        served = ordered if pausing or not resident.partial else resident_first(ordered, resident.partial)
        head = served[:CHUNKS_CONSIDERED]
        chunks = [(request.prompt_tokens - request.computed_tokens, request.computed_tokens) for request in head]
        load = resident.load
        bound_s = calm_bound_s(policy, self.model, load, resident.bound_s, resident.tightest_s, ordered, (), now_s)
        prefill = prefill_budget(policy, self.model, load, bound_s, chunks)
        if pausing and resident.partial:
            self._pause(ordered, prefill)
        return load.decodes + prefill

    def _arrange(self, now_s: float, resident: Resident, policy: BudgetPolicy) -> list[SimRequest]:
        """Put decodes first and the rest in policy order; returns the prefills in that order."""
        engine = self.engine
        waiting = engine.waiting
        decodes, partial = resident.decodes, resident.partial
        if self._order is None or not (waiting or len(partial) > 1):
            if partial:
                engine.running = decodes + partial
            return [*partial, *waiting]
        pace = prefill_pace(self.model, resident.load, policy, resident.tightest_s)
        result = order_waiting([*partial, *waiting], now_s, pace, self._order, self._turns.credit_s)
        ordered = cast("list[SimRequest]", result.ordered)
        if result.newly_relegated:
            self._relegate(set(result.newly_relegated))
        self._promoted = set(result.promoted)
        begun = set(map(id, partial))
        engine.running = decodes + [request for request in ordered if id(request) in begun]
        if waiting:
            engine.order_waiting(request for request in ordered if id(request) not in begun)
        return ordered

    def _pause(self, ordered: list[SimRequest], prefill_tokens: int) -> None:
        """Leave out of the step the partly prefilled requests that waiting ones outrank, unless there is room for all.

        vLLM serves running requests first: one that may run at all takes what it can.
        """
        left = prefill_tokens
        outranked = False
        paused = self._paused
        for request in ordered:
            left -= request.prompt_tokens - request.computed_tokens
            if request.kv_tokens == 0:
                outranked = True
            elif outranked and left < 0:
                paused.append(request)
        if paused:
            gone = set(map(id, paused))
            self.engine.running = [request for request in self.engine.running if id(request) not in gone]

    def _relegate(self, names: set[str]) -> None:
        for request in (*self._resident.partial, *self.engine.waiting):
            if request.request_id in names:
                request.relegated = request.was_relegated = True
                self.relegated.append(request)

    def _charge_promoted(self, step: Step) -> None:
        """Spend the relegated share on the chunks of requests that were placed ahead of the others."""
        pace = prefill_pace(self.model, DecodeLoad(), self._budget or BudgetPolicy())
        for request, tokens in zip(step.requests, step.tokens, strict=True):
            if request.request_id in self._promoted:
                self._turns.spend(pace.work_s(tokens, request.computed_tokens))

    def _elastic_cap(self, resident: Resident) -> int:
        """Most resident sequences with which HP keeps its tightest TBT objective."""
        most = self._config.max_num_seqs
        least_s = least_gap_s(self.model)
        objectives_s = [request.slo.tbt_s for request in self.engine.waiting]
        waiting_s = min([tbt_s for tbt_s in objectives_s if tbt_s > least_s], default=math.inf)
        tbt_s = min(waiting_s, resident.tightest_s)
        if tbt_s == math.inf:
            return most
        count = resident.load.decodes + len(resident.partial)
        tokens = resident.load.context_tokens + sum(request.prompt_tokens for request in resident.partial)
        return max(decode_cap(self.model, tbt_s, tokens / count if count else 0.0, most), count)


def _slack_s(last_token_s: float, tbt_s: float, now_s: float) -> float:
    """Return how long the next step may take for a decode's gap to hold, as in policy.step_bound_s."""
    slack_s = last_token_s + tbt_s - now_s
    # A gap that is lost already asks for its plain objective.
    return slack_s if slack_s > 0 else tbt_s
