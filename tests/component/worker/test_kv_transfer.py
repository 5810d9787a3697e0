"""Running requests that leave a CPU worker with their KV cache: the tokens, and the blocks in every outcome."""

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from ascendra.v1 import common_pb2
from tests.support.attach_client import AttachClient, Stream
from tests.support.tiny_model import VOCAB_SIZE
from tests.support.worker_process import WorkerFleet, is_running

pytestmark = pytest.mark.engine

BLOCK_TOKENS = 128
MAX_TOKENS = 120  # far beyond the cuts: a request that ends first cannot move
_random = random.Random(41)
_CUTS = [1, 2, 5, 9, 17, 30]
# Cuts before, at and after the end of a KV block, and anywhere.
_LENGTHS = [BLOCK_TOKENS - cut + extra for cut in _CUTS for extra in (-1, 0, 1)] + [300, 400, 500]
PROMPTS = [[_random.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in _LENGTHS]
CUTS = [cut for cut in _CUTS for _ in range(3)] + [7, 11, 13]
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 0.9, "top_p": 0.95, "presence_penalty": 0.5, "frequency_penalty": 0.3},
}


def sampling(fields: dict[str, Any], seed: int = 0) -> common_pb2.SamplingParameters:
    """Return parameters of a request that runs to its token limit."""
    return common_pb2.SamplingParameters(seed=seed, ignore_eos=True, **fields)


@asynccontextmanager
async def attached(fleet: WorkerFleet, *workers: str) -> AsyncIterator[list[AttachClient]]:
    """Attach to workers."""
    clients = [AttachClient(fleet.address(worker)) for worker in workers]
    for client in clients:
        await client.__aenter__()
    try:
        yield clients
    finally:
        for client in clients:
            await client.close()


async def after(client: AttachClient, stream: Stream, tokens: int) -> None:
    """Wait until a request has so many tokens."""
    await client.until(lambda: len(stream.token_ids) >= tokens)


async def moved(
    source: AttachClient, target: AttachClient, prompt: list[int], cut: int, parameters: common_pb2.SamplingParameters
) -> tuple[Stream, Stream, list[int]]:
    """Run a request at one worker up to a cut, move it, and return both streams and the tokens before the cut."""
    first = source.submit(prompt, max_tokens=MAX_TOKENS, sampling=parameters)
    await after(source, first, cut)
    answer = await source.export_kv(first)
    assert answer.refused == ""
    before = list(first.token_ids)
    assert answer.next_offset == len(before)
    second = target.submit(
        prompt + before,
        max_tokens=MAX_TOKENS,
        generated=len(before),
        sampling=parameters,
        kv_handle=answer.kv_handle,
    )
    return first, second, before


@pytest.mark.parametrize(("source", "target"), [("cpu", "cpu-async"), ("cpu-async", "cpu")])
@pytest.mark.parametrize("fields", SAMPLINGS.values(), ids=SAMPLINGS)
async def test_moved_streams_are_exact(fleet: WorkerFleet, source: str, target: str, fields: dict[str, Any]) -> None:
    """Many at once, cut anywhere: the tokens of an unmoved run, without prefill at the target, all blocks free."""
    async with attached(fleet, source, target) as (one, two):
        assert one.welcome.kv_transfer.bytes_per_token > 0
        assert one.welcome.kv_transfer.compatibility == two.welcome.kv_transfer.compatibility
        parameters = [sampling(fields, seed) for seed in range(len(PROMPTS))]
        unmoved = [
            one.submit(prompt, max_tokens=MAX_TOKENS, sampling=p) for prompt, p in zip(PROMPTS, parameters, strict=True)
        ]
        await asyncio.gather(*(stream.finish() for stream in unmoved))
        steps = len(two.telemetry)
        moves = await asyncio.gather(*(moved(one, two, *case) for case in zip(PROMPTS, CUTS, parameters, strict=True)))
        for expected, (_, second, before) in zip(unmoved, moves, strict=True):
            await second.finish()
            assert before + second.token_ids == expected.token_ids
        assert not any(step.prefill_tokens for step in two.telemetry[steps:])
        assert not any(step.kv_failed_handles for step in two.steps)
        one.release_kv(*(first for first, _, _ in moves))
        await asyncio.gather(one.kv_free(), two.kv_free())


async def test_only_what_decodes_is_handed_over(fleet: WorkerFleet) -> None:
    """A request in prefill, one that ended and one that never was are refused, and disturb nobody."""
    async with attached(fleet, "cpu") as (client,):
        ended = await client.submit(PROMPTS[0], max_tokens=2).finish()
        assert (await client.export_kv(ended)).refused
        assert (await client.export_kv(Stream(999, 0.0))).refused
        waiting = [client.submit(prompt * 2, max_tokens=4) for prompt in PROMPTS]
        assert (await client.export_kv(waiting[-1])).refused
        for stream in waiting:
            await stream.finish()
            assert len(stream.token_ids) == 4
        await client.kv_free()


