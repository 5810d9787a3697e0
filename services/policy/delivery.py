"""How much longer than the engine's steps a reader's gaps are: what the token budget must leave room for."""

from collections import deque

_WINDOW_STEPS = 1024
_FEWEST_STEPS = 64
_REFERENCE_TBT_S = 0.1
"""Room is weighed as a share of this gap."""
_GAPS_OF_A_REQUEST = 100
"""Gaps of a request of which none may be too long: with so many or fewer its 99th percentile is the longest one."""
MAX_ALLOWANCE_S = 0.03
"""A path that adds more than this is broken; smaller steps would not mend it, and prefill would starve."""


def is_allowance(room_s: float) -> bool:
    """Return whether somebody else's word can be the room that is left in gaps: stated, and no more than is given."""
    return 0 < room_s <= MAX_ALLOWANCE_S


class DeliverySpread:
    """Learns it from the arrivals of consecutive steps' tokens; bounded, and forgets after `_WINDOW_STEPS` steps."""

    def __init__(self) -> None:
        self._inflations_s: deque[float] = deque(maxlen=_WINDOW_STEPS)

    def observe(self, gap_s: float, step_s: float) -> None:
        """Take in the time between two steps' tokens at the reader, and the time of the later step in the engine."""
        self._inflations_s.append(gap_s - step_s)

    def allowance_s(self) -> float:
        """Return the room that pays best, in [0, MAX_ALLOWANCE_S]; 0 until enough steps were seen.

        Room of r seconds takes about r / TBT of an instance's capacity, and as many of the requests under full load; a
        gap that gains more than r costs each of the requests that had a share in the step with its odds of having had
        such a gap. The sum is least at one of the gains that were seen.
        """
        count = len(self._inflations_s)
        if count < _FEWEST_STEPS:
            return 0.0
        ordered = sorted(min(max(gain_s, 0.0), MAX_ALLOWANCE_S) for gain_s in self._inflations_s)
        costs = (
            (room_s / _REFERENCE_TBT_S + _GAPS_OF_A_REQUEST * (count - 1 - index) / count, room_s)
            for index, room_s in enumerate(ordered)
        )
        return min(costs)[1]
