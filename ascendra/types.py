"""What goes into a request and what comes out of it, as plain dataclasses."""

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict


class Role(enum.StrEnum):
    """How a worker spends its capacity."""

    LOW = "low"
    """Runs for throughput, out of arrival order."""
    HIGH = "high"
    """Runs for latency: requests that were about to miss their objective first."""
    UNIFIED = "unified"
    """One pool without a split."""


class FinishReason(enum.StrEnum):
    """Why a completion ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class MoveContract(enum.StrEnum):
    """What a move between workers preserves."""

    EXACT = "exact"
    """Token ids equal those of an unmoved run."""
    CONTINUOUS = "continuous"
    """No token lost or repeated and the same distribution, but not reproducible."""
    PINNED = "pinned"
    """Never moved after its first token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Latency objective; None takes the value of the request's class."""

    ttft_ms: float | None = None
    """Time to first token, in milliseconds."""
    tbt_ms: float | None = None
    """Time between consecutive tokens, in milliseconds."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation."""

    role: str
    """"system", "user", "assistant" or whatever the model's chat template knows."""
    content: str
    """Its text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutput:
    """A grammar that the output must follow; exactly one field. A request with it is never moved once it started."""

    json_schema: str | None = None
    """A JSON schema, as JSON text."""
    regex: str | None = None
    """A regular expression."""
    grammar: str | None = None
    """A context-free grammar in EBNF."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample; names and meanings as in vLLM. None means the server's default."""

    temperature: float | None = None
    """0 is greedy; 0 to 2, default 1."""
    top_p: float | None = None
    """Nucleus mass in (0, 1]."""
    top_k: int | None = None
    """Keep the k likeliest tokens; 0 keeps all."""
    min_p: float | None = None
    """Minimum probability relative to the likeliest token, in [0, 1]."""
    presence_penalty: float | None = None
    """In [-2, 2]."""
    frequency_penalty: float | None = None
    """In [-2, 2]."""
    repetition_penalty: float | None = None
    """Above 0; values over 1 discourage repetition."""
    seed: int | None = None
    """Seed of the sampling noise; chosen by the router and reported in the receipt when None."""
    max_tokens: int | None = None
    """Most tokens to generate."""
    min_tokens: int | None = None
    """Tokens to generate before anything but max_tokens may end the completion."""
    stop: Sequence[str] = ()
    """Strings that end the completion (at most 16)."""
    stop_token_ids: Sequence[int] = ()
    """Token ids that end the completion (at most 128)."""
    include_stop_in_output: bool = False
    """Return the stop string as part of the text."""
    ignore_eos: bool = False
    """Go on after end-of-sequence, up to max_tokens."""
    logprobs: int | None = None
    """Log-probabilities of the sampled token and of this many likeliest ones (0 to 20); None: none."""
    logit_bias: Mapping[int, float] | None = None
    """Additive bias by token id, each in [-100, 100]."""
    allowed_token_ids: Sequence[int] = ()
    """If not empty, only these token ids may be sampled."""
    bad_words: Sequence[str] = ()
    """Words that must not be produced."""
    structured_output: StructuredOutput | None = None
    """Guided decoding."""


class RequestOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and `stream`. Exactly one of prompt, messages and token_ids is required."""

    messages: Sequence[Message | Mapping[str, str]]
    """A conversation, rendered by the model's chat template."""
    continue_final_message: bool
    """Go on with the last message of the conversation instead of opening a new one."""
    token_ids: Sequence[int]
    """The prompt as token ids."""
    sampling: SamplingParams
    """How to sample."""
    slo: Slo
    """Latency objective; without it, that of the class."""
    slo_class: str
    """Name of an SLO class in the router's configuration."""
    timeout_s: float
    """Limit on the whole request including retries, in seconds; without it, the client's default."""
    request_id: str
    """At most 128 characters of [A-Za-z0-9._:-]; made up when absent."""
    model: str
    """Model name; not needed where one model is served."""
    priority: int
    """Lower is more urgent, in [-100, 100]; breaks ties."""
    tenant: str
    """For limits and accounting."""
    session_id: str
    """Requests of one conversation share it; the placement `prefix_affine` keeps them on one worker."""
    on_overload: Literal["relegate", "refuse"]
    """When no worker can make the objective: serve it behind the others (default), or refuse it at once."""
    tokens_only: bool
    """Send token ids only, no text; cheaper."""
    sinks: Sequence[str]
    """Names of configured sinks that receive a copy of the stream."""
    traceparent: str
    """W3C trace context, passed on to the workers."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one candidate token."""

    token_id: int
    logprob: float
    """Natural logarithm of its probability."""
    rank: int
    """Its rank among all tokens, from 1; 0 when unknown."""


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """Log-probabilities at one position."""

    sampled: TokenLogprob
    top: tuple[TokenLogprob, ...]
    """The likeliest tokens, best first."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of a request."""

    prompt_tokens: int
    cached_prompt_tokens: int
    """Prompt tokens found in the prefix cache of the worker that ran the prefill."""
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Attempt:
    """One placement of the request on a worker."""

    number: int
    """From 1."""
    worker_id: str
    role: Role | None
    """Role of the worker when the attempt was made."""
    reason: str
    """"placed", "offloaded", "ticketed", "moved", ... and the rule that fired."""
    first_token_offset: int
    """Offset of the first token that it delivered."""
    moved_by: str = ""
    """How it came by the KV cache of a stream that began elsewhere: "kv" (read from there) or "replay" (computed)."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was promised and what was achieved, measured at the router."""

    target: Slo
    """Objective after clamping."""
    ttft_ms: float
    max_gap_ms: float
    """Largest gap between tokens, in milliseconds; 0 with fewer than two tokens."""
    p99_gap_ms: float
    mean_gap_ms: float
    ttft_met: bool
    tbt_met: bool
    """99th-percentile gap within target."""
    pool: Role | None
    """Role of the worker that produced the first token."""
    attempts: tuple[Attempt, ...]
    relegated: bool
    """It was served behind others at some time, because nobody could make its objective."""
    seed: int
    """Seed used for sampling."""
    move_contract: MoveContract | None

    @property
    def met(self) -> bool:
        """Whether both objectives were met."""
        return self.ttft_met and self.tbt_met


@dataclass(frozen=True, slots=True)
class Finished:
    """End of a completion."""

    reason: FinishReason
    stop_string: str
    """The stop string that ended it; empty if none did."""
    stop_token_id: int | None
    """The stop token that ended it, if one did."""
    usage: Usage
    receipt: Receipt


# Not frozen: one is made for every token, and frozen dataclasses take three times as long to make.
@dataclass(slots=True)
class Chunk:
    """A piece of a completion. Consecutive chunks are contiguous."""

    token_offset: int
    """Offset of token_ids[0] in the completion, from 0."""
    token_ids: Sequence[int]
    """New tokens; several when the reader was behind."""
    text: str
    """New text; may lag the tokens (incomplete characters, possible stop strings)."""
    logprobs: Sequence[PositionLogprobs] = ()
    """One entry per token, if asked for."""
    finished: Finished | None = None
    """On the last chunk only."""
    prompt_tokens: int = 0
    """Length of the prompt, in tokens."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole completion."""

    request_id: str
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs]
    """One entry per token, if asked for."""
    finish_reason: FinishReason
    stop_string: str
    """The stop string that ended it; empty if none did."""
    stop_token_id: int | None
    """The stop token that ended it, if one did."""
    usage: Usage
    receipt: Receipt
