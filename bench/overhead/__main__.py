"""python -m bench.overhead: latency and CPU that the router adds per token, with what each process spends.

Starts emulated workers at a constant step time and one or two routers, then runs each client in turn, interleaved over
the repetitions. Latency is the difference between the quantiles of the routed client and those of the direct one in
the same repetition. With one worker all streams' tokens come at the same instant, the worst burst there is; with
several they come in as many bursts.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import uvloop

from ascendra import AsyncClient
from bench.markdown import markdown_table
from bench.overhead.clients import CLIENTS, Arrivals
from bench.overhead.cluster import Cluster, running_cluster
from bench.overhead.latency import Floats, token_latencies_s, window
from bench.result_files import write_result

SETTLE_S = 2.0


@dataclass
class Cell:
    """One client at one number of streams, in one repetition."""

    client: str
    streams: int
    workers: int
    routers: int
    repetition: int
    tokens_per_s: float
    delivered_share: float
    """Tokens that reached the client over steps x streams."""
    latency_p50_ms: float
    latency_p99_ms: float
    router_us_per_token: float
    worker_us_per_token: float
    client_us_per_token: float
    gateway_us_per_token: float
    """0 for clients that do not pass through one."""
    router_rss_mib: float
    errors: int


async def measure(cluster: Cluster, client: str, streams: int, seconds: float, repetition: int, text: bool) -> Cell:
    """Run one cell: start the streams, let them settle, watch them for `seconds`, stop them."""
    tokens = int((seconds + SETTLE_S + 60) * cluster.steps_per_s)
    arrivals = Arrivals(run=f"{client}-{streams}-{repetition}")
    addresses = cluster.addresses(client)
    async with AsyncExitStack() as stack:
        metronomes = [await stack.enter_async_context(metronome(address)) for address in cluster.worker_addresses]
        load = asyncio.create_task(CLIENTS[client](addresses, streams, tokens, not text, arrivals))
        try:
            await wait_until_started(load, arrivals, streams)
            await asyncio.sleep(SETTLE_S)
            before, from_s = cluster.cpu_s(), time.monotonic()
            await asyncio.sleep(seconds)
            after, until_s = cluster.cpu_s(), time.monotonic()
        finally:
            load.cancel()
            await asyncio.gather(load, return_exceptions=True)
    steps = [np.frombuffer(beats) for beats in metronomes]
    homes = [stream % len(addresses) for stream in range(streams)]
    if client != "direct":
        homes = await homes_of(cluster.router_addresses, arrivals, streams)
    return summarise(cluster, client, streams, repetition, arrivals, (steps, homes), (before, after), (from_s, until_s))


@contextlib.asynccontextmanager
async def metronome(address: str) -> AsyncIterator[bytearray]:
    """Run a metronome on a worker; what is yielded holds its beats afterwards."""
    beats = bytearray()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "beats"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.overhead.metronome", address, str(out)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        assert process.stdin is not None
        await asyncio.wait_for(process.stdout.readline(), 30)
        try:
            yield beats
        finally:
            process.stdin.close()
            await asyncio.wait_for(process.wait(), 30)
            beats += out.read_bytes()


async def homes_of(addresses: Sequence[str], arrivals: Arrivals, streams: int) -> list[int]:
    """Return the index of each stream's worker, as the router explains it."""
    clients = [AsyncClient(address) for address in addresses]
    try:
        homes = []
        for stream in range(streams):
            explained = await clients[stream % len(clients)].explain(arrivals.request_id(stream))
            worker_id = [decision.to_worker_id for decision in explained.decisions if decision.to_worker_id][-1]
            homes.append(int(worker_id.removeprefix("w")))
        return homes
    finally:
        for client in clients:
            await client.close()


async def wait_until_started(load: "asyncio.Task[None]", arrivals: Arrivals, streams: int) -> None:
    """Wait until every stream has a token; raise what stopped the client before."""
    async with asyncio.timeout(60):
        while arrivals.started() < streams:
            if load.done():
                load.result()
                raise RuntimeError(f"the client ended early: {arrivals.errors[:3]}")
            await asyncio.sleep(0.05)


