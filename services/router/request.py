"""One request from its arrival to its receipt: events in, what the client should hear out. No clock, no I/O."""

import array
import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ascendra.v1 import cluster_pb2, common_pb2, inference_pb2, worker_pb2
from services.policy.prefix import block_ids
from services.policy.state import QueuedRequest, Slo
from services.router.mailbox import Sink
from services.router.text import TextStream

if TYPE_CHECKING:
    from services.router.tracing import RequestTrace

PREFIX_BLOCK_TOKENS = 128
"""In which prompts are compared with what workers hold: one block of vLLM on CPU, eight on CUDA."""
MAX_DECISIONS = 64
"""Decisions kept of one request; later ones replace the last."""


class State(enum.StrEnum):
    """Where a request is in its life."""

    RECEIVED = "received"
    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"
    FAILED = "failed"
    REFUSED = "refused"


TERMINAL = (State.FINISHED, State.FAILED, State.REFUSED)


class Drop(enum.StrEnum):
    """Why tokens were not taken."""

    STALE_ATTEMPT = "stale_attempt"
    REPEATED = "repeated"
    GAP = "gap"
    ENDED = "ended"


class Delta(NamedTuple):
    """New tokens of a completion."""

    offset: int
    """Of the first one."""
    token_ids: Sequence[int]
    text: str
    ended: bool
    """The router ends the request here: a stop string, or max_tokens."""


@dataclass(slots=True)
class DecisionRecord:
    """A decision about a request; seconds since its arrival."""

    at_s: float
    kind: str
    rule: str
    from_worker_id: str = ""
    to_worker_id: str = ""
    predicted_ttft_s: float = 0.0
    candidates: list[cluster_pb2.Candidate] = field(default_factory=list)

    def to_proto(self) -> cluster_pb2.Decision:
        """Return the wire form."""
        return cluster_pb2.Decision(
            at_ms=self.at_s * 1000,
            kind=self.kind,
            rule=self.rule,
            from_worker_id=self.from_worker_id,
            to_worker_id=self.to_worker_id,
            candidates=self.candidates,
            predicted_ttft_s=self.predicted_ttft_s,
        )


@dataclass(slots=True, kw_only=True)
class RequestSpec:
    """What was asked, checked and with defaults filled in."""

    request_id: str
    prompt: bytes
    """Ids, u32 little-endian."""
    sampling: common_pb2.SamplingParameters
    """With max_tokens and seed always set."""
    slo: Slo
    slo_class: str = "default"
    priority: int = 0
    tenant: str = ""
    session_id: str = ""
    traceparent: str = ""
    timeout_s: float = 0.0
    """0: none."""
    refuse_hopeless: bool = False
    contract: "common_pb2.MoveContract" = common_pb2.MOVE_CONTRACT_EXACT
    contract_reason: str = ""

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt) // 4

    @property
    def pinned(self) -> bool:
        """It must not be moved after its first token."""
        return self.contract == common_pb2.MOVE_CONTRACT_PINNED

    def weaken(self, contract: "common_pb2.MoveContract", why: str) -> None:
        """Take note that it goes on where less is kept than was promised; the receipt will say so."""
        if self.contract == common_pb2.MOVE_CONTRACT_EXACT and contract != common_pb2.MOVE_CONTRACT_EXACT:
            self.contract, self.contract_reason = contract, why


