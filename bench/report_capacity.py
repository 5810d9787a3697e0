"""The report's tables and plots of the capacity study and of what it depends on."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.markdown import markdown_table

TARGETS = ("0.99", "0.9")
OURS = ("ascendra", "ascendra-pool", "ascendra-pull")
KNEE = "unified"
ENDS = ("sticky", "work", "spread", "headroom", "rebalance", "p2c", "edf", "least", "rr")
"""Dispatches of stock vLLM."""


def capacities(document: dict[str, Any], policy: str, target: str) -> dict[int, float]:
    """Return a policy's capacity by seed, in requests per second."""
    return {r["seed"]: r["capacity_rps"][target] for r in document["results"] if r["policy"] == policy}


def systems(document: dict[str, Any]) -> list[str]:
    """Return the measured systems: ours, the unified pools, then the baselines by capacity."""
    names = list(dict.fromkeys(r["policy"] for r in document["results"]))
    ours = [name for name in names if name in OURS]
    others = [name for name in names if name not in OURS]
    means = {name: statistics.fmean(capacities(document, name, "0.99").values()) for name in others}
    return [*ours, *sorted(others, key=means.__getitem__, reverse=True)]


def standing(document: dict[str, Any], policy: str, target: str) -> tuple[float, float]:
    """Return what decides which of several budgets is the best: the capacity at the first seed, then the mean.

    With the first seed every budget is measured, with the others only those that were best.
    """
    rates = capacities(document, policy, target)
    if not rates:
        return 0.0, 0.0
    return rates.get(min(r["seed"] for r in document["results"]), 0.0), statistics.fmean(rates.values())


def best(document: dict[str, Any], beginning: str, end: str, target: str) -> str:
    """Return the baseline of a family (`vllm-`, `-rr`) that carries most at a target; empty when none was measured."""
    names = [name for name in systems(document) if name.startswith(beginning) and name.endswith(end)]
    return max(names, key=lambda name: standing(document, name, target), default="")


def ratios(document: dict[str, Any], policy: str, baseline: str, target: str) -> list[float]:
    """Return capacities as a ratio to a baseline's, seed by seed where both were measured."""
    ours, theirs = capacities(document, policy, target), capacities(document, baseline, target)
    return [ours[seed] / theirs[seed] for seed in ours if theirs.get(seed)]


def ratio_cell(document: dict[str, Any], policy: str, baseline: str, target: str) -> str:
    """Render the median ratio over seeds."""
    found = ratios(document, policy, baseline, target)
    return f"{statistics.median(found):.2f}" if found else "-"


def budgets_tried(document: dict[str, Any], family: str) -> int:
    """Return how many static budgets were measured of a family of stock vLLM; 2 for families without budgets."""
    end = {"vLLM round robin": "-rr", "vLLM least work": "-work"}.get(family)
    return 2 if end is None else sum(name.startswith("vllm-") and name.endswith(end) for name in systems(document))


def baselines(document: dict[str, Any], target: str) -> dict[str, str]:
    """Return who is compared with, by name of the column."""
    return {
        "vLLM round robin": best(document, "vllm-", "-rr", target),
        "vLLM least work": best(document, "vllm-", "-work", target),
        "paper": best(document, "paper", "", target),
        "unified": KNEE,
    }


def bound_shares(document: dict[str, Any], policy: str, target: str) -> list[float]:
    """Return capacities as shares of what no policy can exceed."""
    bounds = document["bounds"]
    return [rate / bounds[str(seed)][target] for seed, rate in capacities(document, policy, target).items()]


def of_bound(document: dict[str, Any], policy: str, target: str) -> str:
    """Render a capacity as a share of what no policy can exceed."""
    found = bound_shares(document, policy, target)
    return f"{statistics.fmean(found):.2f}" if found else "-"


