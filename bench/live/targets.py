"""What load is sent to: one request in, the number of tokens in each piece that comes back."""

import contextlib
import json
import random
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Protocol

import httpx

from ascendra import AsyncClient, SamplingParams, Slo
from ascendra.errors import AscendraError, ResourceExhaustedError
from ascendra.session import Session
from bench.workloads import MOONCAKE_BLOCK_TOKENS, WorkloadRequest

FIRST_TOKEN_ID = 16
"""Smaller ids tend to be special in small test models."""


class RefusedError(Exception):
    """The system refused the request for lack of capacity."""


class FailedError(Exception):
    """The request failed."""


class Target(Protocol):
    """A system under load."""

    def send(self, request: WorkloadRequest, prompt: list[int]) -> AsyncGenerator[int]:
        """Yield the number of tokens of each piece of the answer. Raises RefusedError or FailedError."""
        ...


def prompt_of(request: WorkloadRequest, vocab_size: int, seed: int) -> list[int]:
    """Return token ids for a request: random, but equal where the trace says that prefixes are equal."""
    ids: list[int] = []
    for block in request.prefix_hashes:
        draw = random.Random(f"{seed}:block:{block}")
        ids += draw.choices(range(FIRST_TOKEN_ID, vocab_size), k=MOONCAKE_BLOCK_TOKENS)
    draw = random.Random(f"{seed}:{request.request_id}")
    missing = request.prompt_tokens - len(ids)
    return ids[: request.prompt_tokens] + draw.choices(range(FIRST_TOKEN_ID, vocab_size), k=max(missing, 0))


class AscendraTarget:
    """A router, through one Session of the SDK."""

    def __init__(self, session: Session, *, timeout_s: float) -> None:
        self.homes: dict[str, str] = {}
        """By id of a finished request whose tokens all come from one worker: that worker."""
        self._session = session
        self._timeout_s = timeout_s

    async def send(self, request: WorkloadRequest, prompt: list[int]) -> AsyncGenerator[int]:
        """Stream token ids only."""
        chunks = self._session.stream(
            token_ids=prompt,
            sampling=SamplingParams(temperature=0.0, max_tokens=request.output_tokens, ignore_eos=True),
            slo=Slo(ttft_ms=request.slo.ttft_s * 1e3, tbt_ms=request.slo.tbt_s * 1e3),
            tokens_only=True,
            timeout_s=self._timeout_s,
        )
        try:
            async with contextlib.aclosing(chunks):
                async for chunk in chunks:
                    yield len(chunk.token_ids)
                    if chunk.finished is not None:
                        attempts = chunk.finished.receipt.attempts
                        if not any(attempt.first_token_offset for attempt in attempts):
                            self.homes[request.request_id] = attempts[-1].worker_id
        except ResourceExhaustedError as error:
            raise RefusedError(error.message) from error
        except AscendraError as error:
            raise FailedError(f"{error.code.name}: {error.message}") from error


@contextlib.asynccontextmanager
async def ascendra_target(addresses: list[str], *, timeout_s: float) -> AsyncIterator[AscendraTarget]:
    """Open a session to one or several routers."""
    async with AsyncClient(addresses) as client, client.session() as session:
        yield AscendraTarget(session, timeout_s=timeout_s)


class OpenAiTarget:
    """Any server with /v1/completions; one token a chunk, as vLLM sends them."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client = client
        self._model = model

    async def send(self, request: WorkloadRequest, prompt: list[int]) -> AsyncGenerator[int]:
        """Stream completions over SSE."""
        body = {
            "model": self._model,
            "prompt": prompt,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        headers = {
            "x-slo-ttft-ms": f"{request.slo.ttft_s * 1e3:g}",
            "x-slo-tpot-ms": f"{request.slo.tbt_s * 1e3:g}",
        }
        try:
            async with self._client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
                if response.status_code == httpx.codes.TOO_MANY_REQUESTS:
                    raise RefusedError("429")
                if response.status_code != httpx.codes.OK:
                    raise FailedError(f"HTTP {response.status_code}: {(await response.aread())[:200]!r}")
                async for line in response.aiter_lines():
                    if line.startswith("data: ") and line != "data: [DONE]":
                        yield self._tokens_in(json.loads(line.removeprefix("data: ")))
        except (httpx.HTTPError, ValueError) as error:  # the latter: an event that is not JSON
            raise FailedError(f"{type(error).__name__}: {error}") from error

    @staticmethod
    def _tokens_in(event: dict[str, object]) -> int:
        if "error" in event:
            raise FailedError(str(event["error"]))
        return 1 if event.get("choices") else 0


@contextlib.asynccontextmanager
async def openai_target(url: str, model: str, *, timeout_s: float) -> AsyncIterator[OpenAiTarget]:
    """Open a connection pool without a limit, so that the client never queues."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout_s, trust_env=False) as client:
        yield OpenAiTarget(client, model)
