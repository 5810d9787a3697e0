"""What the endpoints share: configuration, routers, keys, and the requests in progress."""

import asyncio
import os
import socket
from collections.abc import Coroutine

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from services.common.access import Access, read_key
from services.common.tracing import make_tracer
from services.gateway import metrics
from services.gateway.cluster_view import ClusterView
from services.gateway.config import GatewayConfig
from services.gateway.problems import ApiError, ShuttingDown
from services.gateway.recent import RecentRequests
from services.gateway.routers import Routers
from services.gateway.token_bytes import TokenBytes

SLOW_READER_GRACE_S = 10.0
"""Time beyond a request's limit in which a client may read what was written, in seconds."""


class Gateway:
    """State of one gateway process. Made and used on one event loop."""

    def __init__(self, config: GatewayConfig, access: Access) -> None:
        """Prepare. Raises ConfigError when the key for the routers cannot be read."""
        self.config = config
        instance_id = f"{socket.gethostname()}-{os.getpid()}"
        self.tracer = make_tracer("gateway", instance_id, config.otlp_endpoint, config.trace_sample_ratio)
        self.access = access
        self.routers = Routers(
            config.routers,
            request_timeout_s=config.request_timeout_s,
            status_timeout_s=config.status_timeout_s,
            credentials=config.tls.as_client(),
            api_key=read_key(config.api_key_file),
        )
        self.view = ClusterView(self.routers)
        self.token_bytes = TokenBytes(self.routers.any)
        self.recent = RecentRequests()
        self.draining = False
        self._in_flight: set[asyncio.Task[None]] = set()

    @property
    def in_flight(self) -> int:
        """Number of requests in progress."""
        return len(self._in_flight)

    async def serve_one(self, receive: Receive, work: Coroutine[None, None, None]) -> None:
        """Run the work of a request; cancel it when the client leaves (ClientDisconnect) or the drain ends."""
        if len(self._in_flight) >= self.config.max_in_flight:
            work.close()
            raise ApiError(
                503,
                f"{self.config.max_in_flight} requests are in progress",
                kind="service_unavailable_error",
                code="too_many_requests_in_flight",
                retry_after_ms=1000,
            )
        worker = asyncio.create_task(work)
        watcher = asyncio.create_task(_until_disconnect(receive))
        self._in_flight.add(worker)
        metrics.IN_FLIGHT.inc()
        try:
            limit_s = self.config.request_timeout_s + SLOW_READER_GRACE_S
            await asyncio.wait((worker, watcher), timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if not worker.done():  # gone, or reading so slowly that it comes to the same
                raise ClientDisconnect
            if worker.cancelled():
                raise ShuttingDown
            worker.result()
        finally:
            self._in_flight.discard(worker)
            metrics.IN_FLIGHT.dec()
            worker.cancel()
            watcher.cancel()
            await asyncio.gather(worker, watcher, return_exceptions=True)

    async def drain(self, timeout_s: float) -> None:
        """Wait for the requests in progress, and cancel what is left after timeout_s seconds."""
        if self._in_flight:
            _, left = await asyncio.wait(set(self._in_flight), timeout=timeout_s)
            for worker in left:
                worker.cancel()

    async def close(self) -> None:
        """Close the connections to the routers."""
        await self.routers.close()
        if self.tracer is not None:
            await self.tracer.close()


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