def title(document: dict[str, Any]) -> str:
    """Name a workload."""
    settings = document["settings"]
    arrivals = {"poisson": "Poisson", "trace": "its own timestamps"}.get(
        settings["arrivals"], settings["arrivals"].replace("gamma:", "Gamma, CV ")
    )
    slo = settings["slo"]
    ttft, _, tbt = slo.partition("/")
    if not tbt:
        objective = f"SLO set {slo}"
    elif ttft == "B":
        objective = f"TTFT of set B / {float(tbt):g} ms"
    else:
        objective = f"{float(ttft):g} ms / {float(tbt):g} ms"
    return f"{settings['trace'].split('_dev')[0].split('_lengths')[0]}, {arrivals}, {objective}"


def overview(documents: dict[str, dict[str, Any]]) -> str:
    """Render our variants on every workload against the best of each family of baselines."""
    families = ("vLLM round robin", "vLLM least work", "paper", "unified")
    heads = ["workload", "system", "seeds", *(f"{float(t):.0%} of bound" for t in TARGETS)]
    heads += [f"{float(t):.0%} / {family}" for family in families for t in TARGETS]
    rows = []
    for document in documents.values():
        for policy in [name for name in systems(document) if name in OURS]:
            cells = [title(document), policy, str(len(capacities(document, policy, TARGETS[0])))]
            cells += [of_bound(document, policy, target) for target in TARGETS]
            cells += [
                ("≤ " if budgets_tried(document, family) == 1 else "")
                + ratio_cell(document, policy, baselines(document, target)[family], target)
                for family in families
                for target in TARGETS
            ]
            rows.append(cells)
    return markdown_table(heads, rows)


def prefixes(documents: dict[str, dict[str, Any]]) -> str:
    """Render workloads whose prompts share prefixes: ours against the best of each kind of dispatch."""
    heads = ["workload", "system", "seeds", *(f"@{float(t):.0%} req/s (min-max)" for t in TARGETS)]
    rows = []
    for document in documents.values():
        if not any(name.endswith("-sticky") for name in systems(document)):
            continue
        names = [*OURS, "ascendra-blind", KNEE, *(best(document, "vllm-", f"-{end}", TARGETS[0]) for end in ENDS)]
        names.append(baselines(document, TARGETS[1])["paper"])
        for policy in dict.fromkeys(name for name in names if name in systems(document)):
            cells = [title(document), policy, str(len(capacities(document, policy, TARGETS[0])))]
            for target in TARGETS:
                rates = list(capacities(document, policy, target).values())
                cells.append(f"{statistics.fmean(rates):.2f} ({min(rates):.2f}-{max(rates):.2f})")
            rows.append(cells)
    return markdown_table(heads, rows)


BRIEF = {
    "conv-poisson-1000-100": "Azure conversation, 1 s / 100 ms",
    "conv-gamma3-1000-100": "the same in bursts (Gamma, CV 3)",
    "conv-poisson-C": "the same with two SLO classes (1 s / 50 ms, 10 s / 200 ms)",
    "conv-poisson-B": "the same with TTFT by length (0.2 s + 5x unloaded) and 50 ms",
    "code-trace-2000-200": "Azure code at its own timestamps, 2 s / 200 ms",
    "sharegpt-poisson-1000-100": "ShareGPT lengths, 1 s / 100 ms",
    "arxiv-poisson-2000-200": "arXiv summarisation lengths, 2 s / 200 ms",
    "mooncake-trace-B-200": "Mooncake conversation, shared prefixes, TTFT by length and 200 ms",
}
"""Workloads of the README's table, and what they are called there."""


def brief(documents: dict[str, dict[str, Any]]) -> str:
    """Render how much more LP/HP carries than stock vLLM, at 99% / 90% attainment, for the README."""
    families = {"vLLM round robin": "over round-robin vLLM", "vLLM least work": "over least-loaded vLLM"}
    rows = []
    for name, words in BRIEF.items():
        document = documents[name]
        cells = [
            " / ".join(f"{ratio_cell(document, OURS[0], baselines(document, t)[family], t)}x" for t in TARGETS)
            for family in families
        ]
        # A baseline that reaches a target at no rate has no ratio.
        cells = [cell.replace("-x", "-") for cell in cells]
        rows.append([words, *cells])
    return markdown_table(["workload", *families.values()], rows)


