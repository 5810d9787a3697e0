"""Reads the Dockerfiles and compose files as tests need them."""

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from services.gateway.config import GatewayConfig
from services.predictor.config import PredictorConfig
from services.router.config import RouterConfig
from services.worker.config import WorkerConfig

ROOT = Path(__file__).parents[3]
DOCKERFILES = sorted((ROOT / "deploy/docker").glob("*.Dockerfile"))
CONFIG_FOLDER = "/etc/ascendra/"
CONFIG_TYPES: dict[str, type[Any]] = {
    "services.gateway": GatewayConfig,
    "services.predictor": PredictorConfig,
    "services.router": RouterConfig,
    "services.worker": WorkerConfig,
}


@dataclass(slots=True, frozen=True)
class Image:
    """The instructions of a Dockerfile, in order, with continued lines joined."""

    path: Path
    instructions: tuple[tuple[str, str], ...]

    def all(self, name: str) -> list[str]:
        """Return the arguments of every instruction of a name, of all stages."""
        return [arguments for instruction, arguments in self.instructions if instruction == name]

    def final(self, name: str) -> list[str]:
        """Return the arguments of every instruction of a name in the last stage."""
        start = max(i for i, (instruction, _) in enumerate(self.instructions) if instruction == "FROM")
        return [arguments for instruction, arguments in self.instructions[start:] if instruction == name]

    @property
    def environment(self) -> dict[str, str]:
        """The variables of the last stage."""
        return dict(pair.split("=", 1) for line in self.final("ENV") for pair in line.split())

    @property
    def copies(self) -> list[tuple[list[str], str]]:
        """(sources, target) of what the last stage takes from the build context."""
        parts = [line.split() for line in self.final("COPY") if not line.startswith("--from")]
        return [(part[:-1], part[-1]) for part in parts]

    @property
    def module(self) -> str:
        """What `python -m` starts."""
        python, flag, module = json.loads(self.final("ENTRYPOINT")[-1])
        assert (python, flag) == ("python", "-m")
        return str(module)

    @property
    def probed_port(self) -> int:
        """The port that the health check asks."""
        probe = json.loads(self.final("HEALTHCHECK")[-1].partition("CMD ")[2])
        assert probe[:3] == ["python", "-m", "services.common.health_probe"]
        return urlsplit(probe[3]).port or port_of(probe[3])


def read_image(path: Path) -> Image:
    """Parse a Dockerfile."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return Image(path, tuple((name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined)))


def read_compose(*names: str, environ: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return compose files merged in order, with their variables replaced."""
    loaded = (yaml.safe_load(_interpolate((ROOT / "deploy" / name).read_text(), environ or {})) for name in names)
    merged: dict[str, Any] = functools.reduce(_merge, loaded)
    return merged


def port_of(address: str) -> int:
    """Return the port of host:port."""
    return int(address.rpartition(":")[2])


def _interpolate(text: str, environ: Mapping[str, str]) -> str:
    def replace(match: re.Match[str]) -> str:
        if match["name"] is None:
            return "$"
        value = environ.get(match["name"], "")
        if match["operator"] == ":+":
            return match["word"] if value else ""
        return value or match["word"]

    return re.sub(r"\$(?:\$|\{(?P<name>\w+)(?P<operator>:[-+])(?P<word>[^}]*)\})", replace, text)


def _merge(base: Any, overlay: Any, key: str = "") -> Any:
    if key == "volumes" and isinstance(base, list):
        return [*base, *overlay]
    if isinstance(base, dict) and isinstance(overlay, dict):
        return base | {k: _merge(base[k], value, k) if k in base else value for k, value in overlay.items()}
    return overlay
