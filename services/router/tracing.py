"""The spans of a request in the router: its own, and one for each attempt, linked to the attempt it replaces."""

import math
import time
from typing import TYPE_CHECKING

from ascendra.v1 import common_pb2, inference_pb2
from services.common import span_names
from services.common.errors import ServiceError
from services.common.tracing import Attributes, Span, Tracer, Value

if TYPE_CHECKING:
    from services.router.request import DecisionRecord, LiveRequest, RequestSpec

_FINISHED = "finished"


class RequestTrace:
    """Hears what becomes of one request."""

    __slots__ = ("_attempt", "_model", "_span", "_tracer")

    def __init__(
        self, tracer: Tracer, message: inference_pb2.GenerateRequest, model: str, traceparent: str, arrival_s: float
    ) -> None:
        """Begin the request's span at its arrival (monotonic seconds)."""
        operation = span_names.CHAT if message.WhichOneof("prompt") == "chat" else span_names.TEXT_COMPLETION
        attributes = {
            span_names.OPERATION: operation,
            span_names.PROVIDER: span_names.ASCENDRA,
            span_names.REQUEST_MODEL: model,
        }
        age_s = time.monotonic() - arrival_s
        self._tracer = tracer
        self._model = model
        self._span = tracer.start(f"{operation} {model}", "server", attributes, traceparent=traceparent, age_s=age_s)
        self._attempt: Span | None = None

    @property
    def traceparent(self) -> str:
        """Context for the worker: that of the present attempt."""
        return (self._attempt or self._span).traceparent

    def checked(self, spec: "RequestSpec", resumed_tokens: int) -> None:
        """Say what was asked, without the prompt."""
        if not self._span.recording:
            return
        sampling = spec.sampling
        asked: dict[str, Value] = {
            span_names.REQUEST_ID: spec.request_id,
            span_names.SLO_CLASS: spec.slo_class,
            span_names.TTFT_OBJECTIVE_S: spec.slo.ttft_s,
            span_names.TBT_OBJECTIVE_S: spec.slo.tbt_s,
            span_names.INPUT_TOKENS: spec.prompt_tokens,
            span_names.REQUEST_MAX_TOKENS: sampling.max_tokens,
            span_names.RESUMED_TOKENS: resumed_tokens,
        }
        if sampling.HasField("temperature"):
            asked[span_names.REQUEST_TEMPERATURE] = sampling.temperature
        if sampling.HasField("top_p"):
            asked[span_names.REQUEST_TOP_P] = sampling.top_p
        self._span.set(asked)

    def decided(self, record: "DecisionRecord") -> None:
        """Note a decision."""
        if self._span.recording:
            self._span.event(record.kind, _decision(record))

    def attempt_begins(self, attempt: inference_pb2.Attempt) -> None:
        """Begin the span of an attempt."""
        before = self._attempt
        if before is not None and before.recording:
            before.end()
        attributes: Attributes = {
            span_names.ATTEMPT: attempt.number,
            span_names.ATTEMPT_REASON: attempt.reason,
            span_names.WORKER: attempt.worker_id,
            span_names.ROLE: common_pb2.Role.Name(attempt.role).removeprefix("ROLE_").lower(),
        }
        self._attempt = self._tracer.start(
            f"attempt {attempt.worker_id}",
            "client",
            attributes,
            traceparent=self._span.traceparent,
            replaces=before,
        )

    def attempt_ends(self, cause: str) -> None:
        """End the span of the present attempt, which goes on elsewhere.

        Args:
            cause: why; "moved" when the router wanted it so, else a failure.
        """
        if self._attempt is not None and self._attempt.recording:
            self._attempt.set({span_names.OUTCOME: cause})
            self._attempt.end("" if cause == "moved" else cause)

    def first_token(self, ttft_s: float, offset: int) -> None:
        """Note the first token of an attempt; `offset` is its place in the completion."""
        if self._attempt is not None and self._attempt.recording:
            self._attempt.event(span_names.FIRST_TOKEN, {"offset": offset})
            if offset == 0:
                self._span.event(span_names.FIRST_TOKEN)
                self._span.set({span_names.FIRST_CHUNK_S: ttft_s})

    def ends(self, request: "LiveRequest", outcome: str) -> None:
        """End all spans."""
        error = "" if outcome in (_FINISHED, "cancelled") else outcome
        if self._attempt is not None and self._attempt.recording:
            self._attempt.set({span_names.OUTCOME: outcome})
            self._attempt.end(error)
        if self._span.recording:
            slo = request.spec.slo
            p99_gap_s = request.p99_gap_s()
            self._span.set(
                {
                    span_names.OUTCOME: outcome,
                    span_names.OUTPUT_TOKENS: len(request.generated),
                    span_names.CACHED_TOKENS: request.cached_prompt_tokens,
                    span_names.MOVES: request.moves,
                    span_names.P99_GAP_S: p99_gap_s,
                    span_names.TTFT_MET: request.ttft_s <= slo.ttft_s,
                    span_names.TBT_MET: p99_gap_s <= slo.tbt_s,
                }
            )
        self._span.end(error)

    def refused(self, error: ServiceError) -> None:
        """End the span of a request that never was live."""
        self._span.set({span_names.OUTCOME: "refused"})
        self._span.end(error.reason.lower())


def _decision(record: "DecisionRecord") -> Attributes:
    said: dict[str, Value] = {span_names.RULE: record.rule}
    if record.from_worker_id:
        said[span_names.FROM_WORKER] = record.from_worker_id
    if record.to_worker_id:
        said[span_names.TO_WORKER] = record.to_worker_id
    if record.predicted_ttft_s and math.isfinite(record.predicted_ttft_s):
        said[span_names.PREDICTED_TTFT_S] = record.predicted_ttft_s
    return said
