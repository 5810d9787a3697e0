"""How a request that waits elsewhere would fit into an instance's queue: who goes first, and who would miss for it."""

from dataclasses import dataclass

from services.policy.order import OrderPolicy
from services.policy.prefill import PrefillPace
from services.policy.state import InstanceView, QueuedRequest
from services.policy.telemetry import OTHERS
from services.policy.value_functions import order_key, value_function

OrderKey = tuple[float, int, float, str]


@dataclass(frozen=True, slots=True)
class Fit:
    """A request on an instance. Times are seconds from now, the way there included."""

    ahead_s: float
    """Prefill work queued there that the engine serves before it."""
    done_s: float
    """Until its first token: behind all that waits there if it makes its deadline even so, else behind `ahead_s`."""
    makes_it: bool
    victims: int
    """Requests there that would make it but for this one."""
    pays: bool
    """Nobody would miss for it, or only one that takes longer: whom Moore-Hodgson would give up."""
    idle: bool
    """Nothing waits there."""

    @property
    def preference(self) -> tuple[bool, bool, int, bool, float]:
        """Sort the instances that have room for a request, best first.

        While it makes it, the one with least work in all, not the least ahead of it: whoever waits is not passed by one
        newcomer after the other. Of two idle ones, the one with fewer decodes is sooner done with a long prompt.
        """
        return not self.makes_it, not self.pays, self.victims, not self.idle, self.done_s


def place_in_order(request: QueuedRequest, pace: PrefillPace, order: OrderPolicy, now_s: float) -> OrderKey:
    """Return what a request is ordered by among those that wait with it."""
    value_s = value_function(order.value_function)(request, pace.alone_s(request), now_s)
    return order_key(value_s, request)


def fit(
    request: QueuedRequest, own_s: float, view: InstanceView, pace: PrefillPace, order: OrderPolicy, now_s: float
) -> Fit:
    """Say how a request would do on an instance, and those who wait there.

    Args:
        own_s: its prefill work there.
        order: the engine's.
    """
    start_s = now_s + view.hop_s

    def in_time(work_s: float, deadline_s: float) -> bool:
        return start_s + order.caution * pace.finish_s(work_s) <= deadline_s

    ahead_s, behind = _split(request, view, pace, order, now_s)
    makes_it = in_time(ahead_s + own_s, request.deadline_s)
    victims_s = []
    done_s = ahead_s
    for _, work_s, deadline_s in behind:
        done_s += work_s
        if in_time(done_s, deadline_s) and not in_time(done_s + own_s, deadline_s):
            victims_s.append(work_s)
    return Fit(
        ahead_s=ahead_s,
        done_s=view.hop_s + pace.finish_s((done_s if makes_it else ahead_s) + own_s),
        makes_it=makes_it,
        victims=len(victims_s),
        pays=not victims_s or (len(victims_s) == 1 and victims_s[0] >= own_s),
        idle=done_s <= 0,
    )


def _split(
    request: QueuedRequest, view: InstanceView, pace: PrefillPace, order: OrderPolicy, now_s: float
) -> tuple[float, list[tuple[OrderKey, float, float]]]:
    """Return the work that is served before a request, and (place in the order, work, deadline) of what comes after."""
    if request.relegated:
        return sum(map(pace.remaining_work_s, view.queue)), []
    own_place = place_in_order(request, pace, order, now_s)
    ahead_s = 0.0
    behind = []
    for queued in view.queue:
        if queued.relegated:
            continue
        work_s = pace.remaining_work_s(queued)
        place = place_in_order(queued, pace, order, now_s)
        fixed = queued.started and not order.pause_started
        if fixed or queued.continued or queued.request_id == OTHERS or place < own_place:
            ahead_s += work_s
        else:
            behind.append((place, work_s, queued.deadline_s))
    behind.sort()
    return ahead_s, behind
