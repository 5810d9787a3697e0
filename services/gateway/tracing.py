"""The span of an HTTP exchange in the gateway; those of its completions in the router are its children."""

from collections.abc import Sequence

from starlette.datastructures import Headers

from services.common import span_names
from services.common.tracing import Span, Tracer, Value
from services.gateway.answers import Choice
from services.gateway.requests import GenerationRequest

ROUTES = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}


def start_exchange(tracer: Tracer, endpoint: str, headers: Headers) -> Span:
    """Begin the span, as a child of what the client says that it is part of."""
    route = ROUTES[endpoint]
    return tracer.start(
        f"POST {route}",
        "server",
        {
            span_names.HTTP_METHOD: "POST",
            span_names.HTTP_ROUTE: route,
            span_names.OPERATION: span_names.CHAT if endpoint == "chat" else span_names.TEXT_COMPLETION,
            span_names.PROVIDER: span_names.ASCENDRA,
        },
        traceparent=headers.get("traceparent", ""),
        tracestate=headers.get("tracestate", ""),
    )


def say_request(span: Span, request: GenerationRequest, request_id: str) -> None:
    """Add what was asked, without prompts."""
    asked: dict[str, Value] = {
        span_names.REQUEST_ID: request_id,
        span_names.REQUEST_MODEL: request.model,
        span_names.REQUEST_CHOICES: request.choices,
        span_names.REQUEST_STREAM: request.stream,
    }
    span.set(asked)


def end_exchange(span: Span, status: int, choices: Sequence[Choice], ttft_s: float | None) -> None:
    """Add how it went and end the span; a status of 500 or more is a failure of ours."""
    outcome: dict[str, Value] = {
        span_names.HTTP_STATUS: status,
        span_names.INPUT_TOKENS: sum(choice.prompt_tokens for choice in choices),
        span_names.OUTPUT_TOKENS: sum(choice.completion_tokens for choice in choices),
        span_names.FINISH_REASONS: [str(choice.finished.reason) for choice in choices if choice.finished],
    }
    if ttft_s is not None:
        outcome[span_names.FIRST_CHUNK_S] = ttft_s
    span.set(outcome)
    span.end(str(status) if status >= 500 else "")
