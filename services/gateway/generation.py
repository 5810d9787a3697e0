"""/v1/chat/completions and /v1/completions: one HTTP exchange from body to last byte."""

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ascendra import Chunk
from services.common import span_names
from services.common.logging import get_logger
from services.common.tracing import Span
from services.gateway import metrics
from services.gateway.answers import DONE, Answer, Choice, receipt_headers
from services.gateway.callers import tenant_of
from services.gateway.config import GatewayConfig
from services.gateway.fields import Fields, parse_object
from services.gateway.gateway import Gateway
from services.gateway.http_body import read_body
from services.gateway.logprobs import chat_logprobs, id_name, joined, mentioned_ids, text_logprobs
from services.gateway.problems import ApiError, BadRequest, ShuttingDown, from_exception
from services.gateway.recent import EndedRequest
from services.gateway.reply import Reply
from services.gateway.requests import GenerationRequest, Prompt
from services.gateway.tracing import end_exchange, say_request, start_exchange

log = get_logger()

CLIENT_LEFT = 499
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,120}")

Parse = Callable[[Fields, Mapping[str, str], GatewayConfig], GenerationRequest]
Put = Callable[[int, Chunk], Awaitable[None]]


class GenerationEndpoint:
    """An ASGI application for one path."""

    def __init__(self, gateway: Gateway, endpoint: str, parse: Parse) -> None:
        self._gateway = gateway
        self._endpoint = endpoint
        self._parse = parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        exchange = _Exchange(self._gateway, self._endpoint, Reply(send))
        try:
            await exchange.run(Headers(scope=scope), receive, self._parse)
        except ClientDisconnect:
            exchange.status = CLIENT_LEFT
        except Exception as error:
            problem = from_exception(error)
            exchange.status = problem.status
            if problem.status == 500:
                log.exception("request_failed", request_id=exchange.request_id)
            await exchange.fail(problem)
        finally:
            exchange.record()


