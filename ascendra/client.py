"""The client: one gRPC stream per request. For hundreds of streams at once, use `AsyncClient.session`."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc
import grpc.aio

from ascendra import wire
from ascendra.attempts import collect, run_request
from ascendra.endpoints import Addresses, Credentials, Endpoint, Endpoints, closed_error
from ascendra.errors import AscendraError, NotFoundError, ProtocolError, UnavailableError, from_rpc_error
from ascendra.retry import RetryPolicy
from ascendra.session import Session
from ascendra.types import Chunk, Completion, Message, RequestOptions, Role
from ascendra.v1 import cluster_pb2, inference_pb2

DEFAULT_TIMEOUT_S = 600.0
DEFAULT_CONTROL_TIMEOUT_S = 10.0

_T = TypeVar("_T")


class AsyncClient:
    """Talks to one router or several, from one event loop.

    Example:
        async with AsyncClient("127.0.0.1:7100") as client:
            async for chunk in client.stream("Once upon a time", slo=Slo(ttft_ms=500, tbt_ms=50)):
                print(chunk.text, end="")
    """

    def __init__(
        self,
        addresses: Addresses,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        control_timeout_s: float = DEFAULT_CONTROL_TIMEOUT_S,
        retry: RetryPolicy | None = None,
        credentials: Credentials | None = None,
        api_key: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Make a client; nothing is sent before the first call.

        Args:
            addresses: host:port or unix:PATH of one router or of several, which are used in turn.
            timeout_s: limit on a whole request where the call gives none, in seconds.
            control_timeout_s: limit on every other call, in seconds.
            retry: bounds on repetitions.
            credentials: for TLS, certificate files as `Tls` or made by gRPC; without them connections are plaintext.
            api_key: says who the caller is; not to be sent over networks in plaintext.
            metadata: sent with every call, such as a header for a proxy.
        """
        authorization = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._endpoints = Endpoints(addresses, credentials, {**(metadata or {}), **authorization})
        self._timeout_s = timeout_s
        self._control_timeout_s = control_timeout_s
        self._retry = retry or RetryPolicy()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections; calls in flight end with an UnavailableError, as do later ones."""
        await self._endpoints.close()

    async def generate(self, prompt: str | None = None, **options: Unpack[RequestOptions]) -> Completion:
        """Return one completion of a text, a conversation or token ids. Raises AscendraError.

        The keyword arguments are those of `RequestOptions`.
        """
        request = wire.build_request(prompt, options)
        async with contextlib.aclosing(self._run(request, options)) as chunks:
            return await collect(request.request_id, chunks)

    def stream(self, prompt: str | None = None, **options: Unpack[RequestOptions]) -> AsyncGenerator[Chunk]:
        """Yield a completion as it is generated; the last chunk has `finished`. Raises AscendraError.

        Leaving the loop in any way cancels the request on the server. The keyword arguments are those of
        `RequestOptions`.
        """
        return self._run(wire.build_request(prompt, options), options)

    def session(self) -> Session:
        """Return a session that carries many requests on one stream, over this client's connections."""
        return Session(self._endpoints, timeout_s=self._timeout_s, retry=self._retry)

    def _run(self, request: inference_pb2.GenerateRequest, options: RequestOptions) -> AsyncGenerator[Chunk]:
        return run_request(
            request,
            self._open_attempt,
            timeout_s=options.get("timeout_s", self._timeout_s),
            retry=self._retry,
            pause=self._endpoints.pause,
            routers=len(self._endpoints),
        )

    async def _open_attempt(self, request: inference_pb2.GenerateRequest, timeout_s: float) -> "_GenerateAttempt":
        return _GenerateAttempt(self._endpoints, request, timeout_s)

    # Tokenizer and models.

    async def tokenize(
        self,
        text: str | None = None,
        *,
        messages: Sequence[Message | Mapping[str, str]] | None = None,
        model: str = "",
        skip_special_tokens: bool = False,
        continue_final_message: bool = False,
    ) -> list[int]:
        """Return the token ids of a text or of a conversation rendered by the chat template."""
        request = inference_pb2.TokenizeRequest(model=model, skip_special_tokens=skip_special_tokens)
        if messages is not None:
            request.chat.CopyFrom(wire.chat_to_wire(messages))
            request.chat.continue_final_message = continue_final_message
        else:
            request.text = text or ""
        response = await self._call(lambda endpoint: endpoint.inference.Tokenize, request)
        return list(response.token_ids)

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """Return the text of token ids."""
        request = inference_pb2.DetokenizeRequest(model=model, token_ids=token_ids)
        return (await self._call(lambda endpoint: endpoint.inference.Detokenize, request)).text

    async def token_bytes(self, token_ids: Sequence[int], *, model: str = "") -> list[bytes]:
        """Return the bytes of each token by itself; they need not be whole characters. Special tokens are spelt out."""
        request = inference_pb2.DetokenizeRequest(model=model, token_ids=token_ids, separately=True)
        return list((await self._call(lambda endpoint: endpoint.inference.Detokenize, request)).token_bytes)

    async def models(self) -> list[inference_pb2.Model]:
        """Return the models that the router serves."""
        request = inference_pb2.ListModelsRequest()
        return list((await self._call(lambda endpoint: endpoint.inference.ListModels, request)).models)

    # The cluster.

    async def status(self) -> cluster_pb2.GetStatusResponse:
        """Return the cluster as one router sees it."""
        return await self._call(lambda endpoint: endpoint.cluster.GetStatus, cluster_pb2.GetStatusRequest())

    async def watch_status(self, interval_s: float = 1.0) -> AsyncGenerator[cluster_pb2.GetStatusResponse]:
        """Yield the cluster as one router sees it, every interval_s seconds (at least 0.1), until it fails."""
        request = cluster_pb2.WatchStatusRequest(interval_ms=wire.milliseconds("interval_s", interval_s))
        endpoint = self._endpoints.pick()
        call = endpoint.cluster.WatchStatus(request, metadata=self._endpoints.metadata)
        self._endpoints.end_with_us(call)
        try:
            async for response in call:
                yield response.status
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, address=endpoint.address) from None
        except asyncio.CancelledError:
            if self._endpoints.ended_call():
                raise closed_error() from None
            raise
        finally:
            call.cancel()

    async def explain(self, request_id: str, *, tenant: str = "") -> cluster_pb2.ExplainResponse:
        """Return the decisions about a request. Raises NotFoundError when no router remembers it for this caller.

        tenant: for which a gateway asks; others ask for themselves.
        """
        request = cluster_pb2.ExplainRequest(request_id=request_id, tenant=tenant)
        failure: AscendraError | None = None
        for endpoint in self._endpoints.in_turn():  # only the router that served the request knows it
            try:
                return await self._call_one(endpoint, endpoint.cluster.Explain, request)
            except (NotFoundError, UnavailableError) as error:
                failure = error if failure is None or isinstance(error, UnavailableError) else failure
        assert failure is not None
        raise failure

    async def set_role(self, worker_id: str, role: Role | str) -> Role:
        """Change a worker's role and return the one now in force."""
        request = cluster_pb2.SetRoleRequest(worker_id=worker_id, role=wire.role_to_wire(role))
        response = await self._call(lambda endpoint: endpoint.cluster.SetRole, request)
        now = wire.role_from_wire(response.role)
        if now is None:
            raise ProtocolError("the router did not say which role is in force")
        return now

    async def drain(self, worker_id: str, *, timeout_s: float | None = None) -> int:
        """Stop placing on a worker and return how many requests it still has.

        timeout_s: seconds until what is left is cancelled, 0: at once; None: the worker's default.
        """
        request = cluster_pb2.DrainWorkerRequest(worker_id=worker_id)
        if timeout_s is not None:
            # On the wire 0 stands for the default.
            request.timeout_ms = 1 if timeout_s == 0 else wire.milliseconds("timeout_s", timeout_s)
        return (await self._call(lambda endpoint: endpoint.cluster.DrainWorker, request)).remaining

    async def _call(
        self, method: Callable[[Endpoint], Callable[..., "grpc.aio.UnaryUnaryCall[Any, _T]"]], request: Any
    ) -> _T:
        """Make a unary call on the first router that can be reached."""
        failure: UnavailableError | None = None
        for endpoint in self._endpoints.in_turn():
            try:
                return await self._call_one(endpoint, method(endpoint), request)
            except UnavailableError as error:
                failure = error
        assert failure is not None
        raise failure

    async def _call_one(
        self, endpoint: Endpoint, method: Callable[..., "grpc.aio.UnaryUnaryCall[Any, _T]"], request: Any
    ) -> _T:
        call = method(request, timeout=self._control_timeout_s, metadata=self._endpoints.metadata)
        self._endpoints.end_with_us(call)
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, address=endpoint.address) from None
        except asyncio.CancelledError:
            if self._endpoints.ended_call():
                raise closed_error() from None
            raise


