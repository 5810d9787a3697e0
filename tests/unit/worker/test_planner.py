"""Step plans: order, budget and admissions from plain state."""

from dataclasses import replace

import pytest

from services.policy.state import QueuedRequest, Slo
from services.policy.step_time import A100_LLAMA3_8B, StepShape
from services.worker.engine.core.planner import DecodeState, StepPlanner
from services.worker.engine.settings import PolicySettings

NOW_S = 100.0


def planner(**settings: object) -> StepPlanner:
    """Return a planner on A100 step times."""
    return StepPlanner(
        PolicySettings(**settings),  # type: ignore[arg-type]
        max_num_batched_tokens=2048,
        max_num_seqs=256,
        warm_start=A100_LLAMA3_8B,
    )


def waiting(name: str, tokens: int = 100, ttft_s: float = 1.0, **fields: object) -> QueuedRequest:
    """Return a request that arrived now."""
    slo = Slo(ttft_s=ttft_s, tbt_s=0.1)
    return QueuedRequest(request_id=name, arrival_s=NOW_S, prompt_tokens=tokens, slo=slo, **fields)  # type: ignore[arg-type]


def decodes(count: int, tbt_s: float, context: int = 500) -> list[DecodeState]:
    """Return decodes that all got their last token now."""
    return [DecodeState(NOW_S, tbt_s, context)] * count


def names(requests: list[QueuedRequest]) -> list[str]:
    """Return ids in order."""
    return [request.request_id for request in requests]


def test_without_decodes_the_budget_is_the_cap() -> None:
    """Nothing presses: a step takes all it may."""
    assert planner().plan(NOW_S, [], [waiting("a", 5000)], []).token_budget == 2048


@pytest.mark.parametrize("tbt_s", [0.03, 0.05, 0.1])
@pytest.mark.parametrize("count", [1, 32, 128])
def test_the_planned_step_fits_the_gap(count: int, tbt_s: float) -> None:
    """With decodes the planned step stays within the gap objective; the next token would break it or the cap holds."""
    plan = planner().plan(NOW_S, [], [waiting("a", 5000)], decodes(count, tbt_s))
    prefill = plan.token_budget - count

    def planned_s(tokens: int) -> float:
        return A100_LLAMA3_8B.planned_step_s(StepShape(tokens, count, count * 500))

    if prefill > 32:  # the floor keeps prefill moving whatever the slack
        assert planned_s(prefill) <= tbt_s
    if plan.token_budget < 2048:
        assert planned_s(prefill + 64) > tbt_s - 0.005


def test_a_late_decode_shortens_the_step() -> None:
    """A decode whose gap has been running for a while leaves less for prefill; under async scheduling it does not."""
    late = [DecodeState(NOW_S - 0.06, 0.1, 500)]
    one = planner()
    queue = [waiting("a", 5000)]
    budget = one.plan(NOW_S, [], queue, late).token_budget
    assert budget < one.plan(NOW_S, [], queue, decodes(1, 0.1)).token_budget
    assert one.plan(NOW_S, [], queue, late, in_flight=True).token_budget > budget


def test_a_slow_path_to_the_reader_shortens_the_step() -> None:
    """What routers measure is left free in every gap, also after a change of role, until the path is quick again."""
    one, queue, running = planner(calm_factor=0), [waiting("a", 5000)], decodes(16, 0.1)
    before = one.plan(NOW_S, [], queue, running).token_budget
    one.set_delivery(0.02)
    slow = one.plan(NOW_S, [], queue, running).token_budget
    assert slow < before
    assert slow == planner(calm_factor=0).plan(NOW_S, [], queue, decodes(16, 0.1 - 0.02 + 0.001)).token_budget
    one.set_policy(PolicySettings(role="low", calm_factor=0))
    assert one.plan(NOW_S, [], queue, running).token_budget == slow
    one.set_delivery(0.0)
    assert one.plan(NOW_S, [], queue, running).token_budget == before


def test_the_static_budget_ignores_the_gap() -> None:
    """A static budget is the same whatever decodes."""
    static = planner(token_budget="static", static_budget_tokens=512)
    for count in (0, 1, 100):
        assert static.plan(NOW_S, [], [waiting("a", 5000)], decodes(count, 0.02)).token_budget == 512


def test_order_and_relegation_come_from_the_policy() -> None:
    """Resident prefills and waiting requests in one order by deadline; the hopeless are last and named."""
    queue = [waiting("loose", ttft_s=5.0), waiting("tight", ttft_s=1.0), waiting("hopeless", 8000, ttft_s=0.1)]
    begun = [waiting("begun", ttft_s=3.0, started=True)]
    order = planner().plan(NOW_S, begun, queue, []).order
    assert names(order.ordered) == ["tight", "begun", "loose", "hopeless"]
    assert order.newly_relegated == ["hopeless"]


def test_an_outranked_prefill_pauses() -> None:
    """A long prefill behind an urgent newcomer sits the step out, unless both fit or the newcomer cannot start."""
    long, short = waiting("long", 6000, ttft_s=9.0, started=True), waiting("short", 200, ttft_s=1.0)
    assert planner().plan(NOW_S, [long], [short], []).paused == [long]
    assert planner().plan(NOW_S, [long], [short], [], may_pause=False).paused == []
    assert planner().plan(NOW_S, [waiting("small", 300, ttft_s=9.0, started=True)], [short], []).paused == []
    full = StepPlanner(PolicySettings(), max_num_batched_tokens=2048, max_num_seqs=1, warm_start=A100_LLAMA3_8B)
    assert full.plan(NOW_S, [long], [short], []).paused == []
    urgent = waiting("urgent", 6000, ttft_s=1.0, started=True)
    assert planner().plan(NOW_S, [urgent], [waiting("later", 200, ttft_s=9.0)], []).paused == []


