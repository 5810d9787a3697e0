"""vLLM v1's scheduling rules without vLLM: which tokens each step computes, KV blocks, preemption.

Follows `Scheduler.schedule` and `update_from_output` of vLLM 0.32 for decoder-only text without speculation and
connectors: running requests in list order, then waiting ones; prompts in chunks of what is left of the token budget,
from the first token on that the prefix cache does not hold; a request is admitted only when its whole prompt fits into
free blocks; a running request that finds no block evicts the last of the list (under priority scheduling the least
urgent), which starts over; a step that evicted admits nobody. A test compares it with the real scheduler, step by step.
"""

import math
from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from bench.simulator.prefix_cache import BlockCache, Key
from bench.simulator.request import SimRequest
from bench.simulator.streams import Streams

LOOK_UP_S = 0.5
"""Age at which what was found in the prefix cache for a waiting request is looked up again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """The vLLM options that decide what a step computes."""

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    kv_tokens: int = 380_000
    """KV cache size; a multiple of `block_tokens`."""
    block_tokens: int = 16
    max_model_len: int = 1 << 30
    watermark: float = 0.0
    """Share of the blocks that an admission must leave free."""
    priority: bool = False
    """`--scheduling-policy priority`: waiting requests by (priority, arrival) instead of in order of arrival."""
    prefix_caching: bool = False
    """Each of a request's `prefix_hashes` is one block's."""


@dataclass(slots=True)
class Step:
    """What one engine step computes."""

    requests: list[SimRequest] = field(default_factory=list)
    """In the engine's order, behind the streams, each of which gets its next token."""
    tokens: list[int] = field(default_factory=list)
    """Of each of them."""
    prefill_tokens: int = 0
    decodes: int = 0
    decode_context_tokens: int = 0
    prefill_context_products: int = 0
    preempted: list[SimRequest] = field(default_factory=list)
    admitted: list[SimRequest] = field(default_factory=list)


