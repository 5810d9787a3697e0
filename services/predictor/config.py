"""Configuration of the predictor."""

import json
from dataclasses import dataclass
from pathlib import Path

from services.common.config import option
from services.common.listening import check_http_address
from services.common.tls import TlsConfig, check_listener
from services.policy.step_time import PROFILES, StepTimeModel


@dataclass(frozen=True, kw_only=True)
class PredictorConfig:
    """The Ascendra predictor: learns step times, calibrates first-token predictions, serves risk."""

    listen: str = option("127.0.0.1:7300", "gRPC address, host:port or unix:PATH; port 0 picks one")
    tls: TlsConfig = option(TlsConfig(), "certificates of the gRPC port and for connections to other services")
    insecure: bool = option(False, "listen in plaintext although other machines can reach the address")
    metrics_listen: str = option("127.0.0.1:0", "HTTP address of /health, /live and /metrics; empty: none")
    publish_interval_s: float = option(1.0, "seconds between two snapshots of the models")
    forget_after_s: float = option(600.0, "seconds of silence after which a worker's models are dropped")
    max_workers: int = option(1024, "most workers remembered; the longest silent goes first")
    step_time_profile: str = option(
        "", "model that workers without one begin with: a profile's name or a JSON file; empty: the built-in one"
    )
    log_level: str = option("info", "debug, info, warning or error")

    def __post_init__(self) -> None:
        check_listener(self.listen, self.tls, self.insecure)
        if self.metrics_listen:
            check_http_address("metrics-listen", self.metrics_listen)
        if self.publish_interval_s <= 0 or self.forget_after_s <= 0 or self.max_workers < 1:
            raise ValueError("publish-interval-s, forget-after-s and max-workers must be above 0")

    def warm_start(self) -> StepTimeModel | None:
        """Return the model that workers without one begin with. Raises ValueError or OSError."""
        if not self.step_time_profile:
            return None
        if self.step_time_profile in PROFILES:
            return PROFILES[self.step_time_profile]
        return StepTimeModel.from_dict(json.loads(Path(self.step_time_profile).read_text(encoding="utf-8")))
