"""The one order of waiting requests."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from services.policy.order import OrderPolicy, order_waiting
from services.policy.prefill import prefill_pace
from services.policy.relegation import RULES, RelegatedTurns
from services.policy.state import QueuedRequest, Slo
from services.policy.step_time import A100_LLAMA3_8B
from services.policy.token_budget import BudgetPolicy, DecodeLoad
from services.policy.value_functions import VALUE_FUNCTIONS
from tests.unit.policy.strategies import requests, seconds

PACE = prefill_pace(A100_LLAMA3_8B, DecodeLoad(30, 30_000), BudgetPolicy(), 0.1)
policies = st.builds(
    OrderPolicy,
    value_function=st.sampled_from(sorted(VALUE_FUNCTIONS)),
    relegation=st.sampled_from(RULES),
    pause_started=st.booleans(),
)


def waiting(name: str, tokens: int, arrival_s: float = 0.0, ttft_s: float = 2.0, **flags: Any) -> QueuedRequest:
    """Return a waiting request."""
    slo = Slo(ttft_s=ttft_s, tbt_s=0.1)
    return QueuedRequest(request_id=name, arrival_s=arrival_s, prompt_tokens=tokens, slo=slo, **flags)


def names(order: list[QueuedRequest]) -> list[str]:
    """Return the ids in order."""
    return [request.request_id for request in order]


@given(requests(), policies, seconds, st.floats(-1, 1))
def test_order_is_a_permutation_that_ignores_how_the_queue_was_held(
    queue: list[QueuedRequest], policy: OrderPolicy, now_s: float, credit_s: float
) -> None:
    """Nobody is lost or doubled, and the same requests in another arrangement come out the same."""
    order = order_waiting(queue, now_s, PACE, policy, credit_s)
    assert sorted(names(order.ordered)) == sorted(names(queue))
    again = order_waiting(list(reversed(queue)), now_s, PACE, policy, credit_s)
    assert names(order.ordered) == names(again.ordered)
    assert not {r.request_id for r in queue if r.relegated} & set(order.newly_relegated)


@given(requests(started=False), seconds)
def test_kept_requests_make_their_deadlines_in_edf_order(queue: list[QueuedRequest], now_s: float) -> None:
    """Under edf, whoever is neither relegated nor promoted is predicted to make it."""
    order = order_waiting(queue, now_s, PACE, OrderPolicy())
    gone = set(order.newly_relegated) | {r.request_id for r in queue if r.relegated}
    work_s = 0.0
    for request in order.ordered:
        if request.request_id in gone:
            break
        work_s += PACE.remaining_work_s(request)
        assert now_s + PACE.finish_s(work_s) <= request.deadline_s + 1e-6


@given(requests(), requests(), policies, seconds, st.lists(seconds, min_size=12))
def test_streams_that_began_elsewhere_come_first_and_are_never_given_up(
    queue: list[QueuedRequest],
    moved: list[QueuedRequest],
    policy: OrderPolicy,
    now_s: float,
    ages: list[float],
) -> None:
    """Whatever the policy: a reader in the midst of a stream waits for nobody's first token."""
    for number, (request, age_s) in enumerate(zip(moved, ages, strict=False)):
        request.request_id, request.last_token_s = f"m{number}", now_s + 1e-3 - age_s / 21 * now_s
    order = order_waiting([*queue, *moved], now_s, PACE, policy, 1.0)
    by_urgency = sorted(moved, key=lambda r: (r.last_token_s + r.slo.tbt_s, r.priority, r.request_id))
    assert names(order.ordered)[: len(moved)] == names(by_urgency)
    assert not {r.request_id for r in moved} & {*order.newly_relegated, *order.promoted}


