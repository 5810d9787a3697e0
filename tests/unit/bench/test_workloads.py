"""Trace formats, arrival processes, SLO sets."""

import gzip
import statistics
from itertools import pairwise
from pathlib import Path

import pytest

from bench.workloads import TraceFormatError, TraceRow, load_trace, make_workload, slo_set

FORMATS = {
    "own.csv": "t_s,input_tokens,output_tokens\n0.0,100,10\n1.5,200,20\n",
    "azure.csv": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,100,10\n2023-11-16 18:17:05.4799600,200,20\n"
    ),
    "burst.csv": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,100,10,110,Conversation log\n6.5,GPT-4,200,20,220,API log\n"
    ),
    "mooncake.jsonl": (
        '{"timestamp":1000,"input_length":100,"output_length":10,"hash_ids":[0]}\n'
        '{"timestamp":2500,"input_length":200,"output_length":20,"hash_ids":[0,1]}\n'
    ),
}
TRACE = [TraceRow(float(i * i), 100 + i, 10 + i) for i in range(50)]


def unloaded(prompt_tokens: int) -> float:
    """One millisecond per token."""
    return prompt_tokens / 1e3


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_alike(name: str, zipped: bool, tmp_path: Path) -> None:
    """Each documented format gives seconds from the first request and both lengths, plain or gzipped."""
    path = tmp_path / (name + ".gz" * zipped)
    content = FORMATS[name].encode()
    path.write_bytes(gzip.compress(content) if zipped else content)
    rows = load_trace(path)
    assert [(row.prompt_tokens, row.output_tokens) for row in rows] == [(100, 10), (200, 20)]
    assert [row.time_s for row in rows] == pytest.approx([0.0, 1.5])


def test_mooncake_keeps_prefix_hashes(tmp_path: Path) -> None:
    """Shared prompt blocks stay recognisable."""
    path = tmp_path / "trace.jsonl"
    path.write_text(FORMATS["mooncake.jsonl"])
    assert [row.prefix_hashes for row in load_trace(path)] == [(0,), (0, 1)]


def test_lengths_only_has_no_times(tmp_path: Path) -> None:
    """A file of lengths serves Poisson arrivals and refuses to be replayed."""
    path = tmp_path / "lengths.csv"
    path.write_text("input_tokens,output_tokens\n100,10\n")
    rows = load_trace(path)
    assert rows == [TraceRow(None, 100, 10)]
    with pytest.raises(ValueError, match="no timestamps"):
        make_workload(rows, arrivals="trace", rate_rps=1, requests=1, classes=slo_set("A", unloaded), seed=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [("a,b,c\n1,2,3\n", "no known trace format"), ("input_tokens,output_tokens\n1,2\nx,3\n", "row 3"), ("", "line 1")],
)
def test_bad_files_are_named(content: str, message: str, tmp_path: Path) -> None:
    """An unknown header and a bad row say where they are."""
    path = tmp_path / "bad.csv"
    path.write_text(content)
    with pytest.raises(TraceFormatError, match=message):
        load_trace(path)


@pytest.mark.parametrize(("arrivals", "cv"), [("poisson", 1.0), ("gamma:3", 3.0)])
def test_arrival_processes_have_their_rate_and_cv(arrivals: str, cv: float) -> None:
    """Mean and coefficient of variation of the gaps are as asked."""
    workload = make_workload(
        TRACE, arrivals=arrivals, rate_rps=20, requests=20_000, classes=slo_set("A", unloaded), seed=3
    )
    times = [request.arrival_s for request in workload]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert statistics.fmean(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(cv, rel=0.1)


def test_own_timestamps_keep_their_shape() -> None:
    """The trace's times are stretched to the rate, and lengths stay with their times."""
    workload = make_workload(TRACE, arrivals="trace", rate_rps=5, requests=50, classes=slo_set("A", unloaded), seed=1)
    by_length = {row.prompt_tokens: row for row in TRACE}
    first = by_length[workload[0].prompt_tokens]
    stretch = (49 * 49 / 49) ** -1 / 5
    following = by_length[workload[1].prompt_tokens]
    assert first.time_s is not None
    assert following.time_s is not None
    if following.time_s > first.time_s:
        assert workload[1].arrival_s == pytest.approx((following.time_s - first.time_s) * stretch)
    assert [r.arrival_s for r in workload] == sorted(r.arrival_s for r in workload)
    assert {r.prompt_tokens for r in workload} == set(by_length)


@pytest.mark.parametrize("arrivals", ["poisson", "gamma:2", "trace"])
def test_seed_decides_everything(arrivals: str) -> None:
    """Equal seeds give equal workloads, others do not; another rate only stretches time."""

    def make(seed: int, rate: float = 4.0) -> list[tuple[float, int, str]]:
        workload = make_workload(
            TRACE, arrivals=arrivals, rate_rps=rate, requests=40, classes=slo_set("C", unloaded), seed=seed
        )
        return [(request.arrival_s, request.prompt_tokens, request.slo_class) for request in workload]

    assert make(1) == make(1)
    assert make(1) != make(2)
    for slow, fast in zip(make(1, 4.0), make(1, 8.0), strict=True):
        assert slow[0] == pytest.approx(2 * fast[0])
        assert slow[1:] == fast[1:]


def test_slo_sets() -> None:
    """The named sets are those of the docs, and uniform ones are parsed."""
    (uniform,) = slo_set("1000/100", unloaded)
    assert (uniform.slo_of(1).ttft_s, uniform.slo_of(1).tbt_s) == (1.0, 0.1)
    (scaled,) = slo_set("B", unloaded)
    assert scaled.slo_of(1000).ttft_s == pytest.approx(0.2 + 5 * 1.0)
    interactive, relaxed = slo_set("C", unloaded)
    assert (interactive.slo_of(1).tbt_s, relaxed.slo_of(1).ttft_s) == (0.05, 10.0)
    assert interactive.share == relaxed.share


@pytest.mark.parametrize("name", ["D", "100", "0/100", "a/b"])
def test_unknown_slo_sets_are_refused(name: str) -> None:
    """A misspelt objective never becomes a default."""
    with pytest.raises(ValueError, match="SLO set"):
        slo_set(name, unloaded)