class _GenerateAttempt:
    """An attempt on a gRPC stream of its own."""

    def __init__(self, endpoints: Endpoints, request: inference_pb2.GenerateRequest, timeout_s: float) -> None:
        self.resume_cursor = b""
        self.prompt_tokens = 0
        self._endpoints = endpoints
        self._endpoint = endpoints.pick()
        self._request_id = request.request_id
        self._finished = False
        self._call = self._endpoint.inference.Generate(
            request, timeout=max(timeout_s, 0.0), metadata=endpoints.metadata
        )
        endpoints.end_with_us(self._call)

    async def read(self) -> Chunk | None:
        """Return the next chunk, or None after the last. Raises AscendraError."""
        while True:
            try:
                response = await self._call.read()
            except grpc.aio.AioRpcError as error:
                if self._finished:  # everything was received; how the call ended no longer matters
                    return None
                raise from_rpc_error(error, address=self._endpoint.address, request_id=self._request_id) from None
            except asyncio.CancelledError:
                if not self._endpoints.ended_call():
                    raise
                if self._finished:
                    return None
                raise closed_error(self._request_id) from None
            if not isinstance(response, inference_pb2.GenerateResponse):  # grpc.aio.EOF
                if not self._finished:
                    raise ProtocolError("the stream ended without an end message", request_id=self._request_id)
                return None
            if response.HasField("accepted"):
                self.resume_cursor = response.accepted.resume_cursor
                self.prompt_tokens = response.accepted.prompt_tokens
            self._finished = response.HasField("finished")
            if response.token_ids or response.text or self._finished:
                return wire.chunk_from_wire(response)

    def cancel(self) -> None:
        """Cancel the call; does nothing when it has ended."""
        self._call.cancel()
