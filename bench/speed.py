"""How fast the simulator is: requests a minute on one core, by system and number of instances.

python -m bench.speed --trace conv.csv.gz --out bench/results/speed.json
python -m bench.speed --trace conv.csv.gz --in-turn 8 --sizes 8 --out bench/results/speed-in-turn.json

A repeat serves as many requests with every size, one right after the other: the ratio of their costs is of one time.
With --in-turn, several clusters of each size, which know nothing of each other, are simulated in turn, event by event:
the work is that of the small cluster, what it touches is as much as that of a large one.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.markdown import markdown_table
from bench.options import Setting, add_setting_options, setting_from, systems_from
from bench.result_files import provenance, write_result
from bench.simulator.systems import assemble, simulate, system_named

SYSTEMS = "vllm-512-work,unified,ascendra,ascendra-pool,ascendra-pull"


def table(cells: Sequence[dict[str, Any]], sizes: Sequence[int]) -> str:
    """Lay out requests a minute, and the cost of a request relative to the smallest cluster: in all, and an event."""
    heads = [
        "system",
        *(f"{size} instances" for size in sizes),
        "cost a request, last / first",
        "min-max",
        "events",
        "cost an event",
    ]
    rows = []
    for name in dict.fromkeys(cell["system"] for cell in cells):
        own = {cell["instances"]: cell for cell in cells if cell["system"] == name}
        rates = (f"{60 / statistics.median(own[size]['cpu_s_per_request']):,.0f}" for size in sizes)
        first, last = own[sizes[0]], own[sizes[-1]]
        costs = [b / a for a, b in zip(first["cpu_s_per_request"], last["cpu_s_per_request"], strict=True)]
        cost, more = statistics.median(costs), last["events_per_request"] / first["events_per_request"]
        spread = f"{min(costs):.2f}-{max(costs):.2f}"
        rows.append([name, *rates, f"{cost:.2f}", spread, f"{more:.2f}", f"{cost / more:.2f}"])
    return markdown_table(heads, rows)


def in_turn_table(cells: Sequence[dict[str, Any]]) -> str:
    """Lay out the ratios of `in_turn`."""
    heads = ["system", "clusters", "cost in turn / one after another", "min-max"]
    rows = []
    for cell in cells:
        ratios = cell["ratios"]
        clusters = f"{cell['clusters']} of {cell['instances']}"
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        rows.append([cell["system"], clusters, f"{statistics.median(ratios):.2f}", spread])
    return markdown_table(heads, rows)


def in_turn(setting: Setting, args: argparse.Namespace) -> None:
    """Measure what a request costs when several independent clusters take turns, relative to one after the other."""
    cells = []
    for name in systems_from(args.policies):
        for size in args.sizes:
            ratios = []
            for _ in range(args.repeats):
                alone_s, turns_s = (
                    _advance_s(setting, name, size, args, clusters, args.in_turn // clusters)
                    for clusters in (1, args.in_turn)
                )
                ratios.append(turns_s / alone_s)
            cells.append({"system": name, "instances": size, "clusters": args.in_turn, "ratios": ratios})
            print(f"{name} {size} x {args.in_turn}: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
    write_result(args.out, {**provenance(args), "cells": cells})


def _advance_s(setting: Setting, name: str, size: int, args: argparse.Namespace, clusters: int, times: int) -> float:
    """Return the seconds of processor time of `clusters` that take turns, done `times` over."""
    total_s = 0.0
    for first in range(times):
        running = []
        for number in range(first, first + clusters):
            config = replace(setting.cluster, instances=size, seed=number)
            cluster, router = assemble(system_named(name), config)
            workload = replace(setting, requests=size * args.per_instance).workload(args.rate * size, number)
            cluster.begin(workload, router)
            running.append(cluster)
        gc.collect()
        gc.disable()
        started_s = time.process_time()
        while running:
            running = [cluster for cluster in running if cluster.advance(1)]
        total_s += time.process_time() - started_s
        gc.enable()
    return total_s


def measure(setting: Setting, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure what a request costs on clusters of each size, and its events."""
    cells = [
        {"system": name, "instances": size, "cpu_s_per_request": [], "events_per_request": 0.0} for size in args.sizes
    ]
    for repeat in range(args.repeats):
        for cell in cells:
            size = cell["instances"]
            seconds, events, requests = 0.0, 0, 0
            for number in range(max(args.sizes) // size):
                workload = replace(setting, requests=size * args.per_instance).workload(args.rate * size, number)
                config = replace(setting.cluster, instances=size, seed=repeat)
                gc.collect()
                started_s = time.process_time()
                events += simulate(system_named(name), workload, config).events
                seconds += time.process_time() - started_s
                requests += len(workload)
            cell["cpu_s_per_request"].append(seconds / requests)
            cell["events_per_request"] += events / requests / args.repeats
    return cells


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__.split("\n")[0])
    add_setting_options(parser)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 64], help="instances (default: %(default)s)")
    parser.add_argument("--policies", default=SYSTEMS, help="comma-separated names (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=5.5, help="requests/s of an instance (default: %(default)s)")
    parser.add_argument("--per-instance", type=int, default=200, help="requests an instance (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="the median counts (default: %(default)s)")
    parser.add_argument("--in-turn", type=int, default=0, help="clusters that take turns (default: one after another)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args(argv)
    setting = setting_from(args)
    if args.in_turn:
        in_turn(setting, args)
        return
    cells = []
    for name in systems_from(args.policies):
        cells += measure(setting, name, args)
        print(table(cells, args.sizes), flush=True)
    write_result(args.out, {**provenance(args), "cells": cells})


if __name__ == "__main__":
    main()
