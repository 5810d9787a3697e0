"""`ascendra up`: a cluster on this machine."""

import argparse
import asyncio
import contextlib
import os
import re
import signal
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

from rich.console import Console

from ascendra.cli.cluster import ClusterSpec, LocalCluster, checkout
from ascendra.cli.options import DEFAULT_ADDRESS, CliError, Commands

_ECHO_S = 1.0
"""Wrappers such as `timeout` pass Ctrl-C on although the terminal has sent it already."""
MODEL_VARIABLE = "ASCENDRA_MODEL"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
"""Name of a model of the Hugging Face hub."""


def add_commands(commands: Commands) -> None:
    """Add the command of this module."""
    up = commands.add_parser(
        "up",
        help="start a cluster on this machine",
        description="Start predictor, workers, routers and, on request, a gateway on this machine; Ctrl-C stops them.",
    )
    up.add_argument(
        "--port", type=_count, metavar="PORT", default=7100,
        help="port of the first router, the next ones follow; 0 picks free ones (default: %(default)s)",
    )  # fmt: skip
    up.add_argument(
        "--gateway", type=_count, metavar="PORT", nargs="?", const=8000,
        help="serve the OpenAI protocol too, on this port; 0 picks a free one (default port: %(const)s)",
    )  # fmt: skip
    add_cluster_options(up)
    up.set_defaults(run=run_up)


def add_cluster_options(parser: argparse.ArgumentParser) -> None:
    """Add what decides the cluster."""
    parser.add_argument(
        "--lp", type=_count, metavar="N", default=1, help="low-priority workers, for throughput (default: %(default)s)"
    )
    parser.add_argument(
        "--hp", type=_count, metavar="N", default=1,
        help="high-priority workers, for latency; 0: one pool without a split (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--engine",
        choices=("cpu", "emulated", "cuda"),
        default="cpu",
        help="what runs the model; emulated: real scheduling, invented tokens (default: %(default)s)",
    )
    parser.add_argument("--routers", type=_count, metavar="N", default=1, help="routers (default: %(default)s)")
    parser.add_argument(
        "--model", type=Path, metavar="DIR", default=os.environ.get(MODEL_VARIABLE) or None,
        help=f"model directory; without it a small demo model is built once [{MODEL_VARIABLE}]",
    )  # fmt: skip
    parser.add_argument(
        "--work-dir",
        type=Path,
        metavar="DIR",
        help="receives logs and configuration (default: in the checkout, under run/)",
    )
    parser.add_argument("--worker-config", type=Path, metavar="FILE", help="YAML with further keys for every worker")
    parser.add_argument("--router-config", type=Path, metavar="FILE", help="YAML configuration of the routers")


def cluster_spec(
    arguments: argparse.Namespace, *, port: int, work_dir: str, gateway_port: int | None = None
) -> ClusterSpec:
    """Return what the options describe. Raises CliError."""
    if arguments.lp < 1 or arguments.routers < 1:
        raise CliError("--lp and --routers must be at least 1", exit_status=2)
    model = Path(arguments.model) if arguments.model else None
    if model is not None and not model.is_dir():
        hint = f"hf download {model} --local-dir DIR, then --model DIR" if _HUB_NAME.fullmatch(str(model)) else ""
        raise CliError(f"--model: {model} is not a directory", hint=hint, exit_status=2)
    return ClusterSpec(
        lp=arguments.lp,
        hp=arguments.hp,
        engine=arguments.engine,
        routers=arguments.routers,
        port=port,
        gateway_port=gateway_port,
        work_dir=arguments.work_dir or checkout() / "run" / work_dir,
        model=model.resolve() if model else None,
        worker_config=arguments.worker_config,
        router_config=arguments.router_config,
    )


def run_up(arguments: argparse.Namespace) -> int:
    """Run a cluster until Ctrl-C or SIGTERM."""
    spec = cluster_spec(arguments, port=arguments.port, work_dir="up", gateway_port=arguments.gateway)
    return asyncio.run(_up(spec, Console(highlight=False)))


async def _up(spec: ClusterSpec, console: Console) -> int:
    async with running_cluster(spec, console) as (cluster, stop):
        if cluster is not None:
            _print_summary(cluster, console)
            await stop.wait()
    return 0


@contextlib.asynccontextmanager
async def running_cluster(
    spec: ClusterSpec, console: Console
) -> AsyncIterator[tuple[LocalCluster | None, asyncio.Event]]:
    """Start a cluster, yield it and the event that a signal sets, and stop it.

    The cluster is None when a signal came before it was up. A second signal kills what still runs.
    """
    stop = asyncio.Event()
    cluster = LocalCluster(spec, lambda line: console.print(line, style="dim", soft_wrap=True))

    loop = asyncio.get_running_loop()
    asked_at_s = 0.0

    def on_signal() -> None:
        nonlocal asked_at_s
        if not stop.is_set():
            asked_at_s = loop.time()
        elif loop.time() - asked_at_s > _ECHO_S:
            console.print("killing what still runs")
            cluster.kill()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    try:
        started = await _unless(stop, _start(cluster, console))
        yield (cluster if started else None), stop
    finally:
        stop.set()
        console.print("stopping")
        await cluster.stop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        console.print("stopped")


async def _start(cluster: LocalCluster, console: Console) -> None:
    """Start a cluster with a line that says what it waits for."""
    starting = asyncio.create_task(cluster.start())
    began_s = asyncio.get_running_loop().time()
    shown = ""
    try:
        with console.status("") as line:
            while not starting.done():
                seconds = asyncio.get_running_loop().time() - began_s
                names = f" ({', '.join(sorted(cluster.waiting_for))})" if cluster.waiting_for else ""
                line.update(f"{seconds:3.0f} s  {cluster.activity}{names}")
                if not console.is_terminal and cluster.activity != shown:
                    console.print(shown := cluster.activity, soft_wrap=True)
                await asyncio.wait([starting], timeout=0.25)
        starting.result()
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do some work unless the event comes first; whether it was done."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        return task.done()
    finally:
        for pending in (task, stopped):
            pending.cancel()
        await asyncio.gather(task, stopped, return_exceptions=True)


def _print_summary(cluster: LocalCluster, console: Console) -> None:
    spec = cluster.spec
    pools = f"{spec.lp} LP and {spec.hp} HP" if spec.hp else f"{spec.lp} unified"
    model = cluster.model.name if cluster.model else ""
    console.print(f"[bold]Ascendra is up[/bold]: {pools} workers ({spec.engine}), model {model}")
    for name, address in cluster.addresses.items():
        metrics = cluster.http_addresses.get(name)
        console.print(f"  {name}  {address}" + (f"  metrics http://{metrics}/metrics" if metrics else ""))
    if cluster.gateway_url:
        console.print(f"  gateway   {cluster.gateway_url}/v1  (OpenAI protocol)")
    console.print(f"  logs  {cluster.logs}")
    address = next(iter(cluster.addresses.values()))
    where = "" if address == DEFAULT_ADDRESS else f" --address {address}"
    console.print(f'try  ascendra generate --chat "What is a list?"{where}')
    console.print(f"     ascendra status{where}")
    console.print("Ctrl-C stops it")


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {text}")
    return number
