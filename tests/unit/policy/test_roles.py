"""The split between LP and HP."""

import pytest

from services.policy.roles import RoleController, RolePolicy, assign_roles, default_hp_count
from services.policy.state import Role


@pytest.mark.parametrize(("instances", "hp"), [(0, 0), (1, 0), (2, 1), (4, 1), (8, 1), (12, 2), (16, 2), (40, 5)])
def test_one_in_eight_starts_as_hp(instances: int, hp: int) -> None:
    """At least one of two, and a single instance is not split."""
    assert default_hp_count(instances) == hp


def test_assignment_changes_as_few_as_possible() -> None:
    """Present HPs stay; with none wanted all are unified."""
    current = {"a": Role.LOW, "b": Role.HIGH, "c": Role.LOW}
    assert assign_roles(["a", "b", "c"], 1, current) == current
    assert assign_roles(["a", "b", "c"], 2, current) == {"a": Role.HIGH, "b": Role.HIGH, "c": Role.LOW}
    assert set(assign_roles(["a", "b"], 0, current).values()) == {Role.UNIFIED}
    assert assign_roles(["a"], 1) == {"a": Role.UNIFIED}


def test_pressure_must_last_before_a_role_changes() -> None:
    """30 s of urgent work that HP cannot take in time make one more HP, and not another before 30 s more."""
    controller = RoleController(RolePolicy(), 8)
    counts = [controller.update(float(t), 8, 0.95, 0.2).hp_count for t in range(70)]
    assert counts == [1] * 30 + [2] * 30 + [3] * 10


def test_a_gap_in_the_pressure_starts_the_clock_again() -> None:
    """Pressure that comes and goes changes nothing."""
    controller = RoleController(RolePolicy(), 8)
    counts = {controller.update(float(t), 8, 0.9 if t % 40 < 20 else 0.1, 0.2).hp_count for t in range(400)}
    assert counts == {1}


def test_idle_hp_is_given_back_down_to_one() -> None:
    """Without urgent work extra HPs return to LP, the last one stays."""
    controller = RoleController(RolePolicy(), 16)
    assert controller.hp_count == 2
    counts = [controller.update(float(t), 16, 0.0, 0.0).hp_count for t in range(120)]
    assert (counts[0], counts[-1]) == (2, 1)


def test_bounds_follow_the_instances_at_once() -> None:
    """When instances go away, so do HPs, without waiting."""
    controller = RoleController(RolePolicy(), 40)
    assert controller.update(0.0, 2, 0.0, 0.0).hp_count == 1
    assert controller.update(1.0, 1, 0.0, 0.0).hp_count == 0


def test_scatter_does_not_hide_lasting_pressure() -> None:
    """Intervals that scatter around a mean above the threshold count as pressure, around one below it do not."""
    busy, calm = (RoleController(RolePolicy(hold_s=20.0), 8) for _ in range(2))
    for t in range(0, 120, 2):
        grown = busy.update(float(t), 8, 0.9 if t % 4 else 0.4, 0.2).hp_count
        stayed = calm.update(float(t), 8, 0.7 if t % 4 else 0.1, 0.2).hp_count
    assert grown > 1
    assert stayed == 1
