"""Where a new request goes."""

import math
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from services.policy.prefill import instance_pace, newcomer_work_s, step_in_progress
from services.policy.state import InstanceView, QueuedRequest, Role, Slo
from services.policy.token_budget import BudgetPolicy

COMPARED = 8
"""Most instances that one decision looks at, so that its cost does not grow with the cluster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementPolicy:
    """How new requests are placed."""

    name: str = "least_predicted_work"
    stale_s: float = 1.0
    """Instances whose last report is older are used only when there is no other."""
    saturation_s: float = 0.5
    """prefix_affine leaves the owner once its first token is predicted this much later than the best other's."""
    tbt_fill: float = 0.65
    """tbt_bins leaves the like once the first token is predicted later than this share of the TTFT objective."""
    hp_fill: float = 1.0
    """HPs take arrivals beside the others while the first token is predicted within this share of the tightest TTFT
    objective lately of those with the same TBT objective: so much room is left for requests that would miss elsewhere,
    and short prompts, whose objectives are tight where they differ, get it first. 0: they take no arrivals."""
    compared: int = COMPARED
    """Most instances that are predicted for one request; of more, so many are drawn at random, so that the cost of a
    placement does not grow with the cluster. Not for round_robin and least_requests, which predict nothing."""
    max_owners: int = 10_000
    """Sessions remembered by prefix_affine."""

    def __post_init__(self) -> None:
        if self.name not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, got {self.name!r}")
        if not 0 <= self.hp_fill <= 1:
            raise ValueError(f"hp_fill must be from 0 to 1, got {self.hp_fill:g}")
        if self.compared < 2:
            raise ValueError(f"compared must be at least 2, got {self.compared}")


_FORGETTING = 1.01
"""Factor by which the tightest objective grows with each arrival."""
_CLASSES = 64
"""TBT objectives of which the tightest TTFT objective is remembered."""


@dataclass(slots=True)
class PlacementState:
    """What placement remembers from request to request; owned by the caller."""

    rng: random.Random = field(default_factory=lambda: random.Random(0))
    turn: int = 0
    tightest_ttft_s: OrderedDict[float, float] = field(default_factory=OrderedDict)
    """Of the objectives lately, by TBT objective, least recently used first."""
    owners: OrderedDict[str, str] = field(default_factory=OrderedDict)
    """Session to worker id, least recently used first."""

    def note_objective(self, slo: Slo) -> float:
        """Take note of an arrival's objective and return the tightest TTFT objective of its like, in seconds.

        One that is not asked for again is forgotten over some hundred arrivals.
        """
        lately_s = self.tightest_ttft_s.get(slo.tbt_s, math.inf)
        self.tightest_ttft_s[slo.tbt_s] = tightest_s = min(slo.ttft_s, lately_s * _FORGETTING)
        self.tightest_ttft_s.move_to_end(slo.tbt_s)
        if len(self.tightest_ttft_s) > _CLASSES:
            self.tightest_ttft_s.popitem(last=False)
        return tightest_s


@dataclass(slots=True)
class PlacementCandidate:
    """One instance as placement saw it."""

    worker_id: str
    ttft_s: float
    """Predicted seconds to the first token behind everything queued there."""
    load: float
    """What the policy compared; smaller is better."""
    excluded: str = ""
    """Why it could not be chosen."""
    cached_tokens: int = 0
    """Of the prompt, in its prefix cache."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The choice, with what it was made from."""

    worker_id: str | None
    """None: no instance takes requests."""
    rule: str
    candidates: list[PlacementCandidate]


def queue_ttft_s(view: InstanceView, request: QueuedRequest, budget: BudgetPolicy) -> float:
    """Return the seconds to a new request's first token behind all queued on an instance but the relegated."""
    pace = instance_pace(view, budget)
    work_s = sum(pace.remaining_work_s(queued) for queued in view.queue if not queued.relegated)
    running = step_in_progress(view, pace)
    return running.newcomer(pace, work_s, newcomer_work_s(view, pace, request), view.hop_s).mean_s


