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
    in the prefix cache; the router knows a `RoutedRequest`.
    """

    output_tokens: int
    """Tokens it will generate; no policy reads it."""
    input_tokens: int
    """Prompt tokens as sent."""
    slo_class: str = ""
    prefix_hashes: tuple[int, ...] = ()
    total_tokens: int = 0
    """Prompt and generated tokens."""
    kv_tokens: int = 0
    """Tokens that its KV blocks have room for."""
    blocks: list[int] = field(default_factory=list)
    """Its KV blocks, under prefix caching."""
    named_blocks: int = 0
    """Of them, how many can be found by others."""
    looked_up_s: float = -math.inf
    """When the prefix cache was last asked what it holds of this waiting request."""
    preemptions: int = 0
    token_times_s: list[float] = field(default_factory=list)
    """When each token left the engine."""
    outcome: Outcome = Outcome.UNFINISHED
    worker: int = -1
    """Index of the instance that owns it."""
    was_relegated: bool = False

    @property
    def decoding(self) -> bool:
        """Whether all but its newest token is in the KV cache and that token was generated."""
        return self.total_tokens > self.input_tokens and self.computed_tokens == self.total_tokens - 1