def test_how_a_request_came_to_an_instance_does_not_count() -> None:
    """What HP drew on tickets or was offloaded passes its own arrivals by deadline alone, and is given up like them."""
    queue = [
        waiting("relegated", 10, -30.0, relegated=True),
        waiting("arrived", 10, -0.3),
        waiting("ticketed", 10, -0.2, ticketed=True),
        waiting("urgent", 10, -0.1, urgent=True),
    ]
    assert names(order_waiting(queue, 0.0, PACE, OrderPolicy()).ordered) == [
        "arrived",
        "ticketed",
        "urgent",
        "relegated",
    ]
    long, short = waiting("urgent", 8000, 0.0, 1.0, urgent=True), waiting("ticketed", 3000, 0.0, 0.5, ticketed=True)
    pace = prefill_pace(A100_LLAMA3_8B, DecodeLoad(), BudgetPolicy())
    assert order_waiting([long, short], 0.0, pace, OrderPolicy()).newly_relegated == ["urgent"]


def test_a_relegated_started_request_waits_or_goes_on_as_the_policy_says() -> None:
    """Partly prefilled and outranked: paused by default, first without pausing."""
    queue = [waiting("old", 5000, -10.0, relegated=True, started=True), waiting("new", 100)]
    assert names(order_waiting(queue, 0.0, PACE, OrderPolicy()).ordered) == ["new", "old"]
    assert names(order_waiting(queue, 0.0, PACE, OrderPolicy(pause_started=False)).ordered) == ["old", "new"]


def test_an_overdue_relegated_request_always_gets_its_turn() -> None:
    """Under endless overload by newcomers, credit lets the overdue one go first before long."""
    policy = OrderPolicy(relegated_after_s=5.0)
    turns = RelegatedTurns(0.05)
    overdue = waiting("overdue", 6000, -6.0, relegated=True)
    for step in range(100):
        now_s = 0.1 * step
        queue = [overdue, *(waiting(f"new{i}", 2000, now_s) for i in range(10))]
        order = order_waiting(queue, now_s, PACE, policy, credit_s=turns.credit_s)
        if order.ordered[0] is overdue:
            assert order.promoted == ["overdue"]
            return
        turns.earn(0.1)
    raise AssertionError("the relegated request never came first")


def test_a_turn_of_an_overdue_request_relegates_nobody_for_its_whole_length() -> None:
    """A long overdue prompt runs chunk by chunk: one that makes it behind a chunk is kept."""
    overdue = waiting("overdue", 8000, -30.0, relegated=True)
    kept = waiting("kept", 4000, 0.0, 1.0)
    order = order_waiting([overdue, kept], 0.0, PACE, OrderPolicy(), credit_s=0.01)
    assert names(order.ordered) == ["overdue", "kept"]
    assert order.newly_relegated == []


def test_relegated_requests_that_still_make_it_come_before_hopeless_ones() -> None:
    """With room to spare, a relegated request whose deadline is reachable is served before older lost ones."""
    queue = [waiting("lost", 100, -10.0, relegated=True), waiting("hopeful", 100, 0.0, relegated=True)]
    assert names(order_waiting(queue, 0.0, PACE, OrderPolicy()).ordered) == ["hopeful", "lost"]


def test_the_next_in_line_is_given_up_only_when_it_is_sure_to_miss_or_another_would() -> None:
    """A prompt that takes nearly all of its objective is tried while that costs nobody else theirs."""
    alone_s = PACE.finish_s(PACE.work_s(7000))
    policy = OrderPolicy()
    tight = waiting("tight", 7000, 0.0, alone_s * (1 + policy.caution) / 2)

    def given_up(*others: QueuedRequest) -> list[str]:
        return order_waiting([tight, *others], 0.0, PACE, policy).newly_relegated

    assert given_up() == []
    assert given_up(waiting("patient", 1000, 0.0, 3 * alone_s)) == []
    assert given_up(waiting("behind it", 1000, 0.0, 1.06 * alone_s)) == ["tight"]
    assert given_up(waiting("ahead of it", 1, 0.0, 0.5 * alone_s)) == ["tight"]
    assert order_waiting([tight], 0.06 * alone_s, PACE, policy).newly_relegated == ["tight"]
