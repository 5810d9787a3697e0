"""The capacity study: every workload, every system, several seeds, resumed where it was left.

python -m bench.study --traces DIRECTORY                    # everything that bench/results does not have yet
python -m bench.study --traces DIRECTORY --workloads conv-poisson-C --seeds 101

One file a workload, `bench/results/capacity-<workload>.json`, written after every measurement; each entry names the
commit it was measured at. What matters most comes first on every workload: one seed of the main systems, then the
static budgets of the baselines, then the other seeds, then the other baselines at the best budget found.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.bound import capacity_bound_rps, most_kept, works_s
from bench.capacity import measure, report_at
from bench.options import Setting, UnloadedTtft, add_cluster_options, cluster_for, cluster_from, load_profile
from bench.report_capacity import standing
from bench.result_files import commit_id, write_result
from bench.workloads import load_trace, slo_set

TARGETS = (0.99, 0.9)
SEEDS = (101, 201, 202)
"""The first also served to choose `OrderPolicy.caution` and to mend the tickets; the others are fresh."""
TOLERANCE = 0.02
OVERLOAD = 1.2
KNEE = "unified"
"""The system whose 99% capacity, times OVERLOAD, is the load at which every system is reported in full."""

OURS = ("ascendra", "ascendra-pool", "ascendra-pull")
MAIN = ("unified", *OURS, "vllm-512-work", "vllm-512-rr", "paper")
DISPATCHES = ("work", "least", "p2c", "edf", "headroom", "spread", "rebalance")
UNIFIED = ("unified-edf", "qoserve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A trace, how it arrives, and what is promised."""

    trace: str
    arrivals: str
    slo: str
    budgets: tuple[int, ...] = (256, 512, 640, 768, 896, 1024)
    """Static budgets among which each baseline has its best."""
    requests: int = 3000
    """0: the whole trace, in its time."""
    dispatches: tuple[str, ...] = ("work", "rr")
    """Those whose best static budget is sought."""

    @property
    def name(self) -> str:
        """Name it as its result file does."""
        return f"{self.trace}-{self.arrivals.replace(':', '')}-{self.slo.replace('/', '-')}"


FILES = {
    "conv": "azure2023_conv_dev.csv.gz",
    "code": "azure2023_code_dev.csv.gz",
    "sharegpt": "sharegpt_8k_lengths_dev.csv.gz",
    "arxiv": "arxiv_summarization_lengths_dev.csv.gz",
    "mooncake": "mooncake_conversation_dev.jsonl.gz",
}
_TIGHT = (128, 192, 256, 320, 512)
"""Where some gaps may take 50 ms: a step of 384 tokens takes that without a decode."""
_WIDE = (512, 768, 1024, 1280, 1536)
"""Where gaps may take 200 ms."""
_LONG = (256, 384, 512, 640, 768)
"""The same beside prompts of a hundred thousand tokens, whose chunks take several times as long."""
_PREFIXES = ("work", "sticky", "rr")
WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(trace="conv", arrivals="poisson", slo="1000/100"),
        Workload(trace="code", arrivals="trace", slo="2000/200", requests=0, budgets=_WIDE),
        Workload(trace="sharegpt", arrivals="poisson", slo="1000/100"),
        Workload(trace="arxiv", arrivals="poisson", slo="2000/200", budgets=_WIDE),
        Workload(trace="conv", arrivals="poisson", slo="C", budgets=_TIGHT),
        Workload(trace="conv", arrivals="gamma:3", slo="1000/100"),
        Workload(trace="conv", arrivals="poisson", slo="B", budgets=_TIGHT),
        Workload(trace="conv", arrivals="poisson", slo="A"),
        Workload(trace="sharegpt", arrivals="poisson", slo="C", budgets=_TIGHT),
        Workload(trace="arxiv", arrivals="gamma:3", slo="2000/200", budgets=_WIDE),
        Workload(trace="code", arrivals="poisson", slo="1000/100"),
        Workload(trace="code", arrivals="trace", slo="A", requests=0),
        Workload(trace="sharegpt", arrivals="gamma:3", slo="A"),
        Workload(trace="arxiv", arrivals="poisson", slo="C", budgets=_TIGHT),
        Workload(trace="code", arrivals="poisson", slo="C", budgets=_TIGHT),
        Workload(trace="code", arrivals="poisson", slo="B", budgets=_TIGHT),
        Workload(trace="sharegpt", arrivals="poisson", slo="B", budgets=_TIGHT),
        Workload(trace="arxiv", arrivals="poisson", slo="B", budgets=_TIGHT),
        Workload(trace="mooncake", arrivals="trace", slo="B/200", budgets=_LONG, dispatches=_PREFIXES),
    )
}


