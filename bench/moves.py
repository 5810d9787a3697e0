"""python -m bench.moves: the time to the next token of a moved stream, by KV cache and by replay, in interleaved runs.

Starts real vLLM workers on CPU and, in this process, a router. Each run starts a stream on one worker, moves it to
another one when its context has the given length, and measures from the decision to the first token of the new
attempt. Prompts are random, so no prefix cache helps. The last runs kill the source with SIGKILL when it has handed
the stream over and before the target has read anything, after a replay to compare with: `met`, when the two had
handed over a stream before, and `unmet`.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from ascendra import AsyncClient, SamplingParams
from bench.processes import Processes
from bench.random_model import random_model
from bench.result_files import provenance, write_result
from services.common.logging import configure_logging
from services.policy.kv_move import MoveChoice, MoveMethod
from services.router.app import Router
from services.router.config import RouterConfig
from services.router.request import LiveRequest

TOKENS_BEFORE, TOKENS_AFTER = 8, 12
"""Tokens of a stream before and after its move."""
VOCABULARY = range(300, 4000)
"""Ordinary tokens of the demo model."""
KINDS = (MoveMethod.REPLAY, MoveMethod.KV)
_LIMIT_S = 120.0
_TRIES = 5
_PAUSE_S = 12.0
"""Longer than the router waits after a transfer that failed."""


@dataclass(frozen=True, slots=True)
class Run:
    """One move."""

    method: str
    """"kv", "replay", or, with the source killed in the midst, "killed (met)" or "killed (unmet)"."""
    next_token_s: float
    """From the decision to the first token of the new attempt."""
    moved_by: str
    """What the receipt says: a transfer may have failed."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model directory and its size."""

    name: str
    directory: Path
    parameters: int


