"""Whom to give up when not everybody can make it, and how those given up still get their turn."""

import heapq
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

NONE, LATE, MOORE_HODGSON = "none", "late", "moore_hodgson"
RULES = (NONE, LATE, MOORE_HODGSON)


@dataclass(frozen=True, slots=True)
class Job:
    """A waiting request as relegation sees it."""

    deadline_s: float
    work_s: float
    """Prefill work left, in seconds."""
    weight: float = 1.0
    """Jobs are given up by work x weight, largest first; 1 gives up the longest."""


def moore_hodgson(jobs: Sequence[Job], finish_s: Callable[[float], float], ahead_s: float = 0.0) -> list[int]:
    """Return the indices of the fewest jobs to give up so that all others meet their deadlines.

    Goes through the jobs by deadline; when the schedule misses, drops the longest so far. Optimal when every weight
    is 1 and the kept jobs are served by deadline.

    Args:
        finish_s: time at which an amount of work is done; never decreasing.
        ahead_s: work done before the first job.
    """
    kept: list[tuple[float, int]] = []
    dropped = []
    work_s = ahead_s
    for index in sorted(range(len(jobs)), key=lambda i: jobs[i].deadline_s):
        job = jobs[index]
        heapq.heappush(kept, (-job.work_s * job.weight, index))
        work_s += job.work_s
        while kept and finish_s(work_s) > job.deadline_s:
            longest = heapq.heappop(kept)[1]
            work_s -= jobs[longest].work_s
            dropped.append(longest)
    return dropped


def late(jobs: Sequence[Job], finish_s: Callable[[float], float], ahead_s: float = 0.0) -> list[int]:
    """Return the indices of the jobs that miss when served in the given order, each skipped when its turn comes."""
    dropped = []
    work_s = ahead_s
    for index, job in enumerate(jobs):
        if finish_s(work_s + job.work_s) > job.deadline_s:
            dropped.append(index)
        else:
            work_s += job.work_s
    return dropped


def long_prompt_weight(request_id: str, fairness: float) -> float:
    """Return a request's weight in the choice of whom to give up, in [1 - fairness, 1].

    A lot drawn from the id alone, so that router, engine and simulator draw the same: with fairness 0 the longest
    always loses; with more, some long prompts are spared at the price of several shorter ones.
    """
    if fairness <= 0:
        return 1.0
    return 1.0 - fairness * (zlib.crc32(request_id.encode()) / 0xFFFFFFFF)


class RelegatedTurns:
    """The bounded share of capacity that overdue relegated requests take ahead of all others.

    Credit grows by `share` of each busy second and is spent by the work of each relegated request that was taken
    ahead of its place; while it is positive, the next overdue one may go first.
    """

    def __init__(self, share: float, burst_s: float = 1.0) -> None:
        """Start with no credit.

        Args:
            share: of capacity, in [0, 1].
            burst_s: most credit kept, in seconds of work.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"relegated_share must be within 0 and 1, got {share}")
        self.share = share
        self.burst_s = burst_s
        self.credit_s = 0.0

    def earn(self, busy_s: float) -> None:
        """Add the share of a step that took `busy_s`."""
        self.credit_s = min(self.credit_s + self.share * busy_s, self.burst_s)

    def spend(self, work_s: float) -> None:
        """Take the work of a relegated request that has just been started ahead of its place."""
        self.credit_s -= work_s
