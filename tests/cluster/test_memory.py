"""Memory of the services under many live streams."""

import asyncio
import contextlib

import pytest

from tests.support.cluster import Site, running
from tests.support.load import PATIENT, Case, Recording, Source, random_prompts
from tests.support.tiny_model import VOCAB_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]

LIMIT_BYTES = 250 << 20


async def test_five_hundred_live_streams_fit_in_little_memory(site: Site) -> None:
    """With 500 streams live, half in a session, router and predictor stay below 250 MiB each."""
    router = site.router(["slow"])
    prompts = random_prompts(500, (20, 200), seed=41, vocab_size=VOCAB_SIZE)
    async with running(router, workers=1) as client, client.session() as session:
        sources: list[Source] = [client, session]
        recordings = [Recording() for _ in prompts]
        tasks = [
            asyncio.create_task(
                recording.follow(sources[i % 2].stream(**Case(prompt, (0,) * 400).options(), slo=PATIENT))
            )
            for i, (recording, prompt) in enumerate(zip(recordings, prompts, strict=True))
        ]
        try:
            async with asyncio.timeout(120):
                await asyncio.gather(*(recording.started.wait() for recording in recordings))
            status = await client.status()
            assert status.live_requests == 500
            assert router.rss_bytes() < LIMIT_BYTES
            assert site.predictor.rss_bytes() < LIMIT_BYTES
        finally:
            for task in tasks:
                task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(*tasks, return_exceptions=True)