def place(
    request: QueuedRequest,
    views: Sequence[InstanceView],
    policy: PlacementPolicy,
    state: PlacementState,
    budget: BudgetPolicy,
    affinity_key: str = "",
    predict: Callable[[InstanceView, QueuedRequest, BudgetPolicy], float] = queue_ttft_s,
) -> Placement:
    """Choose the instance of a new request among those that take arrivals: LP and unified ones, and HPs with room.

    An HP that takes a request on its arrival spares it what a ticket costs: the rest of its LP's step.

    Args:
        affinity_key: identifies the session for prefix_affine, where no prefix is known; empty: none.
        predict: seconds to a request's first token on an instance; a caller may pass one that remembers.
    """
    reserve_s = policy.hp_fill * state.note_objective(request.slo)
    arrivals = any(view.role is not Role.HIGH and not view.draining for view in views)
    fresh = any(
        view.report_age_s <= policy.stale_s for view in views if not view.draining and not _is_reserve(view, arrivals)
    )
    candidates = []
    open_views: _Open = []
    for view in _compared(request, views, policy, state, affinity_key, arrivals, fresh):
        ttft_s = predict(view, request, budget)
        candidate = PlacementCandidate(view.worker_id, ttft_s, 0.0, cached_tokens=view.cached_tokens(request))
        candidates.append(candidate)
        candidate.excluded = _closed(view, policy, arrivals, fresh)
        if not candidate.excluded and _is_reserve(view, arrivals) and candidate.ttft_s > reserve_s:
            candidate.excluded = _RESERVED
        if not candidate.excluded:
            open_views.append((view, candidate))
    if not open_views:
        return Placement(None, "no instance takes requests", candidates)
    chosen, rule = PLACEMENTS[policy.name](request, open_views, policy, state, affinity_key)
    return Placement(chosen, rule, candidates)


def _compared(
    request: QueuedRequest,
    views: Sequence[InstanceView],
    policy: PlacementPolicy,
    state: PlacementState,
    affinity_key: str,
    arrivals: bool,
    fresh: bool,
) -> Sequence[InstanceView]:
    """Return the instances to predict: all, or of many that can be chosen some, the owner of the prefix among them.

    Nobody owns one that they all have.
    """
    if len(views) <= policy.compared or policy.name in (round_robin.__name__, least_requests.__name__):
        return views
    able = (view for view in _in_random_order(views, state.rng) if not _closed(view, policy, arrivals, fresh))
    drawn = list(islice(able, policy.compared))
    owner = state.owners.get(affinity_key) if affinity_key else None
    if owner or request.prefix:
        rest = list(able)
        holder = max(drawn + rest, key=lambda view: view.cached_tokens(request), default=None)
        drawn += [view for view in rest if view is holder or view.worker_id == owner]
    return drawn or views


def _in_random_order(views: Sequence[InstanceView], rng: random.Random) -> Iterator[InstanceView]:
    """Shuffle no more of them than are asked for."""
    left = list(views)
    while left:
        place = int(rng.random() * len(left))
        yield left[place]
        left[place] = left[-1]
        left.pop()


_RESERVED = "HP keeps its room for offloads"


def _closed(view: InstanceView, policy: PlacementPolicy, arrivals: bool, fresh: bool) -> str:
    """Say why an instance takes no arrivals, whatever is predicted for it; empty when it takes them."""
    reserve = _is_reserve(view, arrivals)
    if view.draining:
        return "draining"
    if (fresh or reserve) and view.report_age_s > policy.stale_s:
        return "its report is stale"
    return _RESERVED if reserve and policy.hp_fill == 0 else ""


def _is_reserve(view: InstanceView, arrivals: bool) -> bool:
    """Whether it is an HP beside instances that take arrivals."""
    return arrivals and view.role is Role.HIGH and not view.draining


_Open = list[tuple[InstanceView, PlacementCandidate]]


def _least(open_views: _Open) -> str:
    return min(open_views, key=lambda entry: (entry[1].load, entry[0].worker_id))[1].worker_id


def round_robin(
    request: QueuedRequest, open_views: _Open, policy: PlacementPolicy, state: PlacementState, affinity_key: str
) -> tuple[str, str]:
    """Take turns."""
    state.turn += 1
    return sorted(view.worker_id for view, _ in open_views)[(state.turn - 1) % len(open_views)], "its turn"


