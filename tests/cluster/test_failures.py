"""What happens to streams when the predictor or a worker dies, hangs or comes back."""

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import AsyncIterator

import grpc
import pytest
from tokenizers import Tokenizer

from ascendra import AscendraError, AsyncClient, RetryPolicy, SamplingParams, UnavailableError
from ascendra.v1 import cluster_pb2, predictor_pb2, predictor_pb2_grpc
from bench.live.faults import nonsense_steps
from tests.cluster.conftest import Corpus
from tests.support.cluster import Service, Site, attached, running, until
from tests.support.load import Case, Load, Recording, random_prompts, undisturbed
from tests.support.tiny_model import VOCAB_SIZE
from tests.support.worker_process import is_running

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]

ONCE = RetryPolicy(max_attempts=1)
SILENCE_S = 0.8
STALL_S = 0.9


async def lost(client: AsyncClient, worker_id: str) -> None:
    """Wait until the router no longer uses a worker."""
    async with asyncio.timeout(60):
        async for status in client.watch_status(0.1):
            health = {worker.worker_id: worker.health for worker in status.workers}
            if health[worker_id] != cluster_pb2.WORKER_HEALTH_READY:
                return


async def policy_becomes(client: AsyncClient, policies: set[str]) -> None:
    """Wait until the router predicts by one of these policies."""
    async with asyncio.timeout(60):
        async for status in client.watch_status(0.1):
            if status.prediction_policy in policies:
                return


async def test_death_of_the_predictor_changes_the_prediction_policy_only(
    site: Site, corpus: Corpus, tokenizer: Tokenizer
) -> None:
    """Serving goes on without the predictor, under a fallback that the status names, until it is back."""
    router = site.router(["cpu-lp", "cpu-hp"])
    async with (
        running(router, workers=2) as client,
        Load([client], corpus.mixed, tokenizer, streams=4, tokens=(1, 1)) as load,
    ):
        await policy_becomes(client, {"predictor"})
        site.predictor.kill()
        try:
            await policy_becomes(client, {"worker_model", "token_load"})
            assert not (await client.status()).predictor_connected
            await load.further(10)
        finally:
            await asyncio.to_thread(site.predictor.start)
        await policy_becomes(client, {"predictor"})
        assert (await client.status()).predictor_connected
    assert load.failures == []


async def test_a_paused_predictor_is_done_without_until_it_goes_on(
    site: Site, corpus: Corpus, tokenizer: Tokenizer
) -> None:
    """A predictor that hangs with its streams open is not waited for: its models are dropped when they are old."""
    router = site.router(["cpu-lp", "cpu-hp"])
    async with (
        running(router, workers=2) as client,
        Load([client], corpus.mixed, tokenizer, streams=4, tokens=(1, 1)) as load,
    ):
        await policy_becomes(client, {"predictor"})
        os.kill(site.predictor.pid, signal.SIGSTOP)
        try:
            await policy_becomes(client, {"worker_model", "token_load"})
            await load.further(10)
        finally:
            os.kill(site.predictor.pid, signal.SIGCONT)
        await policy_becomes(client, {"predictor"})
        await load.further(10)
    assert load.failures == []


