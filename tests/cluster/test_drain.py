"""Orderly ends: a worker that drains, a rolling restart, a router that drains."""

import asyncio
import os
import signal
import subprocess

import grpc
import pytest
from tokenizers import Tokenizer

from ascendra import AscendraError, AsyncClient, RetryPolicy
from tests.support.cluster import Site, attached, running
from tests.support.load import Case, Load, Recording, Source, by_worker, random_prompts, undisturbed
from tests.support.tiny_model import VOCAB_SIZE

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]

WORKERS = ["lp-0", "lp-1", "hp"]


async def cases(client: AsyncClient) -> list[Case]:
    """Return prompts of all lengths and their undisturbed completions."""
    return await undisturbed(client, random_prompts(16, (20, 800), seed=31, vocab_size=VOCAB_SIZE), 300)


async def test_rolling_restart_fails_nothing(site: Site, tokenizer: Tokenizer) -> None:
    """Every worker is told to stop under load, in turn: it exits with 0, comes back, and no request fails."""
    router = site.router(WORKERS)
    async with running(router, workers=3) as client, client.session() as session:
        async with Load([client, session], await cases(client), tokenizer, streams=24, tokens=(10, 300)) as load:
            for worker_id in WORKERS:
                await load.further(10)
                old_pid = site.fleet.pid(worker_id)
                os.kill(old_pid, signal.SIGTERM)
                await site.restarted(worker_id, old_pid)
                exited = site.fleet.wait_for("worker_exited", pid=old_pid)
                assert exited["status"] == 0
                await attached(client, 3)
        assert load.failures == []
        assert {"lp-0", "lp-1"} <= set(by_worker(load.recordings))
        assert any(recording.moved_running for recording in load.recordings)


async def test_a_router_drains(site: Site, tokenizer: Tokenizer) -> None:
    """SIGTERM of a router: streams under way end as they should, new ones are refused for a retry, exit status 0."""
    router = site.router(WORKERS, settle_s=0.1)
    async with (
        running(router, workers=3) as client,
        AsyncClient(router.address, retry=RetryPolicy(max_attempts=1)) as late,
        client.session() as session,
    ):
        known = await cases(client)
        recordings = [Recording() for _ in known]
        sources: list[Source] = [client, session]
        tasks = [
            asyncio.create_task(recording.follow(sources[i % 2].stream(**case.options())))
            for i, (recording, case) in enumerate(zip(recordings, known, strict=True))
        ]
        await asyncio.gather(*(recording.started.wait() for recording in recordings))
        router.terminate()
        refused: AscendraError | None = None
        while refused is None:
            assert not all(task.done() for task in tasks), "nothing was refused while it drained"
            try:
                await late.generate(token_ids=[5, 6], sampling=known[0].options(1)["sampling"])
            except AscendraError as error:
                refused = error
        assert (refused.code, refused.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert refused.retry_safe
        assert refused.retry_after_ms > 0
        for case, task in zip(known, tasks, strict=True):
            (await task).check(case.expected, tokenizer)
        assert await asyncio.to_thread(router.wait) == 0


async def test_a_router_that_cannot_drain_in_time_still_ends(site: Site) -> None:
    """After the drain timeout what is left ends UNAVAILABLE with a retry hint, and the router exits with 0."""
    router = site.router(["slow"], settle_s=0.0, drain_timeout_s=0.5)
    async with running(router, workers=1), AsyncClient(router.address, retry=RetryPolicy(max_attempts=1)) as client:
        recording = Recording()
        task = asyncio.create_task(recording.follow(client.stream(**Case((5, 6, 7), (0,) * 200).options())))
        await recording.started.wait()
        router.terminate()
        with pytest.raises(AscendraError) as caught:
            await task
        assert (caught.value.code, caught.value.retry_safe) == (grpc.StatusCode.UNAVAILABLE, False)
        try:
            assert await asyncio.to_thread(router.wait) == 0
        except subprocess.TimeoutExpired:
            pytest.fail("the router did not end")
