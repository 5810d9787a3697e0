"""Placement of new requests."""

from dataclasses import replace

import pytest

from services.policy.placement import PLACEMENTS, PlacementPolicy, PlacementState, place
from services.policy.state import InstanceView, QueuedRequest, Role, Slo
from services.policy.step_time import A100_LLAMA3_8B, StepShape
from services.policy.token_budget import BudgetPolicy

SLO = Slo(ttft_s=2.0, tbt_s=0.1)
NEW = QueuedRequest(request_id="new", arrival_s=0.0, prompt_tokens=500, slo=SLO)


def instance(name: str, queued: int = 0, role: Role = Role.LOW, **changes: object) -> InstanceView:
    """Return an instance with so many 1,000-token prompts waiting."""
    queue = [QueuedRequest(request_id=f"{name}-{i}", arrival_s=0.0, prompt_tokens=1000, slo=SLO) for i in range(queued)]
    return InstanceView(worker_id=name, role=role, model=A100_LLAMA3_8B, queue=queue, **changes)  # type: ignore[arg-type]


def chosen(name: str, views: list[InstanceView], state: PlacementState | None = None, key: str = "") -> str | None:
    """Return the worker that a policy chooses."""
    return place(NEW, views, PlacementPolicy(name=name), state or PlacementState(), BudgetPolicy(), key).worker_id


def test_round_robin_takes_turns() -> None:
    """Each in turn, whatever the load."""
    state, views = PlacementState(), [instance("b", 5), instance("a")]
    assert [chosen("round_robin", views, state) for _ in range(4)] == ["a", "b", "a", "b"]


def test_least_requests_counts_and_least_work_weighs() -> None:
    """One long prompt against two short ones: count and work disagree."""
    long = instance("long")
    long.queue = [QueuedRequest(request_id="l", arrival_s=0.0, prompt_tokens=8000, slo=SLO)]
    short = instance("short", 2)
    assert chosen("least_requests", [long, short]) == "long"
    assert chosen("least_predicted_work", [long, short]) == "short"


def test_decodes_and_relegated_work_are_weighed() -> None:
    """Decodes slow the prefill; relegated requests are behind the newcomer and do not."""
    busy = instance("busy", 2, decodes=100, decode_context_tokens=150_000, min_tbt_s=0.1)
    assert chosen("least_predicted_work", [busy, instance("free", 2)]) == "free"
    given_up = instance("given-up", 9)
    for request in given_up.queue:
        request.relegated = True
    assert chosen("least_predicted_work", [given_up, instance("some", 1)]) == "given-up"


def test_power_of_two_never_takes_the_worst_of_three_for_long() -> None:
    """The most loaded of three is never the better of two."""
    views, state = [instance("a"), instance("b", 1), instance("worst", 9)], PlacementState()
    assert {chosen("power_of_two", views, state) for _ in range(50)} == {"a", "b"}


def test_prefix_affinity_sticks_until_saturated() -> None:
    """A session stays with its owner while the owner is not much later, then moves and stays."""
    state = PlacementState()
    assert chosen("prefix_affine", [instance("a"), instance("b", 1)], state, "s") == "a"
    assert chosen("prefix_affine", [instance("a", 2), instance("b")], state, "s") == "a"
    assert chosen("prefix_affine", [instance("a", 20), instance("b")], state, "s") == "b"
    assert chosen("prefix_affine", [instance("a"), instance("b", 2)], state, "s") == "b"
    assert chosen("prefix_affine", [instance("a")], state, "s") == "a"


def test_unlike_tbt_objectives_are_kept_apart_while_there_is_room() -> None:
    """Like first, then an empty or tighter one, a looser one last; when all are full the earliest first token wins."""
    loose, tight = Slo(ttft_s=2.0, tbt_s=0.2), Slo(ttft_s=2.0, tbt_s=0.05)

    def serving(name: str, slo: Slo, queued: int = 1) -> InstanceView:
        view = instance(name, queued)
        for request in view.queue:
            request.slo = slo
        return view

    looser, like, tighter = serving("looser", loose), instance("like", 2), serving("tighter", tight)
    assert chosen("tbt_bins", [looser, like, tighter]) == "like"
    assert chosen("tbt_bins", [looser, tighter]) == "tighter"
    assert chosen("tbt_bins", [looser, tighter, instance("empty")]) == "empty"
    decoding = instance("decoding", decodes=5, decode_context_tokens=5000, min_tbt_s=0.2)
    assert chosen("tbt_bins", [decoding, tighter]) == "tighter"
    assert chosen("tbt_bins", [looser, instance("like", 40)]) == "looser"
    assert chosen("tbt_bins", [serving("looser", loose, 50), instance("like", 40)]) == "like"


def test_owners_are_bounded() -> None:
    """The least recently used prefix is forgotten."""
    state = PlacementState()
    policy = PlacementPolicy(name="prefix_affine", max_owners=2)
    for key in ("x", "y", "x", "z"):
        place(NEW, [instance("a")], policy, state, BudgetPolicy(), key)
    assert list(state.owners) == ["x", "z"]


