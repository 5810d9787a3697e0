"""A worker as the policies see it, from telemetry and the router's own requests."""

import pytest

from ascendra.v1 import common_pb2, worker_pb2
from services.policy.state import Role, Slo
from services.policy.step_time import StepTimeBin, StepTimeModel
from services.policy.telemetry import OTHERS
from services.policy.token_budget import BudgetPolicy
from services.router.estimates import backlog_s
from services.router.instance import Instance, Placed
from services.router.mailbox import Mailbox
from services.router.prediction import token_load_model
from services.router.request import PREFIX_BLOCK_TOKENS, LiveRequest, RequestSpec

MODEL = token_load_model()


def instance() -> Instance:
    """Return a welcomed LP worker at 100 s."""
    fresh = Instance("a:1", MODEL, BudgetPolicy())
    fresh.welcome(worker_pb2.Welcome(worker_id="w", role=common_pb2.ROLE_LOW_PRIORITY, kv_capacity_tokens=1000), 100.0)
    return fresh


def placed(handle: int, prompt_tokens: int = 100, submitted_s: float = 100.0) -> Placed:
    """Return a placed request."""
    spec = RequestSpec(
        request_id=f"r{handle}",
        prompt=bytes(4 * prompt_tokens),
        sampling=common_pb2.SamplingParameters(max_tokens=10),
        slo=Slo(ttft_s=1.0, tbt_s=0.1),
    )
    request = LiveRequest(spec, submitted_s, None, Mailbox(10))
    return Placed(request, 1, handle, request.queued(), submitted_s, 0, submitted_s)


def telemetry(**fields: float) -> common_pb2.StepTelemetry:
    """Return a step's telemetry."""
    return common_pb2.StepTelemetry(**({"step": 1} | fields))  # type: ignore[arg-type]


def test_submissions_count_at_once() -> None:
    """A request is in the view before the worker has said anything about it."""
    worker = instance()
    worker.submitted(placed(1))
    view = worker.refresh(MODEL, 100.0)
    assert [queued.request_id for queued in view.queue] == ["r1"]
    assert view.role is Role.LOW


def test_an_objective_that_no_step_keeps_binds_no_predicted_step() -> None:
    """As in the worker's own plan."""
    worker = instance()
    for handle, tbt_s in ((1, 0.1), (2, 1e-4)):
        one = placed(handle)
        one.request.spec.slo = Slo(ttft_s=1.0, tbt_s=tbt_s)
        worker.submitted(one)
        worker.first_token(one)
    model = StepTimeModel((StepTimeBin(max_tokens=0, a0=0.01),))
    assert worker.refresh(model, 100.0).min_tbt_s == 0.1


def test_other_routers_load_counts() -> None:
    """Queued tokens beyond our own are somebody else's, and ahead."""
    worker = instance()
    worker.submitted(placed(1))
    worker.telemetry(telemetry(queued_prefill_tokens=700), 101.0)
    queue = {queued.request_id: queued for queued in worker.refresh(MODEL, 101.0).queue}
    assert queue[OTHERS].remaining_tokens == 600
    assert queue[OTHERS].started


def test_backlog_counts_what_was_given_up_and_what_is_others() -> None:
    """What to scale on grows with the queue, relegated requests and other routers' included; 0 for an idle worker."""
    worker = instance()
    backlogs = [backlog_s(worker.refresh(MODEL, 100.0), worker.budget)]
    first = placed(1, prompt_tokens=3000)
    worker.submitted(first)
    backlogs.append(backlog_s(worker.refresh(MODEL, 100.0), worker.budget))
    first.queued.relegated = True
    assert backlog_s(worker.refresh(MODEL, 100.0), worker.budget) == backlogs[-1]
    worker.telemetry(telemetry(queued_prefill_tokens=9000), 101.0)
    backlogs.append(backlog_s(worker.refresh(MODEL, 101.0), worker.budget))
    assert backlogs[0] == 0.0
    assert backlogs[0] < backlogs[1] < backlogs[2]


def test_progress_of_started_requests_is_inferred() -> None:
    """What the worker still has queued beyond the waiting ones is left of the started one."""
    worker = instance()
    first, second = placed(1), placed(2)
    worker.submitted(first)
    worker.submitted(second)
    first.queued.started = True
    worker.telemetry(telemetry(queued_prefill_tokens=130), 101.0)
    view = worker.refresh(MODEL, 101.0)
    assert [queued.remaining_tokens for queued in view.queue] == [30, 100]


