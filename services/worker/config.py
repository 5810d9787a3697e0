"""Configuration of a worker."""

import json
import math
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.common.config import ConfigError, option
from services.common.listening import check_http_address
from services.common.tls import TlsConfig, check_listener
from services.policy.state import Role
from services.policy.step_time import PROFILES, StepTimeModel
from services.worker.engine.kv_transfer import nixl_installed
from services.worker.engine.settings import EngineSettings, KvTransferSettings, PolicySettings


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """An Ascendra worker: a vLLM engine in a role, served to routers."""

    listen: str = option("127.0.0.1:50061", "address routers attach to, host:port or unix:PATH; port 0 picks one")
    tls: TlsConfig = option(TlsConfig(), "certificates of the gRPC port and for connections to other services")
    insecure: bool = option(False, "listen in plaintext although other machines can reach the address")
    advertise: str = option("", "address announced to routers; empty: the real listen address")
    worker_id: str = option("", "unique id of this worker; empty: host name and process id")
    role: Role = option(Role.UNIFIED, "how it spends its capacity")
    engine: Literal["cpu", "cuda", "emulated"] = option("cpu", "what runs the model")
    model: str = option("", "model directory or Hugging Face id; may be empty for the emulated engine")
    served_model_name: str = option("", "name of the model in the API; empty: last part of `model`, or the profile")
    max_model_len: int = option(4096, "context length in tokens")
    max_num_seqs: int = option(256, "most requests resident in the engine")
    max_num_batched_tokens: int = option(2048, "hard cap of tokens per step")
    kv_cache_memory_bytes: int = option(0, "KV cache size in bytes; 0: the engine's own default")
    kv_capacity_tokens: int = option(380_000, "KV cache size in tokens (emulated engine)")
    vocab_size: int = option(128_256, "vocabulary size (emulated engine without a model)")
    dtype: str = option("auto", "weights and activations: auto, float32, bfloat16, float16")
    seed: int = option(0, "seed of the engine, and of the emulated engine's jitter")
    tensor_parallel_size: int = option(1, "GPUs over which every layer is split")
    pipeline_parallel_size: int = option(
        1, "groups of that many GPUs over which the layers are spread; above 1 only with the static token budget"
    )
    executor: Literal["auto", "mp", "ray"] = option(
        "auto", "what runs a model on several GPUs: processes of this machine, or the Ray cluster it belongs to"
    )
    prefix_caching: bool = option(True, "reuse the KV cache of shared prefixes")
    guided_decoding: bool = option(True, "load the tokenizer, for structured output and bad words")
    scheduler: Literal["policy", "stock"] = option(
        "policy", "stock: vLLM's own scheduler with priority by deadline, also used when ours does not fit vLLM"
    )
    async_scheduling: Literal["auto", "on", "off"] = option(
        "auto", "schedule a step while the one before it runs; auto: on CUDA"
    )
    kv_transfer: Literal["auto", "off"] = option(
        "auto",
        "hand the KV cache of moved requests over by NIXL; auto: when it is installed, not for emulated engines, "
        "the stock scheduler or a CPU engine in several processes",
    )
    kv_transfer_host: str = option("127.0.0.1", "address at which other workers read this one's KV cache")
    kv_lease_s: int = option(10, "seconds that a handed-over KV cache is kept if nobody reads it, at least 6")
    cpu_threads: int = option(1, "OpenMP threads of the CPU engine")
    step_time_profile: str = option(
        "", "step-time model to start with: a profile's name or a JSON file; the emulated engine's step times"
    )
    jitter_sigma: float = option(0.0, "standard deviation of log(step time) (emulated engine)")
    value_function: str = option("edf", "order of waiting requests: fcfs, edf, llf, sjf, hybrid or hrrn")
    token_budget: Literal["static", "dynamic"] = option("dynamic", "how the tokens of a step are limited")
    static_budget_tokens: int = option(2048, "tokens of a step under the static budget")
    calm_factor: float = option(
        2.0, "dynamic steps stay shorter by so many times the delay on the way while all who wait have time; 0: never"
    )
    relegation: Literal["none", "late", "moore_hodgson"] = option("moore_hodgson", "whom to give up in overload")
    max_live_requests: int = option(4096, "most unfinished requests; more are refused with a retryable status")
    step_log: str = option("", "file that receives every engine step as a JSON line; empty: none")
    predictor: str = option("", "address of the predictor; empty: none")
    routers: tuple[str, ...] = option((), "routers to register with")
    api_key_file: str = option("", "file with the API key that the routers ask of those who register; empty: none")
    register_ttl_ms: int = option(6000, "a router forgets the registration after this many milliseconds")
    metrics_listen: str = option("127.0.0.1:0", "host:port of /health, /live and /metrics; empty: none")
    start_timeout_s: float = option(
        1800.0, "seconds in which the engine must start; after that the worker says where it hangs, and exits with 71"
    )
    drain_timeout_s: float = option(30.0, "seconds until a drain cancels what is left")
    heartbeat_ms: int = option(250, "longest silence on a stream in milliseconds")
    otlp_endpoint: str = option("", "URL that spans go to by OTLP/gRPC, http://host:4317 or https://...; empty: none")
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "least severe log line written")

    def __post_init__(self) -> None:
        check_listener(self.listen, self.tls, self.insecure)
        if self.metrics_listen:
            check_http_address("metrics-listen", self.metrics_listen)
        sizes = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_live_requests", "heartbeat_ms")
        for name in (*sizes, "tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.start_timeout_s <= 0:
            raise ValueError(f"start-timeout-s must be above 0, got {self.start_timeout_s}")
        if self.kv_lease_s < 6:
            raise ValueError(f"kv-lease-s must be at least 6, got {self.kv_lease_s}")
        if not 0 <= self.calm_factor < math.inf:
            raise ValueError(f"calm-factor must be a finite number of at least 0, got {self.calm_factor}")
        if self.step_log and not os.access(Path(self.step_log).parent, os.W_OK):
            raise ValueError(f"step-log: cannot write into the folder of {self.step_log}")
        if not self.model and self.engine != "emulated":
            raise ValueError(f"model must be set for the {self.engine} engine")
        gpus = self.tensor_parallel_size * self.pipeline_parallel_size
        if self.engine == "emulated" and (gpus > 1 or self.executor != "auto"):
            raise ValueError("the emulated engine runs on no GPU: tensor- and pipeline-parallel-size must be 1")
        if self.pipeline_parallel_size > 1 and self.token_budget == "dynamic" and self.scheduler == "policy":
            # Several steps are in flight then, so that a stream's gap is several steps, which the budget does not plan.
            raise ValueError("pipeline-parallel-size above 1 needs token-budget: static")

    @property
    def effective_worker_id(self) -> str:
        """The worker's id."""
        return self.worker_id or f"{socket.gethostname()}-{os.getpid()}"

    @property
    def effective_model_name(self) -> str:
        """The model's name in the API."""
        return self.served_model_name or Path(self.model).name or self.step_time_profile or "emulated"

    def engine_settings(self) -> EngineSettings:
        """Return what the engine adapter needs. Raises ConfigError for an unknown profile."""
        emulated = self.engine == "emulated"
        profile = step_time_model(self.step_time_profile or ("a100-llama3-8b" if emulated else ""))
        return EngineSettings(
            engine=self.engine,
            model=self.model,
            served_model_name=self.effective_model_name,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            dtype=self.dtype,
            seed=self.seed,
            kv_cache_memory_bytes=self.kv_cache_memory_bytes,
            kv_capacity_tokens=self.kv_capacity_tokens,
            vocab_size=self.vocab_size,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            executor=self.executor,
            prefix_caching=self.prefix_caching,
            guided_decoding=self.guided_decoding and not emulated,
            stock_scheduler=self.scheduler == "stock",
            async_scheduling=self.async_scheduling,
            jitter_sigma=self.jitter_sigma,
            emulated_step_time=profile if emulated else None,
            step_time=profile,
            kv_transfer=self._kv_transfer(),
            start_timeout_s=self.start_timeout_s,
            policy=PolicySettings(
                role=self.role.value,
                value_function=self.value_function,
                token_budget=self.token_budget,
                static_budget_tokens=self.static_budget_tokens,
                calm_factor=self.calm_factor,
                relegation=self.relegation,
            ),
        )

    def _kv_transfer(self) -> KvTransferSettings | None:
        real = self.engine == "cuda" or (self.engine == "cpu" and self.tensor_parallel_size == 1)
        if self.kv_transfer == "off" or not real or self.scheduler != "policy" or not nixl_installed():
            return None
        return KvTransferSettings(host=self.kv_transfer_host, lease_s=self.kv_lease_s)


def step_time_model(name: str) -> StepTimeModel | None:
    """Return a profile by name, or read it from a JSON file; None for an empty name. Raises ConfigError."""
    if not name:
        return None
    if name in PROFILES:
        return PROFILES[name]
    try:
        return StepTimeModel.from_dict(json.loads(Path(name).read_text(encoding="utf-8")))
    except OSError as error:
        known = ", ".join(PROFILES)
        raise ConfigError(f"step-time-profile: {name!r} is neither a profile ({known}) nor a readable file") from error
    except ValueError as error:
        raise ConfigError(f"step-time-profile: {name}: {error}") from error
