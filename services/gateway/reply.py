"""The HTTP side of one exchange, written straight to ASGI: a token costs one call."""

from starlette.types import Send

from services.gateway.problems import ApiError


class Reply:
    """An answer that is either whole or a stream of events."""

    def __init__(self, send: Send) -> None:
        self.started = False
        self.headers: dict[str, str] = {}
        self._send = send

    async def start_events(self) -> None:
        """Begin a stream of events with status 200."""
        await self._start(
            200,
            {
                "content-type": "text/event-stream; charset=utf-8",
                "cache-control": "no-cache",
                "x-accel-buffering": "no",  # proxies would gather tokens
            },
        )

    async def write(self, events: bytes) -> None:
        """Send events; waits while the client's buffer is full."""
        await self._send({"type": "http.response.body", "body": events, "more_body": True})

    async def finish(self, events: bytes) -> None:
        """Send the last events."""
        await self._send({"type": "http.response.body", "body": events, "more_body": False})

    async def whole(self, body: bytes, headers: dict[str, str]) -> None:
        """Send a whole JSON answer with status 200."""
        await self._whole(200, body, headers)

    async def problem(self, problem: ApiError) -> None:
        """Send a failure."""
        await self._whole(problem.status, problem.json(), problem.headers)

    async def _whole(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        await self._start(status, {"content-type": "application/json", "content-length": str(len(body)), **headers})
        await self.finish(body)

    async def _start(self, status: int, headers: dict[str, str]) -> None:
        self.started = True
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (self.headers | headers).items()]
        await self._send({"type": "http.response.start", "status": status, "headers": raw})
