"""The one order of an instance's waiting requests: used by the engine, by the router to predict, and in simulation."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from services.policy.prefill import PrefillPace
from services.policy.relegation import LATE, MOORE_HODGSON, NONE, RULES, late, moore_hodgson, worth_trying
from services.policy.state import QueuedRequest
from services.policy.value_functions import value_function


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderPolicy:
    """How an instance orders its waiting requests."""

    value_function: str = "edf"
    """Beside relegation by deadline, edf kept 1 to 3% more requests than llf on chat traffic beyond the knee."""
    relegation: str = MOORE_HODGSON
    """"none", "late" or "moore_hodgson"."""
    caution: float = 1.05
    """Predicted times are multiplied by this before they are held against deadlines: who is given up a little early
    costs less than who takes part of the capacity and then misses by little. Not for the next in line, while nobody
    else would miss for it: long prompts need nearly all of their objective even alone."""
    pause_started: bool = True
    """Partly prefilled requests are ordered like all others and, when outranked, wait with their KV blocks; otherwise
    they come first. In overload it keeps 2% more of all requests and 14% more of the longest tenth."""
    relegated_share: float = 0.005
    """Share of capacity that overdue relegated requests may take ahead of the others; for RelegatedTurns. In overload
    each hundredth costs near 1% of all requests, so it only keeps waits from being endless: admission bounds them."""
    relegated_after_s: float = 20.0
    """A relegated request is overdue this long after its arrival."""

    def __post_init__(self) -> None:
        value_function(self.value_function)
        if self.relegation not in RULES:
            raise ValueError(f"relegation must be one of {', '.join(RULES)}, got {self.relegation!r}")
        if self.caution <= 0:
            raise ValueError(f"caution must be above 0, got {self.caution}")


def may_evict(free_blocks: float, resident: int, tokens: int, block_tokens: int) -> bool:
    """Return whether a step may well need more KV blocks than are free, so that vLLM preempts somebody.

    Nobody is paused then: a paused request holds its blocks and cannot be preempted.

    Args:
        free_blocks: KV blocks without a user.
        resident: requests that hold blocks; each that decodes begins a new one every `block_tokens` steps.
        tokens: most tokens of the step.
        block_tokens: length of a block.
    """
    return free_blocks * block_tokens < resident + tokens


def resident_first(ordered: Sequence[QueuedRequest], resident: Iterable[QueuedRequest]) -> list[QueuedRequest]:
    """Return the requests in the order in which vLLM computes them if nobody is paused."""
    begun = set(map(id, resident))
    return sorted(ordered, key=lambda request: id(request) not in begun)


@dataclass(slots=True)
class WaitingOrder:
    """What order_waiting decided."""

    ordered: list[QueuedRequest]
    """All requests, first to be served first."""
    newly_relegated: list[str] = field(default_factory=list)
    """Ids of requests that should be marked relegated from now on."""
    promoted: list[str] = field(default_factory=list)
    """Ids of overdue relegated requests placed ahead of the others; RelegatedTurns.spend each of their chunks."""


Entry = tuple[float, int, float, str, float, QueuedRequest]
"""(value, priority, arrival, id, work left, request): sorts by the total order of value_functions.order_key."""


def order_waiting(
    requests: Iterable[QueuedRequest],
    now_s: float,
    pace: PrefillPace,
    policy: OrderPolicy,
    credit_s: float = 0.0,
) -> WaitingOrder:
    """Order an instance's requests whose prefill is not complete; changes none of them.

    First streams that began elsewhere, by the deadline of their next token: they are never given up. Then started
    ones, unless the policy lets them wait; then at most one overdue relegated request while `credit_s`
    (of RelegatedTurns) is positive; then those that can make it, by value function; then the relegated, those that
    could still make it first. How a request came to an instance does not count, on HP either: what it drew on tickets
    would pass its own arrivals, which then miss, while all could have made it. O(n log n), 2 to 3 us a request.
    """
    value = value_function(policy.value_function)
    continued: list[QueuedRequest] = []
    started: list[Entry] = []
    rest: list[Entry] = []
    relegated: list[QueuedRequest] = []
    for request in requests:
        if request.continued:
            continued.append(request)
            continue
        first = request.started and not policy.pause_started
        if request.relegated and not first:
            relegated.append(request)
            continue
        work_s = pace.remaining_work_s(request)
        key_s = value(request, pace.finish_s(work_s), now_s)
        entry = (key_s, request.priority, request.arrival_s, request.request_id, work_s, request)
        (started if first else rest).append(entry)
    continued.sort(key=_continued_key)
    started.sort()
    result = WaitingOrder([*continued, *(entry[-1] for entry in started)])
    work_s = math.fsum(entry[-2] for entry in started) + math.fsum(map(pace.remaining_work_s, continued))

    relegated.sort(key=_relegated_key)
    if relegated and credit_s > 0 and now_s - relegated[0].arrival_s >= policy.relegated_after_s:
        overdue = relegated.pop(0)
        result.ordered.append(overdue)
        result.promoted.append(overdue.request_id)
        # It runs chunk by chunk while credit lasts, not to its end.
        work_s += min(pace.remaining_work_s(overdue), max(credit_s, pace.capacity_s))

    rest.sort()
    dropped = _choose_dropped(rest, now_s, pace, policy, work_s) if rest else set()
    kept = [entry for i, entry in enumerate(rest) if i not in dropped] if dropped else rest
    given_up = [rest[i][-1] for i in sorted(dropped)]
    result.ordered += [entry[-1] for entry in kept]
    result.newly_relegated = [request.request_id for request in given_up]
    if relegated or given_up:
        work_s += math.fsum(entry[-2] for entry in kept)
        result.ordered += _hopeful_first(relegated + given_up, now_s, pace, work_s)
    return result


def _choose_dropped(
    entries: list[Entry], now_s: float, pace: PrefillPace, policy: OrderPolicy, ahead_s: float
) -> set[int]:
    """Return the indices of the entries to give up."""
    if policy.relegation == NONE:
        return set()
    works_s = [entry[-2] for entry in entries]
    rooms_s = [(entry[-1].deadline_s - now_s) / policy.caution for entry in entries]
    if ahead_s + math.fsum(works_s) <= pace.work_within_s(min(rooms_s)):
        return set()
    choose = late if policy.relegation == LATE else moore_hodgson
    limits_s = [pace.work_within_s(room_s) for room_s in rooms_s]
    dropped = set(choose(limits_s, works_s, ahead_s))
    if not ahead_s and 0 in dropped:
        hoped_s = [pace.work_within_s(entry[-1].deadline_s - now_s) for entry in entries]
        tried = worth_trying(dropped, limits_s, hoped_s, works_s)
        return dropped if tried is None else dropped - {tried}
    return dropped


def _hopeful_first(
    relegated: list[QueuedRequest], now_s: float, pace: PrefillPace, ahead_s: float
) -> list[QueuedRequest]:
    """Sort relegated requests: those that make it even behind all others by deadline, then the rest by arrival."""
    hopeful, hopeless = [], []
    for request in sorted(relegated, key=_relegated_key):
        left_s = request.deadline_s - now_s
        if left_s > 0 and pace.finish_s(ahead_s + (work_s := pace.remaining_work_s(request))) <= left_s:
            hopeful.append(request)
            ahead_s += work_s
        else:
            hopeless.append(request)
    return hopeful + hopeless


def _continued_key(request: QueuedRequest) -> tuple[float, int, str]:
    return request.deadline_s, request.priority, request.request_id


def _relegated_key(request: QueuedRequest) -> tuple[bool, int, float, str]:
    return (not request.started, request.priority, request.arrival_s, request.request_id)
