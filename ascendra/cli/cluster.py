"""A cluster of plain processes on this machine, run from a checkout of the repository."""

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml

import ascendra
from ascendra.cli.options import CliError
from ascendra.cli.processes import Child, Event
from ascendra.client import AsyncClient
from ascendra.errors import DeadlineExceededError, PermissionDeniedError, UnauthenticatedError, UnavailableError
from ascendra.v1 import cluster_pb2

MAX_MODEL_LEN = 4096
"""Context length of the workers, unless the model's own is shorter or a worker configuration says otherwise."""
DEMO_KV_CACHE_BYTES = 64 << 20
DRAIN_S = 5.0
_START_LIMIT_S = {"cpu": 300.0, "emulated": 300.0, "cuda": 1200.0}
_STOP_MARGIN_S = 10.0
_RESTART_PAUSE_S = (0.5, 10.0)
_STEADY_S = 30.0
_LAST_PORT = 65535
# What this module decides; a variable of the user must not undo it in the services.
_OWN_VARIABLES = ("LISTEN", "METRICS_LISTEN", "WORKERS", "WORKER_DNS", "ROUTERS", "PREDICTOR", "MODEL", "MODEL_NAME",
                  "SERVED_MODEL_NAME", "ROLE", "ENGINE", "WORKER_ID", "ROUTER_ID", "ADVERTISE", "TLS_CA", "TLS_CERT",
                  "TLS_KEY", "TLS_SERVER_NAME", "API_KEYS_FILE", "API_KEY_FILE")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """What to run."""

    lp: int
    hp: int
    engine: str
    routers: int
    port: int
    """Port of the first router; 0 picks free ones."""
    gateway_port: int | None = None
    """Port of the gateway; 0 picks a free one, None: no gateway."""
    work_dir: Path
    """Receives logs and configuration files."""
    model: Path | None = None
    """Model directory; None: the demo model."""
    worker_config: Path | None = None
    """YAML merged into every worker's configuration."""
    router_config: Path | None = None
    """YAML configuration of the routers."""

    @property
    def worker_roles(self) -> dict[str, str]:
        """Role by worker id. Without an HP worker there is no split."""
        if self.hp == 0:
            return {f"worker-{number}": "unified" for number in range(self.lp)}
        roles = {f"lp-{number}": "low" for number in range(self.lp)}
        return roles | {f"hp-{number}": "high" for number in range(self.hp)}


@dataclass
class Parts:
    """The processes, by the order in which they are stopped."""

    gateways: list[Child] = field(default_factory=list)
    routers: list[Child] = field(default_factory=list)
    workers: list[Child] = field(default_factory=list)
    predictor: list[Child] = field(default_factory=list)

    def all(self) -> list[Child]:
        """Return every process."""
        return [*self.gateways, *self.routers, *self.workers, *self.predictor]


