"""A real worker that leaves in mid-stream gives its streams away with their KV caches."""

import asyncio
import os
import signal

import pytest
from tokenizers import Tokenizer

from tests.cluster.conftest import Corpus
from tests.support.cluster import Site, attached, running, until
from tests.support.load import Recording

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]

STREAMS = 24
TRANSFER = {"latency-s": 0.001, "bytes-per-s": 1e10, "bound-s": 30.0}
"""The tiny model computes so fast that a transfer seldom pays; here it always should, however slow the machine is."""


async def test_streams_leave_a_stopped_worker_with_their_kv_caches(
    site: Site, corpus: Corpus, tokenizer: Tokenizer
) -> None:
    """SIGTERM: running streams go on elsewhere at once and exactly; the worker exits with 0; no KV block is left."""
    cases = corpus.long[:STREAMS]
    router = site.router(["cpu-lp", "cpu-hp"], kv_move_policy=TRANSFER)
    old_pid = site.fleet.pid("cpu-lp")
    async with running(router, workers=2) as client:
        recordings = [Recording() for _ in cases]
        tasks = [
            asyncio.create_task(recording.follow(client.stream(**case.options())))
            for recording, case in zip(recordings, cases, strict=True)
        ]
        await until(lambda: all(recording.started.is_set() for recording in recordings), "the streams")
        os.kill(old_pid, signal.SIGTERM)
        await asyncio.gather(*tasks)
        for case, recording in zip(cases, recordings, strict=True):
            recording.check(case.expected, tokenizer)
        assert site.fleet.wait_for("worker_exited", pid=old_pid)["status"] == 0
        moved = [recording.attempts() for recording in recordings if recording.moved_running]
        assert moved
        assert all(attempts[-1].moved_by == "kv" for attempts in moved)
        counters = (await client.status()).counters
        # Where steps are slow, some leave a worker before it breaks their TBT objective.
        assert counters["moves"] + counters["reliefs"] >= len(moved)
        await site.restarted("cpu-lp", old_pid)
        await attached(client, 2)
        async with asyncio.timeout(60):
            async for status in client.watch_status(0.1):
                if all(worker.kv_usage == 0 for worker in status.workers):
                    break