def test_who_starts_in_the_next_step_has_made_no_progress() -> None:
    """A long prompt came during a step, whose report counts nothing, and started in the next: all of it is left."""
    worker = instance()
    worker.telemetry(telemetry(running=3, step_s=0.09), 101.0)
    long = placed(1, prompt_tokens=3000, submitted_s=101.03)
    worker.submitted(long)
    worker.telemetry(telemetry(step=2, running=3, step_s=0.09), 101.09)
    long.queued.started = True
    view = worker.refresh(MODEL, 101.1)
    assert [queued.remaining_tokens for queued in view.queue] == [3000]
    assert view.step_queued_tokens == 3000
    worker.telemetry(telemetry(step=3, running=4, step_s=0.09, queued_prefill_tokens=2500), 101.18)
    assert [queued.remaining_tokens for queued in worker.refresh(MODEL, 101.2).queue] == [2500]


def test_what_the_report_cannot_know_is_not_subtracted() -> None:
    """A request sent after the report leaves the other routers' share as it is."""
    worker = instance()
    worker.telemetry(telemetry(queued_prefill_tokens=500), 101.0)
    worker.submitted(placed(1, submitted_s=101.5))
    queue = {queued.request_id: queued for queued in worker.refresh(MODEL, 101.6).queue}
    assert queue[OTHERS].remaining_tokens == 500


def test_decodes_leave_the_queue_and_bound_the_gap() -> None:
    """After its first token a request only bounds the steps; when it ends, nothing is left of it."""
    worker = instance()
    one = placed(1)
    worker.submitted(one)
    worker.first_token(one)
    view = worker.refresh(MODEL, 101.0)
    assert (view.queue, view.min_tbt_s) == ([], 0.1)
    worker.gone(one)
    assert worker.refresh(MODEL, 101.0).min_tbt_s == 0.0


def test_moves_on_their_way_count() -> None:
    """An expected request is in the view until it is not expected any more."""
    worker = instance()
    worker.expect(placed(5).queued)
    assert [queued.request_id for queued in worker.refresh(MODEL, 100.0).queue] == ["r5"]
    worker.expect_no_more("r5")
    assert worker.refresh(MODEL, 100.0).queue == []


def test_a_stall_is_steps_that_stand_still_with_work() -> None:
    """Silence of an idle engine is none; the time counts from the first work on."""
    worker = instance()
    worker.heartbeat(worker_pb2.Heartbeat(), 150.0)
    assert not worker.stalled(200.0, 5.0)
    worker.submitted(placed(1, submitted_s=200.0))
    assert not worker.stalled(204.0, 5.0)
    assert worker.stalled(206.0, 5.0)
    worker.telemetry(telemetry(step=2, running=1), 206.0)
    assert not worker.stalled(207.0, 5.0)


def test_a_constraint_that_is_compiled_is_no_stall() -> None:
    """For a minute, alone: whoever waits beside it would be served."""
    worker = instance()
    constrained = placed(1, submitted_s=200.0)
    constrained.request.spec.sampling.structured_output.regex = "a{9999}"
    worker.submitted(constrained)
    worker.heartbeat(worker_pb2.Heartbeat(waiting=1), 200.5)
    assert not worker.stalled(259.0, 5.0)
    worker.heartbeat(worker_pb2.Heartbeat(waiting=2), 259.5)
    assert worker.stalled(264.5, 5.0)
    worker.heartbeat(worker_pb2.Heartbeat(waiting=1), 264.6)
    assert worker.stalled(264.7, 5.0)


def test_a_kv_cache_on_its_way_is_no_stall() -> None:
    """An engine that only waits for one takes no steps; it has to when the cache cannot be read."""
    worker = instance()
    loading = placed(1, submitted_s=200.0)
    loading.by_kv = True
    worker.submitted(loading)
    worker.heartbeat(worker_pb2.Heartbeat(waiting=1), 200.5)
    assert not worker.stalled(220.0, 5.0)
    loading.by_kv = False
    assert not worker.stalled(224.0, 5.0)
    assert worker.stalled(226.0, 5.0)


def test_a_step_that_may_be_long_is_waited_for() -> None:
    """The limit is what was asked for, more for large predicted or observed steps, and longer still at first."""
    worker = instance()
    assert worker.stall_limit_s(100.0, 1.0, 15.0) == 15.0
    for step in range(1, 41):
        worker.telemetry(telemetry(step=step, running=1, step_s=0.02), 100.0 + step)
    worker.refresh(StepTimeModel((StepTimeBin(0, a0=0.01),)), 141.0)
    assert worker.stall_limit_s(141.0, 1.0, 15.0) == 1.0
    worker.telemetry(telemetry(step=41, running=1, step_s=0.5), 142.0)
    assert worker.stall_limit_s(142.0, 1.0, 15.0) == 2.0
    worker.refresh(StepTimeModel((StepTimeBin(0, a0=0.75),)), 143.0)
    assert worker.stall_limit_s(143.0, 1.0, 15.0) == 3.0


