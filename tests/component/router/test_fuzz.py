"""Random client messages over real sockets: each is answered or refused by name, and a neighbour does not notice."""

import asyncio
import functools
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ascendra.v1 import inference_pb2
from services.common.errors import InvalidArgument
from services.router.resume import read_cursor, received_tokens, replay_text
from services.router.text import TextCodec, TextStream
from services.router.validation import Limits
from tests.support.local_router import LocalRouter, cluster, text_request, until
from tests.support.messages import messages
from tests.support.scripted_worker import ScriptedWorker

MAX_MODEL_LEN = 96
BATCH = 25
LIMITS = Limits(model_name="tiny", max_model_len=64, vocab_size=512, max_text_bytes=1000, default_max_tokens=8)
CHOSEN_BY_CALLER = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED}
_STATUS = {code.value[0]: code for code in grpc.StatusCode}
TIMING = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.ALREADY_EXISTS}
"""A time limit of a millisecond passes; two requests may draw the same id."""


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests=st.lists(messages(inference_pb2.GenerateRequest), min_size=BATCH, max_size=BATCH))
async def test_generate_requests(tokenizer_directory: Path, requests: list[inference_pb2.GenerateRequest]) -> None:
    """In a session, each start ends with `finished` or an error of the caller's making; nothing stays behind."""
    worker = ScriptedWorker(max_model_len=MAX_MODEL_LEN)
    async with cluster(tokenizer_directory, worker, default_max_tokens=8) as router:
        neighbour = asyncio.create_task(router.collect(text_request(max_tokens=60)))
        async with asyncio.timeout(60):
            ended, codes = await _run_session(router, requests)
            assert len((await neighbour).token_ids) == 60
            await until(lambda: not router.router.dispatcher.live)
        assert ended == set(range(1, len(requests) + 1))
        assert {_STATUS[code] for code in codes} <= CHOSEN_BY_CALLER | TIMING


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(sent=st.lists(messages(inference_pb2.SessionRequest), max_size=BATCH))
async def test_session_messages(tokenizer_directory: Path, sent: list[inference_pb2.SessionRequest]) -> None:
    """Starts and cancels in any order, of any handle: the session ends when its client has closed it."""
    worker = ScriptedWorker(max_model_len=MAX_MODEL_LEN)
    async with cluster(tokenizer_directory, worker, default_max_tokens=8) as router, asyncio.timeout(60):
        async for _ in router.inference.Session(_each(sent)):
            pass
        await until(lambda: not router.router.dispatcher.live)
        assert len((await router.collect(text_request(max_tokens=5))).token_ids) == 5


@settings(max_examples=300, deadline=None)
@given(
    resume=messages(inference_pb2.Resume), prompt=st.binary(max_size=8), stops=st.lists(st.text(min_size=1), max_size=2)
)
def test_resume(tokenizer_directory: Path, resume: inference_pb2.Resume, prompt: bytes, stops: list[str]) -> None:
    """Cursor, tokens and text of a broken stream are taken or refused."""
    codec = _codec(tokenizer_directory)
    for read in (
        lambda: read_cursor(resume.cursor, prompt, "a", b"key"),
        lambda: replay_text(TextStream(codec.decoder(), stops), received_tokens(resume, LIMITS), resume.text_bytes),
    ):
        try:
            read()
        except InvalidArgument as error:
            assert "resume" in str(error)


@functools.cache
def _codec(directory: Path) -> TextCodec:
    return TextCodec(directory)


async def _run_session(router: LocalRouter, requests: list[inference_pb2.GenerateRequest]) -> tuple[set[int], set[int]]:
    """Return the handles that ended and the codes of the errors."""
    starts = [
        inference_pb2.SessionRequest(start=inference_pb2.SessionStart(handle=index, request=request))
        for index, request in enumerate(requests, 1)
    ]
    ended: set[int] = set()
    codes: set[int] = set()
    async for response in router.inference.Session(_each(starts)):
        ended |= {item.handle for item in response.items if item.response.HasField("finished")}
        ended |= {error.handle for error in response.errors}
        codes |= {error.code for error in response.errors}
    return ended, codes


async def _each(sent: list[inference_pb2.SessionRequest]) -> AsyncIterator[inference_pb2.SessionRequest]:
    for message in sent:
        yield message
