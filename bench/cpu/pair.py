"""python -m bench.cpu.pair: two stock `vllm serve` against one LP and one HP worker, on real vLLM on two cores.

All run the same random model in float32 with one thread an engine, engine i of each system pinned to core i. Stock
servers are asked in turn, over HTTP; the cluster through its router. All systems are started first and then take turns
at the same requests, so compared numbers come from the same minutes.
"""

import argparse
import asyncio
import itertools
import random
import statistics
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import uvloop

from bench.live.load import run_load
from bench.live.targets import Target, ascendra_target, openai_target, prompt_of
from bench.markdown import markdown_table
from bench.metrics import summarize
from bench.parity.servers import MODEL_NAME, vllm_server
from bench.processes import Processes
from bench.random_model import SHAPES, VOCAB_SIZE, random_model
from bench.result_files import provenance, write_result
from bench.workloads import SloClass, TraceRow, WorkloadRequest, make_workload

MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 64
KV_CACHE_BYTES = 1 << 30


class InTurn:
    """Several servers, asked one after the other."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._targets = itertools.cycle(targets)

    def send(self, request: WorkloadRequest, prompt: list[int]) -> AsyncGenerator[int]:
        """Send to the next one."""
        return next(self._targets).send(request, prompt)


def pin_new_engines(known: set[int]) -> None:
    """Pin the engine cores started since to a core each."""
    cores = [p for p in psutil.Process().children(recursive=True) if "EngineCore" in " ".join(p.cmdline())]
    new = sorted((p for p in cores if p.pid not in known), key=lambda p: p.create_time())
    for index, process in enumerate(new):
        process.cpu_affinity([index % (psutil.cpu_count() or 1)])
        known.add(process.pid)


async def start_stock(model: Path, budget_tokens: int, stack: AsyncExitStack) -> Target:
    """Start two stock servers."""
    servers = [
        stack.enter_async_context(
            vllm_server(
                model,
                max_model_len=MAX_MODEL_LEN,
                max_num_seqs=min(MAX_NUM_SEQS, budget_tokens),  # vLLM takes no more than a step has tokens
                max_num_batched_tokens=budget_tokens,
                kv_cache_bytes=KV_CACHE_BYTES,
            )
        )
        for _ in range(2)
    ]
    urls = [await server for server in servers]
    targets = [await stack.enter_async_context(openai_target(url, MODEL_NAME, timeout_s=300)) for url in urls]
    return InTurn(targets)


async def start_ascendra(model: Path, roles: Sequence[str], stack: AsyncExitStack) -> Target:
    """Start workers in these roles, a predictor and a router."""
    processes = await stack.enter_async_context(Processes())
    loopback = {"listen": "127.0.0.1:0", "metrics-listen": "127.0.0.1:0"}
    predictor, _ = await processes.start_service("services.predictor", loopback)
    configs = [
        {
            **loopback,
            "worker-id": f"{role}-{index}",
            "role": role,
            "engine": "cpu",
            "model": str(model),
            "dtype": "float32",
            "prefix-caching": False,
            "max-model-len": MAX_MODEL_LEN,
            "max-num-seqs": MAX_NUM_SEQS,
            "max-num-batched-tokens": 2048,
            "kv-cache-memory-bytes": KV_CACHE_BYTES,
            "predictor": predictor,
        }
        for index, role in enumerate(roles)
    ]
    workers, _ = await processes.start_workers(configs)
    router = {**loopback, "workers": workers, "predictor": predictor, "model": str(model)}
    address, _ = await processes.start_service("services.router", router)
    return await stack.enter_async_context(ascendra_target([address], timeout_s=300))


def workload_of(arguments: argparse.Namespace, rate_rps: float, seed: int) -> list[WorkloadRequest]:
    """Return Poisson arrivals of prompts and answers of half to one and a half times the mean length."""
    rng = random.Random(seed)

    def around(mean: int) -> int:
        return rng.randint(mean // 2, mean * 3 // 2)

    rows = [TraceRow(None, around(arguments.prompt_tokens), around(arguments.output_tokens)) for _ in range(2000)]
    objective = SloClass("default", arguments.ttft_ms / 1e3, arguments.tbt_ms / 1e3)
    requests = round(rate_rps * arguments.seconds)
    return make_workload(rows, arrivals="poisson", rate_rps=rate_rps, requests=requests, classes=[objective], seed=seed)


async def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Start everything, then let the systems take turns."""
    model = random_model(arguments.shape, arguments.demo_model, arguments.model_dir / arguments.shape)
    results = []
    async with AsyncExitStack() as stack:
        targets: dict[str, Target] = {}
        known: set[int] = set()
        for name in arguments.systems:
            if name.startswith("vllm-"):
                targets[name] = await start_stock(model, int(name.removeprefix("vllm-")), stack)
            else:
                roles = ("unified", "unified") if name == "unified" else ("low", "high")
                targets[name] = await start_ascendra(model, roles, stack)
            pin_new_engines(known)
        for name, target in targets.items():  # warms up engines and predictor
            await measure(target, workload_of(arguments, arguments.rates[0], 0)[:20], 0)
            print(f"{name} is warm", file=sys.stderr)
        for seed in arguments.seeds:
            for rate_rps in arguments.rates:
                workload = workload_of(arguments, rate_rps, seed)
                for name, target in targets.items():
                    report = await measure(target, workload, seed)
                    results.append({"system": name, "seed": seed, "rate_rps": rate_rps, "report": report})
                    print(f"{name} seed {seed} {rate_rps:g}/s joint {report['joint']:.1%}", file=sys.stderr)
    return results


