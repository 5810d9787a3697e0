"""What vLLM's prefix cache holds of requests that wait: their prefill is that much shorter."""

import time
from typing import Any

from vllm.v1.request import Request

_ASKED_ANEW_S = 0.5
"""A look-up walks all blocks that it finds: for a long prompt, some tenths of a millisecond."""
_MOST_S = 0.001
"""Seconds that look-ups may take of one step, but for the last of them; the others keep their answer until a later."""


class PrefixLookup:
    """Remembers answers for a while, since waiting requests are planned in every step."""

    def __init__(self, kv_cache_manager: Any) -> None:
        self._manager = kv_cache_manager
        self._found: dict[str, tuple[float, int]] = {}
        """By request: when it was looked up, and the tokens."""
        self._step_s = 0.0
        self._left_s = _MOST_S
        self._some_wait = self._some_waited = False
        """Some found no time for their first look-up in this step; in the one before: they go before any second one."""

    def computed_tokens(self, request: Request, now_s: float) -> int:
        """Return how many tokens of a request need not be computed: they are, or the cache holds them.

        Args:
            now_s: the same for all that is asked at one time.
        """
        if request.num_computed_tokens:
            return int(request.num_computed_tokens)
        asked_s, tokens = self._found.get(request.request_id, (-_ASKED_ANEW_S, 0))
        if now_s != self._step_s:
            self._step_s, self._left_s = now_s, _MOST_S
            self._some_wait, self._some_waited = False, self._some_wait
        first = request.request_id not in self._found
        if first and self._left_s <= 0:
            self._some_wait = True
        elif now_s - asked_s >= _ASKED_ANEW_S and self._left_s > 0 and (first or not self._some_waited):
            began_s = time.perf_counter()
            tokens = self._look_up(request)
            self._left_s -= time.perf_counter() - began_s
            self._found[request.request_id] = now_s, tokens
        return tokens

    def forget(self, request_id: str) -> None:
        """Forget a request."""
        self._found.pop(request_id, None)

    def _look_up(self, request: Request) -> int:
        manager = self._manager
        if not manager.enable_caching or request.skip_reading_prefix_cache:
            return 0
        # As KVCacheManager.get_computed_blocks, which also counts the query in vLLM's statistics.
        found = manager.coordinator.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)
        return int(found[1])
