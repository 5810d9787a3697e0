"""Requests that must be refused, beside a stream that must not notice."""

import asyncio
import math
import struct
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from tokenizers import Tokenizer

from ascendra.v1 import common_pb2, inference_pb2, inference_pb2_grpc
from services.common.channels import open_channel
from tests.cluster.conftest import Corpus
from tests.support.cluster import Site, running
from tests.support.load import Recording
from tests.support.tiny_model import VOCAB_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]

STATUS_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}
INVALID, NOT_FOUND, EXHAUSTED = "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"
Request = inference_pb2.GenerateRequest


def ids(*token_ids: int) -> inference_pb2.TokenPrompt:
    """Return a prompt of ids."""
    return inference_pb2.TokenPrompt(token_ids=struct.pack(f"<{len(token_ids)}I", *token_ids))


def sampling(**fields: Any) -> Request:
    """Return a request that is right but for its sampling parameters."""
    return Request(tokens=ids(5, 6), sampling=common_pb2.SamplingParameters(**fields))


def slo(ttft_ms: float, tbt_ms: float) -> Request:
    """Return a request that is right but for its objective."""
    return Request(tokens=ids(5, 6), slo=common_pb2.Slo(ttft_ms=ttft_ms, tbt_ms=tbt_ms))


Bad = tuple[Callable[[], Request], str, tuple[str, ...]]
BAD: dict[str, Bad] = {
    "no prompt": (lambda: Request(), INVALID, ("prompt",)),
    "empty text": (lambda: Request(text=""), INVALID, ("text",)),
    "no ids": (lambda: Request(tokens=ids()), INVALID, ("token_ids",)),
    "half an id": (lambda: Request(tokens=inference_pb2.TokenPrompt(token_ids=b"abc")), INVALID, ("token_ids", "3")),
    "no messages": (lambda: Request(chat=inference_pb2.ChatPrompt()), INVALID, ("chat.messages",)),
    "ids over the context": (lambda: Request(tokens=ids(*[5] * 1024)), INVALID, ("prompt", "1024")),
    "text over the context": (lambda: Request(text="x " * 5000), INVALID, ("prompt", "1024")),
    "5 MiB of text": (lambda: Request(text="x" * (5 << 20)), EXHAUSTED, ("text", str(1 << 20))),
    "id out of the vocabulary": (lambda: Request(tokens=ids(5, VOCAB_SIZE)), INVALID, ("token_ids", str(VOCAB_SIZE))),
    "largest id": (lambda: Request(tokens=ids(2**32 - 1)), INVALID, ("token_ids", str(VOCAB_SIZE))),
    "unknown model": (lambda: Request(tokens=ids(5), model="gpt-9"), NOT_FOUND, ("model", "gpt-9")),
    "id with a blank": (lambda: Request(tokens=ids(5), request_id="a b"), INVALID, ("request_id", "128")),
    "long id": (lambda: Request(tokens=ids(5), request_id="x" * 129), INVALID, ("request_id", "128")),
    "negative temperature": (lambda: sampling(temperature=-0.1), INVALID, ("temperature", "0")),
    "temperature nan": (lambda: sampling(temperature=math.nan), INVALID, ("temperature", "2")),
    "huge temperature": (lambda: sampling(temperature=1e300), INVALID, ("temperature", "2")),
    "top_p 0": (lambda: sampling(top_p=0.0), INVALID, ("top_p", "1")),
    "top_p nan": (lambda: sampling(top_p=math.nan), INVALID, ("top_p", "1")),
    "top_p above 1": (lambda: sampling(top_p=1.5), INVALID, ("top_p", "1")),
    "top_k -2": (lambda: sampling(top_k=-2), INVALID, ("top_k", "-1")),
    "min_p inf": (lambda: sampling(min_p=math.inf), INVALID, ("min_p", "1")),
    "presence_penalty -3": (lambda: sampling(presence_penalty=-3), INVALID, ("presence_penalty", "2")),
    "frequency_penalty nan": (lambda: sampling(frequency_penalty=math.nan), INVALID, ("frequency_penalty", "2")),
    "repetition_penalty 0": (lambda: sampling(repetition_penalty=0), INVALID, ("repetition_penalty", "0")),
    "max_tokens 0": (lambda: sampling(max_tokens=0), INVALID, ("max_tokens", "1")),
    "min_tokens over max_tokens": (lambda: sampling(max_tokens=4, min_tokens=5), INVALID, ("min_tokens", "4")),
    "10,000 stops": (lambda: sampling(stop=[b"x"] * 10_000), INVALID, ("stop", "16")),
    "empty stop": (lambda: sampling(stop=[b""]), INVALID, ("stop[0]", "256")),
    "long stop": (lambda: sampling(stop=[b"x" * 257]), INVALID, ("stop[0]", "256")),
    "stop not UTF-8": (lambda: sampling(stop=[b"ok", b"\xff\xfe"]), INVALID, ("stop[1]", "UTF-8")),
    "stop id out of range": (lambda: sampling(stop_token_ids=[VOCAB_SIZE]), INVALID, ("stop_token_ids", "512")),
    "too many stop ids": (lambda: sampling(stop_token_ids=[5] * 129), INVALID, ("stop_token_ids", "128")),
    "logprobs 21": (lambda: sampling(logprobs=21), INVALID, ("logprobs", "20")),
    "bias out of range": (lambda: sampling(logit_bias={VOCAB_SIZE + 1: 1.0}), INVALID, ("logit_bias", "512")),
    "bias nan": (lambda: sampling(logit_bias={5: math.nan}), INVALID, ("logit_bias", "100")),
    "zero objective": (lambda: slo(0, 0), INVALID, ("slo", "ttft_ms")),
    "objective nan": (lambda: slo(math.nan, 50), INVALID, ("slo.ttft_ms",)),
    "negative objective": (lambda: slo(500, -1), INVALID, ("slo.tbt_ms", "0")),
    "endless objective": (lambda: slo(math.inf, 50), INVALID, ("slo.ttft_ms",)),
    "unknown class": (lambda: Request(tokens=ids(5), slo_class="gold"), INVALID, ("slo_class", "default")),
    "unknown sink": (lambda: Request(tokens=ids(5), sinks=["nowhere"]), NOT_FOUND, ("sinks", "nowhere")),
    "priority 101": (lambda: Request(tokens=ids(5), priority=101), INVALID, ("priority", "100")),
}


