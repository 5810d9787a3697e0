"""Late binding: nobody is lost or bound twice, queues stay short, no instance idles while somebody waits."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.policy.late_binding import Binding, Committed, Draw, LateBindingPolicy, WaitingSet
from services.policy.order import OrderPolicy
from services.policy.prefix import PrefixIndex
from services.policy.relegation import RULES
from services.policy.state import InstanceView, QueuedRequest, Role, Slo
from services.policy.step_time import A100_LLAMA3_8B
from services.policy.tickets import TicketPolicy
from services.policy.token_budget import BudgetPolicy
from services.policy.value_functions import VALUE_FUNCTIONS

BUDGET = BudgetPolicy()
POLICY = LateBindingPolicy(committed_steps=2.0, refresh_s=0.0)
TICKETS = TicketPolicy(leases=2)


BLOCK_TOKENS = 100


def request(
    name: str, tokens: int = 500, *, arrival_s: float = 0.0, ttft_s: float = 1.0, talk: int = 0
) -> QueuedRequest:
    """Return a request that waits; those of one talk (0: none) begin with the same prompt."""
    return QueuedRequest(
        request_id=name,
        arrival_s=arrival_s,
        prompt_tokens=tokens,
        slo=Slo(ttft_s=ttft_s, tbt_s=0.1),
        prefix=[1000 * talk + place for place in range(tokens // BLOCK_TOKENS)] if talk else (),
    )


def view(name: str, role: Role = Role.UNIFIED, **changes: Any) -> InstanceView:
    """Return an idle instance."""
    return InstanceView(worker_id=name, role=role, model=A100_LLAMA3_8B, **changes)


def holder(name: str, talk: int, tokens: int, **changes: Any) -> InstanceView:
    """Return an instance that computed a talk's prompt."""
    one = view(name, prefixes=PrefixIndex(BLOCK_TOKENS), **changes)
    one.receives(request("before", tokens, talk=talk))
    return one


def pool(*views: InstanceView) -> list[Committed]:
    """Return the instances with what is committed to them."""
    return [Committed.of(one, BUDGET) for one in views]


def turn(waiting: WaitingSet, views: list[InstanceView], now_s: float = 0.0) -> list[Binding]:
    """Order the set and let everybody draw."""
    instances = pool(*views)
    waiting.refresh(instances, now_s)
    return waiting.draw(instances, now_s)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 6000), min_size=1, max_size=30),
    name=st.sampled_from(sorted(VALUE_FUNCTIONS)),
    relegation=st.sampled_from(RULES),
    hp=st.integers(0, 2),
)
def test_everybody_is_bound_once_and_queues_stay_short(tokens: list[int], name: str, relegation: str, hp: int) -> None:
    """However it is ordered and whoever is given up: served in turns, all are bound exactly once."""
    waiting = WaitingSet(POLICY, OrderPolicy(value_function=name, relegation=relegation), TICKETS)
    views = [view("a", Role.LOW if hp else Role.UNIFIED), view("b", Role.LOW if hp else Role.UNIFIED)]
    views += [view(f"h{index}", Role.HIGH) for index in range(hp)]
    for index, count in enumerate(tokens):
        waiting.add(request(f"r{index}", count, arrival_s=0.01 * index))
    bound: list[str] = []
    now_s = 0.0
    while waiting:
        drawn = turn(waiting, views, now_s)
        assert drawn, "idle instances draw"
        bound += [binding.request.request_id for binding in drawn]
        for one in pool(*views):
            kept = [queued for queued in one.view.queue if not queued.relegated]
            before_s = math.fsum(map(one.pace.remaining_work_s, kept[:-1]))
            assert before_s < POLICY.committed_steps * one.pace.capacity_s
            assert len(one.view.queue) <= 2 * POLICY.max_committed
            assert sum(queued.ticketed for queued in one.view.queue) <= TICKETS.leases
        for one_view in views:  # everything committed is served
            one_view.queue.clear()
        now_s += 0.2
    assert sorted(bound) == sorted(f"r{index}" for index in range(len(tokens)))


