"""Runs a whole cluster as real processes for tests: a fleet of workers, a predictor, and routers in front of them.

Everything listens on unix sockets with fixed names, so that a process that was killed comes back at its address.
"""

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import psutil
import yaml

from ascendra import AsyncClient
from ascendra.v1 import cluster_pb2
from tests.support.tethered_process import start_tethered
from tests.support.worker_process import WorkerFleet

START_TIMEOUT_S = 300.0
"""Generous: importing vLLM takes ten seconds of a processor, which on a busy machine may be minutes."""
STOP_TIMEOUT_S = 30.0
_ATTACHED = (cluster_pb2.WORKER_HEALTH_READY, cluster_pb2.WORKER_HEALTH_TRIPPED)


class Service:
    """A predictor or a router: `python -m services.NAME`, which can be killed, stopped and started again."""

    def __init__(self, directory: Path, kind: str, name: str, options: Mapping[str, Any]) -> None:
        """Write the configuration; `start` runs it.

        Args:
            directory: short, because it holds the socket.
            options: configuration keys as in YAML, beside the address.
        """
        self.address = f"unix:{directory / (name + '.sock')}"
        self.log_file = directory / f"{name}.log"
        self.ready: dict[str, Any] = {}
        self.process: subprocess.Popen[str] | None = None
        self._module = f"services.{kind}"
        self._config = directory / f"{name}.yaml"
        keys = {"listen": self.address, "metrics-listen": "127.0.0.1:0", **options}
        self._config.write_text(yaml.safe_dump(keys))

    @property
    def pid(self) -> int:
        """Process id of the present or last life."""
        assert self.process is not None
        return self.process.pid

    def start(self) -> Self:
        """Start it and return when it says that it is ready."""
        command = [sys.executable, "-m", self._module, "--config", str(self._config)]
        with self.log_file.open("ab") as log:
            self.process = start_tethered(command, log)
        assert self.process.stdout is not None
        too_late = threading.Timer(START_TIMEOUT_S, self.process.kill)
        too_late.start()
        try:
            line = self.process.stdout.readline()
        finally:
            too_late.cancel()
        if not line:
            status = self.process.wait()
            tail = self.log_file.read_text(errors="replace")[-4000:]
            raise RuntimeError(f"{self._module} ended with status {status} before it was ready; its log ends:\n{tail}")
        self.ready = json.loads(line)
        return self

    def kill(self) -> None:
        """End it with SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self._reap()

    def terminate(self) -> None:
        """Ask it to stop; see `wait`."""
        assert self.process is not None
        self.process.terminate()

    def wait(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Return its exit status. Raises subprocess.TimeoutExpired."""
        assert self.process is not None
        self.process.wait(timeout_s)
        return self._reap()

    def stop(self) -> None:
        """Make sure that it is gone; asked nicely first."""
        if self.process is None or self.process.poll() is not None:
            return
        self.terminate()
        try:
            self.wait()
        except subprocess.TimeoutExpired:
            self.kill()

    def rss_bytes(self) -> int:
        """Return its resident memory."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def _reap(self) -> int:
        assert self.process is not None
        status = self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status


class Site:
    """Workers and a predictor that they report to; any number of routers may be put in front of some of the workers.

    `workers` maps worker ids to configuration keys as in YAML (see tests.support.worker_process).
    """

    def __init__(self, directory: Path, workers: Mapping[str, Mapping[str, Any]], model: Path) -> None:
        self.directory = directory
        self.model = model
        self.predictor = Service(directory, "predictor", "predictor", {"publish-interval-s": 0.25})
        reporting = {name: {"predictor": self.predictor.address, **keys} for name, keys in workers.items()}
        self._workers = list(workers)
        self.fleet = WorkerFleet(directory, reporting, restart=True)
        self._names = 0

    def start(self) -> None:
        """Return when everything serves."""
        self.predictor.start()
        for worker_id in self._workers:
            self.fleet.wait_for("worker_ready", worker_id=worker_id, timeout_s=START_TIMEOUT_S)

    def stop(self) -> None:
        """Stop everything."""
        self.fleet.stop()
        self.predictor.stop()

    def address(self, worker_id: str) -> str:
        """Return where a worker listens."""
        return f"unix:{self.directory / (worker_id + '.sock')}"

    def router(self, workers: Sequence[str], **options: Any) -> Service:
        """Return a router, not started, for some of the workers; keywords are its options (underscores for dashes)."""
        return self.router_at([self.address(worker_id) for worker_id in workers], **options)

    def router_at(self, addresses: Sequence[str], **options: Any) -> Service:
        """Return the same for workers that it reaches at these addresses, which may be those of proxies."""
        self._names += 1
        keys = {
            "workers": [*addresses],
            "predictor": self.predictor.address,
            "model": str(self.model),
            "model-name": "tiny",
            "router-id": f"router-{self._names}",
            "prediction-max-age-s": 2.0,
            # Generous: a test that is not about detection must not see a busy machine taken for a dead worker.
            "silence-s": 3.0,
            "stall-s": 15.0,
        }
        keys |= {name.replace("_", "-"): value for name, value in options.items()}
        return Service(self.directory, "router", f"router-{self._names}", keys)

    def worker_processes(self, worker_id: str) -> list[int]:
        """Return the process ids of a worker: its front end and what that has started."""
        pid = self.fleet.pid(worker_id)
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]

    def signal_worker(self, worker_id: str, number: signal.Signals) -> None:
        """Send a signal to all processes of a worker."""
        for pid in self.worker_processes(worker_id):
            psutil.Process(pid).send_signal(number)

    async def restarted(self, worker_id: str, old_pid: int, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until the fleet has started a worker again."""
        await until(lambda: self.fleet.pid(worker_id) != old_pid, f"worker {worker_id} to be restarted", timeout_s)


@asynccontextmanager
async def running(*routers: Service, workers: int) -> AsyncIterator[AsyncClient]:
    """Start routers, wait until each uses that many workers, and yield a client that knows them all."""
    try:
        for router in routers:
            await asyncio.to_thread(router.start)
        for router in routers:
            async with AsyncClient(router.address) as one:
                await attached(one, workers)
        async with AsyncClient([router.address for router in routers]) as client:
            yield client
    finally:
        await asyncio.gather(*(asyncio.to_thread(router.stop) for router in routers))


async def attached(client: AsyncClient, workers: int, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait until the router is attached to that many workers; one that failed much may still be on trial."""
    async with asyncio.timeout(timeout_s):
        async for status in client.watch_status(0.1):
            if sum(worker.health in _ATTACHED for worker in status.workers) >= workers:
                return


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    """Wait until something is so. Raises TimeoutError that says what was waited for."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        await asyncio.sleep(0.02)
