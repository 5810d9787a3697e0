"""Streams of the SDK when one of two routers dies under them."""

import asyncio
import dataclasses
import re
from typing import Any

import pytest
from tokenizers import Tokenizer

from ascendra import SamplingParams
from tests.cluster.conftest import Corpus
from tests.support.cluster import Site, running, until
from tests.support.load import Case, Recording, Source

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]


async def test_streams_survive_the_death_of_a_router(site: Site, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Greedy and sampled streams, on calls and in sessions, go on through the other router as if nothing had been."""
    routers = [site.router(["cpu-lp", "cpu-hp"]) for _ in range(2)]
    greedy = corpus.long[:24]
    sampled = [_sampled(case, seed) for seed, case in enumerate(corpus.long[24:40])]
    stopping = [found for case in corpus.long[40:] if (found := _late_stop(case, tokenizer)) is not None][:8]
    assert len(stopping) == 8
    async with (
        running(*routers, workers=2) as client,
        client.session() as session,
        client.session() as other_session,
    ):
        for one_session in (session, other_session):  # their streams are opened in turn, one on each router
            await one_session.generate(**greedy[0].options(1))
        sources: list[Source] = [client, session, client, other_session]
        options = [case.options() for case in greedy] + sampled
        options += [case.options() | {"sampling": sampling} for case, sampling, _ in stopping]
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
        for one, recording in zip(sampled, recordings[len(greedy) :], strict=False):
            assert recording.finished is not None
            seeded = dataclasses.replace(one["sampling"], seed=recording.finished.receipt.seed)
            undisturbed = await Recording().follow(client.stream(**one | {"sampling": seeded}))
            assert recording.token_ids == undisturbed.token_ids
            assert recording.text == undisturbed.text
    for (_, sampling, text), recording in zip(stopping, recordings[-len(stopping) :], strict=True):
        assert recording.finished is not None
        assert recording.text == text
        assert (recording.finished.reason, recording.finished.stop_string) == ("stop", sampling.stop[0])
    in_sessions = [recording for recording in recordings[1::2] if _resumed(recording)]
    on_calls = [recording for recording in recordings[::2] if _resumed(recording)]
    assert len(in_sessions) >= 5
    assert len(on_calls) >= 5
    assert len(in_sessions) + len(on_calls) < len(recordings), "the other router's streams were disturbed"


def _sampled(case: Case, seed: int) -> dict[str, Any]:
    """Return a sampled request, every other one without a seed of its own: the router chooses it."""
    chosen = seed if seed % 2 else None
    sampling = SamplingParams(temperature=0.8, top_k=40, seed=chosen, max_tokens=len(case.expected), ignore_eos=True)
    return case.options() | {"sampling": sampling}


def _late_stop(case: Case, tokenizer: Tokenizer) -> tuple[Case, SamplingParams, str] | None:
    """Return greedy sampling that stops at a string late in the text, and the text before it; None: there is none."""
    text = tokenizer.decode(list(case.expected), skip_special_tokens=True)
    for found in re.finditer(r"[!-~]{3}", text):
        if text.index(found[0]) == found.start() > 0.75 * len(text):
            sampling = SamplingParams(temperature=0.0, max_tokens=len(case.expected), ignore_eos=True, stop=[found[0]])
            return case, sampling, text[: found.start()]
    return None


def _resumed(recording: Recording) -> bool:
    """The router that ended the stream took it over with tokens."""
    assert recording.finished is not None
    return recording.finished.receipt.attempts[0].first_token_offset > 0
