"""The gateway from start to drain."""

import asyncio

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ascendra import AscendraError
from services.common.access import Access
from services.common.config import ConfigError
from services.common.errors import ServiceError
from services.common.lifecycle import announce_ready
from services.common.logging import get_logger
from services.common.tls import https_context, is_local
from services.gateway.config import GatewayConfig
from services.gateway.gateway import Gateway
from services.gateway.generation import GenerationEndpoint
from services.gateway.http_server import start_http_server
from services.gateway.model_routes import model_routes
from services.gateway.problems import ApiError, from_exception
from services.gateway.requests import parse_chat, parse_completion
from services.gateway.status_routes import status_routes

log = get_logger()


def build_app(gateway: Gateway) -> Starlette:
    """Return the HTTP application of a gateway."""
    chat = GenerationEndpoint(gateway, "chat", parse_chat)
    completion = GenerationEndpoint(gateway, "completion", parse_completion)
    routes = [
        Route("/v1/chat/completions", chat, methods=["POST"], name="chat"),
        Route("/v1/completions", completion, methods=["POST"], name="completion"),
        *model_routes(gateway),
        *status_routes(gateway),
    ]
    handlers = {
        ApiError: _answer_error,
        AscendraError: _answer_error,
        ServiceError: _answer_error,
        HTTPException: _answer_http_error,
    }
    return Starlette(routes=routes, exception_handlers=handlers)


async def serve(config: GatewayConfig, stop: asyncio.Event) -> int:
    """Serve until `stop` is set, then drain; return the exit status."""
    try:
        gateway = Gateway(config, Access(config.api_keys_file))
        https = https_context(config.https_cert, config.https_key) if config.https_cert else None
    except (ConfigError, ValueError) as error:
        log.error("bad_configuration", problem=str(error))
        return 2
    if config.api_keys_file and not (https or is_local(config.listen)):
        log.warning("keys_in_plaintext", listen=config.listen)
    if config.api_key_file and not config.api_keys_file:
        log.warning("callers_unknown", why="the routers trust the gateway to know its callers, and it asks for no key")
    try:
        server = await start_http_server(
            config.listen,
            build_app(gateway),
            reuse_port=config.reuse_port,
            keep_alive_s=config.keep_alive_s,
            limits=config.http_limits(),
            https=https,
        )
        announce_ready("gateway", address=server.address)
        await stop.wait()
        gateway.draining = True
        await asyncio.sleep(config.settle_s)
        server.refuse_connections()
        await gateway.drain(config.drain_timeout_s)
        await server.stop()
    finally:
        await gateway.close()
    return 0


async def _answer_error(_: Request, error: Exception) -> Response:
    return from_exception(error).response()


async def _answer_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    problem = ApiError(error.status_code, error.detail, code=error.detail.lower().replace(" ", "_"))
    problem.headers.update(error.headers or {})
    return problem.response()
