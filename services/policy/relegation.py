"""Whom to give up when not everybody can make it, and how those given up still get their turn."""

import heapq
from collections.abc import Collection, Sequence

NONE, LATE, MOORE_HODGSON = "none", "late", "moore_hodgson"
RULES = (NONE, LATE, MOORE_HODGSON)


def moore_hodgson(limits_s: Sequence[float], works_s: Sequence[float], ahead_s: float = 0.0) -> list[int]:
    """Return the indices of the fewest jobs to give up so that all others meet their deadlines.

    Goes through the jobs by deadline; when the schedule misses, drops the longest so far. Optimal when the kept jobs
    are served by deadline.

    Args:
        limits_s: most work that can be done by each job's deadline (`PrefillPace.work_within_s`), its own included.
        works_s: work of each job.
        ahead_s: work done before the first job.
    """
    kept: list[tuple[float, int]] = []
    dropped = []
    work_s = ahead_s
    for index in sorted(range(len(works_s)), key=limits_s.__getitem__):
        own_s, limit_s = works_s[index], limits_s[index]
        work_s += own_s
        if work_s <= limit_s:
            heapq.heappush(kept, (-own_s, index))
            continue
        minus_s, longest = heapq.heappushpop(kept, (-own_s, index))
        work_s += minus_s
        dropped.append(longest)
        while kept and work_s > limit_s:
            minus_s, longest = heapq.heappop(kept)
            work_s += minus_s
            dropped.append(longest)
    return dropped


def worth_trying(
    dropped: Collection[int], limits_s: Sequence[float], hoped_s: Sequence[float], works_s: Sequence[float]
) -> int | None:
    """Return the given-up job, if any, that is next in line, is expected to make it, and makes no kept one miss.

    To give up early who may be late by little spares the others. Where nothing is ahead of such a job and nobody would
    miss for it, it is worth the attempt: its work is due in any case.

    Args:
        dropped: indices of the jobs given up.
        limits_s: most work that is sure to be done by each job's deadline, in the order of service.
        hoped_s: the same, as it is expected.
        works_s: work of each job.
    """
    first_kept = next((i for i in range(len(works_s)) if i not in dropped), len(works_s))
    tried = next((i for i in range(first_kept) if works_s[i] <= hoped_s[i]), None)
    if tried is None:
        return None
    through_s = works_s[tried]
    for i in range(first_kept, len(works_s)):
        if i not in dropped:
            through_s += works_s[i]
            if through_s > limits_s[i]:
                return None
    return tried


def late(limits_s: Sequence[float], works_s: Sequence[float], ahead_s: float = 0.0) -> list[int]:
    """Return the indices of the jobs that miss when served in the given order, each skipped when its turn comes."""
    dropped = []
    work_s = ahead_s
    for index, (limit_s, job_s) in enumerate(zip(limits_s, works_s, strict=True)):
        if work_s + job_s > limit_s:
            dropped.append(index)
        else:
            work_s += job_s
    return dropped


class RelegatedTurns:
    """The bounded share of capacity that overdue relegated requests take ahead of all others.

    Credit grows by `share` of each busy second and is spent by the work of each relegated request that was taken
    ahead of its place; while it is positive, the next overdue one may go first.
    """

    def __init__(self, share: float, burst_s: float = 0.1) -> None:
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
        """Take the work of a chunk of a relegated request that was placed ahead of the others."""
        self.credit_s -= work_s
