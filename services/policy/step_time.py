"""How long one engine step takes: linear in what the step computes, one coefficient set per range of step size."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FORMAT_VERSION = 1
COEFFICIENTS = ("a0", "a1", "a2", "a3", "a4", "a5")


@dataclass(frozen=True, slots=True)
class StepShape:
    """What one step computes: the features of the step-time model."""

    prefill_tokens: int = 0
    decodes: int = 0
    """Sequences that decode one token."""
    decode_context_tokens: int = 0
    """Sum of their context lengths."""
    prefill_context_products: int = 0
    """Sum over prefill chunks of chunk tokens x tokens computed before the chunk."""


@dataclass(frozen=True, slots=True)
class StepTimeBin:
    """Coefficients for steps of at most `max_tokens` tokens (prefill + decodes); 0 means no limit."""

    max_tokens: int
    a0: float
    """Seconds per step."""
    a1: float = 0.0
    """Seconds per token, prefill or decode."""
    a2: float = 0.0
    """Seconds per prefill token."""
    a3: float = 0.0
    """Seconds per decode."""
    a4: float = 0.0
    """Seconds per token of decode context."""
    a5: float = 0.0
    """Seconds per (prefill token x token of context before its chunk)."""

    def overhead_s(self, decodes: int, decode_context_tokens: int) -> float:
        """Return the seconds of a step in this bin before its first prefill token."""
        return self.a0 + (self.a1 + self.a3) * decodes + self.a4 * decode_context_tokens

    @property
    def prefill_token_s(self) -> float:
        """Seconds that one more prefill token adds, context aside."""
        return self.a1 + self.a2


@dataclass(frozen=True, slots=True)
class StepTimeModel:
    """T = a0 + a1 (P + D) + a2 P + a3 D + a4 sum(decode context) + a5 sum(chunk x context), in seconds."""

    bins: tuple[StepTimeBin, ...]
    """Ordered by max_tokens; the last one has no limit."""
    safety_factor: float = 1.2
    """Planning quantile over mean of measured step times; at least 1."""
    log_sigma: float = 0.05
    """Standard deviation of log(measured / predicted)."""
    source: str = "unknown"
    """Where it comes from: "profile:<name>", "online", ..."""
    samples: int = 0
    """Steps it was fitted on."""

    def __post_init__(self) -> None:
        limits = [bin.max_tokens for bin in self.bins]
        if not limits or limits[-1] != 0 or any(a <= 0 or (0 < b <= a) for a, b in itertools.pairwise(limits)):
            raise ValueError(f"bins must rise in max_tokens and end with 0 (no limit), got {limits}")
        numbers = [getattr(bin, name) for bin in self.bins for name in COEFFICIENTS]
        if not all(map(math.isfinite, (*numbers, self.safety_factor, self.log_sigma))):
            raise ValueError("step-time coefficients must be finite")
        if self.safety_factor < 1 or self.log_sigma < 0:
            raise ValueError("safety_factor must be at least 1 and log_sigma at least 0")

    def bin_of(self, tokens: int) -> StepTimeBin:
        """Return the coefficients for a step of this many tokens (prefill + decodes)."""
        for bin in self.bins:
            if tokens <= bin.max_tokens:
                return bin
        return self.bins[-1]

    def step_s(self, shape: StepShape) -> float:
        """Return the expected seconds of a step, never negative."""
        c = self.bin_of(shape.prefill_tokens + shape.decodes)
        expected_s = (
            c.overhead_s(shape.decodes, shape.decode_context_tokens)
            + c.prefill_token_s * shape.prefill_tokens
            + c.a5 * shape.prefill_context_products
        )
        return expected_s if expected_s > 0 else 0.0

    def planned_step_s(self, shape: StepShape) -> float:
        """Return the seconds to plan with: expected seconds times the safety factor."""
        return self.safety_factor * self.step_s(shape)

    def problems(self) -> list[str]:
        """Say in which bins the time falls as some feature grows; empty for a physically possible model."""
        found = []
        for bin in self.bins:
            slopes = {
                "step": bin.a0,
                "prefill token": bin.prefill_token_s,
                "decode": bin.a1 + bin.a3,
                "decode context token": bin.a4,
                "prefill context product": bin.a5,
            }
            limit = bin.max_tokens or "inf"
            found += [f"seconds per {what} is {s:.3g} in bin <= {limit}" for what, s in slopes.items() if s < 0]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that survives JSON."""
        return {
            "format_version": FORMAT_VERSION,
            "source": self.source,
            "safety_factor": self.safety_factor,
            "log_sigma": self.log_sigma,
            "samples": self.samples,
            "bins": [
                {"max_tokens": bin.max_tokens, **{name: getattr(bin, name) for name in COEFFICIENTS}}
                for bin in self.bins
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "StepTimeModel":
        """Read what to_dict wrote.

        Raises:
            ValueError: another format version, or values that no model can have.
        """
        if data.get("format_version") != FORMAT_VERSION:
            raise ValueError(f"format_version must be {FORMAT_VERSION}, got {data.get('format_version')}")
        try:
            return cls(
                bins=tuple(
                    StepTimeBin(int(bin["max_tokens"]), **{name: float(bin.get(name, 0.0)) for name in COEFFICIENTS})
                    for bin in data["bins"]
                ),
                safety_factor=float(data["safety_factor"]),
                log_sigma=float(data["log_sigma"]),
                source=str(data["source"]),
                samples=int(data["samples"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a step-time model: {error!r}") from error


A100_LLAMA3_8B = StepTimeModel(
    # Niyama's published fit (A100-80GB, Llama-3-8B, one GPU), kept as data: it falls by 2 ms at 512 tokens, and in
    # decodes above. Its a5 is per context token of a chunk; here divided by chunks of 512 and 1,024 tokens.
    bins=(
        StepTimeBin(512, 0.014936, 5.882e-5, 2.248e-5, 3.635e-5, 1.111e-7, 7.555e-7 / 512),
        StepTimeBin(0, 0.005004, 2.719e-5, 6.863e-5, -4.144e-5, 1.663e-7, 2.727e-6 / 1024),
    ),
    safety_factor=1.2,
    log_sigma=0.05,
    source="profile:a100-llama3-8b",
)

PROFILES = {"a100-llama3-8b": A100_LLAMA3_8B}
