"""python -m bench.assess: what a question of risk costs, for many waiting requests on several workers.

Asks a predictor process over its real stream, one question after the other, and reads from its metrics how long the
service itself took. The queues: everybody makes it, a tenth does not, and most do not.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvloop

from ascendra.v1 import predictor_pb2, predictor_pb2_grpc
from bench.markdown import markdown_table
from bench.processes import Processes
from bench.result_files import provenance, write_result
from services.common.channels import open_channel
from services.predictor.assess import answer
from services.predictor.models import ModelStore

QUEUES = {"all make it": 600.0, "knee": 20.0, "overload": 2.0}
"""Name and TTFT objective in seconds; requests have waited between nothing and a third of it."""


def question(requests: int, workers: int, ttft_slo_s: float, seed: int) -> predictor_pb2.AssessRequest:
    """Return a question about prompts of chat-like lengths on busy workers."""
    rng = random.Random(seed)
    return predictor_pb2.AssessRequest(
        assess_id=seed,
        home=[i % workers for i in range(requests)],
        prompt_tokens=[min(int(rng.lognormvariate(6.7, 0.9)) + 1, 8000) for _ in range(requests)],
        age_s=[rng.uniform(0, ttft_slo_s / 3) for _ in range(requests)],
        ttft_slo_s=[ttft_slo_s] * requests,
        tbt_slo_s=[0.1] * requests,
        instances=[
            predictor_pb2.InstanceState(
                worker_id=f"w{i}",
                decodes=50,
                decode_context_tokens=60_000,
                min_tbt_s=0.1,
                in_progress_prefill_tokens=500,
                hop_s=0.001,
                max_num_batched_tokens=2048,
            )
            for i in range(workers)
        ],
    )


def in_service_ms(asked: predictor_pb2.AssessRequest, repetitions: int) -> list[float]:
    """Return the milliseconds of each answer as the service computes it, without the wire."""
    store = ModelStore(max_workers=64, forget_after_s=60)
    times = []
    for _ in range(repetitions):
        began_s = time.perf_counter()
        answer(asked, store, 0.0)
        times.append((time.perf_counter() - began_s) * 1e3)
    return times


async def over_the_wire_ms(address: str, asked: predictor_pb2.AssessRequest, repetitions: int) -> list[float]:
    """Return the milliseconds from question to answer on one stream."""
    times: list[float] = []
    may_ask = asyncio.Semaphore(1)

    async def questions() -> AsyncIterator[predictor_pb2.AssessRequest]:
        for _ in range(repetitions):
            await may_ask.acquire()
            yield asked

    channel = open_channel(address)
    try:
        stub: predictor_pb2_grpc.PredictorServiceAsyncStub = predictor_pb2_grpc.PredictorServiceStub(channel)
        began_s = time.perf_counter()
        async for _ in stub.Assess(questions()):
            times.append((time.perf_counter() - began_s) * 1e3)
            began_s = time.perf_counter()
            may_ask.release()
    finally:
        await channel.close(None)
    return times


async def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Ask about every queue."""
    results = []
    async with Processes() as processes:
        config = {"listen": "127.0.0.1:0", "metrics-listen": "127.0.0.1:0"}
        address, _ = await processes.start_service("services.predictor", config)
        for name, ttft_slo_s in QUEUES.items():
            asked = question(arguments.requests, arguments.workers, ttft_slo_s, arguments.seed)
            measured = {
                "service": in_service_ms(asked, arguments.repetitions),
                "wire": await over_the_wire_ms(address, asked, arguments.repetitions),
            }
            figures = {
                f"{place}_{level}_ms": at(ms, share) for place, ms in measured.items() for level, share in LEVELS
            }
            results.append({"queue": name, **figures})
    return results


LEVELS = (("p50", 0.5), ("p99", 0.99))


def at(values: list[float], share: float) -> float:
    """Return a quantile."""
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]


def table(results: list[dict[str, Any]]) -> str:
    """Render the results."""
    columns = [f"{place}_{level}_ms" for place in ("service", "wire") for level, _ in LEVELS]
    return markdown_table(
        ["queue", "service p50 ms", "p99 ms", "with the wire p50 ms", "p99 ms"],
        ([result["queue"], *(f"{result[name]:.2f}" for name in columns)] for result in results),
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.assess", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=1000, help="waiting requests")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--repetitions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    results = uvloop.run(run(arguments))
    print(table(results))
    write_result(arguments.out, {**provenance(arguments), "results": results})


if __name__ == "__main__":
    main()
