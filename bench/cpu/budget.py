"""python -m bench.cpu.budget: what the in-engine token budget does on real vLLM on CPU.

Two workers of the same model, one with a static token budget (vLLM's own behaviour), one with the dynamic budget, take
turns under the same load: some streams decode all the time while long prompts arrive one after the other. Compared
are the gaps of the streams and the prompt tokens prefilled a second.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from ascendra import AsyncClient, SamplingParams, Slo
from ascendra.session import Session
from bench.markdown import markdown_table
from bench.processes import Processes
from bench.random_model import CONTEXT_TOKENS, SHAPES, VOCAB_SIZE, random_model
from bench.result_files import provenance, write_result

SLACK_S = 600.0
"""TTFT objective of everything: only the gaps matter here."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One system's turn."""

    system: str
    pair: int
    gap_p50_ms: float
    gap_p99_ms: float
    gap_max_ms: float
    prefill_tokens_per_s: float
    stream_tokens_per_s: float


@contextlib.asynccontextmanager
async def running_worker(
    processes: Processes, model: Path, name: str, policy: dict[str, Any], most_tokens: int
) -> AsyncIterator[Session]:
    """Start a worker with a router in front of it and yield a session to it."""
    config = {
        "listen": "127.0.0.1:0",
        "metrics-listen": "127.0.0.1:0",
        "worker-id": name,
        "engine": "cpu",
        "model": str(model),
        "max-model-len": CONTEXT_TOKENS,
        "max-num-seqs": 64,
        "max-num-batched-tokens": most_tokens,
        "kv-cache-memory-bytes": 2 << 30,
        "dtype": "float32",
        "prefix-caching": False,
        **policy,
    }
    (worker,), _ = await processes.start_workers([config])
    address, _ = await processes.start_service(
        "services.router",
        {"listen": "127.0.0.1:0", "metrics-listen": "127.0.0.1:0", "workers": [worker], "model": str(model)},
    )
    async with AsyncClient(address) as client, client.session() as session:
        yield session


class Load:
    """Decoding streams, and long prompts one after the other."""

    def __init__(self, session: Session, arguments: argparse.Namespace, seed: int) -> None:
        self._session = session
        self._arguments = arguments
        self._rng = random.Random(seed)
        self.gaps_s: list[float] = []
        self.prefilled_s: list[float] = []
        """When each long prompt was done."""
        self.measuring = False

    async def stream(self, started: asyncio.Event) -> None:
        """Decode until cancelled, noting the gaps."""
        tbt_ms = self._arguments.tbt_ms
        while True:
            last_s = 0.0
            async for chunk in self._request(32, self._arguments.stream_tokens, tbt_ms):
                now_s = time.monotonic()
                if last_s and chunk.token_ids and self.measuring:
                    self.gaps_s.append(now_s - last_s)
                last_s = now_s
                started.set()

    async def prompts(self) -> None:
        """Have long prompts prefilled, one after the other, until cancelled."""
        while True:
            async for chunk in self._request(self._arguments.prompt_tokens, 1, self._arguments.tbt_ms):
                if chunk.token_ids and self.measuring:
                    self.prefilled_s.append(time.monotonic())

    def prefill_tokens_per_s(self) -> float:
        """Return the rate from the first to the last prompt that was done: whole ones, in the time that they took."""
        first_s, last_s = self.prefilled_s[0], self.prefilled_s[-1]
        return (len(self.prefilled_s) - 1) * float(self._arguments.prompt_tokens) / (last_s - first_s)

    def _request(self, prompt_tokens: int, tokens: int, tbt_ms: float) -> AsyncIterator[Any]:
        return self._session.stream(
            token_ids=self._rng.choices(range(10, VOCAB_SIZE), k=prompt_tokens),
            sampling=SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True),
            slo=Slo(ttft_ms=SLACK_S * 1e3, tbt_ms=tbt_ms),
            tokens_only=True,
        )


