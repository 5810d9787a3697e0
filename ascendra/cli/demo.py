"""`ascendra demo`: a cluster, a mixed load, a table of what became of the objectives."""

import argparse
import asyncio
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ascendra.cli.cluster import LocalCluster
from ascendra.cli.demo_load import TOPICS, LoadClass, Outcome, percentile, run_load
from ascendra.cli.options import CliError, Commands
from ascendra.cli.text import receipt_line
from ascendra.cli.up import add_cluster_options, cluster_spec, running_cluster
from ascendra.client import AsyncClient
from ascendra.session import Session
from ascendra.types import Message, Role, SamplingParams, Slo

CLASSES = (
    LoadClass(name="interactive", slo=Slo(ttft_ms=500, tbt_ms=200), share=0.6, burst=1, sentences=0, max_tokens=32),
    LoadClass(name="batch", slo=Slo(ttft_ms=2000, tbt_ms=500), share=0.4, burst=16, sentences=70, max_tokens=32),
)
_SHOWN_STREAMS = 3
_POOLS = {Role.LOW: "LP", Role.HIGH: "HP", Role.UNIFIED: "unified"}


def add_commands(commands: Commands) -> None:
    """Add the command of this module."""
    demo = commands.add_parser(
        "demo",
        help="start a cluster, send it a mixed load, print an SLO table, stop",
        description="Start a cluster on free ports, send it short interactive and long requests, print how their "
        "objectives were met, and stop.",
    )
    demo.add_argument(
        "--rate", type=float, metavar="RPS", default=10.0, help="mean requests per second (default: %(default)s)"
    )
    demo.add_argument(
        "--seconds", type=float, metavar="S", default=20.0, help="how long to send, in seconds (default: %(default)s)"
    )
    demo.add_argument("--seed", type=int, metavar="N", default=0, help="of the load (default: %(default)s)")
    add_cluster_options(demo)
    demo.set_defaults(run=run_demo)


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the demo; fails when no request was served."""
    if not arguments.rate > 0 or not arguments.seconds > 0:
        raise CliError("--rate and --seconds must be above 0", exit_status=2)
    return asyncio.run(_demo(arguments, Console(highlight=False)))


async def _demo(arguments: argparse.Namespace, console: Console) -> int:
    spec = cluster_spec(arguments, port=0, work_dir="demo")
    outcomes: list[Outcome] = []
    async with running_cluster(spec, console) as (cluster, stop):
        if cluster is not None:
            load = asyncio.create_task(_load(cluster, console, arguments, outcomes))
            stopped = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait([load, stopped], return_when=asyncio.FIRST_COMPLETED)
                if load.done():
                    load.result()
            finally:
                for task in (load, stopped):
                    task.cancel()
                await asyncio.gather(load, stopped, return_exceptions=True)
    if not outcomes:
        return 0  # stopped before it began
    console.print()
    console.print(slo_table(outcomes))
    console.print("offl.: moved to HP before they missed; tick.: taken by an idle HP", style="dim")
    _print_failures(outcomes, console)
    return 0 if any(outcome.receipt for outcome in outcomes) else 1


async def _load(
    cluster: LocalCluster, console: Console, arguments: argparse.Namespace, outcomes: list[Outcome]
) -> None:
    """Send the load and, beside it, a few questions whose answers are printed as they come."""
    async with AsyncClient(list(cluster.addresses.values())) as client, client.session() as session:
        kinds = " and ".join(
            f"{load_class.share:.0%} {'long' if load_class.sentences else 'short'} ({load_class.name})"
            + (f" in bursts of {load_class.burst}" if load_class.burst > 1 else "")
            for load_class in CLASSES
        )
        console.print(f"\n{arguments.rate:g} requests per second for {arguments.seconds:g} s, {kinds}.")
        console.print("Some answers as they arrive; the demo model is tiny and was trained for seconds:")
        async with asyncio.TaskGroup() as tasks:
            load = tasks.create_task(
                run_load(
                    session,
                    CLASSES,
                    rate_rps=arguments.rate,
                    seconds=arguments.seconds,
                    seed=arguments.seed,
                    outcomes=outcomes,
                )
            )
            for topic in TOPICS[:_SHOWN_STREAMS]:
                await _show_stream(session, console, f"What is {topic}?")
            with console.status("") as line:
                while not load.done():
                    ended = sum(1 for outcome in outcomes if outcome.receipt or outcome.error)
                    line.update(f"{ended} of {len(outcomes)} requests sent have ended")
                    await asyncio.wait([load], timeout=0.25)


async def _show_stream(session: Session, console: Console, question: str) -> None:
    console.print(f"\n[bold]> {question}[/bold]")
    async for chunk in session.stream(
        messages=[Message("user", question)],
        slo=CLASSES[0].slo,
        slo_class=CLASSES[0].name,
        sampling=SamplingParams(temperature=0.7, max_tokens=60),
        timeout_s=60,
    ):
        console.print(chunk.text, end="", markup=False, soft_wrap=True)
        if chunk.finished is not None:
            console.print()
            console.print(receipt_line(chunk.finished.receipt), style="dim", soft_wrap=True)


def slo_table(outcomes: Sequence[Outcome]) -> Table:
    """Return what became of the objectives, by class, as the client measured it."""
    title = "Objectives (TTFT/TBT) and what was measured at the client, in milliseconds"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("class", no_wrap=True)
    for name in ("objective", "sent", "TTFT p50", "p99", "gap p99", "met", "offl.", "tick."):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("first token", no_wrap=True)
    for load_class in CLASSES:
        mine = [outcome for outcome in outcomes if outcome.load_class is load_class]
        if not mine:
            continue
        ttfts_s = [outcome.ttft_s for outcome in mine if outcome.ttft_s is not None]
        table.add_row(
            load_class.name,
            f"{load_class.slo.ttft_ms:g}/{load_class.slo.tbt_ms:g}",
            str(len(mine)),
            f"{percentile(ttfts_s, 0.5) * 1000:.0f}",
            f"{percentile(ttfts_s, 0.99) * 1000:.0f}",
            f"{percentile((outcome.p99_gap_s for outcome in mine), 0.99) * 1000:.0f}",
            f"{sum(outcome.attained for outcome in mine) / len(mine):.1%}",
            str(_count_attempts(mine, "offload")),
            str(_count_attempts(mine, "ticket")),
            _pools(mine),
        )
    return table


def _pools(outcomes: Sequence[Outcome]) -> str:
    pools = Counter(outcome.receipt.pool for outcome in outcomes if outcome.receipt and outcome.receipt.pool)
    return " ".join(f"{_POOLS[pool]} {count}" for pool, count in pools.most_common())


def _count_attempts(outcomes: Sequence[Outcome], kind: str) -> int:
    """Return how many requests were placed in this way at some time."""
    receipts = [outcome.receipt for outcome in outcomes if outcome.receipt]
    return sum(any(attempt.reason.startswith(kind) for attempt in receipt.attempts) for receipt in receipts)


def _print_failures(outcomes: Sequence[Outcome], console: Console) -> None:
    for message, count in Counter(outcome.error for outcome in outcomes if outcome.error).most_common():
        console.print(f"{count} failed: {message}", style="red")
