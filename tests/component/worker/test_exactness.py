"""Tokens of a CPU worker under our scheduler against an untouched vLLM, unmoved and continued."""

import asyncio
import functools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from tokenizers import Tokenizer

from ascendra.v1 import common_pb2
from tests.support.attach_client import AttachClient, Stream
from tests.support.tethered_process import REPOSITORY
from tests.support.tiny_model import EOS_TOKEN_ID, VOCAB_SIZE
from tests.support.worker_process import WorkerFleet

pytestmark = pytest.mark.engine

MAX_TOKENS = 40
_random = random.Random(20)
PROMPTS = [[_random.randrange(3, VOCAB_SIZE) for _ in range(_random.randrange(4, 400))] for _ in range(24)]


class Oracle:
    """An untouched vLLM at work on PROMPTS in a process of its own."""

    def __init__(self, model: Path) -> None:
        command = [sys.executable, "-m", "tests.support.plain_vllm", str(model)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=REPOSITORY, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([[prompt, MAX_TOKENS] for prompt in PROMPTS]))
        self.process.stdin.close()
        self.process.stdin = None

    @functools.cached_property
    def _answer(self) -> list[list[int]]:
        answer, errors = self.process.communicate(timeout=110)
        assert self.process.returncode == 0, errors[-2000:]
        return cast("list[list[int]]", json.loads(answer))

    def tokens(self) -> list[list[int]]:
        """Return its tokens, when it is done."""
        return self._answer


@pytest.fixture(scope="module")
def oracle(tiny_model: Path) -> Iterator[Oracle]:
    """The oracle, started before it is needed."""
    started = Oracle(tiny_model)
    yield started
    started.process.kill()
    started.process.wait()


async def run_all(client: AttachClient, streams: list[Stream]) -> list[list[int]]:
    """Wait for requests and return their tokens."""
    await asyncio.gather(*(stream.finish() for stream in streams))
    return [stream.token_ids for stream in streams]


@pytest.mark.parametrize("worker", ["cpu", "cpu-async"])
async def test_tokens_equal_plain_vllm(oracle: Oracle, fleet: WorkerFleet, worker: str) -> None:
    """Concurrent requests under our order and budget give the very tokens of an untouched vLLM, also when continued."""
    async with AttachClient(fleet.address(worker)) as client:
        tokens = await run_all(
            client,
            [client.submit(p, max_tokens=MAX_TOKENS, ttft_ms=500 + 37 * i, tbt_ms=30) for i, p in enumerate(PROMPTS)],
        )
        cuts = [1 + index % (MAX_TOKENS - 1) for index in range(len(PROMPTS))]
        continued = await run_all(
            client,
            [
                client.submit(prompt + generated[:cut], max_tokens=MAX_TOKENS, generated=cut)
                for prompt, generated, cut in zip(PROMPTS, tokens, cuts, strict=True)
            ],
        )
        assert any(step.prefill_tokens and step.decodes for step in client.telemetry), "no step was mixed"
    assert tokens == await asyncio.to_thread(oracle.tokens)
    assert continued == [generated[cut:] for generated, cut in zip(tokens, cuts, strict=True)]
    assert len({tuple(generated) for generated in tokens}) == len(PROMPTS)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
        {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2},
        {"temperature": 0.9, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"temperature": 0.0, "presence_penalty": 1.5, "frequency_penalty": 1.0},
    ],
    ids=lambda fields: "-".join(fields),
)
async def test_sampling_survives_a_move(fleet: WorkerFleet, fields: dict[str, Any]) -> None:
    """A seeded request continued at any cut samples the tokens it would have sampled unmoved."""

    def sampling(seed: int) -> common_pb2.SamplingParameters:
        return common_pb2.SamplingParameters(seed=seed, ignore_eos=True, **fields)

    async with AttachClient(fleet.address("cpu")) as client:
        prompts = PROMPTS[:8]
        tokens = await run_all(
            client, [client.submit(p, max_tokens=24, sampling=sampling(i)) for i, p in enumerate(prompts)]
        )
        cuts = [3 * (index + 1) - 2 for index in range(len(prompts))]
        continued = await run_all(
            client,
            [
                client.submit(prompts[i] + tokens[i][:cut], max_tokens=24, generated=cut, sampling=sampling(i))
                for i, cut in enumerate(cuts)
            ],
        )
        other = await client.submit(prompts[0], max_tokens=24, sampling=sampling(99)).finish()
    assert continued == [generated[cut:] for generated, cut in zip(tokens, cuts, strict=True)]
    assert (other.token_ids != tokens[0]) == (fields["temperature"] > 0)


async def test_ends_are_reported(fleet: WorkerFleet) -> None:
    """A stop token ends a request as STOP and is named; max_tokens and the context's end are LENGTH."""
    async with AttachClient(fleet.address("cpu")) as client:
        free = await client.submit(PROMPTS[0], max_tokens=8).finish()
        stop = free.token_ids[4]
        sampling = common_pb2.SamplingParameters(temperature=0.0, ignore_eos=True, stop_token_ids=[stop])
        stopped = await client.submit(PROMPTS[0], max_tokens=8, sampling=sampling).finish()
        clipped = await client.submit((PROMPTS[0] * 600)[:1020], max_tokens=100).finish()
        biased = common_pb2.SamplingParameters(temperature=0.0, logit_bias={EOS_TOKEN_ID: 100.0})
        ended = await client.submit(PROMPTS[1], max_tokens=8, sampling=biased).finish()
    assert stopped.token_ids == free.token_ids[: free.token_ids.index(stop) + 1]
    assert stopped.ended is not None
    assert (stopped.ended.reason, stopped.ended.stop_token_id) == (common_pb2.FINISH_REASON_STOP, stop)
    assert clipped.ended is not None
    assert (len(clipped.token_ids), clipped.ended.reason) == (4, common_pb2.FINISH_REASON_LENGTH)
    assert ended.ended is not None
    assert (ended.ended.reason, ended.ended.stop_token_id) == (common_pb2.FINISH_REASON_STOP, EOS_TOKEN_ID)


async def test_logprobs(fleet: WorkerFleet) -> None:
    """Each position carries the sampled token's log-probability and as many of the likeliest as were asked for."""
    async with AttachClient(fleet.address("cpu")) as client:
        sampling = common_pb2.SamplingParameters(temperature=0.0, ignore_eos=True, logprobs=3)
        stream = await client.submit(PROMPTS[2], max_tokens=6, sampling=sampling).finish()
    assert [position.sampled.token_id for position in stream.logprobs] == stream.token_ids
    for position in stream.logprobs:
        assert [entry.rank for entry in position.top] == [1, 2, 3]
        assert position.top[0].token_id == position.sampled.token_id
        assert position.top[0].logprob >= position.top[1].logprob >= position.top[2].logprob


async def test_guided_decoding(fleet: WorkerFleet, tiny_model: Path) -> None:
    """A regular expression holds for the generated text."""
    async with AttachClient(fleet.address("cpu")) as client:
        sampling = common_pb2.SamplingParameters(
            temperature=0.0, structured_output=common_pb2.StructuredOutput(regex="[ab]{3}c")
        )
        stream = await client.submit(PROMPTS[3], max_tokens=8, sampling=sampling).finish()
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    text = tokenizer.decode(stream.token_ids, skip_special_tokens=True)
    assert len(text) == 4
    assert set(text[:3]) <= {"a", "b"}
    assert text[3] == "c"