@settings(max_examples=40, deadline=None)
@given(tokens=st.lists(st.integers(1, 6000), min_size=1, max_size=20), name=st.sampled_from(sorted(VALUE_FUNCTIONS)))
def test_the_order_is_the_engines_own(tokens: list[int], name: str) -> None:
    """One instance draws one after the other exactly as its engine would order them."""
    order = OrderPolicy(value_function=name, relegation="none")
    waiting = WaitingSet(replace(POLICY, max_committed=1, committed_steps=1e-6), order)
    requests = [request(f"r{index}", count, arrival_s=0.01 * index) for index, count in enumerate(tokens)]
    for one in requests:
        waiting.add(one)
    only = view("a")
    [instance] = pool(only)
    expected = sorted(
        requests, key=lambda r: (VALUE_FUNCTIONS[name](r, instance.pace.alone_s(r), 5.0), r.arrival_s, r.request_id)
    )
    drawn = []
    while waiting:
        drawn += turn(waiting, [only], 5.0)
        only.queue.clear()
    assert [binding.request.request_id for binding in drawn] == [one.request_id for one in expected]


def test_the_emptiest_draws_first_and_nobody_idles() -> None:
    """Requests spread; what is beyond the committed queues waits, and is drawn where room comes first."""
    waiting = WaitingSet(POLICY, OrderPolicy())
    views = [view("a"), view("b")]
    for index in range(2):
        waiting.add(request(f"r{index}", 6000, ttft_s=60))
    assert {binding.worker_id for binding in turn(waiting, views)} == {"a", "b"}
    waiting.add(request("r2", ttft_s=60))
    assert turn(waiting, views) == []
    views[1].queue.clear()
    [binding] = turn(waiting, views)
    assert (binding.worker_id, binding.draw) == ("b", Draw.PLACE)


def test_who_can_make_it_is_not_relegated() -> None:
    """Only a request that no instance could serve in time by itself is; it goes behind the others."""
    waiting = WaitingSet(POLICY, OrderPolicy())
    busy = view("a", queue=[request("x", 8000, ttft_s=60)])
    lost, saved = request("lost", 8000, ttft_s=0.5), request("saved", 500, ttft_s=0.5)
    waiting.add(lost)
    waiting.add(saved)
    assert waiting.refresh(pool(busy), 0.0) == [lost]
    assert (lost.relegated, saved.relegated) == (True, False)
    busy.queue.clear()
    first, second = turn(waiting, [busy])
    assert (first.request.request_id, second.request.request_id) == ("saved", "lost")


def test_an_instance_with_slow_decodes_relegates_nobody() -> None:
    """It has nothing queued, but beside its decodes no long prompt makes it; on the busy one, one may."""
    slow = view("a", decodes=40, decode_context_tokens=40_000, min_tbt_s=0.03)
    busy = view("b", queue=[request("x", 5000, ttft_s=0.5)])
    for views, relegated in (([slow], 1), ([slow, busy], 0)):
        waiting = WaitingSet(POLICY, OrderPolicy())
        waiting.add(request("long", 6000, ttft_s=1.0))
        assert len(waiting.refresh(pool(*views), 0.0)) == relegated


def test_an_overdue_relegated_request_gets_its_turn() -> None:
    """With credit it goes ahead of those that can make it."""
    order = OrderPolicy(relegated_after_s=5.0)
    waiting = WaitingSet(replace(POLICY, max_committed=1), order)
    waiting.add(request("old", 500, ttft_s=0.1))
    waiting.refresh(pool(view("a")), 1.0)
    waiting.add(request("new", 500, arrival_s=6.0))
    waiting.earn(10.0)
    [first, *_] = turn(waiting, [view("a")], 6.0)
    assert (first.request.request_id, first.rule) == ("old", "relegated; overdue; most room")


def test_hp_takes_what_only_hp_can_save() -> None:
    """LP is busy beyond a deadline that HP makes: HP draws it as urgent; what LP makes stays for LP."""
    waiting = WaitingSet(POLICY, OrderPolicy(), TICKETS)
    low, high = view("lp", Role.LOW, queue=[request("x", 4000, ttft_s=0.3)]), view("hp", Role.HIGH)
    waiting.add(request("tight", 500, ttft_s=0.4))
    [binding] = turn(waiting, [low, high])
    assert (binding.worker_id, binding.draw, binding.request.urgent) == ("hp", Draw.URGENT, True)


