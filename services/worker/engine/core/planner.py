"""What the next engine step should do, decided by services.policy from plain state. Knows nothing of vLLM."""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import NamedTuple

from services.policy.calm import calm_bound_s
from services.policy.elastic_batch import decode_cap
from services.policy.order import OrderPolicy, WaitingOrder, order_waiting, resident_first
from services.policy.prefill import prefill_pace
from services.policy.relegation import NONE, RelegatedTurns
from services.policy.state import QueuedRequest, Role
from services.policy.step_fit import OnlineStepTimeFit
from services.policy.step_time import StepShape, StepTimeModel
from services.policy.token_budget import STATIC, BudgetPolicy, DecodeLoad, least_gap_s, prefill_budget, step_bound_s
from services.worker.engine.settings import PolicySettings

_CHUNKS_CONSIDERED = 64
"""Requests whose context the budget looks at; more than fit into any step."""


class DecodeState(NamedTuple):
    """A resident request that decodes; a tuple, for one is made for each of them in every step."""

    last_token_s: float
    tbt_slo_s: float
    context_tokens: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Orders for one step."""

    order: WaitingOrder
    token_budget: int
    """Most tokens of the step, decodes included."""
    admissions: int
    """Most waiting requests that may become resident."""
    paused: list[QueuedRequest]
    """Partly prefilled requests that sit this step out with their KV blocks."""


class StepPlanner:
    """Plans steps and learns how long they take."""

    def __init__(
        self,
        settings: PolicySettings,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        warm_start: StepTimeModel | None = None,
    ) -> None:
        """Start with a model to plan with, if there is one."""
        self._max_tokens = max_num_batched_tokens
        self._max_num_seqs = max_num_seqs
        self._fit = OnlineStepTimeFit(warm_start)
        self._delivery_s = BudgetPolicy().delivery_s
        self.set_policy(settings)

    @property
    def model(self) -> StepTimeModel:
        """The step-time model in use."""
        return self._fit.model()

    def adopt(self, model: StepTimeModel) -> None:
        """Start from a model learned elsewhere, if it has seen more steps than this planner."""
        if model.samples > self._fit.samples:
            self._fit = OnlineStepTimeFit(model)

    def set_policy(self, settings: PolicySettings) -> None:
        """Change role and policies from the next step on. Raises ValueError for unknown names."""
        order = OrderPolicy(value_function=settings.value_function, relegation=settings.relegation)
        budget = BudgetPolicy(
            kind=settings.token_budget,
            static_tokens=min(settings.static_budget_tokens, self._max_tokens),
            max_tokens=self._max_tokens,
            delivery_s=self._delivery_s,
            calm_factor=settings.calm_factor,
        )
        self.role = Role(settings.role)
        self.settings, self._order, self._budget = settings, order, budget
        self._turns = RelegatedTurns(order.relegated_share)

    @property
    def delivery_s(self) -> float:
        """Room that is left in every gap for what passes outside the engine, in seconds."""
        return self._delivery_s

    def set_delivery(self, gap_inflation_s: float) -> None:
        """Leave room in every gap for what passes outside the engine, as the routers measure it."""
        self._delivery_s = max(gap_inflation_s, BudgetPolicy().delivery_s)
        self._budget = replace(self._budget, delivery_s=self._delivery_s)

    @property
    def is_stock(self) -> bool:
        """Nothing but a fixed budget is asked for: vLLM's own scheduling, untouched."""
        stock = self.settings.value_function == "fcfs" and self.settings.relegation == NONE
        return stock and self.settings.token_budget == STATIC and self.role is not Role.HIGH

    @property
    def static_budget(self) -> int:
        """Most tokens of a step under a static budget."""
        return self._budget.static_tokens

    def plan(
        self,
        now_s: float,
        prefills: Sequence[QueuedRequest],
        waiting: Sequence[QueuedRequest],
        decodes: Sequence[DecodeState],
        *,
        in_flight: bool = False,
        may_pause: bool = True,
        coming: int = 0,
        moved: Sequence[QueuedRequest] = (),
        blocked: Sequence[QueuedRequest] = (),
    ) -> StepPlan:
        """Plan the next step.

        Args:
            prefills: resident requests whose prefill is not complete.
            waiting: requests that are not resident, preempted ones among them.
            in_flight: a step is still running; this one starts when its tokens are out.
            may_pause: outranked prefills may sit the step out.
            coming: requests in neither list that may become resident by themselves: what they wait for is no step.
            moved: of those, the ones whose KV has come from another engine: now a step is what they wait for.
            blocked: of `waiting`, those that no step can take in yet.
        """
        load = DecodeLoad(len(decodes), sum([decode[2] for decode in decodes]))
        least_s = least_gap_s(self.model)
        binding = [decode for decode in decodes if decode[1] > least_s]
        tightest_s = min([decode[1] for decode in binding], default=math.inf)
        bound_s = tightest_s if in_flight else step_bound_s([decode[:2] for decode in binding], now_s)
        pace = prefill_pace(self.model, load, self._budget, tightest_s)
        order = order_waiting([*prefills, *moved, *waiting], now_s, pace, self._order, self._turns.credit_s)
        pausing = may_pause and self._order.pause_started
        # What a chunk takes depends on whose it is: on the context before it.
        served = order.ordered if pausing or not prefills else resident_first(order.ordered, prefills)
        chunks = [(request.remaining_tokens, request.computed_tokens) for request in served[:_CHUNKS_CONSIDERED]]
        given_up = order.newly_relegated
        bound_s = calm_bound_s(self._budget, self.model, load, bound_s, tightest_s, order.ordered, given_up, now_s)
        prefill = prefill_budget(self._budget, self.model, load, bound_s, chunks)
        admissions = max(self._admissions(prefills, waiting, load, tightest_s, least_s) - coming, 0)
        # A paused request keeps its slot.
        slots = self._max_num_seqs - load.decodes - len(prefills)
        starting = [*(moved if len(moved) <= slots else ()), *(waiting if admissions else ())]
        startable = set(map(id, starting)) - set(map(id, blocked))
        return StepPlan(
            order=order,
            token_budget=max(min(load.decodes + prefill, self._max_tokens), 1),
            admissions=admissions,
            paused=_outranked(order.ordered, prefills, prefill, startable) if pausing else [],
        )

    def learn(self, shape: StepShape, step_s: float) -> None:
        """Take in what a step took."""
        self._fit.observe(shape, step_s)
        self._turns.earn(step_s)

    def charge_promoted(self, tokens: int, computed_tokens: int) -> None:
        """Charge a chunk of a relegated request that was placed ahead of the others."""
        pace = prefill_pace(self.model, DecodeLoad(), self._budget)
        self._turns.spend(pace.work_s(tokens, computed_tokens))

    def _admissions(
        self,
        prefills: Sequence[QueuedRequest],
        waiting: Sequence[QueuedRequest],
        load: DecodeLoad,
        tightest_s: float,
        least_s: float,
    ) -> int:
        resident = load.decodes + len(prefills)
        if self.role is not Role.HIGH:
            return max(self._max_num_seqs - resident, 0)
        objectives_s = [request.slo.tbt_s for request in (*prefills, *waiting)]
        waiting_tbt_s = min([tbt_s for tbt_s in objectives_s if tbt_s > least_s], default=math.inf)
        tbt_s = min(tightest_s, waiting_tbt_s)
        if tbt_s == math.inf:
            return max(self._max_num_seqs - resident, 0)
        tokens = load.context_tokens + sum(request.prompt_tokens for request in prefills)
        mean_context = tokens / resident if resident else 0.0
        return max(decode_cap(self.model, tbt_s, mean_context, self._max_num_seqs) - resident, 0)


def _outranked(
    ordered: Sequence[QueuedRequest],
    prefills: Sequence[QueuedRequest],
    prefill_tokens: int,
    startable: Set[int],
) -> list[QueuedRequest]:
    """Return the resident prefills behind a waiting request that may start, unless the step has room for all to there.

    vLLM serves resident requests before waiting ones, and one that runs at all takes what it can.

    Args:
        startable: ids of the objects of those that may start.
    """
    if not prefills or not startable:
        return []
    resident = set(map(id, prefills))
    paused = []
    left = prefill_tokens
    outranked = False
    for request in ordered:
        waits = id(request) in startable
        if waits or id(request) in resident:
            left -= request.remaining_tokens
            outranked = outranked or waits
            if outranked and left < 0 and not waits:
                paused.append(request)
    return paused
