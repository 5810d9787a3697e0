"""How long waiting requests take to their first token on an instance."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.policy.state import InstanceView, QueuedRequest
from services.policy.step_time import StepShape, StepTimeBin, StepTimeModel
from services.policy.token_budget import BudgetPolicy, DecodeLoad, prefill_budget


@dataclass(frozen=True, slots=True)
class TtftEstimate:
    """Prediction of one request's first token on one instance, in seconds from now."""

    mean_s: float
    """Until the first token: hop, wait and prefill."""
    wait_s: float
    """Of it, before its first prefill token."""
    prefill_s: float
    """Of it, prefill."""
    hop_s: float = 0.0
    """Of it, on the way there and back, and until the step that runs on arrival ends."""
    relegated: bool = False
    """The instance would serve it behind all that can make it."""

    def planned_s(self, caution: float) -> float:
        """Return seconds to plan with: the queue and prefill times `caution`, plus the hop."""
        return self.hop_s + caution * (self.mean_s - self.hop_s)


ROUNDING_S = 1e-9
"""What the sum of many works may be off."""


@dataclass(frozen=True, slots=True)
class PrefillPace:
    """How fast an instance prefills beside its present decodes: full steps of known size, one after the other.

    Work is seconds that prefill tokens add to steps; `capacity_s` of it fits into one step beside `overhead_s`.
    """

    budget_tokens: int
    """Prefill tokens of a full step without context."""
    overhead_s: float
    """Of each full step: launch and decodes."""
    capacity_s: float
    """Prefill work that fits into a full step."""
    token_s: float
    """Work of one prefill token."""
    product_s: float
    """Work of one (prefill token x token of context before its chunk)."""
    small_work_s: float = 0.0
    """At most this much work is one small step, which has an overhead and a time per work of its own."""
    small_overhead_s: float = 0.0
    small_ratio: float = 1.0

    @property
    def step_s(self) -> float:
        """Seconds of a full step."""
        return self.overhead_s + self.capacity_s

    def work_s(self, tokens: int, context_tokens: int = 0) -> float:
        """Return the work of prefilling `tokens` after `context_tokens`, in chunks of the budget."""
        later_chunks = max(tokens - self.budget_tokens, 0)
        return self.token_s * tokens + self.product_s * tokens * (context_tokens + 0.5 * later_chunks)

    def remaining_work_s(self, request: QueuedRequest) -> float:
        """Return the work that is left of a request's prefill."""
        return self.work_s(request.remaining_tokens, request.computed_tokens)

    def finish_s(self, work_s: float) -> float:
        """Return the seconds until this much work, packed into steps, is done."""
        if work_s <= self.small_work_s:
            return self.small_overhead_s + work_s * self.small_ratio
        return math.ceil(work_s / self.capacity_s) * self.overhead_s + work_s

    def filled_s(self, work_s: float, behind_s: float) -> float:
        """Return what is done in the steps that this much work takes: others who wait fill up the last of them."""
        return min(max(math.ceil(work_s / self.capacity_s), 1) * self.capacity_s, work_s + behind_s)

    def work_within_s(self, time_s: float) -> float:
        """Return the most work that is done within a time: the inverse of `finish_s`; negative when not even a step."""
        steps, rest_s = divmod(time_s, self.step_s)
        packed_s = steps * self.capacity_s + min(max(rest_s - self.overhead_s, 0.0), self.capacity_s)
        if packed_s > self.small_work_s:
            return packed_s + ROUNDING_S
        small_s = (time_s - self.small_overhead_s) / self.small_ratio
        return min(small_s, self.small_work_s) + ROUNDING_S

    def alone_s(self, request: QueuedRequest) -> float:
        """Return the seconds of a request's remaining prefill with nothing ahead of it."""
        return self.finish_s(self.remaining_work_s(request))


def prefill_pace(model: StepTimeModel, load: DecodeLoad, policy: BudgetPolicy, tbt_s: float = math.inf) -> PrefillPace:
    """Return the pace beside `load` when steps may take `tbt_s` (infinite: no decodes to protect)."""
    bound_s = tbt_s if load.decodes and tbt_s > 0 else math.inf
    budget = prefill_budget(policy, model, load, bound_s)
    full = model.bin_of(budget + load.decodes)
    small = model.bins[0]
    token_s = max(full.prefill_token_s, 1e-9)
    return PrefillPace(
        budget_tokens=budget,
        overhead_s=_overhead_s(full, load),
        capacity_s=token_s * budget,
        token_s=token_s,
        product_s=max(full.a5, 0.0),
        small_work_s=token_s * max(min(small.max_tokens or budget, budget) - load.decodes, 0),
        small_overhead_s=_overhead_s(small, load),
        small_ratio=max(small.prefill_token_s, 1e-9) / token_s,
    )


def _overhead_s(bin: StepTimeBin, load: DecodeLoad) -> float:
    return max(bin.overhead_s(load.decodes, load.context_tokens), 0.0)


def instance_pace(view: InstanceView, policy: BudgetPolicy) -> PrefillPace:
    """Return the pace of an instance as a decider sees it."""
    load = DecodeLoad(view.decodes, view.decode_context_tokens)
    return prefill_pace(view.model, load, policy, view.min_tbt_s or math.inf)


