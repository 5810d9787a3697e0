"""A circuit breaker: after several failures in a row a worker gets nothing for a while, then one request to try."""

from dataclasses import dataclass

_LONGEST_OPEN_S = 30.0


@dataclass(slots=True)
class Breaker:
    """State of one worker's circuit; times in seconds on the caller's clock."""

    failures_to_open: int
    open_s: float
    """How long it stays open the first time; doubles while the trial fails, up to 30 s."""
    _failures: int = 0
    _opened_times: int = 0
    _open_until_s: float = float("-inf")
    _tripped: bool = False
    _trial_out: bool = False

    def allows(self, now_s: float) -> bool:
        """Return whether a request may be sent: always when closed, one at a time as a trial after the pause."""
        return not self._tripped or (now_s >= self._open_until_s and not self._trial_out)

    @property
    def tripped(self) -> bool:
        """It opened and has not succeeded since."""
        return self._tripped

    def sent(self) -> None:
        """Take note that a request was sent; while tripped it is the trial."""
        self._trial_out = self._tripped

    def succeeded(self) -> None:
        """Close the circuit."""
        self._failures = self._opened_times = 0
        self._tripped = self._trial_out = False

    def failed(self, now_s: float) -> bool:
        """Count a failure; True when it opened the circuit.

        While it is open only the trial counts: what was under way when a worker died fails with it, and says nothing of
        the worker that takes its place.
        """
        if self._tripped and not self._trial_out:
            return False
        self._failures += 1
        if self._tripped or self._failures >= self.failures_to_open:
            pause_s = min(self.open_s * 2**self._opened_times, _LONGEST_OPEN_S)
            self._opened_times += 1
            self._open_until_s = now_s + pause_s
            opened, self._tripped, self._trial_out = not self._tripped, True, False
            return opened
        return False

    def trial_lost(self) -> None:
        """Take note that the trial ended without an outcome (cancelled, withdrawn)."""
        self._trial_out = False
