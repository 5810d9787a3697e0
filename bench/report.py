"""python -m bench.report: write docs/report.md and the README's capacity table from the raw results in bench/results.

Nothing in the report is typed by hand but the sentences around the tables, in bench/report_text.md. `--check` writes
nothing and fails if the results say something else.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from bench.assess import table as assess_table
from bench.cpu.budget import Turn
from bench.cpu.budget import table as budget_table
from bench.cpu.fidelity import table as cpu_fidelity_table
from bench.cpu.pair import table as pair_table
from bench.fidelity import table as fidelity_table
from bench.live.__main__ import table as live_table
from bench.overhead.__main__ import Cell
from bench.overhead.__main__ import table as overhead_table
from bench.predictor_card import table as card_table
from bench.report_capacity import (
    brief,
    draw,
    goals,
    overview,
    prefixes,
    sensitivity_section,
    title,
    workload_section,
)
from bench.roles import table as roles_table
from bench.sensitivity import CASES
from bench.speed import in_turn_table
from bench.speed import table as speed_table
from bench.study import WORKLOADS

RESULTS = Path("bench/results")
TEXT = Path("bench/report_text.md")
REPORT = Path("docs/report.md")
README = Path("README.md")
MARK = "<!-- capacity: written by python -m bench.report -->"
IMAGES = Path("docs/images")


def settings_line(module: str, settings: dict[str, Any], commit: str) -> str:
    """Say how a result was made."""
    shown = " ".join(f"{name}={value}" for name, value in settings.items() if value not in ("", None, False, []))
    return f"`python -m {module}` at `{commit[:12]}`: {shown}"


def live_section(document: dict[str, Any]) -> str:
    """Render live runs of the same settings."""
    line = settings_line("bench.live", document["settings"], document["commit"])
    return f"{line}\n\n{live_table(document['results'])}"


def roles_section(document: dict[str, Any]) -> str:
    """Render the study of splits."""
    return (
        f"{settings_line('bench.roles', document['options'], document['commit'])}\n\n{roles_table(document['results'])}"
    )


def pair_section(documents: Sequence[dict[str, Any]]) -> str:
    """Render the runs of two engines on two cores as one table."""
    lines = [settings_line("bench.cpu.pair", document["options"], document["commit"]) for document in documents]
    return "\n\n".join([*lines, pair_table([result for document in documents for result in document["results"]])])


def overhead_section(document: dict[str, Any]) -> str:
    """Render an overhead run."""
    # Files from before there was a client that goes through a gateway lack its cost.
    return overhead_table([Cell(**{"gateway_us_per_token": 0.0, **cell}) for cell in document["cells"]])


def read(name: str) -> dict[str, Any]:
    """Read a result file."""
    document: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return document


def study() -> dict[str, dict[str, Any]]:
    """Read the capacity study: the result file of every workload that has one."""
    return {name: read(f"capacity-{name}") for name in WORKLOADS if (RESULTS / f"capacity-{name}.json").exists()}


def study_sections(documents: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Render the capacity study: its overview, and every workload."""
    parts = [f"### {title(document)}\n\n{workload_section(document)}" for document in documents.values()]
    return {"overview": overview(documents), "goals": goals(documents), "capacities": "\n\n".join(parts)}


def sensitivity_tables() -> str:
    """Render one table a topic."""
    document = read("sensitivity")
    base = next(case.change for case in CASES)
    parts = []
    for topic in dict.fromkeys(case.topic for case in CASES):
        cases = [(case.name, case.change is not base, case.systems) for case in CASES if case.topic == topic]
        parts.append(sensitivity_section(document, topic, cases))
    return "\n\n".join(parts)


def card_section(document: dict[str, Any]) -> str:
    """Render the predictor's card with the loads that it was made under."""
    loads = ", ".join(f"{one['rate_rps']:g}/s ({one['report']['joint']:.1%})" for one in document["loads"])
    skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(document["left_out"].items())) or "none"
    settings = settings_line("bench.predictor_card", document["options"], document["commit"])
    return f"{settings}\n\n{card_table(document['card'])}\n\nLoads (joint attainment): {loads}. Not judged: {skipped}."


def optional(name: str, rendered: Callable[[dict[str, Any]], str]) -> str:
    """Render a result file, or say that there is none yet."""
    return rendered(read(name)) if (RESULTS / f"{name}.json").exists() else "Not measured yet."


def render(documents: dict[str, dict[str, Any]]) -> str:
    """Fill the text with the tables, those of the capacity study among them."""
    sections = study_sections(documents)
    for path in sorted(RESULTS.glob("*.json")):
        name = path.stem
        key = name.replace("-", "_")
        if name.startswith("roles"):
            sections[key] = roles_section(read(name))
        elif name.startswith("overhead"):
            sections[key] = overhead_section(read(name))
    sections["sensitivity"] = optional("sensitivity", lambda _: sensitivity_tables())
    sections["speed"] = optional("speed", lambda d: speed_table(d["cells"], d["options"]["sizes"]))
    sections["fidelity"] = optional("fidelity", lambda d: fidelity_table(d["cells"]))
    sections["predictor_card"] = optional("predictor-card", card_section)
    sections["predictor_card_simulated"] = optional("predictor-card-simulated", card_section)
    sections["predictor_card_room"] = optional("predictor-card-simulated-room", card_section)
    sections["assess"] = optional("assess", lambda d: assess_table(d["results"]))
    sections["cpu_budget"] = optional("cpu-budget", lambda d: budget_table([Turn(**turn) for turn in d["turns"]]))
    sections["cpu_pair"] = pair_section([read(path.stem) for path in sorted(RESULTS.glob("cpu-pair*.json"))])
    sections["cpu_fidelity"] = optional("cpu-fidelity", lambda d: cpu_fidelity_table(d["cells"]))
    sections["speed_in_turn"] = optional("speed-in-turn", lambda d: in_turn_table(d["cells"]))
    sections["prefixes"] = prefixes(documents)
    sections["live_prefixes"] = optional("prefixes-live", live_section)
    sections["live_ab"] = optional("ab-azure-conv-21rps", live_section)
    sections["live_beyond"] = optional("ab-azure-conv-26rps", live_section)
    sections["live_mechanisms"] = optional("live-azure-conv-42rps", live_section)
    return Template(TEXT.read_text(encoding="utf-8")).substitute(sections)


def with_table(page: str, table: str) -> str:
    """Return a page with the table between the marks exchanged."""
    before, _, rest = page.partition(f"{MARK}\n")
    _, _, after = rest.partition(f"\n{MARK}")
    return f"{before}{MARK}\n{table}\n{MARK}{after}"


def main() -> None:
    """Write the report, or check that it is what the results say."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    documents = study()
    pages = {REPORT: render(documents), README: with_table(README.read_text(encoding="utf-8"), brief(documents))}
    changed = [str(path) for path, page in pages.items() if path.read_text(encoding="utf-8") != page]
    if arguments.check:
        sys.exit(f"not what bench/results says: {', '.join(changed)}; run make report" if changed else 0)
    for path, page in pages.items():
        path.write_text(page, encoding="utf-8")
    draw(documents, IMAGES)


if __name__ == "__main__":
    main()
