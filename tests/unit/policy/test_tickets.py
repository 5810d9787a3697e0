"""Tickets are leases, and never more of them live than an instance has."""

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from services.policy.prefill import PrefillPace, instance_pace
from services.policy.prefix import PrefixIndex
from services.policy.state import InstanceView, QueuedRequest, Role, Slo
from services.policy.step_time import A100_LLAMA3_8B, StepTimeBin, StepTimeModel
from services.policy.tickets import TicketLedger, TicketPolicy, choose_for_ticket, ticket_room
from services.policy.token_budget import BudgetPolicy

POLICY = TicketPolicy(leases=2, lease_s=0.2)


def waiting(name: str = "r", tokens: int = 100, **flags: Any) -> QueuedRequest:
    """Return a waiting request."""
    return QueuedRequest(request_id=name, arrival_s=0, prompt_tokens=tokens, slo=Slo(ttft_s=1, tbt_s=0.1), **flags)


def instance(name: str = "hp", **changes: object) -> InstanceView:
    """Return an idle HP instance."""
    return InstanceView(worker_id=name, role=Role.HIGH, model=A100_LLAMA3_8B, **changes)  # type: ignore[arg-type]


def paced(view: InstanceView) -> tuple[InstanceView, PrefillPace]:
    """Return an instance with its pace."""
    return view, instance_pace(view, BudgetPolicy())


def room(view: InstanceView) -> tuple[str, str]:
    """Return an instance with what keeps it from issuing tickets."""
    return view.worker_id, ticket_room(*paced(view), POLICY, 0.1)


def test_life_of_a_ticket() -> None:
    """Issued, granted to the most backlogged, redeemed once."""
    ledger = TicketLedger(POLICY)
    issued = ledger.issue([room(instance())], 0.0)
    assert len(issued) == 2
    granted = ledger.grant({"lp1": 0.5, "lp2": 2.0}, 1.0, 0.0)
    assert [ticket.holder for ticket in granted] == ["lp2", "lp2"]
    assert ledger.redeem(granted[0].ticket_id, 0.1)
    assert not ledger.redeem(granted[0].ticket_id, 0.1)
    assert ledger.live("hp", 0.1) == 1
    assert not ledger.redeem(granted[1].ticket_id, 0.2)


def test_tickets_spread_as_backlogs_fall() -> None:
    """Each grant counts against the backlog at once, and nobody without backlog gets one."""
    ledger = TicketLedger(TicketPolicy(leases=4))
    ledger.issue([room(instance())], 0.0)
    granted = ledger.grant({"lp1": 1.5, "lp2": 1.0, "lp3": 0.0, "hp": 9.0}, 1.0, 0.0)
    assert sorted(ticket.holder for ticket in granted) == ["lp1", "lp1", "lp2"]


def test_an_instance_with_nothing_to_give_blocks_no_ticket() -> None:
    """What it releases goes to the next most backlogged at once, not when the lease is over."""
    ledger = TicketLedger(POLICY)
    ledger.issue([room(instance())], 0.0)
    for ticket in ledger.grant({"lp1": 5.0, "lp2": 0.5}, 0.1, 0.0):
        assert ticket.holder == "lp1"
        ledger.release(ticket.ticket_id)
    again = ledger.grant({"lp2": 0.5}, 0.1, 0.0)
    assert [ticket.holder for ticket in again] == ["lp2", "lp2"]
    assert ledger.redeem(again[0].ticket_id, 0.1)
    ledger.release(again[0].ticket_id)
    assert ledger.live("hp", 0.1) == 1


def test_urgent_arrival_revokes() -> None:
    """An instance with urgent work issues none and loses those it had."""
    ledger = TicketLedger(POLICY)
    ledger.issue([room(instance())], 0.0)
    granted = ledger.grant({"lp": 5.0}, 0.1, 0.0)
    assert ledger.issue([room(instance(queue=[waiting(urgent=True)]))], 0.0) == []
    assert not ledger.redeem(granted[0].ticket_id, 0.01)


