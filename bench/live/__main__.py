"""python -m bench.live: open-loop load from a trace on live systems, compared run by run.

Without --address it starts the named systems itself, one after the other, each with emulated workers; every
repetition runs all of them on the same requests (same seed), so that compared numbers come from the same minutes.
The result file is written after every run, and what is in it is not run again: a stopped bench goes on where it was.
With --address (a router) or --openai URL it measures what already runs.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ascendra import AscendraError, AsyncClient
from ascendra.v1 import common_pb2
from bench.live.cpu import CpuWatch
from bench.live.lateness import lateness
from bench.live.load import outcomes, run_load
from bench.live.results import ResultFile
from bench.live.systems import SYSTEMS, TABLE, RunningSystem, Workers, running_system
from bench.live.targets import FIRST_TOKEN_ID, AscendraTarget, Target, ascendra_target, openai_target, prompt_of
from bench.markdown import markdown_table
from bench.metrics import Report, RequestRecord, summarize
from bench.options import UnloadedTtft, above_zero, at_least, load_profile, mistakes_in_one_line
from bench.workloads import WorkloadRequest, load_trace, make_workload, slo_set

COLUMNS = {
    "joint": "joint",
    "ttft_only": "TTFT",
    "tbt_only": "TBT",
    "mean_gap": "joint by mean gap",
    "ttft_p50_s": "TTFT p50 s",
    "ttft_p90_s": "TTFT p90 s",
    "pooled_gap_p99_s": "pooled p99 gap s",
    "longest_wait_s": "longest wait s",
}
Workload = Callable[[float, int], list[WorkloadRequest]]
"""Makes the requests at a rate, with a seed."""
SHARES = ("joint", "ttft_only", "tbt_only", "mean_gap")


def fitting(workload: Iterable[WorkloadRequest], max_model_len: int) -> list[WorkloadRequest]:
    """Drop the requests that do not fit the context; all systems get the same ones."""
    return [item for item in workload if item.prompt_tokens + item.output_tokens < max_model_len]


@dataclass(frozen=True, slots=True)
class Measured:
    """A workload that was served."""

    report: Report
    """Without the warm-up."""
    ends: str
    """How its requests ended."""
    records: list[RequestRecord]
    """With it."""
    started_s: float
    """When its clock started, on the monotonic clock."""


async def measure(
    target: Target, workload: Sequence[WorkloadRequest], arguments: argparse.Namespace, name: str, seed: int
) -> Measured:
    """Send one workload."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(f"{name} seed {seed}", total=len(workload))

        def advance(record: RequestRecord) -> None:
            progress.advance(bar)

        prompt = partial(prompt_of, vocab_size=arguments.vocab_size, seed=seed)
        records = await run_load(target, workload, prompt, drain_s=arguments.drain_s, on_done=advance)
    counted = [record for record in records if record.arrival_s - records[0].arrival_s >= arguments.warmup_s]
    started_s = records[0].arrival_s - min(request.arrival_s for request in workload)
    return Measured(summarize(counted), outcomes(counted), records, started_s)


def workload_from(arguments: argparse.Namespace) -> Workload:
    """Return what makes the workloads, once all options were looked at.

    Raises:
        OSError: a file cannot be read.
        ValueError: an option makes no sense.
    """
    above_zero(seconds=arguments.seconds, timeout_s=arguments.timeout_s)
    at_least(0, warmup_s=arguments.warmup_s, drain_s=arguments.drain_s, jitter_sigma=arguments.jitter_sigma)
    at_least(1, workers=arguments.workers, max_model_len=arguments.max_model_len)
    at_least(1, kv_capacity_tokens=arguments.kv_capacity_tokens)
    at_least(FIRST_TOKEN_ID + 1, vocab_size=arguments.vocab_size)
    if arguments.model is not None and not arguments.model.is_dir():
        raise ValueError(f"--model {arguments.model}: not a directory")
    try:
        httpx.URL(arguments.openai)
    except httpx.InvalidURL as error:
        raise ValueError(f"--openai {arguments.openai}: {error}") from error
    trace = load_trace(arguments.trace)
    classes = slo_set(arguments.slo, UnloadedTtft(load_profile(arguments.profile)))

    def workload(rate_rps: float, seed: int) -> list[WorkloadRequest]:
        requests = make_workload(
            trace,
            arrivals=arguments.arrivals,
            rate_rps=rate_rps,
            requests=max(round(rate_rps * (arguments.warmup_s + arguments.seconds)), 1),
            classes=classes,
            seed=seed,
        )
        return fitting(requests, arguments.max_model_len)

    for rate_rps in arguments.rates:
        above_zero(rates=rate_rps)
        for seed in arguments.seeds:
            made = workload(rate_rps, seed)
            if not made or made[-1].arrival_s - made[0].arrival_s < arguments.warmup_s:
                raise ValueError(
                    f"at {rate_rps:g}/s no request within --max-model-len comes after the warm-up; raise --seconds"
                )
    return workload