@dataclass(slots=True)
class Results:
    """A workload's result file."""

    path: Path
    document: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path, settings: dict[str, Any]) -> "Results":
        """Read what is there, or start."""
        if path.exists():
            return cls(path, json.loads(path.read_text(encoding="utf-8")))
        return cls(path, {"settings": settings, "bounds": {}, "kept_bounds": {}, "results": [], "overload": []})

    def save(self) -> None:
        """Write it."""
        write_result(self.path, self.document)

    def entry(self, policy: str, seed: int, part: str = "results") -> dict[str, Any] | None:
        """Return one measurement, if there is one."""
        found = (r for r in self.document[part] if r["policy"] == policy and r["seed"] == seed)
        return next(found, None)

    def capacity(self, policy: str, target: float, seed: int | None = None) -> float:
        """Return the mean capacity over seeds, or at one seed; 0 when not measured."""
        rates = [
            r["capacity_rps"][f"{target:g}"]
            for r in self.document["results"]
            if r["policy"] == policy and (seed is None or r["seed"] == seed)
        ]
        return sum(rates) / len(rates) if rates else 0.0

    def standing(self, policy: str, target: float) -> tuple[float, float]:
        """Return by what budgets are compared, as the report does."""
        return standing(self.document, policy, f"{target:g}")


def best_budget(results: Results, workload: Workload, dispatch: str, target: float = TARGETS[0]) -> int:
    """Return the static budget that carries most under a dispatch; where none carries the first target, the next."""

    def standings(budget: int) -> list[tuple[float, float]]:
        return [results.standing(f"vllm-{budget}-{dispatch}", wanted) for wanted in (target, TARGETS[-1])]

    return max(workload.budgets, key=standings)


def budget_systems(workload: Workload) -> list[str]:
    """Return every baseline whose best static budget is sought."""
    stock = [f"vllm-{budget}-{dispatch}" for dispatch in workload.dispatches for budget in workload.budgets]
    papers = [f"paper-{budget}" for budget in workload.budgets if budget != 512]
    return [*(name for name in stock if name not in MAIN), *papers]


def best_systems(results: Results, workload: Workload) -> list[str]:
    """Return the baselines at the budgets that are best for either target."""
    names = [
        f"vllm-{best_budget(results, workload, dispatch, target)}-{dispatch}"
        for dispatch in workload.dispatches
        for target in TARGETS
    ]
    papers = [name for name in budget_systems(workload) if name.startswith("paper")]
    if papers:
        best = max(papers, key=lambda name: results.standing(name, TARGETS[0]))
        if results.standing(best, TARGETS[0]) > results.standing("paper", TARGETS[0]):
            names.append(best)
    return list(dict.fromkeys(names))


def other_systems(results: Results, workload: Workload) -> list[str]:
    """Return the other baselines, those of stock vLLM at the budget that is best under least predicted work."""
    budget = best_budget(results, workload, "work")
    stock = [f"vllm-{budget}-{dispatch}" for dispatch in DISPATCHES if dispatch != "work"]
    return [*UNIFIED, "paper-sjf", *stock, *(["ascendra-blind"] if workload.dispatches == _PREFIXES else [])]


def passes(
    results: dict[str, Results], names: Sequence[str], seeds: Sequence[int]
) -> Iterator[list[tuple[str, str, int]]]:
    """Yield (workload, system, seed) of each pass; later passes depend on what earlier ones found."""
    first, rest = seeds[0], seeds[1:]
    yield [(name, system, first) for name in names for system in MAIN]
    yield [(name, system, first) for name in names for system in budget_systems(WORKLOADS[name])]
    yield [
        (name, system, seed)
        for seed in rest
        for name in names
        for system in dict.fromkeys((*MAIN, *best_systems(results[name], WORKLOADS[name])))
    ]
    yield [
        (name, system, seed)
        for seed in seeds
        for name in names
        for system in other_systems(results[name], WORKLOADS[name])
    ]