def test_room_names_what_is_missing() -> None:
    """Every admission condition closes the door by itself."""
    closed = [
        instance(draining=True),
        instance(queue=[waiting(urgent=True)]),
        instance(queue=[waiting(tokens=5000)]),
        instance(decodes=255),
        instance(kv_used_tokens=81, kv_capacity_tokens=100),
        instance(decodes=200, decode_context_tokens=800_000),
    ]
    assert ticket_room(*paced(instance()), POLICY, 0.1) == ""
    reasons = [ticket_room(*paced(view), POLICY, 0.1) for view in closed]
    assert all(reasons)
    assert len(set(reasons)) == len(closed)


def test_room_is_measured_in_time() -> None:
    """What fills a step of a slow engine leaves room on a fast one."""
    slow = StepTimeModel(bins=(StepTimeBin(max_tokens=0, a0=0.04, a2=0.002),))
    views = [instance(queue=[waiting(tokens=256)]), instance(queue=[waiting(tokens=256)])]
    views[1].model = slow
    assert [bool(ticket_room(*paced(view), POLICY, 0.2)) for view in views] == [False, True]


def test_the_first_request_out_of_reach_is_given() -> None:
    """Not what the next step serves anyway, and nothing that has started or came here by ticket itself."""
    queue = [waiting("next", 600), waiting("b", 10, started=True), waiting("c", 10, ticketed=True), waiting("given")]
    chosen = choose_for_ticket(queue, 512, instance())
    assert chosen is not None
    assert chosen.request_id == "given"
    assert choose_for_ticket(queue[:1], 512, instance()) is None


def test_what_a_prefix_cache_saves_more_stays() -> None:
    """A request moves to an HP only if that holds as much of it as its LP does."""
    cached = waiting("cached", 6000, computed_tokens=5000, prefix=tuple(range(60)))
    queue = [waiting("next", 600), cached, waiting("other")]
    taker = instance(prefixes=PrefixIndex(100, 100_000))
    for held, given in ((0, "other"), (4900, "other"), (5000, "cached")):
        assert taker.prefixes is not None
        taker.prefixes.add(cached.prefix, held)
        chosen = choose_for_ticket(queue, 512, taker)
        assert chosen is not None
        assert chosen.request_id == given


class Ledger(RuleBasedStateMachine):
    """Any sequence of events."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = TicketLedger(POLICY)
        self.now_s = 0.0
        self.seen: list[int] = []
        self.redeemed: set[int] = set()

    @rule(seconds=st.floats(0, 0.3))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds

    @rule(urgent=st.booleans(), name=st.sampled_from(["hp1", "hp2"]))
    def issue(self, urgent: bool, name: str) -> None:
        """Issue what may be."""
        view = instance(name, queue=[waiting(urgent=True)] if urgent else [])
        self.seen += [ticket.ticket_id for ticket in self.ledger.issue([room(view)], self.now_s)]

    @rule(backlog_s=st.floats(0, 3))
    def grant(self, backlog_s: float) -> None:
        """Grant to one instance."""
        self.ledger.grant({"lp": backlog_s}, 0.5, self.now_s)

    @rule(data=st.data())
    def redeem(self, data: st.DataObject) -> None:
        """Redeem some ticket, perhaps again."""
        if self.seen:
            ticket_id = data.draw(st.sampled_from(self.seen))
            if self.ledger.redeem(ticket_id, self.now_s):
                assert ticket_id not in self.redeemed
                self.redeemed.add(ticket_id)

    @invariant()
    def never_more_than_leases(self) -> None:
        """No instance has more live tickets than leases."""
        assert all(self.ledger.live(name, self.now_s) <= POLICY.leases for name in ("hp1", "hp2"))


TestLedger = Ledger.TestCase
TestLedger.settings = settings(max_examples=30, stateful_step_count=20, deadline=None)
