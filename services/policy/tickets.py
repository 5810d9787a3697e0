"""Tickets: short leases with which an HP instance without urgent work draws waiting requests from LP instances."""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.policy.prefill import PrefillPace
from services.policy.state import InstanceView, QueuedRequest
from services.policy.step_time import StepShape


@dataclass(frozen=True, slots=True, kw_only=True)
class TicketPolicy:
    """When tickets are issued, and for how long they hold."""

    leases: int = 2
    """Most live tickets of one instance; 0 turns tickets off."""
    lease_s: float = 0.2
    """A ticket that was not redeemed by then is void."""
    tbt_share: float = 0.8
    """Issue only while a step with the newcomers takes at most this share of the TBT objective."""
    kv_share: float = 0.8
    """Issue only while at most this share of the KV cache is in use."""
    backlog_share: float = 1.0
    """Issue only while the prefill work that waits on the instance takes less than this share of the TBT objective:
    about what one step takes in."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """The right to send one waiting request to `holder`'s issuer."""

    ticket_id: int
    issuer: str
    """Instance with room."""
    expires_s: float
    holder: str = ""
    """Instance that may give a request; empty while not granted."""


def ticket_room(view: InstanceView, pace: PrefillPace, policy: TicketPolicy, tbt_s: float) -> str:
    """Return why an instance should not issue tickets now, or an empty string if it may.

    Args:
        pace: the instance's.
        tbt_s: tightest TBT objective that it must keep; 0: none, and no bound by it.
    """
    if view.draining:
        return "draining"
    if any(request.urgent for request in view.queue):
        return "urgent requests wait"
    if tbt_s > 0 and sum(map(pace.remaining_work_s, view.queue)) >= policy.backlog_share * tbt_s:
        return "its own backlog fills a step"
    if view.decodes + len(view.queue) + policy.leases > view.max_num_seqs:
        return "no free sequence slots"
    if view.kv_capacity_tokens and view.kv_used_tokens > policy.kv_share * view.kv_capacity_tokens:
        return "KV cache is nearly full"
    mean_context = view.decode_context_tokens / view.decodes if view.decodes else 0.0
    decodes = view.decodes + policy.leases
    step_s = view.model.step_s(StepShape(0, decodes, int(decodes * mean_context)))
    return "decodes fill the step" if tbt_s > 0 and step_s > policy.tbt_share * tbt_s else ""


class TicketLedger:
    """All live tickets; never more of one instance than its leases."""

    def __init__(self, policy: TicketPolicy) -> None:
        self.policy = policy
        self._live: dict[int, Ticket] = {}
        """By id, in the order in which they expire."""
        self._of: dict[str, set[int]] = {}
        """Ids by issuer."""
        self._ids = itertools.count(1)

    @property
    def free(self) -> bool:
        """Whether some ticket is not granted."""
        return any(not ticket.holder for ticket in self._live.values())

    def live(self, issuer: str, now_s: float) -> int:
        """Return how many tickets of an instance are neither redeemed, revoked nor expired."""
        self._expire(now_s)
        return len(self._of.get(issuer, ()))

    def issue(self, instances: Iterable[tuple[str, str]], now_s: float) -> list[Ticket]:
        """Issue as many tickets as the instances with room may, and return them; revoke those of instances without.

        Args:
            instances: (worker id, what `ticket_room` said of it).
        """
        issued = []
        for issuer, obstacle in instances:
            if obstacle:
                self.revoke(issuer)
                continue
            for _ in range(self.policy.leases - self.live(issuer, now_s)):
                ticket = Ticket(next(self._ids), issuer, now_s + self.policy.lease_s)
                self._live[ticket.ticket_id] = ticket
                self._of.setdefault(issuer, set()).add(ticket.ticket_id)
                issued.append(ticket)
        return issued

    def grant(self, backlogs_s: dict[str, float], request_s: float, now_s: float) -> list[Ticket]:
        """Give the free tickets to the most backlogged instances and return those given.

        Args:
            backlogs_s: seconds of waiting work by instance that could give some away.
            request_s: seconds of work of a typical request; lowers a backlog for each ticket it gets.
        """
        self._expire(now_s)
        left_s = {worker_id: backlog_s for worker_id, backlog_s in backlogs_s.items() if backlog_s > 0}
        granted = []
        for ticket in list(self._live.values()):
            others = [worker_id for worker_id in left_s if worker_id != ticket.issuer]
            if ticket.holder or not others:
                continue
            holder = max(others, key=lambda worker_id: (left_s[worker_id], worker_id))
            left_s[holder] -= max(request_s, 1e-6)
            if left_s[holder] <= 0:
                del left_s[holder]
            granted.append(self._hand(ticket, holder))
        return granted

    def redeem(self, ticket_id: int, now_s: float) -> bool:
        """Use a granted ticket up; False when it has expired, was revoked or used, or was never granted."""
        self._expire(now_s)
        ticket = self._live.get(ticket_id)
        if ticket is None or not ticket.holder:
            return False
        self._end(ticket)
        return True

    def release(self, ticket_id: int) -> None:
        """Take a granted ticket back from an instance that has nothing to give for it; another may get it."""
        if ticket := self._live.get(ticket_id):
            self._hand(ticket, "")

    def revoke(self, issuer: str) -> int:
        """Void all tickets of an instance (urgent work arrived, or it is gone) and return how many there were."""
        void = self._of.pop(issuer, ())
        for ticket_id in void:
            del self._live[ticket_id]
        return len(void)

    def _hand(self, ticket: Ticket, holder: str) -> Ticket:
        handed = Ticket(ticket.ticket_id, ticket.issuer, ticket.expires_s, holder)
        self._live[ticket.ticket_id] = handed
        return handed

    def _end(self, ticket: Ticket) -> None:
        del self._live[ticket.ticket_id]
        own = self._of[ticket.issuer]
        own.discard(ticket.ticket_id)
        if not own:
            del self._of[ticket.issuer]

    def _expire(self, now_s: float) -> None:
        while self._live:
            oldest = next(iter(self._live.values()))
            if oldest.expires_s > now_s:
                return
            self._end(oldest)


def choose_for_ticket(
    ordered: Sequence[QueuedRequest], next_step_tokens: int, taker: InstanceView
) -> QueuedRequest | None:
    """Return which waiting request an instance gives for a ticket: the first that its own next step will not reach.

    One that a prefix cache saves more where it is stays: it would cost more than it relieves.

    Args:
        ordered: its queue as order_waiting returned it; relegated requests come last and so are given last.
        next_step_tokens: prefill tokens of its next step.
        taker: where the request would go.
    """
    tokens = 0
    for request in ordered:
        may_go = not (request.started or request.ticketed or request.urgent)
        if may_go and tokens >= next_step_tokens and request.computed_tokens <= taker.cached_tokens(request):
            return request
        tokens += request.remaining_tokens
    return None
