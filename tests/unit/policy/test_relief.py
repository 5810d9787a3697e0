"""When running streams leave an instance that breaks their cadence."""

from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.policy.relief import Cadence, Relief, ReliefLedger, ReliefPolicy, RunningStream, best_relief
from services.policy.state import InstanceView, Role
from services.policy.step_time import A100_LLAMA3_8B, StepTimeBin, StepTimeModel
from services.policy.token_budget import BudgetPolicy
from tests.unit.policy.strategies import models, requests

POLICY = ReliefPolicy()
SLOW = StepTimeModel((StepTimeBin(0, a0=0.2),))
budgets = st.builds(BudgetPolicy, kind=st.sampled_from(["static", "dynamic"]))
streams = st.lists(
    st.builds(
        RunningStream,
        request_id=st.uuids().map(str),
        tbt_s=st.sampled_from([0.02, 0.05, 0.1, 0.2]),
        context_tokens=st.integers(1, 8000),
        left_tokens=st.integers(0, 1000),
        settled_s=st.floats(0, 20),
        hops=st.integers(0, 3),
    ),
    max_size=12,
)


@st.composite
def cadences(draw: st.DrawFn, worker_id: str = "home") -> Cadence:
    """Draw an instance."""
    decodes = draw(st.integers(0, 64))
    view = InstanceView(
        worker_id=worker_id,
        role=draw(st.sampled_from(list(Role))),
        model=draw(models),
        queue=draw(requests(max_size=4)),
        decodes=decodes,
        decode_context_tokens=decodes * draw(st.integers(1, 3000)),
        min_tbt_s=draw(st.sampled_from([0.05, 0.1, 0.2])) if decodes else 0.0,
        kv_used_tokens=draw(st.integers(0, 100_000)),
        kv_capacity_tokens=draw(st.sampled_from([0, 100_000])),
        max_num_seqs=draw(st.integers(1, 128)),
        hop_s=draw(st.floats(0, 0.1)),
        draining=draw(st.booleans()),
    )
    return Cadence(view, draw(budgets), draw(st.sampled_from([0.0, 0.01, 0.15])))


def instance(model: StepTimeModel = A100_LLAMA3_8B, worker_id: str = "target", **fields: Any) -> Cadence:
    """Return an instance that does nothing unless told otherwise."""
    return Cadence(InstanceView(worker_id=worker_id, role=Role.LOW, model=model, **fields), BudgetPolicy())


def stream(**fields: Any) -> RunningStream:
    """Return a stream with much to come."""
    defaults: dict[str, Any] = {
        "request_id": "r",
        "tbt_s": 0.1,
        "context_tokens": 500,
        "left_tokens": 400,
        "settled_s": 0.0,
    }
    return RunningStream(**defaults | fields)


def reason_to_stay(home: Cadence, one: RunningStream, *targets: Cadence, policy: ReliefPolicy = POLICY) -> str:
    """Return why a single stream at risk stays."""
    relief, stay = best_relief(home, [one], targets, 100.0, policy)
    assert relief is None
    return next(iter(stay), "")


@given(cadences(), streams, cadences("a"), cadences("b"), st.floats(0, 30))
def test_a_move_is_worth_it_and_harms_nobody(
    home: Cadence, running: list[RunningStream], one: Cadence, other: Cadence, now_s: float
) -> None:
    """Whoever moves was at risk, may move, goes where everybody's gaps hold, and gains more than it pays."""
    relief, stay = best_relief(home, running, [one, other], now_s, POLICY)
    at_risk = [s for s in running if home.gap_s() > s.tbt_s and home.bears_out(s.tbt_s, POLICY)]
    assert stay.total() <= len(at_risk)
    if relief is None:
        assert stay.total() == len(at_risk)
        return
    moved = next(s for s in at_risk if s.request_id == relief.request_id)
    target = one if relief.target == "a" else other
    assert moved.hops < POLICY.hop_limit
    assert now_s - moved.settled_s >= POLICY.settle_s
    assert not target.view.draining
    assert target.view.decodes + len(target.view.queue) < target.view.max_num_seqs
    tightest_s = min(moved.tbt_s, target.view.min_tbt_s or 1e9)
    assert relief.target_gap_s == target.gap_with_s(moved) <= POLICY.hold_share * tightest_s
    assert relief.gain_s >= POLICY.gain_ratio * relief.cost_s
    assert relief.gain_s <= (home.gap_s() - moved.tbt_s) * POLICY.horizon_tokens


