"""Runs `python -m services.router` as a child process for tests."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from tests.support.tethered_process import start_tethered

_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 40.0


class RouterProcess:
    """A router in a process of its own, on free ports. Keywords are configuration keys (underscores for dashes)."""

    def __init__(self, directory: Path, *, model: Path, workers: Sequence[str] = (), **keys: Any) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.log_file = directory / "router.log"
        settings = {
            "listen": "127.0.0.1:0",
            "metrics-listen": "127.0.0.1:0",
            "model": str(model),
            "workers": list(workers),
            "settle-s": 0.0,
        }
        settings |= {name.replace("_", "-"): value for name, value in keys.items()}
        file = directory / "router.yaml"
        file.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "services.router", "--config", str(file)]
        with self.log_file.open("ab") as log:
            self.process = start_tethered(command, log)
        self._terminated = False
        self._ready: dict[str, Any] = {}
        self._said = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        self.wait_ready()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """Where clients reach it."""
        return str(self._ready["address"])

    @property
    def http(self) -> str:
        """Where it serves /health and /metrics."""
        return str(self._ready["http"])

    def wait_ready(self) -> None:
        """Wait until it listens; workers may not be attached yet."""
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while not self._said.wait(0.2):
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                tail = self.log_file.read_text(errors="replace")[-4000:]
                raise RuntimeError(f"the router did not start; its log ends:\n{tail}")

    def terminate(self) -> None:
        """Ask it, once, to drain and stop."""
        if self.process.poll() is None and not self._terminated:
            self._terminated = True
            self.process.send_signal(signal.SIGTERM)

    def stop(self) -> int:
        """Stop it and return its exit status."""
        self.terminate()
        try:
            self.process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)
        return self.process.returncode

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                entry = json.loads(line)
                if entry.get("event") == "ready":
                    self._ready = entry
                    self._said.set()
