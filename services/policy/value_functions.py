"""In which order an instance takes its waiting requests: smaller keys first, every key in seconds."""

from collections.abc import Callable

from services.policy.state import QueuedRequest

ValueFunction = Callable[[QueuedRequest, float, float], float]
"""(request, seconds its remaining prefill takes alone, now in seconds) -> key in seconds."""

HYBRID_ALPHA = 4.0
"""Seconds of deadline that one second of remaining prefill weighs in `hybrid`."""


def fcfs(request: QueuedRequest, prefill_s: float, now_s: float) -> float:
    """First come, first served."""
    return request.arrival_s


def edf(request: QueuedRequest, prefill_s: float, now_s: float) -> float:
    """Earliest deadline first; equals fcfs when TTFT objectives are uniform."""
    return request.deadline_s


def llf(request: QueuedRequest, prefill_s: float, now_s: float) -> float:
    """Least laxity first: the deadline less the time its prefill still takes."""
    return request.deadline_s - prefill_s


def sjf(request: QueuedRequest, prefill_s: float, now_s: float) -> float:
    """Shortest remaining prefill first; best throughput in overload, and it starves long prompts."""
    return prefill_s


def hybrid(request: QueuedRequest, prefill_s: float, now_s: float) -> float:
    """Earliest deadline, with long prompts pushed back."""
    return request.deadline_s + HYBRID_ALPHA * prefill_s


def hrrn(request: QueuedRequest, prefill_s: float, now_s: float) -> float:
    """Highest response ratio next: shortest first, but ageing. The only key that changes as time passes."""
    return -(now_s - request.arrival_s + prefill_s) / max(prefill_s, 1e-6)


VALUE_FUNCTIONS: dict[str, ValueFunction] = {
    "fcfs": fcfs,
    "edf": edf,
    "llf": llf,
    "sjf": sjf,
    "hybrid": hybrid,
    "hrrn": hrrn,
}


def value_function(name: str) -> ValueFunction:
    """Return a value function by name; empty means llf.

    Raises:
        ValueError: the name is unknown.
    """
    try:
        return VALUE_FUNCTIONS[name or "llf"]
    except KeyError:
        raise ValueError(f"value_function must be one of {', '.join(VALUE_FUNCTIONS)}, got {name!r}") from None


def order_key(value_s: float, request: QueuedRequest) -> tuple[float, int, float, str]:
    """Return a total order: the value, then priority, arrival and id."""
    return (value_s, request.priority, request.arrival_s, request.request_id)
