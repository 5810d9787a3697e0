"""A gateway over real sockets in front of scripted routers."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest

from services.common.access import Access
from services.gateway.app import build_app
from services.gateway.config import GatewayConfig
from services.gateway.gateway import Gateway
from services.gateway.http_server import HttpServer, start_http_server
from tests.support.scripted_router import ScriptedRouter


class Served:
    """A running gateway and clients for it."""

    def __init__(self, gateway: Gateway, server: HttpServer) -> None:
        self.gateway = gateway
        self.server = server
        self.address = server.address
        self.url = f"http://{server.address}"
        # Loading the certificates that nobody needs would take half of a test's time.
        self.http = httpx.AsyncClient(base_url=self.url, timeout=30, verify=False)
        self.openai = openai.AsyncOpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=30,
            http_client=openai.DefaultAsyncHttpxClient(verify=False),
        )

    async def close(self) -> None:
        """Close the clients."""
        await self.http.aclose()
        await self.openai.close()

    async def events(self, path: str, body: dict[str, Any], **headers: str) -> list[str]:
        """Return the data of every event of a stream, as text."""
        answer = await self.http.post(path, json={"stream": True, **body}, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return [block.removeprefix("data: ") for block in answer.text.split("\n\n") if block]


Serve = Callable[..., contextlib.AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve() -> Serve:
    """How to run a gateway in front of routers."""

    @contextlib.asynccontextmanager
    async def serve(
        *routers: ScriptedRouter | str, access: Access | None = None, **options: Any
    ) -> AsyncIterator[Served]:
        addresses = tuple(router if isinstance(router, str) else router.address for router in routers)
        gateway = Gateway(GatewayConfig(routers=addresses, **options), access or Access())
        server = await start_http_server("127.0.0.1:0", build_app(gateway), limits=gateway.config.http_limits())
        served = Served(gateway, server)
        try:
            yield served
        finally:
            await served.close()
            async with asyncio.timeout(10):
                await server.stop()
                await gateway.close()

    return serve
