"""Capacity search on known functions, and the commands on a small trace."""

import json
from pathlib import Path

import pytest

from bench import capacity, plan, simulate
from bench.capacity import CapacitySearch


def step_down(rate_rps: float) -> float:
    """Perfect up to 10 per second, then falling by 0.02 per request."""
    return min(1.0, max(0.0, 1.0 - 0.02 * (rate_rps - 10)))


@pytest.mark.parametrize("start_rps", [0.5, 8.0, 12.0, 300.0])
@pytest.mark.parametrize(("target", "rate_rps"), [(0.99, 10.5), (0.9, 15.0)])
def test_search_finds_the_crossing(start_rps: float, target: float, rate_rps: float) -> None:
    """From below and from above, within the tolerance."""
    search = CapacitySearch(step_down, start_rps)
    assert search.find(target) == pytest.approx(rate_rps, rel=0.02)


def test_a_second_target_reuses_points() -> None:
    """What is known of one target brackets the next."""
    fresh, shared = CapacitySearch(step_down, 12.0), CapacitySearch(step_down, 12.0)
    shared.find(0.99)
    before = len(shared.points)
    shared.find(0.9)
    fresh.find(0.9)
    assert len(shared.points) - before <= len(fresh.points)


def test_nothing_passes() -> None:
    """A system that fails at any rate has no capacity."""
    assert CapacitySearch(lambda _rate: 0.5, 10.0).find(0.99) == 0.0


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A small chat-like trace."""
    path = tmp_path / "trace.csv"
    rows = "".join(f"{0.1 * i:.1f},{150 + 61 * (i % 40)},{5 + i % 30}\n" for i in range(200))
    path.write_text("t_s,input_tokens,output_tokens\n" + rows)
    return path


def test_capacity_command(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints a table and writes raw results from which it can be repeated."""
    out = tmp_path / "results" / "out.json"
    capacity.main(
        [
            *("--trace", str(trace), "--instances", "2", "--requests", "150", "--seeds", "2"),
            *("--policies", "vllm-512-rr,unified", "--overload", "1.2", "--out", str(out)),
        ]
    )
    table = capsys.readouterr().out
    results = json.loads(out.read_text())
    assert "unified" in table
    assert "longest tenth" in table
    assert {(r["policy"], r["seed"]) for r in results["results"]} == {
        (name, seed) for name in ("vllm-512-rr", "unified") for seed in (1, 2)
    }
    assert all(0 < r["capacity_rps"]["0.99"] <= r["capacity_rps"]["0.9"] for r in results["results"])
    assert results["options"]["slo"] == "1000/100"
    assert len(results["overload"]) == 4


def test_simulate_command(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run gives a summary, a report and a picture."""
    out, picture = tmp_path / "run.json", tmp_path / "run.png"
    simulate.main(
        [
            *("--trace", str(trace), "--instances", "2", "--requests", "100", "--rate", "5", "--slo", "C"),
            *("--policy", "ascendra", "--out", str(out), "--plot", str(picture)),
        ]
    )
    assert "joint attainment" in capsys.readouterr().out
    assert json.loads(out.read_text())["report"]["requests"] == 80
    assert picture.stat().st_size > 1000


def test_plan_command(trace: Path, tmp_path: Path) -> None:
    """More load needs more GPUs, and the plan meets its target."""
    plans = []
    for rate in ("5", "40"):
        out = tmp_path / f"{rate}.json"
        plan.main(
            [
                *("--trace", str(trace), "--requests", "150", "--rate", rate, "--seeds", "1", "--target", "0.95"),
                *("--out", str(out)),
            ]
        )
        plans.append(json.loads(out.read_text())["plan"])
    assert all(found["joint"] >= 0.95 for found in plans)
    assert plans[0]["instances"] < plans[1]["instances"]


@pytest.mark.parametrize(
    "options", [["--policies", "nobody"], ["--slo", "fast"], ["--arrivals", "uniform"], ["--trace", "/nowhere.csv"]]
)
def test_bad_options_end_with_a_message(options: list[str], trace: Path) -> None:
    """A wrong name is an error, not a traceback or a default."""
    with pytest.raises(SystemExit) as ended:
        capacity.main(["--trace", str(trace), *options])
    assert "error" in str(ended.value.code)
