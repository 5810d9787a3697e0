"""The gateway's metrics. Times are in seconds, measured at the gateway."""

from typing import Any

from prometheus_client import Counter, Gauge, Histogram

REQUESTS = Counter(
    "ascendra_gateway_requests", "Requests answered, by HTTP status (499: the client left)", ["endpoint", "status"]
)
IN_FLIGHT = Gauge("ascendra_gateway_in_flight", "Requests to generate in progress")
TOKENS = Counter("ascendra_gateway_tokens", "Tokens delivered", ["endpoint"])
MERGED_TOKENS = Counter("ascendra_gateway_merged_tokens", "Tokens that shared an event because a reader was behind")
TTFT_S = Histogram(
    "ascendra_gateway_time_to_first_token_seconds",
    "From the request's arrival to its first output",
    ["endpoint"],
    buckets=(0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 7.5, 10, 20, 40, 80),
)
DURATION_S = Histogram(
    "ascendra_gateway_request_duration_seconds",
    "From the request's arrival to its end",
    ["endpoint"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640),
)

# Load of the cluster under the names that clients of vLLM watch; set from the routers' status at each scrape.
RUNNING = Gauge("vllm:num_requests_running", "Requests resident in the engines of all workers", ["model_name"])
WAITING = Gauge("vllm:num_requests_waiting", "Requests waiting in the engines of all workers", ["model_name"])
ROUTER_UP = Gauge("ascendra_gateway_router_up", "Whether a router answers", ["router"])
CONNECTIONS_REFUSED = Counter("ascendra_gateway_connections_refused", "Connections closed by a limit.", ["code"])


def totals() -> dict[str, Any]:
    """Return what this process has answered: requests by status, and tokens."""
    requests: dict[str, int] = {}
    for sample in _samples(REQUESTS, "ascendra_gateway_requests_total"):
        status = sample.labels["status"]
        requests[status] = requests.get(status, 0) + int(sample.value)
    return {
        "requests": requests,
        "tokens": int(sum(s.value for s in _samples(TOKENS, "ascendra_gateway_tokens_total"))),
    }


def _samples(counter: Counter, name: str) -> list[Any]:
    return [sample for family in counter.collect() for sample in family.samples if sample.name == name]
