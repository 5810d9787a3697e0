"""A gRPC server as every service runs it: health with live Watch, reflection, errors mapped, request id bound."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import _async as health_aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.common import errors
from services.common.access import Authorize
from services.common.channels import SERVER_OPTIONS
from services.common.listening import CannotListen, bind
from services.common.logging import get_logger
from services.common.tls import PLAINTEXT, TlsConfig, grpc_server_credentials, is_local

log = get_logger()

REQUEST_ID_KEY = "x-request-id"
_HEALTH = f"/{health.SERVICE_NAME}/"
Register = Callable[[grpc.aio.Server], Sequence[str]]
"""Adds servicers to a server and returns their full service names."""


class GrpcServer:
    """A started server and its health."""

    def __init__(self, server: grpc.aio.Server, address: str, health_servicer: Any, services: Sequence[str]) -> None:
        self._server = server
        self.address = address
        self._health = health_servicer
        self._services = services

    async def set_serving(self, serving: bool) -> None:
        """Publish SERVING or NOT_SERVING for "" and every service; watchers hear it at once."""
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._services):
            await self._health.set(name, status)

    async def stop(self, grace_s: float) -> None:
        """Stop listening, let calls in flight end for at most grace_s seconds, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def start_grpc_server(
    listen: str,
    register: Register,
    *,
    tls: TlsConfig = PLAINTEXT,
    authorize: Authorize | None = None,
    reuse_port: bool = False,
    serving: bool = True,
) -> GrpcServer:
    """Start a server on host:port (port 0 picks one) or unix:PATH and return it with its real address.

    Args:
        tls: certificates; a socket of this machine is always in plaintext.
        authorize: asked before every call except those of the health service; None: everybody may do everything.

    Raises:
        ValueError: the certificates cannot be used.
        CannotListen: the address cannot be had.
    """
    encrypted = tls.serves and not listen.startswith("unix:")
    if not encrypted and not is_local(listen):
        log.warning("plaintext_listener", listen=listen)
    # The first of two equal options counts.
    options = [("grpc.so_reuseport", 1), *SERVER_OPTIONS] if reuse_port else SERVER_OPTIONS
    server = grpc.aio.server(options=options, interceptors=[CallScope(authorize)])
    services = register(server)
    health_servicer = health_aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    if not (listen.startswith("unix:") or reuse_port):
        bind(listen).close()  # gRPC does not say why it cannot
    credentials = grpc_server_credentials(tls) if encrypted else None
    try:
        port = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
    except RuntimeError as error:
        raise CannotListen(f"{listen}: {str(error).partition(';')[0]}") from error
    await server.start()
    address = listen if listen.startswith("unix:") else f"{listen.rpartition(':')[0]}:{port}"
    started = GrpcServer(server, address, health_servicer, services)
    await started.set_serving(serving)
    return started


class CallScope(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Asks who may call, binds the request id for logs, and turns exceptions into statuses that leak nothing."""

    def __init__(self, authorize: Authorize | None = None) -> None:
        self._authorize = authorize

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Wrap the handler of one call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        metadata = dict(handler_call_details.invocation_metadata or ())
        request_id = str(metadata.get(REQUEST_ID_KEY, ""))
        method = handler_call_details.method
        authorize = None if method.startswith(_HEALTH) else self._authorize
        if handler.response_streaming:
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
            factory = (
                grpc.stream_stream_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_stream_rpc_method_handler
            )
            guarded: Any = _guard_stream(inner, method, request_id, authorize)
        else:
            inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
            factory = (
                grpc.stream_unary_rpc_method_handler
                if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler
            )
            guarded = _guard_unary(inner, method, request_id, authorize)
        return factory(guarded, handler.request_deserializer, handler.response_serializer)


def _bind(method: str, request_id: str) -> None:
    structlog.contextvars.bind_contextvars(rpc=method)
    if request_id:
        structlog.contextvars.bind_contextvars(request_id=request_id)


async def _end(context: "grpc.aio.ServicerContext[Any, Any]", error: Exception) -> NoReturn:
    """End a call whose handler raised: its own abort stands, ours keep their status, anything else leaks nothing."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if not isinstance(error, errors.ServiceError):
        log.error("unhandled_error", exc_info=error)
        error = errors.ServiceError("internal error")
    await errors.abort(context, error)


def _guard_unary(
    inner: Callable[..., Awaitable[Any]], method: str, request_id: str, authorize: Authorize | None
) -> Callable[..., Awaitable[Any]]:
    async def call(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> Any:
        _bind(method, request_id)
        try:
            if authorize is not None:
                authorize(method, context)
            return await inner(request, context)
        except Exception as error:
            await _end(context, error)

    return call


def _guard_stream(
    inner: Callable[..., AsyncIterator[Any]], method: str, request_id: str, authorize: Authorize | None
) -> Callable[..., AsyncIterator[Any]]:
    async def call(request: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> AsyncIterator[Any]:
        _bind(method, request_id)
        try:
            if authorize is not None:
                authorize(method, context)
            responses: Any = inner(request, context)
            if asyncio.iscoroutine(responses):  # a handler that writes through the context
                await responses
                return
            async with contextlib.aclosing(responses) as items:
                async for item in items:
                    yield item
        except Exception as error:
            await _end(context, error)

    return call
