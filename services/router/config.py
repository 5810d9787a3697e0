"""The router's configuration."""

import math
from dataclasses import dataclass, field
from typing import Literal

from services.common.config import option
from services.common.listening import check_http_address
from services.common.tls import TlsConfig, check_listener
from services.policy.admission import AdmissionPolicy
from services.policy.kv_move import KvMovePolicy
from services.policy.late_binding import LateBindingPolicy
from services.policy.offload import OffloadPolicy
from services.policy.placement import PLACEMENTS, PlacementPolicy
from services.policy.quotas import Quota
from services.policy.relief import ReliefPolicy
from services.policy.roles import RolePolicy
from services.policy.tickets import TicketPolicy
from services.policy.token_budget import BudgetPolicy

LATE = "late"
"""The placement that keeps new requests in the router until a worker has room."""


@dataclass(frozen=True, kw_only=True)
class SloClass:
    """Objectives of requests that name none, and the limits within which a request may choose its own."""

    ttft_ms: float = 2000.0
    """Time to first token, in milliseconds."""
    tbt_ms: float = 100.0
    """Time between tokens, in milliseconds."""
    min_ttft_ms: float = 50.0
    """Tightest TTFT objective that a request gets."""
    max_ttft_ms: float = 600_000.0
    """Loosest TTFT objective that a request gets."""
    min_tbt_ms: float = 5.0
    """Tightest TBT objective that a request gets."""
    max_tbt_ms: float = 60_000.0
    """Loosest TBT objective that a request gets."""
    on_overload: Literal["relegate", "refuse"] = "relegate"
    """What happens to a request that nobody can serve in time and that does not say."""

    def __post_init__(self) -> None:
        for name in ("ttft", "tbt"):
            low, value, high = (getattr(self, f"{prefix}{name}_ms") for prefix in ("min_", "", "max_"))
            if not (0 < low <= value <= high < math.inf):
                raise ValueError(f"{name}-ms must be within min-{name}-ms and max-{name}-ms, all finite and above 0")


@dataclass(frozen=True, kw_only=True)
class Tenant:
    """What the requests of one tenant may ask, within the limits of their class."""

    slo_classes: tuple[str, ...] = ()
    """Classes that it may name; empty: all. Without "default", the first one serves requests that name none."""
    min_ttft_ms: float = 0.0
    """Tightest TTFT objective that it gets, above its class's limits too."""
    min_tbt_ms: float = 0.0
    """Tightest TBT objective that it gets, above its class's limits too."""

    quota: Quota | None = None
    """Its share at this router; unset: the router's `quota`."""

    def __post_init__(self) -> None:
        for name in ("min_ttft_ms", "min_tbt_ms"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name.replace('_', '-')} must be a finite time of at least 0")


@dataclass(frozen=True, kw_only=True)
class SinkConfig:
    """A downstream service that receives copies of the streams that name it."""

    address: str
    """host:port or unix:PATH."""
    max_buffered_tokens: int = 65_536
    """Tokens kept until it has dealt with them; beyond that the oldest are dropped, and it is told which."""
    ack_timeout_s: float = 30.0
    """A connection on which nothing is acknowledged for this long is replaced, in seconds."""
    tls: TlsConfig | None = None
    """How to connect to it; unset: as to everything else; {}: in plaintext."""

    def __post_init__(self) -> None:
        if not self.address:
            raise ValueError("address must not be empty")
        if self.max_buffered_tokens < 2:
            raise ValueError("max-buffered-tokens must be at least 2")
        if not 0 < self.ack_timeout_s < math.inf:
            raise ValueError("ack-timeout-s must be a finite time above 0")


