"""When instances are given up for silence or standstill."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.policy.liveness import RecentMaximum, SilenceDetector, stall_limit_s

HEARTBEAT_S, SILENCE_S = 0.25, 0.9


def test_a_punctual_instance_is_given_up_after_the_silence_asked_for() -> None:
    """Heartbeats on time: 0.9 s, and not before."""
    detector = SilenceDetector(SILENCE_S, HEARTBEAT_S, 0.0)
    for beat in range(100):
        detector.heard(beat * HEARTBEAT_S)
    last_s = 99 * HEARTBEAT_S
    assert not detector.silent(last_s + SILENCE_S)
    assert detector.silent(last_s + SILENCE_S + 1e-6)


def test_fewer_than_three_heartbeats_are_no_silence() -> None:
    """A limit below what heartbeats can show is raised."""
    detector = SilenceDetector(0.1, HEARTBEAT_S, 0.0)
    assert not detector.silent(0.75)
    assert detector.silent(0.76)


@given(st.lists(st.floats(0, 3), max_size=80))
def test_lateness_is_allowed_for_within_bounds(gaps_s: list[float]) -> None:
    """The limit is never below what was asked for nor above four times that, and covers what is usual."""
    detector = SilenceDetector(SILENCE_S, HEARTBEAT_S, 0.0)
    now_s = 0.0
    for gap_s in gaps_s:
        now_s += gap_s
        detector.heard(now_s)
        assert SILENCE_S <= detector.limit_s(now_s) <= 4 * SILENCE_S
        assert detector.limit_s(now_s) >= min(SILENCE_S + 2 * (gap_s - HEARTBEAT_S), 4 * SILENCE_S) - 1e-9
    for beat in range(1, 200):  # punctual again for long
        detector.heard(now_s + beat * HEARTBEAT_S)
    assert detector.limit_s(now_s + 199 * HEARTBEAT_S) == pytest.approx(SILENCE_S)


@given(st.lists(st.tuples(st.floats(0, 40), st.floats(0, 10)), min_size=1, max_size=60))
def test_the_recent_maximum_forgets(seen: list[tuple[float, float]]) -> None:
    """It holds everything of the last 15 s and nothing older than 45 s."""
    recent = RecentMaximum()
    now_s = 0.0
    values: list[tuple[float, float]] = []
    for pause_s, value in seen:
        now_s += pause_s
        recent.observe(value, now_s)
        values.append((now_s, value))
        kept = recent.value(now_s)
        assert kept >= max(v for t, v in values if now_s - t < 15)
        assert kept <= max(v for t, v in values if now_s - t <= 45)


@given(st.floats(0.1, 5), st.integers(0, 100), st.floats(0, 10), st.floats(0, 10))
def test_a_step_in_progress_is_no_stall(stall_s: float, steps: int, predicted_s: float, longest_s: float) -> None:
    """The limit is beyond what a step may take; unknown engines get the longer time."""
    limit_s = stall_limit_s(stall_s, 15.0, steps, predicted_s, longest_s)
    assert limit_s >= stall_s
    if steps < 32:
        assert limit_s == 15.0
    else:
        assert limit_s == max(stall_s, 4 * predicted_s, 4 * longest_s)
