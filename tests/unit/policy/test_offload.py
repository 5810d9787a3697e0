"""The offload rule."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.policy.offload import OffloadAction, OffloadCandidate, OffloadPolicy, decide_offload, is_at_risk
from services.policy.prefill import TtftEstimate
from services.policy.state import QueuedRequest, Slo

POLICY = OffloadPolicy(caution=1.0)


def estimate(seconds: float) -> TtftEstimate:
    """Return an estimate of so many seconds, all of them wait."""
    return TtftEstimate(seconds, seconds, 0.0)


def waiting(**changes: object) -> QueuedRequest:
    """Return a request that arrived at 0 with 1 s to its first token."""
    values: dict[str, object] = {
        "request_id": "r",
        "arrival_s": 0.0,
        "prompt_tokens": 100,
        "slo": Slo(ttft_s=1.0, tbt_s=0.1),
    }
    return QueuedRequest(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("home_s", "away_s", "now_s", "changes", "action", "reason"),
    [
        (0.3, 0.1, 0.0, {}, OffloadAction.STAY, "makes its objective here"),
        (2.0, 0.1, 0.0, {}, OffloadAction.OFFLOAD, "would miss here and makes it there"),
        (0.98, 0.1, 0.0, {}, OffloadAction.OFFLOAD, "would miss here and makes it there"),
        (2.0, 1.5, 0.0, {}, OffloadAction.RELEGATE, "no instance makes its objective"),
        (2.0, 1.5, 0.0, {"relegated": True}, OffloadAction.RELEGATE, "no instance makes its objective"),
        (0.98, 1.5, 0.0, {}, OffloadAction.STAY, "at risk here, not safe elsewhere"),
        (2.0, 0.1, 0.0, {"hops": 1}, OffloadAction.STAY, "hop limit reached"),
        (2.0, 0.1, 0.0, {"started": True}, OffloadAction.STAY, "its prefill has started"),
        (0.98, 0.97, 0.0, {}, OffloadAction.STAY, "a move would gain too little"),
        (0.2, 0.1, 0.85, {}, OffloadAction.OFFLOAD, "would miss here and makes it there"),
    ],
)
def test_rule(
    home_s: float, away_s: float, now_s: float, changes: dict[str, object], action: OffloadAction, reason: str
) -> None:
    """Each branch of the rule, with its reason."""
    decision = decide_offload(
        waiting(**changes), estimate(home_s), [OffloadCandidate("hp", estimate(away_s))], now_s, 0.01, POLICY
    )
    assert (decision.action, decision.reason) == (action, reason)
    assert (decision.target == "hp") == (action is OffloadAction.OFFLOAD)


def test_without_candidates_a_hopeless_request_is_relegated() -> None:
    """Nowhere to go: it is given up only once it misses."""
    miss = decide_offload(waiting(), estimate(2.0), [], 0.0, 0.01, POLICY)
    fine = decide_offload(waiting(), estimate(0.5), [], 0.0, 0.01, POLICY)
    assert (miss.action, fine.action) == (OffloadAction.RELEGATE, OffloadAction.STAY)
    assert miss.need_hp_s == math.inf


def test_a_recent_decision_settles_first() -> None:
    """Right after a placement or move nothing happens; a little later it does."""
    arguments = (waiting(), estimate(2.0), [OffloadCandidate("hp", estimate(0.1))])
    early = decide_offload(*arguments, 0.05, 0.01, POLICY, last_decision_s=0.0)
    late = decide_offload(*arguments, 0.15, 0.01, POLICY, last_decision_s=0.0)
    assert (early.reason, late.action) == ("decided a moment ago", OffloadAction.OFFLOAD)


@given(
    st.floats(0, 5),
    st.lists(st.floats(0, 5), max_size=4),
    st.floats(0, 3),
    st.floats(0.005, 0.2),
    st.floats(1.0, 2.0),
)
def test_never_spends_hp_on_what_it_cannot_save(
    home_s: float, away_s: list[float], now_s: float, step_s: float, caution: float
) -> None:
    """Whatever the numbers, an offload goes to the quickest instance, makes the deadline there and gains time."""
    policy = OffloadPolicy(caution=caution)
    candidates = [OffloadCandidate(f"hp{i}", estimate(s)) for i, s in enumerate(away_s)]
    decision = decide_offload(waiting(), estimate(home_s), candidates, now_s, step_s, policy)
    if decision.action is OffloadAction.OFFLOAD:
        assert now_s + caution * min(away_s) <= 1.0
        assert decision.need_hp_s + policy.min_gain_s <= decision.need_lp_s + 1e-9
        assert decision.target == f"hp{away_s.index(min(away_s))}"
    if decision.action is OffloadAction.RELEGATE:
        assert now_s + caution * min([home_s, *away_s]) > 1.0


@given(
    home_s=st.floats(0, 3), away_s=st.floats(0, 3), now_s=st.floats(0, 2), step_s=st.floats(0, 0.2),
    relegated=st.booleans(),
)  # fmt: skip
def test_who_is_not_at_risk_stays(home_s: float, away_s: float, now_s: float, step_s: float, relegated: bool) -> None:
    """Asking for risk first spares the candidates and never changes the decision."""
    request = waiting(relegated=relegated)
    if not is_at_risk(request, estimate(home_s), now_s, step_s, 0.0, POLICY):
        there = [OffloadCandidate("there", estimate(away_s))]
        decision = decide_offload(request, estimate(home_s), there, now_s, step_s, POLICY)
        assert decision.action is OffloadAction.STAY