def newcomer_work_s(view: InstanceView, pace: PrefillPace, request: QueuedRequest) -> float:
    """Return the prefill work, in seconds, of a request that is not there yet: what no prefix cache saves it."""
    cached = view.cached_tokens(request)
    return pace.work_s(request.prompt_tokens - cached, cached)


@dataclass(frozen=True, slots=True)
class StepInProgress:
    """What the running step leaves to those who wait: it takes nobody in, and serves the head of the queue."""

    left_s: float = 0.0
    """Seconds until it ends."""
    work_s: float = 0.0
    """Prefill work of the queue, as the decider knows it, that is done by then."""
    unheard_s: float = 0.0
    """Of it, in steps that were not heard of yet: these may have taken in whoever came during the one before."""

    def estimate(
        self, pace: PrefillPace, before_s: float, own_s: float, hop_s: float = 0.0, behind_s: float = 0.0
    ) -> TtftEstimate:
        """Predict a request.

        Args:
            before_s: prefill work served before it, in seconds, the running step's included.
            own_s: its own prefill work, in seconds.
            hop_s: seconds of its way there and back.
            behind_s: prefill work that waits behind it and fills up its last step.
        """
        hop_s += self.left_s
        through_s = before_s + own_s - self.work_s
        if through_s <= ROUNDING_S:  # its last chunk is in the running step
            return TtftEstimate(hop_s, 0.0, 0.0, hop_s)
        ahead_s = before_s - self.work_s
        done_s = pace.finish_s(pace.filled_s(through_s, behind_s))
        # What is ahead may end in the very step in which this one starts.
        wait_s = min(pace.finish_s(ahead_s), done_s) if ahead_s > 0 else 0.0
        return TtftEstimate(hop_s + done_s, wait_s, done_s - wait_s, hop_s)

    def newcomer(
        self,
        pace: PrefillPace,
        before_s: float,
        own_s: float,
        hop_s: float,
        *,
        taken_in_s: float = math.inf,
        behind_s: float = 0.0,
    ) -> TtftEstimate:
        """Predict a request that the running step cannot serve: what it serves of those behind does not help.

        Args: as of `estimate`, and
            taken_in_s: of `before_s`, work of requests that were there when the running step began.
        """
        ahead_s = min(self.work_s, before_s, taken_in_s + self.unheard_s)
        behind_s = max(behind_s - (self.work_s - ahead_s), 0.0)
        return StepInProgress(self.left_s, ahead_s).estimate(pace, before_s, own_s, hop_s, behind_s)


NO_STEP = StepInProgress()
_STEPS_UNHEARD = 8
"""Steps that may have passed since the last report before the instance is taken to be about to end one."""


def step_in_progress(view: InstanceView, pace: PrefillPace) -> StepInProgress:
    """Return what is left of the step that an instance runs when a request sent now arrives.

    The step began at the last report; when it should be over by now, the next one runs, which was not heard of yet.
    """
    elapsed_s = view.step_elapsed_s
    if elapsed_s is None:
        return NO_STEP
    work_s = heard_s = 0.0
    tokens = view.step_queued_tokens
    for number in range(_STEPS_UNHEARD):
        if not tokens and not view.decodes:
            break
        chunk = min(tokens, pace.budget_tokens)
        tokens -= chunk
        chunk_s = pace.work_s(chunk)
        work_s += chunk_s
        heard_s = heard_s if number else chunk_s
        step_s = pace.finish_s(chunk_s)
        if elapsed_s < step_s:
            return StepInProgress(step_s - elapsed_s, work_s, work_s - heard_s)
        elapsed_s -= step_s
    return StepInProgress(0.0, work_s, work_s - heard_s)


def predict_in_order(
    ordered: Iterable[QueuedRequest], pace: PrefillPace, ahead_s: float = 0.0, running: StepInProgress = NO_STEP
) -> list[TtftEstimate]:
    """Predict every request of an instance's queue, in the order in which it will be served; O(n).

    Args:
        ahead_s: prefill work in seconds done before the first of them.
    """
    work_s = ahead_s
    estimates = []
    for request in ordered:
        own_s = pace.remaining_work_s(request)
        estimates.append(running.estimate(pace, work_s, own_s))
        work_s += own_s
    return estimates


def walk(
    ordered: Sequence[QueuedRequest],
    model: StepTimeModel,
    load: DecodeLoad,
    policy: BudgetPolicy,
    tbt_s: float = math.inf,
) -> list[float]:
    """Return the seconds to each request's first token by stepping through every chunk; slow and exact.

    Decodes are taken to stay as they are: what finishes its prefill is not added to them.
    """
    bound_s = tbt_s if load.decodes and tbt_s > 0 else math.inf
    left = [request.remaining_tokens for request in ordered]
    done = [request.computed_tokens for request in ordered]
    finish = [0.0] * len(left)
    now_s, head = 0.0, 0
    while head < len(left):
        chunks = [(left[i], done[i]) for i in range(head, len(left))]
        budget = prefill_budget(policy, model, load, bound_s, chunks)
        tokens = products = 0
        ended = []
        for i in range(head, len(left)):
            chunk = min(left[i], budget - tokens)
            tokens += chunk
            products += chunk * done[i]
            left[i] -= chunk
            done[i] += chunk
            if left[i]:
                break
            ended.append(i)
        now_s += model.step_s(StepShape(tokens, load.decodes, load.context_tokens, products))
        for i in ended:
            finish[i] = now_s
        head += len(ended)
    return finish
