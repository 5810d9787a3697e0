"""How much longer than the engine's steps a reader's gaps are: what the token budget must leave room for."""

from collections import deque

_WINDOW_STEPS = 512
_FEWEST_STEPS = 64
_LEVEL = 0.99
MAX_ALLOWANCE_S = 0.03
"""A path that adds more than this is broken; smaller steps would not mend it, and prefill would starve."""


class DeliverySpread:
    """Learns it from the arrivals of consecutive steps' tokens; bounded, and forgets after `_WINDOW_STEPS` steps."""

    def __init__(self) -> None:
        self._inflations_s: deque[float] = deque(maxlen=_WINDOW_STEPS)

    def observe(self, gap_s: float, step_s: float) -> None:
        """Take in the time between two steps' tokens at the reader, and the time of the later step in the engine."""
        self._inflations_s.append(gap_s - step_s)

    def allowance_s(self) -> float:
        """Return the 99th percentile of what gaps gained over steps, in [0, MAX_ALLOWANCE_S]; 0 until it is known."""
        if len(self._inflations_s) < _FEWEST_STEPS:
            return 0.0
        ordered = sorted(self._inflations_s)
        return min(max(ordered[int(_LEVEL * (len(ordered) - 1))], 0.0), MAX_ALLOWANCE_S)
