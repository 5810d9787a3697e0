"""Quotas: what is let through over any span of time is bounded, and a refusal says truly when to come again."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.policy.quotas import Limit, Quota, TenantUse

QUOTAS = st.builds(
    Quota,
    requests_per_s=st.sampled_from([0.0, 0.5, 3.0, 100.0]),
    burst_requests=st.integers(0, 5),
    concurrent_requests=st.integers(0, 4),
    tokens_per_min=st.sampled_from([0, 60, 600, 6000]),
)
EVENTS = st.lists(
    st.tuples(st.floats(0.0, 5.0), st.integers(1, 900), st.floats(0.0, 1.0), st.booleans()), min_size=1, max_size=60
)
"""(pause before the request, tokens reserved, share of them used, whether an older request ends first)."""


@given(QUOTAS, EVENTS)
def test_every_span_is_within_the_limits(quota: Quota, events: list[tuple[float, int, float, bool]]) -> None:
    """Requests and tokens let through between any two moments stay below burst plus rate times time."""
    use, now_s = TenantUse(quota, 0.0), 0.0
    inside: list[tuple[int, int, float]] = []
    entered: list[tuple[float, int]] = []
    for pause_s, reserved, share, one_ends in events:
        now_s += pause_s
        if one_ends and inside:
            kept, unused, _ = inside.pop(0)
            use.leave(unused, now_s)
        if use.enter(now_s) is not None:
            continue
        if use.reserve(reserved, now_s) is not None:
            use.leave(0, now_s)
            entered.append((now_s, 0))
            continue
        kept = round(reserved * share)
        inside.append((kept, reserved - kept, now_s))
        entered.append((now_s, kept))
        assert not quota.concurrent_requests or use.live <= quota.concurrent_requests
        assert use.live == len(inside)
    burst = quota.burst_requests or max(1.0, quota.requests_per_s)
    for first in range(len(entered)):
        tokens = 0
        for last in range(first, len(entered)):
            span_s = entered[last][0] - entered[first][0]
            tokens += entered[last][1]
            if quota.requests_per_s:
                assert last - first + 1 <= burst + quota.requests_per_s * span_s + 1e-6
            if quota.tokens_per_min:
                assert tokens <= quota.tokens_per_min * (1 + span_s / 60) + 1e-6


@given(QUOTAS, EVENTS)
def test_waiting_as_told_is_enough(quota: Quota, events: list[tuple[float, int, float, bool]]) -> None:
    """A refused request is let in after the wait it was told, when nothing else comes; never means never."""
    use, now_s = TenantUse(quota, 0.0), 0.0
    for pause_s, tokens, _, _ in events:
        now_s += pause_s
        refusal = use.enter(now_s)
        if refusal is not None and refusal.limit is Limit.REQUESTS:
            assert refusal.retry_after_s > 0
            now_s += refusal.retry_after_s + 1e-6
            refusal = use.enter(now_s)
        if refusal is not None:
            assert refusal.limit is Limit.CONCURRENCY
            assert use.live == quota.concurrent_requests
            use.leave(0, now_s)
            continue
        refusal = use.reserve(tokens, now_s)
        if refusal is not None and refusal.limit is Limit.TOO_LARGE:
            assert tokens > quota.tokens_per_min
            assert math.isinf(refusal.retry_after_s)
        elif refusal is not None:
            now_s += refusal.retry_after_s + 1e-6
            assert use.reserve(tokens, now_s) is None


@given(QUOTAS, st.lists(st.tuples(st.integers(1, 60), st.floats(0.0, 0.1)), max_size=20))
def test_what_is_given_back_was_never_used(quota: Quota, uses: list[tuple[int, float]]) -> None:
    """Requests that use nothing of their reservation leave no trace, and nobody gets more than the capacity."""
    use, now_s = TenantUse(quota, 0.0), 0.0
    for tokens, pause_s in uses:
        now_s += pause_s
        if use.enter(now_s) is None:
            refusal = use.reserve(tokens, now_s)
            use.leave(0 if refusal else tokens, now_s)
            assert refusal is None
    assert use.live == 0
    assert use.forgettable(now_s + 3600)
    assert use.enter(now_s + 3600) is None
    if quota.tokens_per_min:
        assert use.reserve(quota.tokens_per_min + 1, now_s + 3600)
        assert use.reserve(quota.tokens_per_min, now_s + 3600) is None


def test_no_limits_let_everything_through() -> None:
    """Zero means none."""
    use = TenantUse(Quota(), 0.0)
    assert Quota().unlimited
    assert all(use.enter(0.0) is None and use.reserve(10**9, 0.0) is None for _ in range(1000))


@pytest.mark.parametrize("field", ["requests_per_s", "burst_requests", "concurrent_requests", "tokens_per_min"])
def test_nonsense_is_refused(field: str) -> None:
    """Negative and infinite limits are mistakes."""
    for value in (-1, math.inf, math.nan):
        with pytest.raises(ValueError, match=field.replace("_", "-")):
            Quota(**{field: value})  # type: ignore[arg-type]
