"""The gateway's configuration."""

from dataclasses import dataclass
from typing import Literal

from services.common.config import option
from services.common.tls import TlsConfig


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Serves the OpenAI HTTP protocol in front of Ascendra routers."""

    listen: str = option("127.0.0.1:8000", "HTTP address, host:port; port 0 picks one")
    reuse_port: bool = option(False, "share the port with other gateway processes (SO_REUSEPORT)")
    https_cert: str = option("", "PEM file of the certificate chain for HTTPS, may be replaced any time; empty: HTTP")
    https_key: str = option("", "PEM file of its private key")
    tls: TlsConfig = option(TlsConfig(), "certificates for the connections to the routers")
    routers: tuple[str, ...] = option(("127.0.0.1:7100",), "gRPC addresses of the routers, host:port or unix:PATH")
    api_keys_file: str = option("", "YAML file of tenants and the SHA-256 of their keys; empty: no key is asked for")
    log_level: Literal["debug", "info", "warning", "error"] = option("info", "least severe log level written")
    otlp_endpoint: str = option("", "URL that spans go to by OTLP/gRPC, http://host:4317 or https://...; empty: none")
    trace_sample_ratio: float = option(1.0, "share of the traces begun here that are kept; others follow their caller")

    request_timeout_s: float = option(600.0, "time limit of a request, in seconds")
    status_timeout_s: float = option(2.0, "time limit of every question about the cluster or the tokenizer, in seconds")
    max_body_bytes: int = option(8 << 20, "most bytes in the body of a request")
    max_in_flight: int = option(4096, "requests served at once; more are refused")
    max_choices: int = option(64, "most completions of one request: its prompts times n")
    completion_max_tokens: int = option(16, "tokens that /v1/completions generates when the request sets no limit")
    keep_alive_s: int = option(30, "seconds that an idle connection stays open")

    attainment_target: float = option(0.99, "share of requests that should meet their objective; a mark in the console")

    settle_s: float = option(0.2, "time between not ready and closing the port, in seconds, for balancers")
    drain_timeout_s: float = option(30.0, "time that requests get to finish after SIGTERM, in seconds")

    def __post_init__(self) -> None:
        if bool(self.https_cert) != bool(self.https_key):
            raise ValueError("https-cert and https-key belong together")
        if not 0 <= self.trace_sample_ratio <= 1:
            raise ValueError("trace-sample-ratio must be from 0 to 1")
        if not self.routers:
            raise ValueError("routers must name at least one router")
        for name in ("max_body_bytes", "max_in_flight", "max_choices", "completion_max_tokens", "keep_alive_s"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1")
        for name in ("request_timeout_s", "status_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name.replace('_', '-')} must be above 0")
        if not 0 < self.attainment_target <= 1:
            raise ValueError("attainment-target must be above 0 and at most 1")
