"""Streams of the SDK when one of two routers dies under them."""

import asyncio
from typing import Any

import pytest
from tokenizers import Tokenizer

from ascendra import SamplingParams
from tests.cluster.conftest import Corpus
from tests.cluster.load import Recording, Source
from tests.support.cluster import Site, running, until

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]


async def test_streams_survive_the_death_of_a_router(site: Site, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Greedy and sampled streams, on calls and in sessions, go on through the other router as if nothing had been."""
    routers = [site.router(["cpu-lp", "cpu-hp"]) for _ in range(2)]
    greedy = corpus.long[:24]
    sampled: list[dict[str, Any]] = [
        {
            "token_ids": case.prompt,
            "sampling": SamplingParams(temperature=0.8, top_k=40, seed=seed, max_tokens=220, ignore_eos=True),
        }
        for seed, case in enumerate(corpus.long[24:40])
    ]
    async with (
        running(*routers, workers=2) as client,
        client.session() as session,
        client.session() as other_session,
    ):
        for one_session in (session, other_session):  # their streams are opened in turn, one on each router
            await one_session.generate(**greedy[0].options(1))
        calm = await asyncio.gather(*(Recording().follow(client.stream(**options)) for options in sampled))
        sources: list[Source] = [client, session, client, other_session]
        options = [case.options() for case in greedy] + sampled
        recordings = [Recording() for _ in options]
        tasks = [
            asyncio.create_task(recording.follow(sources[i % 4].stream(**one)))
            for i, (recording, one) in enumerate(zip(recordings, options, strict=True))
        ]
        await until(lambda: all(len(recording.token_ids) > 5 for recording in recordings), "tokens on every stream")
        assert not any(task.done() for task in tasks)
        routers[0].kill()
        await asyncio.gather(*tasks)

    for case, recording in zip(greedy, recordings, strict=False):
        recording.check(case.expected, tokenizer)
    for before, after in zip(calm, recordings[len(greedy) :], strict=True):
        assert after.token_ids == before.token_ids
        assert after.text == before.text
    resumed = [recording for recording in recordings if recording.finished and _resumed(recording)]
    in_sessions = [recording for i, recording in enumerate(recordings) if i % 2 and _resumed(recording)]
    assert len(resumed) - len(in_sessions) >= 5
    assert len(in_sessions) >= 5
    assert len(resumed) < len(recordings), "the streams of the router that lived were disturbed"


def _resumed(recording: Recording) -> bool:
    """The router that ended the stream took it over with tokens."""
    assert recording.finished is not None
    return recording.finished.receipt.attempts[0].first_token_offset > 0
