"""Late binding: requests wait in one ordered set, where they can still go anywhere, and instances draw from it.

Each instance has a short committed queue, so that its engine never idles; while that has room, the instance holds a
ticket for the set. The set is ordered and relegated as an engine's own queue is, with the speed of the whole pool. A
prompt of which an instance holds the beginning waits for that one as long as it is sooner done there.
"""

import enum
import heapq
import math
from bisect import bisect, insort
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from services.policy.fit import Fit, OrderKey, fit, place_in_order
from services.policy.order import OrderPolicy
from services.policy.placement import COMPARED
from services.policy.prefill import PrefillPace, instance_pace
from services.policy.prefix_finds import PrefixFinds
from services.policy.relegation import LATE, NONE, RelegatedTurns, late, moore_hodgson
from services.policy.state import InstanceView, QueuedRequest, Role
from services.policy.tickets import TicketPolicy, ticket_room
from services.policy.token_budget import BudgetPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class LateBindingPolicy:
    """When an instance has room."""

    committed_steps: float = 4.0
    """An instance has room for a request while less than this many full steps of prefill go before it there, the
    running one included. What its engine serves later does not keep an urgent request out."""
    max_committed: int = 8
    """Most requests queued at one instance; relegated ones, which wait behind all others there, not included."""
    refresh_s: float = 0.01
    """The set is ordered, and whom to give up decided, anew at most this often."""

    def __post_init__(self) -> None:
        if not self.committed_steps > 0 or self.max_committed < 1 or self.refresh_s < 0:
            raise ValueError("committed_steps must be above 0, max_committed at least 1, refresh_s at least 0")


class Instance(Protocol):
    """An instance that draws, with what is committed to it."""

    @property
    def view(self) -> InstanceView:
        """What is known of it."""

    @property
    def pace(self) -> PrefillPace:
        """How fast it prefills beside its present decodes."""

    @property
    def work_s(self) -> float:
        """Prefill work queued there in seconds, without that of relegated requests."""

    def add(self, request: QueuedRequest) -> None:
        """Count a request that goes there from now on."""


@dataclass(slots=True)
class Committed:
    """The plain Instance."""

    view: InstanceView
    pace: PrefillPace
    work_s: float

    @classmethod
    def of(cls, view: InstanceView, budget: BudgetPolicy) -> "Committed":
        """Sum up what an instance has queued."""
        pace = instance_pace(view, budget)
        return cls(view, pace, math.fsum(pace.remaining_work_s(one) for one in view.queue if not one.relegated))

    def add(self, request: QueuedRequest) -> None:
        """Count a request that goes there from now on."""
        self.view.expects(request)
        self.view.queue.append(request)
        if not request.relegated:
            self.work_s += self.pace.remaining_work_s(request)


class Draw(enum.StrEnum):
    """In which right an instance drew a request."""

    PLACE = "place"
    URGENT = "offload"
    """HP, because the LPs would miss it."""
    TICKET = "ticket"
    """HP, because it has nothing urgent to do."""


@dataclass(frozen=True, slots=True)
class Binding:
    """A request and where it goes."""

    request: QueuedRequest
    worker_id: str
    draw: Draw
    rule: str


@dataclass(slots=True)
class _Round:
    """One time that instances draw."""

    pool: Sequence[Instance]
    now_s: float
    split: bool = field(init=False)
    """There are LPs: HPs draw on tickets."""
    wanted_s: dict[str, float] = field(default_factory=dict)
    """By instance: the work of those that wait for it because it holds their prompts."""

    def __post_init__(self) -> None:
        self.split = any(one.view.role is not Role.HIGH for one in self.pool)

    def will_draw(self, instance: Instance) -> bool:
        """Whether an instance that has no room now is worth waiting for."""
        return _has_place(instance.view) and not _is_reserve(instance.view, self.split)


_Ranked = tuple[OrderKey, QueuedRequest]
_OVERDUE = "relegated; overdue"