def model_in(directory: Path) -> Model:
    """Return the model in a directory; its tensors say how large it is."""
    from safetensors import safe_open

    with safe_open(str(directory / "model.safetensors"), "pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 - no mapping
    return Model(directory.name, directory, sum(math.prod(shape) for shape in shapes))


@contextlib.asynccontextmanager
async def routed(model: Model, source: str, target: str) -> AsyncIterator[tuple[Router, AsyncClient]]:
    """Run a router in front of two workers; the target is an HP worker, so that streams begin at the source."""
    config = RouterConfig(
        listen="127.0.0.1:0",
        metrics_listen="",
        model=str(model.directory),
        workers=(source, target),
        settle_s=0.0,
        tickets=False,
        offload=False,
        relief=False,
    )
    router, stop = Router(config), asyncio.Event()
    task = asyncio.create_task(router.run(stop))
    try:
        async with asyncio.timeout(_LIMIT_S):
            await router.started.wait()
            while sum(link.attached for link in router.pool.links()) < 2:  # noqa: ASYNC110 - links have no event for it
                await asyncio.sleep(0.02)
        async with AsyncClient(router.address) as client:
            yield router, client
    finally:
        stop.set()
        await task


class NoTransferError(Exception):
    """The router would not hand a KV cache over now: a transfer between the two workers failed a moment ago."""


class Stream:
    """One stream from its first token through its move."""

    def __init__(self, router: Router, client: AsyncClient, context_tokens: int, seed: int) -> None:
        rng = random.Random(seed)
        self._router = router
        self._client = client
        self._prompt = rng.choices(VOCABULARY, k=context_tokens - TOKENS_BEFORE)
        self._arrived_s: list[float] = []
        self._progress = asyncio.Event()

    async def move(self, method: MoveMethod, kill: Sequence[int] = ()) -> tuple[float, str]:
        """Run it, move it, and return seconds to the next token and how it moved.

        Args:
            kill: processes that end when the source has handed the stream over.

        Raises:
            NoTransferError: it did not move.
        """
        async with asyncio.timeout(_LIMIT_S), asyncio.TaskGroup() as tasks:
            follow = tasks.create_task(self._follow())
            while len(self._arrived_s) < TOKENS_BEFORE:
                self._progress.clear()
                await self._progress.wait()
            request = next(iter(self._router.dispatcher.live.values()))
            began_s = time.monotonic()
            started = self._start(request, method)
            if started and kill:
                await _handed_over(request)
                for pid in kill:
                    os.kill(pid, signal.SIGKILL)
            attempts = await follow
        if not started:
            raise NoTransferError
        delivered = next(attempt for attempt in attempts[1:] if attempt.first_token_offset)
        return self._arrived_s[delivered.first_token_offset] - began_s, delivered.moved_by

    def _start(self, request: LiveRequest, method: MoveMethod) -> bool:
        plan = self._router.mover.plan(request)
        assert plan is not None, "the request cannot move"
        # What the policy would choose does not matter here, but whether it could.
        if method is MoveMethod.KV and not plan.choice.kv_s:
            return False
        choice = MoveChoice(method, "the bench wants it", plan.choice.kv_s, plan.choice.replay_s)
        self._router.mover.start(replace(plan, choice=choice), "bench")
        return True

    async def _follow(self) -> Sequence[Any]:
        sampling = SamplingParams(temperature=0.0, max_tokens=TOKENS_BEFORE + TOKENS_AFTER, ignore_eos=True)
        async for chunk in self._client.stream(token_ids=self._prompt, sampling=sampling):
            self._arrived_s += [time.monotonic()] * len(chunk.token_ids)
            self._progress.set()
            if chunk.finished is not None:
                return chunk.finished.receipt.attempts
        raise RuntimeError("the stream ended without a last message")


async def _handed_over(request: LiveRequest) -> None:
    """Return when the router has the handle and has not sent it to the target yet."""
    while len(request.attempts) < 2:  # noqa: ASYNC110 - an event would come too late by one turn of the loop
        await asyncio.sleep(0)


class Bench:
    """Moves streams of one context length between the two workers of a router."""

    def __init__(self, router: Router, client: AsyncClient, context_tokens: int, seeds: Iterator[int]) -> None:
        self._router = router
        self._client = client
        self._context_tokens = context_tokens
        self._seeds = seeds

    async def move(self, method: MoveMethod, kill: Sequence[int] = ()) -> tuple[float, str]:
        """Move a stream, as `Stream.move`; waits while the router would not transfer."""
        for _ in range(_TRIES):
            stream = Stream(self._router, self._client, self._context_tokens, next(self._seeds))
            with contextlib.suppress(NoTransferError):
                return await stream.move(method, kill)
            await asyncio.sleep(_PAUSE_S)
        raise RuntimeError(f"no transfer between the two workers in {_TRIES} tries")

    async def meet(self) -> None:
        """Move streams by KV until one arrived so: the first transfer between two workers may exceed its bound."""
        for _ in range(_TRIES):
            _, moved_by = await self.move(MoveMethod.KV)
            if moved_by == MoveMethod.KV:
                return
        raise RuntimeError(f"no transfer between the two workers arrived in {_TRIES} tries")


async def measure(model: Model, context_tokens: int, repetitions: int, deaths: int) -> tuple[list[Run], int]:
    """Return the runs, interleaved, and the KV bytes per token."""
    seeds = itertools.count(1)
    runs: list[Run] = []
    sources = [f"source-{index}" for index in range(1 + 2 * deaths)]
    async with Processes() as processes:
        addresses, _ = await processes.start_workers([worker(model, name) for name in ("target", *sources)])
        target, *others = addresses
        async with routed(model, others[0], target) as (router, client):
            bench = Bench(router, client, context_tokens, seeds)
            await bench.move(MoveMethod.REPLAY)  # the first ones pay for what is done once
            await bench.meet()
            runs += [shown(Run(kind.value, *await bench.move(kind))) for kind in KINDS * repetitions]
            bytes_per_token = next(link.known.kv_transfer.bytes_per_token for link in router.pool.links())
        for index, (name, address) in enumerate(zip(sources[1:], others[1:], strict=True)):
            async with routed(model, address, target) as (router, client):
                bench = Bench(router, client, context_tokens, seeds)
                met = index % 2 == 0
                if met:
                    await bench.meet()
                runs.append(shown(Run(MoveMethod.REPLAY.value, *await bench.move(MoveMethod.REPLAY))))
                kill = processes_of(processes.front_ends[name])
                killed = f"killed ({'met' if met else 'unmet'})"
                runs.append(shown(Run(killed, *await bench.move(MoveMethod.KV, kill))))
    return runs, bytes_per_token


def shown(run: Run) -> Run:
    """Print a run as it ends, and return it."""
    print(f"{run.method}: {run.next_token_s * 1000:.0f} ms (moved by {run.moved_by})", flush=True)
    return run


def processes_of(front_end: int) -> list[int]:
    """Return a worker's process ids, engine core first."""
    return [*(child.pid for child in psutil.Process(front_end).children(recursive=True)), front_end]


def worker(model: Model, name: str) -> dict[str, object]:
    """A CPU worker with a KV cache of a few streams."""
    return {
        "listen": "127.0.0.1:0",
        "worker-id": name,
        "engine": "cpu",
        "role": "high" if name == "target" else "unified",
        "model": str(model.directory),
        "max-model-len": 2048,
        "max-num-seqs": 8,
        "kv-cache-memory-bytes": 256 << 20,
        "dtype": "float32",
    }


def summarise(runs: Sequence[Run]) -> dict[str, Any]:
    """Return medians, and what a transfer gains and a death costs over the replay just before it."""
    methods = list(dict.fromkeys(run.method for run in runs))
    medians_s = {m: statistics.median(run.next_token_s for run in runs if run.method == m) for m in methods}
    pairs = [(before, run) for before, run in itertools.pairwise(runs) if before.method == MoveMethod.REPLAY]
    ratios = [before.next_token_s / run.next_token_s for before, run in pairs if run.method == MoveMethod.KV]
    extra_s = [run.next_token_s - before.next_token_s for before, run in pairs if run.method.startswith("killed")]
    return {
        "median_next_token_s": {method: round(value, 4) for method, value in medians_s.items()},
        "replay_over_kv": {"median": round(statistics.median(ratios), 2), "least": round(min(ratios), 2)},
        "killed_minus_replay_s": [round(value, 3) for value in extra_s],
    }


def models(arguments: argparse.Namespace, folder: Path) -> Iterator[Model]:
    """Yield what is measured: the given model, and a random one of 50M parameters."""
    if arguments.only != "random":
        yield model_in(arguments.model)
    if arguments.only != "given":
        yield model_in(random_model("m50", arguments.model, folder / "random-50m"))


def main() -> int:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.moves", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the demo model (python -m demo.build_model)")
    parser.add_argument("--context", type=int, default=1000, help="tokens when a stream moves (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=10, help="moves of each kind (default: %(default)s)")
    parser.add_argument("--deaths", type=int, default=2, help="sources killed, met and unmet (default: %(default)s)")
    parser.add_argument("--only", choices=("given", "random"), help="one of the two models (default: both)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    arguments = parser.parse_args()
    configure_logging("router", level="error")
    results = []
    with tempfile.TemporaryDirectory(prefix="ascendra-bench-") as folder:
        for model in models(arguments, Path(folder)):
            measured = measure(model, arguments.context, arguments.repetitions, arguments.deaths)
            runs, bytes_per_token = asyncio.run(measured)
            summary = summarise(runs)
            results.append(
                {
                    "model": model.name,
                    "parameters": model.parameters,
                    "kv_bytes_per_token": bytes_per_token,
                    "context_tokens": arguments.context,
                    **summary,
                    "runs": [asdict(run) for run in runs],
                }
            )
            print(json.dumps({"model": model.name, "parameters": model.parameters, **summary}))
            load = {"cpus": os.cpu_count(), "load_average": os.getloadavg()}
            write_result(arguments.out, {**provenance(arguments), **load, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
