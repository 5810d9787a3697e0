"""python -m bench.cpu.fidelity: the simulator against real vLLM on two cores, the same requests on both.

taskset -c 0 python -m services.worker.profile --engine cpu --model .cache/m110 --dtype float32 --cpu-threads 1 \\
    --max-num-seqs 64 --out bench/results/step-time-m110-cpu.json
python -m bench.cpu.fidelity bench/results/cpu-pair.json --profile bench/results/step-time-m110-cpu.json
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.cpu.pair import KV_CACHE_BYTES, MAX_MODEL_LEN, MAX_NUM_SEQS, workload_of
from bench.fidelity import COMPARED, RUN, marked, shown
from bench.markdown import markdown_table
from bench.metrics import Report, summarize
from bench.options import load_profile
from bench.random_model import SHAPES
from bench.result_files import commit_id, write_result
from bench.simulator.cluster import ClusterConfig
from bench.simulator.engine import EngineConfig
from bench.simulator.instance import StepTimeTruth
from bench.simulator.systems import simulate, system_named

_FLOAT32_BYTES = 4


def kv_tokens(shape: str) -> int:
    """Return how many tokens the KV cache of one engine holds."""
    hidden_size, layers, _, _ = SHAPES[shape]
    return KV_CACHE_BYTES // (2 * layers * hidden_size * _FLOAT32_BYTES)


def simulated(options: Mapping[str, Any], profile: str, system: str, rate_rps: float, seed: int) -> Report:
    """Serve in virtual time what `bench.cpu.pair` sent: two engines with measured step times and their scatter."""
    model = load_profile(profile)
    engine = EngineConfig(kv_tokens=kv_tokens(options["shape"]), max_num_seqs=MAX_NUM_SEQS, max_model_len=MAX_MODEL_LEN)
    truth = StepTimeTruth(model=model, jitter_sigma=model.log_sigma)
    cluster = ClusterConfig(instances=2, engine=engine, believed=model, truth=truth, drain_s=60, seed=seed)
    name = f"{system}-rr" if system.startswith("vllm-") else system
    workload = workload_of(argparse.Namespace(**options), rate_rps, seed)
    return summarize(simulate(system_named(name), workload, cluster).records)


def table(cells: Sequence[Mapping[str, Any]]) -> str:
    """Lay the pairs out, with what is outside the aims marked."""
    heads = ["system", "req/s", "seed"]
    for label in COMPARED.values():
        heads += [f"{label} live", "simulated"]
    rows = []
    for cell in cells:
        row = [cell["system"], f"{cell['rate_rps']:g}", str(cell["seed"])]
        for name in COMPARED:
            live = cell["live"][name]
            row += [shown(name, live), marked(name, live, cell["simulated"][name])]
        rows.append(row)
    return markdown_table(heads, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu.fidelity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path, nargs="+", help="result files of bench.cpu.pair")
    parser.add_argument("--profile", required=True, help="step-time model of its engines")
    parser.add_argument("--out", type=Path, help="JSON file for the pairs")
    args = parser.parse_args(argv)
    documents = [json.loads(path.read_text(encoding="utf-8")) for path in args.pairs]
    cells = []
    for document in documents:
        for result in document["results"]:
            run = {name: result[name] for name in RUN}
            report = simulated(document["options"], args.profile, **run)
            cells.append({**run, "live": result["report"], "simulated": report.as_dict()})
    cells.sort(key=lambda cell: (cell["rate_rps"], cell["seed"]))
    print(table(cells))
    write_result(
        args.out, {"commit": commit_id(), "live": documents[-1]["commit"], "profile": args.profile, "cells": cells}
    )


if __name__ == "__main__":
    main()
