"""python -m bench.report: write docs/report.md from the raw results in bench/results. Nothing in it is typed by hand
but the sentences around the tables, in bench/report_text.md."""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

from bench.live.__main__ import table as live_table
from bench.overhead.__main__ import Cell
from bench.overhead.__main__ import table as overhead_table
from bench.roles import table as roles_table

RESULTS = Path("bench/results")
TEXT = Path("bench/report_text.md")
TARGETS = ("0.99", "0.9")


def capacities(results: Sequence[dict[str, Any]], policy: str, target: str) -> dict[int, float]:
    """Return a policy's capacity by seed, in requests per second."""
    return {r["seed"]: r["capacity_rps"][target] for r in results if r["policy"] == policy}


def best_static(results: Sequence[dict[str, Any]], dispatch: str) -> str:
    """Return the stock baseline of a dispatch whose static budget carries most, by mean capacity at 99%."""
    names: set[str] = {
        r["policy"] for r in results if r["policy"].startswith("vllm-") and r["policy"].endswith(f"-{dispatch}")
    }
    return max(names, key=lambda name: statistics.fmean(capacities(results, name, "0.99").values()))


def ratio(results: Sequence[dict[str, Any]], policy: str, baseline: str, target: str) -> str:
    """Return the median over seeds of the ratio of capacities."""
    ours, theirs = capacities(results, policy, target), capacities(results, baseline, target)
    return f"{statistics.median(ours[seed] / theirs[seed] for seed in ours):.2f}"


def capacity_section(document: dict[str, Any]) -> str:
    """Render one capacity study: rates with spread, and ratios to the baselines within each seed."""
    results = document["results"]
    policies = list(dict.fromkeys(r["policy"] for r in results))
    baselines = [best_static(results, "rr"), best_static(results, "work"), "paper", "unified"]
    heads = [f"@{float(t):.0%} req/s (min-max)" for t in TARGETS]
    heads += [f"{float(t):.0%} / {name}" for name in baselines for t in TARGETS]
    lines = [settings_line("bench.capacity", document["options"], document["commit"]), ""]
    lines += ["| system | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for policy in policies:
        cells = []
        for target in TARGETS:
            values = list(capacities(results, policy, target).values())
            cells.append(f"{statistics.fmean(values):.1f} ({min(values):.1f}-{max(values):.1f})")
        cells += [ratio(results, policy, name, target) for name in baselines for target in TARGETS]
        lines.append(f"| {policy} | {' | '.join(cells)} |")
    if document.get("overload"):
        lines += ["", *overload_lines(document, policies)]
    return "\n".join(lines)


def overload_lines(document: dict[str, Any], policies: Sequence[str]) -> list[str]:
    """Render what each system keeps beyond the knee."""
    options = document["options"]
    lines = [
        f"At {options['overload']:g}x the 99% capacity of `{options['knee']}`, mean over seeds:",
        "",
        "| system | joint | longest tenth of the prompts | worst wait s |",
        "|---|---|---|---|",
    ]
    for policy in policies:
        reports = [entry["report"] for entry in document["overload"] if entry["policy"] == policy]
        joint = statistics.fmean(report["joint"] for report in reports)
        longest = statistics.fmean(report["joint_by_prompt_decile"][-1] for report in reports)
        worst_s = max(report["longest_wait_s"] for report in reports)
        lines.append(f"| {policy} | {joint:.1%} | {longest:.1%} | {worst_s:.0f} |")
    return lines


def settings_line(module: str, settings: dict[str, Any], commit: str) -> str:
    """Say how a result was made."""
    shown = " ".join(f"{name}={value}" for name, value in settings.items() if value not in ("", None, False, []))
    return f"`python -m {module}` at `{commit[:12]}`: {shown}"


def live_section(documents: Sequence[dict[str, Any]]) -> str:
    """Render live runs of the same settings as one table."""
    results = [result for document in documents for result in document["results"]]
    lines = [settings_line("bench.live", document["settings"], document["commit"]) for document in documents]
    return "\n\n".join([*lines, live_table(results)])


def roles_section(document: dict[str, Any]) -> str:
    """Render the study of splits."""
    return (
        f"{settings_line('bench.roles', document['options'], document['commit'])}\n\n{roles_table(document['results'])}"
    )


def overhead_section(document: dict[str, Any]) -> str:
    """Render an overhead run."""
    # Files from before there was a client that goes through a gateway lack its cost.
    return overhead_table([Cell(**{"gateway_us_per_token": 0.0, **cell}) for cell in document["cells"]])


def read(name: str) -> dict[str, Any]:
    """Read a result file."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def render() -> str:
    """Fill the text with the tables."""
    sections = {}
    for path in sorted(RESULTS.glob("*.json")):
        name = path.stem
        key = name.replace("-", "_")
        if name.startswith("capacity"):
            sections[key] = capacity_section(read(name))
        elif name.startswith("roles"):
            sections[key] = roles_section(read(name))
        elif name.startswith("overhead"):
            sections[key] = overhead_section(read(name))
    sections["live"] = live_section([read(path.stem) for path in sorted(RESULTS.glob("live-*.json"))])
    return Template(TEXT.read_text(encoding="utf-8")).substitute(sections)


def main() -> None:
    """Write the report, or check that it is what the results say."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/report.md"))
    arguments = parser.parse_args()
    arguments.out.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
