"""One simulated run: a summary, and the full result as JSON.

python -m bench.simulate --trace conv.csv.gz --policy ascendra --rate 40 --instances 8 --out run.json
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.metrics import Report, RequestRecord, summarize
from bench.options import (
    WARMUP_SHARE,
    above_zero,
    add_setting_options,
    mistakes_in_one_line,
    setting_from,
    systems_from,
)
from bench.result_files import provenance, write_result
from bench.simulator.systems import SYSTEMS, simulate, system_named


def summary(report: Report) -> str:
    """Lay a report out for reading."""
    deciles = " ".join(f"{share:.2f}" for share in report.joint_by_prompt_decile)
    classes = ", ".join(f"{name} {share:.3f}" for name, share in report.joint_by_class.items())
    lines = (
        ("requests", f"{report.requests} at {report.offered_rps:.2f} per second"),
        ("joint attainment", f"{report.joint:.4f}  ({classes})"),
        ("TTFT only", f"{report.ttft_only:.4f}"),
        ("TBT only (own p99 gap)", f"{report.tbt_only:.4f}"),
        ("TTFT and mean gap", f"{report.mean_gap:.4f}"),
        ("goodput", f"{report.goodput_rps:.2f} requests/s, {report.goodput_tokens_per_s:.0f} tokens/s"),
        ("TTFT p50 / p90 / p99", f"{report.ttft_p50_s:.3f} / {report.ttft_p90_s:.3f} / {report.ttft_p99_s:.3f} s"),
        ("pooled gap p50 / p99", f"{report.pooled_gap_p50_s * 1e3:.1f} / {report.pooled_gap_p99_s * 1e3:.1f} ms"),
        ("by prompt decile", deciles),
        ("longest wait", f"{report.longest_wait_s:.1f} s"),
        (
            "refused / relegated / unfinished",
            f"{report.refused} / {report.relegated} / {report.unfinished}",
        ),
    )
    return "\n".join(f"{name:<34}{value}" for name, value in lines)


def plot(records: Sequence[RequestRecord], path: Path) -> None:
    """Draw TTFT and own worst gap of every request over its arrival."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, sharex=True, figsize=(9, 6))
    begun = [record for record in records if record.token_times_s]
    arrivals = [record.arrival_s for record in begun]
    upper.scatter(arrivals, [record.ttft_s for record in begun], s=4, c=[record.relegated for record in begun])
    upper.set(ylabel="TTFT (s)", yscale="log")
    lower.scatter(arrivals, [1e3 * max(record.gaps_s, default=0.0) for record in begun], s=4)
    lower.set(ylabel="longest gap (ms)", xlabel="arrival (s)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m bench.simulate", description="Simulate one run.")
    add_setting_options(parser)
    parser.add_argument("--policy", default="ascendra", help=f"one of {', '.join(SYSTEMS)} (default: %(default)s)")
    parser.add_argument("--rate", type=float, required=True, help="requests per second")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="JSON file for the report")
    parser.add_argument("--plot", type=Path, help="PNG of every request")
    args = parser.parse_args(argv)
    with mistakes_in_one_line():
        above_zero(rate=args.rate)
    setting = setting_from(args)
    (name,) = systems_from(args.policy)[:1]
    workload = setting.workload(args.rate, args.seed)
    started = time.perf_counter()
    run = simulate(system_named(name), workload, replace(setting.cluster, seed=args.seed))
    seconds = time.perf_counter() - started
    records = run.records[int(WARMUP_SHARE * len(run.records)) :]
    report = summarize(records)
    print(f"{name}: {system_named(name).summary}\n")
    print(summary(report))
    print(f"{'instances busy, steps, preemptions':<34}{run.busy_share:.1%}, {run.steps}, {run.preemptions}")
    print(f"{'moves (refused; by ticket)':<34}{run.moves} ({run.refused_moves}; {run.ticket_moves})")
    print(f"{'simulated':<34}{len(workload)} requests in {seconds:.1f} s")
    if args.plot:
        plot(records, args.plot)
    result = {**provenance(args), "report": report.as_dict(), "moves": run.moves, "steps": run.steps}
    write_result(args.out, result)


if __name__ == "__main__":
    main()