class WaitingSet:
    """The requests that no instance owns yet, and who draws which; one a router."""

    def __init__(self, policy: LateBindingPolicy, order: OrderPolicy, tickets: TicketPolicy | None = None) -> None:
        """Start empty.

        Args:
            order: of the set; the engines' own.
            tickets: when HP instances take what is not urgent; None: never.
        """
        self.policy = policy
        self.order = order
        self._tickets = tickets
        self._turns = RelegatedTurns(order.relegated_share)
        self._ranked: list[_Ranked] = []
        """Those that one instance by itself could still serve in time."""
        self._late: deque[QueuedRequest] = deque()
        """The others, in the order in which they became late."""
        self._new: list[QueuedRequest] = []
        self._given_up: set[str] = set()
        """Of the ranked: those that the last schedule of all instances leaves out."""
        self._urgent: set[str] = set()
        """Of the ranked: those that only HP can save."""
        self._ranked_s = -math.inf
        self._finds = PrefixFinds()

    def __len__(self) -> int:
        """Return how many requests wait."""
        return len(self._ranked) + len(self._new) + len(self._late)

    @property
    def relegated(self) -> int:
        """How many of them are served behind all others."""
        return len(self._late)

    def backlog_tokens(self) -> int:
        """Return the prefill tokens that a newcomer waits for."""
        kept = sum(request.remaining_tokens for _, request in self._ranked if request.request_id not in self._given_up)
        return kept + sum(request.remaining_tokens for request in self._new)

    def add(self, request: QueuedRequest) -> None:
        """Take a request that has not started anywhere."""
        self._new.append(request)

    def discard(self, request_id: str) -> bool:
        """Let go of a request; False when it is not here."""
        before = len(self)
        self._finds.forget(request_id)
        self._new = [request for request in self._new if request.request_id != request_id]
        self._ranked = [entry for entry in self._ranked if entry[1].request_id != request_id]
        if len(self) == before:
            self._late = deque(request for request in self._late if request.request_id != request_id)
        return len(self) < before

    def earn(self, busy_s: float) -> None:
        """Add the share of a step to what overdue relegated requests may take."""
        self._turns.earn(busy_s)

    def refresh(self, pool: Sequence[Instance], now_s: float) -> list[QueuedRequest]:
        """Order the set and decide whom to give up, if that is due; return those relegated from now on.

        Args:
            pool: all instances that serve.
        """
        if not pool or not (self._ranked or self._new):
            return []
        pace = min(pool, key=_work).pace
        for request in (*(request for _, request in self._ranked), *self._new):
            if request.prefix:
                # Wherever it finds most of its prompt, there it goes, unless it is sooner done elsewhere.
                request.computed_tokens = self._finds.most_tokens(request, (one.view for one in pool), now_s)
        if now_s - self._ranked_s < self.policy.refresh_s:
            for request in self._new:
                insort(self._ranked, self._entry(request, pace, now_s), key=_key)
            self._new.clear()
            return []
        self._ranked_s = now_s
        relegated = self._relegate(pool, now_s)
        requests = [request for _, request in self._ranked] + self._new
        self._new.clear()
        self._ranked = sorted((self._entry(request, pace, now_s) for request in requests), key=_key)
        self._schedule(pool, pace, now_s)
        return relegated

    def draw(self, pool: Sequence[Instance], now_s: float, among: Sequence[Instance] | None = None) -> list[Binding]:
        """Let the instances that have room draw, emptiest first; each request is counted where it goes.

        Args:
            pool: all instances that serve.
            among: those that may have room; None: all.
        """
        bindings: list[Binding] = []
        instances = pool if among is None else among
        if self._urgent:
            for instance in instances:
                if instance.view.role is Role.HIGH:
                    bindings += self._draw_urgent(instance, now_s)
        round_ = _Round(pool, now_s)
        takes = self._takers(round_.split)
        takers = [one for one in instances if takes(one)]
        if len(takers) > COMPARED:
            takers = heapq.nsmallest(COMPARED, takers, key=_work)
        for request, rule in self._in_turn(now_s):
            fits = [(self._fit(request, one, now_s), one) for one in takers if takes(one)]
            if rule != _OVERDUE:
                fits = [(fit, one) for fit, one in fits if fit.ahead_s < self._room_s(one)]
            if not fits:
                break  # whoever comes after it in the order finds less room
            best, instance = min(fits, key=_preference)
            if not best.pays:
                continue
            if request.computed_tokens and not request.relegated:
                known = self._where_known(request, instance, fits, round_)
                if known is None:
                    continue
                instance = known
            bindings.append(self._bind(request, instance, round_.split, rule))
        return bindings

    def _takers(self, split: bool) -> Callable[[Instance], bool]:
        """Return the test whether an instance takes anything now: HPs beside LPs do on tickets only."""
        tickets = self._tickets if split else None
        tightest_s = min((request.slo.tbt_s for _, request in self._ranked), default=0.0) if tickets else 0.0

        def takes(instance: Instance) -> bool:
            view = instance.view
            if not _has_place(view) or sum(not one.relegated for one in view.queue) >= self.policy.max_committed:
                return False
            if not _is_reserve(view, split):
                return True
            return tickets is not None and _may_draw_ticket(instance, tickets, tightest_s)

        return takes

    def _in_turn(self, now_s: float) -> Iterator[tuple[QueuedRequest, str]]:
        """Yield the requests as their turns come, with the rule that says so."""
        for request in list(self._late):
            if self._turns.credit_s <= 0 or now_s - request.arrival_s < self.order.relegated_after_s:
                break
            yield request, _OVERDUE
        given_up = self._given_up
        for _, request in list(self._ranked):
            if request.request_id not in given_up:
                yield request, "first in the order"
        if all(request.request_id in given_up for _, request in self._ranked):
            # For others that are gone by now, and still in time.
            for _, request in list(self._ranked):
                yield request, "given up for others that are gone"
        for request in list(self._late):
            yield request, "relegated; there is room behind all others"

    def _where_known(
        self, request: QueuedRequest, instance: Instance, fits: Sequence[tuple[Fit, Instance]], round_: _Round
    ) -> Instance | None:
        """Return where a request of known prefix goes: where it is soonest done, with all that wants to go there.

        None: it waits for an instance that has no room yet, and is counted there.

        Args:
            fits: how it does on those that have room for it, `instance` the best of them otherwise.
        """
        wanted_s, finds = round_.wanted_s, self._finds
        done_s = {one.view.worker_id: fit.done_s + wanted_s.get(one.view.worker_id, 0.0) for fit, one in fits}
        by_id = {one.view.worker_id: one for _, one in fits}
        has_room = set(by_id)
        for one in round_.pool:
            worker_id = one.view.worker_id
            if worker_id not in by_id and finds.tokens(request, one.view) and round_.will_draw(one):
                by_id[worker_id] = one
                done_s[worker_id] = self._fit(request, one, round_.now_s).done_s + wanted_s.get(worker_id, 0.0)
        best = min(done_s, key=done_s.__getitem__)
        if done_s[best] >= done_s[instance.view.worker_id]:
            return instance
        if best in has_room:
            return by_id[best]
        wanted_s[best] = wanted_s.get(best, 0.0) + self._work_s(request, by_id[best])
        return None

    def _bind(self, request: QueuedRequest, instance: Instance, split: bool, rule: str) -> Binding:
        """Take a request out of the set, and count it where it goes."""
        if rule == _OVERDUE:
            self._turns.spend(self._work_s(request, instance))
        self.discard(request.request_id)
        request.ticketed = _is_reserve(instance.view, split)
        instance.add(request)
        draw, why = (Draw.TICKET, "an HP worker has room") if request.ticketed else (Draw.PLACE, "most room")
        return Binding(request, instance.view.worker_id, draw, f"{rule}; {why}")

    def _entry(self, request: QueuedRequest, pace: PrefillPace, now_s: float) -> _Ranked:
        return place_in_order(request, pace, self.order, now_s), request

    def _fit(self, request: QueuedRequest, instance: Instance, now_s: float) -> Fit:
        own_s = self._work_s(request, instance)
        return fit(request, own_s, instance.view, instance.pace, self.order, now_s)

    def _work_s(self, request: QueuedRequest, instance: Instance) -> float:
        """Return the prefill work of a request on an instance: what its prefix cache does not save."""
        cached = self._finds.tokens(request, instance.view)
        return instance.pace.work_s(request.prompt_tokens - cached, cached)

    def _room_s(self, instance: Instance) -> float:
        return self.policy.committed_steps * instance.pace.capacity_s

    def _relegate(self, pool: Sequence[Instance], now_s: float) -> list[QueuedRequest]:
        """Move the requests that no instance by itself could serve in time to the late ones; return them."""
        if self.order.relegation == NONE:
            return []

        def in_time(request: QueuedRequest) -> bool:
            # Without caution: what only may be late keeps its place, for here is no second chance.
            left_s = request.deadline_s - now_s
            return any(one.view.hop_s + one.pace.alone_s(request) <= left_s for one in pool)

        late_ones = [request for _, request in self._ranked if not in_time(request)]
        late_ones += [request for request in self._new if not in_time(request)]
        if late_ones:
            gone = {request.request_id for request in late_ones}
            self._ranked = [entry for entry in self._ranked if entry[1].request_id not in gone]
            self._new = [request for request in self._new if request.request_id not in gone]
            self._late.extend(late_ones)
            for request in late_ones:
                request.relegated = True
        return late_ones

    def _schedule(self, pool: Sequence[Instance], pace: PrefillPace, now_s: float) -> None:
        """Choose anew whom to give up, and whom of the others only HP can save."""
        self._given_up, self._urgent = set(), set()
        if self.order.relegation == NONE:
            return
        self._given_up = self._left_out(pool, pace, now_s)
        low = [instance for instance in pool if instance.view.role is not Role.HIGH]
        if low and len(low) < len(pool):
            self._urgent = self._left_out(low, pace, now_s) - self._given_up

    def _left_out(self, instances: Sequence[Instance], pace: PrefillPace, now_s: float) -> set[str]:
        """Return the requests without which these instances serve all others in time."""
        caution = self.order.caution
        hop_s = min(instance.view.hop_s for instance in instances)
        # The pool works on many at once, but each request by itself takes as long as on one instance.
        alone_share = caution * (1 - 1 / len(instances))
        works_s = [pace.remaining_work_s(request) for _, request in self._ranked]
        rooms_s = [
            request.deadline_s - now_s - hop_s - alone_share * pace.finish_s(work_s)
            for (_, request), work_s in zip(self._ranked, works_s, strict=True)
        ]
        committed = sorted(
            (place_in_order(queued, one.pace, self.order, now_s), one.pace.remaining_work_s(queued))
            for one in instances
            for queued in one.view.queue
            if not queued.relegated
        )
        places = [place for place, _ in committed]
        through_s = [0.0, *accumulate(work_s for _, work_s in committed)]
        # What is committed but served after a request does not delay it.
        later_s = [through_s[-1] - through_s[bisect(places, place)] for place, _ in self._ranked]
        speed = math.fsum(one.pace.capacity_s / one.pace.step_s for one in instances) / caution
        choose = late if self.order.relegation == LATE else moore_hodgson
        limits_s = [room_s * speed + behind_s for room_s, behind_s in zip(rooms_s, later_s, strict=True)]
        dropped = choose(limits_s, works_s, through_s[-1])
        return {self._ranked[place][1].request_id for place in dropped}

    def _draw_urgent(self, instance: Instance, now_s: float) -> list[Binding]:
        """Let HP take what only HP can save, as far as it makes it."""
        view, pace = instance.view, instance.pace
        bindings: list[Binding] = []
        due_s = math.fsum(pace.remaining_work_s(one) for one in view.queue if one.started or one.urgent)
        for _, request in [entry for entry in self._ranked if entry[1].request_id in self._urgent]:
            if not _has_place(view) or due_s >= self._room_s(instance):
                break
            work_s = self._work_s(request, instance)
            ahead = (one for one in view.queue if one.started or one.deadline_s <= request.deadline_s)
            ahead_s = math.fsum(map(pace.remaining_work_s, ahead))
            if now_s + view.hop_s + self.order.caution * pace.finish_s(ahead_s + work_s) > request.deadline_s:
                continue
            self.discard(request.request_id)
            request.urgent = True
            instance.add(request)
            due_s += work_s
            bindings.append(Binding(request, view.worker_id, Draw.URGENT, "the LP workers would miss it"))
        return bindings


def _may_draw_ticket(instance: Instance, tickets: TicketPolicy, tbt_s: float) -> bool:
    held = sum(request.ticketed for request in instance.view.queue)
    return held < tickets.leases and not ticket_room(instance.view, instance.pace, tickets, tbt_s)


def _has_place(view: InstanceView) -> bool:
    """Whether an instance takes requests at all: they are resident until they end."""
    return not view.draining and view.decodes + len(view.queue) < view.max_num_seqs


def _is_reserve(view: InstanceView, split: bool) -> bool:
    """Whether an instance is an HP beside LPs, which draws on tickets."""
    return split and view.role is Role.HIGH


def _preference(entry: tuple[Fit, Instance]) -> tuple[bool, bool, int, bool, float]:
    return entry[0].preference


def _work(instance: Instance) -> float:
    return instance.work_s


def _key(entry: _Ranked) -> tuple[float, int, float, str]:
    return entry[0]