class _Exchange:
    """One request and its answer."""

    def __init__(self, gateway: Gateway, endpoint: str, reply: Reply) -> None:
        self.status = 200
        self.request_id = uuid.uuid4().hex
        self._gateway = gateway
        self._endpoint = endpoint
        self._reply = reply
        self._began_s = time.monotonic()
        self._ttft_s: float | None = None
        self._tenant = ""
        self._choices: Sequence[Choice] = ()
        self._span: Span | None = None

    async def run(self, headers: Headers, receive: Receive, parse: Parse) -> None:
        """Answer the request. Raises ApiError, AscendraError or ClientDisconnect."""
        gateway = self._gateway
        if gateway.tracer is not None:
            self._span = start_exchange(gateway.tracer, self._endpoint, headers)
        if (request_id := headers.get("x-request-id")) is not None:
            if not _REQUEST_ID.fullmatch(request_id):
                raise BadRequest("x-request-id", "must be 1 to 120 characters of A-Z a-z 0-9 . _ : -")
            self.request_id = request_id
        self._reply.headers["x-request-id"] = self.request_id
        self._tenant = tenant_of(gateway.access, headers)
        if gateway.draining:
            raise ShuttingDown
        body = await read_body(receive, headers, gateway.config.max_body_bytes, gateway.config.body_timeout_s)
        request = parse(parse_object(body), headers, gateway.config)
        if self._tenant:
            request.options["tenant"] = self._tenant
        if self._span is not None:
            say_request(self._span, request, self.request_id)
            request.options["traceparent"] = self._span.traceparent
        await gateway.serve_one(receive, self._answer(request))

    async def fail(self, problem: ApiError) -> None:
        """Say what went wrong: by HTTP status before the first output, by an event after it."""
        if not self._reply.started:
            await self._reply.problem(problem)
        else:
            await self._reply.finish(b"data: " + problem.json() + b"\n\n" + DONE)

    def record(self) -> None:
        """Count and log the exchange."""
        duration_s = time.monotonic() - self._began_s
        tokens = sum(choice.completion_tokens for choice in self._choices)
        metrics.REQUESTS.labels(self._endpoint, str(self.status)).inc()
        metrics.DURATION_S.labels(self._endpoint).observe(duration_s)
        metrics.TOKENS.labels(self._endpoint).inc(tokens)
        if self._ttft_s is not None:
            metrics.TTFT_S.labels(self._endpoint).observe(self._ttft_s)
        self._gateway.recent.add(
            EndedRequest.of(
                self._choices,
                request_id=self.request_id,
                endpoint=self._endpoint,
                tenant=self._tenant,
                status=self.status,
                ended_s=time.monotonic(),
                duration_s=duration_s,
                ttft_s=self._ttft_s,
            )
        )
        if self._span is not None:
            end_exchange(self._span, self.status, self._choices, self._ttft_s)
        log.info(
            "request",
            endpoint=self._endpoint,
            request_id=self.request_id,
            tenant=self._tenant,
            status=self.status,
            choices=len(self._choices),
            prompt_tokens=sum(choice.prompt_tokens for choice in self._choices),
            completion_tokens=tokens,
            ttft_ms=None if self._ttft_s is None else round(self._ttft_s * 1000, 1),
            duration_ms=round(duration_s * 1000, 1),
        )

    async def _answer(self, request: GenerationRequest) -> None:
        prompts = [await self._ready_prompt(request, prompt) for prompt in request.prompts]
        echoes = [await self._echo(request, prompt) for prompt in request.prompts]
        self._choices = [
            Choice(
                request.choice_id(index, self.request_id),
                echo=echoes[index // request.n],
                text_offset=len(echoes[index // request.n]),
                prompt_token_ids=prompts[index // request.n].token_ids or (),
            )
            for index in range(request.choices)
        ]
        streams = [self._stream(request, index, prompts[index // request.n]) for index in range(request.choices)]
        answer = Answer(
            request,
            self._choices,
            name=f"{'chatcmpl' if request.kind == 'chat' else 'cmpl'}-{self.request_id}",
            model=request.model or await self._default_model(),
            created=int(time.time()),
        )
        if request.stream:
            await deliver(streams, self._sender(request, answer))
            await self._reply.finish(answer.last_events())
        else:
            await deliver(streams, self._keeper(request, answer))
            headers = receipt_headers(self._choices[0]) if len(self._choices) == 1 else {}
            await self._reply.whole(answer.whole(), headers)

    def _sender(self, request: GenerationRequest, answer: Answer) -> Put:
        async def put(index: int, chunk: Chunk) -> None:
            # Looked up before the answer starts, so that a failure still has an HTTP status.
            logprobs = await self._logprobs(request, index, chunk)
            if request.echo_only:
                chunk.text = ""
            event = answer.event(index, chunk, logprobs)
            if not self._reply.started:
                self._note_first_output()
                await self._reply.start_events()
            if len(chunk.token_ids) > 1:
                metrics.MERGED_TOKENS.inc(len(chunk.token_ids))
            await self._reply.write(event)

        return put

    def _keeper(self, request: GenerationRequest, answer: Answer) -> Put:
        async def put(index: int, chunk: Chunk) -> None:
            self._note_first_output()
            if request.echo_only:
                chunk.text = ""
            answer.keep(index, chunk, await self._logprobs(request, index, chunk))

        return put

    def _note_first_output(self) -> None:
        if self._ttft_s is None:
            self._ttft_s = time.monotonic() - self._began_s
            if self._span is not None:
                self._span.event(span_names.FIRST_TOKEN)

    async def _logprobs(self, request: GenerationRequest, index: int, chunk: Chunk) -> dict[str, Any] | None:
        if not chunk.logprobs:
            return None
        tokens = await self._gateway.token_bytes.lookup(request.model, mentioned_ids(chunk.logprobs))
        choice = self._choices[index]
        name = id_name if request.tokens_as_ids else choice.speller.name_in(tokens)
        parts = []
        for position in chunk.logprobs:
            if request.kind == "chat":
                parts.append(chat_logprobs(position, name))
            else:
                parts.append(text_logprobs(position, name, choice.text_offset))
                choice.text_offset += len(name(position.sampled.token_id))
            choice.speller.advance(tokens[position.sampled.token_id])
        return joined(parts)

    def _stream(self, request: GenerationRequest, index: int, prompt: Prompt) -> AsyncGenerator[Chunk]:
        options = request.choice_options(index, self.request_id)
        if prompt.messages is not None:
            options["messages"] = prompt.messages
        if prompt.token_ids is not None:
            options["token_ids"] = prompt.token_ids
        return self._gateway.routers.next_session().stream(prompt.text, **options)

    async def _ready_prompt(self, request: GenerationRequest, prompt: Prompt) -> Prompt:
        wanted = request.return_token_ids or (prompt.text is not None and not request.add_special_tokens)
        if prompt.token_ids is not None or not wanted:
            return prompt
        ids = await self._gateway.routers.any.tokenize(
            prompt.text,
            messages=prompt.messages,
            model=request.model,
            skip_special_tokens=not request.add_special_tokens,
            continue_final_message=request.options.get("continue_final_message", False),
        )
        return Prompt(token_ids=ids)

    async def _echo(self, request: GenerationRequest, prompt: Prompt) -> str:
        if not request.echo or request.return_token_ids:
            return ""
        if prompt.text is not None:
            return prompt.text
        return await self._gateway.routers.any.detokenize(prompt.token_ids or (), model=request.model)

    async def _default_model(self) -> str:
        models = await self._gateway.view.models()
        return models[0].name if len(models) == 1 else ""


async def deliver(streams: Sequence[AsyncGenerator[Chunk]], put: Put) -> None:
    """Put the chunks of all streams, each with its index, as they come; the first failure ends all."""
    if len(streams) == 1:
        await _pump(0, streams[0], put)
        return
    lock = asyncio.Lock()

    async def put_alone(index: int, chunk: Chunk) -> None:
        async with lock:
            await put(index, chunk)

    try:
        async with asyncio.TaskGroup() as group:
            for index, stream in enumerate(streams):
                group.create_task(_pump(index, stream, put_alone))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def _pump(index: int, stream: AsyncGenerator[Chunk], put: Put) -> None:
    async with contextlib.aclosing(stream) as chunks:
        async for chunk in chunks:
            await put(index, chunk)
