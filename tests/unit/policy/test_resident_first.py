"""In which order vLLM computes what a policy ordered, and when nobody may be paused."""

import pytest

from services.policy.order import may_evict, resident_first
from services.policy.state import QueuedRequest, Slo


def request(name: str) -> QueuedRequest:
    """Return a request."""
    return QueuedRequest(request_id=name, arrival_s=0.0, prompt_tokens=100, slo=Slo(ttft_s=1.0, tbt_s=0.1))


def test_resident_requests_come_first_in_their_order() -> None:
    """Whatever outranks them waits until they have what they can take."""
    ordered = [request(name) for name in "abcd"]
    assert [r.request_id for r in resident_first(ordered, [ordered[3], ordered[1]])] == ["b", "d", "a", "c"]
    assert resident_first(ordered, []) == ordered


@pytest.mark.parametrize(("free", "evicts"), [(130, False), (129, True)])
def test_a_step_may_take_the_blocks_of_its_tokens(free: int, evicts: bool) -> None:
    """A token for each of 32 residents and 2,048 more in blocks of 16."""
    assert may_evict(free, 32, 2048, 16) is evicts