async def run(arguments: argparse.Namespace, workload_of: Workload, file: ResultFile) -> int:
    """Measure everything asked for that the file lacks; the systems take turns within each seed.

    Returns how many runs served nothing: they say nothing of a system, so the file does not get them.
    """
    empty = 0
    for seed in arguments.seeds:
        for rate_rps in arguments.rates:
            workload = workload_of(rate_rps, seed)
            for name in target_names(arguments):
                if file.holds((name, seed, rate_rps)):
                    continue
                async with AsyncExitStack() as stack:
                    target, system = await open_target(name, arguments, seed, stack)
                    watch = CpuWatch()
                    async with watched(system.router) as facts:
                        measured = await measure(target, workload, arguments, f"{name} {rate_rps:g}/s", seed)
                    cpu = watch.cores()
                    late = machine_lateness(system, arguments.profile, measured, target)
                report = measured.report
                how = f"joint {report.joint:.1%}: {measured.ends}; {cpu}"
                print(f"{name} seed {seed} {rate_rps:g}/s {how}", file=sys.stderr)
                if not report.finished:
                    empty += 1
                    continue
                result = {"system": name, "seed": seed, "rate_rps": rate_rps, "report": report.as_dict(), "cpu": cpu}
                file.append(result | facts.summary(measured.started_s) | late)
    return empty


def target_names(arguments: argparse.Namespace) -> list[str]:
    """Return what is measured, by name."""
    if arguments.address:
        return ["address"]
    if arguments.openai:
        return ["openai"]
    return [name for given in arguments.systems for name in (TABLE if given == "table" else [given])]


@dataclass(slots=True)
class Facts:
    """What a router said of itself during a run."""

    prediction_policy: str = ""
    """Who predicted last."""
    rooms: list[tuple[float, list[float]]] = field(default_factory=list)
    """Every second, on the monotonic clock: the room in seconds that each worker leaves in gaps, HPs first, by id."""

    async def ask(self, client: AsyncClient) -> None:
        """Ask once. Raises AscendraError."""
        status = await client.status()
        self.prediction_policy = status.prediction_policy
        workers = sorted(
            status.workers, key=lambda worker: (worker.role != common_pb2.ROLE_HIGH_PRIORITY, worker.worker_id)
        )
        if workers:
            self.rooms.append((time.monotonic(), [round(worker.delivery_s, 6) for worker in workers]))

    async def follow(self, client: AsyncClient) -> None:
        """Ask until cancelled; a router that does not answer once has other things to do than end a run."""
        while True:
            await asyncio.sleep(1.0)
            with suppress(AscendraError):
                await self.ask(client)

    def summary(self, started_s: float) -> dict[str, Any]:
        """Return it for the result file, with times from `started_s` on; nothing without a router."""
        if not self.prediction_policy:
            return {}
        medians_s = [statistics.median(rooms_s) for _, rooms_s in self.rooms]
        return {
            "prediction_policy_at_end": self.prediction_policy,
            "delivery_s": statistics.median(medians_s) if medians_s else 0.0,
            "rooms": [(round(at_s - started_s, 3), rooms_s) for at_s, rooms_s in self.rooms],
        }


@asynccontextmanager
async def watched(router: str) -> AsyncIterator[Facts]:
    """Follow a router while the context is open; an empty address: there is none.

    Raises AscendraError when it cannot be asked.
    """
    facts = Facts()
    if not router:
        yield facts
        return
    async with AsyncClient(router) as client:
        await facts.ask(client)
        following = asyncio.create_task(facts.follow(client))
        try:
            yield facts
        finally:
            following.cancel()
            with suppress(asyncio.CancelledError):
                await following


def machine_lateness(system: RunningSystem, profile: str, measured: Measured, target: Target) -> dict[str, Any]:
    """Return for the result file what the machine added to steps and deliveries; only of systems started here."""
    if not system.step_logs or not isinstance(target, AscendraTarget):
        return {}
    try:
        late = lateness(system.step_logs, load_profile(profile), measured.records, target.homes)
    except ValueError as error:
        print(f"lateness not known: {error}", file=sys.stderr)
        return {}
    return {"lateness": late.as_dict()}


async def open_target(
    name: str, arguments: argparse.Namespace, seed: int, stack: AsyncExitStack
) -> tuple[Target, RunningSystem]:
    """Start (or only connect to) a system; return what load goes to, and the system as far as it is known."""
    system = RunningSystem()
    if name == "openai":
        openai = openai_target(arguments.openai, arguments.openai_model, timeout_s=arguments.timeout_s)
        return await stack.enter_async_context(openai), system
    addresses = arguments.address
    if not addresses:
        workers = Workers(
            count=arguments.workers,
            model=arguments.model,
            profile=arguments.profile,
            jitter_sigma=arguments.jitter_sigma,
            max_model_len=arguments.max_model_len,
            kv_capacity_tokens=arguments.kv_capacity_tokens,
            prefix_caching=arguments.prefix_caching,
        )
        system = await stack.enter_async_context(running_system(SYSTEMS[name], workers, seed=seed))
        addresses = [system.router]
        await asyncio.sleep(1)  # lets routers attach and learn the round trip
    else:
        system = RunningSystem(router=addresses[0])
    return await stack.enter_async_context(ascendra_target(addresses, timeout_s=arguments.timeout_s)), system


