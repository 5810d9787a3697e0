"""Reading token arrivals against the metronome's steps."""

import numpy as np
import pytest

from bench.overhead.latency import token_latencies_s, window

STEP_S = 1 / 30


@pytest.mark.parametrize("latency_s", [0.0002, 0.001, 0.02])
@pytest.mark.parametrize("first_step", [0, 7, 40])
def test_latency_is_found_whatever_step_a_stream_starts_at(latency_s: float, first_step: int) -> None:
    """Token k is read against step j + k of its own stream, with the machine's jitter on both sides."""
    rng = np.random.default_rng(1)
    steps = np.arange(200) * STEP_S + rng.exponential(0.0003, 200)
    times = steps[first_step : first_step + 100] + latency_s + rng.exponential(0.0005, 100)
    measured = token_latencies_s(times, steps)
    assert len(measured) == 100
    assert float(np.median(measured)) == pytest.approx(latency_s + 0.00035, abs=0.0004)


def test_a_burst_of_late_tokens_shows_as_latency() -> None:
    """A stall of several steps is not hidden by reading its tokens against later steps."""
    steps = np.arange(100) * STEP_S
    times = steps[:60] + 0.001
    times[30:35] = times[35]
    assert float(np.max(token_latencies_s(times, steps))) == pytest.approx(5 * STEP_S + 0.001, abs=1e-6)


def test_a_window_is_half_open() -> None:
    """Arrivals at its end belong to the next one."""
    assert window(np.array([0.0, 1.0, 2.0]), 0.0, 2.0).tolist() == [0.0, 1.0]
