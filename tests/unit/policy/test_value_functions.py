"""Orders by value."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.policy.state import QueuedRequest, Slo
from services.policy.value_functions import VALUE_FUNCTIONS, order_key, value_function
from tests.unit.policy.strategies import requests, seconds


@given(requests(), st.sampled_from(sorted(VALUE_FUNCTIONS)), seconds)
def test_keys_are_total_and_stable(queue: list[QueuedRequest], name: str, now_s: float) -> None:
    """Any arrangement of the same requests is sorted the same way, with no two keys equal."""
    value = value_function(name)

    def key(request: QueuedRequest) -> tuple[float, int, float, str]:
        return order_key(value(request, request.remaining_tokens * 1e-4, now_s), request)

    keys = [key(request) for request in queue]
    assert len(set(keys)) == len(keys)
    assert sorted(queue, key=key) == sorted(queue[1:] + queue[:1], key=key)


@given(st.lists(seconds, max_size=20), seconds)
def test_llf_and_edf_equal_fcfs_when_all_are_alike(arrivals_s: list[float], now_s: float) -> None:
    """With equal lengths and objectives, laxity and deadlines order by arrival."""
    slo = Slo(ttft_s=1.0, tbt_s=0.1)
    queue = [
        QueuedRequest(request_id=str(i), arrival_s=round(arrival_s, 3), prompt_tokens=100, slo=slo)
        for i, arrival_s in enumerate(arrivals_s)
    ]
    orders = [
        [r.arrival_s for r in sorted(queue, key=lambda r: order_key(round(value_function(name)(r, 0.01, now_s), 6), r))]
        for name in ("fcfs", "llf", "edf")
    ]
    assert orders[0] == orders[1] == orders[2]


def test_each_function_prefers_what_it_says() -> None:
    """Of a long old request and a short new one, each function chooses as defined."""
    old = QueuedRequest(request_id="old", arrival_s=0.0, prompt_tokens=8000, slo=Slo(ttft_s=5.0, tbt_s=0.1))
    new = QueuedRequest(request_id="new", arrival_s=1.0, prompt_tokens=100, slo=Slo(ttft_s=4.2, tbt_s=0.1))
    prefill_s = {"old": 0.8, "new": 0.01}
    first = {
        name: min((old, new), key=lambda r: f(r, prefill_s[r.request_id], 2.0)).request_id
        for name, f in VALUE_FUNCTIONS.items()
    }
    assert first == {"fcfs": "old", "edf": "old", "llf": "old", "sjf": "new", "hybrid": "new", "hrrn": "new"}


def test_unknown_names_are_refused() -> None:
    """The error lists the names there are."""
    with pytest.raises(ValueError, match="fcfs, edf, llf, sjf, hybrid, hrrn"):
        value_function("lifo")
