"""When a running stream leaves an instance that is about to break its token cadence, and where it goes."""

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from services.policy.prefill import PrefillPace, prefill_pace
from services.policy.state import InstanceView
from services.policy.step_time import StepShape
from services.policy.token_budget import BudgetPolicy, DecodeLoad

_LOOKED_AT = 8
"""Streams of an instance that are looked at for one move: those of the shortest context, whose moves cost least."""
_P90 = 1.2816
"""Standard deviations from the mean to the 90th percentile of a normal distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliefPolicy:
    """Margins of moves of running streams."""

    hold_share: float = 0.95
    """The target must be predicted to hold all gaps, its own streams' too, within this share of their objectives."""
    sustain_s: float = 0.5
    """A cadence must be predicted to break for this long without a pause, in seconds: not for one long step."""
    horizon_tokens: int = 100
    """Tokens whose lateness counts as gain; nobody knows how long a stream goes on."""
    gain_ratio: float = 2.0
    """The lateness avoided must be at least so many times what the move costs."""
    settle_s: float = 3.0
    """A stream is not moved again this long after it was placed or moved, in seconds."""
    hop_limit: int = 2
    """Such moves of one request."""
    moves_per_s: float = 4.0
    """Such moves that a router makes, on average ..."""
    burst: int = 4
    """... and at once."""
    kv_share: float = 0.9
    """The target's KV cache may be used up to this share."""

    def __post_init__(self) -> None:
        if not 0 < self.hold_share <= 1 or not 0 < self.kv_share <= 1:
            raise ValueError("hold-share and kv-share must be above 0 and at most 1")
        if self.gain_ratio < 1:
            raise ValueError(f"gain-ratio must be at least 1, got {self.gain_ratio}")
        for name in ("sustain_s", "settle_s", "moves_per_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name.replace('_', '-')} must be a finite number of at least 0")
        if min(self.horizon_tokens, self.burst) < 1 or self.hop_limit < 0:
            raise ValueError("horizon-tokens and burst must be at least 1, hop-limit at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningStream:
    """A stream that an instance decodes."""

    request_id: str
    tbt_s: float
    context_tokens: int
    """Prompt and tokens generated so far: what the target has to have in its cache."""
    left_tokens: int
    """Most tokens that may still come."""
    settled_s: float
    """When it was placed or moved last."""
    hops: int = 0
    """Moves of this kind so far."""


@dataclass(frozen=True, slots=True)
class Cadence:
    """An instance as seen by the gaps of its streams."""

    view: InstanceView
    budget: BudgetPolicy
    observed_gap_s: float = 0.0
    """Smoothed time between the last steps, in seconds; 0: not known."""

    def gap_s(self) -> float:
        """Return the 90th percentile of the next gaps, in seconds: as predicted, or as observed if that is longer."""
        queued = sum(request.remaining_tokens for request in self.view.queue)
        return max(self._step_s(0, 0, queued, self.view.min_tbt_s), self.observed_gap_s)

    def bears_out(self, tbt_s: float, policy: ReliefPolicy) -> bool:
        """Return whether what was observed agrees with a prediction that gaps break an objective, if anything was.

        A prediction stands for `sustain_s`, several steps, before anybody moves. Where their times come nowhere near
        the objective meanwhile it is wrong: moves by it would fill other instances with contexts to compute again.
        """
        return not self.observed_gap_s or self.observed_gap_s >= policy.hold_share * tbt_s

    def gap_with_s(self, stream: RunningStream) -> float:
        """Return the same with one more stream, while its context is computed here."""
        queued = sum(request.remaining_tokens for request in self.view.queue) + stream.context_tokens
        tbt_s = min(self.view.min_tbt_s or math.inf, stream.tbt_s)
        return max(self._step_s(1, stream.context_tokens, queued, tbt_s), self.observed_gap_s)

    def replay_s(self, stream: RunningStream) -> float:
        """Return the seconds until a stream's next token if its context is computed anew here.

        Streams that began elsewhere come before all that waits (services.policy.order), one after the other.
        """
        pace = self._pace(0, 0, self.view.min_tbt_s)
        ahead_s = sum(pace.remaining_work_s(request) for request in self.view.queue if request.continued)
        return self.view.hop_s + pace.finish_s(ahead_s + pace.work_s(stream.context_tokens))

    def room_for(self, stream: RunningStream, policy: ReliefPolicy) -> bool:
        """Return whether it has a slot and KV blocks for one more stream."""
        view = self.view
        if view.draining or view.decodes + len(view.queue) >= view.max_num_seqs:
            return False
        used = view.kv_used_tokens + sum(request.remaining_tokens for request in view.queue)
        return not view.kv_capacity_tokens or used + stream.context_tokens <= policy.kv_share * view.kv_capacity_tokens

    def without(self, stream: RunningStream) -> "Cadence":
        """Return it after a stream has left; what was observed no longer holds."""
        view = replace(
            self.view,
            decodes=max(self.view.decodes - 1, 0),
            decode_context_tokens=max(self.view.decode_context_tokens - stream.context_tokens, 0),
            kv_used_tokens=max(self.view.kv_used_tokens - stream.context_tokens, 0),
        )
        return Cadence(view, self.budget)

    def _step_s(self, more_decodes: int, more_context: int, queued_tokens: int, tbt_s: float) -> float:
        load = DecodeLoad(self.view.decodes + more_decodes, self.view.decode_context_tokens + more_context)
        prefill = min(self._pace(more_decodes, more_context, tbt_s).budget_tokens, queued_tokens)
        mean_s = self.view.model.step_s(StepShape(prefill, load.decodes, load.context_tokens))
        return mean_s * math.exp(_P90 * self.view.model.log_sigma) + self.budget.delivery_s

    def _pace(self, more_decodes: int, more_context: int, tbt_s: float) -> PrefillPace:
        load = DecodeLoad(self.view.decodes + more_decodes, self.view.decode_context_tokens + more_context)
        return prefill_pace(self.view.model, load, self.budget, tbt_s or math.inf)


@dataclass(frozen=True, slots=True)
class Relief:
    """A move of a running stream, and the numbers behind it; seconds."""

    request_id: str
    target: str
    gap_s: float
    """Predicted at home."""
    target_gap_s: float
    """Predicted at the target."""
    gain_s: float
    """Lateness that it avoids."""
    cost_s: float
    """Pause of the stream while it moves."""

    @property
    def reason(self) -> str:
        """Say it in words."""
        return (
            f"gaps of {self.gap_s * 1000:.0f} ms break its objective here, {self.target_gap_s * 1000:.0f} ms there hold"
            f" it; avoids {self.gain_s:.2f} s of lateness for a pause of {self.cost_s:.2f} s"
        )


MoveCost = Callable[[RunningStream, Cadence], float]
"""(stream, target) -> seconds that the stream pauses while it moves there."""


def replay_cost_s(stream: RunningStream, target: Cadence) -> float:
    """Return the pause of a move that computes the context again."""
    return target.replay_s(stream)


def best_relief(
    home: Cadence,
    streams: Iterable[RunningStream],
    targets: Sequence[Cadence],
    now_s: float,
    policy: ReliefPolicy,
    cost_s: MoveCost = replay_cost_s,
) -> tuple[Relief | None, Counter[str]]:
    """Return the move that gains most over its cost, if any is worth it, and why streams at risk stay otherwise."""
    gap_s = home.gap_s()
    stay: Counter[str] = Counter()
    free: list[RunningStream] = []
    for stream in streams:
        if gap_s <= stream.tbt_s or not home.bears_out(stream.tbt_s, policy):
            continue
        if stream.hops >= policy.hop_limit:
            stay["hop_limit"] += 1
        elif now_s - stream.settled_s < policy.settle_s:
            stay["settling"] += 1
        else:
            free.append(stream)
    looked_at = heapq.nsmallest(_LOOKED_AT, free, key=lambda stream: (stream.context_tokens, stream.request_id))
    if len(free) > len(looked_at):
        stay["not_looked_at"] = len(free) - len(looked_at)
    best: Relief | None = None
    for stream in looked_at:
        found, why = _for_stream(gap_s, stream, targets, policy, cost_s)
        if found is None:
            stay[why] += 1
        elif best is None or _rank(found) > _rank(best):
            best = found
    return best, stay


def _for_stream(
    gap_s: float, stream: RunningStream, targets: Sequence[Cadence], policy: ReliefPolicy, cost_s: MoveCost
) -> tuple[Relief | None, str]:
    best: Relief | None = None
    why = "no_target_holds_it"
    counted = min(stream.left_tokens, policy.horizon_tokens)
    for target in targets:
        if not target.room_for(stream, policy):
            continue
        target_gap_s = target.gap_with_s(stream)
        tightest_s = min(target.view.min_tbt_s or math.inf, stream.tbt_s)
        if target_gap_s > policy.hold_share * tightest_s:
            continue
        pause_s = cost_s(stream, target)
        gain_s = (gap_s - stream.tbt_s) * counted
        if gain_s < policy.gain_ratio * pause_s:
            why = "costs_more_than_it_gains"
            continue
        relief = Relief(stream.request_id, target.view.worker_id, gap_s, target_gap_s, gain_s, pause_s)
        if best is None or _rank(relief) > _rank(best):
            best = relief
    return best, why


def _rank(relief: Relief) -> tuple[float, str, str]:
    return relief.gain_s - relief.cost_s, relief.target, relief.request_id


class ReliefLedger:
    """How long cadences have been breaking, and how many moves are left; bounded by the instances asked about."""

    def __init__(self, policy: ReliefPolicy) -> None:
        self.policy = policy
        self._since_s: dict[str, float] = {}
        self._moves = float(policy.burst)
        self._filled_s = -math.inf

    def breaking(self, worker_id: str, breaks: bool, now_s: float) -> bool:
        """Take note whether an instance is predicted to break a cadence, and return whether it has been for long."""
        if not breaks:
            self._since_s.pop(worker_id, None)
            return False
        return now_s - self._since_s.setdefault(worker_id, now_s) >= self.policy.sustain_s

    def forget(self, known: Iterable[str]) -> None:
        """Forget instances that are not among these."""
        self._since_s = {worker_id: self._since_s[worker_id] for worker_id in known if worker_id in self._since_s}

    def take(self, now_s: float) -> bool:
        """Take one move out of the budget; False when it is used up."""
        if self._filled_s > -math.inf:
            self._moves += max(now_s - self._filled_s, 0.0) * self.policy.moves_per_s
        self._filled_s = max(now_s, self._filled_s)
        self._moves = min(self._moves, float(self.policy.burst))
        if self._moves < 1:
            return False
        self._moves -= 1
        return True
