"""The benchmark of spans runs, and its modes differ as they must."""

import json
import statistics
from pathlib import Path

from bench.tracing import MODES, main


def test_exported_spans_cost_most(tmp_path: Path) -> None:
    """A short run writes its result; what is exported costs more than what is off."""
    out = tmp_path / "result.json"
    assert main(["--requests", "100", "--tokens", "5", "--rounds", "1", "--out", str(out)]) == 0
    spent = json.loads(out.read_text(encoding="utf-8"))["us_per_request"]
    assert set(spent) == set(MODES)
    assert statistics.median(spent["exported"]) > statistics.median(spent["off"])
