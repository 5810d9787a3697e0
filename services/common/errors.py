"""Errors that a caller sees: one root, a gRPC code, a machine-readable reason and whether a retry is safe."""

from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2, status_pb2

DOMAIN = "ascendra"
REASON_KEY = "ascendra-reason"
RETRY_SAFE_KEY = "ascendra-retry-safe"
RETRY_AFTER_KEY = "retry-after-ms"


class ServiceError(Exception):
    """A failure with the status that the caller receives."""

    code: grpc.StatusCode = grpc.StatusCode.INTERNAL
    default_reason: str = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        retry_safe: bool = False,
        retry_after_ms: int = 0,
        code: grpc.StatusCode | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.retry_safe = retry_safe
        self.retry_after_ms = retry_after_ms
        if code is not None:
            self.code = code


class InvalidArgument(ServiceError):
    """A field is wrong; the message names the field and the limit."""

    code = grpc.StatusCode.INVALID_ARGUMENT
    default_reason = "INVALID_ARGUMENT"


class NotFound(ServiceError):
    """Something named does not exist."""

    code = grpc.StatusCode.NOT_FOUND
    default_reason = "NOT_FOUND"


class Unauthenticated(ServiceError):
    """The caller did not say who it is, or nobody knows it."""

    code = grpc.StatusCode.UNAUTHENTICATED
    default_reason = "UNAUTHENTICATED"


class PermissionDenied(ServiceError):
    """The caller may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED
    default_reason = "PERMISSION_DENIED"


class ResourceExhausted(ServiceError):
    """A size limit, the caller's share, or the capacity to make the objective is used up."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    default_reason = "RESOURCE_EXHAUSTED"


class Unavailable(ServiceError):
    """No capacity now, or the serving side failed."""

    code = grpc.StatusCode.UNAVAILABLE
    default_reason = "UNAVAILABLE"


class DeadlineExceeded(ServiceError):
    """The request's own time limit passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED
    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(ServiceError):
    """The caller cancelled."""

    code = grpc.StatusCode.CANCELLED
    default_reason = "CANCELLED"


def trailing_metadata(error: ServiceError) -> tuple[tuple[str, str | bytes], ...]:
    """Return the flat reason keys and the rich status (ErrorInfo, RetryInfo) of an error."""
    retry_safe = str(error.retry_safe).lower()
    status = status_pb2.Status(code=error.code.value[0], message=error.message)
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata={"retry_safe": retry_safe})
    status.details.add().Pack(info)
    flat: list[tuple[str, str | bytes]] = [(REASON_KEY, error.reason), (RETRY_SAFE_KEY, retry_safe)]
    if error.retry_after_ms > 0:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        flat.append((RETRY_AFTER_KEY, str(error.retry_after_ms)))
    return (*flat, ("grpc-status-details-bin", status.SerializeToString()))


async def abort(context: "grpc.aio.ServicerContext[Any, Any]", error: ServiceError) -> NoReturn:
    """End the call with the status of an error."""
    await context.abort(error.code, error.message, trailing_metadata(error))
    raise AssertionError("abort returned")
