"""Where a request should go, and when its first token would come there; sends nothing.

A thin shell over services.policy.placement: it gathers the views of the workers and asks.
"""

from collections.abc import Callable, Iterable

from ascendra.v1 import cluster_pb2
from services.common.logging import get_logger
from services.policy.order import OrderPolicy
from services.policy.placement import Placement, PlacementPolicy, PlacementState, place, queue_ttft_s
from services.policy.state import InstanceView, QueuedRequest
from services.policy.token_budget import BudgetPolicy
from services.router.config import LATE, RouterConfig
from services.router.estimates import newcomer_in_order
from services.router.prediction import Predictions
from services.router.request import LiveRequest
from services.router.worker_link import WorkerLink

log = get_logger()


class Placer:
    """Chooses workers. Times are seconds on the router's monotonic clock."""

    def __init__(
        self, config: RouterConfig, predictions: Predictions, links: Callable[[], Iterable[WorkerLink]]
    ) -> None:
        self.predictions = predictions
        self._links = links
        name = PlacementPolicy().name if config.placement == LATE else config.placement
        # The pressure that elastic roles follow is that of HPs which serve nothing but what LPs would miss.
        self._policy = PlacementPolicy(name=name, hp_fill=0.0 if config.elastic_roles else config.hp_fill)
        self._default_budget = config.budget_policy
        self._state = PlacementState()
        self._orders: dict[tuple[str, str], OrderPolicy] = {}

    def view(self, link: WorkerLink, now_s: float) -> InstanceView:
        """Return a worker as the policies see it now."""
        return link.instance.refresh(self.predictions.model(link.worker_id, now_s), now_s)

    def order_policy(self, link: WorkerLink) -> OrderPolicy:
        """Return the order that a worker's engine keeps."""
        names = (link.instance.policy.value_function, link.instance.policy.relegation)
        policy = self._orders.get(names)
        if policy is None:
            try:
                policy = OrderPolicy(value_function=names[0] or "llf", relegation=names[1] or "none")
            except ValueError as error:
                log.warning("policy_unknown", worker_id=link.worker_id, why=str(error))
                policy = OrderPolicy()
            self._orders[names] = policy
        return policy

    def choose(
        self, request: LiveRequest, now_s: float, avoid: WorkerLink | None = None
    ) -> tuple[Placement, WorkerLink | None]:
        """Return the placement policy's choice for a request, and the worker; None when none takes requests.

        Args:
            avoid: a worker that just gave it up; chosen only when there is no other.
        """
        links = {link.worker_id: link for link in self._links() if link.takes_requests(now_s)}
        if avoid is not None and len(links) > 1:
            links.pop(avoid.worker_id, None)
        views = [link.instance.glance(now_s) for link in links.values()]

        def predict(view: InstanceView, new: QueuedRequest, _: BudgetPolicy) -> float:
            link = links[view.worker_id]
            return queue_ttft_s(self.view(link, now_s), new, link.instance.budget)

        affinity = request.spec.session_id
        choice = place(request.queued(), views, self._policy, self._state, self._default_budget, affinity, predict)
        return choice, links[choice.worker_id] if choice.worker_id is not None else None

    def candidates(self, request: LiveRequest, choice: Placement, age_s: float) -> list[cluster_pb2.Candidate]:
        """Return what a choice was made from, for Explain; age_s is the request's."""
        left_s = request.spec.slo.ttft_s - age_s
        return [
            cluster_pb2.Candidate(
                worker_id=c.worker_id,
                predicted_ttft_s=age_s + c.ttft_s,
                miss_ttft=self.predictions.miss_probability(c.worker_id, c.ttft_s, c.ttft_s, left_s),
                excluded=c.excluded,
                cached_tokens=c.cached_tokens,
            )
            for c in choice.candidates
        ]

    def predict(self, link: WorkerLink, queued: QueuedRequest, now_s: float) -> tuple[float, float]:
        """Return predicted remaining seconds to the first token and seconds of queue ahead, in the engine's order."""
        view, order = self.view(link, now_s), self.order_policy(link)
        estimate = newcomer_in_order(view, queued, now_s, order, link.instance.budget)
        return estimate.mean_s, estimate.wait_s