async def turn(session: Session, name: str, pair: int, arguments: argparse.Namespace) -> Turn:
    """Give one system the load for a while, alone."""
    load = Load(session, arguments, seed=pair)
    started = [asyncio.Event() for _ in range(arguments.streams)]
    tasks = [asyncio.create_task(load.stream(event)) for event in started]
    try:
        async with asyncio.timeout(120):
            for event in started:
                await event.wait()
        tasks.append(asyncio.create_task(load.prompts()))
        await asyncio.sleep(arguments.settle_s)
        load.measuring, began_s = True, time.monotonic()
        await asyncio.sleep(arguments.seconds)
        seconds = time.monotonic() - began_s
        load.measuring = False
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(1.0)  # lets the engine finish with what was cancelled
    p50, p99, most = np.percentile(load.gaps_s, [50, 99, 100]) * 1e3
    stream_tokens_per_s = len(load.gaps_s) / seconds
    return Turn(name, pair, float(p50), float(p99), float(most), load.prefill_tokens_per_s(), stream_tokens_per_s)


async def run(arguments: argparse.Namespace) -> list[Turn]:
    """Let the systems take turns."""
    model = random_model(arguments.shape, arguments.demo_model, arguments.model_dir / arguments.shape)
    stock = {"role": "unified", "value-function": "fcfs", "relegation": "none", "token-budget": "static"}
    systems = {
        f"static-{tokens}": ({**stock, "static-budget-tokens": tokens}, max(arguments.static))
        for tokens in arguments.static
    }
    systems["dynamic"] = ({"role": "unified", "token-budget": "dynamic"}, max(arguments.static))
    turns = []
    async with contextlib.AsyncExitStack() as stack:
        processes = await stack.enter_async_context(Processes())
        sessions = {
            name: await stack.enter_async_context(running_worker(processes, model, name, policy, tokens))
            for name, (policy, tokens) in systems.items()
        }
        for (
            name,
            session,
        ) in sessions.items():  # every engine has seen the load, and learned its steps, before it counts
            await turn(session, name, -1, arguments)
        for pair in range(arguments.pairs):
            for name, session in sessions.items():
                done = await turn(session, name, pair, arguments)
                print(json.dumps(asdict(done)), file=sys.stderr)
                turns.append(done)
    return turns


def table(turns: Sequence[Turn]) -> str:
    """Render medians, and ratios to the first system within each pair, with their spread."""
    names = list(dict.fromkeys(one.system for one in turns))
    by = {name: [one for one in turns if one.system == name] for name in names}
    heads = ["system", "gap p50 ms", "gap p99 ms", "longest ms", "prefill tok/s"]
    heads += [f"p99 / {names[0]}", f"prefill / {names[0]}"]
    rows = []
    for name in names:
        figures = [
            statistics.median(getattr(one, field) for one in by[name])
            for field in ("gap_p50_ms", "gap_p99_ms", "gap_max_ms", "prefill_tokens_per_s")
        ]
        ratios = []
        for field in ("gap_p99_ms", "prefill_tokens_per_s"):
            pairs = zip(by[name], by[names[0]], strict=True)
            values = [getattr(one, field) / getattr(base, field) for one, base in pairs]
            ratios.append(f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})")
        rows.append([name, *(f"{figure:.0f}" for figure in figures), *ratios])
    return markdown_table(heads, rows)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.budget", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo-model", type=Path, required=True, help="for its tokenizer (see demo/)")
    parser.add_argument("--model-dir", type=Path, default=Path(".cache"), help="where the random model is kept")
    parser.add_argument("--shape", default="m30", choices=SHAPES)
    parser.add_argument("--static", type=int, nargs="+", default=[2048, 512], help="static budgets, in tokens")
    parser.add_argument("--tbt-ms", type=float, default=400.0, help="objective that the dynamic budget keeps")
    parser.add_argument("--streams", type=int, default=6, help="streams that decode")
    parser.add_argument("--stream-tokens", type=int, default=400, help="tokens of each before the next begins")
    parser.add_argument("--prompt-tokens", type=int, default=1500, help="length of the long prompts")
    parser.add_argument("--pairs", type=int, default=4, help="turns of each system")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured part of a turn")
    parser.add_argument("--settle-s", type=float, default=3.0, help="part of a turn before it")
    parser.add_argument("--out", type=Path, help="write all turns as JSON")
    arguments = parser.parse_args()
    turns = uvloop.run(run(arguments))
    print(table(turns))
    write_result(arguments.out, {**provenance(arguments), "turns": [asdict(one) for one in turns]})


if __name__ == "__main__":
    main()
