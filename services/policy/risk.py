"""The risk of missing objectives, for many requests on many instances at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from services.policy.calibration import LEVELS, P50, P90, SLICE_LIMITS_S, ResidualSlice, prior_slices
from services.policy.prefill import PrefillPace, prefill_pace
from services.policy.relegation import MOORE_HODGSON, NONE, late, moore_hodgson
from services.policy.step_time import StepTimeModel
from services.policy.token_budget import BudgetPolicy, DecodeLoad
from services.policy.value_functions import HYBRID_ALPHA, value_function

Floats: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]


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
    shape = (len(home), len(instances))
    columns = [
        _assess_instance(
            instance, np.flatnonzero(home == i), prompt_tokens, age_s, ttft_slo_s, tbt_slo_s, value, relegation
        )
        for i, instance in enumerate(instances)
    ]
    stacked = np.array(columns).reshape(shape[1], 7, shape[0]).transpose(1, 2, 0)
    mean_s, p50_s, p90_s, tbt_s, tbt_p90_s, miss_ttft, miss_tbt = stacked
    slo_s = ttft_slo_s[:, None]
    return RiskTable(mean_s, p50_s, p90_s, tbt_s, tbt_p90_s, miss_ttft, miss_tbt, slo_s - mean_s, slo_s - p90_s)


def _assess_instance(
    instance: RiskInstance,
    residents: Ints,
    tokens: Ints,
    age_s: Floats,
    ttft_slo_s: Floats,
    tbt_slo_s: Floats,
    value: str,
    relegation: str,
) -> tuple[Floats, ...]:
    """Return one instance's columns of the table."""
    load = DecodeLoad(instance.decodes, instance.decode_context_tokens)
    tbt_bound_s = instance.min_tbt_s or (float(tbt_slo_s[residents].min()) if len(residents) else np.inf)
    pace = prefill_pace(instance.model, load, instance.budget, tbt_bound_s)
    work_s = _work_s(pace, tokens)
    ahead_s = _ahead_s(pace, instance, residents, work_s, age_s, ttft_slo_s, value, relegation)
    queue_s = np.where(ahead_s > 0, _finish_s(pace, ahead_s), 0.0)
    remaining_s = np.maximum(_finish_s(pace, ahead_s + work_s), 1e-6)

    limits = [limit_s or np.inf for _, limit_s in SLICE_LIMITS_S]
    slices = np.searchsorted(limits, queue_s)
    ratios = np.array([r.ratios for r in instance.residuals])
    fixed_s = age_s + instance.hop_s
    allowed = np.maximum(ttft_slo_s - fixed_s, 0.0) / remaining_s
    miss_ttft = np.empty_like(remaining_s)
    for s, residual in enumerate(instance.residuals):
        rows = slices == s
        if rows.any():
            # Below the lowest quantile P falls to 0 at ratio 0, above the highest it reaches 1 at half as much again.
            miss_ttft[rows] = 1.0 - np.interp(
                allowed[rows], [0.0, *residual.ratios, 1.5 * residual.ratios[-1]], [0.0, *LEVELS, 1.0]
            )
    tbt_s = _tbt_s(instance, pace, tokens, tbt_slo_s, bool(len(residents)) or instance.in_progress_tokens > 0)
    sigma = max(instance.model.log_sigma, 1e-3)
    miss_tbt = 1.0 - _normal_cdf(np.log(np.maximum(tbt_slo_s, 1e-6) / tbt_s) / sigma)
    return (
        fixed_s + remaining_s,
        fixed_s + remaining_s * ratios[slices, P50],
        fixed_s + remaining_s * ratios[slices, P90],
        tbt_s,
        tbt_s * np.exp(1.2816 * sigma),
        miss_ttft,
        miss_tbt,
    )


