"""The gateway's configuration."""

from dataclasses import dataclass
from typing import Literal

from services.common.config import option
from services.common.listening import check_http_address
from services.common.tls import TlsConfig
from services.gateway.http_guard import HttpLimits


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """Serves the OpenAI HTTP protocol in front of Ascendra routers."""

    listen: str = option("127.0.0.1:8000", "HTTP address, host:port; port 0 picks one")
    reuse_port: bool = option(False, "share the port with other gateway processes (SO_REUSEPORT)")
    https_cert: str = option("", "PEM file of the certificate chain for HTTPS, may be replaced any time; empty: HTTP")
    https_key: str = option("", "PEM file of its private key")
    tls: TlsConfig = option(TlsConfig(), "certificates for the connections to the routers")
    routers: tuple[str, ...] = option(("127.0.0.1:7100",), "gRPC addresses of the routers, host:port or unix:PATH")
    api_keys_file: str = option(
        "", "YAML file of callers: SHA-256 of their keys, and rights; empty: no key is asked for"
    )
    api_key_file: str = option("", "file with the API key that the routers ask of the gateway; empty: none")
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
    max_connections: int = option(16_384, "connections at once; more are closed")
    head_timeout_s: float = option(10.0, "time that a client has to send the headers of a request, in seconds")
    body_timeout_s: float = option(30.0, "time that a client has to send the body of a request, in seconds")
    max_head_bytes: int = option(32 << 10, "most bytes in the request line and headers of a request")
    max_headers: int = option(100, "most headers of a request")

    attainment_target: float = option(0.99, "share of requests that should meet their objective; a mark in the console")

    settle_s: float = option(0.2, "time between not ready and closing the port, in seconds, for balancers")
    drain_timeout_s: float = option(30.0, "time that requests get to finish after SIGTERM, in seconds")

    def __post_init__(self) -> None:
        check_http_address("listen", self.listen)
        if bool(self.https_cert) != bool(self.https_key):
            raise ValueError("https-cert and https-key belong together")
        if not 0 <= self.trace_sample_ratio <= 1:
            raise ValueError("trace-sample-ratio must be from 0 to 1")
        if not self.routers:
            raise ValueError("routers must name at least one router")
        sizes = ("max_body_bytes", "max_in_flight", "max_choices", "completion_max_tokens", "keep_alive_s")
        for name in (*sizes, "max_connections", "max_head_bytes", "max_headers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name.replace('_', '-')} must be at least 1")
        for name in ("request_timeout_s", "status_timeout_s", "head_timeout_s", "body_timeout_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name.replace('_', '-')} must be above 0")
        if not 0 < self.attainment_target <= 1:
            raise ValueError("attainment-target must be above 0 and at most 1")

    def http_limits(self) -> HttpLimits:
        """Return the limits of connections."""
        return HttpLimits(
            max_connections=self.max_connections,
            head_timeout_s=self.head_timeout_s,
            max_head_bytes=self.max_head_bytes,
            max_headers=self.max_headers,
        )
