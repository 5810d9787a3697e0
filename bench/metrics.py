"""The one definition of every number that a report shows; used by the simulator and by the live client alike."""

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

DECILES = 10


class Outcome(enum.StrEnum):
    """How a request ended, as its caller saw it."""

    FINISHED = "finished"
    REFUSED = "refused"
    FAILED = "failed"
    UNFINISHED = "unfinished"
    """The run ended first."""


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """What a caller saw of one request. Times are seconds on the caller's clock."""

    request_id: str
    arrival_s: float
    """When it was sent."""
    prompt_tokens: int
    ttft_slo_s: float
    tbt_slo_s: float
    outcome: Outcome
    token_times_s: Sequence[float] = field(default_factory=tuple)
    """When each token was received, the first included."""
    slo_class: str = ""
    relegated: bool = False
    """It lost its priority at some time; it was still served."""
    why: str = ""
    """What its caller was told when it was refused or failed."""

    @property
    def ttft_s(self) -> float:
        """Seconds to its first token; infinite when it never came."""
        return self.token_times_s[0] - self.arrival_s if self.token_times_s else math.inf

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between consecutive tokens."""
        times = self.token_times_s
        return [later - earlier for earlier, later in pairwise(times)]

    @property
    def mean_gap_s(self) -> float:
        """Mean gap (TPOT); 0 with fewer than two tokens."""
        times = self.token_times_s
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Summary of one run. Shares are of all requests: refused, relegated and unfinished ones count as requests."""

    requests: int
    finished: int
    refused: int
    failed: int
    unfinished: int
    relegated: int
    duration_s: float
    """From the first arrival to the last; rates are per second of it."""
    offered_rps: float
    joint: float
    """Share that finished with TTFT and their own p99 gap inside their SLO. The primary metric."""
    ttft_only: float
    tbt_only: float
    """Share that finished with their own p99 gap inside the TBT SLO."""
    mean_gap: float
    """Share that finished with TTFT and mean gap (TPOT) inside the SLO: what `vllm bench serve --goodput` counts."""
    goodput_rps: float
    """Requests counted in `joint`, per second."""
    goodput_tokens_per_s: float
    """Their prompt and output tokens, per second."""
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    pooled_gap_p50_s: float
    pooled_gap_p99_s: float
    """Percentile over the gaps of all requests together: what Sarathi-Serve reports."""
    joint_by_prompt_decile: tuple[float, ...]
    """Joint attainment of the shortest tenth of the prompts first, of the longest tenth last."""
    joint_by_class: dict[str, float]
    longest_wait_s: float
    """Longest time to a first token; of a request that got none, the time until the run ended."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def percentile(ordered: Sequence[float], q: float) -> float:
    """Percentile q (0 to 1) of ascending values, linear between neighbours (numpy's default); 0 when empty."""
    if not ordered:
        return 0.0
    place = q * (len(ordered) - 1)
    low = int(place)
    if low + 1 >= len(ordered):
        return ordered[-1]
    return ordered[low] + (ordered[low + 1] - ordered[low]) * (place - low)


def meets_ttft(record: RequestRecord) -> bool:
    """Whether its first token came within its TTFT SLO."""
    return record.ttft_s <= record.ttft_slo_s


def meets_tbt(record: RequestRecord) -> bool:
    """Whether it finished and 99% of its own gaps are within its TBT SLO."""
    if record.outcome is not Outcome.FINISHED:
        return False
    gaps = record.gaps_s
    if not gaps or max(gaps) <= record.tbt_slo_s:
        return True
    gaps.sort()
    return percentile(gaps, 0.99) <= record.tbt_slo_s


def attains(record: RequestRecord) -> bool:
    """Whether it counts as served: finished, TTFT and its own p99 gap inside its SLO."""
    return meets_ttft(record) and meets_tbt(record)


def summarize(records: Sequence[RequestRecord], *, end_s: float | None = None) -> Report:
    """Summarize one run.

    Args:
        records: every request that was sent, in any order.
        end_s: when the run ended, on the same clock; by default the last token or arrival.

    Raises:
        ValueError: without any record.
    """
    if not records:
        raise ValueError("no records to summarize")
    first = min(record.arrival_s for record in records)
    last = max(record.arrival_s for record in records)
    if end_s is None:
        end_s = max(last, max((r.token_times_s[-1] for r in records if r.token_times_s), default=last))
    duration_s = max(last - first, 1e-9)
    served = [attains(record) for record in records]
    outcomes = [record.outcome for record in records]
    ttfts = sorted(record.ttft_s for record in records)
    gaps = sorted(gap for record in records for gap in record.gaps_s)
    total = len(records)
    return Report(
        requests=total,
        finished=outcomes.count(Outcome.FINISHED),
        refused=outcomes.count(Outcome.REFUSED),
        failed=outcomes.count(Outcome.FAILED),
        unfinished=outcomes.count(Outcome.UNFINISHED),
        relegated=sum(record.relegated for record in records),
        duration_s=duration_s,
        offered_rps=total / duration_s,
        joint=sum(served) / total,
        ttft_only=sum(map(meets_ttft, records)) / total,
        tbt_only=sum(map(meets_tbt, records)) / total,
        mean_gap=sum(r.outcome is Outcome.FINISHED and meets_ttft(r) and r.mean_gap_s <= r.tbt_slo_s for r in records)
        / total,
        goodput_rps=sum(served) / duration_s,
        goodput_tokens_per_s=sum(
            record.prompt_tokens + len(record.token_times_s)
            for record, good in zip(records, served, strict=True)
            if good
        )
        / duration_s,
        ttft_p50_s=_finite(percentile(ttfts, 0.5)),
        ttft_p90_s=_finite(percentile(ttfts, 0.9)),
        ttft_p99_s=_finite(percentile(ttfts, 0.99)),
        pooled_gap_p50_s=percentile(gaps, 0.5),
        pooled_gap_p99_s=percentile(gaps, 0.99),
        joint_by_prompt_decile=_by_decile(records, served),
        joint_by_class=_by_class(records, served),
        longest_wait_s=max(min(record.ttft_s, max(end_s - record.arrival_s, 0.0)) for record in records),
    )


def _by_decile(records: Sequence[RequestRecord], served: Sequence[bool]) -> tuple[float, ...]:
    """Share served per tenth of the requests in prompt-length order; fewer parts when there are fewer requests."""
    order = sorted(range(len(records)), key=lambda index: records[index].prompt_tokens)
    parts = min(DECILES, len(order))
    edges = [round(part * len(order) / parts) for part in range(parts + 1)]
    return tuple(_share(served[i] for i in order[low:high]) for low, high in pairwise(edges))


def _by_class(records: Sequence[RequestRecord], served: Sequence[bool]) -> dict[str, float]:
    classes: dict[str, list[bool]] = {}
    for record, good in zip(records, served, strict=True):
        classes.setdefault(record.slo_class, []).append(good)
    return {name: _share(goods) for name, goods in sorted(classes.items())}


def _share(goods: Iterable[bool]) -> float:
    values = list(goods)
    return sum(values) / len(values)


def _finite(value: float) -> float:
    """JSON has no infinity: -1 says that the percentile falls on requests without a first token."""
    return value if math.isfinite(value) else -1.0
