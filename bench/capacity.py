"""Capacity in the simulator: the highest rate at which a share of all requests attains, per system and seed.

python -m bench.capacity --trace conv.csv.gz --slo 1000/100 --instances 8 --policies ascendra,unified --out out.json
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.metrics import RequestRecord, attains, summarize
from bench.options import WARMUP_SHARE, Setting, add_setting_options, setting_from, systems_from
from bench.result_files import provenance, write_result
from bench.simulator.systems import simulate, system_named

FIRST_GROWTH = 1.3
"""Factor between the rates that look for a bracket."""
NEAR_GROWTH = 1.12
"""The same when the first rate is a likely capacity."""
FEWEST_MISSES = 2e-4
"""Share of misses that a run without any stands for."""
SEEN_THROUGH = 0.03
"""A run is seen through unless its misses exceed those that the lowest target allows by more than this share."""
LOWEST_SHARE = 1e-2
"""A system that fails at this share of the first rate has capacity 0."""


@dataclass(slots=True)
class CapacitySearch:
    """Finds the highest rate at which a falling function of the rate is still at a target; remembers every point."""

    attainment: Callable[[float], float]
    start_rps: float
    tolerance: float = 0.015
    """Width of the final bracket, relative."""
    growth: float = FIRST_GROWTH
    """Factor between the rates that look for a bracket; smaller when the start is a good guess."""
    points: dict[float, float] = field(default_factory=dict)

    def find(self, target: float) -> float:
        """Return the rate between the last that passes and the first that fails; 0 when none passes."""
        low, high = self._bracket(target)
        while high - low > self.tolerance * high:
            middle = self._next(low, high, target)
            if self._at(middle) >= target:
                low = middle
            else:
                high = middle
            if high < LOWEST_SHARE * self.start_rps:
                return 0.0
        return self._crossing(low, high, target)

    def _at(self, rate_rps: float) -> float:
        if rate_rps not in self.points:
            self.points[rate_rps] = self.attainment(rate_rps)
        return self.points[rate_rps]

    def _crossing(self, low: float, high: float, target: float) -> float:
        """Return where the target lies if the logarithm of the misses is linear between two rates, as it nearly is."""
        below, above, wanted = (math.log(max(1 - s, FEWEST_MISSES)) for s in (self._at(low), self._at(high), target))
        return low + (high - low) * (wanted - below) / (above - below) if above > below else (low + high) / 2

    def _next(self, low: float, high: float, target: float) -> float:
        """Return the next rate to try: a little to the far side of the likely crossing, so that the bracket closes."""
        width = high - low
        guess = self._crossing(low, high, target) if low else low + width / 2
        nudge = 0.4 * self.tolerance * high
        guess += nudge if guess - low < high - guess else -nudge
        return min(max(guess, low + 0.1 * width), high - 0.1 * width)

    def _bracket(self, target: float) -> tuple[float, float]:
        """Return a passing and a failing rate, from known points where possible; 0 passes by definition."""
        self._at(self.start_rps)
        failing = [rate for rate, share in self.points.items() if share < target]
        high = min(failing, default=0.0)
        passing = [rate for rate, share in self.points.items() if share >= target and (not failing or rate < high)]
        low = max(passing, default=0.0)
        growth = self.growth
        while not high:
            rate = low * growth
            if self._at(rate) < target:
                high = rate
            else:
                low = rate
            growth = _wider(growth)
        while not low and high > LOWEST_SHARE * self.start_rps:
            rate = high / growth
            if self._at(rate) >= target:
                low = rate
            else:
                high = rate
            growth = _wider(growth)
        if not low:
            self.points.setdefault(0.0, 1.0)
        return low, high


def _wider(growth: float) -> float:
    """Return the next factor between rates that look for a bracket: one far from the first rate is soon found."""
    return min(max(growth * math.sqrt(growth), FIRST_GROWTH), 3.0)


def first_guess_rps(setting: Setting) -> float:
    """Return a rate near the knee: instances over the seconds of one request's share of full steps."""
    model = setting.cluster.truth.model.bins[-1]
    prompts = statistics.fmean(row.prompt_tokens for row in setting.trace)
    outputs = statistics.fmean(row.output_tokens for row in setting.trace)
    seconds = model.prefill_token_s * prompts + max(model.a1 + model.a3 + model.a4 * prompts, 0.0) * outputs
    return 0.85 * setting.cluster.instances / seconds


def measure(
    setting: Setting,
    name: str,
    seed: int,
    targets: Sequence[float],
    *,
    start_rps: float = 0.0,
    tolerance: float = 0.015,
) -> dict[str, Any]:
    """Search one system's capacities with one seed; returns plain data.

    Args:
        start_rps: a capacity that is likely to be near; 0: unknown.
    """
    started = time.perf_counter()
    config = replace(setting.cluster, seed=seed)
    simulated = 0

    def attainment(rate_rps: float) -> float:
        nonlocal simulated
        workload = setting.workload(rate_rps, seed)
        warmup = int(WARMUP_SHARE * len(workload))
        enough = int((1 - min(targets) + SEEN_THROUGH) * (len(workload) - warmup))
        run = simulate(system_named(name), workload, config, enough, warmup)
        simulated += len(workload)
        # A run that was given up attains at most this.
        return 1 - enough / (len(workload) - warmup) if run.gave_up else share_attaining(run.records[warmup:])

    search = CapacitySearch(
        attainment,
        start_rps or first_guess_rps(setting),
        tolerance,
        NEAR_GROWTH if start_rps else FIRST_GROWTH,
    )
    capacities = {f"{target:g}": search.find(target) for target in targets}
    return {
        "policy": name,
        "seed": seed,
        "capacity_rps": capacities,
        "points": sorted([rate, share] for rate, share in search.points.items() if rate),
        "requests_simulated": simulated,
        "seconds": time.perf_counter() - started,
    }


