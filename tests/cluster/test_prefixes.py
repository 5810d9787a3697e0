"""Requests with a common beginning: the router sends them to who holds it, and plans with what is left of them."""

import asyncio

import pytest

from ascendra import AsyncClient, Slo
from services.router.request import PREFIX_BLOCK_TOKENS
from tests.support.cluster import Site, running
from tests.support.load import Case, Recording, random_prompts
from tests.support.tiny_model import VOCAB_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(200)]

WORKERS = ["lp-0", "lp-1"]
BLOCK_TOKENS = 16
"""Of the emulated workers' KV caches."""


async def turn(client: AsyncClient, prompt: tuple[int, ...], request_id: str) -> Recording:
    """Run a request to its end."""
    options = Case(prompt, (0,) * 160).options() | {"slo": Slo(ttft_ms=5000, tbt_ms=200), "request_id": request_id}
    return await Recording().follow(client.stream(**options))


async def test_a_conversation_returns_to_its_kv_cache(site: Site) -> None:
    """Each turn goes where the ones before were computed, prompt and completion, whoever has less to do."""
    prompts = random_prompts(4, (3000, 3200), seed=31, vocab_size=VOCAB_SIZE)
    added = random_prompts(4, (200, 200), seed=32, vocab_size=VOCAB_SIZE)
    async with running(site.router(WORKERS, tickets=False), workers=2) as client:
        first = await asyncio.gather(*(turn(client, prompt, f"first-{n}") for n, prompt in enumerate(prompts)))
        owners = [recording.workers[0] for recording in first]
        assert set(owners) == set(WORKERS)
        histories = {}
        for number, prompt in enumerate(prompts):
            history = (*prompt, *added[number])
            second = await turn(client, history, f"second-{number}")
            assert second.workers == [owners[number]]
            assert second.finished is not None
            assert second.finished.usage.cached_prompt_tokens == _blocks(len(prompt))
            histories[number] = (*history, *second.token_ids, *added[number])
        for number, history in histories.items():
            third = await turn(client, history, f"third-{number}")
            assert third.workers == [owners[number]]
            assert third.finished is not None
            # What was generated is in the cache as well, but for its last token.
            found = third.finished.usage.cached_prompt_tokens
            assert found == _blocks(len(history) - len(added[number]) - 1)
            place = (await client.explain(f"third-{number}")).decisions[0]
            cached = {candidate.worker_id: candidate.cached_tokens for candidate in place.candidates}
            assert found - PREFIX_BLOCK_TOKENS < cached.pop(owners[number]) <= found
            assert set(cached.values()) == {0}
            predicted_s = {candidate.worker_id: candidate.predicted_ttft_s for candidate in place.candidates}
            assert predicted_s.pop(owners[number]) < 0.5 * min(predicted_s.values())


def _blocks(tokens: int) -> int:
    """Return the tokens in full blocks."""
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS
