"""What a machine adds to a live run: measured from logs, kept as a distribution, and drawn from it again."""

import json
import random
import statistics
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.live.lateness import Lateness, first_step, lateness, read_steps
from bench.metrics import Outcome, RequestRecord
from bench.simulator.scatter import SCORES, Scatter, ScatterWalk
from services.policy.step_time import A100_LLAMA3_8B, StepShape


def walked(correlation: float, count: int) -> list[float]:
    """Return times of 10 ms on average that scatter by 2 ms."""
    walk = ScatterWalk(Scatter(tuple(0.010 + 0.002 * score for score in SCORES), correlation), random.Random(3))
    return [walk.next() for _ in range(count)]


@pytest.mark.parametrize("correlation", [0.0, 0.7, -0.4])
def test_a_scatter_is_that_of_the_times_it_was_made_from(correlation: float) -> None:
    """Quantiles and correlation survive; drawn again, mean, spread and neighbours are as they were."""
    scatter = Scatter.of([walked(correlation, 20_000)])
    assert scatter.at(0.0) == pytest.approx(0.010, abs=0.0002)
    assert scatter.at(1.0) == pytest.approx(0.012, abs=0.0002)
    assert scatter.at(-1.1) == pytest.approx(0.0078, abs=0.0002)
    assert scatter.correlation == pytest.approx(correlation, abs=0.03)
    walk = ScatterWalk(scatter, random.Random(4))
    drawn = np.array([walk.next() for _ in range(20_000)])
    assert drawn.mean() == pytest.approx(0.010, abs=0.0002)
    assert drawn.std() == pytest.approx(0.002, rel=0.05)
    assert np.corrcoef(drawn[1:], drawn[:-1])[0, 1] == pytest.approx(correlation, abs=0.03)


def test_nothing_is_drawn_beyond_what_was_seen() -> None:
    """The outermost quantiles are the limits; equal times have no correlation; too few times are refused."""
    scatter = Scatter.of([[0.001 * (place % 50) for place in range(1000)]])
    assert 0 <= scatter.at(-9) <= scatter.at(9) <= 0.049
    assert Scatter.of([[0.005] * 100]).correlation == 0
    with pytest.raises(ValueError, match="too few"):
        Scatter.of([[0.1] * 10, [0.2] * 10])
    with pytest.raises(ValueError, match="quantiles"):
        Scatter((0.1, 0.2))
    with pytest.raises(ValueError, match="correlation"):
        Scatter((0.0,) * len(SCORES), 1.0)


@given(
    st.lists(st.floats(0.01, 0.1), min_size=30, max_size=60),
    st.integers(0, 10),
    st.lists(st.floats(0, 0.3), min_size=5, max_size=20),
    st.integers(0, 4),
)
def test_tokens_find_their_steps(steps_s: list[float], first: int, delays_s: list[float], prompt: int) -> None:
    """However late they come, if one of them comes before the next step's end, tokens are put down to their steps."""
    ends_s = np.cumsum(steps_s)
    delays_s[prompt] = 0.005
    times_s = np.maximum.accumulate(ends_s[first : first + len(delays_s)] + delays_s)
    made = first + prompt
    if times_s[prompt] < ends_s[made + 1]:  # nothing before it held it back for longer
        assert first_step(ends_s, times_s) == first


def test_tokens_that_no_steps_explain_are_left_out() -> None:
    """More tokens than steps, or tokens before any step."""
    assert first_step(np.array([1.0, 2.0]), np.array([1.5, 2.5, 3.5])) is None
    assert first_step(np.array([1.0, 2.0, 3.0]), np.array([0.5, 2.5])) is None


def test_logs_and_arrivals_are_compared(tmp_path: Path) -> None:
    """Steps 2 ms and 5 ms over the profile, tokens 7 ms on their way: that is what comes out, and survives a file."""
    rng = random.Random(5)
    log = tmp_path / "w0.jsonl"
    ends_s, now_s = [], 100.0
    with log.open("w") as file:
        for number in range(400):
            prefill = 300 if number % 4 == 0 else 0
            shape = StepShape(prefill, 8, 8000, 0)
            step_s = A100_LLAMA3_8B.step_s(shape) + (0.005 if prefill else 0.002) + rng.gauss(0, 1e-4)
            now_s += step_s
            ends_s.append(now_s)
            row = {"ended_s": now_s, "step": number + 1, "step_s": step_s, "prefill_tokens": prefill, "decodes": 8}
            row |= {"decode_context_tokens": 8000, "prefill_context_products": 0}
            file.write(json.dumps(row) + "\n")
        file.write('{"ended_s": 1')
    assert len(read_steps(log)) == 400
    records = [
        RequestRecord(
            request_id=f"r{place}",
            arrival_s=ends_s[place] - 0.1,
            prompt_tokens=100,
            ttft_slo_s=1.0,
            tbt_slo_s=0.1,
            outcome=Outcome.FINISHED,
            token_times_s=[end_s + 0.007 + rng.gauss(0, 1e-4) for end_s in ends_s[place : place + 50]],
        )
        for place in range(0, 300, 10)
    ]
    homes = {record.request_id: "w0" for record in records[:-1]}  # of the last one it is not known
    found = lateness({"w0": log}, A100_LLAMA3_8B, records, homes)
    assert found.decode_excess.at(0) == pytest.approx(0.002, abs=2e-4)
    assert found.prefill_excess.at(0) == pytest.approx(0.005, abs=2e-4)
    assert found.delivery.at(0) == pytest.approx(0.007, abs=2e-4)
    assert statistics.pstdev(found.delivery.quantiles_s) < 0.001
    assert Lateness.from_dict(json.loads(json.dumps(found.as_dict()))) == found
