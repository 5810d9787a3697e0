"""Quotas of tenants at this router: every router counts for itself."""

import math
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence

from ascendra.v1 import common_pb2, inference_pb2
from services.common.errors import ResourceExhausted, ServiceError
from services.policy.quotas import Limit, Quota, Refusal, TenantUse
from services.router.config import Tenant
from services.router.mailbox import Sink

_MAX_TENANTS = 10_000
"""Tenants remembered; unless callers are known by key, tenants are what requests claim."""
_MESSAGES = {
    Limit.REQUESTS: "the tenant sends more than {quota.requests_per_s:g} requests a second",
    Limit.CONCURRENCY: "the tenant has {quota.concurrent_requests} requests in progress already",
    Limit.TOKENS: "the tenant uses more than {quota.tokens_per_min} tokens a minute",
    Limit.TOO_LARGE: "prompt and max_tokens make {tokens}, the tenant may use {quota.tokens_per_min} a minute",
}
_CONCURRENCY_RETRY_S = 0.5


class Pass:
    """One request's share of its tenant's quota."""

    __slots__ = ("_reserved", "_use", "used_tokens")

    def __init__(self, use: TenantUse | None) -> None:
        self._use = use
        self._reserved = 0
        self.used_tokens = 0

    def reserve(self, prompt_tokens: int, max_tokens: int) -> None:
        """Set tokens aside. Raises ResourceExhausted; the pass is still to be closed."""
        if self._use is None:
            return
        tokens = prompt_tokens + max_tokens
        refusal = self._use.reserve(tokens, time.monotonic())
        if refusal is not None:
            raise _refused(refusal, self._use.quota, tokens)
        self._reserved = tokens

    def metered(self, sink: Sink, resumed_tokens: int) -> Sink:
        """Return a sink that counts what goes to `sink` and closes the pass at the end.

        Args:
            resumed_tokens: generated before, and now part of what has to be computed.
        """
        return sink if self._use is None else Metered(sink, self, resumed_tokens)

    def close(self) -> None:
        """Give back what was not used; does nothing the second time."""
        use, self._use = self._use, None
        if use is not None:
            use.leave(max(self._reserved - self.used_tokens, 0), time.monotonic())


class Metered:
    """A request's sink that keeps the books."""

    __slots__ = ("_pass", "_resumed_tokens", "_sink")

    def __init__(self, sink: Sink, admitted: Pass, resumed_tokens: int) -> None:
        self._sink = sink
        self._pass = admitted
        self._resumed_tokens = resumed_tokens

    def accepted(self, accepted: inference_pb2.Accepted) -> None:
        """Say that the request was taken."""
        self._pass.used_tokens = accepted.prompt_tokens + self._resumed_tokens
        self._sink.accepted(accepted)

    def tokens(
        self, offset: int, token_ids: Sequence[int], text: str, logprobs: Iterable[common_pb2.PositionLogprobs] = ()
    ) -> bool:
        """Append tokens."""
        self._pass.used_tokens += len(token_ids)
        return self._sink.tokens(offset, token_ids, text, logprobs)

    def finished(self, text: str, finished: inference_pb2.Finished) -> None:
        """Append the last text and the last message."""
        self._pass.close()
        self._sink.finished(text, finished)

    def failed(self, error: ServiceError) -> None:
        """End the stream with a status."""
        self._pass.close()
        self._sink.failed(error)

    def abandoned(self) -> None:
        """End the stream: its caller is gone."""
        self._pass.close()
        self._sink.abandoned()


class Quotas:
    """What every tenant uses."""

    def __init__(self, default: Quota, tenants: Mapping[str, Tenant]) -> None:
        """Make the books.

        Args:
            default: of tenants that have no quota of their own.
        """
        self._default = default
        self._own = {name: tenant.quota for name, tenant in tenants.items() if tenant.quota is not None}
        self._uses: OrderedDict[str, TenantUse] = OrderedDict()

    def enter(self, tenant: str) -> Pass:
        """Let a request in; the pass must be closed when it ends. Raises ResourceExhausted."""
        quota = self._own.get(tenant, self._default)
        if quota.unlimited:
            return Pass(None)
        now_s = time.monotonic()
        use = self._uses.get(tenant)
        if use is None:
            self._forget_one(now_s)
            use = self._uses[tenant] = TenantUse(quota, now_s)
        self._uses.move_to_end(tenant)
        refusal = use.enter(now_s)
        if refusal is not None:
            raise _refused(refusal, quota, 0)
        return Pass(use)

    def _forget_one(self, now_s: float) -> None:
        """Make room for a tenant; the one not seen for longest that loses nothing by it goes."""
        if len(self._uses) < _MAX_TENANTS:
            return
        quiet = next((name for name, use in self._uses.items() if use.forgettable(now_s)), None)
        if quiet is None:
            raise ResourceExhausted(
                f"{_MAX_TENANTS} tenants use this router already", reason="TOO_MANY_TENANTS", retry_safe=True,
                retry_after_ms=1000,
            )  # fmt: skip
        del self._uses[quiet]


def _refused(refusal: Refusal, quota: Quota, tokens: int) -> ResourceExhausted:
    helps = math.isfinite(refusal.retry_after_s)
    wait_s = refusal.retry_after_s or _CONCURRENCY_RETRY_S
    return ResourceExhausted(
        _MESSAGES[refusal.limit].format(quota=quota, tokens=tokens),
        reason=refusal.limit.value,
        retry_safe=helps,
        retry_after_ms=math.ceil(wait_s * 1000) if helps else 0,
    )
