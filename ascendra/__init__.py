"""Client SDK of Ascendra: LLM serving that keeps its latency promises."""

from ascendra.blocking import Client
from ascendra.client import AsyncClient
from ascendra.errors import (
    AscendraError,
    CancelledByServerError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    ProtocolError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from ascendra.retry import RetryPolicy
from ascendra.session import Session
from ascendra.sink import SinkEnd, TokenSink, serve_sink
from ascendra.tls import Tls
from ascendra.types import (
    Attempt,
    Chunk,
    Completion,
    Finished,
    FinishReason,
    Message,
    MoveContract,
    PositionLogprobs,
    Receipt,
    RequestOptions,
    Role,
    SamplingParams,
    Slo,
    StructuredOutput,
    TokenLogprob,
    Usage,
)

__version__ = "0.1.0"

__all__ = [
    "AscendraError",
    "AsyncClient",
    "Attempt",
    "CancelledByServerError",
    "Chunk",
    "Client",
    "Completion",
    "DeadlineExceededError",
    "FinishReason",
    "Finished",
    "InternalError",
    "InvalidArgumentError",
    "Message",
    "MoveContract",
    "NotFoundError",
    "PermissionDeniedError",
    "PositionLogprobs",
    "ProtocolError",
    "Receipt",
    "RequestOptions",
    "ResourceExhaustedError",
    "RetryPolicy",
    "Role",
    "SamplingParams",
    "Session",
    "SinkEnd",
    "Slo",
    "StructuredOutput",
    "Tls",
    "TokenLogprob",
    "TokenSink",
    "UnauthenticatedError",
    "UnavailableError",
    "Usage",
    "__version__",
    "serve_sink",
]