def test_nobody_pauses_for_whom_no_step_can_take_in() -> None:
    """Neither without a place, nor while its constraint is compiled; whose KV has come has its place already."""
    long = waiting("long", 4000, ttft_s=9.0, started=True)
    short = waiting("short", 200)
    assert planner().plan(NOW_S, [long], [short], [], blocked=[short]).paused == []
    assert planner().plan(NOW_S, [long], [waiting("other", 200), short], [], blocked=[short]).paused == [long]
    assert planner().plan(NOW_S, [long], [short], [], coming=10_000).paused == []
    moved = waiting("moved", 200, last_token_s=NOW_S)
    moved.computed_tokens = 199
    assert planner().plan(NOW_S, [long], [], [], coming=10_000, moved=[moved]).paused == [long]
    # A paused request keeps its slot: vLLM fails when there are more residents than slots.
    slots = planner()._max_num_seqs
    assert planner().plan(NOW_S, [long], [], decodes(slots - 2, 10.0), moved=[moved]).paused == [long]
    assert planner().plan(NOW_S, [long], [], decodes(slots - 1, 10.0), moved=[moved]).paused == []


def test_hp_caps_its_residents_by_their_gaps() -> None:
    """HP admits up to the largest batch whose step fits the gap; LP up to the engine's slots."""
    queue = [waiting(f"w{index}") for index in range(10)]
    low = planner(role="low").plan(NOW_S, [], queue, decodes(20, 0.025))
    high = planner(role="high").plan(NOW_S, [], queue, decodes(20, 0.025))
    loose = planner(role="high").plan(NOW_S, [], queue, decodes(20, 0.2))
    assert low.admissions == 256 - 20
    assert high.admissions == 0
    assert loose.admissions > 50


@pytest.mark.parametrize("role", ["low", "high"])
def test_an_objective_that_no_step_keeps_binds_nobody(role: str) -> None:
    """A lone decode takes 15 ms: one that asks for 5 ms, resident or waiting, costs the others nothing."""
    hopeless = replace(waiting("hopeless"), slo=Slo(ttft_s=1.0, tbt_s=0.005))
    queue = [waiting(f"w{index}", 2000) for index in range(10)]
    running = decodes(20, 0.1)
    plan = planner(role=role).plan(NOW_S, [], queue, running)
    for other_queue, others in (([*queue, hopeless], running), (queue, [*running[1:], *decodes(1, 0.005)])):
        changed = planner(role=role).plan(NOW_S, [], other_queue, others)
        assert (changed.token_budget, changed.admissions) == (plan.token_budget, plan.admissions)


@pytest.mark.parametrize(
    ("settings", "stock"),
    [
        ({"value_function": "fcfs", "token_budget": "static", "relegation": "none"}, True),
        ({"value_function": "edf", "token_budget": "static", "relegation": "none"}, False),
        ({"value_function": "fcfs", "token_budget": "dynamic", "relegation": "none"}, False),
        ({"value_function": "fcfs", "token_budget": "static", "relegation": "late"}, False),
        ({"value_function": "fcfs", "token_budget": "static", "relegation": "none", "role": "high"}, False),
    ],
)
def test_stock_is_recognised(settings: dict[str, str], stock: bool) -> None:
    """Only arrival order with a fixed budget and no relegation is vLLM's own scheduling."""
    assert planner(**settings).is_stock is stock


def test_a_model_learned_elsewhere_is_taken_by_the_less_experienced() -> None:
    """A pushed model replaces the present one only when it has seen more steps."""
    one = planner()
    experienced = type(A100_LLAMA3_8B)(bins=A100_LLAMA3_8B.bins, source="predictor", samples=50)
    one.adopt(experienced)
    assert one.model.source == "predictor"
    for _ in range(64):
        one.learn(StepShape(0, 8, 4000), 0.016)
    one.adopt(experienced)
    assert one.model.source != "predictor"


def test_unknown_names_are_refused() -> None:
    """A policy that does not exist is an error at the call, and the old one stays in force."""
    one = planner()
    with pytest.raises(ValueError, match="value_function"):
        one.set_policy(PolicySettings(value_function="fastest"))
    assert one.settings.value_function == "edf"


def test_a_step_is_sized_for_whom_it_serves() -> None:
    """Who may not pause comes before the more urgent: a chunk behind a long context must not break running streams."""
    deep = waiting("deep", 60_000, ttft_s=20.0, started=True, computed_tokens=50_000)
    fresh = waiting("fresh", 4000, ttft_s=3.0)
    running = decodes(8, 0.1)
    one = planner()
    pausing, serving = (one.plan(NOW_S, [deep], [fresh], running, may_pause=may) for may in (True, False))
    assert names(pausing.order.ordered) == names(serving.order.ordered) == ["fresh", "deep"]
    assert pausing.paused == [deep]
    tokens = serving.token_budget - len(running)
    assert 0 < tokens < 0.7 * (pausing.token_budget - len(running))
    shape = StepShape(tokens, 8, 8 * 500, tokens * 50_000)
    assert one.model.planned_step_s(shape) <= 0.1