GOALS = (
    # (against, workloads whose name begins so, aims at 99% and 90%)
    ("vLLM round robin", "", (1.4, 1.5)),
    ("vLLM round robin", "code-trace", (1.8, 2.4)),
    ("vLLM least work", "", (1.08, 1.15)),
    ("vLLM least work", "conv-poisson-1000", (1.08, 1.35)),
    ("vLLM least work", "code-trace", (1.5, 2.1)),
    ("paper", "", (1.1, 1.1)),
    ("unified", "", (0.99, 0.99)),
    ("bound", "conv-poisson-1000", (0.92, 0.96)),
)


def goals(documents: dict[str, dict[str, Any]]) -> str:
    """Render what was aimed at, and the lowest ratio of each of our variants over the workloads it is meant for."""
    rows = []
    for family, beginning, aims in GOALS:
        for target, aim in zip(TARGETS, aims, strict=True):
            cells = [f"{family}, {beginning or 'every workload'}", f"{float(target):.0%}", f"{aim:g}"]
            for policy in OURS:
                found = {}
                for name, document in documents.items():
                    if not name.startswith(beginning):
                        continue
                    if family == "bound":
                        values = bound_shares(document, policy, target)
                    else:
                        values = ratios(document, policy, baselines(document, target)[family], target)
                    if values:
                        found[name] = statistics.median(values)
                lowest = min(found, key=found.__getitem__, default="")
                if not lowest:
                    cells.append("-")
                elif round(found[lowest], 3) >= aim:
                    cells.append(f"{found[lowest]:.2f} met ({lowest})")
                else:
                    most = most_possible(documents[lowest], family, target)
                    cells.append(f"{found[lowest]:.2f} **missed** ({lowest}{most})")
            rows.append(cells)
    return markdown_table(["ratio of capacities to", "at", "aim", *OURS], rows)


def most_possible(document: dict[str, Any], family: str, target: str) -> str:
    """Render the ratio to a family's best that no policy can exceed; nothing against the bound itself."""
    if family == "bound":
        return ""
    baseline = capacities(document, baselines(document, target)[family], target)
    found = [document["bounds"][str(seed)][target] / rate for seed, rate in baseline.items() if rate]
    return f"; bound {statistics.median(found):.2f}" if found else ""


def workload_section(document: dict[str, Any]) -> str:
    """Render one workload: rates with spread, shares of the bound, and what is kept beyond the knee."""
    seeds = sorted({r["seed"] for r in document["results"]})
    bounds = {t: statistics.fmean(document["bounds"][str(seed)][t] for seed in seeds) for t in TARGETS}
    commits = sorted({r["commit"][:12] for r in document["results"]})
    named = {t: baselines(document, t) for t in TARGETS}
    chosen = "; ".join(
        f"{family} {' / '.join(dict.fromkeys(named[t][family] or '-' for t in TARGETS))}"
        for family in ("vLLM round robin", "vLLM least work", "paper")
    )
    made = (
        f"`python -m bench.study` at {', '.join(f'`{commit}`' for commit in commits)}. "
        f"Bound: {bounds['0.99']:.1f} requests/s at 99%, {bounds['0.9']:.1f} at 90%. Best budgets: {chosen}."
    )
    rows = []
    for policy in systems(document):
        cells = [policy, str(len(capacities(document, policy, TARGETS[0])))]
        for target in TARGETS:
            values = list(capacities(document, policy, target).values())
            cells += [
                f"{statistics.fmean(values):.1f} ({min(values):.1f}-{max(values):.1f})",
                of_bound(document, policy, target),
            ]
        rows.append(cells)
    heads = ["system", "seeds", "@99% req/s (min-max)", "of bound", "@90% req/s (min-max)", "of bound"]
    parts = [made, markdown_table(heads, rows)]
    if document["overload"]:
        parts += [f"At 1.2 times the 99% capacity of `{KNEE}`, mean over seeds:", overload_table(document)]
    return "\n\n".join(parts)


