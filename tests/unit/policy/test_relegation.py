"""Giving up the fewest."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.policy.relegation import RelegatedTurns, late, moore_hodgson

jobs_lists = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), max_size=8)


def all_make_it(jobs: list[tuple[int, int]], ahead: int = 0) -> bool:
    """Say whether all jobs (deadline, work) make it when served by deadline."""
    done = ahead
    for deadline, work in sorted(jobs):
        done += work
        if done > deadline:
            return False
    return True


@given(jobs_lists, st.integers(0, 30))
def test_moore_hodgson_keeps_as_many_as_any_choice(jobs: list[tuple[int, int]], ahead: int) -> None:
    """Compared with every subset, none that makes it is larger than what was kept, and what was kept makes it."""
    dropped = moore_hodgson([d for d, _ in jobs], [w for _, w in jobs], ahead)
    kept = [job for i, job in enumerate(jobs) if i not in set(dropped)]
    best = max(
        size
        for size in range(len(jobs) + 1)
        if any(all_make_it(list(some), ahead) for some in itertools.combinations(jobs, size))
    )
    assert len(kept) == best
    assert all_make_it(kept, ahead)


@given(jobs_lists)
def test_late_keeps_only_those_that_make_it_in_order(jobs: list[tuple[int, int]]) -> None:
    """Skipping each miss when its turn comes leaves jobs that all make it in the given order."""
    dropped = set(late([d for d, _ in jobs], [w for _, w in jobs]))
    done = 0
    for i, (deadline, work) in enumerate(jobs):
        if i not in dropped:
            done += work
            assert done <= deadline


@given(st.lists(st.floats(0.01, 2.0), min_size=1, max_size=200), st.floats(0.01, 0.5))
def test_relegated_turns_are_bounded_and_come(works_s: list[float], share: float) -> None:
    """What goes first on credit never exceeds its share by more than one request, and everybody gets a turn."""
    turns = RelegatedTurns(share)
    busy_s = spent_s = 0.0
    for work_s in works_s:
        waited = 0
        while turns.credit_s <= 0:
            turns.earn(0.1)
            busy_s += 0.1
            waited += 1
            assert waited <= 2.0 / (share * 0.1) + 2
        turns.spend(work_s)
        spent_s += work_s
        assert spent_s <= share * busy_s + work_s + 1e-6


def test_share_is_checked() -> None:
    """A share of more than everything is refused."""
    with pytest.raises(ValueError, match="relegated_share"):
        RelegatedTurns(1.5)
