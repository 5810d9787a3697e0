"""State that the policies decide on: requests, instances, objectives. Times are seconds on the decider's own clock."""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.policy.prefix import PrefixIndex
from services.policy.step_time import StepTimeModel


class Role(enum.StrEnum):
    """How an instance spends its capacity."""

    LOW = "low"
    HIGH = "high"
    UNIFIED = "unified"


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Latency objective of one request."""

    ttft_s: float
    tbt_s: float


@dataclass(slots=True, kw_only=True)
class QueuedRequest:
    """A request whose prefill is not complete: never scheduled, or partly prefilled."""

    request_id: str
    arrival_s: float
    """When the router received it."""
    prompt_tokens: int
    """Tokens to have in the KV cache before its next token: prompt, and in a move the tokens generated so far."""
    slo: Slo
    computed_tokens: int = 0
    """Of these, already computed here or found in this instance's prefix cache."""
    prefix: Sequence[int] = ()
    """Ids of the blocks of its prompt, for a decider that remembers what went where; empty: unknown."""
    priority: int = 0
    """Lower is more urgent; breaks ties between equal keys."""
    urgent: bool = False
    """It was offloaded here because it was about to miss: HP draws nothing on tickets beside it."""
    ticketed: bool = False
    """It was drawn here by a ticket: no other ticket takes it."""
    relegated: bool = False
    """It lost its priority: served behind all that can still make it."""
    started: bool = False
    """Its first chunk has been scheduled; it can no longer be withdrawn."""
    counted: bool = False
    """For a decider away from the instance: the last report of the instance counts what is left of it."""
    hops: int = 0
    """Offloads so far."""
    last_token_s: float = 0.0
    """When its last token was delivered, if it continues a stream that began elsewhere; 0: it has none yet."""

    @property
    def continued(self) -> bool:
        """Its stream began elsewhere: its reader waits in the midst of it."""
        return self.last_token_s > 0

    @property
    def deadline_s(self) -> float:
        """Latest time of its next token: the first, or the one after the last."""
        if self.continued:
            return self.last_token_s + self.slo.tbt_s
        return self.arrival_s + self.slo.ttft_s

    @property
    def remaining_tokens(self) -> int:
        """Prefill tokens still to compute."""
        return max(self.prompt_tokens - self.computed_tokens, 0)


@dataclass(slots=True, kw_only=True)
class InstanceView:
    """What a decider knows of one instance."""

    worker_id: str
    role: Role
    model: StepTimeModel
    queue: list[QueuedRequest] = field(default_factory=list)
    """Requests whose prefill is not complete, sent there and not ended, moves in flight included."""
    decodes: int = 0
    decode_context_tokens: int = 0
    min_tbt_s: float = 0.0
    """Smallest TBT objective among its decodes; 0 when there are none."""
    kv_used_tokens: int = 0
    kv_capacity_tokens: int = 0
    """0: unknown."""
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    report_age_s: float = 0.0
    """Seconds since its last report."""
    hop_s: float = 0.0
    """Seconds a request needs to reach it and its token to come back."""
    step_elapsed_s: float | None = None
    """Seconds that its running step will have run when a request sent now arrives; None: it runs none, or unknown."""
    step_queued_tokens: int = 0
    """Prefill tokens that were left to compute when that step began."""
    draining: bool = False
    """It takes no new requests."""
    prefixes: PrefixIndex | None = None
    """What its prefix cache probably holds; None: it has none."""

    def cached_tokens(self, request: QueuedRequest) -> int:
        """Return how much of a request that is not there its prefix cache probably holds."""
        if self.prefixes is None or not request.prefix:
            return 0
        return self.prefixes.cached_tokens(request.prefix, request.prompt_tokens)

    def expects(self, request: QueuedRequest) -> None:
        """Set what a request that is about to be sent there finds computed."""
        request.computed_tokens = self.cached_tokens(request)

    def receives(self, request: QueuedRequest) -> None:
        """Take note of a request that is sent there now: the next one like it finds its prompt."""
        if self.prefixes is not None:
            self.prefixes.add(request.prefix, request.prompt_tokens)

    def returns(self, request: QueuedRequest) -> None:
        """Take note that it gave a request back that it had not started."""
        if self.prefixes is not None:
            self.prefixes.discard(request.prefix, request.computed_tokens)
