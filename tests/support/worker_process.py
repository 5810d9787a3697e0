"""Runs a worker fleet as a child process for tests: `python -m services.worker.fleet` with its own configurations."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml

from tests.support.tethered_process import REPOSITORY as REPOSITORY
from tests.support.tethered_process import start_tethered

_START_TIMEOUT_S = 600.0
_STOP_TIMEOUT_S = 20.0


class WorkerFleet:
    """A fleet, its events, and where its workers can be reached.

    `workers` maps worker ids to configuration keys as in YAML; each worker listens on a socket of its own in
    `directory` unless its keys say otherwise. Start-up takes about ten seconds plus one or two a worker.
    """

    def __init__(self, directory: Path, workers: Mapping[str, Mapping[str, Any]], *, restart: bool = False) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.log_file = directory / "fleet.log"
        self.events: list[dict[str, Any]] = []
        self._ids = list(workers)
        self._changed = threading.Condition()
        command = [sys.executable, "-m", "services.worker.fleet"] + (["--restart"] if restart else [])
        for worker_id, keys in workers.items():
            listen = f"unix:{directory / (worker_id + '.sock')}"
            file = directory / f"{worker_id}.yaml"
            file.write_text(yaml.safe_dump({"worker-id": worker_id, "listen": listen, **keys}))
            command += ["--worker", str(file)]
        with self.log_file.open("ab") as log:
            self.process = start_tethered(command, log)
        self._reader = threading.Thread(target=self._read_events, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self) -> None:
        """Wait until every worker takes requests."""
        for worker_id in self._ids:
            self.wait_for("worker_ready", worker_id=worker_id)

    def wait_for(
        self, event: str, *, count: int = 1, timeout_s: float = _START_TIMEOUT_S, **where: Any
    ) -> dict[str, Any]:
        """Wait for the count-th event of a kind whose fields are as given, and return it."""
        deadline_s = time.monotonic() + timeout_s
        with self._changed:
            while len(found := self._find(event, where)) < count:
                left_s = deadline_s - time.monotonic()
                if left_s <= 0 or (self.process.poll() is not None and not self._reader.is_alive()):
                    tail = self.log_file.read_text(errors="replace")[-4000:]
                    raise RuntimeError(f"the fleet did not say {event} {where}; its log ends:\n{tail}")
                self._changed.wait(min(left_s, 0.5))
            return found[count - 1]

    def address(self, worker_id: str) -> str:
        """Return where a worker serves routers."""
        return str(self._find("worker_ready", {"worker_id": worker_id})[-1]["address"])

    def http(self, worker_id: str) -> str:
        """Return where a worker serves /health and /metrics."""
        return str(self._find("worker_ready", {"worker_id": worker_id})[-1]["http"])

    def pid(self, worker_id: str) -> int:
        """Return the process id of a worker's front end."""
        return int(self._find("worker_ready", {"worker_id": worker_id})[-1]["pid"])

    def engine_core_pid(self, worker_id: str) -> int:
        """Return the process id of a worker's engine core."""
        pid = self.pid(worker_id)
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for child in children:
            if "EngineCore" in Path(f"/proc/{child}/cmdline").read_text():
                return int(child)
        raise RuntimeError(f"worker {worker_id} has no engine core among {children}")

    def stop(self) -> int:
        """Stop the fleet with SIGTERM and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        return self.process.returncode

    def _find(self, event: str, where: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [
            entry
            for entry in self.events
            if entry["event"] == event and all(entry.get(name) == value for name, value in where.items())
        ]

    def _read_events(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                with self._changed:
                    self.events.append(json.loads(line))
                    self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()


def cpu_worker(model: Path, **keys: Any) -> dict[str, Any]:
    """Return the configuration of a CPU worker on a tiny model; keywords override keys (underscores for dashes)."""
    base = {
        "engine": "cpu",
        "model": str(model),
        "served-model-name": "tiny",
        "max-model-len": 1024,
        "max-num-seqs": 16,
        "max-num-batched-tokens": 256,
        "kv-cache-memory-bytes": 64 << 20,
        "dtype": "float32",
        "drain-timeout-s": 5.0,
    }
    return base | {name.replace("_", "-"): value for name, value in keys.items()}


def emulated_worker(**keys: Any) -> dict[str, Any]:
    """Return the configuration of an emulated worker; keywords override keys (underscores for dashes)."""
    base = {"engine": "emulated", "max-model-len": 8192, "vocab-size": 32_000, "drain-timeout-s": 5.0}
    return base | {name.replace("_", "-"): value for name, value in keys.items()}


def is_running(pid: int) -> bool:
    """Tell whether a process exists and is no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"
