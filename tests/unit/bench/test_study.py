"""The bound, the study that resumes, and the tables that come of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import study
from bench.bound import least_work_s, most_kept, works_s
from bench.fidelity import marked, simulated_name
from bench.options import Setting, cluster_for
from bench.report_capacity import draw, goals, overview, workload_section
from bench.simulator.cluster import ClusterConfig
from bench.simulator.instance import StepTimeTruth
from bench.simulator.systems import simulate, system_named
from bench.workloads import TraceRow, make_workload, slo_set
from services.policy.step_time import A100_LLAMA3_8B

OVERHEAD_S = 0.0005


@pytest.mark.parametrize("name", ["unified", "ascendra", "vllm-256-work"])
def test_no_run_takes_less_engine_time_than_the_bound(name: str) -> None:
    """All requests finished: the instances were busy for at least the least work of all of them together."""
    trace = [TraceRow(None, 300 + 97 * (i % 40), 20 + 11 * (i % 30)) for i in range(200)]
    workload = make_workload(
        trace, arrivals="poisson", rate_rps=14.0, requests=250, classes=slo_set("1000/100", float), seed=1
    )
    truth = StepTimeTruth(model=A100_LLAMA3_8B, jitter_sigma=0.0, overhead_s=OVERHEAD_S)
    config = ClusterConfig(instances=2, truth=truth)
    run = simulate(system_named(name), workload, config)
    last_s = max(record.token_times_s[-1] for record in run.records)
    least_s = sum(
        least_work_s(item.prompt_tokens, item.output_tokens, A100_LLAMA3_8B, 0.1, OVERHEAD_S) for item in workload
    )
    # busy_share is until the last event, a report one hop after the last token.
    assert least_s <= run.busy_share * config.instances * (last_s + 0.01)


def test_what_is_cached_costs_the_bound_nothing() -> None:
    """A prompt of which all but a token came before costs no more than that token beside its context."""

    def work_s(cached: int) -> float:
        return least_work_s(8000, 1, A100_LLAMA3_8B, 0.1, OVERHEAD_S, cached)

    works = [work_s(cached) for cached in (0, 2000, 4000, 6000, 7999)]
    assert works == sorted(works, reverse=True)
    assert works[-1] < works[0] / 500
    trace = [TraceRow(float(turn), 512 * (turn + 1), 1, tuple(range(turn + 1))) for turn in range(8)]
    setting = Setting(trace, "trace", 8, slo_set("1000/100", float), cluster_for(trace, ClusterConfig()))
    workload = setting.workload(1.0, 1)
    cached, whole = works_s(setting, workload), works_s(replace(setting, cluster=ClusterConfig()), workload)
    assert cached[0] == pytest.approx(whole[0])
    longest = max(range(8), key=lambda place: workload[place].prompt_tokens)
    assert cached[longest] < 0.3 * whole[longest]
    assert all(least <= most for least, most in zip(cached, whole, strict=True))


@given(
    st.lists(st.tuples(st.floats(0.01, 1.0), st.integers(1, 9000)), min_size=10, max_size=60),
    st.floats(0, 20),
    st.floats(0, 1),
)
def test_more_engine_time_keeps_no_fewer(jobs: list[tuple[float, int]], available_s: float, longest: float) -> None:
    """Shares are shares, more time keeps at least as many, and what must be kept never adds to the total."""
    works, lengths = [work for work, _ in jobs], [length for _, length in jobs]
    total, tenth = most_kept(works, lengths, available_s)
    assert 0 <= total <= 1
    assert 0 <= tenth <= 1
    assert most_kept(works, lengths, available_s + 1)[0] >= total
    assert most_kept(works, lengths, sum(works) + 1e-6, longest)[0] == 1
    count = len(jobs) - round(0.9 * len(jobs))
    assert most_kept(works, lengths, available_s, longest)[1] >= round(longest * count) / count


def test_a_study_resumes_and_its_tables_name_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second call measures nothing again; the tables have a line for every system, and the plots are drawn."""
    name = "conv-poisson-1000-100"
    rows = "".join(f"{0.1 * i:.1f},{150 + 61 * (i % 40)},{5 + i % 30}\n" for i in range(200))
    (tmp_path / study.FILES["conv"]).write_text("t_s,input_tokens,output_tokens\n" + rows)
    monkeypatch.setitem(study.WORKLOADS, name, replace(study.WORKLOADS[name], requests=150))
    command = [
        *("--traces", str(tmp_path), "--workloads", name, "--seeds", "1", "--passes", "1", "--instances", "2"),
        *("--systems", "unified,vllm-512,ascendra-pool", "--out", str(tmp_path)),
    ]
    study.main(command)
    written = (tmp_path / f"capacity-{name}.json").read_text()
    capsys.readouterr()
    study.main(command)
    assert (tmp_path / f"capacity-{name}.json").read_text() == written
    assert capsys.readouterr().err == ""
    document = json.loads(written)
    measured = {r["policy"] for r in document["results"]}
    assert measured == {"unified", "vllm-512-work", "vllm-512-rr", "ascendra-pool"}
    section = workload_section(document)
    assert all(f"| {policy} | 1 |" in section for policy in measured)
    assert "| ascendra-pool | 1 |" in overview({name: document})
    assert f"({name})" in goals({name: document})
    draw({name: document}, tmp_path / "images")
    assert (tmp_path / "images" / "overload.png").stat().st_size > 1000


def test_live_and_simulated_are_compared_under_one_name() -> None:
    """Names of the live bench map onto the simulator's; what is more than 2 points or 10% off is marked."""
    assert simulated_name("vllm-least-512") == "vllm-512-least"
    assert simulated_name("ascendra-2hp") == "ascendra-2hp"
    assert [marked("joint", 0.97, model) for model in (0.989, 0.951, 0.991, 0.949)] == [
        "98.9%",
        "95.1%",
        "99.1% (!)",
        "94.9% (!)",
    ]
    assert marked("ttft_p50_s", 0.2, 0.181) == "0.181"
    assert marked("ttft_p90_s", 0.5, 0.551) == "0.551 (!)"
