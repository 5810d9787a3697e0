"""When a running request moves with its KV cache, and how its transfer time is learned."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.policy.kv_move import KvMovePolicy, MoveMethod, TransferTime, choose_method, transfer_bound_s

POLICY = KvMovePolicy(latency_s=0.05, bytes_per_s=1e9)
sizes = st.floats(0, 1e11)
seconds = st.floats(0, 100)


def test_prior_is_latency_and_bandwidth() -> None:
    """Before any move the prediction is the configured one."""
    time = TransferTime(POLICY)
    assert time.predict_s(0) == pytest.approx(0.05)
    assert time.predict_s(2e9) == pytest.approx(2.05)


def test_learns_latency_and_bandwidth() -> None:
    """Moves of several sizes teach both terms, within the weight that the prior keeps."""
    time = TransferTime(POLICY)
    for _ in range(40):
        for size in (1e8, 1e9, 4e9):
            time.observe(size, 0.01 + size / 10e9)
    assert time.predict_s(2e9) == pytest.approx(0.21, rel=0.15)


def test_follows_a_change() -> None:
    """A link that became slow is noticed within some moves of one size."""
    time = TransferTime(POLICY)
    for _ in range(30):
        time.observe(1e6, 0.03)
    assert time.predict_s(1e6) < 0.06
    for _ in range(30):
        time.observe(1e6, 0.5)
    assert time.predict_s(1e6) > 0.35


@given(st.lists(st.tuples(sizes, seconds), max_size=50), sizes, sizes)
def test_predictions_are_possible(moves: list[tuple[float, float]], one: float, other: float) -> None:
    """Whatever was observed, predictions are not negative and do not fall with size."""
    time = TransferTime(POLICY)
    for size, took_s in moves:
        time.observe(size, took_s)
    less, more = sorted((one, other))
    assert 0 <= time.predict_s(less) <= time.predict_s(more) + 1e-9


@given(st.integers(1, 1_000_000), st.integers(1, 1 << 20), st.floats(0, 1000))
def test_the_cheaper_way_is_chosen(tokens: int, bytes_per_token: int, replay_s: float) -> None:
    """By KV iff the transfer, with caution, is predicted below the replay; the reason names both."""
    choice = choose_method(tokens, bytes_per_token, TransferTime(POLICY), replay_s, POLICY)
    assert (choice.method is MoveMethod.KV) == (choice.kv_s * POLICY.caution < replay_s)
    assert choice.replay_s == replay_s
    assert "transfer" in choice.reason
    assert "replay" in choice.reason


def test_bound_grows_with_the_prediction() -> None:
    """A transfer that is expected to be long is given longer."""
    assert transfer_bound_s(0.1, POLICY) == pytest.approx(0.9)
    assert transfer_bound_s(5, POLICY) > transfer_bound_s(1, POLICY)


def test_nonsense_is_refused() -> None:
    """Priors and bounds are positive."""
    with pytest.raises(ValueError, match="bytes-per-s"):
        KvMovePolicy(bytes_per_s=0)