async def test_what_cannot_be_read_is_computed(fleet: WorkerFleet) -> None:
    """A handle of nonsense, or of another request, is reported; the tokens are those of an unmoved run."""
    async with attached(fleet, "cpu", "cpu-async") as (one, two):
        expected = await two.submit(PROMPTS[0], max_tokens=MAX_TOKENS).finish()
        first = one.submit(PROMPTS[1], max_tokens=MAX_TOKENS)
        await after(one, first, 3)
        answer = await one.export_kv(first)
        for handle in (b"nonsense", b"{}", answer.kv_handle):
            stream = await two.submit(PROMPTS[0], max_tokens=MAX_TOKENS, kv_handle=handle).finish()
            assert stream.token_ids == expected.token_ids
            assert any(stream.handle in step.kv_failed_handles for step in two.steps)
        one.release_kv(first)
        await asyncio.gather(one.kv_free(), two.kv_free())


async def test_blocks_that_nobody_reads_are_freed(fleet: WorkerFleet) -> None:
    """When the router says so, or when the lease is over; never before."""
    async with attached(fleet, "kv-source") as (client,):
        lease_s = client.welcome.kv_transfer.lease_ms / 1000
        for release in (True, False):
            stream = client.submit(PROMPTS[-1], max_tokens=MAX_TOKENS)
            await after(client, stream, 4)
            seen = len(client.messages)
            assert (await client.export_kv(stream)).refused == ""
            exported_s = time.monotonic()
            await client.until(lambda seen=seen: len(client.since(seen, "heartbeat")) >= 2)  # type: ignore[misc]
            assert client.since(seen, "heartbeat")[-1].kv_usage > 0
            if release:
                client.release_kv(stream)
            await client.kv_free()
            assert release or time.monotonic() - exported_s > lease_s - 1


@pytest.mark.parametrize("how", ["cancel", "router gone"])
async def test_a_move_that_is_given_up_leaves_no_blocks(fleet: WorkerFleet, how: str) -> None:
    """Cancelled at the target before it has read anything, or with the router: both workers are empty afterwards."""
    async with attached(fleet, "cpu", "cpu-async", "cpu-async") as (one, two, leaving):
        firsts = []
        for prompt in PROMPTS[-3:]:
            first, second, _ = await moved(one, leaving, prompt, 3, sampling(SAMPLINGS["greedy"]))
            firsts.append(first)
            if how == "cancel":
                leaving.cancel(second)
                await leaving.until(lambda second=second: second.cancelled)  # type: ignore[misc]
        if how == "router gone":
            await leaving.close()
        one.release_kv(*firsts)
        await asyncio.gather(one.kv_free(), two.kv_free())


async def test_death_of_the_source_in_mid_move(fleet: WorkerFleet) -> None:
    """What a dead worker kept is computed: exactly, reported, no block left; a peer that was met before fails fast."""
    parameters = sampling(SAMPLINGS["random"], 5)
    prompt = PROMPTS[-1]
    core = fleet.engine_core_pid("kv-source")
    async with attached(fleet, "cpu") as (target,):
        expected = await target.submit(prompt, max_tokens=MAX_TOKENS, sampling=parameters).finish()
        source = AttachClient(fleet.address("kv-source"))
        await source.__aenter__()
        first, met, _ = await moved(source, target, prompt, 3, parameters)
        await met.finish()
        source.release_kv(first)
        again = source.submit(prompt, max_tokens=MAX_TOKENS, sampling=parameters)
        await after(source, again, 3)
        answer = await source.export_kv(again)
        before = list(again.token_ids)
        os.kill(core, signal.SIGKILL)
        while is_running(core):  # noqa: ASYNC110 - the kernel offers no event here
            await asyncio.sleep(0.01)
        began_s = time.monotonic()
        second = target.submit(
            prompt + before,
            max_tokens=MAX_TOKENS,
            generated=len(before),
            sampling=parameters,
            kv_handle=answer.kv_handle,
        )
        await asyncio.wait_for(second.first_token.wait(), 30)
        took_s = time.monotonic() - began_s
        await second.finish()
        assert before + second.token_ids == expected.token_ids
        assert any(second.handle in step.kv_failed_handles for step in target.steps)
        assert took_s < 4  # a peer that was never met costs five seconds
        await target.kv_free()
        await source.close()
