"""When a failed request may go on."""

import hypothesis
from hypothesis import strategies as st

from ascendra import ResourceExhaustedError, RetryPolicy, UnavailableError
from ascendra.errors import from_status, lost_connection

POLICY = RetryPolicy(max_attempts=4, initial_backoff_s=0.1, max_backoff_s=0.3)


def test_only_safe_failures_are_repeated_before_the_first_token() -> None:
    """The server's word decides, whatever the code."""
    assert POLICY.wait_s(UnavailableError("x"), 1, started=False, others=0, jitter=0) is None
    assert POLICY.wait_s(ResourceExhaustedError("x", retry_safe=True), 1, started=False, others=0, jitter=0) is not None


def test_outages_and_safe_refusals_are_resumed_after_the_first_token() -> None:
    """A stream goes on where the serving side was lost, and where a router says that it may be asked again."""
    assert POLICY.wait_s(UnavailableError("x"), 1, started=True, others=0, jitter=0) is not None
    assert POLICY.wait_s(ResourceExhaustedError("x", retry_safe=True), 1, started=True, others=0, jitter=0) is not None
    assert POLICY.wait_s(ResourceExhaustedError("x"), 1, started=True, others=0, jitter=0) is None


def test_another_router_is_tried_at_once() -> None:
    """A lost connection waits only when every router has been tried."""
    lost = lost_connection("a:1", "refused")
    assert POLICY.wait_s(lost, 1, started=False, others=1, jitter=0.5) == 0
    assert POLICY.wait_s(lost, 2, started=False, others=0, jitter=0.5) != 0


@hypothesis.given(failures=st.integers(1, 3), jitter=st.floats(0, 1, exclude_max=True), after_ms=st.integers(0, 5000))
def test_waits_are_bounded_and_respect_the_server(failures: int, jitter: float, after_ms: int) -> None:
    """A wait is at least what the server asks, and else between half and all of the doubled backoff."""
    error = UnavailableError("x", retry_safe=True, retry_after_ms=after_ms)
    wait_s = POLICY.wait_s(error, failures, started=False, others=0, jitter=jitter)
    longest_s = min(0.1 * 2 ** (failures - 1), 0.3)
    assert wait_s is not None
    assert max(after_ms / 1000, longest_s / 2) <= wait_s <= max(after_ms / 1000, longest_s)


def test_attempts_are_counted() -> None:
    """After max_attempts failures in a row the error is the caller's."""
    safe = UnavailableError("x", retry_safe=True)
    assert POLICY.wait_s(safe, 4, started=False, others=0, jitter=0) is None
    assert RetryPolicy(max_attempts=1).wait_s(safe, 1, started=False, others=5, jitter=0) is None


def test_statuses_become_typed_errors() -> None:
    """A status number maps to its class; an unknown one keeps its place under the root."""
    error = from_status(8, "full", reason="SHARE", retry_safe=True, retry_after_ms=5, request_id="r")
    assert isinstance(error, ResourceExhaustedError)
    assert (error.reason, error.retry_safe, error.retry_after_ms, error.request_id) == ("SHARE", True, 5, "r")
    assert from_status(16, "who are you").code.name == "UNAUTHENTICATED"
    assert from_status(99, "?").code.name == "UNKNOWN"


def test_a_lost_connection_names_the_cause() -> None:
    """gRPC's list of addresses is cut down to what is wrong."""
    tried = (
        "failed to connect to all addresses; last error: UNKNOWN: ipv4:1.2.3.4:1: Failed to connect to remote host: "
    )
    assert str(lost_connection("h:1", tried + "Timeout")) == "no connection to the router at h:1: Timeout"