@given(cadences(), streams, cadences("a"))
def test_moves_end(home: Cadence, running: list[RunningStream], target: Cadence) -> None:
    """Taking streams away never makes the gaps of those that stay longer in a model that grows with its load."""
    before_s = home.gap_s()
    for one in running:
        home = home.without(one)
        if not home.view.model.problems() and not home.view.queue and len(home.view.model.bins) == 1:
            assert home.gap_s() <= before_s + 1e-9
        before_s = home.gap_s()


def test_a_stream_leaves_a_slow_worker_for_one_that_holds_it() -> None:
    """The reason names the numbers."""
    relief, _ = best_relief(instance(SLOW, "home", decodes=4, min_tbt_s=0.1), [stream()], [instance()], 100.0, POLICY)
    assert relief is not None
    assert relief.target == "target"
    assert "gaps of 214 ms break its objective here" in relief.reason


def test_a_prediction_that_steps_do_not_bear_out_moves_nobody() -> None:
    """Predicted are 214 ms: with steps of 90 ms nobody moves, of 96 ms or unknown ones somebody does."""
    for observed_s, moves in ((0.09, False), (0.096, True), (0.0, True)):
        home = replace(instance(SLOW, "home", decodes=4, min_tbt_s=0.1), observed_gap_s=observed_s)
        relief, stay = best_relief(home, [stream()], [instance()], 100.0, POLICY)
        assert (relief is not None) is moves
        assert not stay  # whoever is not at risk needs no reason


def test_reasons_to_stay() -> None:
    """Each margin has its own reason; a stream that is not at risk needs none."""
    slow = instance(SLOW, "home", decodes=4, min_tbt_s=0.1)
    assert reason_to_stay(slow, stream(tbt_s=0.5), instance()) == ""
    assert reason_to_stay(slow, stream(hops=2), instance()) == "hop_limit"
    assert reason_to_stay(slow, stream(settled_s=99.0), instance()) == "settling"
    assert reason_to_stay(slow, stream(left_tokens=1, context_tokens=7000), instance()) == "costs_more_than_it_gains"
    for unfit in (
        instance(SLOW),
        instance(draining=True),
        instance(max_num_seqs=3, decodes=3, min_tbt_s=0.1),
        instance(kv_capacity_tokens=1000, kv_used_tokens=600),
        instance(decodes=1, min_tbt_s=0.015),
    ):
        assert reason_to_stay(slow, stream(), unfit) == "no_target_holds_it"
    observed = Cadence(instance().view, BudgetPolicy(), observed_gap_s=0.3)
    assert reason_to_stay(slow, stream(), observed) == "no_target_holds_it"
    relief, _ = best_relief(Cadence(slow.view, BudgetPolicy(), 0.3), [stream()], [instance()], 100.0, POLICY)
    assert relief is not None
    assert relief.gap_s == 0.3


def test_the_cheapest_way_is_taken() -> None:
    """Of equal gains the stream with the shortest context goes, and to the emptier target."""
    slow = instance(SLOW, "home", decodes=4, min_tbt_s=0.1)
    busy = instance(worker_id="busy", decodes=40, decode_context_tokens=40_000, min_tbt_s=0.1)
    both = [stream(request_id="long", context_tokens=7000), stream(request_id="short")]
    relief, _ = best_relief(slow, both, [busy, instance()], 100.0, POLICY)
    assert isinstance(relief, Relief)
    assert (relief.request_id, relief.target) == ("short", "target")


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=60), st.floats(0.1, 10), st.integers(1, 8))
def test_never_a_storm(asked: list[tuple[float, bool]], rate: float, burst: int) -> None:
    """In any stretch of time at most burst + rate x time moves are made."""
    ledger = ReliefLedger(ReliefPolicy(moves_per_s=rate, burst=burst))
    now_s = 100.0
    taken = []
    for pause_s, many in asked:
        now_s += pause_s
        for _ in range(5 if many else 1):
            if ledger.take(now_s):
                taken.append(now_s)
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + rate * (taken[last] - taken[first]) + 1e-6


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=40))
def test_only_what_lasts_counts(seen: list[tuple[float, bool]]) -> None:
    """A cadence breaks when every look at it for sustain_s has said so."""
    ledger = ReliefLedger(POLICY)
    now_s, since_s = 0.0, None
    for pause_s, breaks in seen:
        now_s += pause_s
        since_s = (now_s if since_s is None else since_s) if breaks else None
        expected = since_s is not None and now_s - since_s >= POLICY.sustain_s
        assert ledger.breaking("w", breaks, now_s) == expected
    ledger.forget([])
    assert not ledger.breaking("w", True, now_s)
