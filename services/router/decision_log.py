"""Decisions and ends of requests as JSON lines in a file."""

import math

from services.common.line_log import LineLog
from services.router import metrics
from services.router.request import DecisionRecord, LiveRequest


class DecisionLog:
    """Writes decisions; without a path it does nothing."""

    def __init__(self, path: str) -> None:
        """Open the file for appending. Raises OSError."""
        self._lines = LineLog(path, "decision-log", metrics.DECISION_LOG_DROPPED.inc)

    def write(self, request: LiveRequest, record: DecisionRecord) -> None:
        """Append a decision; dropped and counted when the disk cannot follow."""
        if not self._lines.writes:
            return
        self._lines.append(
            {
                "request_id": request.spec.request_id,
                "at_ms": _ms(record.at_s),
                "kind": record.kind,
                "rule": record.rule,
                "from": record.from_worker_id,
                "to": record.to_worker_id,
                "predicted_ttft_ms": _ms(record.predicted_ttft_s),
                "prompt_tokens": request.spec.prompt_tokens,
                "slo_class": request.spec.slo_class,
            }
        )

    def write_end(self, request: LiveRequest, outcome: str, now_s: float) -> None:
        """Append what was asked and what became of it: the request can be simulated from this line (bench/replay.py).

        `arrival_s` is on the host's monotonic clock; tokens that a resumed request brought count as prompt.
        """
        if not self._lines.writes:
            return
        spec, resumed = request.spec, request.resumed_tokens
        self._lines.append(
            {
                "request_id": spec.request_id,
                "at_ms": _ms(now_s - request.arrival_s),
                "kind": "end",
                "outcome": outcome,
                "arrival_s": round(request.arrival_s, 6),
                "prompt_tokens": spec.prompt_tokens + resumed,
                "cached_prompt_tokens": request.cached_prompt_tokens,
                "output_tokens": len(request.generated) - resumed,
                "max_tokens": spec.sampling.max_tokens - resumed,
                "slo_class": spec.slo_class,
                "ttft_slo_ms": _ms(spec.slo.ttft_s),
                "tbt_slo_ms": _ms(spec.slo.tbt_s),
                "ttft_ms": _ms(request.ttft_s),
                "p99_gap_ms": _ms(request.p99_gap_s()),
                "relegated": request.relegated,
            }
        )

    def close(self) -> None:
        """Write what is pending and close the file; waits two seconds at most."""
        self._lines.close()


def _ms(seconds: float) -> float | None:
    """Return milliseconds; None for a time that never came."""
    return round(seconds * 1000, 3) if math.isfinite(seconds) else None