def table(results: Sequence[dict[str, Any]]) -> str:
    """Render medians over seeds, with the spread of the primary metric."""
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault((result["rate_rps"], result["system"]), []).append(result)
    rows = []
    for (rate_rps, system), runs in groups.items():
        cells = []
        reports = [run["report"] for run in runs]
        busy = [run["cpu"]["machine_busy"] for run in runs if "cpu" in run]
        for name in COLUMNS:
            value = statistics.median(report[name] for report in reports)
            cells.append(f"{value:.1%}" if name in SHARES else f"{value:.3g}")
        longest = statistics.median(report["joint_by_prompt_decile"][-1] for report in reports)
        joints = [report["joint"] for report in reports]
        machine = f"{max(busy):.0%}" if busy else "-"
        spread = f"{min(joints):.1%}-{max(joints):.1%}"
        rows.append([f"{rate_rps:g}", system, *cells, f"{longest:.1%}", spread, machine])
    return markdown_table(
        ["req/s", "system", *COLUMNS.values(), "longest tenth joint", "min-max joint", "machine busy"], rows
    )


def leaves(errors: BaseExceptionGroup) -> list[BaseException]:
    """Return the exceptions in a group and in its groups."""
    inner = (leaves(one) if isinstance(one, BaseExceptionGroup) else [one] for one in errors.exceptions)
    return [error for found in inner for error in found]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.live", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trace", type=Path, required=True, help="trace file; formats in bench/workloads.py")
    parser.add_argument("--arrivals", default="poisson", help="poisson, gamma:<cv> or trace (own timestamps)")
    parser.add_argument("--rates", type=float, nargs="+", required=True, help="requests per second")
    parser.add_argument("--slo", default="1000/100", help="A, B, C, B/<tbt_ms> or <ttft_ms>/<tbt_ms>")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a run after the warm-up, in seconds")
    parser.add_argument("--warmup-s", type=float, default=10.0, help="requests of the first seconds do not count")
    parser.add_argument("--drain-s", type=float, default=60.0, help="wait for stragglers after the last arrival")
    parser.add_argument("--timeout-s", type=float, default=300.0, help="limit of one request, in seconds")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--systems",
        nargs="+",
        default=["table"],
        choices=["table", *SYSTEMS],
        metavar="NAME",
        help=f"table ({', '.join(TABLE)}) or any of {', '.join(SYSTEMS)}",
    )
    parser.add_argument("--workers", type=int, default=8, help="emulated workers")
    parser.add_argument("--model", type=Path, help="model directory, for the router's tokenizer")
    parser.add_argument("--profile", default="a100-llama3-8b", help="step-time profile of the emulated workers")
    parser.add_argument("--jitter-sigma", type=float, default=0.03, help="standard deviation of log(step time)")
    parser.add_argument("--max-model-len", type=int, default=8192, help="context; longer requests are left out")
    parser.add_argument("--kv-capacity-tokens", type=int, default=380_000, help="KV cache of a worker, in tokens")
    parser.add_argument("--prefix-caching", action="store_true", help="of the workers; for traces that share prefixes")
    parser.add_argument("--vocab-size", type=int, default=1000, help="prompts are random ids below this")
    parser.add_argument("--address", nargs="+", default=[], help="measure running routers instead")
    parser.add_argument("--openai", default="", help="measure a running OpenAI-compatible server, by base URL")
    parser.add_argument("--openai-model", default="", help="its model name")
    parser.add_argument("--out", type=Path, help="raw results as JSON; runs that it holds are not repeated")
    arguments = parser.parse_args(argv)
    if not arguments.address and not arguments.openai and arguments.model is None:
        parser.error("--model is needed to start systems")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, write raw results."""
    arguments = parse(argv)
    own = ("out", "trace", "systems", "seeds", "rates")  # of single runs, not of the file
    settings = {name: str(value) for name, value in vars(arguments).items() if name not in own}
    with mistakes_in_one_line():
        workload_of = workload_from(arguments)
        file = ResultFile(arguments.out, settings | {"trace": arguments.trace.name})
    mistakes: list[BaseException] = []
    empty = 0
    try:
        empty = uvloop.run(run(arguments, workload_of, file))
    except* (OSError, AscendraError) as errors:  # a system's processes run in a task group
        mistakes += leaves(errors)
    if file.results:
        print(table(file.results))
    if mistakes:
        sys.exit(f"error: {' '.join(str(mistakes[0]).split())}")
    if empty:
        sys.exit(f"error: nothing was served in {empty} of the runs")


if __name__ == "__main__":
    main()
