"""The processes that are measured: one emulated worker, one or two routers."""

import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from services.policy.step_time import StepTimeBin, StepTimeModel

READY_TIMEOUT_S = 120.0


@dataclass
class Cluster:
    """Running processes and where they listen."""

    worker_address: str
    router_addresses: list[str]
    worker_pids: list[int]
    router_pids: list[int]
    steps_per_s: float

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds spent so far by routers, worker (front end and engine) and this client."""
        groups = {"router": self.router_pids, "worker": self.worker_pids, "client": [psutil.Process().pid]}
        return {name: sum(_cpu_s(pid) for pid in pids) for name, pids in groups.items()}

    def router_rss_mib(self) -> float:
        """Return the resident memory of the largest router."""
        return max(float(psutil.Process(pid).memory_info().rss) for pid in self.router_pids) / 2**20


def _cpu_s(pid: int) -> float:
    spent = psutil.Process(pid).cpu_times()
    return float(spent.user + spent.system)


@contextlib.asynccontextmanager
async def running_cluster(model: Path, routers: int, step_ms: float) -> AsyncIterator[Cluster]:
    """Start a worker whose every step takes step_ms, and routers in front of it; stop them at the end."""
    processes: list[asyncio.subprocess.Process] = []
    with tempfile.TemporaryDirectory() as folder:
        profile = Path(folder) / "profile.json"
        profile.write_text(json.dumps(constant_profile(step_ms).to_dict()))
        config = Path(folder) / "worker.yaml"
        config.write_text(yaml.safe_dump(worker_config(model, profile)))
        try:
            fleet, ready = await _start(processes, "services.worker.fleet", "--worker", str(config))
            worker_address = str(ready["address"])
            worker_pids = [child.pid for child in psutil.Process(fleet.pid).children(recursive=True)]
            router_addresses, router_pids = [], []
            for _ in range(routers):
                router, ready = await _start(
                    processes,
                    "services.router",
                    *("--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"),
                    *("--workers", worker_address, "--model", str(model)),
                )
                router_addresses.append(str(ready["address"]))
                router_pids.append(router.pid)
            yield Cluster(worker_address, router_addresses, worker_pids, router_pids, 1000 / step_ms)
        finally:
            for process in reversed(processes):
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
            for process in processes:
                try:
                    await asyncio.wait_for(process.wait(), 20)
                except TimeoutError:
                    process.kill()


async def _start(
    processes: list[asyncio.subprocess.Process], module: str, *arguments: str
) -> tuple[asyncio.subprocess.Process, dict[str, object]]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    processes.append(process)
    assert process.stdout is not None
    async with asyncio.timeout(READY_TIMEOUT_S):
        while line := await process.stdout.readline():
            event = json.loads(line)
            if event.get("event") in ("ready", "worker_ready"):
                return process, event
    raise RuntimeError(f"{module} ended before it was ready")


def constant_profile(step_ms: float) -> StepTimeModel:
    """A step-time model in which every step takes the same time."""
    return StepTimeModel((StepTimeBin(0, step_ms / 1e3),), safety_factor=1.0, log_sigma=0.0, source="profile:constant")


def worker_config(model: Path, profile: Path) -> dict[str, object]:
    """An emulated worker with room for every stream."""
    return {
        "listen": "127.0.0.1:0",
        "metrics-listen": "127.0.0.1:0",
        "worker-id": "bench",
        "role": "unified",
        "engine": "emulated",
        "model": str(model),
        "max-num-seqs": 1024,
        "max-num-batched-tokens": 16_384,
        "token-budget": "static",
        "static-budget-tokens": 16_384,
        "kv-capacity-tokens": 8_000_000,
        "step-time-profile": str(profile),
    }
