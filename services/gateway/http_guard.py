"""Limits of HTTP connections that a server has to set before it knows who is there: slow, huge and too many ones."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.gateway import metrics
from services.gateway.problems import ApiError


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """Limits of every connection, and of their number."""

    max_connections: int = 16_384
    head_timeout_s: float = 10.0
    """Time for a request's line and headers, from the first byte or, of a new connection, from its start."""
    max_head_bytes: int = 32 << 10
    """Request line and headers."""
    max_headers: int = 100


def guarded_protocol(limits: HttpLimits) -> type[HttpToolsProtocol]:
    """Return uvicorn's protocol with limits."""
    return type("LimitedProtocol", (_GuardedProtocol,), {"limits": limits})


class _GuardedProtocol(HttpToolsProtocol):
    limits: ClassVar[HttpLimits]

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._reading_head = True
        self._reading_body = False
        self._head_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(503, "too_many_connections", "too many connections")
        else:
            self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._reading_head or self.cycle.response_complete:
            # A head, or the rest of a body that was refused already: either has to end in time.
            self._start_timer()
            if not self._reading_body:
                self._head_bytes += len(data)
        super().data_received(data)
        if self._head_bytes > self.limits.max_head_bytes and not self.transport.is_closing():
            self._refuse(431, "headers_too_large", f"headers are larger than {self.limits.max_head_bytes} bytes")

    def on_message_begin(self) -> None:
        self._reading_head = True
        self._start_timer()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) > 2 * self.limits.max_headers:  # trailers come here too
            self.transport.abort()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._reading_head, self._reading_body, self._head_bytes = False, True, 0
        size_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        served = self.app
        if size_bytes > self.limits.max_head_bytes:
            self.app = _refusal("headers_too_large", f"headers are larger than {self.limits.max_head_bytes} bytes")
        elif len(self.headers) > self.limits.max_headers:
            self.app = _refusal("too_many_headers", f"more than {self.limits.max_headers} headers")
        super().on_headers_complete()
        self.app = served

    def on_message_complete(self) -> None:
        self._stop_timer()
        self._reading_body = False
        super().on_message_complete()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.limits.head_timeout_s, self._on_timeout)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_timeout(self) -> None:
        if self._head_bytes:
            self._refuse(408, "request_timeout", f"no complete headers within {self.limits.head_timeout_s:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, code: str, message: str) -> None:
        """Answer without the application, and close."""
        metrics.CONNECTIONS_REFUSED.labels(code).inc()
        body = ApiError(status, message, code=code).json()
        head = f"HTTP/1.1 {status} {code}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(head.encode() + b"connection: close\r\n\r\n" + body)
        self.transport.close()


def _refusal(code: str, message: str) -> Callable[..., Any]:
    app: ASGIApp = ApiError(431, message, code=code).response()

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        metrics.CONNECTIONS_REFUSED.labels(code).inc()
        await app(scope, receive, send)

    return refuse
