"""The processes that are measured: emulated workers, one or two routers."""

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.processes import Processes
from services.policy.step_time import StepTimeBin, StepTimeModel


@dataclass
class Cluster:
    """Running processes and where they listen."""

    worker_addresses: list[str]
    """Worker `w0` first."""
    router_addresses: list[str]
    worker_pids: list[int]
    router_pids: list[int]
    steps_per_s: float
    gateway_addresses: list[str] = field(default_factory=list)
    gateway_pids: list[int] = field(default_factory=list)

    def addresses(self, client: str) -> list[str]:
        """Return where a client connects."""
        return {"direct": self.worker_addresses, "sse": self.gateway_addresses}.get(client, self.router_addresses)

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds spent so far by routers, worker (front end and engine) and this client."""
        groups = {"router": self.router_pids, "worker": self.worker_pids, "client": [psutil.Process().pid]}
        groups["gateway"] = self.gateway_pids
        return {name: sum(_cpu_s(pid) for pid in pids) for name, pids in groups.items()}

    def router_rss_mib(self) -> float:
        """Return the resident memory of the largest router."""
        return max(map(rss_mib, self.router_pids))


def rss_mib(pid: int) -> float:
    """Return the resident memory of a process."""
    return float(psutil.Process(pid).memory_info().rss) / 2**20


def _cpu_s(pid: int) -> float:
    spent = psutil.Process(pid).cpu_times()
    return float(spent.user + spent.system)


@contextlib.asynccontextmanager
async def running_cluster(
    model: Path, workers: int, routers: int, step_ms: float, *, gateways: int = 0
) -> AsyncIterator[Cluster]:
    """Start workers whose every step takes step_ms, routers and gateways in front of them; stop them at the end."""
    async with Processes() as processes:
        profile = processes.folder / "profile.json"
        profile.write_text(json.dumps(constant_profile(step_ms).to_dict()))
        addresses, worker_pids = await processes.start_workers(
            [worker_config(f"w{index}", model, profile) for index in range(workers)]
        )
        started = [
            await processes.start_service(
                "services.router",
                {
                    "listen": "127.0.0.1:0",
                    "metrics-listen": "127.0.0.1:0",
                    "workers": addresses,
                    "model": str(model),
                },
            )
            for _ in range(routers)
        ]
        router_addresses = [address for address, _ in started]
        doors = [
            await processes.start_service("services.gateway", {"listen": "127.0.0.1:0", "routers": router_addresses})
            for _ in range(gateways)
        ]
        yield Cluster(
            worker_addresses=addresses,
            router_addresses=router_addresses,
            worker_pids=worker_pids,
            router_pids=[pid for _, pid in started],
            steps_per_s=1000 / step_ms,
            gateway_addresses=[address for address, _ in doors],
            gateway_pids=[pid for _, pid in doors],
        )


def constant_profile(step_ms: float) -> StepTimeModel:
    """A step-time model in which every step takes the same time."""
    return StepTimeModel((StepTimeBin(0, step_ms / 1e3),), safety_factor=1.0, log_sigma=0.0, source="profile:constant")


def worker_config(worker_id: str, model: Path, profile: Path) -> dict[str, object]:
    """An emulated worker with room for every stream."""
    return {
        "listen": "127.0.0.1:0",
        "worker-id": worker_id,
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
