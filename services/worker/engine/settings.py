"""What the adapter needs to start an engine: plain data, checked, without vLLM."""

from dataclasses import dataclass, field
from typing import Any

from services.policy.step_time import StepTimeModel


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    """Role and policies of the in-engine scheduler; see services/policy."""

    role: str = "unified"
    value_function: str = "edf"
    token_budget: str = "dynamic"
    static_budget_tokens: int = 512
    calm_factor: float = 2.0
    relegation: str = "moore_hodgson"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for the engine core."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTransferSettings:
    """How KV caches are handed over to other workers."""

    host: str
    """Address of this host at which other workers reach the engine."""
    lease_s: int
    """KV that nobody reads is kept this long, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """How to start an engine."""

    engine: str
    """"cpu", "cuda" or "emulated"."""
    model: str
    """Directory or Hugging Face id; for the emulated engine it may be empty."""
    served_model_name: str
    """Its name in the API and in vLLM's metrics."""
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    dtype: str = "auto"
    seed: int = 0
    kv_cache_memory_bytes: int = 0
    """0: the engine's own default."""
    kv_capacity_tokens: int = 0
    """Emulated engine only."""
    vocab_size: int = 0
    """Emulated engine without a model only."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    executor: str = "auto"
    """"auto" leaves it to vLLM, "mp" or "ray"."""
    prefix_caching: bool = True
    guided_decoding: bool = True
    stock_scheduler: bool = False
    """vLLM's own scheduler with priority by deadline, instead of ours: no policies, no telemetry, no withdrawal."""
    async_scheduling: str = "auto"
    """"auto" leaves it to vLLM, "on" or "off"."""
    jitter_sigma: float = 0.0
    """Emulated engine only: standard deviation of log(step time)."""
    emulated_step_time: StepTimeModel | None = None
    """Emulated engine only: what its steps take."""
    step_time: StepTimeModel | None = None
    """Model that the scheduler plans with until it has learned; None: learned from nothing."""
    policy: PolicySettings = field(default_factory=PolicySettings)
    kv_transfer: KvTransferSettings | None = None
    """None: KV is never handed over."""
    start_timeout_s: float
    """The engine must start within, in seconds."""
