"""What a decider remembers of prompts that it sent away."""

import array

from hypothesis import given
from hypothesis import strategies as st

from services.policy.placement import PlacementPolicy, PlacementState, place, queue_ttft_s
from services.policy.prefix import PrefixIndex, block_ids
from services.policy.state import InstanceView, QueuedRequest, Role, Slo
from services.policy.step_time import A100_LLAMA3_8B
from services.policy.token_budget import BudgetPolicy

BLOCK = 4
SLO = Slo(ttft_s=2.0, tbt_s=0.1)

prompts = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def ids(prompt: list[int]) -> tuple[int, ...]:
    """Return a prompt's block ids."""
    return block_ids(array.array("I", prompt).tobytes(), BLOCK)


def shared(one: list[int], other: list[int]) -> int:
    """Return how many leading tokens are equal."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


@given(prompts, prompts)
def test_equal_ids_mean_equal_beginnings(one: list[int], other: list[int]) -> None:
    """Two prompts share as many ids as they share whole blocks."""
    both = zip(ids(one), ids(other), strict=False)
    equal = next((place for place, (a, b) in enumerate(both) if a != b), min(len(ids(one)), len(ids(other))))
    assert equal == shared(one, other) // BLOCK
    longer = array.array("I", [*one, *other]).tobytes()
    assert block_ids(longer, BLOCK, ids(one)) == block_ids(longer, BLOCK)


@given(st.lists(prompts, max_size=8), prompts)
def test_what_is_found_was_sent_there(sent: list[list[int]], new: list[int]) -> None:
    """As long as nothing is forgotten: the longest beginning in whole blocks, of all but the last token."""
    index = PrefixIndex(BLOCK, 10_000)
    for prompt in sent:
        index.add(ids(prompt), len(prompt))
    most = max((shared(prompt, new) for prompt in sent), default=0)
    assert index.cached_tokens(ids(new), len(new)) == min(most, len(new) - 1) // BLOCK * BLOCK


@given(st.lists(prompts, max_size=12), st.integers(1, 30))
def test_it_holds_no_more_than_the_instance(sent: list[list[int]], capacity: int) -> None:
    """The least recently asked for goes, the ends of prompts before their beginnings."""
    index = PrefixIndex(BLOCK, capacity)
    for prompt in sent:
        index.add(ids(prompt), len(prompt))
        assert len(index) <= max(capacity // BLOCK, 1)
        held = index.cached_tokens(ids(prompt), len(prompt) + 1)
        assert held == min(len(ids(prompt)), max(capacity // BLOCK, 1)) * BLOCK


def test_what_left_before_it_was_computed_is_forgotten() -> None:
    """But not what was there before it came."""
    index = PrefixIndex(BLOCK, 1000)
    first, longer = [1] * 8, [1] * 8 + [2] * 8
    index.add(ids(first), len(first))
    found = index.cached_tokens(ids(longer), len(longer))
    index.add(ids(longer), len(longer))
    index.discard(ids(longer), found)
    assert index.cached_tokens(ids(longer), len(longer)) == 8


def view(name: str, *, holds: int = 0, queued: int = 0) -> InstanceView:
    """Return an instance with so many 1,000-token prompts waiting that holds the beginning of `LONG`."""
    queue = [QueuedRequest(request_id=f"{name}-{i}", arrival_s=0.0, prompt_tokens=1000, slo=SLO) for i in range(queued)]
    prefixes = PrefixIndex(100, 100_000)
    prefixes.add(LONG.prefix[:holds], 100 * holds)
    return InstanceView(worker_id=name, role=Role.UNIFIED, model=A100_LLAMA3_8B, queue=queue, prefixes=prefixes)


LONG = QueuedRequest(request_id="new", arrival_s=0.0, prompt_tokens=6000, slo=SLO, prefix=tuple(range(60)))


def chosen(*views: InstanceView, name: str = "least_predicted_work") -> str | None:
    """Return who gets `LONG`."""
    return place(LONG, list(views), PlacementPolicy(name=name), PlacementState(), BudgetPolicy()).worker_id


def test_a_cached_prompt_is_worth_a_queue_as_long_as_it_saves() -> None:
    """The holder is chosen while what waits there is less than what its cache saves."""
    for name in ("least_predicted_work", "tbt_bins"):
        assert chosen(view("empty"), view("holder", holds=50), name=name) == "holder"
        assert chosen(view("empty"), view("holder", holds=50, queued=4), name=name) == "holder"
        assert chosen(view("empty"), view("holder", holds=50, queued=7), name=name) == "empty"
        assert chosen(view("more", holds=50), view("less", holds=20), name=name) == "more"


def test_prefix_affinity_follows_the_longest_prefix_until_it_saturates() -> None:
    """Unlike the least predicted work, it stays a while where the first token comes later."""
    busy = view("holder", holds=50, queued=9)
    empty_s = queue_ttft_s(view("empty"), LONG, BudgetPolicy())
    assert empty_s < queue_ttft_s(busy, LONG, BudgetPolicy()) < empty_s + PlacementPolicy().saturation_s
    assert chosen(view("empty"), busy, name="prefix_affine") == "holder"
    assert chosen(view("empty"), view("holder", holds=50, queued=20), name="prefix_affine") == "empty"
    assert chosen(view("all", holds=50), view("some", holds=20), name="prefix_affine") == "all"


def test_of_many_instances_the_holder_is_always_compared() -> None:
    """However few are drawn."""
    views = [view(f"w{number:02d}") for number in range(60)] + [view("holder", holds=50)]
    policy, state = PlacementPolicy(compared=2), PlacementState()
    assert {place(LONG, views, policy, state, BudgetPolicy()).worker_id for _ in range(20)} == {"holder"}


def test_a_request_expects_what_is_cached_where_it_goes() -> None:
    """What it takes there is less by that, and the next one finds all of it."""
    source, target = view("source", holds=50), view("target")
    request = QueuedRequest(request_id="r", arrival_s=0.0, prompt_tokens=6000, slo=SLO, prefix=LONG.prefix)
    source.expects(request)
    assert request.remaining_tokens == 1000
    source.returns(request)
    assert source.cached_tokens(request) == 5000
    target.expects(request)
    target.receives(request)
    assert request.remaining_tokens == 6000
    assert target.cached_tokens(request) == 5900