@pytest.mark.parametrize("tickets", [TICKETS, None])
def test_an_idle_hp_draws_on_tickets_only(tickets: TicketPolicy | None) -> None:
    """Nothing is urgent: HP takes up to its leases, and none without tickets or beside urgent work."""
    waiting = WaitingSet(POLICY, OrderPolicy(), tickets)
    low, high = view("lp", Role.LOW, queue=[request("x", 8000, ttft_s=50)]), view("hp", Role.HIGH)
    for index in range(4):
        waiting.add(request(f"r{index}", 100, ttft_s=60))
    drawn = turn(waiting, [low, high])
    assert [binding.draw for binding in drawn] == [Draw.TICKET] * (tickets.leases if tickets else 0)
    high.queue = [replace(request("u"), urgent=True)]
    assert turn(waiting, [low, high]) == []


def test_a_pool_of_hps_alone_draws_everything() -> None:
    """Without any LP an HP is a worker like all others."""
    waiting = WaitingSet(POLICY, OrderPolicy(), None)
    waiting.add(request("r"))
    [binding] = turn(waiting, [view("hp", Role.HIGH)])
    assert binding.draw is Draw.PLACE


def test_a_talk_goes_where_its_prompt_is() -> None:
    """Even past an idle instance, as far as it is sooner done behind what is queued there."""
    waiting = WaitingSet(POLICY, OrderPolicy())
    waiting.add(request("next", 6000, ttft_s=60, talk=1))
    waiting.add(request("other", 6000, arrival_s=0.1, ttft_s=60))
    drawn = turn(waiting, [view("a"), holder("b", 1, 5900, queue=[request("x", 500)])])
    assert {binding.request.request_id: binding.worker_id for binding in drawn} == {"next": "b", "other": "a"}
    assert [binding.request.computed_tokens for binding in drawn if binding.worker_id == "b"] == [5900]


def test_a_talk_waits_for_room_where_its_prompt_is() -> None:
    """Others pass it meanwhile; once what its cache saves is less than the wait, it goes anywhere."""
    waiting = WaitingSet(POLICY, OrderPolicy())
    short, long = (view("a"), [request("x", 5000, ttft_s=50)]), (view("a"), [request("x", 8000, ttft_s=50)])
    waiting.add(request("next", 6000, ttft_s=60, talk=1))
    assert turn(waiting, [short[0], holder("b", 1, 5900, queue=short[1])]) == []
    waiting.add(request("other", 1000, arrival_s=0.1, ttft_s=60))
    [binding] = turn(waiting, [short[0], holder("b", 1, 5900, queue=short[1])])
    assert (binding.request.request_id, binding.worker_id) == ("other", "a")
    [binding] = turn(waiting, [long[0], holder("b", 1, 5900, queue=long[1])], 1.0)
    assert (binding.request.request_id, binding.worker_id) == ("next", "a")


def test_a_full_holder_is_not_waited_for() -> None:
    """What it runs may take minutes: its prompt is computed again elsewhere."""
    waiting = WaitingSet(POLICY, OrderPolicy())
    waiting.add(request("next", 6000, ttft_s=60, talk=1))
    full = holder("b", 1, 5900, decodes=8, max_num_seqs=8, min_tbt_s=0.1)
    assert [binding.worker_id for binding in turn(waiting, [view("a"), full])] == ["a"]


def test_those_who_wait_for_a_holder_make_a_queue() -> None:
    """A prompt that everybody begins with does not send everybody to who computed it first."""
    waiting = WaitingSet(POLICY, OrderPolicy())
    for index in range(20):
        waiting.add(request(f"r{index:02}", 2000 + 10 * index, ttft_s=60, talk=1))
    busy = [request(f"x{index}", 100, ttft_s=60) for index in range(POLICY.max_committed)]
    drawn = turn(waiting, [view("a"), holder("b", 1, 1500, queue=busy)])
    assert drawn
    assert {binding.worker_id for binding in drawn} == {"a"}
    assert "r00" < drawn[0].request.request_id < "r06", "the first few wait for what is computed"


def test_an_urgent_request_has_room_before_what_is_served_later() -> None:
    """A long prompt with a far deadline does not keep it out; one with a deadline before its own does."""
    waiting = WaitingSet(POLICY, OrderPolicy())
    waiting.add(request("tight", 500, ttft_s=1.0))
    assert turn(waiting, [view("a", queue=[request("x", 8000, ttft_s=0.9)])]) == []
    [binding] = turn(waiting, [view("a", queue=[request("x", 8000, ttft_s=60)])])
    assert binding.request.request_id == "tight"


