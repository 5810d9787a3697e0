"""How many prefill tokens the next step may compute beside its decodes."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.policy.step_time import StepShape, StepTimeBin, StepTimeModel

STATIC, DYNAMIC = "static", "dynamic"


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetPolicy:
    """How the token budget of a step is chosen."""

    kind: str = DYNAMIC
    """"static" or "dynamic"."""
    static_tokens: int = 512
    """Tokens of a step (decodes included) under "static"."""
    max_tokens: int = 2048
    """Most tokens of a step (decodes included), whatever the slack."""
    floor_tokens: int = 32
    """Prefill tokens that a step gets even when the decodes leave no slack, so that prefill progresses."""
    delivery_s: float = 0.001
    """Part of each gap that passes outside the step: output processing and the way to the client."""
    calm_factor: float = 2.0
    """Steps stay shorter by this many times `delivery_s` while all who wait can afford it (policy.calm); 0: never."""

    def __post_init__(self) -> None:
        if self.kind not in (STATIC, DYNAMIC):
            raise ValueError(f'token_budget must be "static" or "dynamic", got {self.kind!r}')
        if min(self.static_tokens, self.max_tokens, self.floor_tokens) < 1:
            raise ValueError("static_tokens, max_tokens and floor_tokens must be at least 1")
        if not self.calm_factor >= 0:
            raise ValueError(f"calm_factor must be at least 0, got {self.calm_factor:g}")


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """The decodes of a step."""

    decodes: int = 0
    context_tokens: int = 0
    """Sum of their contexts."""


def least_gap_s(model: StepTimeModel) -> float:
    """Return the seconds of a lone decode's step.

    A TBT objective that is not above it is missed in any case, and binds nobody: steps sized for it, or an HP emptied
    for it, would take the prefill of everybody else.
    """
    return model.step_s(StepShape(0, 1))


Chunk = tuple[int, int]
"""(prefill tokens wanted, tokens of the same request computed before)."""


def step_bound_s(decodes: Iterable[tuple[float, float]], now_s: float) -> float:
    """Return the longest that the next step may take so that every decode's next gap is within its objective.

    Args:
        decodes: (time of its last token, TBT objective) of each, in seconds.
        now_s: time at which the step starts.

    A decode whose gap is already lost asks for its plain objective: hurrying no longer helps it.
    Without decodes the bound is infinite.
    """
    bound_s = math.inf
    for last_token_s, tbt_s in decodes:
        slack_s = last_token_s + tbt_s - now_s
        if slack_s <= 0 or slack_s > tbt_s:
            slack_s = tbt_s
        if slack_s < bound_s:
            bound_s = slack_s
    return bound_s


def prefill_budget(
    policy: BudgetPolicy,
    model: StepTimeModel,
    load: DecodeLoad,
    bound_s: float,
    chunks: Sequence[Chunk] = (),
) -> int:
    """Return how many prefill tokens the next step may compute (decodes not included), at least the floor.

    Args:
        bound_s: what step_bound_s returned.
        chunks: what would be prefilled, in order; tokens beyond them count as having no context before them.
            Only their context matters: the budget is not cut to what is waiting.
    """
    floor = policy.floor_tokens
    if policy.kind == STATIC:
        return max(policy.static_tokens - load.decodes, floor)
    most = max(policy.max_tokens - load.decodes, floor)
    if bound_s == math.inf:
        return most
    planned_s = (bound_s - policy.delivery_s) / model.safety_factor
    return min(max(largest_prefill(model, load, planned_s, most, chunks), floor), most)


def largest_prefill(
    model: StepTimeModel, load: DecodeLoad, limit_s: float, most: int, chunks: Sequence[Chunk] = ()
) -> int:
    """Return the most prefill tokens (0 to `most`) with which the expected step takes at most `limit_s`.

    The model may fall where one bin ends and the next begins, so each bin is solved by itself, largest first.
    """
    lower_limits = [0, *(bin.max_tokens for bin in model.bins[:-1])]
    for bin, above in zip(reversed(model.bins), reversed(lower_limits), strict=True):
        least = max(above + 1 - load.decodes, 0) if above else 0
        largest = min(bin.max_tokens - load.decodes, most) if bin.max_tokens else most
        if largest < least:
            continue
        fits = min(_solve(bin, limit_s - bin.overhead_s(load.decodes, load.context_tokens), chunks), largest)
        if fits >= least:
            return fits
    return 0


def _solve(bin: StepTimeBin, time_s: float, chunks: Sequence[Chunk]) -> int:
    """Return how many prefill tokens of `chunks` (then of contextless ones) fit into `time_s` in one bin."""
    tokens = 0
    for wanted, context in chunks:
        if time_s <= 0:
            return tokens
        token_s = bin.prefill_token_s + bin.a5 * context
        if token_s * wanted > time_s:
            return tokens + int(time_s / token_s)
        tokens += wanted
        time_s -= token_s * wanted
    if time_s <= 0:
        return tokens
    return tokens + (int(time_s / bin.prefill_token_s) if bin.prefill_token_s > 0 else 1 << 30)
