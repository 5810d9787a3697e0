"""The simulator against the live cluster: the same requests, the same settings, the numbers side by side.

python -m bench.live --trace conv.csv.gz --model .cache/demo-model --systems unified ascendra --rates 36 42 53 \\
    --seeds 1 --seconds 30 --warmup-s 8 --drain-s 15 --out bench/results/fidelity-live.json
python -m bench.fidelity bench/results/fidelity-live.json bench/results/live-azure-conv-42rps.json \\
    --systems unified ascendra vllm-rr-640 vllm-least-640 --trace conv.csv.gz --out bench/results/fidelity.json
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.live.__main__ import fitting
from bench.markdown import markdown_table
from bench.metrics import Report, summarize
from bench.options import UnloadedTtft, emulated_cluster, load_profile
from bench.result_files import commit_id, write_result
from bench.simulator.systems import leaving_room, simulate, system_named
from bench.workloads import load_trace, make_workload, slo_set

RUN = ("system", "rate_rps", "seed")
"""What names a run in a result file."""
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
    settings: Mapping[str, str], trace: Path, system: str, rate_rps: float, seed: int, delivery_s: float
) -> Report:
    """Serve in virtual time what a live run of these settings was sent.

    Args:
        delivery_s: room that dynamic budgets leave in each gap for delivery; 0: the default.
    """
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
        seed=seed,
    )
    policies = leaving_room(system_named(simulated_name(system)), delivery_s)
    records = simulate(policies, workload, config).records
    return summarize([record for record in records if record.arrival_s - records[0].arrival_s >= warmup_s])


def compared(live: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, float]:
    """Return what the simulator says more than the cluster: points of attainment, relative TTFT."""
    return {
        "joint_points": model["joint"] - live["joint"],
        **{name: model[name] / live[name] - 1 for name in ("ttft_p50_s", "ttft_p90_s")},
    }


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Lay the pairs out, with what is outside the aims marked."""
    heads = ["system", "req/s", "seed", "room ms", "joint live", "simulated"]
    heads += ["TTFT p50 s live", "simulated", "TTFT p90 s live", "simulated"]
    rows = []
    for cell in cells:
        live, model = cell["live"], cell["simulated"]
        off = compared(live, model)
        marks = {name: "" if abs(value) <= TTFT_AIM else " (!)" for name, value in off.items()}
        marks["joint_points"] = "" if abs(off["joint_points"]) <= POINTS_AIM else " (!)"
        room = f"{1000 * cell['delivery_s']:.1f}" if cell["delivery_s"] else "-"
        row = [cell["system"], f"{cell['rate_rps']:g}", str(cell["seed"]), room, f"{live['joint']:.1%}"]
        row.append(f"{model['joint']:.1%}{marks['joint_points']}")
        for name in ("ttft_p50_s", "ttft_p90_s"):
            row += [f"{live[name]:.3f}", f"{model[name]:.3f}{marks[name]}"]
        rows.append(row)
    return markdown_table(heads, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity", description=__doc__.split("\n")[0])
    parser.add_argument("live", type=Path, nargs="+", help="result files of bench.live")
    parser.add_argument("--trace", type=Path, required=True, help="the trace file of that run")
    parser.add_argument("--systems", nargs="+", help="of those in the file; default: all")
    parser.add_argument("--out", type=Path, help="JSON file for the pairs")
    args = parser.parse_args(argv)
    documents = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in args.live}
    cells = []
    for name, document in documents.items():
        settings = document["settings"]
        if settings["trace"] != args.trace.name:
            parser.error(f"{name} was measured with {settings['trace']}")
        for result in document["results"]:
            unlike = "delivery_s" not in result and not result["system"].startswith("vllm")
            if unlike or (args.systems and result["system"] not in args.systems):
                continue  # unlike: the room that its workers left is not known
            run = dict(zip(RUN, (result[key] for key in RUN), strict=True))
            delivery_s = result.get("delivery_s", 0.0)
            report = simulated(settings, args.trace, run["system"], run["rate_rps"], run["seed"], delivery_s)
            cells.append({**run, "delivery_s": delivery_s, "live": result["report"], "simulated": report.as_dict()})
    cells.sort(key=lambda cell: (cell["rate_rps"], cell["seed"]))
    print(table(cells))
    live = {name: document["commit"] for name, document in documents.items()}
    write_result(args.out, {"commit": commit_id(), "live": live, "cells": cells})


if __name__ == "__main__":
    main()