def likely_rps(results: Results, system: str, seed: int) -> float:
    """Return a rate at which a search may start: the system's at another seed, or a related one's; 0 when unknown."""
    known = results.capacity(system, TARGETS[0])
    if not known:
        family = "vllm" if system.startswith("vllm") else ""
        related = [r["policy"] for r in results.document["results"] if r["policy"].startswith(family)]
        known = max((results.capacity(name, TARGETS[0], seed) for name in related if family or name in MAIN), default=0)
    return known


def run(setting: Setting, results: Results, system: str, seed: int) -> None:
    """Measure one system at one seed, and report it beyond the knee."""
    name = results.path.stem
    if results.entry(system, seed) is None:
        found = measure(
            setting, system, seed, TARGETS, start_rps=likely_rps(results, system, seed), tolerance=TOLERANCE
        )
        results.document["results"].append({**found, "commit": commit_id()})
        results.save()
        rates = " ".join(f"@{target} {rate:.2f}" for target, rate in found["capacity_rps"].items())
        print(f"{name} {system} seed {seed}: {rates} ({found['seconds']:.0f} s)", file=sys.stderr, flush=True)
    knee_rps = results.capacity(KNEE, TARGETS[0], seed)
    if knee_rps:
        note_kept(setting, results, seed, OVERLOAD * knee_rps)
    if knee_rps and results.entry(system, seed, "overload") is None:
        rate_rps = OVERLOAD * knee_rps
        report = report_at(setting, system, seed, rate_rps)
        results.document["overload"].append(
            {"policy": system, "seed": seed, "rate_rps": rate_rps, "report": report, "commit": commit_id()}
        )
        results.save()


def note_kept(setting: Setting, results: Results, seed: int, rate_rps: float) -> None:
    """Note the largest shares of all requests, and of the longest tenth, that any policy could keep at a rate."""
    workload = setting.workload(1.0, seed)
    works, lengths = works_s(setting, workload), [request.prompt_tokens for request in workload]
    available_s = setting.cluster.instances * len(workload) / rate_rps
    results.document.setdefault("kept_bounds", {})[str(seed)] = {
        "free": most_kept(works, lengths, available_s),
        "longest kept": most_kept(works, lengths, available_s, 0.8),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.study", description=__doc__.split("\n")[0])
    parser.add_argument("--traces", type=Path, required=True, help=f"directory with {', '.join(FILES.values())}")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="comma-separated; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: %(default)s")
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 2, 3, 4], help="default: %(default)s")
    parser.add_argument("--systems", default="", help="comma-separated beginnings of system names; default: all")
    parser.add_argument("--instances", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="default: %(default)s")
    add_cluster_options(parser)
    args = parser.parse_args(argv)
    names = args.workloads.split(",")
    unknown = sorted(set(names) - set(WORKLOADS))
    if unknown:
        parser.error(f"unknown workloads {', '.join(unknown)}; known: {', '.join(WORKLOADS)}")
    settings, results = {}, {}
    for name in names:
        settings[name] = workload_setting(WORKLOADS[name], args)
        results[name] = Results.open(args.out / f"capacity-{name}.json", _described(WORKLOADS[name], args))
        for seed in args.seeds:
            bounds = {f"{t:g}": capacity_bound_rps(settings[name], seed, t) for t in TARGETS}
            results[name].document["bounds"][str(seed)] = bounds
    for number, tasks in enumerate(passes(results, names, args.seeds), 1):
        for name, system, seed in tasks if number in args.passes else ():
            if system.startswith(tuple(args.systems.split(","))):
                run(settings[name], results[name], system, seed)


def workload_setting(workload: Workload, args: argparse.Namespace) -> Setting:
    """Return what a workload is measured under."""
    trace = load_trace(args.traces / FILES[workload.trace])
    classes = slo_set(workload.slo, UnloadedTtft(load_profile(args.profile)))
    cluster = cluster_for(trace, cluster_from(args, args.instances))
    return Setting(trace, workload.arrivals, workload.requests or len(trace), classes, cluster)


def _described(workload: Workload, args: argparse.Namespace) -> dict[str, Any]:
    hidden = ("traces", "workloads", "systems", "seeds", "passes", "out")
    options = {name: value for name, value in vars(args).items() if name not in hidden}
    return {"trace": FILES[workload.trace], "arrivals": workload.arrivals, "slo": workload.slo, **options}


if __name__ == "__main__":
    main()
