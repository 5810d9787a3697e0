"""Waiting requests that change pools: offloaded from LP before they miss, or drawn to an idle HP by tickets."""

import asyncio
import contextlib
import functools
from collections.abc import Sequence

import pytest
from tokenizers import Tokenizer

from ascendra import AsyncClient, Role, Slo
from tests.support.attach_client import AttachClient
from tests.support.cluster import Site, running
from tests.support.load import Case, Recording, random_prompts
from tests.support.tiny_model import VOCAB_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]

WORKERS = ["lp-0", "lp-1", "hp"]
TOKENS = 20


async def burst(client: AsyncClient, prompts: Sequence[tuple[int, ...]], slo: Slo) -> list[Recording]:
    """Send all prompts at once."""
    asked = [
        Case(prompt, (0,) * TOKENS).options() | {"slo": slo, "request_id": f"b{i}"} for i, prompt in enumerate(prompts)
    ]
    return list(await asyncio.gather(*(Recording().follow(client.stream(**options)) for options in asked)))


async def pair_by_pair(client: AsyncClient, prompts: Sequence[tuple[int, ...]]) -> list[list[int]]:
    """Return the tokens of each prompt, run where nothing waits: one on each LP at a time."""
    recordings: list[Recording] = []
    for pair in zip(prompts[::2], prompts[1::2], strict=True):
        streams = [client.stream(**Case(prompt, (0,) * TOKENS).options()) for prompt in pair]
        recordings += await asyncio.gather(*(Recording().follow(stream) for stream in streams))
    return [recording.token_ids for recording in recordings]


async def test_requests_at_risk_are_offloaded_once(site: Site, tokenizer: Tokenizer) -> None:
    """In a burst of long prompts some leave LP for HP in time; every token is computed once and is the right one."""
    prompts = random_prompts(16, (5000, 7000), seed=21, vocab_size=VOCAB_SIZE)
    router = site.router(WORKERS, tickets=False, rescue=False, hp_fill=0.0)
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(running(router, workers=3))
        observers = [
            await stack.enter_async_context(AttachClient(site.fleet.address(worker_id), f"observer-{worker_id}"))
            for worker_id in WORKERS
        ]
        recordings = await burst(client, prompts, Slo(ttft_ms=3000, tbt_ms=200))
        explained = [await client.explain(f"b{index}") for index in range(len(prompts))]
        counters = (await client.status()).counters
        for observer in observers:
            await observer.until(functools.partial(_is_idle, observer))
        computed = sum(step.prefill_tokens + step.decodes for o in observers for step in o.telemetry)
        for prompt_tokens, recording in zip(await pair_by_pair(client, prompts), recordings, strict=True):
            recording.check(prompt_tokens, tokenizer)

    offloaded = [index for index, recording in enumerate(recordings) if "hp" in recording.workers]
    assert offloaded
    assert counters["offloads"] == len(offloaded)
    for index in offloaded:
        receipt = recordings[index].finished.receipt  # type: ignore[union-attr]
        assert [attempt.role for attempt in receipt.attempts] == [Role.LOW, Role.HIGH]
        assert receipt.attempts[1].reason.startswith("offload: ")
        assert receipt.pool is Role.HIGH
        decisions = {decision.kind: decision for decision in explained[index].decisions}
        offload = decisions["offload"]
        assert offload.rule
        assert (offload.from_worker_id, offload.to_worker_id) == (receipt.attempts[0].worker_id, "hp")
        assert offload.predicted_ttft_s > 0
        assert offload.candidates[0].worker_id == offload.from_worker_id
        assert "hp" in {c.worker_id for c in offload.candidates}
        place = decisions["place"]
        assert place.rule
        assert {candidate.worker_id for candidate in place.candidates} == set(WORKERS)
        assert next(c for c in place.candidates if c.worker_id == "hp").excluded
    for explanation, recording in zip(explained, recordings, strict=True):
        assert explanation.state == "finished"
        assert [attempt.worker_id for attempt in explanation.receipt.attempts] == recording.workers
    stayed = [recording for recording in recordings if "hp" not in recording.workers]
    assert all(len(recording.workers) == 1 for recording in stayed)
    assert computed == sum(len(prompt) + TOKENS - 1 for prompt in prompts)


async def test_an_idle_hp_draws_work_by_tickets(site: Site, tokenizer: Tokenizer) -> None:
    """Where nothing is at risk, an idle HP still takes waiting LP requests, on tickets."""
    prompts = random_prompts(12, (3000, 4000), seed=22, vocab_size=VOCAB_SIZE)
    router = site.router(WORKERS, offload=False, rescue=False, hp_fill=0.0)
    async with running(router, workers=3) as client:
        recordings = await burst(client, prompts, Slo(ttft_ms=30_000, tbt_ms=200))
        counters = (await client.status()).counters
        for prompt_tokens, recording in zip(await pair_by_pair(client, prompts), recordings, strict=True):
            recording.check(prompt_tokens, tokenizer)
    drawn = [recording for recording in recordings if "hp" in recording.workers]
    assert drawn
    assert counters["tickets"] == len(drawn)
    assert counters["offloads"] == 0
    for recording in drawn:
        assert recording.finished is not None
        assert recording.finished.receipt.attempts[-1].reason.startswith("ticket: ")
        assert recording.finished.receipt.pool is Role.HIGH
        assert not recording.moved_running


def _is_idle(observer: AttachClient) -> bool:
    return not observer.telemetry or not observer.telemetry[-1].running
