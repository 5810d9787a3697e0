"""Result files of benches: JSON with what it takes to measure again, written whole or not at all."""

import argparse
import json
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NO_PLACES = ("out", "plot", "reference", "demo_model", "model_dir")
"""Options that say where something lies on this machine, not what was measured."""


def write_result(path: Path | None, document: Mapping[str, Any]) -> None:
    """Write a result; None: nowhere."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def provenance(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a result file needs to be repeated."""
    options = {name: _shown(value) for name, value in vars(args).items() if name not in _NO_PLACES}
    # A name, not a place: a result file says nothing of the machine's folders.
    if "trace" in options:
        options["trace"] = Path(args.trace).name
    return {"options": options, "commit": commit_id(), "python": platform.python_version()}


def commit_id() -> str:
    """Return the commit of the code, marked when the working tree differs from it; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return [one.name if isinstance(one, Path) else one for one in value]
    return str(value) if isinstance(value, Path) else value