class LiveRequest:
    """State of one request."""

    __slots__ = (
        "_delivering", "_first_pool", "_gaps", "_max_tokens", "_open", "_prefill_s", "arrival_s", "attempt", "attempts",
        "cached_prompt_tokens", "decisions", "first_token_s", "generated", "hops", "last_gap_s", "last_token_s",
        "moves", "parked_s", "prefix", "relegated", "reliefs", "resumed_tokens", "sink", "spec", "state", "text",
        "trace",
    )  # fmt: skip

    def __init__(
        self, spec: RequestSpec, arrival_s: float, text: TextStream | None, sink: Sink, resumed: Sequence[int] = ()
    ) -> None:
        """Start a request.

        Args:
            arrival_s: when the router received it; the clock of all later times.
            text: None when only token ids are wanted.
            sink: where its stream goes.
            resumed: tokens that the client received before its stream broke.
        """
        self.spec = spec
        self.prefix = block_ids(spec.prompt, PREFIX_BLOCK_TOKENS)
        """Of the prompt without what was generated."""
        self.sink = sink
        self.arrival_s = arrival_s
        self.text = text
        self.trace: RequestTrace | None = None
        """Its spans; None while tracing is off."""
        self.state = State.RECEIVED
        self.generated = array.array("I", resumed)
        self.resumed_tokens = len(resumed)
        self.attempt = 0
        self.attempts: list[inference_pb2.Attempt] = []
        self.decisions: list[DecisionRecord] = []
        self.hops = 0
        """Offloads so far."""
        self.moves = 0
        """Attempts that ended because of their worker."""
        self.parked_s = 0.0
        """Time that it has waited, since its last token, while no worker took requests."""
        self.reliefs = 0
        """Moves because its worker would have broken its cadence."""
        self.relegated = False
        self.cached_prompt_tokens = 0
        self.first_token_s = 0.0
        self.last_token_s = 0.0
        self.last_gap_s = 0.0
        """The newest gap between tokens; 0 before the second token."""
        self._gaps = array.array("d")
        self._delivering = 0
        self._open = 0  # the attempt whose tokens count; 0 while there is none
        self._max_tokens = spec.sampling.max_tokens
        self._first_pool: common_pb2.Role = common_pb2.ROLE_UNSPECIFIED
        self._prefill_s = 0.0

    @property
    def ended(self) -> bool:
        """Nothing more will be said."""
        return self.state in TERMINAL

    @property
    def has_tokens(self) -> bool:
        """A token was delivered, by this router or by the one before."""
        return len(self.generated) > 0

    def history_blocks(self) -> tuple[tuple[int, ...], int]:
        """Return the block ids of prompt and completion so far, and their tokens: how a next turn may begin."""
        history = self.spec.prompt + self.generated.tobytes()
        return block_ids(history, PREFIX_BLOCK_TOKENS, self.prefix), len(history) // 4

    def decide(self, record: DecisionRecord) -> None:
        """Remember a decision."""
        if len(self.decisions) >= MAX_DECISIONS:
            self.decisions.pop()
        self.decisions.append(record)

    def place(self, worker_id: str, role: "common_pb2.Role", reason: str) -> int:
        """Begin an attempt on a worker and return its number; tokens of earlier attempts no longer count."""
        self.attempt += 1
        self._open = self.attempt
        self.attempts.append(inference_pb2.Attempt(number=self.attempt, worker_id=worker_id, role=role, reason=reason))
        self.state = State.DECODE if self.has_tokens else State.WAITING
        if self.trace is not None:
            self.trace.attempt_begins(self.attempts[-1])
        return self.attempt

    def moved_by(self, method: str) -> None:
        """Say how the present attempt comes by the KV cache of a stream that began elsewhere."""
        self.attempts[-1].moved_by = method

    def fence(self, cause: str = "moved") -> None:
        """End the present attempt without a successor yet: whatever still comes from it is stale."""
        self._open = 0
        if self.trace is not None:
            self.trace.attempt_ends(cause)

    def started(self, attempt: int, now_s: float) -> bool:
        """Take note that the prefill of an attempt began; return whether it is the first prefill of the request."""
        if attempt != self.attempt:
            return False
        if self.state is State.WAITING:
            self.state = State.PREFILL
        first = self._prefill_s == 0.0
        if first:
            self._prefill_s = now_s
        return first

    def tokens(
        self, attempt: int, offset: int, token_ids: Sequence[int], now_s: float, silent_last: bool = False
    ) -> Delta | Drop:
        """Take tokens of an attempt and return what is new, or why nothing was taken.

        Args:
            offset: absolute offset of the first one in the completion.
            silent_last: the last one is a stop token without text.
        """
        if attempt != self._open:
            return Drop.ENDED if self.state in TERMINAL else Drop.STALE_ATTEMPT
        generated = self.generated
        expected = len(generated)
        if offset != expected:
            if offset > expected:
                return Drop.GAP
            token_ids = token_ids[expected - offset :]
            if not token_ids:
                return Drop.REPEATED
        room = self._max_tokens - expected
        ended = len(token_ids) >= room
        if ended:
            token_ids = token_ids[:room]
        text = ""
        stream = self.text
        if stream is not None:
            text, taken = stream.push(token_ids, silent_last)
            if stream.finished:
                token_ids = token_ids[:taken]
                ended = True
        generated.extend(token_ids)
        self._time(len(token_ids), now_s)
        if self._delivering != attempt:
            self._delivering = attempt
            self.state = State.DECODE
            self.attempts[-1].first_token_offset = expected
            self._first_pool = self._first_pool or self.attempts[-1].role
        return Delta(expected, token_ids, text, ended)

    def _time(self, count: int, now_s: float) -> None:
        if self.first_token_s:
            self.last_gap_s = now_s - self.last_token_s
            self._gaps.append(self.last_gap_s)
        else:
            self.first_token_s = now_s
        if count > 1:
            self._gaps.extend([0.0] * (count - 1))
        self.last_token_s = now_s

    def finish(
        self, reason: "common_pb2.FinishReason", stop_token_id: int | None = None
    ) -> tuple[str, inference_pb2.Finished]:
        """End the request and return the text that was held back, and the last message."""
        text = ""
        if self.text is not None:
            text = self.text.finish()
        stop_string = self.text.stop_string if self.text is not None else ""
        if stop_string:
            reason, stop_token_id = common_pb2.FINISH_REASON_STOP, None
        self.state = State.FINISHED
        self._open = 0
        finished = inference_pb2.Finished(
            reason=reason,
            stop_string=stop_string,
            stop_token_id=stop_token_id,
            usage=common_pb2.Usage(
                prompt_tokens=self.spec.prompt_tokens,
                cached_prompt_tokens=self.cached_prompt_tokens,
                completion_tokens=len(self.generated),
            ),
            receipt=self.receipt(),
        )
        return text, finished

    def fail(self, state: State) -> None:
        """End the request without a last message."""
        self._open = 0
        self.state = state

    @property
    def ttft_s(self) -> float:
        """Seconds from arrival to the first token of this router; infinite without one."""
        return self.first_token_s - self.arrival_s if self.first_token_s else math.inf

    @property
    def queue_wait_s(self) -> float:
        """Seconds from arrival to the start of its first prefill; infinite before."""
        return self._prefill_s - self.arrival_s if self._prefill_s else math.inf

    def p99_gap_s(self) -> float:
        """Return the 99th percentile of the gaps, linear between neighbours; 0 without gaps."""
        return float(np.quantile(np.frombuffer(self._gaps, dtype=np.float64), 0.99)) if self._gaps else 0.0

    def receipt(self) -> inference_pb2.SloReceipt:
        """Return what was promised and what was achieved so far."""
        gaps = np.frombuffer(self._gaps, dtype=np.float64) if self._gaps else np.zeros(0)
        ttft_s, p99_s, slo = self.ttft_s, self.p99_gap_s(), self.spec.slo
        return inference_pb2.SloReceipt(
            target=common_pb2.Slo(ttft_ms=slo.ttft_s * 1000, tbt_ms=slo.tbt_s * 1000),
            ttft_ms=ttft_s * 1000 if math.isfinite(ttft_s) else 0.0,
            max_gap_ms=float(gaps.max()) * 1000 if len(gaps) else 0.0,
            p99_gap_ms=p99_s * 1000,
            mean_gap_ms=float(gaps.mean()) * 1000 if len(gaps) else 0.0,
            ttft_met=ttft_s <= slo.ttft_s,
            tbt_met=p99_s <= slo.tbt_s,
            pool=self._first_pool,
            attempts=self.attempts,
            relegated=self.relegated,
            seed=self.spec.sampling.seed,
            move_contract=self.spec.contract,
        )

    def submission(
        self,
        handle: int,
        now_s: float,
        *,
        relegated: bool = False,
        kv_handle: bytes = b"",
    ) -> worker_pb2.Submit:
        """Return the message that starts the present attempt; with tokens already delivered it continues them."""
        return worker_pb2.Submit(
            handle=handle,
            request_id=self.spec.request_id,
            attempt=self.attempt,
            token_ids=self.spec.prompt + self.generated.tobytes() if self.generated else self.spec.prompt,
            generated_tokens=len(self.generated),
            sampling=self.spec.sampling,
            slo=common_pb2.Slo(ttft_ms=self.spec.slo.ttft_s * 1000, tbt_ms=self.spec.slo.tbt_s * 1000),
            age_ms=(now_s - self.arrival_s) * 1000,
            priority=self.spec.priority,
            relegated=relegated,
            traceparent=self.trace.traceparent if self.trace is not None else self.spec.traceparent,
            last_token_age_ms=(now_s - self.last_token_s) * 1000 if self.last_token_s else 0.0,
            kv_handle=kv_handle,
        )

    def queued(self, *, urgent: bool = False, ticketed: bool = False) -> QueuedRequest:
        """Return how the policies see it while its prefill is not complete."""
        return QueuedRequest(
            request_id=self.spec.request_id,
            arrival_s=self.arrival_s,
            prompt_tokens=self.spec.prompt_tokens + len(self.generated),
            slo=self.spec.slo,
            prefix=self.prefix,
            priority=self.spec.priority,
            urgent=urgent,
            ticketed=ticketed,
            hops=self.hops,
            last_token_s=self.last_token_s,
        )
