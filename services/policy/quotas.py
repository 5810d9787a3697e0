"""What a tenant may use: requests per second, requests at once, tokens per minute. Times are seconds, monotonic.

Token buckets: a bucket holds what may be used at once and fills at the rate that may be used for ever, so over any span
of t seconds at most `capacity + rate * t` is let through.
"""

import enum
import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """Limits of one tenant at one router; 0 means none."""

    requests_per_s: float = 0.0
    """Requests a second, on average."""
    burst_requests: int = 0
    """Requests that may come at once after a pause; 0: a second's worth, at least one."""
    concurrent_requests: int = 0
    """Requests that are being served."""
    tokens_per_min: int = 0
    """Prompt and generated tokens a minute; also the most that may be used at once after a pause."""

    def __post_init__(self) -> None:
        for name in ("requests_per_s", "burst_requests", "concurrent_requests", "tokens_per_min"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name.replace('_', '-')} must be finite and at least 0, got {value}")

    @property
    def unlimited(self) -> bool:
        """Whether there is no limit at all."""
        return not (self.requests_per_s or self.concurrent_requests or self.tokens_per_min)


class Limit(enum.StrEnum):
    """Which limit refused a request."""

    REQUESTS = "REQUEST_RATE"
    CONCURRENCY = "CONCURRENT_REQUESTS"
    TOKENS = "TOKEN_RATE"
    TOO_LARGE = "TOO_MANY_TOKENS"
    """It needs more tokens than may ever be used at once."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not let in."""

    limit: Limit
    retry_after_s: float
    """When it would be let in if nothing else came; infinite: never; 0: when another request of the tenant ends."""


class Bucket:
    """A token bucket."""

    __slots__ = ("_level", "_since_s", "capacity", "rate_per_s")

    def __init__(self, capacity: float, rate_per_s: float, now_s: float) -> None:
        """Make a full bucket."""
        self.capacity = capacity
        self.rate_per_s = rate_per_s
        self._level = capacity
        self._since_s = now_s

    def level(self, now_s: float) -> float:
        """Return what may be used at once."""
        return min(self.capacity, self._level + max(now_s - self._since_s, 0.0) * self.rate_per_s)

    def wait_s(self, amount: float, now_s: float) -> float:
        """Return how long until an amount may be used; infinite when it never may."""
        if amount > self.capacity:
            return math.inf
        return max(amount - self.level(now_s), 0.0) / self.rate_per_s

    def take(self, amount: float, now_s: float) -> None:
        """Use an amount; a negative one gives back what was not used."""
        self._level = min(self.capacity, self.level(now_s) - amount)
        self._since_s = max(self._since_s, now_s)


class TenantUse:
    """What one tenant uses. A request enters, reserves its tokens, and leaves with what it did not use of them."""

    def __init__(self, quota: Quota, now_s: float) -> None:
        """Begin with nothing used."""
        self.quota = quota
        self.live = 0
        rate = quota.requests_per_s
        self._requests = Bucket(quota.burst_requests or max(1.0, rate), rate, now_s) if rate else None
        tokens = quota.tokens_per_min
        self._tokens = Bucket(tokens, tokens / 60, now_s) if tokens else None

    def enter(self, now_s: float) -> Refusal | None:
        """Let a request in, or say why not; only what is let in counts."""
        if self.quota.concurrent_requests and self.live >= self.quota.concurrent_requests:
            return Refusal(Limit.CONCURRENCY, 0.0)
        if self._requests is not None:
            wait_s = self._requests.wait_s(1.0, now_s)
            if wait_s > 0:
                return Refusal(Limit.REQUESTS, wait_s)
            self._requests.take(1.0, now_s)
        self.live += 1
        return None

    def reserve(self, tokens: int, now_s: float) -> Refusal | None:
        """Set aside the tokens that a request inside may need at most, or say why it has to leave."""
        if self._tokens is None:
            return None
        wait_s = self._tokens.wait_s(tokens, now_s)
        if wait_s > 0:
            return Refusal(Limit.TOO_LARGE if math.isinf(wait_s) else Limit.TOKENS, wait_s)
        self._tokens.take(tokens, now_s)
        return None

    def leave(self, unused_tokens: int, now_s: float) -> None:
        """Let a request out that has entered."""
        self.live -= 1
        if self._tokens is not None and unused_tokens:
            self._tokens.take(-unused_tokens, now_s)

    def forgettable(self, now_s: float) -> bool:
        """Return whether starting afresh would allow nothing more."""
        buckets = [bucket for bucket in (self._requests, self._tokens) if bucket is not None]
        return self.live == 0 and all(bucket.level(now_s) >= bucket.capacity for bucket in buckets)