def test_nobody_is_passed_who_would_miss_for_it_and_takes_less() -> None:
    """It waits for another instance, or until the other is served; a shorter one passes: that is cheaper to keep."""
    [instance] = pool(view("a"))
    for tokens, passes in ((6000, False), (1000, True)):
        waiting = WaitingSet(POLICY, OrderPolicy())
        bound = request("bound", 3000, ttft_s=1.3 * instance.pace.alone_s(request("", 3000 if passes else 6000)))
        waiting.add(request("new", tokens, ttft_s=bound.slo.ttft_s - 0.01))
        drawn = turn(waiting, [view("a", queue=[bound])])
        assert bool(drawn) is passes
        drawn += turn(waiting, [view("a", queue=[bound]), view("b")])
        assert [binding.worker_id for binding in drawn] == ["a" if passes else "b"]


class Waiting(RuleBasedStateMachine):
    """Arrivals, cancellations, steps and draws in any order, by two routers on the same instances."""

    def __init__(self) -> None:
        super().__init__()
        self.sets = [WaitingSet(LateBindingPolicy(), OrderPolicy(), TICKETS) for _ in range(2)]
        self.views = [
            view(name, role, prefixes=PrefixIndex(BLOCK_TOKENS, 20_000))
            for name, role in (("a", Role.LOW), ("b", Role.LOW), ("h", Role.HIGH))
        ]
        self.waiting: list[set[str]] = [set(), set()]
        self.bound: set[str] = set()
        self.now_s = 0.0
        self.count = 0

    @rule(router=st.integers(0, 1), tokens=st.integers(1, 8000), ttft_s=st.floats(0.05, 5), talk=st.integers(0, 3))
    def arrive(self, router: int, tokens: int, ttft_s: float, talk: int) -> None:
        """A request comes."""
        self.count += 1
        name = f"r{self.count}"
        self.sets[router].add(request(name, tokens, arrival_s=self.now_s, ttft_s=ttft_s, talk=talk))
        self.waiting[router].add(name)

    @rule(router=st.integers(0, 1), data=st.data())
    def cancel(self, router: int, data: st.DataObject) -> None:
        """A client gives up: what waits is let go, what is bound is not here."""
        names = sorted(self.waiting[router] | self.bound)
        if names:
            name = data.draw(st.sampled_from(names))
            assert self.sets[router].discard(name) == (name in self.waiting[router])
            self.waiting[router].discard(name)

    @rule(router=st.integers(0, 1), passed_s=st.floats(0, 0.5))
    def draw(self, router: int, passed_s: float) -> None:
        """Time passes and instances draw."""
        self.now_s += passed_s
        for binding in turn(self.sets[router], self.views, self.now_s):
            name = binding.request.request_id
            assert name in self.waiting[router]
            self.waiting[router].remove(name)
            assert name not in self.bound
            self.bound.add(name)
            next(one for one in self.views if one.worker_id == binding.worker_id).receives(binding.request)
            assert (binding.draw is Draw.PLACE) == (binding.worker_id != "h")

    @rule(index=st.integers(0, 2))
    def serve(self, index: int) -> None:
        """An instance finishes what it has."""
        self.views[index].queue.clear()
        self.sets[index % 2].earn(0.1)

    @rule()
    def drain(self) -> None:
        """Idle instances draw until nobody waits, whatever they hold."""
        for router in (0, 1):
            for _ in range(10 * len(self.sets[router])):
                self.draw(router, 0.5)
                for index in range(3):
                    self.serve(index)
            assert not self.sets[router]

    @invariant()
    def sets_agree(self) -> None:
        """What was neither bound nor cancelled waits."""
        assert [len(one) for one in self.sets] == [len(names) for names in self.waiting]


TestWaiting = Waiting.TestCase
TestWaiting.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_of_two_idle_instances_the_one_with_fewer_decodes_draws() -> None:
    """Nothing is queued on either, but decodes slow a long prompt down."""
    waiting = WaitingSet(POLICY, OrderPolicy())
    waiting.add(request("long", 6000))
    busy = view("a", decodes=80, decode_context_tokens=100_000, min_tbt_s=0.1)
    assert [binding.worker_id for binding in turn(waiting, [busy, view("b")])] == ["b"]
