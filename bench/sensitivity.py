"""What the results depend on: one setting of the conversation study changed at a time, capacities searched anew.

python -m bench.sensitivity --traces DIRECTORY    # goes on where bench/results/sensitivity.json stops
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.bound import capacity_bound_rps
from bench.capacity import measure
from bench.options import Setting, add_cluster_options
from bench.result_files import commit_id
from bench.study import SEEDS, TARGETS, TOLERANCE, WORKLOADS, Results, workload_setting
from bench.workloads import TraceRow
from services.policy.step_time import COEFFICIENTS, StepTimeBin

BASE = "conv-poisson-1000-100"
COMPARED = ("unified", "ascendra", "ascendra-pull")


@dataclass(frozen=True, slots=True)
class Case:
    """One change."""

    topic: str
    name: str
    change: Callable[[Setting], Setting]
    systems: tuple[str, ...] = COMPARED


def _truth(jitter: float = 0.03, bias: float = 1.0, learn: bool = True) -> Callable[[Setting], Setting]:
    def change(setting: Setting) -> Setting:
        truth = replace(setting.cluster.truth, jitter_sigma=jitter, bias=bias)
        return replace(setting, cluster=replace(setting.cluster, truth=truth, learn=learn))

    return change


def _slower(factor: float) -> Callable[[Setting], Setting]:
    """Slower instances, known to be so."""

    def change(setting: Setting) -> Setting:
        model = setting.cluster.believed
        bins = tuple(
            StepTimeBin(bin.max_tokens, *(factor * getattr(bin, c) for c in COEFFICIENTS)) for bin in model.bins
        )
        slower = replace(model, bins=bins)
        truth = replace(setting.cluster.truth, model=slower)
        return replace(setting, cluster=replace(setting.cluster, believed=slower, truth=truth))

    return change


def _tbt(seconds: float) -> Callable[[Setting], Setting]:
    return lambda setting: replace(setting, classes=[replace(one, tbt_s=seconds) for one in setting.classes])


def _stale(seconds: float) -> Callable[[Setting], Setting]:
    return lambda setting: replace(setting, cluster=replace(setting.cluster, staleness_s=seconds))


def _arrivals(kind: str) -> Callable[[Setting], Setting]:
    return lambda setting: replace(setting, arrivals=kind)


def _instances(count: int) -> Callable[[Setting], Setting]:
    """A larger cluster, and as many more requests."""

    def change(setting: Setting) -> Setting:
        requests = setting.requests * count // setting.cluster.instances
        return replace(setting, requests=requests, cluster=replace(setting.cluster, instances=count))

    return change


def _outputs(factor: float) -> Callable[[Setting], Setting]:
    def change(setting: Setting) -> Setting:
        rows = [
            TraceRow(row.time_s, row.prompt_tokens, max(round(factor * row.output_tokens), 1), row.prefix_hashes)
            for row in setting.trace
        ]
        return replace(setting, trace=rows)

    return change


def _same(setting: Setting) -> Setting:
    return setting


CASES = (
    Case("prediction error", "sigma 0.03", _same),
    Case("prediction error", "sigma 0.2", _truth(jitter=0.2)),
    Case("prediction error", "sigma 0.03, TBT objective 63 ms", _tbt(0.063), ("unified",)),
    Case("prediction error", "steps 1.2 times as long as believed, learned", _truth(bias=1.2)),
    Case("prediction error", "steps 1.2 times as long, believed from the start", _slower(1.2), ("unified",)),
    Case("LP:HP split", "8:0", _same, ("unified",)),
    Case("LP:HP split", "7:1", _same, ("ascendra",)),
    Case("LP:HP split", "6:2", _same, ("ascendra-2hp",)),
    Case("LP:HP split", "4:4", _same, ("ascendra-4hp",)),
    Case("burstiness", "Poisson", _same),
    Case("burstiness", "Gamma, CV 2", _arrivals("gamma:2")),
    Case("burstiness", "Gamma, CV 4", _arrivals("gamma:4")),
    Case("staleness of reports", "2 ms", _same),
    Case("staleness of reports", "100 ms", _stale(0.1)),
    Case("staleness of reports", "500 ms", _stale(0.5)),
    Case("output lengths", "as in the trace", _same),
    Case("output lengths", "a quarter", _outputs(0.25)),
    Case("output lengths", "twice", _outputs(2.0)),
    Case("cluster size", "8 instances", _same),
    Case(
        "cluster size",
        "64 instances",
        _instances(64),
        (*COMPARED, "ascendra-of-4", "ascendra-of-64"),
    ),
    Case("prediction error", "sigma 0.1", _truth(jitter=0.1)),
    Case("prediction error", "steps 1.2 times as long as believed, not learned", _truth(bias=1.2, learn=False)),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.sensitivity", description=__doc__.split("\n")[0])
    parser.add_argument("--traces", type=Path, required=True, help="directory with the study's trace files")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: %(default)s")
    parser.add_argument("--instances", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("bench/results/sensitivity.json"))
    add_cluster_options(parser)
    args = parser.parse_args(argv)
    base = workload_setting(WORKLOADS[BASE], args)
    results = Results.open(args.out, {"workload": BASE, "requests": base.requests})
    study = Results.open(args.out.with_name(f"capacity-{BASE}.json"), {})
    for seed in args.seeds:
        for case in CASES:
            setting = case.change(base)
            for system in case.systems:
                name = "" if case.change is _same else f"{case.topic}: {case.name}"
                known = results.document["results"]
                if any(r["case"] == name and r["policy"] == system and r["seed"] == seed for r in known):
                    continue
                found = None if name else study.entry(system, seed)
                if found is None:
                    start_rps = 0.9 * capacity_bound_rps(setting, seed, TARGETS[0])
                    found = measure(setting, system, seed, TARGETS, start_rps=start_rps, tolerance=TOLERANCE)
                    found["commit"] = commit_id()
                bounds = {f"{target:g}": capacity_bound_rps(setting, seed, target) for target in TARGETS}
                known.append({**found, "case": name, "bounds": bounds})
                results.save()
                print(f"{name or 'base'} {system} seed {seed}: {found['capacity_rps']}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
