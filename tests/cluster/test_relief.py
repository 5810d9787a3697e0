"""Running streams that leave a worker whose steps are too long for their objective, on the emulated engine."""

import asyncio

import pytest
from tokenizers import Tokenizer

from ascendra import Slo
from tests.support.cluster import Site, running
from tests.support.load import Recording, random_prompts, undisturbed
from tests.support.tiny_model import VOCAB_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]

TIGHT, LOOSE = Slo(ttft_ms=60_000, tbt_ms=200), Slo(ttft_ms=60_000, tbt_ms=30_000)


async def test_streams_leave_a_worker_with_long_steps(site: Site, tokenizer: Tokenizer) -> None:
    """Of the streams on a worker with steps of 0.4 s those that need 0.2 s go on elsewhere, exactly; others stay."""
    prompts = random_prompts(6, (20, 300), seed=61, vocab_size=VOCAB_SIZE)
    async with running(site.router(["lp-0"]), workers=1) as client:
        cases = await undisturbed(client, prompts, 40)
    policy = {"settle-s": 1.0}
    router = site.router(["slow", "lp-0"], placement="round_robin", relief_policy=policy, rescue=False)
    async with running(router, workers=2) as client:
        recordings = await asyncio.gather(
            *(
                Recording().follow(client.stream(**case.options(), slo=LOOSE if number < 2 else TIGHT))
                for number, case in enumerate(cases)
            )
        )
        counters = (await client.status()).counters
    for case, recording in zip(cases, recordings, strict=True):
        recording.check(case.expected, tokenizer)
    began_slow = [number for number, recording in enumerate(recordings) if recording.workers[0] == "slow"]
    assert len(began_slow) == 3
    for number, recording in enumerate(recordings):
        assert recording.finished is not None
        attempts = recording.finished.receipt.attempts
        if number in began_slow and number >= 2:
            assert recording.workers == ["slow", "lp-0"]
            assert attempts[1].reason.startswith("relief: ")
        else:
            assert len(attempts) == 1
    assert counters["reliefs"] == len([number for number in began_slow if number >= 2])
