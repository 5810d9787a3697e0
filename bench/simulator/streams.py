"""Running requests of which every step computes the next token: none is looked at before something happens to it.

With many workers a step finds its requests out of the processor's cache, and most have nothing to decide on: they take
one token a step, a block of the KV cache every so many, and end at a known one.
"""

from collections.abc import Iterator

from bench.simulator.request import SimRequest


class Streams:
    """The streams of one engine, in its order, and what happens to whom at which step."""

    __slots__ = ("_block_tokens", "_ending", "_filling", "_max_model_len", "_streams", "context_tokens", "objectives")

    def __init__(self, block_tokens: int, max_model_len: int) -> None:
        self._block_tokens = block_tokens
        self._max_model_len = max_model_len
        self._streams: dict[str, SimRequest] = {}
        """By id. Their own fields are as they were when they joined."""
        self._ending: dict[int, list[SimRequest]] = {}
        """Step to those that generate their last token in it."""
        self._filling: dict[int, list[SimRequest]] = {}
        """Step to those that need a block for it."""
        self.context_tokens = 0
        """Of all: prompts and generated tokens."""
        self.objectives: dict[float, int] = {}
        """TBT objective in seconds to the number of streams that have it."""

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._streams)

    def __iter__(self) -> Iterator[SimRequest]:
        """Iterate in the engine's order."""
        return iter(self._streams.values())

    def join(self, request: SimRequest) -> None:
        """Take a request that generated a token in the last step, and not its last."""
        step = request.last_step
        self._streams[request.request_id] = request
        self.context_tokens += request.total_tokens
        tbt_s = request.slo.tbt_s
        self.objectives[tbt_s] = self.objectives.get(tbt_s, 0) + 1
        longest = min(request.input_tokens + request.output_tokens, self._max_model_len)
        self._ending.setdefault(step + longest - request.total_tokens, []).append(request)
        self._filling.setdefault(_next_fill(request, step), []).append(request)

    def filling(self, step: int) -> int:
        """Return how many blocks a step needs."""
        return len(self._filling.get(step, ()))

    def fill(self, step: int) -> list[SimRequest]:
        """Return those that need a block for a step: the caller gives each one."""
        due = self._filling.pop(step, [])
        if due:
            self._filling.setdefault(step + self._block_tokens, []).extend(due)
        return due

    def advance(self, step: int, end_s: float) -> list[SimRequest]:
        """Account for a step that ended; return those that generated their last token and so left."""
        self.context_tokens += len(self._streams)
        ended = self._ending.pop(step, [])
        for request in ended:
            del self._streams[request.request_id]
            _settle(request, step, end_s)
            self._filling[_next_fill(request, step)].remove(request)
            self.context_tokens -= request.total_tokens
            tbt_s = request.slo.tbt_s
            self.objectives[tbt_s] -= 1
            if not self.objectives[tbt_s]:
                del self.objectives[tbt_s]
        return ended

    def leave(self, step: int, end_s: float) -> list[SimRequest]:
        """Let all go, as they stand after a step that ended; return them in the engine's order."""
        left = list(self._streams.values())
        for request in left:
            _settle(request, step, end_s)
        self._streams.clear()
        self._ending.clear()
        self._filling.clear()
        self.objectives.clear()
        self.context_tokens = 0
        return left


def _settle(request: SimRequest, step: int, end_s: float) -> None:
    """Bring a stream's own fields up to date."""
    if tokens := step - request.last_step:
        request.computed_tokens += tokens
        request.total_tokens += tokens
        request.last_step, request.last_token_s = step, end_s


def _next_fill(request: SimRequest, step: int) -> int:
    """Return the next step for which a stream needs a block, from how it stands after a step."""
    return step + 2 + request.kv_tokens - request.total_tokens