async def by_call(stub: "inference_pb2_grpc.InferenceServiceAsyncStub", request: Request) -> tuple[str, str]:
    """Return status and message of a request on a call of its own."""
    call = stub.Generate(request, timeout=60)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return caught.value.code().name, caught.value.details() or ""


async def by_session(
    stub: "inference_pb2_grpc.InferenceServiceAsyncStub", requests: list[Request]
) -> dict[int, tuple[str, str]]:
    """Return status and message of requests in one session, by their position."""
    call = stub.Session(None, timeout=60)
    errors: dict[int, tuple[str, str]] = {}
    for position, request in enumerate(requests):
        start = inference_pb2.SessionStart(handle=position + 1, request=request)
        await call.write(inference_pb2.SessionRequest(start=start))
    await call.done_writing()
    async for response in call:
        assert not response.items
        assert not response.tokens.handles
        errors |= {error.handle - 1: (STATUS_NAMES[error.code], error.message) for error in response.errors}
    return errors


async def test_bad_requests_are_refused_by_field_and_limit(site: Site, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Each is refused with its status, field and limit, on a call and in a session; a stream beside them is exact."""
    router = site.router(["cpu-lp", "cpu-hp"])
    async with running(router, workers=2) as client, open_channel(router.address) as channel:
        stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        neighbours = [asyncio.create_task(Recording().follow(client.stream(**c.options()))) for c in corpus.long[:4]]
        wrong = []
        in_session = await by_session(stub, [make() for make, _, _ in BAD.values()])
        for position, (name, (make, status, words)) in enumerate(BAD.items()):
            for code, message in (await by_call(stub, make()), in_session[position]):
                if code != status or not all(word in message for word in words):
                    wrong.append(f"{name}: {code} {message[:200]}, not {status} with {words}")
        assert wrong == []
        for case, task in zip(corpus.long, neighbours, strict=False):
            (await task).check(case.expected, tokenizer)
        status_after = await client.status()
        assert status_after.live_requests == 0
        assert len(status_after.workers) == 2
        after = await Recording().follow(client.stream(**corpus.long[5].options()))
        after.check(corpus.long[5].expected, tokenizer)


async def test_limits_that_are_no_errors(site: Site) -> None:
    """More tokens than the context holds are as many as it holds; an id in use is refused while it is."""
    router = site.router(["cpu-lp", "cpu-hp"])
    async with running(router, workers=2) as client, open_channel(router.address) as channel:
        stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
        parameters = common_pb2.SamplingParameters(temperature=0, max_tokens=2**32 - 1, ignore_eos=True)
        request = Request(tokens=ids(*[5] * 1000), sampling=parameters, request_id="mine", tokens_only=True)
        messages = aiter(stub.Generate(request, timeout=60))
        received = [await anext(messages)]
        assert await by_call(stub, request) == ("ALREADY_EXISTS", "request_id 'mine' is being served")
        received += [message async for message in messages]
        assert sum(len(message.token_ids) for message in received) == 24
        assert received[-1].finished.reason == common_pb2.FINISH_REASON_LENGTH
        assert (await client.status()).live_requests == 0
