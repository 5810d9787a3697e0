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

        Room of r seconds takes about r / TBT of an instance's capacity, and as many of the requests under full load;
        besides, those fail of which one gap gains more than r. How often a gap does is counted in a whole window: one
        not seen yet counts for one that gained nothing, lest the first stall speak for a rate. What gains more than the
        most room there is cannot be saved, and is no reason for any. The sum is least at 0 or at one of the gains.
        """
        if len(self._inflations_s) < _FEWEST_STEPS:
            return 0.0
        ordered = [0.0, *sorted(gain_s for gain_s in self._inflations_s if 0 < gain_s <= MAX_ALLOWANCE_S)]
        costs = (
            (room_s / _REFERENCE_TBT_S + _failing_share((len(ordered) - 1 - index) / _WINDOW_STEPS), room_s)
            for index, room_s in enumerate(ordered)
        )
        return min(costs)[1]


def _failing_share(late_share: float) -> float:
    """Return the share of requests with a late gap when so many of all gaps are late."""
    return 1 - (1 - late_share) ** _GAPS_OF_A_REQUEST
