"""The one order of an instance's waiting requests: used by the engine, by the router to predict, and in simulation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from services.policy.prefill import PrefillPace
from services.policy.relegation import (
    LATE,
    MOORE_HODGSON,
    NONE,
    RULES,
    Job,
    late,
    long_prompt_weight,
    moore_hodgson,
)
from services.policy.state import QueuedRequest, Role
from services.policy.value_functions import order_key, value_function


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderPolicy:
    """How an instance orders its waiting requests."""

    value_function: str = "llf"
    relegation: str = MOORE_HODGSON
    """"none", "late" or "moore_hodgson"."""
    caution: float = 1.0
    """Predicted times are multiplied by this before they are held against deadlines."""
    fairness: float = 0.0
    """0 always gives up the longest prompts; towards 1 it spares more of them, and gives up more of the others."""
    relegated_share: float = 0.1
    """Share of capacity that overdue relegated requests may take ahead of the others."""
    relegated_after_s: float = 20.0
    """A relegated request is overdue this long after its arrival."""

    def __post_init__(self) -> None:
        value_function(self.value_function)
        if self.relegation not in RULES:
            raise ValueError(f"relegation must be one of {', '.join(RULES)}, got {self.relegation!r}")
        if not 0 <= self.fairness <= 1:
            raise ValueError(f"fairness must be within 0 and 1, got {self.fairness}")


@dataclass(slots=True)
class WaitingOrder:
    """What order_waiting decided."""

    ordered: list[QueuedRequest]
    """All requests, first to be served first."""
    newly_relegated: list[str] = field(default_factory=list)
    """Ids of requests that should be marked relegated from now on."""
    promoted: list[str] = field(default_factory=list)
    """Ids of overdue relegated requests placed ahead of the others; RelegatedTurns.spend their work when they start."""


def order_waiting(
    requests: Iterable[QueuedRequest],
    now_s: float,
    pace: PrefillPace,
    policy: OrderPolicy,
    role: Role = Role.UNIFIED,
    credit_s: float = 0.0,
) -> WaitingOrder:
    """Order an instance's requests whose prefill is not complete; changes none of them.

    Started ones come first. Then at most one overdue relegated request while `credit_s` (of RelegatedTurns) is
    positive; then those that can make it, by class (on HP: urgent, ticketed, rest) and value function; then the
    relegated, those that could still make it first. Cost: O(n log n), about 2 us a request.
    """
    value = value_function(policy.value_function)
    started: list[tuple[tuple[float, int, float, str], QueuedRequest]] = []
    relegated: list[QueuedRequest] = []
    classes: list[list[QueuedRequest]] = [[], [], []]
    split = role is Role.HIGH
    for request in requests:
        if request.started:
            started.append((order_key(value(request, pace.alone_s(request), now_s), request), request))
        elif request.relegated:
            relegated.append(request)
        else:
            classes[_class_of(request) if split else 2].append(request)
    started.sort(key=_key)
    result = WaitingOrder([request for _, request in started])
    work_s = sum(pace.remaining_work_s(request) for request in result.ordered)

    if relegated:
        relegated.sort(key=_relegated_key)
        first = relegated[0]
        if credit_s > 0 and now_s - first.arrival_s >= policy.relegated_after_s:
            result.ordered.append(relegated.pop(0))
            result.promoted.append(first.request_id)
            work_s += pace.remaining_work_s(first)

    given_up: list[QueuedRequest] = []
    for members in classes:
        if members:
            work_s = _append_class(result, members, given_up, now_s, pace, policy, work_s)
    result.newly_relegated = [request.request_id for request in given_up]
    if given_up:
        relegated = sorted([*relegated, *given_up], key=_relegated_key)
    result.ordered += _hopeful_first(relegated, now_s, pace, work_s)
    return result


def _append_class(
    result: WaitingOrder,
    members: list[QueuedRequest],
    given_up: list[QueuedRequest],
    now_s: float,
    pace: PrefillPace,
    policy: OrderPolicy,
    ahead_s: float,
) -> float:
    """Append the members that can make it to the order, the others to `given_up`; return the work so far."""
    value = value_function(policy.value_function)
    keyed = [(order_key(value(request, pace.alone_s(request), now_s), request), request) for request in members]
    keyed.sort(key=_key)
    members = [request for _, request in keyed]
    works_s = [pace.remaining_work_s(request) for request in members]
    if policy.relegation != NONE:
        jobs = [
            Job(request.deadline_s - now_s, work_s, long_prompt_weight(request.request_id, policy.fairness))
            for request, work_s in zip(members, works_s, strict=True)
        ]
        caution, finish_s = policy.caution, pace.finish_s
        choose = late if policy.relegation == LATE else moore_hodgson
        dropped = set(choose(jobs, lambda work_s: caution * finish_s(work_s), ahead_s))
        if dropped:
            given_up += [members[i] for i in sorted(dropped)]
            works_s = [work_s for i, work_s in enumerate(works_s) if i not in dropped]
            members = [request for i, request in enumerate(members) if i not in dropped]
    result.ordered += members
    return ahead_s + math.fsum(works_s)


def _hopeful_first(
    relegated: list[QueuedRequest], now_s: float, pace: PrefillPace, ahead_s: float
) -> list[QueuedRequest]:
    """Move the relegated requests that make it even behind all others to the front, by deadline."""
    hopeful, hopeless = [], []
    for request in sorted(relegated, key=lambda request: request.deadline_s):
        work_s = ahead_s + pace.remaining_work_s(request)
        if now_s + pace.finish_s(work_s) <= request.deadline_s:
            hopeful.append(request)
            ahead_s = work_s
        else:
            hopeless.append(request)
    hopeless.sort(key=_relegated_key)
    return hopeful + hopeless


def _class_of(request: QueuedRequest) -> int:
    return 0 if request.urgent else 1 if request.ticketed else 2


def _key(entry: tuple[tuple[float, int, float, str], QueuedRequest]) -> tuple[float, int, float, str]:
    return entry[0]


def _relegated_key(request: QueuedRequest) -> tuple[int, float, str]:
    return (request.priority, request.arrival_s, request.request_id)
