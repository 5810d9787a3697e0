"""Whether a running request moves with its KV cache or computes it again elsewhere, and how long either takes."""

import enum
from dataclasses import dataclass


class MoveMethod(enum.StrEnum):
    """How a running request continues elsewhere."""

    KV = "kv"
    """Its KV cache is read from the worker that it leaves."""
    REPLAY = "replay"
    """Prompt and tokens are computed again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvMovePolicy:
    """Prior of the transfer's time, and margins."""

    latency_s: float = 0.05
    """Until measured: of a move with an empty KV cache, from the question for it to the next token."""
    bytes_per_s: float = 1e9
    """Until measured: bandwidth between two workers."""
    caution: float = 1.2
    """The predicted transfer times this has to be below the predicted replay."""
    bound_s: float = 0.7
    """A transfer is given up for a replay after this, plus ..."""
    bound_factor: float = 2.0
    """... this times its prediction."""

    def __post_init__(self) -> None:
        for name in ("latency_s", "bytes_per_s", "caution", "bound_s", "bound_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name.replace('_', '-')} must be above 0, got {getattr(self, name)}")


class TransferTime:
    """Seconds of a move by bytes of KV: latency plus size over bandwidth, learned by exponentially weighted regression.

    The prior counts as one move of each of two sizes, so that neither term is fitted from moves of one size alone.
    """

    _KEPT = 0.9
    """Weight that a move keeps when another one follows."""
    _PRIOR_BYTES = (0.0, 256e6)

    def __init__(self, policy: KvMovePolicy) -> None:
        """Start from the prior."""
        self._prior = policy
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, size_bytes: float, seconds: float) -> None:
        """Take in a move that succeeded."""
        self._weight, self._x, self._y = (self._KEPT * sum_ for sum_ in (self._weight, self._x, self._y))
        self._xx, self._xy = self._KEPT * self._xx, self._KEPT * self._xy
        self._add(size_bytes, seconds)

    def predict_s(self, size_bytes: float) -> float:
        """Return the expected seconds of a move; never below those of a smaller one."""
        weight, x, y, xx, xy = self._weight, self._x, self._y, self._xx, self._xy
        for prior_bytes in self._PRIOR_BYTES:
            prior_s = self._prior.latency_s + prior_bytes / self._prior.bytes_per_s
            weight, x, y = weight + 1, x + prior_bytes, y + prior_s
            xx, xy = xx + prior_bytes * prior_bytes, xy + prior_bytes * prior_s
        slope = max((weight * xy - x * y) / (weight * xx - x * x), 0.0)
        intercept = max((y - slope * x) / weight, 0.0)
        return intercept + slope * size_bytes

    def _add(self, size_bytes: float, seconds: float) -> None:
        self._weight += 1
        self._x += size_bytes
        self._y += seconds
        self._xx += size_bytes * size_bytes
        self._xy += size_bytes * seconds


@dataclass(frozen=True, slots=True)
class MoveChoice:
    """How a request moves, why, and what was predicted in seconds to its next token."""

    method: MoveMethod
    reason: str
    kv_s: float = 0.0
    """0: no transfer was possible."""
    replay_s: float = 0.0


def choose_method(
    context_tokens: int, bytes_per_token: int, transfer: TransferTime, replay_s: float, policy: KvMovePolicy
) -> MoveChoice:
    """Choose the cheaper way for a request whose KV cache could be read.

    Args:
        context_tokens: prompt and tokens generated so far.
        replay_s: predicted seconds to its next token when the target computes them again, queue included.
    """
    kv_s = transfer.predict_s(context_tokens * bytes_per_token)
    compared = f"transfer {kv_s * 1000:.0f} ms, replay {replay_s * 1000:.0f} ms"
    if policy.caution * kv_s < replay_s:
        return MoveChoice(MoveMethod.KV, compared, kv_s, replay_s)
    return MoveChoice(MoveMethod.REPLAY, compared, kv_s, replay_s)


def transfer_bound_s(predicted_s: float, policy: KvMovePolicy) -> float:
    """Return the seconds after which a transfer is given up for a replay."""
    return policy.bound_s + policy.bound_factor * predicted_s
