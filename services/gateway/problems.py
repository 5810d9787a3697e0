"""Failures as HTTP: status, OpenAI error object, and when to try again."""

import math

import grpc
import orjson
from starlette.responses import Response

from ascendra import AscendraError
from services.common.errors import ServiceError

_STATUS: dict[grpc.StatusCode, tuple[int, str]] = {
    grpc.StatusCode.INVALID_ARGUMENT: (400, "invalid_request_error"),
    grpc.StatusCode.OUT_OF_RANGE: (400, "invalid_request_error"),
    grpc.StatusCode.FAILED_PRECONDITION: (400, "invalid_request_error"),
    grpc.StatusCode.UNAUTHENTICATED: (401, "authentication_error"),
    grpc.StatusCode.PERMISSION_DENIED: (403, "permission_error"),
    grpc.StatusCode.NOT_FOUND: (404, "not_found_error"),
    grpc.StatusCode.ALREADY_EXISTS: (409, "invalid_request_error"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: (429, "rate_limit_error"),
    grpc.StatusCode.UNIMPLEMENTED: (501, "server_error"),
    grpc.StatusCode.UNAVAILABLE: (503, "service_unavailable_error"),
    grpc.StatusCode.CANCELLED: (503, "service_unavailable_error"),
    grpc.StatusCode.DEADLINE_EXCEEDED: (504, "timeout_error"),
}
# Reasons for which clients know a code of OpenAI's.
_CODES = {"UNKNOWN_MODEL": "model_not_found", "CONTEXT_LENGTH": "context_length_exceeded"}


class ApiError(Exception):
    """A failure as the caller of the HTTP API sees it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_ms: int = 0,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        if retry_after_ms > 0:
            self.headers["retry-after"] = str(max(1, math.ceil(retry_after_ms / 1000)))
            self.headers["retry-after-ms"] = str(retry_after_ms)

    def json(self) -> bytes:
        """Return the OpenAI error object."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})

    def response(self) -> Response:
        """Return the HTTP answer."""
        return Response(self.json(), self.status, self.headers, "application/json")


class BadRequest(ApiError):
    """A field of the request is wrong; the message names it."""

    def __init__(self, param: str, problem: str) -> None:
        super().__init__(400, f"{param}: {problem}", param=param, code="invalid_argument")


class BodyTooLarge(ApiError):
    """The body is over the limit."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(413, f"the body is larger than {limit_bytes} bytes", code="body_too_large")


class ShuttingDown(ApiError):
    """The gateway is draining."""

    def __init__(self) -> None:
        super().__init__(
            503,
            "the gateway is shutting down",
            kind="service_unavailable_error",
            code="shutting_down",
            retry_after_ms=1000,
        )


def from_ascendra(error: AscendraError) -> ApiError:
    """Return the HTTP form of an error of the SDK."""
    status, kind = _STATUS.get(error.code, (500, "server_error"))
    retry_after_ms = error.retry_after_ms
    if error.code is grpc.StatusCode.RESOURCE_EXHAUSTED and not retry_after_ms and not error.retry_safe:
        # No wait helps: a size limit, not load.
        status, kind = 413, "invalid_request_error"
    elif status in (429, 503):
        retry_after_ms = retry_after_ms or 1000
    else:
        retry_after_ms = 0
    code = _CODES.get(error.reason, error.reason.lower())
    return ApiError(status, error.message, kind=kind, code=code, retry_after_ms=retry_after_ms)


def from_service_error(error: ServiceError) -> ApiError:
    """Return the HTTP form of an error of the gateway's own."""
    status, kind = _STATUS.get(error.code, (500, "server_error"))
    problem = ApiError(status, error.message, kind=kind, code=error.reason.lower(), retry_after_ms=error.retry_after_ms)
    if status == 401:
        problem.headers["www-authenticate"] = "Bearer"
    return problem


def from_exception(error: Exception) -> ApiError:
    """Return the HTTP form of any error; one that is not ours says nothing about itself."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AscendraError):
        return from_ascendra(error)
    if isinstance(error, ServiceError):
        return from_service_error(error)
    return ApiError(500, "internal error", kind="server_error", code="internal_error")
