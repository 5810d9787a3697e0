"""When a failed request may go on, and after what wait."""

from dataclasses import dataclass

import grpc

from ascendra.errors import CLOSED, CONNECTION_LOST, AscendraError


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Bounds on repetitions; all of them end with the request's own time limit."""

    max_attempts: int = 5
    """Attempts without progress, at least 1; 1 means no repetition."""
    initial_backoff_s: float = 0.1
    """Longest wait before the first repetition, in seconds; doubled for each further one."""
    max_backoff_s: float = 2.0
    """Bound on that, in seconds."""

    def wait_s(self, error: AscendraError, failures: int, *, started: bool, others: int, jitter: float) -> float | None:
        """Return how long to wait before going on after `failures` failures in a row, or None to give up.

        Args:
            error: the last failure.
            failures: attempts without progress so far, the last one included.
            started: the caller has seen tokens and they can be continued exactly.
            others: routers not tried since the last progress.
            jitter: uniform in [0, 1).
        """
        # What is safe to send again is safe to go on with: a full router refuses a resumed stream as well.
        allowed = error.retry_safe or (started and error.code is grpc.StatusCode.UNAVAILABLE)
        if not allowed or error.reason == CLOSED or failures >= self.max_attempts:
            return None
        if error.reason == CONNECTION_LOST and others > 0:
            return 0.0
        backoff_s = min(self.max_backoff_s, self.initial_backoff_s * 2.0 ** (failures - 1))
        return max(error.retry_after_ms / 1000, backoff_s * (0.5 + 0.5 * jitter))