def default_slo_classes() -> dict[str, SloClass]:
    """Return the classes that exist without configuration."""
    return {
        "default": SloClass(),
        "interactive": SloClass(ttft_ms=1000.0, tbt_ms=50.0),
        "batch": SloClass(ttft_ms=10_000.0, tbt_ms=200.0),
    }


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """Routes requests to LP and HP workers so that they keep their latency objectives."""

    listen: str = option("127.0.0.1:7100", "gRPC address, host:port or unix:PATH; port 0 picks one")
    tls: TlsConfig = option(TlsConfig(), "certificates of the gRPC port and for connections to other services")
    insecure: bool = option(False, "listen in plaintext although other machines can reach the address")
    api_keys_file: str = option(
        "", "YAML file of callers: SHA-256 of their keys, certificates, rights; empty: nobody is asked who it is"
    )
    resume_key_file: str = option(
        "", "file with a secret that all routers share, to sign resume cursors; empty: cursors are not signed"
    )
    metrics_listen: str = option("127.0.0.1:7190", "HTTP address of /health, /live and /metrics; empty: none")
    reuse_port: bool = option(False, "share the gRPC port with other router processes (SO_REUSEPORT)")
    workers: tuple[str, ...] = option((), "addresses of workers, host:port or unix:PATH")
    worker_dns: str = option("", "host:port whose addresses are workers, resolved again and again; empty: none")
    worker_dns_interval_s: float = option(5.0, "seconds between two resolutions of --worker-dns")
    predictor: str = option("", "address of the predictor; empty: none")
    prediction_max_age_s: float = option(10.0, "a worker's learned model is dropped after this long without news of it")
    model: str = option("", "directory with tokenizer.json, tokenizer_config.json and config.json")
    model_name: str = option("", "name of the model in requests; empty: the directory's name")
    router_id: str = option("", "unique id of this process; empty: made from host and process id")
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "least severe log level written")
    decision_log: str = option("", "file that receives every decision as a JSON line; empty: none")
    otlp_endpoint: str = option("", "URL that spans go to by OTLP/gRPC, http://host:4317 or https://...; empty: none")
    trace_sample_ratio: float = option(1.0, "share of the traces begun here that are kept; others follow their caller")

    max_live_requests: int = option(4096, "requests served at once; more are refused")
    max_text_bytes: int = option(1 << 20, "most bytes of text in one prompt")
    max_unread_tokens: int = option(16_384, "a request whose reader is further behind than this is cancelled")
    session_max_requests: int = option(2048, "requests in flight in one session; more are refused")
    default_max_tokens: int = option(1024, "tokens generated when a request sets no limit")
    default_timeout_s: float = option(600.0, "time limit of a request that sets none, in seconds; 0: none")
    encode_threads: int = option(2, "threads that tokenize")
    encode_queue: int = option(256, "texts waiting to be tokenized; more are refused")

    placement: str = option(
        "tbt_bins",
        f"rule that places a new request: {', '.join(PLACEMENTS)}; or {LATE}: workers draw it when they have room",
    )
    hp_fill: float = option(
        PlacementPolicy().hp_fill,
        "HP takes arrivals that it serves within this share of their like's tightest TTFT; 0 or elastic-roles: none",
    )
    offload: bool = option(True, "move waiting requests from LP to HP before they miss their objective")
    rescue: bool = option(True, "move waiting requests between LP or unified workers before they miss their objective")
    relief: bool = option(True, "move running streams before their worker breaks their TBT objective")
    tickets: bool = option(True, "let idle HP workers take waiting LP requests")
    elastic_roles: bool = option(False, "set the workers' roles: HPs follow the offload pressure; for one router only")
    decide_interval_ms: float = option(15.0, "longest time between two rounds of offload and ticket decisions")
    move_running: bool = option(True, "continue a stream on another worker when its worker fails or drains")
    kv_moves: bool = option(True, "move running streams with their KV cache where workers can and it is faster")
    max_moves: int = option(5, "attempts of one request that may end because a worker failed")
    no_worker_wait_s: float = option(3.0, "a request waits this long for a worker when there is none, in seconds")

    silence_s: float = option(
        0.8, "a worker silent for this long is suspect; longer while its messages come late anyway"
    )
    stall_s: float = option(0.9, "a worker whose steps stand still this long, and 4 predicted steps, is suspect")
    stall_unknown_s: float = option(15.0, "the same while too few of its steps were seen to know its pace")
    cancel_timeout_s: float = option(10.0, "a cancellation not acknowledged in this time counts against the worker")
    withdraw_timeout_s: float = option(5.0, "a withdrawal not answered in this time is given up")
    breaker_failures: int = option(3, "failures in a row that open a worker's circuit")
    breaker_open_s: float = option(2.0, "seconds an opened circuit stays open, doubled up to 30 while it keeps failing")

    settle_s: float = option(0.2, "time between NOT_SERVING and refusing new requests, for balancers")
    drain_timeout_s: float = option(30.0, "time that requests get to finish after SIGTERM")

    slo_classes: dict[str, SloClass] = field(
        default_factory=default_slo_classes, metadata={"help": "objectives and limits by class"}
    )
    quota: Quota = option(Quota(), "share of each tenant that has no quota of its own, at this router")
    tenants: dict[str, Tenant] = option(
        {}, "what a tenant's requests may ask, by name; others are bound by classes only"
    )
    sinks: dict[str, SinkConfig] = option({}, "services that receive copies of streams, by the name requests use")
    admission_policy: AdmissionPolicy = option(AdmissionPolicy(), "limits of what is let in, and of waits in seconds")
    offload_policy: OffloadPolicy = option(OffloadPolicy(), "margins of the offload rule")
    relief_policy: ReliefPolicy = option(ReliefPolicy(), "margins of moves of running streams")
    ticket_policy: TicketPolicy = option(TicketPolicy(), "when tickets are issued")
    late_binding: LateBindingPolicy = option(LateBindingPolicy(), "when a worker has room, under --placement late")
    kv_move_policy: KvMovePolicy = option(KvMovePolicy(), "prior and bounds of KV transfers")
    role_policy: RolePolicy = option(RolePolicy(), "share and hysteresis of HP workers under elastic-roles")
    budget_policy: BudgetPolicy = option(BudgetPolicy(), "how workers size their steps, where they do not say")

    def __post_init__(self) -> None:
        check_listener(self.listen, self.tls, self.insecure)
        if self.metrics_listen:
            check_http_address("metrics-listen", self.metrics_listen)
        if not 0 <= self.trace_sample_ratio <= 1:
            raise ValueError("trace-sample-ratio must be from 0 to 1")
        if "default" not in self.slo_classes:
            raise ValueError('slo-classes must have a class "default"')
        for name, tenant in self.tenants.items():
            unknown = [one for one in tenant.slo_classes if one not in self.slo_classes]
            if unknown:
                raise ValueError(f"tenants.{name}: slo-classes has no class {unknown[0]!r}")
        if self.placement != LATE and self.placement not in PLACEMENTS:
            raise ValueError(f"placement must be one of {', '.join(PLACEMENTS)}, {LATE}, got {self.placement!r}")
        PlacementPolicy(hp_fill=self.hp_fill)
        at_least_one = ("max_live_requests", "max_text_bytes", "max_unread_tokens", "default_max_tokens")
        for name in (*at_least_one, "session_max_requests", "encode_threads", "encode_queue", "breaker_failures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1")
        positive = (
            "decide_interval_ms",
            "silence_s",
            "stall_s",
            "stall_unknown_s",
            "cancel_timeout_s",
            "withdraw_timeout_s",
        )
        for name in (*positive, "breaker_open_s", "worker_dns_interval_s", "prediction_max_age_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name.replace('_', '-')} must be above 0")
