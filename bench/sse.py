"""python -m bench.sse: many concurrent SSE streams through a gateway and a router, with emulated workers.

First the latency: the same number of long streams, once through one Session straight at the router and once as SSE
connections through the gateway, interleaved; the difference of the quantiles is what the gateway and HTTP add. Then
the memory: connections that send one completion after the other, each checked to its last token, while the resident
memory of router and gateway is noted. The step time bounds the tokens a second, which all processes of the machine
share: 1,000 streams at 1,000 ms are 1,000 tokens a second.
"""

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import uvloop

from bench.overhead.__main__ import Cell, measure
from bench.overhead.clients import completion_request, http_connection, prompt_of
from bench.overhead.cluster import Cluster, rss_mib, running_cluster
from bench.result_files import provenance, write_result

CLIENTS = ("session", "sse")
MIN_TOKENS, MAX_TOKENS = 15, 45
SETTLED_SHARE = 0.3
"""Share of the time, from its start, in which caches fill; the slope is that of the rest."""
_USAGE = re.compile(rb'"choices":\[\],"usage":\{[^}]*"completion_tokens":(\d+)')
_SILENCE_STEPS = 60
"""A connection that hears nothing for this many steps has failed."""


@dataclass
class Churn:
    """What the connections of the second part saw."""

    requests: int = 0
    tokens: int = 0
    due_tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    rss_mib: list[dict[str, float]] = field(default_factory=list)
    """Resident memory of router and gateway, with the time since the start in seconds."""


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure both parts."""
    cells: list[Cell] = []
    async with running_cluster(arguments.model, arguments.workers, 1, arguments.step_ms, gateways=1) as cluster:
        for repetition in range(arguments.repetitions):
            for client in CLIENTS:
                cell = await measure(cluster, client, arguments.streams, arguments.latency_seconds, repetition, True)
                cells.append(cell)
                print(json.dumps(asdict(cell)), file=sys.stderr)
        churn = await keep_asking(cluster, arguments.streams, arguments.seconds, arguments.step_ms / 1000)
    return {
        **provenance(arguments),
        "cpus": psutil.cpu_count(),
        "cells": [asdict(cell) for cell in cells],
        "churn": asdict(churn),
        "summary": summary(cells, churn),
    }


async def keep_asking(cluster: Cluster, streams: int, seconds: float, step_s: float) -> Churn:
    """Send one completion after the other on every connection for a time, and note the memory."""
    churn, began_s = Churn(), time.monotonic()
    until_s = began_s + seconds
    connections = [
        asyncio.create_task(_connection(cluster.gateway_addresses[0], stream, until_s, step_s, churn))
        for stream in range(streams)
    ]
    while time.monotonic() < until_s:
        churn.rss_mib.append(
            {
                "at_s": round(time.monotonic() - began_s, 1),
                "router": round(max(map(rss_mib, cluster.router_pids)), 1),
                "gateway": round(max(map(rss_mib, cluster.gateway_pids)), 1),
            }
        )
        await asyncio.sleep(min(5.0, seconds / 20))
    await asyncio.gather(*connections)
    return churn


async def _connection(address: str, stream: int, until_s: float, step_s: float, churn: Churn) -> None:
    draw = random.Random(stream)
    await asyncio.sleep(draw.random() * step_s * MIN_TOKENS)  # so that they do not all end at once
    async with http_connection(address) as (reader, writer):
        number = 0
        while time.monotonic() < until_s:
            number += 1
            tokens = draw.randint(MIN_TOKENS, MAX_TOKENS)
            writer.write(completion_request(f"churn-{stream}-{number}", prompt_of(stream), tokens))
            churn.requests += 1
            churn.due_tokens += tokens
            try:
                received = await _answer(reader, step_s * _SILENCE_STEPS)
            except Exception as error:
                churn.errors[str(error) or type(error).__name__] += 1
                return
            churn.tokens += received
            if received != tokens:
                churn.errors[f"{received} tokens instead of {tokens}"] += 1


async def _answer(reader: asyncio.StreamReader, silence_s: float) -> int:
    """Read one answer to its end and return its tokens. Raises RuntimeError when it is not one."""
    tokens, status = 0, b""
    while True:
        line = await asyncio.wait_for(reader.readline(), silence_s)
        if not line:
            raise RuntimeError("the connection was closed")
        if line.startswith(b"HTTP/1.1 "):
            status = line.strip()
        if not status.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(status.decode())
        if b'"error":' in line:
            raise RuntimeError(line.decode())
        if found := _USAGE.search(line):
            tokens = int(found[1])
        if line == b"0\r\n":
            await reader.readline()
            return tokens


def summary(cells: list[Cell], churn: Churn) -> dict[str, Any]:
    """Return the figures that count."""
    by_client = {client: [cell for cell in cells if cell.client == client] for client in CLIENTS}
    pairs = list(zip(by_client["sse"], by_client["session"], strict=True))
    late = [sample for sample in churn.rss_mib if sample["at_s"] >= SETTLED_SHARE * churn.rss_mib[-1]["at_s"]]
    at_min = [sample["at_s"] / 60 for sample in late]
    slopes = {
        name: float(np.polyfit(at_min, [sample[name] for sample in late], 1)[0]) for name in ("router", "gateway")
    }
    return {
        "streams": cells[0].streams if cells else None,
        "added_p50_ms": [round(sse.latency_p50_ms - session.latency_p50_ms, 2) for sse, session in pairs],
        "added_p99_ms": [round(sse.latency_p99_ms - session.latency_p99_ms, 2) for sse, session in pairs],
        "delivered_share": [round(cell.delivered_share, 4) for cell in by_client["sse"]],
        "gateway_us_per_token": [round(cell.gateway_us_per_token, 1) for cell in by_client["sse"]],
        "errors": sum(cell.errors for cell in cells) + sum(churn.errors.values()),
        "churn_requests": churn.requests,
        "churn_tokens_share": round(churn.tokens / max(churn.due_tokens, 1), 6),
        "rss_slope_mib_per_min": {name: round(float(slope), 3) for name, slope in slopes.items()},
        "rss_first_last_mib": {name: [late[0][name], late[-1][name]] for name in ("router", "gateway")},
    }


def main() -> None:
    """Measure, print the summary, write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.sse", description=__doc__)
    parser.add_argument("--model", type=Path, default=Path(".cache/demo-model"), help="for its tokenizer (see demo/)")
    parser.add_argument("--streams", type=int, default=1000, help="concurrent connections")
    parser.add_argument("--workers", type=int, default=4, help="emulated workers")
    parser.add_argument("--step-ms", type=float, default=1000.0, help="step time of the emulated engines")
    parser.add_argument("--latency-seconds", type=float, default=30.0, help="watched time of a latency cell")
    parser.add_argument("--repetitions", type=int, default=3, help="latency cells of each client")
    parser.add_argument("--seconds", type=float, default=600.0, help="time of the memory part")
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    arguments = parser.parse_args()
    result = uvloop.run(run(arguments))
    print(json.dumps(result["summary"], indent=1))
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
