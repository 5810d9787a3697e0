"""The risk of missing objectives, for many requests on many instances at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from services.policy.calibration import LEVELS, P50, P90, SLICE_LIMITS_S, ResidualSlice, prior_slices
from services.policy.order import OrderPolicy
from services.policy.prefill import ROUNDING_S, PrefillPace, prefill_pace
from services.policy.relegation import MOORE_HODGSON, NONE, late, moore_hodgson, worth_trying
from services.policy.step_time import StepTimeModel
from services.policy.token_budget import BudgetPolicy, DecodeLoad
from services.policy.value_functions import HYBRID_ALPHA, value_function

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
_P90_SIGMAS = 1.2816
_CAUTION = OrderPolicy().caution


@dataclass(frozen=True, slots=True, kw_only=True)
class RiskInstance:
    """One candidate instance."""

    model: StepTimeModel
    decodes: int = 0
    decode_context_tokens: int = 0
    min_tbt_s: float = 0.0
    """0: none."""
    in_progress_tokens: int = 0
    """Prefill tokens left of started requests."""
    hop_s: float = 0.0
    budget: BudgetPolicy = field(default_factory=BudgetPolicy)
    residuals: tuple[ResidualSlice, ...] = field(default_factory=prior_slices)


@dataclass(frozen=True, slots=True)
class RiskTable:
    """Risks by (request, instance); shape (requests, instances), times in seconds."""

    ttft_mean_s: Floats
    """From arrival."""
    ttft_p50_s: Floats
    ttft_p90_s: Floats
    tbt_mean_s: Floats
    tbt_p90_s: Floats
    miss_ttft: Floats
    miss_tbt: Floats
    laxity_s: Floats
    """Deadline less predicted first token."""
    latest_move_s: Floats
    """From now until the last instant at which placing the request there makes its objective with 90%."""


def assess(
    instances: Sequence[RiskInstance],
    home: Ints,
    prompt_tokens: Ints,
    age_s: Floats,
    ttft_slo_s: Floats,
    tbt_slo_s: Floats,
    value: str = "llf",
    relegation: str = MOORE_HODGSON,
) -> RiskTable:
    """Assess every request on every instance.

    A request is ordered among those whose home an instance is by the value function; with relegation, those that
    instance would give up count as behind all others.

    Args:
        home: index into instances of where each request waits; -1: nowhere yet.
        prompt_tokens: tokens to compute.
        age_s: seconds since arrival.
    """
    value_function(value)
    if not len(instances) or not len(home):
        empty = np.zeros((len(home), len(instances)))
        return RiskTable(*[empty] * 9)
    residents = [np.flatnonzero(home == i) for i in range(len(instances))]
    bounds_s = [
        instance.min_tbt_s or (float(tbt_slo_s[own].min()) if len(own) else np.inf)
        for instance, own in zip(instances, residents, strict=True)
    ]
    paces = [
        prefill_pace(instance.model, DecodeLoad(instance.decodes, instance.decode_context_tokens), instance.budget, tbt)
        for instance, tbt in zip(instances, bounds_s, strict=True)
    ]
    # From here on, arrays have one row an instance: few operations on many numbers, not many on few.
    pace = _Paces.of(paces)
    work_s = pace.work_s(tokens=prompt_tokens)
    keys = np.broadcast_to(_keys(value, pace.finish_s(work_s), age_s, ttft_slo_s), work_s.shape)
    left_s = ttft_slo_s - age_s
    by_deadline = np.argsort(left_s)
    within_s = pace.work_within_s(left_s / _CAUTION)
    ahead_s = np.array(
        [
            _ahead_s(
                paces[i], one, residents[i], work_s[i], keys[i], within_s[i], left_s, age_s, relegation, by_deadline
            )
            for i, one in enumerate(instances)
        ]
    )
    remaining_s = np.maximum(pace.finish_s(ahead_s + work_s), 1e-6)
    queue_s = np.where(ahead_s > 0, pace.finish_s(ahead_s), 0.0)
    fixed_s = age_s + np.array([[instance.hop_s] for instance in instances])
    allowed = np.maximum(ttft_slo_s - fixed_s, 0.0) / remaining_s
    p50, p90, miss_ttft = _residual_columns(instances, queue_s, allowed)

    busy = np.array([[len(own) > 0 or i.in_progress_tokens > 0] for i, own in zip(instances, residents, strict=True)])
    tbt_s = _tbt_s(instances, pace, prompt_tokens, tbt_slo_s, busy)
    sigma = np.array([[max(instance.model.log_sigma, 1e-3)] for instance in instances])
    miss_tbt = 1.0 - _normal_cdf(np.log(np.maximum(tbt_slo_s, 1e-6) / tbt_s) / sigma)
    mean_s, p90_s = fixed_s + remaining_s, fixed_s + remaining_s * p90
    columns = (
        mean_s,
        fixed_s + remaining_s * p50,
        p90_s,
        tbt_s,
        tbt_s * np.exp(_P90_SIGMAS * sigma),
        miss_ttft,
        miss_tbt,
        ttft_slo_s - mean_s,
        ttft_slo_s - p90_s,
    )
    return RiskTable(*(column.T for column in columns))


@dataclass(frozen=True, slots=True)
class _Paces:
    """PrefillPace of every instance, in columns of shape (instances, 1)."""

    budget_tokens: Floats
    overhead_s: Floats
    capacity_s: Floats
    token_s: Floats
    product_s: Floats
    small_work_s: Floats
    small_overhead_s: Floats
    small_ratio: Floats

    @classmethod
    def of(cls, paces: Sequence[PrefillPace]) -> "_Paces":
        """Return the columns."""
        return cls(*(np.array([[getattr(pace, name)] for pace in paces]) for name in cls.__slots__))

    def work_s(self, tokens: Ints) -> Floats:
        """Return `PrefillPace.work_s` of fresh prompts."""
        later_chunks = np.maximum(tokens - self.budget_tokens, 0)
        work_s: Floats = self.token_s * tokens + self.product_s * tokens * (0.5 * later_chunks)
        return work_s

    def finish_s(self, work_s: Floats) -> Floats:
        """Return `PrefillPace.finish_s`."""
        packed_s = np.ceil(work_s / self.capacity_s) * self.overhead_s + work_s
        small_s = self.small_overhead_s + work_s * self.small_ratio
        return np.where(work_s <= self.small_work_s, small_s, packed_s)

    def work_within_s(self, time_s: Floats) -> Floats:
        """Return `PrefillPace.work_within_s`."""
        step_s = self.overhead_s + self.capacity_s
        steps = np.floor(time_s / step_s)
        rest_s = time_s - steps * step_s
        packed_s = steps * self.capacity_s + np.minimum(np.maximum(rest_s - self.overhead_s, 0.0), self.capacity_s)
        small_s = np.minimum((time_s - self.small_overhead_s) / self.small_ratio, self.small_work_s)
        return np.where(packed_s > self.small_work_s, packed_s, small_s) + ROUNDING_S


def _residual_columns(
    instances: Sequence[RiskInstance], queue_s: Floats, allowed: Floats
) -> tuple[Floats, Floats, Floats]:
    """Return by cell the median and 90% ratios of actual to predicted TTFT, and P(ratio above `allowed`)."""
    slices = np.zeros(queue_s.shape, dtype=np.int8)
    for _, limit_s in SLICE_LIMITS_S[:-1]:
        slices += queue_s > limit_s
    p50, p90, miss = np.empty_like(queue_s), np.empty_like(queue_s), np.empty_like(queue_s)
    # Workers mostly share their residuals: one pass over all their cells.
    sharing: dict[tuple[ResidualSlice, ...], list[int]] = {}
    for i, instance in enumerate(instances):
        sharing.setdefault(instance.residuals, []).append(i)
    for residuals, sharers in sharing.items():
        rows = slice(None) if len(sharers) == len(instances) else sharers
        own_slices, own_allowed = slices[rows], allowed[rows]
        p50[rows] = np.array([residual.ratios[P50] for residual in residuals])[own_slices]
        p90[rows] = np.array([residual.ratios[P90] for residual in residuals])[own_slices]
        within = np.empty_like(own_allowed)
        for index, residual in enumerate(residuals):
            cells = own_slices == index
            # Below the lowest quantile P falls to 0 at ratio 0, above the highest it reaches 1 at half as much again.
            knots = [0.0, *residual.ratios, 1.5 * residual.ratios[-1]]
            within[cells] = np.interp(own_allowed[cells], knots, [0.0, *LEVELS, 1.0])
        miss[rows] = 1.0 - within
    return p50, p90, miss


def _ahead_s(
    pace: PrefillPace,
    instance: RiskInstance,
    residents: Ints,
    work_s: Floats,
    keys: Floats,
    within_s: Floats,
    left_s: Floats,
    age_s: Floats,
    relegation: str,
    by_deadline: Ints,
) -> Floats:
    """Return the prefill work that is done before each request if it is (or were) in this instance's queue.

    Args:
        keys: order of the queue.
        within_s: most work that is sure to be done by each request's deadline.
        left_s: seconds until that.
        by_deadline: rows in that order. Nearly that of most keys: sought in it, they are found twice as fast.
    """
    in_progress_s = pace.work_s(instance.in_progress_tokens) if instance.in_progress_tokens else 0.0
    if not len(residents):
        return np.full(len(work_s), in_progress_s)
    queue = residents[np.lexsort((-age_s[residents], keys[residents]))]
    dropped = _given_up(relegation, queue, work_s, within_s, in_progress_s)
    if not in_progress_s and queue[0] in dropped:
        positions = np.flatnonzero(np.isin(queue, dropped)).tolist()
        hoped_s = [pace.work_within_s(own_s) for own_s in left_s[queue].tolist()]
        tried = worth_trying(positions, within_s[queue].tolist(), hoped_s, work_s[queue].tolist())
        if tried is not None:
            dropped.remove(int(queue[tried]))
    stays = np.ones(len(work_s), dtype=bool)
    stays[dropped] = False
    kept = queue[stays[queue]]
    through_s = np.concatenate([[in_progress_s], in_progress_s + np.cumsum(work_s[kept])])
    ahead_s = np.empty(len(work_s))
    ahead_s[by_deadline] = through_s[np.searchsorted(keys[kept], keys[by_deadline], side="right")]
    ahead_s[kept] = through_s[:-1]
    if dropped:
        behind = np.array(sorted(dropped, key=lambda row: -age_s[row]))
        ahead_s[behind] = through_s[-1] + np.cumsum(work_s[behind]) - work_s[behind]
    return ahead_s


def _given_up(relegation: str, queue: Ints, work_s: Floats, within_s: Floats, ahead_s: float) -> list[int]:
    """Return the rows that the rule gives up; a vector check settles the common case that everybody makes it."""
    if relegation == NONE:
        return []
    if relegation == MOORE_HODGSON:
        queue = queue[np.argsort(within_s[queue], kind="stable")]
    works_s, limits_s = work_s[queue], within_s[queue]
    if (ahead_s + np.cumsum(works_s) <= limits_s).all():
        return []
    # Both rules drop at once who misses even if nobody else is served: whoever was kept before is shorter.
    hopeless = ahead_s + works_s > limits_s
    given_up: list[int] = queue[hopeless].tolist()
    hopeful = queue[~hopeless]
    choose = moore_hodgson if relegation == MOORE_HODGSON else late
    chosen = choose(limits_s[~hopeless].tolist(), works_s[~hopeless].tolist(), ahead_s)
    return given_up + hopeful[chosen].tolist()  # type: ignore[no-any-return]


def _keys(value: str, alone_s: Floats, age_s: Floats, ttft_slo_s: Floats) -> Floats:
    """Return the value functions of services.policy.value_functions in columns; now is 0."""
    deadline_s = ttft_slo_s - age_s
    match value or "llf":
        case "fcfs":
            return -age_s
        case "edf":
            return deadline_s
        case "sjf":
            return alone_s
        case "hybrid":
            return deadline_s + HYBRID_ALPHA * alone_s
        case "hrrn":
            response_ratio: Floats = (age_s + alone_s) / np.maximum(alone_s, 1e-6)
            return -response_ratio
        case _:
            return deadline_s - alone_s


def _tbt_s(
    instances: Sequence[RiskInstance], pace: _Paces, tokens: Ints, tbt_slo_s: Floats, prefills_wait: Bools
) -> Floats:
    """Return the expected gap with each request resident: decodes alone, or steps filled up with prefill."""
    bins = [instance.model.bin_of(instance.decodes + 1) for instance in instances]
    loads = list(zip(instances, bins, strict=True))
    alone_s = np.array([[bin.overhead_s(i.decodes + 1, i.decode_context_tokens)] for i, bin in loads])
    decodes_s: Floats = np.maximum(alone_s + np.array([[bin.a4] for bin in bins]) * tokens, 1e-6)
    if not prefills_wait.any():
        return decodes_s
    bound_s = np.minimum(tbt_slo_s, np.array([[i.min_tbt_s or np.inf] for i in instances]))
    delivery_s = np.array([[i.budget.delivery_s] for i in instances])
    aimed_s = (bound_s - delivery_s) / np.array([[i.model.safety_factor] for i in instances])
    room_tokens = np.array([[i.budget.max_tokens - i.decodes] for i in instances])
    filled_s = np.maximum(np.minimum(aimed_s, pace.token_s * room_tokens + decodes_s), decodes_s)
    return np.where(prefills_wait, filled_s, decodes_s)


def _normal_cdf(z: Floats) -> Floats:
    """Return the normal distribution function, within 3e-4."""
    cdf: Floats = 0.5 * (1.0 + np.tanh(0.7978845608 * (z + 0.044715 * z * z * z)))
    return cdf
