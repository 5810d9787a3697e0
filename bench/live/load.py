"""The open-loop load generator: requests leave at their times, whatever has become of those before."""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence

from bench.live.targets import FailedError, RefusedError, Target
from bench.metrics import Outcome, RequestRecord
from bench.workloads import WorkloadRequest

Prompt = Callable[[WorkloadRequest], list[int]]


async def run_load(
    target: Target,
    workload: Sequence[WorkloadRequest],
    prompt_of: Prompt,
    *,
    drain_s: float,
    on_done: Callable[[RequestRecord], None] = lambda record: None,
) -> list[RequestRecord]:
    """Send a workload and return one record a request, times on the monotonic clock.

    Args:
        drain_s: what has not ended this long after the last arrival is cancelled and counts as unfinished.
        on_done: called with each record as its request ends.
    """
    prompts = [prompt_of(request) for request in workload]  # made before the clock starts
    start_s = time.monotonic() + 0.1
    records: list[RequestRecord] = []

    async def one(request: WorkloadRequest, prompt: list[int]) -> None:
        record = await send(target, request, prompt, start_s + request.arrival_s)
        records.append(record)
        on_done(record)

    tasks = []
    try:
        for request, prompt in zip(workload, prompts, strict=True):
            await asyncio.sleep(max(start_s + request.arrival_s - time.monotonic(), 0))
            tasks.append(asyncio.create_task(one(request, prompt)))
        if tasks:
            await asyncio.wait(tasks, timeout=drain_s)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return sorted(records, key=lambda record: record.arrival_s)


def outcomes(records: Sequence[RequestRecord]) -> str:
    """Say how many requests ended how, and what the first of each was told."""
    counts = Counter(record.outcome for record in records)
    parts = []
    for outcome in Outcome:
        if counts[outcome]:
            why = next((record.why for record in records if record.outcome is outcome and record.why), "")
            parts.append(f"{counts[outcome]} {outcome}" + (f" (first: {' '.join(why.split())})" if why else ""))
    return ", ".join(parts)


async def send(target: Target, request: WorkloadRequest, prompt: list[int], arrival_s: float) -> RequestRecord:
    """Send one request and note when each token arrives; cancelled: it counts as unfinished.

    The arrival is when the request was due, so a client that falls behind makes the result worse, never better.
    """
    times: list[float] = []
    outcome, why = Outcome.UNFINISHED, ""
    pieces = target.send(request, prompt)
    try:
        async with contextlib.aclosing(pieces):
            async for tokens in pieces:
                now_s = time.monotonic()
                times.extend([now_s] * tokens)
        outcome = Outcome.FINISHED
        if not times:
            outcome, why = Outcome.FAILED, "the answer had no token"
    except RefusedError as error:
        outcome, why = Outcome.REFUSED, str(error)
    except FailedError as error:
        outcome, why = Outcome.FAILED, str(error)
    except asyncio.CancelledError:
        # The run is over: the record is what this task was for, so it ends normally.
        outcome = Outcome.UNFINISHED
    return RequestRecord(
        request_id=request.request_id,
        arrival_s=arrival_s,
        prompt_tokens=request.prompt_tokens,
        ttft_slo_s=request.slo.ttft_s,
        tbt_slo_s=request.slo.tbt_s,
        outcome=outcome,
        token_times_s=times,
        slo_class=request.slo_class,
        why=why,
    )
