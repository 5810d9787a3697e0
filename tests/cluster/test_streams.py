"""Many streams at once on real engines: exact, in order, and cancelled cleanly."""

import asyncio
import contextlib
import random

import pytest
from tokenizers import Tokenizer

from tests.cluster.conftest import Corpus
from tests.support.attach_client import AttachClient
from tests.support.cluster import Site, running
from tests.support.load import PATIENT, Recording, Source, random_prompts
from tests.support.tiny_model import VOCAB_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]


async def test_two_hundred_streams_equal_plain_vllm(site: Site, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Streams of all lengths, half on calls of their own and half in a session, give plain vLLM's tokens and text."""
    router = site.router(["cpu-lp", "cpu-hp"])
    async with running(router, workers=2) as client, client.session() as session:
        sources: list[Source] = [client, session]
        streams = [sources[i % 2].stream(**case.options()) for i, case in enumerate(corpus.mixed)]
        recordings = await asyncio.gather(*(Recording().follow(stream) for stream in streams))
        status = await client.status()
    for case, recording in zip(corpus.mixed, recordings, strict=True):
        recording.check(case.expected, tokenizer)
    assert status.live_requests == 0


async def test_cancelled_streams_leave_the_others_alone(site: Site, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """After fifty of eighty running streams are cancelled at random the engines hold thirty, which end exactly."""
    router = site.router(["cpu-lp", "cpu-hp"])
    async with running(router, workers=2) as client, client.session() as session:
        recordings = [Recording() for _ in corpus.long]
        sources: list[Source] = [client, session]
        tasks = [
            asyncio.create_task(recording.follow(sources[i % 2].stream(**case.options())))
            for i, (recording, case) in enumerate(zip(recordings, corpus.long, strict=True))
        ]
        await asyncio.gather(*(recording.started.wait() for recording in recordings))
        assert not any(task.done() for task in tasks)
        cancelled = set(random.Random(3).sample(range(len(tasks)), 50))
        for index in cancelled:
            tasks[index].cancel()
        while sum(worker.running for worker in (await client.status()).workers) > len(tasks) - len(cancelled):
            assert not any(task.done() for i, task in enumerate(tasks) if i not in cancelled), "slots were not freed"
            await asyncio.sleep(0.01)
        for index, (task, case, recording) in enumerate(zip(tasks, corpus.long, recordings, strict=True)):
            if index in cancelled:
                with contextlib.suppress(asyncio.CancelledError):
                    await task
                assert tuple(recording.token_ids) == case.expected[: len(recording.token_ids)]
            else:
                (await task).check(case.expected, tokenizer)


async def test_cancelling_frees_slots_within_two_steps(site: Site) -> None:
    """Fifty of a hundred streams are cancelled in one step; the engine has let go of them at most two steps later."""
    router = site.router(["slow"])
    prompts = random_prompts(100, (5, 50), seed=4, vocab_size=VOCAB_SIZE)
    async with (
        running(router, workers=1) as client,
        client.session() as session,
        AttachClient(site.fleet.address("slow")) as observer,
    ):
        sources: list[Source] = [client, session]
        recordings = [Recording() for _ in prompts]
        tasks = [
            asyncio.create_task(
                recording.follow(sources[i % 2].stream(token_ids=prompt, tokens_only=True, timeout_s=60, slo=PATIENT))
            )
            for i, (recording, prompt) in enumerate(zip(recordings, prompts, strict=True))
        ]
        await asyncio.gather(*(recording.started.wait() for recording in recordings))
        seen = len(observer.telemetry)
        await observer.until(lambda: len(observer.telemetry) > seen)  # a step has just ended
        before = observer.telemetry[-1]
        assert before.running == 100
        for index in random.Random(5).sample(range(100), 50):
            tasks[index].cancel()
        await observer.until(lambda: observer.telemetry[-1].running <= 50)
        freed = next(step for step in observer.telemetry if step.step > before.step and step.running <= 50)
        assert freed.running == 50
        assert freed.step <= before.step + 2
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await observer.until(lambda: observer.telemetry[-1].running == 0)
