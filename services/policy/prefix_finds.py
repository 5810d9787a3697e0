"""What the instances' prefix caches hold of requests that wait for one of them."""

import math
from collections.abc import Iterable

from services.policy.state import InstanceView, QueuedRequest

_ASKED_ANEW_S = 0.5
"""A look-up walks all blocks that it finds, on every instance; the set is ordered many times a second."""


class PrefixFinds:
    """Remembers look-ups for a while. Times are seconds on the caller's clock."""

    __slots__ = ("_found",)

    def __init__(self) -> None:
        """Know nothing."""
        self._found: dict[str, tuple[float, dict[str, int]]] = {}
        """By request: when it was looked up, and the tokens that each instance holds."""

    def most_tokens(self, request: QueuedRequest, views: Iterable[InstanceView], now_s: float) -> int:
        """Return the longest beginning of a request that any instance holds, looked up anew now and then."""
        asked_s, found = self._found.get(request.request_id, (-math.inf, {}))
        if now_s - asked_s >= _ASKED_ANEW_S:
            found = {view.worker_id: tokens for view in views if (tokens := view.cached_tokens(request))}
            self._found[request.request_id] = now_s, found
        return max(found.values(), default=0)

    def tokens(self, request: QueuedRequest, view: InstanceView) -> int:
        """Return how much of a request an instance holds, as last looked up."""
        _, found = self._found.get(request.request_id, (0.0, {}))
        return found.get(view.worker_id, 0)

    def forget(self, request_id: str) -> None:
        """Forget a request."""
        self._found.pop(request_id, None)