def least_requests(
    request: QueuedRequest, open_views: _Open, policy: PlacementPolicy, state: PlacementState, affinity_key: str
) -> tuple[str, str]:
    """Fewest requests, waiting and running."""
    for view, candidate in open_views:
        candidate.load = float(len(view.queue) + view.decodes)
    return _least(open_views), "fewest requests"


def least_predicted_work(
    request: QueuedRequest, open_views: _Open, policy: PlacementPolicy, state: PlacementState, affinity_key: str
) -> tuple[str, str]:
    """Earliest predicted first token behind all that waits there; decodes count as they slow the prefill."""
    for _, candidate in open_views:
        candidate.load = candidate.ttft_s
    return _least(open_views), "least predicted work"


def power_of_two(
    request: QueuedRequest, open_views: _Open, policy: PlacementPolicy, state: PlacementState, affinity_key: str
) -> tuple[str, str]:
    """The better, by predicted work, of two drawn at random; for many routers with old reports."""
    drawn = state.rng.sample(open_views, min(2, len(open_views)))
    return least_predicted_work(request, drawn, policy, state, affinity_key)[0], "better of two drawn"


def prefix_affine(
    request: QueuedRequest, open_views: _Open, policy: PlacementPolicy, state: PlacementState, affinity_key: str
) -> tuple[str, str]:
    """The instance with the longest known prefix, else the session's last one, until its load saturates."""
    best, rule = least_predicted_work(request, open_views, policy, state, affinity_key)
    loads = {candidate.worker_id: candidate.load for _, candidate in open_views}
    held = {candidate.worker_id: candidate.cached_tokens for _, candidate in open_views}
    longest = min(held, key=lambda worker_id: (-held[worker_id], loads[worker_id], worker_id))
    owner = longest if held[longest] else state.owners.get(affinity_key) if affinity_key else None
    stays = owner in loads and loads[owner] <= loads[best] + policy.saturation_s
    chosen = owner if stays and owner is not None else best
    if affinity_key:
        state.owners[affinity_key] = chosen
        state.owners.move_to_end(affinity_key)
        while len(state.owners) > policy.max_owners:
            state.owners.popitem(last=False)
    if stays:
        return chosen, "owns the prefix"
    return best, "least predicted work; owner saturated or gone" if owner else rule


def tbt_bins(
    request: QueuedRequest, open_views: _Open, policy: PlacementPolicy, state: PlacementState, affinity_key: str
) -> tuple[str, str]:
    """Least predicted work among instances that serve the same TBT objective, while these are not full.

    The tightest objective on an instance bounds its steps for all: unlike ones are kept apart. Better to join tighter
    ones than to impose a bound on looser ones.
    """
    tbt_s, limit_s = request.slo.tbt_s, policy.tbt_fill * request.slo.ttft_s

    def cost(entry: tuple[InstanceView, PlacementCandidate]) -> tuple[bool, int, float, str]:
        view, candidate = entry
        candidate.load = candidate.ttft_s
        full = candidate.ttft_s > limit_s
        tightest_s = min([view.min_tbt_s or math.inf, *(queued.slo.tbt_s for queued in view.queue)])
        unlike = 0 if tightest_s in (tbt_s, math.inf) else 1 if tightest_s < tbt_s else 2
        return full, 0 if full else unlike, candidate.ttft_s, view.worker_id

    full, unlike, _, worker_id = min(map(cost, open_views))
    if full:
        return worker_id, "least predicted work; all are full"
    return worker_id, ("the same TBT objective", "tighter TBT objectives", "looser TBT objectives")[unlike]


PlacementRule = Callable[[QueuedRequest, _Open, PlacementPolicy, PlacementState, str], tuple[str, str]]
PLACEMENTS: dict[str, PlacementRule] = {
    "round_robin": round_robin,
    "least_requests": least_requests,
    "least_predicted_work": least_predicted_work,
    "power_of_two": power_of_two,
    "prefix_affine": prefix_affine,
    "tbt_bins": tbt_bins,
}
