"""What a request would wait for elsewhere, and what its coming does to those who wait there."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from services.policy.order import OrderPolicy
from services.policy.prefill import instance_pace, step_in_progress
from services.policy.state import InstanceView, QueuedRequest, Role, Slo
from services.policy.step_time import A100_LLAMA3_8B
from services.policy.token_budget import BudgetPolicy
from services.router.estimates import newcomer_ahead, newcomer_in_order

BUDGET = BudgetPolicy()
PACE = instance_pace(InstanceView(worker_id="idle", role=Role.HIGH, model=A100_LLAMA3_8B), BUDGET)
NOW_S = 100.0


def waiting(name: str, tokens: int, left_s: float, **state: Any) -> QueuedRequest:
    """Return a request whose deadline is `left_s` from now."""
    slo = Slo(ttft_s=left_s, tbt_s=0.1)
    return QueuedRequest(request_id=name, arrival_s=NOW_S, prompt_tokens=tokens, slo=slo, **state)


def made(queue: list[QueuedRequest]) -> set[str]:
    """Return who makes it, served in the order of deadlines."""
    ends, work_s = set(), 0.0
    for request in sorted(queue, key=lambda one: one.deadline_s):
        work_s += PACE.remaining_work_s(request)
        if PACE.finish_s(work_s) <= request.deadline_s - NOW_S:
            ends.add(request.request_id)
    return ends


requests = st.tuples(st.integers(1, 4000), st.floats(0.05, 3.0))


@given(st.lists(requests, max_size=8), requests)
def test_who_is_told_that_it_makes_it_on_hp_harms_nobody(
    queue: list[tuple[int, float]], newcomer: tuple[int, float]
) -> None:
    """A newcomer whose estimate keeps its deadline does keep it, and all who made it before still do."""
    present = [waiting(f"q{index}", *one) for index, one in enumerate(queue)]
    view = InstanceView(worker_id="hp", role=Role.HIGH, model=A100_LLAMA3_8B, queue=present)
    comes = waiting("new", *newcomer)
    estimate = newcomer_ahead(view, BUDGET, NOW_S).estimate(comes)
    assume(estimate.mean_s <= comes.slo.ttft_s)
    assert made([*present, comes]) >= made(present) | {"new"}


def test_a_newcomer_overtakes_on_hp_those_who_can_wait() -> None:
    """Later deadlines wait for it if they still make it, relegated ones always, started ones never."""
    long_s = PACE.finish_s(PACE.work_s(2000))
    comes = waiting("new", 500, long_s)

    def wait_s(role: Role, *queue: QueuedRequest) -> float:
        view = InstanceView(worker_id="w", role=role, model=A100_LLAMA3_8B, queue=list(queue))
        return newcomer_ahead(view, BUDGET, NOW_S).estimate(comes).mean_s

    alone_s = wait_s(Role.HIGH)
    patient, hurried = waiting("patient", 2000, 60.0), waiting("hurried", 2000, 1.05 * long_s)
    assert wait_s(Role.HIGH, patient) == alone_s
    assert wait_s(Role.HIGH, waiting("given up", 2000, 0.1, relegated=True)) == alone_s
    assert wait_s(Role.HIGH, hurried) > alone_s
    assert wait_s(Role.HIGH, waiting("offloaded", 2000, 60.0, urgent=True)) == alone_s
    assert wait_s(Role.HIGH, waiting("started", 2000, 60.0, started=True)) > alone_s
    assert wait_s(Role.LOW, patient) > alone_s


def running_view(*queue: QueuedRequest) -> InstanceView:
    """Return an instance that runs a step beside decodes."""
    view = InstanceView(worker_id="w", role=Role.LOW, model=A100_LLAMA3_8B, queue=[*queue], decodes=20, min_tbt_s=0.1)
    view.step_elapsed_s = 0.05
    view.step_queued_tokens = sum(queued.remaining_tokens for queued in queue if queued.counted)
    return view


def predicted_s(view: InstanceView, comes: QueuedRequest) -> float:
    """Predict a request that is sent there now."""
    return newcomer_in_order(view, comes, NOW_S, OrderPolicy(), BudgetPolicy(calm_factor=0.0)).mean_s


def test_the_running_step_does_not_serve_who_is_sent_now() -> None:
    """Though it is ordered before all that wait, and the running step computes more than its prompt."""
    view = running_view(waiting("others", 3000, 60.0, started=True, counted=True))
    pace = instance_pace(view, BUDGET)
    left_s = step_in_progress(view, pace).left_s
    assert 0 < left_s < pace.step_s
    assert predicted_s(view, waiting("new", 300, 0.5)) == left_s + pace.step_s


def test_who_waits_behind_fills_up_the_last_step() -> None:
    """Alone its step would be short; whoever is behind it makes it longer, up to a full one."""
    comes = waiting("new", 300, 0.5)
    alone, few, many = (
        predicted_s(running_view(waiting("behind", tokens, 60.0, counted=True)), comes) for tokens in (1, 1000, 9000)
    )
    assert alone < few < many


def test_the_running_step_serves_only_who_was_there_when_it_began() -> None:
    """What it does for a relegated request does not shorten the wait behind those who came since."""
    relegated = waiting("relegated", 3000, 0.1, started=True, counted=True, relegated=True)
    pace = instance_pace(running_view(), BUDGET)
    comes = waiting("new", 300, 0.5)
    there = running_view(relegated, waiting("ahead", 1000, 0.4, counted=True))
    since = running_view(relegated, waiting("ahead", 1000, 0.4))
    assert predicted_s(since, comes) == pytest.approx(predicted_s(there, comes) + pace.step_s, rel=0.05)


def test_calm_steps_are_predicted_as_such() -> None:
    """Steps leave room while all who wait have time, so a prompt takes longer; not once one of them is in a hurry."""
    view = InstanceView(worker_id="w", role=Role.LOW, model=A100_LLAMA3_8B, decodes=20, min_tbt_s=0.1)
    slow = BudgetPolicy(delivery_s=0.01)
    means_s = [
        newcomer_in_order(view, waiting("new", 2000, left_s), NOW_S, OrderPolicy(), replace(slow, calm_factor=factor))
        for left_s, factor in ((9.0, 2.0), (9.0, 0.0), (0.3, 2.0), (0.3, 0.0))
    ]
    calm, full, hurried, hurried_full = (estimate.mean_s for estimate in means_s)
    assert calm > full
    assert hurried == hurried_full
