"""The simulator against the live cluster: the same requests, the same settings, the numbers side by side.

What the machine of the live run added is an input: how much longer than the profile steps took and how long tokens were
on their way to the client, as distributions, and the room that workers learned from it to leave in gaps, every second.
One live run is one draw of these: it is compared with the median of several simulated ones, which are drawn anew.

python -m bench.live --trace conv.csv.gz --model .cache/demo-model \\
    --systems unified ascendra vllm-rr-640 vllm-least-640 --rates 21 18 26.5 --seeds 1 2 --workers 4 \\
    --seconds 30 --warmup-s 8 --drain-s 15 --out bench/results/fidelity-live.json
python -m bench.fidelity bench/results/fidelity-live.json --trace conv.csv.gz --out bench/results/fidelity.json
"""

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

from bench.live.__main__ import fitting
from bench.live.lateness import Lateness
from bench.markdown import markdown_table
from bench.metrics import Report, summarize
from bench.options import UnloadedTtft, emulated_cluster, load_profile
from bench.result_files import commit_id, write_result
from bench.simulator.systems import simulate, system_named
from bench.workloads import load_trace, make_workload, slo_set

RUN = ("system", "rate_rps", "seed")
"""What names a run in a result file."""
DRAWS = 5
"""Simulated runs to a live one."""
DRAW_STRIDE = 1000
"""Between the seeds of two draws."""
COMPARED = {"joint": "joint", "ttft_p50_s": "TTFT p50 s", "ttft_p90_s": "TTFT p90 s"}
"""Metrics, and what tables call them."""
POINTS_AIM = 0.02
"""Joint attainment is to agree within this."""
TTFT_AIM = 0.1
"""TTFT percentiles are to agree within this, relative."""


def simulated_name(live_name: str) -> str:
    """Return the simulator's name of a live system: `vllm-rr-512` is `vllm-512-rr` there, others are called alike."""
    family, _, rest = live_name.partition("-")
    dispatch, _, tokens = rest.partition("-")
    return f"vllm-{tokens}-{dispatch}" if family == "vllm" and tokens.isdecimal() else live_name


def simulated(
    settings: Mapping[str, str], trace: Path, result: Mapping[str, Any], draw: int, *, machine: bool = True
) -> Report:
    """Serve in virtual time what a live run was sent.

    Args:
        settings: of the file that the run is in.
        result: the run.
        draw: number of the draw of what is random.
        machine: add what the live run's machine added; else what the simulator assumes where nothing was measured.
    """
    rate_rps, seed = result["rate_rps"], result["seed"]
    warmup_s, seconds = float(settings["warmup_s"]), float(settings["seconds"])
    workload = fitting(
        make_workload(
            load_trace(trace),
            arrivals=settings["arrivals"],
            rate_rps=rate_rps,
            requests=round(rate_rps * (warmup_s + seconds)),
            classes=slo_set(settings["slo"], UnloadedTtft(load_profile(settings["profile"]))),
            seed=seed,
        ),
        int(settings["max_model_len"]),
    )
    config = emulated_cluster(
        workers=int(settings["workers"]),
        profile=settings["profile"],
        jitter_sigma=float(settings["jitter_sigma"]),
        max_model_len=int(settings["max_model_len"]),
        kv_capacity_tokens=int(settings["kv_capacity_tokens"]),
        drain_s=float(settings["drain_s"]),
        seed=seed + DRAW_STRIDE * draw,
    )
    if machine:
        late = Lateness.from_dict(result["lateness"])
        truth = replace(config.truth, measured_excess=(late.decode_excess, late.prefill_excess))
        rooms = [(at_s, rooms_s) for at_s, rooms_s in result["rooms"]]
        config = replace(config, truth=truth, delivery=late.delivery, rooms=rooms)
    records = simulate(system_named(simulated_name(result["system"])), workload, config).records
    return summarize([record for record in records if record.arrival_s - records[0].arrival_s >= warmup_s])


def off(name: str, live: float, model: float) -> float:
    """Return what the simulator says more than the cluster: points of attainment, relative TTFT."""
    return model - live if name == "joint" else model / live - 1


def shown(name: str, value: float) -> str:
    """Return a metric as text."""
    return f"{value:.1%}" if name == "joint" else f"{value:.3f}"


def marked(name: str, live: float, model: float) -> str:
    """Return a simulated metric as text, marked when it is outside the aim."""
    aim = POINTS_AIM if name == "joint" else TTFT_AIM
    return shown(name, model) + ("" if abs(off(name, live, model)) <= aim else " (!)")


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Lay the runs out: live, the median of the simulated ones and their spread, and on a machine that adds nothing."""
    heads = ["system", "req/s", "seed", "room ms", "delivery p50 / p99 ms"]
    for label in COMPARED.values():
        heads += [f"{label} live", "simulated", "min-max", "undisturbed"]
    rows = []
    for cell in cells:
        delivery = [f"{1000 * delay_s:.0f}" for delay_s in cell["delivery_p50_p99_s"]]
        room = f"{1000 * cell['delivery_s']:.1f}" if cell["delivery_s"] else "-"
        row = [cell["system"], f"{cell['rate_rps']:g}", str(cell["seed"]), room, " / ".join(delivery)]
        for name in COMPARED:
            live, draws = cell["live"][name], [draw[name] for draw in cell["simulated"]]
            row += [shown(name, live), marked(name, live, statistics.median(draws))]
            row += [f"{shown(name, min(draws))}-{shown(name, max(draws))}", shown(name, cell["undisturbed"][name])]
        rows.append(row)
    return markdown_table(heads, rows)


def compare(settings: Mapping[str, str], trace: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """Simulate a live run and return both."""
    delivery = Lateness.from_dict(result["lateness"]).delivery
    draws = [simulated(settings, trace, result, draw).as_dict() for draw in range(DRAWS)]
    return {
        **{name: result[name] for name in RUN},
        "delivery_s": result["delivery_s"],
        "delivery_p50_p99_s": [delivery.at(NormalDist().inv_cdf(share)) for share in (0.5, 0.99)],
        "live": {name: result["report"][name] for name in COMPARED},
        "simulated": [{name: draw[name] for name in COMPARED} for draw in draws],
        "undisturbed": {
            name: simulated(settings, trace, result, 0, machine=False).as_dict()[name] for name in COMPARED
        },
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity", description=__doc__.split("\n")[0])
    parser.add_argument("live", type=Path, nargs="+", help="result files of bench.live")
    parser.add_argument("--trace", type=Path, required=True, help="the trace file of that run")
    parser.add_argument("--systems", nargs="+", help="of those in the file; default: all")
    parser.add_argument("--out", type=Path, help="JSON file for the pairs")
    args = parser.parse_args(argv)
    cells = []
    for path in args.live:
        document = json.loads(path.read_text(encoding="utf-8"))
        settings = document["settings"]
        if settings["trace"] != args.trace.name:
            parser.error(f"{path.name} was measured with {settings['trace']}")
        for result in document["results"]:
            if not args.systems or result["system"] in args.systems:
                if "lateness" not in result:
                    parser.error(f"{path.name} does not say what its machine added")
                cells.append(compare(settings, args.trace, result) | {"live_commit": result["commit"]})
    cells.sort(key=lambda cell: (cell["rate_rps"], cell["seed"], cell["system"]))
    print(table(cells))
    write_result(args.out, {"commit": commit_id(), "draws": DRAWS, "cells": cells})


if __name__ == "__main__":
    main()
