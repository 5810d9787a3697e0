"""An HTTP server on the service's own loop."""

import asyncio
import contextlib
import ssl
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.common.listening import bind
from services.gateway.http_guard import HttpLimits, guarded_protocol


class HttpServer:
    """A running server."""

    def __init__(self, server: uvicorn.Server, task: "asyncio.Task[None]", address: str) -> None:
        self._server = server
        self._task = task
        self.address = address

    @property
    def blocked_connections(self) -> int:
        """Number of connections whose client reads more slowly than it is written to."""
        connections = self._server.server_state.connections
        return sum(isinstance(one, HttpToolsProtocol) and one.flow.write_paused for one in connections)

    def refuse_connections(self) -> None:
        """Close the port; connections in use stay."""
        for listener in self._server.servers:
            listener.close()

    async def stop(self) -> None:
        """Close idle connections, give those in use a second to end, and stop."""
        self._server.should_exit = True
        await self._task


async def start_http_server(
    listen: str,
    app: ASGIApp,
    *,
    reuse_port: bool = False,
    keep_alive_s: int = 30,
    limits: HttpLimits | None = None,
    https: ssl.SSLContext | None = None,
) -> HttpServer:
    """Serve on host:port (port 0 picks one). Raises CannotListen."""
    listener = bind(listen, reuse_port=reuse_port)
    config = uvicorn.Config(
        app,
        http=guarded_protocol(limits or HttpLimits()),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=2048,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=1,
        ssl_context_factory=(lambda _config, _default: https) if https is not None else None,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listener]), name="http-server")
    while not server.started:
        if task.done():
            task.result()  # raises why it could not start
            raise RuntimeError(f"cannot serve HTTP on {listen}")
        await asyncio.sleep(0.005)
    return HttpServer(server, task, f"{listen.rpartition(':')[0]}:{listener.getsockname()[1]}")


class _Server(uvicorn.Server):
    """Signals belong to the service, not to uvicorn."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
