"""When a waiting request leaves its instance for one that makes its deadline, and why."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

from services.policy.prefill import TtftEstimate
from services.policy.state import QueuedRequest


class OffloadAction(enum.StrEnum):
    """What becomes of a waiting request."""

    STAY = "stay"
    OFFLOAD = "offload"
    RELEGATE = "relegate"


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadPolicy:
    """Margins of the offload rule."""

    caution: float = 1.2
    """Predicted waits and prefills are multiplied by this."""
    margin_steps: float = 2.0
    """Margin in LP steps (plus the hop), at least ..."""
    margin_share: float = 0.05
    """... this share of the TTFT objective."""
    min_gain_s: float = 0.02
    """Move only if the first token is predicted to come at least this much earlier, in seconds."""
    settle_s: float = 0.1
    """A request is judged again this long after it was placed, moved or refused a move; damps oscillation."""
    hop_limit: int = 1
    """Offloads of one request."""


@dataclass(frozen=True, slots=True)
class OffloadCandidate:
    """An instance that could take the request, moves in flight to it counted in the estimate."""

    worker_id: str
    estimate: TtftEstimate


@dataclass(frozen=True, slots=True)
class OffloadDecision:
    """The decision, its reason in words, and the numbers behind it; times in seconds."""

    action: OffloadAction
    reason: str
    target: str | None
    need_lp_s: float
    """To the first token where it waits, with caution."""
    need_hp_s: float
    """To the first token at the best candidate, with caution; infinite without one."""
    t_last_s: float
    """Latest useful instant of the move."""
    margin_s: float
    laxity_s: float
    """Deadline less the predicted first token where it waits."""


def is_at_risk(
    request: QueuedRequest, home: TtftEstimate, now_s: float, lp_step_s: float, hop_s: float, policy: OffloadPolicy
) -> bool:
    """Return whether a waiting request may miss where it is; one that is not at risk stays, whoever could take it.

    Args:
        home: estimate where it waits.
        lp_step_s: seconds of a full step at home.
        hop_s: seconds that a move takes.
    """
    return now_s + home.planned_s(policy.caution) > request.deadline_s - _margin_s(request, lp_step_s, hop_s, policy)


def _margin_s(request: QueuedRequest, lp_step_s: float, hop_s: float, policy: OffloadPolicy) -> float:
    return max(policy.margin_steps * lp_step_s + hop_s, policy.margin_share * request.slo.ttft_s)


def decide_offload(
    request: QueuedRequest,
    home: TtftEstimate,
    candidates: Sequence[OffloadCandidate],
    now_s: float,
    lp_step_s: float,
    policy: OffloadPolicy,
    last_decision_s: float = float("-inf"),
) -> OffloadDecision:
    """Decide whether a waiting request stays, moves or is given up.

    It moves iff the best candidate still makes its deadline and its home probably does not (or this is the latest
    useful instant). Nobody can make it: relegate. HP is never spent on what HP cannot save.

    Args:
        home: estimate where it waits.
        candidates: estimates elsewhere; each counts requests already on their way there.
        lp_step_s: seconds of a full step at home.
        last_decision_s: when it was last placed, moved, or refused a move.
    """
    best = min(candidates, key=lambda c: (c.estimate.planned_s(policy.caution), c.worker_id), default=None)
    need_lp_s = home.planned_s(policy.caution)
    need_hp_s = best.estimate.planned_s(policy.caution) if best else float("inf")
    hop_s = best.estimate.hop_s if best else 0.0
    margin_s = _margin_s(request, lp_step_s, hop_s, policy)
    deadline_s = request.deadline_s
    t_last_s = deadline_s - need_hp_s - margin_s
    at_risk = is_at_risk(request, home, now_s, lp_step_s, hop_s, policy)
    misses = now_s + need_lp_s > deadline_s
    safe = now_s + need_hp_s <= deadline_s

    def decision(action: OffloadAction, reason: str) -> OffloadDecision:
        target = best.worker_id if best and action is OffloadAction.OFFLOAD else None
        laxity_s = deadline_s - now_s - home.mean_s
        return OffloadDecision(action, reason, target, need_lp_s, need_hp_s, t_last_s, margin_s, laxity_s)

    if request.started:
        return decision(OffloadAction.STAY, "its prefill has started")
    if not at_risk and now_s < t_last_s:
        return decision(OffloadAction.STAY, "makes its objective here")
    if request.hops >= policy.hop_limit:
        return decision(OffloadAction.STAY, "hop limit reached")
    if now_s - last_decision_s < policy.settle_s:
        return decision(OffloadAction.STAY, "decided a moment ago")
    if safe and need_lp_s - need_hp_s < policy.min_gain_s:
        return decision(OffloadAction.STAY, "a move would gain too little")
    if safe:
        reason = "would miss here and makes it there" if at_risk else "latest useful moment to move"
        return decision(OffloadAction.OFFLOAD, reason)
    if misses:
        return decision(OffloadAction.RELEGATE, "no instance makes its objective")
    return decision(OffloadAction.STAY, "at risk here, not safe elsewhere")
