"""The HTTP side of a service: /health (ready), /live, /metrics. Served by uvicorn on the service's own loop."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator

import uvicorn
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from services.common.listening import bind


class HttpStatus:
    """A running HTTP server with health and metrics."""

    def __init__(self, server: uvicorn.Server, task: "asyncio.Task[None]", address: str) -> None:
        self._server = server
        self._task = task
        self.address = address

    async def stop(self) -> None:
        """Stop serving."""
        self._server.should_exit = True
        await self._task


async def start_http_status(
    listen: str, is_ready: Callable[[], bool], *, registry: CollectorRegistry = REGISTRY
) -> HttpStatus:
    """Serve on host:port (port 0 picks one). `is_ready` answers /health: 200 or 503. Raises CannotListen."""

    async def health(_: Request) -> Response:
        return PlainTextResponse("ok\n") if is_ready() else PlainTextResponse("not ready\n", status_code=503)

    async def live(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    routes = [Route(path, health) for path in ("/health", "/healthz", "/readyz")]
    routes += [Route(path, live) for path in ("/live", "/livez")]
    routes.append(Route("/metrics", metrics))
    listener = bind(listen)  # uvicorn would end the process where it cannot
    config = uvicorn.Config(Starlette(routes=routes), log_config=None, access_log=False, lifespan="off")
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="http-status")
    while not server.started:
        if task.done():
            task.result()  # raises why it could not start
            raise RuntimeError(f"cannot serve HTTP on {listen}")
        await asyncio.sleep(0.005)
    return HttpStatus(server, task, f"{listen.rpartition(':')[0]}:{listener.getsockname()[1]}")


class _Server(uvicorn.Server):
    """Signals belong to the service, not to uvicorn."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
