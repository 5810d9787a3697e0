"""What befalls the predictor in the midst of a run, in the systems that are about that."""

import asyncio
import math
import os
import random
import signal
from collections.abc import AsyncIterator, Sequence

import grpc
import grpc.aio

from ascendra.v1 import common_pb2, predictor_pb2, predictor_pb2_grpc

KILLED, PAUSED, NONSENSE = "killed", "paused", "nonsense"
FAULT_AFTER_S = 12.0
"""After the system has started: some seconds into the counted part of a run."""


async def disturb_predictor(fault: str, pid: int, address: str, worker_ids: Sequence[str]) -> None:
    """Let a fault begin when its time has come.

    Args:
        fault: "killed" (SIGKILL), "paused" (SIGSTOP, until cancelled) or "nonsense" (steps that cannot be, and some a
            hundred times too long, in the workers' names, until cancelled); empty: none.
    """
    if not fault:
        return
    await asyncio.sleep(FAULT_AFTER_S)
    match fault:
        case "killed":
            os.kill(pid, signal.SIGKILL)
        case "paused":
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                os.kill(pid, signal.SIGCONT)  # so that it can be stopped
        case "nonsense":
            async with grpc.aio.insecure_channel(address) as channel:
                stub: predictor_pb2_grpc.PredictorServiceAsyncStub = predictor_pb2_grpc.PredictorServiceStub(channel)
                await stub.ReportTelemetry(_nonsense(worker_ids))
        case _:
            raise ValueError(f"unknown fault {fault!r}")


def nonsense_steps(rng: random.Random, count: int) -> list[common_pb2.StepTelemetry]:
    """Return steps that cannot be, and some that are only a hundred times too long."""
    return [
        common_pb2.StepTelemetry(
            step=rng.randint(1, 1 << 40),
            prefill_tokens=rng.choice([0, 1, 300, 1 << 31]),
            decodes=rng.choice([0, 1, 40]),
            step_s=rng.choice([-1.0, math.nan, 1e-9, 5.0, 59.0, 1e9]),
        )
        for _ in range(count)
    ]


async def _nonsense(worker_ids: Sequence[str]) -> AsyncIterator[predictor_pb2.ReportTelemetryRequest]:
    rng = random.Random(4)
    while True:
        for worker_id in worker_ids:
            steps = nonsense_steps(rng, 10)
            yield predictor_pb2.ReportTelemetryRequest(worker_id=worker_id, incarnation="forged", steps=steps)
        await asyncio.sleep(0.5)