class LocalCluster:
    """Starts the processes, starts again what dies, and stops everything."""

    def __init__(self, spec: ClusterSpec, report: Callable[[str], None]) -> None:
        self.spec = spec
        self.addresses: dict[str, str] = {}
        """Address by router."""
        self.http_addresses: dict[str, str] = {}
        """Address of /health and /metrics by router or worker."""
        self.gateway_url = ""
        """Base URL of the OpenAI protocol; empty without a gateway."""
        self.model: Path | None = None
        self.waiting_for: set[str] = set()
        """Names of what is not ready yet."""
        self.activity = ""
        """What goes on now, for display."""
        self._report = report
        self._root = checkout()
        self._environment = {k: v for k, v in os.environ.items() if k.removeprefix("ASCENDRA_") not in _OWN_VARIABLES}
        self._parts = Parts()
        self._keepers: list[asyncio.Task[None]] = []
        self._started_s = time.monotonic()
        self._progressed = asyncio.Event()
        self._failure: CliError | None = None
        self._up = False
        self._stopping = False
        self._lock: IO[str] | None = None
        self._sockets: Path | None = None

    async def start(self) -> None:
        """Return when every worker serves requests. Raises CliError; `stop` is to be called in any case."""
        limit_s = _START_LIMIT_S[self.spec.engine]
        try:
            async with asyncio.timeout(limit_s):
                _check_ports(self.spec)
                self._prepare_work_dir()
                self.model = self.spec.model or await self._build_demo_model()
                self._make_parts(self.model)
                for child in self._parts.all():
                    self._begin(child)
                await self._ready()
                await self._attached()
                if self.spec.gateway_port is not None:
                    self._begin(self._make_gateway(self.spec.gateway_port))
                    await self._ready()
        except TimeoutError:
            raise CliError(
                f"not up after {limit_s:.0f} s; still waiting for {', '.join(sorted(self.waiting_for)) or 'workers'}",
                hint=f"see the logs in {self.logs}",
            ) from None
        self._up = True

    async def stop(self) -> None:
        """Stop gateway, routers, workers and predictor, in this order; each may finish for a few seconds."""
        self._stopping = True
        for children in (self._parts.gateways, self._parts.routers, self._parts.workers, self._parts.predictor):
            ended = await asyncio.gather(*(child.stop(DRAIN_S + _STOP_MARGIN_S) for child in children))
            for child, by_itself in zip(children, ended, strict=True):
                if not by_itself:
                    self._report(f"{child.name} did not stop and was killed; log: {child.log}")
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        if self._sockets is not None:
            shutil.rmtree(self._sockets, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    def kill(self) -> None:
        """End every process at once."""
        for child in self._parts.all():
            child.kill()

    @property
    def logs(self) -> Path:
        """Folder of the log files."""
        return self.spec.work_dir / "logs"

    # Preparation

    def _prepare_work_dir(self) -> None:
        self.logs.mkdir(parents=True, exist_ok=True)
        self._lock = (self.spec.work_dir / "cluster.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CliError(
                f"another cluster runs in {self.spec.work_dir}", hint="stop it, or choose another --work-dir"
            ) from None
        for log in self.logs.glob("*.log"):
            log.unlink()
        # Socket paths are limited to 107 bytes, which a work directory may exceed.
        self._sockets = Path(tempfile.mkdtemp(prefix="ascendra-"))

    async def _build_demo_model(self) -> Path:
        model = self._root / ".cache" / "demo-model"
        self.activity = "building the demo model"
        build = self._child("demo-model", "demo.build_model", ["--out", str(model)])
        if await build.run() != 0:
            raise CliError(f"the demo model could not be built:\n{build.log_tail()}", hint="or give one with --model")
        return model

    def _make_parts(self, model: Path) -> None:
        spec = self.spec
        assert self._sockets is not None
        self.activity = "starting processes"
        predictor = f"unix:{self._sockets}/predictor"
        workers = {worker_id: f"unix:{self._sockets}/{worker_id}" for worker_id in spec.worker_roles}
        self._parts.predictor = [
            self._child("predictor", "services.predictor", ["--listen", predictor, "--metrics-listen", "127.0.0.1:0"])
        ]
        self._parts.workers = self._worker_children(model, workers, predictor)
        for number in range(spec.routers):
            arguments = [
                *("--listen", f"127.0.0.1:{spec.port + number if spec.port else 0}"),
                *("--metrics-listen", "127.0.0.1:0"),
                *("--workers", ",".join(workers.values())),
                *("--predictor", predictor),
                *("--model", str(model)),
                *("--router-id", f"router-{number}"),
                *("--drain-timeout-s", str(DRAIN_S)),
            ]
            if spec.router_config is not None:
                arguments += ["--config", str(spec.router_config.absolute())]
            self._parts.routers.append(self._child(f"router-{number}", "services.router", arguments))
        self.waiting_for = {"predictor", *workers, *(router.name for router in self._parts.routers)}

    def _make_gateway(self, port: int) -> Child:
        self.activity = "starting the gateway"
        arguments = [
            *("--listen", f"127.0.0.1:{port}"),
            *("--routers", ",".join(self.addresses.values())),
            *("--drain-timeout-s", str(DRAIN_S)),
        ]
        gateway = self._child("gateway", "services.gateway", arguments)
        self._parts.gateways = [gateway]
        self.waiting_for = {gateway.name}
        return gateway

    def _worker_children(self, model: Path, addresses: dict[str, str], predictor: str) -> list[Child]:
        spec = self.spec
        files = []
        for worker_id, role in spec.worker_roles.items():
            config = {
                "worker-id": worker_id,
                "role": role,
                "engine": spec.engine,
                "model": str(model),
                "listen": addresses[worker_id],
                "metrics-listen": "127.0.0.1:0",
                "predictor": predictor,
                "drain-timeout-s": DRAIN_S,
                "max-model-len": _max_model_len(model),
            }
            if spec.engine == "cpu" and spec.model is None:
                config |= {"kv-cache-memory-bytes": DEMO_KV_CACHE_BYTES, "dtype": "float32"}
            config |= _read_yaml(spec.worker_config)
            file = spec.work_dir / f"{worker_id}.yaml"
            file.write_text(yaml.safe_dump(config, sort_keys=False))
            files.append(file)
        if spec.engine == "cuda":  # one process, and where there are several one GPU, for each
            return [self._cuda_worker(number, file) for number, file in enumerate(files)]
        arguments = [part for file in files for part in ("--worker", str(file.absolute()))]
        return [self._child("workers", "services.worker.fleet", ["--restart", *arguments])]

    def _cuda_worker(self, number: int, file: Path) -> Child:
        child = self._child(file.stem, "services.worker", ["--config", str(file.absolute())])
        if devices := [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]:
            child.environment["CUDA_VISIBLE_DEVICES"] = devices[number % len(devices)]
        return child

    def _child(self, name: str, module: str, arguments: list[str]) -> Child:
        return Child(
            name,
            module,
            arguments,
            root=self._root,
            log=self.logs.absolute() / f"{name}.log",
            environment=dict(self._environment),
            on_event=self._on_event,
        )

    # Life

    def _begin(self, child: Child) -> None:
        self._keepers.append(asyncio.create_task(self._keep(child), name=child.name))

    async def _keep(self, child: Child) -> None:
        """Run a process, and run it again when it ends unasked."""
        pause_s, longest_s = _RESTART_PAUSE_S
        while True:
            started_s = time.monotonic()
            status = await child.run()
            if self._stopping:
                return
            if not self._up:
                self._fail(f"{child.name} ended with status {status}", child)
                return
            steady = time.monotonic() - started_s > _STEADY_S
            pause_s = _RESTART_PAUSE_S[0] if steady else min(pause_s * 2, longest_s)
            self._report(f"{child.name} ended with status {status}; starting it again; log: {child.log}")
            await asyncio.sleep(pause_s)

    def _on_event(self, child: Child, event: Event) -> None:
        match event["event"]:
            case "ready" | "worker_ready":
                self._on_ready(child, event)
            case "worker_exited" if not self._up and not self._stopping:
                self._fail(f"a worker ended with status {event.get('status')} before it was ready", child)
            case "worker_exited" if not self._stopping:
                name = Path(str(event.get("file", "worker"))).stem
                again = "; starting it again" if event.get("restart") else ""
                self._report(f"{name} ended with status {event.get('status')}{again}; log: {child.log}")
            case "importing" | "imported":
                self.activity = "importing vLLM" if event["event"] == "importing" else "loading the model"
            case "line" if not self._parts.all():
                self.activity = f"building the demo model: {event['text']}"

    def _on_ready(self, child: Child, event: Event) -> None:
        name = str(event.get("worker_id") or child.name)
        if event.get("http"):
            self.http_addresses[name] = str(event["http"])
        if child in (*self._parts.routers, *self._parts.gateways):
            address = str(event["address"])
            if child in self._parts.routers:
                self.addresses[name] = address
            else:
                self.gateway_url = f"http://{address}"
            child.arguments[child.arguments.index("--listen") + 1] = address  # the same one after a restart
        verb = "ready again" if self._up else f"ready after {time.monotonic() - self._started_s:.1f} s"
        self._report(f"{name} {verb}")
        self.waiting_for.discard(name)
        self._progressed.set()

    def _fail(self, message: str, child: Child) -> None:
        if self._failure is None:
            self._failure = CliError(f"{message}:\n{child.log_tail()}", hint=f"the whole log is {child.log}")
        self._progressed.set()

    async def _ready(self) -> None:
        while self.waiting_for and self._failure is None:
            self._progressed.clear()
            await self._progressed.wait()
        if self._failure is not None:
            raise self._failure

    async def _attached(self) -> None:
        """Wait until every router sees every worker."""
        self.activity = "connecting"
        for name, address in self.addresses.items():
            async with AsyncClient(address) as client:
                while self._failure is None:
                    with contextlib.suppress(UnavailableError, DeadlineExceededError):
                        status = await self._status(name, client)
                        ready = [w for w in status.workers if w.health == cluster_pb2.WORKER_HEALTH_READY]
                        if len(ready) == len(self.spec.worker_roles):
                            break
                    self.waiting_for = {f"{name} to reach its workers"}
                    await asyncio.sleep(0.1)
        if self._failure is not None:
            raise self._failure
        self.waiting_for = set()

    async def _status(self, router: str, client: AsyncClient) -> cluster_pb2.GetStatusResponse:
        try:
            return await client.status()
        except (UnauthenticatedError, PermissionDeniedError) as error:
            raise CliError(
                f"{router}: {error}", hint="this command shows no API key: leave api-keys-file out of --router-config"
            ) from error


def checkout() -> Path:
    """Return the repository's root. Raises CliError when the package was installed without it."""
    root = Path(ascendra.__file__).resolve().parent.parent
    if not (root / "services" / "router").is_dir():
        raise CliError(
            f"this command runs the services from a checkout of the repository, and {root} is not one",
            hint="clone the repository and run `make up` there; `ascendra generate` and the others work anywhere",
        )
    return root


def _check_ports(spec: ClusterSpec) -> None:
    """Raise CliError for a port that cannot be had, rather than let a service fail on it a minute later."""
    ports = [("--port", port) for port in range(spec.port, spec.port + spec.routers) if spec.port]
    if spec.gateway_port:
        ports.append(("--gateway", spec.gateway_port))
    for option, port in ports:
        if port > _LAST_PORT:
            raise CliError(f"{option}: port {port} is above {_LAST_PORT}", exit_status=2)
        if option == "--gateway" and ("--port", port) in ports:
            raise CliError(f"{option}: port {port} is that of a router", exit_status=2)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                raise CliError(
                    f"port {port}: {error.strerror}", hint=f"choose another with {option}; 0 picks one"
                ) from error


def _max_model_len(model: Path) -> int:
    try:
        config = json.loads((model / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise CliError(f"{model} is not a model directory: {error}", exit_status=2) from error
    return min(int(config.get("max_position_embeddings", MAX_MODEL_LEN)), MAX_MODEL_LEN)


def _read_yaml(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CliError(f"{file}: {error}", exit_status=2) from error
    if not isinstance(content, dict):
        raise CliError(f"{file}: expected a mapping of keys", exit_status=2)
    return content