def summarise(
    cluster: Cluster,
    client: str,
    streams: int,
    repetition: int,
    arrivals: Arrivals,
    beats: tuple[Sequence[Floats], Sequence[int]],
    cpu: tuple[dict[str, float], dict[str, float]],
    span: tuple[float, float],
) -> Cell:
    """Turn arrivals and CPU readings into a cell."""
    seen = [window(np.frombuffer(times), *span) for times in arrivals.times]
    steps, homes = beats
    latencies = np.concatenate(
        [token_latencies_s(times, steps[home]) for times, home in zip(seen, homes, strict=True) if len(times)]
    )
    due = sum(len(window(steps[home], *span)) for home in homes)
    tokens = sum(map(len, seen))
    spent = {name: cpu[1][name] - cpu[0][name] for name in cpu[1]}
    return Cell(
        client=client,
        streams=streams,
        workers=len(cluster.worker_addresses),
        routers=len(cluster.router_addresses),
        repetition=repetition,
        tokens_per_s=tokens / (span[1] - span[0]),
        delivered_share=tokens / max(due, 1),
        latency_p50_ms=float(np.percentile(latencies, 50)) * 1e3,
        latency_p99_ms=float(np.percentile(latencies, 99)) * 1e3,
        router_us_per_token=spent["router"] / tokens * 1e6,
        worker_us_per_token=spent["worker"] / tokens * 1e6,
        client_us_per_token=spent["client"] / tokens * 1e6,
        gateway_us_per_token=spent["gateway"] / tokens * 1e6,
        router_rss_mib=cluster.router_rss_mib(),
        errors=len(arrivals.errors),
    )


def table(cells: Iterable[Cell]) -> str:
    """Render medians over repetitions, with added latency against direct."""
    groups: dict[tuple[int, int, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.routers, cell.streams, cell.client), []).append(cell)
    heads = [
        *("routers", "streams", "client", "delivered", "added p50 ms", "added p99 ms (min-max)"),
        *("router us/token", "worker us/token", "router MiB"),
    ]
    rows = []
    for (routers, streams, client), group in sorted(groups.items()):
        base = {cell.repetition: cell for cell in groups.get((routers, streams, "direct"), [])}
        pairs = [(cell, base[cell.repetition]) for cell in group if cell.repetition in base]
        p50 = [cell.latency_p50_ms - direct.latency_p50_ms for cell, direct in pairs]
        p99 = [cell.latency_p99_ms - direct.latency_p99_ms for cell, direct in pairs]
        added = ("-", "-")
        if client != "direct" and pairs:
            added = (f"{statistics.median(p50):.2f}", f"{statistics.median(p99):.2f} ({min(p99):.2f}-{max(p99):.2f})")
        median = {
            name: statistics.median(asdict(cell)[name] for cell in group)
            for name in asdict(group[0])
            if name != "client"
        }
        costs = (f"{median[name]:.1f}" for name in ("router_us_per_token", "worker_us_per_token"))
        delivered, rss_mib = f"{median['delivered_share']:.1%}", f"{median['router_rss_mib']:.0f}"
        rows.append([str(routers), str(streams), client, delivered, *added, *costs, rss_mib])
    return markdown_table(heads, rows)


async def run(arguments: argparse.Namespace) -> list[Cell]:
    """Measure every cell, the clients interleaved within each repetition."""
    cells = []
    for routers in arguments.routers:
        async with AsyncExitStack() as stack:
            cluster = await stack.enter_async_context(
                running_cluster(
                    arguments.model, arguments.workers, routers, arguments.step_ms, gateways="sse" in arguments.clients
                )
            )
            for repetition in range(arguments.repetitions):
                for streams in arguments.streams:
                    for client in arguments.clients:
                        cell = await measure(cluster, client, streams, arguments.seconds, repetition, arguments.text)
                        cells.append(cell)
                        print(json.dumps(asdict(cell)), file=sys.stderr)
    return cells


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model directory, for its tokenizer (see demo/)")
    parser.add_argument("--streams", type=int, nargs="+", default=[32, 128, 500], help="concurrent streams")
    parser.add_argument("--workers", type=int, default=8, help="emulated workers")
    parser.add_argument("--routers", type=int, nargs="+", default=[1, 2], help="router processes")
    parser.add_argument("--clients", nargs="+", default=["direct", "generate", "session"], choices=list(CLIENTS))
    parser.add_argument("--seconds", type=float, default=10.0, help="watched time of a cell, in seconds")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=1000 / 30, help="step time of the emulated engine")
    parser.add_argument("--text", action=argparse.BooleanOptionalAction, default=True, help="detokenise in the router")
    parser.add_argument("--out", type=Path, help="write all cells as JSON")
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, write the raw cells."""
    arguments = parse()
    cells = uvloop.run(run(arguments))
    print(table(cells))
    facts = {"cpus": psutil.cpu_count(), "python": sys.version.split()[0], "text": arguments.text}
    write_result(arguments.out, {"machine": facts, "cells": [asdict(cell) for cell in cells]})


if __name__ == "__main__":
    main()