def test_the_token_rate_covers_ten_seconds() -> None:
    """Ten tokens a second show as about ten."""
    worker = instance()
    for tenth in range(300):
        worker.count_tokens(1, 100.0 + tenth / 10)
    assert worker.rate(130.0) == pytest.approx(10, rel=0.2)


def test_steps_are_sized_as_the_worker_says() -> None:
    """Its hard cap bounds the budget; a static one is read off the telemetry."""
    worker = Instance("a:1", MODEL, BudgetPolicy())
    dynamic = worker_pb2.SchedulingPolicy(token_budget="dynamic")
    worker.welcome(worker_pb2.Welcome(worker_id="w", max_num_batched_tokens=256, policy=dynamic), 100.0)
    assert (worker.budget.kind, worker.budget.max_tokens) == ("dynamic", 256)
    worker.telemetry(telemetry(delivery_s=0.0125), 100.5)
    worker.adopt(worker_pb2.SchedulingPolicy(token_budget="dynamic", calm_factor=1.5))
    assert (round(worker.budget.delivery_s, 6), worker.budget.calm_factor) == (0.0125, 1.5)
    worker.adopt(worker_pb2.SchedulingPolicy(token_budget="static"))
    worker.telemetry(telemetry(token_budget=192), 101.0)
    assert (worker.budget.kind, worker.budget.static_tokens) == ("static", 192)


def test_prompts_and_completions_are_found_again() -> None:
    """What was sent there is expected to be cached, what it generated too; not what left before it was computed."""
    worker = instance()
    worker.welcome(worker_pb2.Welcome(worker_id="w", kv_capacity_tokens=10_000, prefix_block_tokens=16), 100.0)
    first = placed(1, prompt_tokens=1000)
    assert worker.view.cached_tokens(first.queued) == 0
    worker.submitted(first)
    longer = placed(2, prompt_tokens=2000)
    worker.view.expects(longer.queued)
    assert longer.queued.computed_tokens == 1000 // PREFIX_BLOCK_TOKENS * PREFIX_BLOCK_TOKENS
    worker.submitted(longer)
    worker.gone(longer)  # withdrawn
    assert worker.view.cached_tokens(longer.queued) == longer.queued.computed_tokens
    first.queued.started = True
    worker.first_token(first)
    first.request.generated.extend([0] * 500)
    worker.gone(first)
    assert worker.view.cached_tokens(longer.queued) == 1500 // PREFIX_BLOCK_TOKENS * PREFIX_BLOCK_TOKENS
    coming = placed(3, prompt_tokens=1400)
    worker.expect(coming.queued)
    assert coming.queued.remaining_tokens == 1400 - 1399 // PREFIX_BLOCK_TOKENS * PREFIX_BLOCK_TOKENS


def test_a_worker_that_starts_anew_or_caches_nothing_is_expected_to_hold_nothing() -> None:
    """Its incarnation before took the cache with it; a stream that broke did not."""
    worker = instance()
    for incarnation, block_tokens, before, after in (
        ("a", 16, 0, 896),
        ("a", 16, 896, 896),
        ("b", 16, 0, 896),
        ("b", 0, 0, 0),
    ):
        worker.welcome(
            worker_pb2.Welcome(
                worker_id="w",
                kv_capacity_tokens=10_000,
                prefix_block_tokens=block_tokens,
                incarnation=incarnation,
            ),
            100.0,
        )
        request = placed(1, prompt_tokens=1000)
        assert worker.view.cached_tokens(request.queued) == before
        worker.submitted(request)
        assert worker.view.cached_tokens(request.queued) == after


def test_an_engine_that_hangs_while_idle_is_noticed() -> None:
    """Its heartbeats say that nothing is there, but a request was sent and no step follows: it has a while to begin."""
    worker = instance()
    for step in range(1, 100):
        worker.telemetry(telemetry(step=step, step_s=0.01), 100.0 + step / 100)
    worker.heartbeat(worker_pb2.Heartbeat(steps=99), 200.0)
    worker.submitted(placed(1, submitted_s=200.0))
    for second in range(16):
        worker.heartbeat(worker_pb2.Heartbeat(steps=99), 200.0 + second)
        limit_s = worker.stall_limit_s(200.0 + second, 0.9, 15.0)
        assert not worker.stalled(200.0 + second, limit_s)
    assert worker.stalled(215.5, worker.stall_limit_s(215.5, 0.9, 15.0))