def share_attaining(records: Sequence[RequestRecord]) -> float:
    """Return joint attainment."""
    return sum(map(attains, records)) / len(records)


def report_at(setting: Setting, name: str, seed: int, rate_rps: float) -> dict[str, Any]:
    """Return the full report of one run."""
    workload = setting.workload(rate_rps, seed)
    run = simulate(system_named(name), workload, replace(setting.cluster, seed=seed))
    return summarize(run.records[int(WARMUP_SHARE * len(workload)) :]).as_dict()


def table(results: Sequence[dict[str, Any]], policies: Sequence[str], targets: Sequence[float]) -> str:
    """Lay out mean, lowest and highest capacity over seeds."""
    lines = ["policy".ljust(26) + "".join(f"@{target:.0%} rps (min-max)".rjust(26) for target in targets)]
    for name in policies:
        cells = []
        for target in targets:
            values = [r["capacity_rps"][f"{target:g}"] for r in results if r["policy"] == name]
            cells.append(f"{statistics.fmean(values):.2f} ({min(values):.2f}-{max(values):.2f})".rjust(26))
        lines.append(name.ljust(26) + "".join(cells))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.capacity", description=__doc__.split("\n")[0])
    add_setting_options(parser)
    parser.add_argument("--policies", default="all", help="comma-separated names, or all (default)")
    parser.add_argument("--targets", default="0.99,0.9", help="joint attainment (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="default: %(default)s")
    parser.add_argument("--first-seed", type=int, default=1, help="fresh ones judge settings that others tuned")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default: %(default)s)")
    parser.add_argument(
        "--overload", type=float, default=0.0, help="also report runs at this many times the capacity of --knee"
    )
    parser.add_argument(
        "--knee", default="unified", help="policy whose 99%% capacity is the knee (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="JSON file for the raw results")
    args = parser.parse_args(argv)
    setting = setting_from(args)
    policies = systems_from(args.policies)
    targets = [float(target) for target in args.targets.split(",")]
    if args.overload and (args.knee not in policies or 0.99 not in targets):
        parser.error("--overload needs --knee among --policies and 0.99 among --targets")
    # Seeds outside, systems inside: whatever disturbs the machine meanwhile disturbs all of them alike.
    tasks = [(name, seed) for seed in range(args.first_seed, args.first_seed + args.seeds) for name in policies]
    results = []
    with ProcessPoolExecutor(args.jobs) as pool:
        pending = [pool.submit(measure, setting, name, seed, targets) for name, seed in tasks]
        for done, future in enumerate(as_completed(pending), 1):
            result = future.result()
            results.append(result)
            found = "  ".join(f"@{target} {rate:.2f} rps" for target, rate in result["capacity_rps"].items())
            print(
                f"[{done}/{len(tasks)}] {result['policy']} seed {result['seed']}: {found}  ({result['seconds']:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
        overload = []
        if args.overload:
            overload = _overload(pool, setting, policies, results, args)
    print(table(results, policies, targets))
    if overload:
        print(f"\nat {args.overload:g}x the 99% capacity of {args.knee}:")
        print(_overload_table(overload, policies))
    write_result(args.out, {**provenance(args), "results": results, "overload": overload})


def _overload(
    pool: ProcessPoolExecutor,
    setting: Setting,
    policies: Sequence[str],
    results: Sequence[dict[str, Any]],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    knees = {r["seed"]: r["capacity_rps"]["0.99"] for r in results if r["policy"] == args.knee}
    tasks = [(name, seed, args.overload * knee) for seed, knee in knees.items() for name in policies]
    futures = [pool.submit(report_at, setting, *task) for task in tasks]
    return [
        {"policy": name, "seed": seed, "rate_rps": rate, "report": future.result()}
        for (name, seed, rate), future in zip(tasks, futures, strict=True)
    ]


def _overload_table(overload: Sequence[dict[str, Any]], policies: Sequence[str]) -> str:
    lines = ["policy".ljust(26) + "".join(head.rjust(16) for head in ("joint", "longest tenth", "worst wait s"))]
    for name in policies:
        reports = [entry["report"] for entry in overload if entry["policy"] == name]
        joint = statistics.fmean(report["joint"] for report in reports)
        longest = statistics.fmean(report["joint_by_prompt_decile"][-1] for report in reports)
        wait_s = max(report["longest_wait_s"] for report in reports)
        lines.append(name.ljust(26) + f"{joint:16.3f}{longest:16.3f}{wait_s:16.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
