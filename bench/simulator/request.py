"""A simulated request: what the policies see of it, and what only its engine knows."""

import math
from dataclasses import dataclass, field

from bench.metrics import Outcome
from services.policy.state import QueuedRequest


@dataclass(slots=True, kw_only=True, eq=False)
class SimRequest(QueuedRequest):
    """A request in flight. The inherited fields are what its engine's policies read; the others are the engine's.

    `prompt_tokens` is what has to be in the KV cache before the next token, so a preempted request's grows by what it
    had generated. `computed_tokens` is exact at every step end of its instance, and while it waits it is what was found
    in the prefix cache; the router knows a `RoutedRequest`. A stream's fields stay as they are from where it joins its
    engine's `Streams` to where it leaves them.
    """

    output_tokens: int
    """Tokens it will generate; no policy reads it."""
    input_tokens: int
    """Prompt tokens as sent."""
    total_tokens: int = 0
    """Prompt and generated tokens."""
    kv_tokens: int = 0
    """Tokens that its KV blocks have room for."""
    last_step: int = -2
    """Number of the step that generated its last token; negative: it has none."""
    run_began: int = 0
    """Number of the first of the steps in a row, up to that one, which each generated a token of it."""
    runs: list[tuple[int, int]] = field(default_factory=list)
    """First and last of the steps in a row before these."""
    slo_class: str = ""
    prefix_hashes: tuple[int, ...] = ()
    blocks: list[int] = field(default_factory=list)
    """Its KV blocks, under prefix caching."""
    named_blocks: int = 0
    """Of them, how many can be found by others."""
    looked_up_s: float = -math.inf
    """When the prefix cache was last asked what it holds of this waiting request."""
    preemptions: int = 0
    outcome: Outcome = Outcome.UNFINISHED
    worker: int = -1
    """Index of the instance that owns it."""
    was_relegated: bool = False

    @property
    def decoding(self) -> bool:
        """Whether all but its newest token is in the KV cache and that token was generated."""
        return self.total_tokens > self.input_tokens and self.computed_tokens == self.total_tokens - 1

    @property
    def generated_tokens(self) -> int:
        """Tokens so far."""
        return self.total_tokens - self.input_tokens

    def begin_run(self, step: int) -> None:
        """Note that a step generated a token of it, and the step before it did not."""
        if self.last_step >= 0:
            self.runs.append((self.run_began, self.last_step))
        self.run_began = step

    def token_times_s(self, of_steps_s: list[float]) -> list[float]:
        """Return the time of each of its tokens, given one for each step of its engine."""
        if self.last_step < 0:
            return []
        times_s = of_steps_s[self.run_began : self.last_step + 1]
        if self.runs:
            before = [time_s for first, last in self.runs for time_s in of_steps_s[first : last + 1]]
            return before + times_s
        return times_s