async def test_nonsense_told_to_the_predictor_stops_no_stream(site: Site, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """Steps that cannot be and steps a hundred times too long, in the workers' names, harm no request."""
    router = site.router(["cpu-lp", "cpu-hp"])
    rng = random.Random(4)

    async def nonsense() -> AsyncIterator[predictor_pb2.ReportTelemetryRequest]:
        for _ in range(40):
            steps = nonsense_steps(rng, 20)
            for worker_id in ("cpu-lp", "cpu-hp"):
                yield predictor_pb2.ReportTelemetryRequest(worker_id=worker_id, incarnation="forged", steps=steps)
            await asyncio.sleep(0.02)

    async with (
        running(router, workers=2) as client,
        Load([client], corpus.mixed, tokenizer, streams=4, tokens=(1, 1)) as load,
        grpc.aio.insecure_channel(site.predictor.address) as channel,
    ):
        await policy_becomes(client, {"predictor"})
        stub: predictor_pb2_grpc.PredictorServiceAsyncStub = predictor_pb2_grpc.PredictorServiceStub(channel)
        answer = await stub.ReportTelemetry(nonsense(), timeout=60)
        assert 0 < answer.steps < 1600  # those that cannot be were refused, the others could not be told from real ones
        await load.further(10)
        assert (await client.status()).prediction_policy in {"predictor", "worker_model", "token_load"}
    assert load.failures == []


async def disturb_all(client: AsyncClient, corpus: Corpus, site: Site, victim: str) -> list[Recording]:
    """Start all long streams, have something killed when most have started, and return how they went."""
    recordings = [Recording() for _ in corpus.long]
    tasks = [
        asyncio.create_task(recording.follow(client.stream(**case.options())))
        for recording, case in zip(recordings, corpus.long, strict=True)
    ]
    await until(lambda: sum(recording.started.is_set() for recording in recordings) >= 40, "half of the streams")
    assert not any(task.done() for task in tasks)
    if victim == "front end":
        os.kill(site.fleet.pid("cpu-lp"), signal.SIGKILL)
    else:
        os.kill(site.fleet.engine_core_pid("cpu-lp"), signal.SIGKILL)
    return await asyncio.gather(*tasks)


async def used_again(client: AsyncClient, case: Case, worker_id: str, tokenizer: Tokenizer) -> None:
    """Wait until requests go to a worker again; an HP that takes arrivals would be preferred to a cold one."""
    async with asyncio.timeout(60):
        while True:
            recording = await Recording().follow(client.stream(**case.options(5)))
            recording.check(case.expected[:5], tokenizer)
            if recording.workers == [worker_id]:
                return
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("victim", ["front end", "engine core"])
async def test_kill_of_a_worker_moves_its_streams(
    site: Site, corpus: Corpus, tokenizer: Tokenizer, victim: str
) -> None:
    """Streams of a killed worker, begun or not, end elsewhere exactly; nothing is orphaned; the worker comes back."""
    router = site.router(["cpu-lp", "cpu-hp"], hp_fill=0.0)
    old_pid, processes = site.fleet.pid("cpu-lp"), site.worker_processes("cpu-lp")
    assert len(processes) >= 2
    async with running(router, workers=2) as client:
        recordings = await disturb_all(client, corpus, site, victim)
        for case, recording in zip(corpus.long, recordings, strict=True):
            recording.check(case.expected, tokenizer)
        moved = [recording for recording in recordings if recording.moved_running]
        lost = [recording for recording in moved if recording.workers[0] == "cpu-lp"]
        assert lost
        assert all(recording.workers[1] == "cpu-hp" for recording in lost)
        counters = (await client.status()).counters
        # Where steps are slow, some leave a worker before it breaks their TBT objective.
        assert counters["moves"] + counters["reliefs"] >= len(moved)
        await until(lambda: not any(is_running(pid) for pid in processes), "the end of its processes")
        await site.restarted("cpu-lp", old_pid)
        await used_again(client, corpus.long[0], "cpu-lp", tokenizer)


async def test_requests_that_had_not_started_finish_elsewhere(site: Site, tokenizer: Tokenizer) -> None:
    """Requests that wait behind long prompts when their worker dies run on another one, as if nothing had been."""
    prompts = random_prompts(10, (4000, 6000), seed=11, vocab_size=VOCAB_SIZE)
    router = site.router(["lp-0", "lp-1"], tickets=False, offload=False)
    old_pid = site.fleet.pid("lp-0")
    async with running(router, workers=2) as client:
        recordings = [Recording() for _ in prompts]
        tasks = [
            asyncio.create_task(recording.follow(client.stream(**Case(prompt, (0,) * 10).options())))
            for recording, prompt in zip(recordings, prompts, strict=True)
        ]
        await asyncio.sleep(0.3)
        unstarted = [recording for recording in recordings if not recording.started.is_set()]
        os.kill(old_pid, signal.SIGKILL)
        await asyncio.gather(*tasks)
        assert [recording for recording in unstarted if recording.workers == ["lp-0", "lp-1"]]
        await site.restarted("lp-0", old_pid)
        await attached(client, 2)
        for prompt, recording in zip(prompts, recordings, strict=True):
            calm = await Recording().follow(client.stream(**Case(prompt, (0,) * 10).options()))
            recording.check(calm.token_ids, tokenizer)


async def test_streams_that_may_not_move_end_with_a_hint(site: Site) -> None:
    """With move-running off a begun stream ends UNAVAILABLE, unsafe to repeat; one that only waited is safe to."""
    prompts = random_prompts(6, (8, 40), seed=12, vocab_size=VOCAB_SIZE)
    waiting = random_prompts(6, (7000, 8000), seed=13, vocab_size=VOCAB_SIZE)
    router = site.router(["lp-0"], move_running=False, no_worker_wait_s=0.2, tickets=False)
    old_pid = site.fleet.pid("lp-0")
    async with running(router, workers=1), AsyncClient(router.address, retry=ONCE) as client:

        async def outcome(prompt: tuple[int, ...]) -> tuple[Recording, UnavailableError]:
            recording = Recording()
            with pytest.raises(UnavailableError) as caught:
                await recording.follow(client.stream(**Case(prompt, (0,) * 180).options()))
            return recording, caught.value

        tasks = [asyncio.create_task(outcome(prompt)) for prompt in prompts]
        await asyncio.sleep(0.5)
        tasks += [asyncio.create_task(outcome(prompt)) for prompt in waiting]
        await asyncio.sleep(0.5)
        os.kill(old_pid, signal.SIGKILL)
        outcomes = await asyncio.gather(*tasks)
        begun = [error for recording, error in outcomes if recording.token_ids]
        unbegun = [error for recording, error in outcomes if not recording.token_ids]
        assert len(begun) >= len(prompts)
        assert len(unbegun) >= 3
        for error in begun:
            assert (error.code, error.reason, error.retry_safe) == (grpc.StatusCode.UNAVAILABLE, "WORKER_LOST", False)
            assert error.retry_after_ms > 0
        for error in unbegun:
            assert (error.code, error.reason, error.retry_safe) == (grpc.StatusCode.UNAVAILABLE, "NO_WORKER", True)
            assert error.retry_after_ms > 0
        await site.restarted("lp-0", old_pid)


async def test_a_stopped_worker_is_noticed_and_its_late_words_are_dropped(
    site: Site, corpus: Corpus, tokenizer: Tokenizer
) -> None:
    """SIGSTOP: after the silence its streams go on elsewhere; after SIGCONT what it still says changes nothing."""
    router = site.router(["cpu-lp", "cpu-hp"], silence_s=SILENCE_S, hp_fill=0.0)
    async with running(router, workers=2) as client:
        recordings = [Recording() for _ in corpus.long]
        tasks = [
            asyncio.create_task(recording.follow(client.stream(**case.options())))
            for recording, case in zip(recordings, corpus.long, strict=True)
        ]
        await until(lambda: sum(recording.started.is_set() for recording in recordings) >= 40, "half of the streams")
        stopped_s = time.monotonic()
        site.signal_worker("cpu-lp", signal.SIGSTOP)
        try:
            await lost(client, "cpu-lp")
            noticed_s = time.monotonic() - stopped_s
            assert not all(task.done() for task in tasks)
        finally:
            site.signal_worker("cpu-lp", signal.SIGCONT)
        # Noticed in a second on a quiet machine; a starved one is allowed its lateness. Keepalive takes 25 s.
        assert SILENCE_S / 2 < noticed_s < 4 * SILENCE_S + 6
        await asyncio.gather(*tasks)
        for case, recording in zip(corpus.long, recordings, strict=True):
            recording.check(case.expected, tokenizer)
        assert any(recording.moved_running for recording in recordings)
        await used_again(client, corpus.long[0], "cpu-lp", tokenizer)


async def test_a_stopped_engine_is_noticed(site: Site, tokenizer: Tokenizer) -> None:
    """SIGSTOP of the engine core alone: heartbeats go on, steps do not; its streams go on elsewhere."""
    router = site.router(["lp-0", "lp-1"], stall_s=STALL_S)
    prompts = random_prompts(12, (8, 200), seed=14, vocab_size=VOCAB_SIZE)
    async with running(router, workers=2) as client:
        cases = await undisturbed(client, prompts, 250)
        recordings = [Recording() for _ in cases]
        tasks = [
            asyncio.create_task(recording.follow(client.stream(**case.options())))
            for recording, case in zip(recordings, cases, strict=True)
        ]
        await until(lambda: all(len(recording.token_ids) > 20 for recording in recordings), "tokens on every stream")
        core = site.fleet.engine_core_pid("lp-0")
        os.kill(core, signal.SIGSTOP)
        try:
            await asyncio.gather(*tasks)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(core, signal.SIGCONT)
        moved = [recording for recording in recordings if recording.moved_running]
        assert moved
        for case, recording in zip(cases, recordings, strict=True):
            recording.check(case.expected, tokenizer)
        for recording in moved:
            assert recording.finished is not None
            assert "stand still" in recording.finished.receipt.attempts[1].reason
            assert recording.largest_gap_s < 15, "the limit of engines whose pace is unknown applied"
        await attached(client, 2)


async def test_seeded_sampling_survives_a_move(site: Site, corpus: Corpus) -> None:
    """Sampled streams with a seed give the same tokens when their worker is killed under them."""
    sampling = [
        SamplingParams(temperature=0.9, top_p=0.95, seed=seed, max_tokens=220, ignore_eos=True) for seed in range(12)
    ]
    penalised = [
        SamplingParams(
            temperature=0.7, presence_penalty=0.8, frequency_penalty=0.3, seed=seed, max_tokens=220, ignore_eos=True
        )
        for seed in range(12)
    ]
    prompts = [case.prompt for case in corpus.long]
    asked = list(zip(prompts, sampling + penalised, strict=False))
    router = site.router(["cpu-lp", "cpu-hp"])
    old_pid = site.fleet.pid("cpu-lp")
    async with running(router, workers=2) as client:
        calm = await asyncio.gather(
            *(Recording().follow(client.stream(token_ids=prompt, sampling=s)) for prompt, s in asked)
        )
        recordings = [Recording() for _ in asked]
        tasks = [
            asyncio.create_task(recording.follow(client.stream(token_ids=prompt, sampling=s)))
            for recording, (prompt, s) in zip(recordings, asked, strict=True)
        ]
        await until(lambda: all(recording.started.is_set() for recording in recordings), "the first tokens")
        os.kill(old_pid, signal.SIGKILL)
        await asyncio.gather(*tasks)
        assert any(recording.moved_running for recording in recordings)
        for before, after in zip(calm, recordings, strict=True):
            assert after.token_ids == before.token_ids
            assert after.text == before.text
        await site.restarted("cpu-lp", old_pid)


async def test_no_worker_at_all(site: Site) -> None:
    """A router without a worker refuses after a bounded wait, safe to repeat, and says that it is not ready."""
    router: Service = site.router([], no_worker_wait_s=0.2)
    async with running(router, workers=0), AsyncClient(router.address, retry=ONCE) as client:
        with pytest.raises(AscendraError) as caught:
            await client.generate(token_ids=[5, 6, 7])
        assert (caught.value.code, caught.value.retry_safe) == (grpc.StatusCode.UNAVAILABLE, True)
        assert caught.value.retry_after_ms > 0
