"""A live bench that was stopped goes on where it was."""

import json
from pathlib import Path

import pytest

from bench.live.__main__ import table
from bench.live.results import ResultFile
from bench.live.systems import DEFAULT_ORDER, SYSTEMS, TABLE
from bench.metrics import Outcome, RequestRecord, summarize
from services.policy.value_functions import VALUE_FUNCTIONS

SETTINGS = {"slo": "1000/100", "trace": "conv.csv"}


def result(system: str, seed: int = 1) -> dict[str, object]:
    """Return the result of one run."""
    records = [
        RequestRecord(
            request_id=f"r{i}",
            arrival_s=float(i),
            prompt_tokens=i + 1,
            ttft_slo_s=1,
            tbt_slo_s=1,
            outcome=Outcome.FINISHED,
            token_times_s=[i + 0.5],
        )
        for i in range(20)
    ]
    return {"system": system, "seed": seed, "rate_rps": 40.0, "report": summarize(records).as_dict()}


def test_what_is_in_the_file_is_not_run_again(tmp_path: Path) -> None:
    """Every run is on disk as soon as it ended; a second bench knows it by system, seed and rate."""
    path = tmp_path / "out.json"
    first = ResultFile(path, SETTINGS)
    first.append(result("a"))
    assert len(json.loads(path.read_text())["results"]) == 1
    second = ResultFile(path, SETTINGS)
    assert second.holds(("a", 1, 40.0))
    assert not second.holds(("a", 2, 40.0))
    assert not second.holds(("b", 1, 40.0))
    second.append(result("a", 2))
    assert [one["seed"] for one in ResultFile(path, SETTINGS).results] == [1, 2]
    assert "| 40 | a |" in table(second.results)


def test_runs_under_other_settings_do_not_mix(tmp_path: Path) -> None:
    """The file says under which settings its runs were made."""
    path = tmp_path / "out.json"
    ResultFile(path, SETTINGS).append(result("a"))
    with pytest.raises(ValueError, match="other settings"):
        ResultFile(path, SETTINGS | {"slo": "2000/200"})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": 3, "results": []}', "\xff"])
def test_another_file_is_not_overwritten(tmp_path: Path, content: str) -> None:
    """Whatever it holds, it is named, and stays."""
    path = tmp_path / "out.json"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ValueError, match=r"out\.json is no result file of this bench"):
        ResultFile(path, SETTINGS)
    assert path.read_text(encoding="latin-1") == content


def test_the_table_is_complete() -> None:
    """Each value function but the default's twin, each mechanism once, no system twice."""
    assert len(set(TABLE)) == len(TABLE)
    assert set(TABLE) <= set(SYSTEMS)
    assert {f"ascendra-{name}" for name in VALUE_FUNCTIONS} - {DEFAULT_ORDER} <= set(TABLE)


def test_stock_systems_only_balance() -> None:
    """Nothing of ours helps a baseline: no moves, no tickets, nobody turned away, vLLM's own order and budget."""
    for name, system in SYSTEMS.items():
        if name.startswith("vllm-"):
            assert not any(system.router[mechanism] for mechanism in ("offload", "rescue", "tickets"))
            assert system.router["admission-policy"] == {"max-wait-s": 0, "max-waiting": 0}
            assert (system.worker["value-function"], system.worker["relegation"]) == ("fcfs", "none")
            assert system.worker["token-budget"] == "static"
