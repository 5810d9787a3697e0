"""Runs `python -m services.gateway` as a child process for tests."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.support.tethered_process import start_tethered

STOP_TIMEOUT_S = 40.0


class GatewayProcess:
    """A gateway in a process of its own, on a free port. Keywords are flags (underscores for dashes)."""

    def __init__(self, log_file: Path, routers: Sequence[str], **flags: object) -> None:
        self.log_file = log_file
        self.address = ""
        command = [sys.executable, "-m", "services.gateway", "--listen", "127.0.0.1:0", "--routers", ",".join(routers)]
        for name, value in flags.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        with log_file.open("ab") as log:
            self.process = start_tethered(command, log)

    def __enter__(self) -> Self:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.stop()
            raise RuntimeError(f"the gateway did not start; its log:\n{self.log_file.read_text(errors='replace')}")
        self.address = json.loads(line)["address"]
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> int:
        """Stop it with SIGTERM and return its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return self.process.returncode
