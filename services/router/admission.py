"""Who is let in: not while the router drains, not beyond its limit, and as services.policy.admission says."""

import heapq
from collections.abc import Callable, Iterable

from services.common.errors import ResourceExhausted, Unavailable
from services.policy.admission import AdmissionAction, admit
from services.policy.placement import COMPARED
from services.router.config import RouterConfig
from services.router.estimates import newcomer_ahead
from services.router.history import History
from services.router.placer import Placer
from services.router.request import LiveRequest, State
from services.router.worker_link import WorkerLink

RETRY_MS = 500
"""When to try again what a router refuses for reasons of its own."""


class Admission:
    """Lets requests in or refuses them."""

    def __init__(
        self, config: RouterConfig, placer: Placer, history: History, links: Callable[[], Iterable[WorkerLink]]
    ) -> None:
        self.open = True
        """False: the router drains."""
        self._config = config
        self._placer = placer
        self._history = history
        self._links = links

    def check(self, request: LiveRequest, live: int, held: int, held_tokens: int, now_s: float) -> None:
        """Let a request in; with a note when nobody makes its objective.

        Args:
            live: requests that the router serves already.
            held: those of them that wait in the router ...
            held_tokens: ... and the prefill tokens of those that a newcomer waits for.

        Raises:
            ServiceError: it is refused.
        """
        if not self.open:
            raise Unavailable("the router is draining", reason="DRAINING", retry_safe=True, retry_after_ms=RETRY_MS)
        if live >= self._config.max_live_requests:
            limit = self._config.max_live_requests
            raise self._refusal(request, f"the router serves {limit} requests already", "LIVE_LIMIT", RETRY_MS)
        links = [link for link in self._links() if link.takes_requests(now_s)]
        if not links:
            return  # it waits for a worker, for a while
        if request.has_tokens:
            return  # a stream that goes on was let in before, and is served before all that waits
        queued = request.queued()
        estimates = []
        # Of many, those with least to do: a newcomer must not cost (all workers).
        for link in heapq.nsmallest(COMPARED, links, key=lambda link: link.instance.queued_prefill_tokens):
            view = self._placer.view(link, now_s)
            ahead = newcomer_ahead(view, link.instance.budget, now_s)
            ahead.work_s += ahead.pace.token_s * (held_tokens // len(links))
            estimates.append(ahead.estimate(queued))
        waiting = sum(len(link.instance.glance(now_s).queue) for link in links)
        decision = admit(
            request.spec.slo,
            estimates,
            held + waiting,
            self._config.admission_policy,
            request.spec.refuse_hopeless,
            now_s - request.arrival_s,
        )
        if decision.action is AdmissionAction.REFUSE:
            self._history.note(request, "refuse", decision.reason)
            raise self._refusal(request, decision.reason, "OVERLOADED", round(decision.retry_after_s * 1000))
        if decision.action is AdmissionAction.RELEGATE:
            self._history.note(request, "hopeless", decision.reason)

    def _refusal(self, request: LiveRequest, message: str, reason: str, retry_after_ms: int) -> ResourceExhausted:
        request.fail(State.REFUSED)
        self._history.end(request, "refused")
        return ResourceExhausted(message, reason=reason, retry_safe=True, retry_after_ms=retry_after_ms)