def _ahead_s(
    pace: PrefillPace,
    instance: RiskInstance,
    residents: Ints,
    work_s: Floats,
    age_s: Floats,
    ttft_slo_s: Floats,
    value: str,
    relegation: str,
) -> Floats:
    """Return the prefill work that is done before each request if it is (or were) in this instance's queue."""
    in_progress_s = pace.work_s(instance.in_progress_tokens) if instance.in_progress_tokens else 0.0
    if not len(residents):
        return np.full(len(work_s), in_progress_s)
    keys = _keys(value, _finish_s(pace, work_s), age_s, ttft_slo_s)
    queue = residents[np.lexsort((-age_s[residents], keys[residents]))]
    dropped = _given_up(relegation, queue, work_s, ttft_slo_s - age_s, pace, in_progress_s)
    stays = np.ones(len(work_s), dtype=bool)
    stays[dropped] = False
    kept = queue[stays[queue]]
    through_s = np.concatenate([[in_progress_s], in_progress_s + np.cumsum(work_s[kept])])
    ahead_s = through_s[np.searchsorted(keys[kept], keys, side="right")]
    ahead_s[kept] = through_s[:-1]
    if dropped:
        behind = np.array(sorted(dropped, key=lambda row: -age_s[row]))
        ahead_s[behind] = through_s[-1] + np.cumsum(work_s[behind]) - work_s[behind]
    return ahead_s


def _given_up(
    relegation: str, queue: Ints, work_s: Floats, left_s: Floats, pace: PrefillPace, ahead_s: float
) -> list[int]:
    """Return the rows that the rule gives up; a vector check settles the common case that everybody makes it."""
    if relegation == NONE:
        return []
    if relegation == MOORE_HODGSON:
        queue = queue[np.argsort(left_s[queue], kind="stable")]
    if (_finish_s(pace, ahead_s + np.cumsum(work_s[queue])) <= left_s[queue]).all():
        return []
    choose = moore_hodgson if relegation == MOORE_HODGSON else late
    return queue[choose(left_s[queue].tolist(), work_s[queue].tolist(), pace.finish_s, ahead_s)].tolist()  # type: ignore[no-any-return]


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


def _work_s(pace: PrefillPace, tokens: Ints) -> Floats:
    later_chunks = np.maximum(tokens - pace.budget_tokens, 0)
    work_s: Floats = pace.token_s * tokens + pace.product_s * tokens * (0.5 * later_chunks)
    return work_s


def _finish_s(pace: PrefillPace, work_s: Floats) -> Floats:
    packed_s = np.ceil(work_s / pace.capacity_s) * pace.overhead_s + work_s
    small_s = pace.small_overhead_s + work_s * pace.small_ratio
    return np.where(work_s <= pace.small_work_s, small_s, packed_s)


def _tbt_s(instance: RiskInstance, pace: PrefillPace, tokens: Ints, tbt_slo_s: Floats, prefills_wait: bool) -> Floats:
    """Return the expected gap with each request resident: decodes alone, or steps filled up with prefill."""
    bin = instance.model.bin_of(instance.decodes + 1)
    alone_s = bin.overhead_s(instance.decodes + 1, instance.decode_context_tokens)
    decodes_s: Floats = np.maximum(alone_s + bin.a4 * tokens, 1e-6)
    if not prefills_wait:
        return decodes_s
    bound_s = np.minimum(tbt_slo_s, instance.min_tbt_s) if instance.min_tbt_s > 0 else tbt_slo_s
    aimed_s = (bound_s - instance.budget.delivery_s) / instance.model.safety_factor
    most_s = pace.token_s * (instance.budget.max_tokens - instance.decodes) + decodes_s
    filled_s: Floats = np.maximum(np.minimum(aimed_s, most_s), decodes_s)
    return filled_s


def _normal_cdf(z: Floats) -> Floats:
    """Return the normal distribution function, within 3e-4."""
    cdf: Floats = 0.5 * (1.0 + np.tanh(0.7978845608 * (z + 0.044715 * z**3)))
    return cdf
