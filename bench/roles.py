"""How many HPs, in the simulator: fixed splits and one that follows the pressure, with and without relegation.

python -m bench.roles --trace conv.csv.gz --rates 40,50 --out bench/results/roles-azure-conv.json
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.markdown import markdown_table
from bench.metrics import summarize
from bench.options import WARMUP_SHARE, add_setting_options, setting_from
from bench.result_files import provenance, write_result
from bench.simulator.systems import SYSTEMS, System, simulate
from services.policy.order import OrderPolicy
from services.policy.relegation import MOORE_HODGSON, NONE
from services.policy.roles import RolePolicy

RELEGATIONS = (NONE, MOORE_HODGSON)
SPLITS = ("0 HP", "1 HP", "2 HP", "3 HP", "follows the pressure")


def system(split: str, relegation: str) -> System:
    """Return Ascendra with a split: so many HPs, or as many as the pressure asks for, from one in eight on."""
    base = replace(SYSTEMS["ascendra"], order=OrderPolicy(relegation=relegation))
    if split == SPLITS[-1]:
        return replace(base, roles=RolePolicy())
    count = int(split.split()[0])
    return replace(base, hp_count=lambda instances: count, tickets=base.tickets if count else None, rescue=count == 0)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Lay out mean joint attainment over seeds, and where the HPs that follow the pressure went."""
    rates = sorted({result["rate_rps"] for result in results})
    heads = ["relegation", "HPs", *(f"{rate:g}/s" for rate in rates), "HPs at the end"]
    rows = []
    for relegation in RELEGATIONS:
        for split in SPLITS:
            cells, ends = [], []
            for rate in rates:
                runs = [r for r in results if (r["relegation"], r["split"], r["rate_rps"]) == (relegation, split, rate)]
                cells.append(f"{statistics.fmean(run['report']['joint'] for run in runs):.1%}")
                ends.append("/".join(str(run["hp_at_end"]) for run in runs))
            rows.append([relegation, split, *cells, ", ".join(ends)])
    return markdown_table(heads, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.roles", description=__doc__.split("\n")[0])
    add_setting_options(parser)
    parser.add_argument("--rates", default="40,50", help="requests per second (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--first-seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file for the raw results")
    args = parser.parse_args(argv)
    setting = setting_from(args)
    results = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for rate_rps in map(float, args.rates.split(",")):
            workload = setting.workload(rate_rps, seed)
            for relegation in RELEGATIONS:
                for split in SPLITS:
                    run = simulate(system(split, relegation), workload, replace(setting.cluster, seed=seed))
                    report = summarize(run.records[int(WARMUP_SHARE * len(run.records)) :])
                    result = {"relegation": relegation, "split": split, "rate_rps": rate_rps, "seed": seed}
                    hp = run.role_changes[-1][1] if run.role_changes else run.hp_instances
                    results.append(result | {"hp_at_end": hp, "report": report.as_dict()})
                    print(f"{result} joint {report.joint:.3f} HPs at the end {hp}", file=sys.stderr, flush=True)
    print(table(results))
    write_result(args.out, {**provenance(args), "results": results})


if __name__ == "__main__":
    main()
