"""Errors that the SDK raises.

AscendraError
├── InvalidArgumentError     a field of the request is wrong; the message names it and the limit
├── NotFoundError            a model, worker or request that was named does not exist
├── UnauthenticatedError     no API key or certificate was shown, or nobody knows it
├── PermissionDeniedError    the caller may not do this
├── ResourceExhaustedError   your share, a size limit or the capacity to make the objective is used up
├── UnavailableError         no capacity now, or the serving side failed
├── DeadlineExceededError    the request's own time limit passed
├── CancelledByServerError   the serving side ended the request (a drain that ran out of time, an operator)
├── InternalError            a fault in the serving side
└── ProtocolError            the serving side broke the contract (a gap or repetition in the offsets, no end)
"""

from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio

REASON_KEY = "ascendra-reason"
RETRY_SAFE_KEY = "ascendra-retry-safe"
RETRY_AFTER_KEY = "retry-after-ms"

CONNECTION_LOST = "CONNECTION_LOST"
"""Reason of an UnavailableError that no router sent: it could not be reached, or the connection broke."""
CLOSED = "CLOSED"
"""Reason of an UnavailableError that no router sent: the caller closed the client or the session."""


class AscendraError(Exception):
    """A request failed.

    Attributes:
        code: gRPC status code.
        reason: machine-readable reason in UPPER_SNAKE_CASE.
        retry_safe: whether a repetition cannot generate anything twice that the caller has seen.
        retry_after_ms: wait that the server suggests before a repetition, in milliseconds; 0: none.
        request_id: id of the request, as in the router's logs and `explain`; empty when there is none.
    """

    code: grpc.StatusCode = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        retry_safe: bool = False,
        retry_after_ms: int = 0,
        request_id: str = "",
        code: grpc.StatusCode | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.code
        self.reason = reason or self.code.name
        self.retry_safe = retry_safe
        self.retry_after_ms = retry_after_ms
        self.request_id = request_id

    def __str__(self) -> str:
        return self.message


class InvalidArgumentError(AscendraError):
    """A field of the request is wrong; the message names it and the limit."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class NotFoundError(AscendraError):
    """A model, worker or request that was named does not exist."""

    code = grpc.StatusCode.NOT_FOUND


class UnauthenticatedError(AscendraError):
    """No API key or certificate was shown, or nobody knows it."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDeniedError(AscendraError):
    """The caller may not do this."""

    code = grpc.StatusCode.PERMISSION_DENIED


class ResourceExhaustedError(AscendraError):
    """Your share, a size limit or the capacity to make the objective is used up."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class UnavailableError(AscendraError):
    """No capacity now, or the serving side failed or cannot be reached."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceededError(AscendraError):
    """The request's own time limit passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class CancelledByServerError(AscendraError):
    """The serving side ended the request. A cancellation by the caller is asyncio.CancelledError instead."""

    code = grpc.StatusCode.CANCELLED


class InternalError(AscendraError):
    """A fault in the serving side."""

    code = grpc.StatusCode.INTERNAL


class ProtocolError(AscendraError):
    """The serving side broke the contract: a gap or repetition in the offsets, or a stream without an end."""

    code = grpc.StatusCode.DATA_LOSS


_BY_CODE: dict[grpc.StatusCode, type[AscendraError]] = {
    **{kind.code: kind for kind in AscendraError.__subclasses__()},
    grpc.StatusCode.UNKNOWN: InternalError,
    grpc.StatusCode.OUT_OF_RANGE: InvalidArgumentError,
}
_BY_NUMBER: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def from_status(
    code: int | grpc.StatusCode,
    message: str,
    *,
    reason: str = "",
    retry_safe: bool = False,
    retry_after_ms: int = 0,
    request_id: str = "",
) -> AscendraError:
    """Return the typed error of a status."""
    status = _BY_NUMBER.get(code, grpc.StatusCode.UNKNOWN) if isinstance(code, int) else code
    return _BY_CODE.get(status, AscendraError)(
        message or status.name,
        reason=reason,
        retry_safe=retry_safe,
        retry_after_ms=retry_after_ms,
        request_id=request_id,
        code=status,
    )


def from_rpc_error(error: grpc.aio.AioRpcError, *, address: str, request_id: str = "") -> AscendraError:
    """Return the typed error of a failed call to a router."""
    metadata = {str(key): str(value) for key, value in _pairs(error.trailing_metadata())}
    details = error.details() or ""
    if REASON_KEY not in metadata and error.code() is grpc.StatusCode.UNAVAILABLE:
        return lost_connection(address, details, request_id=request_id)
    return from_status(
        error.code(),
        details,
        reason=metadata.get(REASON_KEY, ""),
        retry_safe=metadata.get(RETRY_SAFE_KEY) == "true",
        retry_after_ms=_milliseconds(metadata.get(RETRY_AFTER_KEY, "")),
        request_id=request_id,
    )


def lost_connection(address: str, cause: str, *, request_id: str = "") -> UnavailableError:
    """Return the error of a connection that broke or was never made: safe to retry while nothing was received."""
    # gRPC wraps the cause in what it tried; the last part says what is wrong.
    cause = cause.rpartition("last error: ")[2].rpartition("Failed to connect to remote host: ")[2].strip()
    return UnavailableError(
        f"no connection to the router at {address}" + (f": {cause}" if cause else ""),
        reason=CONNECTION_LOST,
        retry_safe=True,
        request_id=request_id,
    )


def _pairs(metadata: Any) -> Iterable[tuple[str, str | bytes]]:
    # The stubs call it a mapping; it iterates over pairs, because a key may come twice.
    return metadata or ()


def _milliseconds(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0
