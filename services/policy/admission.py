"""What happens to a request that nobody is predicted to serve in time."""

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.policy.prefill import TtftEstimate
from services.policy.state import QueuedRequest, Slo


class AdmissionAction(enum.StrEnum):
    """What becomes of a new request."""

    ADMIT = "admit"
    RELEGATE = "relegate"
    REFUSE = "refuse"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionPolicy:
    """Limits of what is let in."""

    refuse_hopeless: bool = False
    """Refuse, instead of relegating, what no instance can serve in time, unless the caller says otherwise."""
    max_wait_s: float = 30.0
    """Refuse what is predicted to wait longer than this, in seconds, even behind all others; 0: no limit.

    It also bounds how long a request that asked to be refused in overload does wait."""
    max_waiting: int = 10_000
    """Refuse when this many requests wait; 0: no limit."""
    caution: float = 1.0
    """Predicted times are multiplied by this."""


@dataclass(frozen=True, slots=True)
class AdmissionDecision:
    """The decision, its reason in words, and when to try again."""

    action: AdmissionAction
    reason: str
    retry_after_s: float = 0.0
    """Seconds until room is predicted; 0 when admitted."""


def admit(
    slo: Slo,
    estimates: Sequence[TtftEstimate],
    waiting: int,
    policy: AdmissionPolicy,
    refuse_hopeless: bool | None = None,
    age_s: float = 0.0,
) -> AdmissionDecision:
    """Decide on a new request.

    Args:
        estimates: on each instance that could take it; empty means nobody can.
        waiting: requests waiting in the cluster.
        refuse_hopeless: the caller's choice; None takes the policy's.
        age_s: seconds since it was received.
    """
    if not estimates:
        return AdmissionDecision(AdmissionAction.REFUSE, "no instance takes requests", 1.0)
    best_s = min(estimate.planned_s(policy.caution) for estimate in estimates) + age_s
    if policy.max_waiting and waiting >= policy.max_waiting:
        return AdmissionDecision(AdmissionAction.REFUSE, f"{waiting} requests wait already", retry_delay_s(best_s, slo))
    if policy.max_wait_s and best_s > max(policy.max_wait_s, slo.ttft_s):
        reason = f"its first token is predicted in {best_s:.1f} s, over the limit of {policy.max_wait_s:g} s"
        return AdmissionDecision(AdmissionAction.REFUSE, reason, retry_delay_s(best_s, slo))
    if best_s <= slo.ttft_s:
        return AdmissionDecision(AdmissionAction.ADMIT, "an instance makes its objective")
    reason = f"no instance makes its objective: {best_s:.2f} s predicted, {slo.ttft_s:g} s asked"
    if policy.refuse_hopeless if refuse_hopeless is None else refuse_hopeless:
        return AdmissionDecision(AdmissionAction.REFUSE, reason, retry_delay_s(best_s, slo))
    return AdmissionDecision(AdmissionAction.RELEGATE, reason)


def waited_too_long(requests: Iterable[QueuedRequest], now_s: float, policy: AdmissionPolicy) -> list[str]:
    """Return the ids of requests, not started, that have waited max_wait_s and missed their objective: to be refused.

    In lasting overload somebody's wait has no end unless some are told to go; this bounds it.

    Args:
        requests: those whose callers would rather be refused than served late.
    """
    if not policy.max_wait_s:
        return []
    return [
        request.request_id
        for request in requests
        if not request.started and now_s - request.arrival_s > max(policy.max_wait_s, request.slo.ttft_s)
    ]


def retry_delay_s(best_s: float, slo: Slo) -> float:
    """Return seconds after which the same request is predicted to make its objective, within 0.1 to 30 s."""
    late_s = best_s - slo.ttft_s
    return min(max(late_s, 0.1), 30.0) if math.isfinite(late_s) else 30.0