@pytest.mark.parametrize("name", sorted(PLACEMENTS))
def test_hp_draining_and_stale_instances_are_excluded_with_the_reason(name: str) -> None:
    """Draining never; stale only alone; HP not when it has little room left, but when there is nothing else."""
    views = [
        instance("lp", 9),
        instance("hp", 40, role=Role.HIGH),
        instance("draining", draining=True),
        instance("stale", report_age_s=5.0),
    ]
    placement = place(NEW, views, PlacementPolicy(name=name), PlacementState(), BudgetPolicy())
    assert placement.worker_id == "lp"
    assert {c.worker_id: bool(c.excluded) for c in placement.candidates} == {
        "lp": False,
        "hp": True,
        "draining": True,
        "stale": True,
    }
    assert chosen(name, [views[3]]) == "stale"
    assert chosen(name, [views[1]]) == "hp"
    assert chosen(name, [views[2]]) is None


def test_hp_takes_arrivals_while_it_keeps_room_for_offloads() -> None:
    """Beside LPs it takes what it would serve within a share of the tightest objective of its like; 0: never."""

    def to_hp(lp: int, hp: int, policy: PlacementPolicy, *others: Slo) -> bool:
        views, state = [instance("lp", lp), instance("hp", hp, role=Role.HIGH)], PlacementState()
        for slo in others:
            place(replace(NEW, slo=slo), views, policy, state, BudgetPolicy())
        return place(NEW, views, policy, state, BudgetPolicy()).worker_id == "hp"

    work_s = A100_LLAMA3_8B.step_s(StepShape(1000, 0, 0))
    half = int(0.5 * SLO.ttft_s / work_s)
    assert to_hp(half + 2, half, PlacementPolicy())
    assert not to_hp(half, half + 2, PlacementPolicy())
    assert not to_hp(2 * half + 4, 2 * half + 2, PlacementPolicy())
    assert not to_hp(half + 2, half, PlacementPolicy(hp_fill=0.4))
    assert not to_hp(half + 2, half, PlacementPolicy(), Slo(ttft_s=SLO.ttft_s / 8, tbt_s=SLO.tbt_s))
    assert to_hp(half + 2, half, PlacementPolicy(), Slo(ttft_s=SLO.ttft_s / 8, tbt_s=SLO.tbt_s / 2))
    assert not to_hp(half, 0, PlacementPolicy(hp_fill=0.0))


def test_a_tight_objective_is_forgotten() -> None:
    """One request with a tight objective does not keep HP from arrivals for ever."""
    views, state = [instance("lp", 9), instance("hp", 2, role=Role.HIGH)], PlacementState()
    place(replace(NEW, slo=Slo(ttft_s=0.02, tbt_s=0.1)), views, PlacementPolicy(), state, BudgetPolicy())
    taken = [place(NEW, views, PlacementPolicy(), state, BudgetPolicy()).worker_id for _ in range(500)]
    assert taken[0] == "lp"
    assert taken[-1] == "hp"


def test_a_stale_hp_takes_no_arrivals() -> None:
    """It is no way out of stale LPs either: they are used when there is nobody else."""
    views = [instance("lp", 3, report_age_s=5.0), instance("hp", role=Role.HIGH, report_age_s=5.0)]
    assert chosen("least_predicted_work", views) == "lp"


def test_unknown_policies_are_refused() -> None:
    """The error lists the names there are."""
    with pytest.raises(ValueError, match="round_robin"):
        PlacementPolicy(name="dice")


@pytest.mark.parametrize("name", sorted(PLACEMENTS))
def test_of_many_instances_some_are_compared(name: str) -> None:
    """Placement predicts at most so many, spreads over all, and never chooses one that cannot be."""
    views = [instance(f"w{i:02d}", i % 3, draining=i == 0, role=Role.HIGH if i == 1 else Role.LOW) for i in range(40)]
    policy, state = PlacementPolicy(name=name, hp_fill=0.0), PlacementState()
    found = [place(NEW, views, policy, state, BudgetPolicy(), f"s{i}") for i in range(200)]
    if name not in ("round_robin", "least_requests"):
        assert all(len(placement.candidates) <= policy.compared for placement in found)
        assert len({placement.worker_id for placement in found}) > 3
    assert not {"w00", "w01"} & {placement.worker_id for placement in found}


def test_the_owner_of_a_prefix_is_always_compared() -> None:
    """However many instances there are, a session stays where its prefix is."""
    views = [instance(f"w{i:02d}") for i in range(60)]
    state = PlacementState()
    owner = chosen("prefix_affine", views, state, "s")
    assert {chosen("prefix_affine", views, state, "s") for _ in range(30)} == {owner}


def test_only_so_many_kinds_of_objective_are_remembered() -> None:
    """Clients may ask for any TBT objective; the state does not grow with them."""
    state = PlacementState()
    for number in range(1, 1000):
        assert state.note_objective(Slo(ttft_s=1.0, tbt_s=0.001 * number)) == 1.0
    assert len(state.tightest_ttft_s) < 100
