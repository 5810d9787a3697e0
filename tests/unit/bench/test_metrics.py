"""Metrics on hand-made records."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.metrics import Outcome, RequestRecord, attains, meets_tbt, percentile, summarize


def record(
    *,
    arrival_s: float = 0.0,
    ttft_s: float = 0.5,
    gaps_s: list[float] | None = None,
    prompt: int = 100,
    outcome: Outcome = Outcome.FINISHED,
    slo_class: str = "",
) -> RequestRecord:
    """A request with an objective of 1 s / 100 ms."""
    times = []
    if math.isfinite(ttft_s):
        times = [arrival_s + ttft_s]
        for gap_s in gaps_s if gaps_s is not None else [0.05] * 9:
            times.append(times[-1] + gap_s)
    return RequestRecord(
        request_id="r",
        arrival_s=arrival_s,
        prompt_tokens=prompt,
        ttft_slo_s=1.0,
        tbt_slo_s=0.1,
        outcome=outcome,
        token_times_s=times,
        slo_class=slo_class,
    )


@given(st.lists(st.floats(0, 10), min_size=1, max_size=200), st.floats(0, 1))
def test_percentile_equals_numpy(values: list[float], q: float) -> None:
    """Percentiles interpolate as numpy's default does."""
    assert percentile(sorted(values), q) == pytest.approx(float(np.percentile(values, 100 * q)), abs=1e-9)


def test_attains_needs_ttft_and_tail_gap() -> None:
    """A late first token or a long own p99 gap each lose the request."""
    assert attains(record())
    assert not attains(record(ttft_s=1.5))
    assert not attains(record(gaps_s=[0.05] * 9 + [0.5]))


def test_one_long_gap_in_hundreds_is_tolerated() -> None:
    """The gap objective is on the request's own 99th percentile, not on its worst gap."""
    assert meets_tbt(record(gaps_s=[0.05] * 299 + [5.0]))


def test_a_single_token_has_no_gap_to_miss() -> None:
    """A request of one token attains by its TTFT alone."""
    assert attains(record(gaps_s=[]))


@pytest.mark.parametrize("outcome", [Outcome.REFUSED, Outcome.FAILED, Outcome.UNFINISHED])
def test_not_finished_stays_in_the_denominator(outcome: Outcome) -> None:
    """Refused, failed and unfinished requests count as missed."""
    lost = record(arrival_s=1.0, ttft_s=math.inf, outcome=outcome)
    report = summarize([record(), lost])
    assert report.joint == 0.5
    assert report.ttft_only == 0.5
    assert report.tbt_only == 0.5
    assert report.mean_gap == 0.5


def test_a_cut_stream_is_not_attained() -> None:
    """Good latencies of a request that did not finish do not count."""
    assert summarize([record(outcome=Outcome.UNFINISHED)]).joint == 0


def test_mean_gap_variant_forgives_stalls() -> None:
    """A stall breaks the joint metric and not the mean-gap one; the pooled p99 sits between."""
    report = summarize([record(gaps_s=[0.01] * 50 + [1.0])])
    assert report.joint == 0
    assert report.mean_gap == 1
    assert report.pooled_gap_p50_s == pytest.approx(0.01)


def test_goodput_counts_attaining_requests_and_their_tokens() -> None:
    """Rates are per second between the first and the last arrival."""
    records = [record(arrival_s=float(i), prompt=90) for i in range(11)]
    records[3] = record(arrival_s=3.0, ttft_s=2.0)
    report = summarize(records)
    assert report.goodput_rps == pytest.approx(1.0)
    assert report.goodput_tokens_per_s == pytest.approx(100.0)


def test_deciles_follow_prompt_length() -> None:
    """The longest tenth is last."""
    records = [record(prompt=length, ttft_s=0.1 if length <= 90 else 3.0) for length in range(1, 101)]
    assert summarize(records).joint_by_prompt_decile == (1.0,) * 9 + (0.0,)


def test_classes_are_reported_apart() -> None:
    """Each SLO class has its own attainment."""
    records = [record(slo_class="a"), record(slo_class="b", ttft_s=2.0), record(slo_class="b")]
    assert summarize(records).joint_by_class == {"a": 1.0, "b": 0.5}


def test_longest_wait_counts_those_that_never_began() -> None:
    """A request without a first token has waited until the run ended."""
    lost = record(arrival_s=2.0, ttft_s=math.inf, outcome=Outcome.UNFINISHED)
    assert summarize([record(), lost], end_s=32.0).longest_wait_s == pytest.approx(30.0)


def test_summary_of_nothing_is_an_error() -> None:
    """There is no attainment without requests."""
    with pytest.raises(ValueError, match="no records"):
        summarize([])
