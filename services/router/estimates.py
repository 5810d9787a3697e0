"""Predictions of a request's first token from an instance's view; used to place, offload, admit and explain."""

import math
from dataclasses import dataclass, field

from services.policy.calm import calm_pace
from services.policy.order import OrderPolicy, order_waiting
from services.policy.prefill import (
    PrefillPace,
    StepInProgress,
    TtftEstimate,
    instance_pace,
    newcomer_work_s,
    predict_in_order,
    step_in_progress,
)
from services.policy.state import InstanceView, QueuedRequest, Role
from services.policy.token_budget import BudgetPolicy, DecodeLoad


@dataclass(slots=True)
class Ahead:
    """What a newcomer would wait for on an instance; grows as decisions send more there."""

    view: InstanceView
    pace: PrefillPace
    work_s: float
    """Prefill work that is served before a newcomer, in seconds."""
    running: StepInProgress
    now_s: float = 0.0
    others: list[tuple[float, float]] = field(default_factory=list)
    """(deadline, work in seconds) of those that a newcomer may overtake if they still make it; first deadline first."""

    def estimate(self, request: QueuedRequest) -> TtftEstimate:
        """Predict the request's first token if it were sent there now.

        It overtakes those with later deadlines unless one of them would miss for it: then it waits behind all.
        """
        own_s = newcomer_work_s(self.view, self.pace, request)
        before_s = self.work_s + sum(work_s for deadline_s, work_s in self.others if deadline_s <= request.deadline_s)
        if self._harms(before_s, own_s, request.deadline_s):
            before_s = self.work_s + sum(work_s for _, work_s in self.others)
        return self.running.newcomer(self.pace, before_s, own_s, self.view.hop_s)

    def _harms(self, before_s: float, own_s: float, deadline_s: float) -> bool:
        """Return whether a newcomer makes somebody miss who is served after it."""
        for other_s, work_s in self.others:
            if other_s > deadline_s:
                before_s += work_s
                room_s = self.pace.work_within_s(other_s - self.now_s - self.running.left_s)
                if before_s <= room_s < before_s + own_s:
                    return True
        return False

    def take(self, request: QueuedRequest) -> None:
        """Count a request that was decided to go there."""
        self.work_s += newcomer_work_s(self.view, self.pace, request)


def deadline_ahead(view: InstanceView, budget: BudgetPolicy, now_s: float, pace: PrefillPace | None = None) -> Ahead:
    """Return what is served before a new request that overtakes later deadlines: what has started, and earlier ones."""
    pace = pace or instance_pace(view, budget)
    work_s = 0.0
    others = []
    for queued in view.queue:
        own_s = pace.remaining_work_s(queued)
        if queued.started:
            work_s += own_s
        elif not queued.relegated:
            others.append((queued.deadline_s, own_s))
    others.sort()
    return Ahead(view, pace, work_s, step_in_progress(view, pace), now_s, others)


def kept_ahead(view: InstanceView, budget: BudgetPolicy, pace: PrefillPace | None = None) -> Ahead:
    """Return what is served before a new request that all present ones precede, relegated ones aside."""
    pace = pace or instance_pace(view, budget)
    work_s = sum(pace.remaining_work_s(queued) for queued in view.queue if queued.started or not queued.relegated)
    return Ahead(view, pace, work_s, step_in_progress(view, pace))


def newcomer_ahead(view: InstanceView, budget: BudgetPolicy, now_s: float, pace: PrefillPace | None = None) -> Ahead:
    """Return what a request that comes now waits for: on HP it overtakes later deadlines.

    Args:
        pace: the instance's; None: computed here.
    """
    if view.role is Role.HIGH:
        return deadline_ahead(view, budget, now_s, pace)
    return kept_ahead(view, budget, pace)


def backlog_s(view: InstanceView, budget: BudgetPolicy) -> float:
    """Return the seconds until everything queued on an instance, relegated requests included, has its first token."""
    pace = instance_pace(view, budget)
    work_s = sum(map(pace.remaining_work_s, view.queue))
    return pace.finish_s(work_s) if work_s > 0 else 0.0


def held_s(tokens: int, view: InstanceView, budget: BudgetPolicy) -> float:
    """Return the seconds that an instance, were it to do nothing else, would take for this many prefill tokens."""
    pace = instance_pace(view, budget)
    return pace.finish_s(pace.token_s * tokens) if tokens else 0.0


def in_order(
    view: InstanceView, now_s: float, order: OrderPolicy, budget: BudgetPolicy
) -> tuple[list[QueuedRequest], list[TtftEstimate], PrefillPace]:
    """Return an instance's queue in the order its engine serves it, with the prediction of each, and the pace."""
    pace = instance_pace(view, budget)
    ordered = order_waiting(view.queue, now_s, pace, order).ordered
    return ordered, predict_in_order(ordered, pace, running=step_in_progress(view, pace)), pace


def newcomer_in_order(
    view: InstanceView, request: QueuedRequest, now_s: float, order: OrderPolicy, budget: BudgetPolicy
) -> TtftEstimate:
    """Predict a request that is sent now, in the order that the engine keeps; the running step cannot serve it."""
    pace = instance_pace(view, budget)
    result = order_waiting([*view.queue, request], now_s, pace, order)
    load, tightest_s = DecodeLoad(view.decodes, view.decode_context_tokens), view.min_tbt_s or math.inf
    ordered, given_up = result.ordered, result.newly_relegated
    pace = calm_pace(budget, view.model, load, tightest_s, ordered, given_up, now_s) or pace
    works_s = list(map(pace.remaining_work_s, ordered))
    place = ordered.index(request)
    taken_in_s = sum(
        work_s for queued, work_s in zip(ordered[:place], works_s, strict=False) if queued.counted or queued.started
    )
    return step_in_progress(view, pace).newcomer(
        pace,
        sum(works_s[:place]),
        works_s[place],
        view.hop_s,
        taken_in_s=taken_in_s,
        behind_s=sum(works_s[place + 1 :]),
    )
