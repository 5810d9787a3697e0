"""How many GPUs, and how many of them HP, serve a load within its objectives; by simulation.

python -m bench.plan --trace conv.csv.gz --slo 1000/100 --rate 100 --target 0.99
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.capacity import first_guess_rps
from bench.metrics import attains
from bench.options import (
    WARMUP_SHARE,
    Setting,
    above_zero,
    add_setting_options,
    at_least,
    mistakes_in_one_line,
    setting_from,
    systems_from,
)
from bench.result_files import provenance, write_result
from bench.simulator.systems import System, simulate, system_named


@dataclass(frozen=True, slots=True)
class Plan:
    """A cluster that meets the target."""

    instances: int
    hp_instances: int
    joint: float
    """Mean joint attainment over the seeds."""
    rps_per_instance: float


def attainment(setting: Setting, system: System, instances: int, hp: int, rate_rps: float, seeds: int) -> float:
    """Return the mean joint attainment of a cluster over seeds."""
    shares = []
    sized = replace(system, hp_count=None if hp == 0 else lambda _instances: hp)
    for seed in range(1, seeds + 1):
        workload = setting.workload(rate_rps, seed)
        config = replace(setting.cluster, instances=instances, seed=seed)
        records = simulate(sized, workload, config).records[int(WARMUP_SHARE * len(workload)) :]
        shares.append(sum(map(attains, records)) / len(records))
    return statistics.fmean(shares)


def fewest(enough: Callable[[int], bool], guess: int, most: int) -> int | None:
    """Return the smallest count at which a rising test holds, or None above `most`."""
    low, high = 0, max(guess, 1)
    while not enough(high):
        low = high
        if high >= most:
            return None
        high = min(math.ceil(high * 1.5), most)
    while high - low > 1:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle
    return high


def splits(instances: int) -> list[int]:
    """Return the numbers of HP instances worth trying: none, and up to half."""
    return sorted({0, *(hp for hp in (1, instances // 8, instances // 4, instances // 2) if 0 < hp < instances)})


def make_plan(
    setting: Setting, system: System, rate_rps: float, target: float, seeds: int, most: int
) -> tuple[Plan | None, dict[int, float]]:
    """Return the smallest cluster, its best split, and the attainment of every split tried on it."""
    known: dict[tuple[int, int], float] = {}

    def joint(instances: int, hp: int) -> float:
        if (instances, hp) not in known:
            known[instances, hp] = attainment(setting, system, instances, hp, rate_rps, seeds)
            print(f"{instances} instances, {hp} HP: joint {known[instances, hp]:.4f}", file=sys.stderr, flush=True)
        return known[instances, hp]

    def enough(instances: int) -> bool:
        return any(joint(instances, hp) >= target for hp in splits(instances))

    per_instance = first_guess_rps(setting) / setting.cluster.instances
    instances = fewest(enough, math.ceil(rate_rps / per_instance), most)
    if instances is None:
        return None, {}
    tried = {hp: joint(instances, hp) for hp in splits(instances)}
    best = max(tried, key=lambda hp: (tried[hp], -hp))
    return Plan(instances, best, tried[best], rate_rps / instances), tried


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.plan", description="Size a cluster by simulation.")
    add_setting_options(parser, instances=False)
    parser.add_argument("--policy", default="ascendra", help="default: %(default)s")
    parser.add_argument("--rate", type=float, required=True, help="requests per second to serve")
    parser.add_argument("--target", type=float, default=0.99, help="joint attainment (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--max-instances", type=int, default=512, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file for the plan")
    args = parser.parse_args(argv)
    with mistakes_in_one_line():
        above_zero(rate=args.rate)
        at_least(1, seeds=args.seeds, max_instances=args.max_instances)
        if not 0 < args.target < 1:
            raise ValueError(f"--target must be between 0 and 1, got {args.target:g}")
    setting = setting_from(args)
    (name,) = systems_from(args.policy)[:1]
    plan, tried = make_plan(setting, system_named(name), args.rate, args.target, args.seeds, args.max_instances)
    if plan is None:
        sys.exit(
            f"no cluster of up to {args.max_instances} instances serves {args.rate:g} requests/s at {args.target:.0%}"
        )
    low = plan.instances - plan.hp_instances
    split = f"{low} LP + {plan.hp_instances} HP" if plan.hp_instances else "one unified pool"
    print(f"{plan.instances} GPUs ({split}): joint attainment {plan.joint:.4f} at {args.rate:g} requests/s")
    for hp, joint in tried.items():
        print(f"  {hp} HP of {plan.instances}: {joint:.4f}")
    write_result(args.out, {**provenance(args), "plan": asdict(plan), "splits": tried})


if __name__ == "__main__":
    main()
