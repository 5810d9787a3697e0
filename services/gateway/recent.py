"""The requests that ended last, for the console. Nothing of their texts is kept."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from services.gateway.answers import Choice

KEPT = 200
"""Requests kept by one gateway process."""
_CHOICES_NAMED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedRequest:
    """One request that ended. Times in seconds."""

    request_id: str
    choice_ids: Sequence[str]
    """Ids under which the router can explain its choices; the first few."""
    endpoint: str
    tenant: str
    status: int
    ended_s: float
    """On the monotonic clock."""
    duration_s: float
    ttft_s: float | None
    """At the gateway; None without any output."""
    p99_gap_s: float | None
    """The worst of its choices, as their receipts say."""
    target_ttft_s: float | None
    target_tbt_s: float | None
    met: bool | None
    """Whether all choices kept their objective; None when one has no receipt."""
    prompt_tokens: int
    completion_tokens: int
    pool: str | None
    attempts: int
    """Placements on workers, the most of any choice."""
    relegated: bool

    @classmethod
    def of(cls, choices: Sequence[Choice], **known: Any) -> Self:
        """Make one from the choices and what the exchange knows."""
        receipts = [choice.finished.receipt for choice in choices if choice.finished is not None]
        target = receipts[0].target if receipts else None
        return cls(
            choice_ids=[choice.request_id for choice in choices[:_CHOICES_NAMED]],
            p99_gap_s=max((receipt.p99_gap_ms / 1000 for receipt in receipts), default=None),
            target_ttft_s=target.ttft_ms / 1000 if target and target.ttft_ms else None,
            target_tbt_s=target.tbt_ms / 1000 if target and target.tbt_ms else None,
            met=all(receipt.met for receipt in receipts) if receipts and len(receipts) == len(choices) else None,
            prompt_tokens=sum(choice.prompt_tokens for choice in choices),
            completion_tokens=sum(choice.completion_tokens for choice in choices),
            pool=receipts[0].pool if receipts else None,
            attempts=max((len(receipt.attempts) for receipt in receipts), default=0),
            relegated=any(receipt.relegated for receipt in receipts),
            **known,
        )


class RecentRequests:
    """The last KEPT requests, newest first."""

    def __init__(self) -> None:
        self._ended: deque[EndedRequest] = deque(maxlen=KEPT)

    def add(self, ended: EndedRequest) -> None:
        """Keep one more, and forget the oldest."""
        self._ended.appendleft(ended)

    def as_json(self, tenant: str) -> list[dict[str, Any]]:
        """Return those of a tenant as plain data; "" sees all."""
        now_s = time.monotonic()
        mine = (ended for ended in self._ended if tenant in ("", ended.tenant))
        return [{**asdict(ended), "age_s": now_s - ended.ended_s} for ended in mine]