async def measure(target: Target, workload: Sequence[WorkloadRequest], seed: int) -> dict[str, Any]:
    """Send one workload, wait for its end, summarise it."""
    records = await run_load(target, workload, partial(prompt_of, vocab_size=VOCAB_SIZE, seed=seed), drain_s=60)
    await asyncio.sleep(1)  # lets engines finish with what was cancelled
    return summarize(records).as_dict()


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Render medians over seeds with the spread of joint attainment."""
    heads = ["req/s", "system", "joint (min-max)", "TTFT", "TBT", "joint by mean gap"]
    heads += ["TTFT p50 s", "p90 s", "pooled p99 gap s"]
    rows = []
    groups: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["rate_rps"], result["system"]), []).append(result["report"])
    for (rate_rps, system), reports in sorted(groups.items(), key=lambda group: group[0][0]):
        median = {
            name: statistics.median(report[name] for report in reports)
            for name in ("joint", "ttft_only", "tbt_only", "mean_gap", "ttft_p50_s", "ttft_p90_s", "pooled_gap_p99_s")
        }
        joints = [report["joint"] for report in reports]
        shares = (f"{median[name]:.1%}" for name in ("ttft_only", "tbt_only", "mean_gap"))
        times = (f"{median[name]:.3g}" for name in ("ttft_p50_s", "ttft_p90_s", "pooled_gap_p99_s"))
        spread = f"{median['joint']:.1%} ({min(joints):.1%}-{max(joints):.1%})"
        rows.append([f"{rate_rps:g}", system, spread, *shares, *times])
    return markdown_table(heads, rows)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.pair", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--demo-model", type=Path, required=True, help="for its tokenizer (see demo/)")
    parser.add_argument("--model-dir", type=Path, default=Path(".cache"), help="where the random model is kept")
    parser.add_argument("--shape", default="m110", choices=SHAPES)
    parser.add_argument(
        "--systems",
        nargs="+",
        default=["vllm-2048", "vllm-48", "vllm-32", "ascendra"],
        help='"vllm-BUDGET", "ascendra" (LP and HP) or "unified"',
    )
    parser.add_argument("--rates", type=float, nargs="+", default=[0.32, 0.4, 0.64], help="requests per second")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="mean length of prompts")
    parser.add_argument("--output-tokens", type=int, default=64, help="mean length of answers")
    parser.add_argument("--ttft-ms", type=float, default=2000)
    parser.add_argument("--tbt-ms", type=float, default=200)
    parser.add_argument("--seconds", type=float, default=75.0, help="length of a run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, help="write raw results as JSON")
    arguments = parser.parse_args()
    results = uvloop.run(run(arguments))
    print(table(results))
    write_result(arguments.out, {**provenance(arguments), "results": results})


if __name__ == "__main__":
    main()
