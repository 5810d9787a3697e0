"""Shorter steps while nobody who waits needs long ones: gaps then have room for what no model predicts."""

import math
from collections.abc import Collection, Iterable

from services.policy.prefill import PrefillPace, prefill_pace
from services.policy.state import QueuedRequest
from services.policy.step_time import StepTimeModel
from services.policy.token_budget import STATIC, BudgetPolicy, DecodeLoad

_SHARE = 0.7
"""Of the time that a waiting request has left: by then it would be done at the calm pace."""
_MOST_ROOM = 0.3
"""Of the TBT objective."""


def calm_bound_s(
    policy: BudgetPolicy,
    model: StepTimeModel,
    load: DecodeLoad,
    bound_s: float,
    tightest_s: float,
    ordered: Iterable[QueuedRequest],
    given_up: Collection[str],
    now_s: float,
) -> float:
    """Return what the next step may take: less than `bound_s` if all who wait make their deadlines by far even so.

    A full step gains prefill throughput and risks the gap of every stream in it. Nobody needs the throughput while the
    waiting requests would be done within `_SHARE` of the time they have left at a pace of calm steps. These leave more
    room than `delivery_s`, which is weighed against throughput: on a path that adds next to nothing, hardly any more.

    Args:
        bound_s: what step_bound_s returned.
        tightest_s: tightest TBT objective of the decodes.
        ordered: waiting requests and resident prefills as order_waiting returned them.
        given_up: ids of those that it gave up.
    """
    if bound_s == math.inf or calm_pace(policy, model, load, tightest_s, ordered, given_up, now_s) is None:
        return bound_s
    return bound_s - _room_s(policy, tightest_s)


def calm_pace(
    policy: BudgetPolicy,
    model: StepTimeModel,
    load: DecodeLoad,
    tightest_s: float,
    ordered: Iterable[QueuedRequest],
    given_up: Collection[str],
    now_s: float,
) -> PrefillPace | None:
    """Return the pace of calm steps if the engine takes such ones now, else None; arguments as of calm_bound_s."""
    if policy.kind == STATIC or policy.calm_factor <= 0 or tightest_s == math.inf or not load.decodes:
        return None
    pace = prefill_pace(model, load, policy, tightest_s - _room_s(policy, tightest_s))
    work_s = 0.0
    for request in ordered:
        if request.relegated or request.request_id in given_up:
            continue
        work_s += pace.remaining_work_s(request)
        if pace.finish_s(work_s) > _SHARE * (request.deadline_s - now_s):
            return None
    return pace


def _room_s(policy: BudgetPolicy, tightest_s: float) -> float:
    return min(policy.calm_factor * policy.delivery_s, _MOST_ROOM * tightest_s)
