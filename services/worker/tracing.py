"""The span of an attempt in the worker: a child of the router's, by the context in Submit."""

from collections.abc import Mapping

from ascendra.v1 import worker_pb2
from services.common import span_names
from services.common.tracing import Tracer, Value

_ABORTED = "aborted"


class AttemptTrace:
    """Hears what becomes of one request in the engine."""

    __slots__ = ("_outcome", "_span", "_tokens")

    def __init__(self, tracer: Tracer, submit: worker_pb2.Submit, facts: Mapping[str, str]) -> None:
        """Begin the span.

        Args:
            facts: of the worker, as in its metrics.
        """
        attributes: dict[str, Value] = {
            span_names.PROVIDER: span_names.ASCENDRA,
            span_names.REQUEST_MODEL: facts["model_name"],
            span_names.REQUEST_ID: submit.request_id,
            span_names.ATTEMPT: submit.attempt,
            span_names.WORKER: facts["worker"],
            span_names.ROLE: facts["role"],
            span_names.ENGINE: facts["engine_kind"],
            span_names.INPUT_TOKENS: len(submit.token_ids) // 4,
        }
        name = f"engine {facts['model_name']}"
        self._span = tracer.start(name, "server", attributes, traceparent=submit.traceparent)
        self._tokens = 0
        self._outcome = _ABORTED

    def event(self, name: str) -> None:
        """Note that something happened in the engine."""
        self._span.event(name)

    def tokens(self, count: int) -> None:
        """Count tokens; the first ones are an event."""
        if self._tokens == 0:
            self._span.event(span_names.FIRST_TOKEN)
        self._tokens += count

    def finished(self, reason: str, cached_prompt_tokens: int) -> None:
        """Note that the completion is whole."""
        self._outcome = "finished"
        self._span.set({span_names.FINISH_REASONS: [reason], span_names.CACHED_TOKENS: cached_prompt_tokens})

    def ends(self) -> None:
        """End the span; one that was not finished was withdrawn, cancelled, or lost its engine."""
        self._span.set({span_names.OUTPUT_TOKENS: self._tokens, span_names.OUTCOME: self._outcome})
        self._span.end()