def overload_table(document: dict[str, Any]) -> str:
    """Render what each system keeps beyond the knee, and what any could."""
    rows = []
    for policy in systems(document):
        reports = [entry["report"] for entry in document["overload"] if entry["policy"] == policy]
        if reports:
            joint, mean_gap = (statistics.fmean(report[name] for report in reports) for name in ("joint", "mean_gap"))
            longest = statistics.fmean(report["joint_by_prompt_decile"][-1] for report in reports)
            worst_s = max(report["longest_wait_s"] for report in reports)
            rows.append([policy, f"{joint:.1%}", f"{mean_gap:.1%}", f"{longest:.1%}", f"{worst_s:.0f}"])
    for name, words in (("free", "most that fits"), ("longest kept", "most that fits with 80% of the longest tenth")):
        found = [kept[name] for kept in document.get("kept_bounds", {}).values()]
        if found:
            total, longest = (statistics.fmean(pair[i] for pair in found) for i in (0, 1))
            rows.append([f"*bound: {words}*", f"{total:.1%}", "", f"{longest:.1%}", ""])
    heads = ["system", "joint", "joint by mean gap", "longest tenth of the prompts", "worst wait s"]
    return markdown_table(heads, rows)


def sensitivity_section(document: dict[str, Any], topic: str, cases: Sequence[tuple[str, bool, Sequence[str]]]) -> str:
    """Render one topic: capacities under each change, and relative to the unchanged setting.

    Args:
        cases: (name, whether it changes anything, systems) in order.
    """
    results = document["results"]

    def capacity(case: str, policy: str, target: str) -> dict[int, float]:
        found = (r for r in results if r["case"] == case and r["policy"] == policy)
        return {r["seed"]: r["capacity_rps"][target] for r in found}

    heads = [topic, "system", "@99% req/s", "against unchanged", "@90% req/s", "against unchanged"]
    rows = []
    for name, changed, policies in cases:
        case = f"{topic}: {name}" if changed else ""
        for policy in policies:
            cells = [name, policy]
            for target in TARGETS:
                rates = capacity(case, policy, target)
                if not rates:
                    break
                base = capacity("", policy, target)
                relative = [rates[seed] / base[seed] for seed in rates if base.get(seed)]
                cells += [
                    f"{statistics.fmean(rates.values()):.1f}",
                    f"{statistics.median(relative):.2f}" if relative and changed else "",
                ]
            if len(cells) == len(heads):
                rows.append(cells)
    return markdown_table(heads, rows)


def draw(documents: dict[str, dict[str, Any]], folder: Path) -> None:
    """Draw every system's capacity as a share of the bound, and what it keeps by prompt length beyond the knee."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    shown = ("vllm-512-rr", "vllm-512-work", "paper", "unified", *OURS)
    figure, axes = plt.subplots(1, len(TARGETS), figsize=(10, 4), sharey=True)
    for axis, target in zip(axes, TARGETS, strict=True):
        for place, policy in enumerate(shown):
            shares = [statistics.fmean(bound_shares(d, policy, target) or [0.0]) for d in documents.values()]
            offsets = [index + (place - len(shown) / 2) * 0.11 for index in range(len(documents))]
            axis.bar(offsets, shares, width=0.1, label=policy)
        axis.axhline(1.0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(documents)), [name.replace("-", "\n", 2) for name in documents], fontsize=6)
        axis.set_title(f"{float(target):.0%} attaining")
    axes[0].set_ylabel("capacity / bound")
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(folder / "capacity.png", dpi=100)
    plt.close(figure)

    name, document = next(iter(documents.items()))
    figure, axis = plt.subplots(figsize=(7, 3.5))
    for policy in shown:
        reports = [entry["report"] for entry in document["overload"] if entry["policy"] == policy]
        if reports:
            deciles = [statistics.fmean(r["joint_by_prompt_decile"][i] for r in reports) for i in range(10)]
            axis.plot(range(1, 11), deciles, marker="o", markersize=3, label=policy)
    axis.set(xlabel="tenth of the prompts by length, longest last", ylabel="attaining", title=f"1.2x the knee, {name}")
    axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(folder / "overload.png", dpi=100)
    plt.close(figure)