class Engine:
    """Waiting and running requests of one instance and their KV blocks."""

    __slots__ = (
        "_block_tokens",
        "_cache",
        "_ended_s",
        "_max_model_len",
        "_watermark_blocks",
        "config",
        "free_blocks",
        "max_num_seqs",
        "running",
        "steps",
        "streams",
        "total_blocks",
        "waiting",
        "waiting_tokens",
    )

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self._block_tokens = config.block_tokens
        self._max_model_len = config.max_model_len
        # vLLM keeps one block as the null block.
        self.total_blocks = config.kv_tokens // config.block_tokens - 1
        self._watermark_blocks = int(config.watermark * (self.total_blocks + 1))
        self.free_blocks = self.total_blocks
        self._cache = BlockCache(self.total_blocks) if config.prefix_caching else None
        self.max_num_seqs = config.max_num_seqs
        """May be lowered and raised between steps, as an elastic cap."""
        self.waiting: deque[SimRequest] = deque()
        self.waiting_tokens = 0
        """Prefill tokens of the waiting requests."""
        self.streams = Streams(config.block_tokens, config.max_model_len)
        """The first of the running requests; no step leaves one out. Empty where one might."""
        self.running: list[SimRequest] = []
        """The others."""
        self.steps = 0
        """Steps that ended; the number of the one that runs."""
        self._ended_s = 0.0
        """When the last of them did."""

    @property
    def residents(self) -> int:
        """How many requests run."""
        return len(self.streams) + len(self.running)

    @property
    def kv_used_tokens(self) -> int:
        """Tokens that the blocks in use have room for."""
        return (self.total_blocks - self.free_blocks) * self._block_tokens

    def fits(self, request: SimRequest) -> bool:
        """Whether the request could ever run here: its prompt and output fit into the KV cache and the context."""
        tokens = request.input_tokens + request.output_tokens
        return tokens <= min(self.total_blocks * self._block_tokens, self._max_model_len)

    def add(self, request: SimRequest) -> None:
        """Queue a request."""
        self._enqueue(request, front=False)

    def withdraw(self, request: SimRequest) -> bool:
        """Take back a request that was never scheduled; False when it is too late."""
        if request.started:
            return False
        self.waiting.remove(request)
        self.waiting_tokens -= request.remaining_tokens
        request.computed_tokens, request.looked_up_s = 0, -math.inf
        return True

    def look_up(self, now_s: float) -> None:
        """See what the prefix cache holds of the waiting requests."""
        assert self._cache is not None
        for request in self.waiting:
            if now_s - request.looked_up_s >= LOOK_UP_S:
                request.looked_up_s = now_s
                self._find(self._cache, request)

    def order_waiting(self, requests: Iterable[SimRequest]) -> None:
        """Replace the order of the waiting requests; preempted ones are among them."""
        self.waiting = deque(requests)

    def schedule(self, token_budget: int) -> Step:
        """Choose the next step's tokens and take the blocks for them."""
        step = Step()
        budget = self._schedule_streams(step, min(token_budget, self.config.max_num_batched_tokens))
        budget = self._schedule_running(step, budget)
        if not step.preempted:
            self._admit(step, budget)
        return step

    def complete(self, step: Step, now_s: float) -> tuple[list[SimRequest], list[SimRequest]]:
        """Account for a computed step: new tokens at `now_s`.

        Returns the requests that generated their last token, and those that completed a prefill.
        """
        number = self.steps
        self.steps, self._ended_s = number + 1, now_s
        finished = self.streams.advance(number, now_s)
        prefilled = []
        gone = set()
        of_each = step.tokens
        for place, request in enumerate(step.requests):
            tokens = of_each[place]
            computed = request.computed_tokens + tokens
            request.computed_tokens = computed
            if computed == request.total_tokens:
                if tokens > 1 or request.last_step < 0:
                    prefilled.append(request)
                if request.last_step != number - 1:
                    request.begin_run(number)
                request.last_step = number
                request.last_token_s = now_s
                request.total_tokens = computed + 1
                gone.add(id(request))
                if request.generated_tokens >= request.output_tokens or computed + 1 >= self._max_model_len:
                    finished.append(request)
                else:
                    self.streams.join(request)
        if gone:
            self.running = [request for request in self.running if id(request) not in gone]
        for request in finished:
            self._name_streamed(request)
            self._release(request)
        return finished, prefilled

    def part_streams(self) -> None:
        """Put the streams back among the running requests, as they stand now."""
        if self.streams:
            streams = self.streams.leave(self.steps - 1, self._ended_s)
            for request in streams:
                self._name_streamed(request)
            self.running = streams + self.running

    def _schedule_streams(self, step: Step, budget: int) -> int:
        """Give every stream its next token, unless one might have to wait or to go; returns the budget left."""
        streams = self.streams
        number = self.steps
        most_blocks = streams.filling(number) + budget // self._block_tokens + len(self.running)
        if len(streams) > budget or most_blocks > self.free_blocks:
            self.part_streams()
            return budget
        for request in streams.fill(number):
            self._take(request, 1)
        step.decodes = len(streams)
        step.decode_context_tokens = streams.context_tokens
        return budget - len(streams)

    def _schedule_running(self, step: Step, budget: int) -> int:
        index = 0
        block_tokens = self._block_tokens
        longest = self._max_model_len - 1
        running = self.running
        scheduled, of_each = step.requests, step.tokens
        while index < len(running) and budget > 0:
            request = running[index]
            computed = request.computed_tokens
            tokens = request.total_tokens - computed
            if tokens > budget:
                tokens = budget
            end = computed + tokens
            if end >= longest:
                end = longest
                tokens = end - computed
            if tokens <= 0:
                index += 1
                continue
            if end > request.kv_tokens:
                blocks = -(-(end - request.kv_tokens) // block_tokens)
                while blocks > self.free_blocks:
                    victim, budget, index = self._evict(step, budget, index)
                    if victim is request:
                        # As in vLLM, nothing behind it is scheduled either.
                        return budget
                self._take(request, blocks)
            if self._cache is not None:
                self._name_full(self._cache, request, end)
            scheduled.append(request)
            of_each.append(tokens)
            budget -= tokens
            if tokens == 1 and computed >= request.input_tokens:
                step.decodes += 1
                step.decode_context_tokens += end
            else:
                step.prefill_tokens += tokens
                step.prefill_context_products += tokens * computed
            index += 1
        return budget

    def _evict(self, step: Step, budget: int, index: int) -> tuple[SimRequest, int, int]:
        """Preempt one running request; returns it, the budget and the place of the request at hand."""
        if self.config.priority:
            victim = max(self.running, key=_rank)
            place = self.running.index(victim)
            del self.running[place]
            if place < index:
                index -= 1
            budget += self._unschedule(step, victim)
        else:
            victim = self.running.pop()
        self._release(victim)
        victim.prompt_tokens = victim.total_tokens
        victim.computed_tokens, victim.looked_up_s = 0, -math.inf
        victim.started = True
        victim.preemptions += 1
        self._enqueue(victim, front=True)
        step.preempted.append(victim)
        return victim, budget, index

    def _unschedule(self, step: Step, victim: SimRequest) -> int:
        """Take a request out of the step; returns the tokens it had."""
        for place, request in enumerate(step.requests):
            if request is victim:
                tokens = step.tokens[place]
                del step.requests[place], step.tokens[place]
                computed = victim.computed_tokens
                if tokens == 1 and computed >= victim.input_tokens:
                    step.decodes -= 1
                    step.decode_context_tokens -= computed + 1
                else:
                    step.prefill_tokens -= tokens
                    step.prefill_context_products -= tokens * computed
                return tokens
        return 0

    def _admit(self, step: Step, budget: int) -> None:
        block_tokens = self._block_tokens
        waiting = self.waiting
        running = self.running
        while budget > 0 and waiting and self.residents < self.max_num_seqs:
            request = waiting[0]
            watermark = self._watermark_blocks if self.residents else 0
            whole = min(request.total_tokens, self._max_model_len)
            found: list[int] = []
            needed = -(-whole // block_tokens) + watermark
            if self._cache is not None:
                found = self._find(self._cache, request)
                needed += self._cache.idle(found) - len(found)
            if needed > self.free_blocks:
                break
            waiting.popleft()
            wanted = request.total_tokens - request.computed_tokens
            self.waiting_tokens -= wanted
            tokens = min(wanted, budget)
            end = request.computed_tokens + tokens
            if found and self._cache is not None:
                self._cache.share(found)
                request.blocks = found
                request.kv_tokens = len(found) * block_tokens
            self._take(request, -(-(end - request.kv_tokens) // block_tokens))
            if self._cache is not None:
                self._name_full(self._cache, request, end)
            request.started = True
            running.append(request)
            step.requests.append(request)
            step.tokens.append(tokens)
            step.admitted.append(request)
            step.prefill_tokens += tokens
            step.prefill_context_products += tokens * request.computed_tokens
            budget -= tokens

    def _take(self, request: SimRequest, blocks: int) -> None:
        request.kv_tokens += blocks * self._block_tokens
        if self._cache is None:
            self.free_blocks -= blocks
        else:
            request.blocks += self._cache.take(blocks)
            self.free_blocks = self._cache.free

    def _release(self, request: SimRequest) -> None:
        if self._cache is None:
            self.free_blocks += request.kv_tokens // self._block_tokens
        else:
            self._cache.release(request.blocks)
            self.free_blocks = self._cache.free
            request.blocks = []
            request.named_blocks = 0
        request.kv_tokens = 0

    def _find(self, cache: BlockCache, request: SimRequest) -> list[int]:
        """Return the cached blocks with which a waiting request would start, and note how much they hold.

        The last token is always computed: it is whose successor is wanted.
        """
        found: list[int] = []
        for place in range((request.total_tokens - 1) // self._block_tokens):
            block = cache.find(self._key(request, place))
            if block < 0:
                break
            found.append(block)
        tokens = len(found) * self._block_tokens
        self.waiting_tokens += request.computed_tokens - tokens
        request.computed_tokens = tokens
        return found

    def _name_full(self, cache: BlockCache, request: SimRequest, end: int) -> None:
        """Make the blocks findable that are full once tokens up to `end` are computed, which vLLM does in advance."""
        full = end // self._block_tokens
        for place in range(request.named_blocks, full):
            cache.name(request.blocks[place], self._key(request, place))
        request.named_blocks = max(full, request.named_blocks)

    def _name_streamed(self, request: SimRequest) -> None:
        """Do so for a stream at its end: until then only it could find them."""
        if self._cache is not None:
            self._name_full(self._cache, request, request.computed_tokens)

    def _key(self, request: SimRequest, place: int) -> Key:
        if place < len(request.prefix_hashes) and (place + 1) * self._block_tokens <= request.input_tokens:
            return request.prefix_hashes[place]
        return request.request_id, place

    def _enqueue(self, request: SimRequest, *, front: bool) -> None:
        self.waiting_tokens += request.remaining_tokens
        if self.config.priority:
            insort(self.waiting, request, key=_urgency)
        elif front:
            self.waiting.appendleft(request)
        else:
            self.waiting.append(request)


def _rank(request: SimRequest) -> tuple[int, float]:
    return (request.priority, request.arrival_s)


def _urgency(request: SimRequest) -> tuple[int, float, str]:
    return (request.priority, request.arrival_s, request.request_id)
