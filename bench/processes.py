"""Service processes of a bench: started, awaited until ready, stopped in reverse order; they end with the bench."""

import asyncio
import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil
import yaml

from ascendra.cli.tether import tethered

READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 30.0


class Processes:
    """Runs services as `python -m`, each with a configuration file of its own; use as an async context manager."""

    def __init__(self) -> None:
        self._started: list[asyncio.subprocess.Process] = []
        self._readers: list[asyncio.Task[None]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="ascendra-bench-")
        self.folder = Path(self._folder.name)
        self.front_ends: dict[str, int] = {}
        """Process ids of the workers' front ends, by worker id."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in reversed(self._started):
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in self._started:
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        await asyncio.gather(*self._readers, return_exceptions=True)
        self._folder.cleanup()

    async def start_workers(
        self, configs: Sequence[Mapping[str, Any]], *, niceness: int = 0
    ) -> tuple[list[str], list[int]]:
        """Start a fleet of workers; return their addresses, in order, and the pids of all its processes.

        Args:
            niceness: how much they give way to the other processes of this machine, 0 to 19.

        Raises:
            ChildProcessError: it ended before it was ready; with the exceptions that its log names.
        """
        files = [self._write(config, f"worker-{index}.yaml") for index, config in enumerate(configs)]
        flags = [part for file in files for part in ("--worker", str(file))]
        process, events = await self._start("services.worker.fleet", flags, ready=len(configs), niceness=niceness)
        addresses = {str(event["worker_id"]): str(event["address"]) for event in events}
        self.front_ends |= {str(event["worker_id"]): int(event["pid"]) for event in events}
        pids = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        return [addresses[str(config["worker-id"])] for config in configs], pids

    async def start_service(self, module: str, config: Mapping[str, Any]) -> tuple[str, int]:
        """Start a service and return its address and pid. Raises ChildProcessError as `start_workers` does."""
        file = self._write(config, f"{module}-{len(self._started)}.yaml")
        process, events = await self._start(module, ["--config", str(file)], ready=1)
        return str(events[0]["address"]), process.pid

    def _write(self, config: Mapping[str, Any], name: str) -> Path:
        file = self.folder / name
        file.write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
        return file

    async def _start(
        self, module: str, flags: list[str], *, ready: int, niceness: int = 0
    ) -> tuple[asyncio.subprocess.Process, list[dict[str, Any]]]:
        log_file = self.folder / f"{module}-{len(self._started)}.log"
        with log_file.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *tethered(["nice", "-n", str(niceness), sys.executable, "-m", module, *flags]),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )
        self._started.append(process)
        assert process.stdout is not None
        events: list[dict[str, Any]] = []
        async with asyncio.timeout(READY_TIMEOUT_S):
            while len(events) < ready and (line := await process.stdout.readline()):
                if not line.startswith(b"{"):
                    continue  # engines print lines of their own
                event = json.loads(line)
                if event.get("event") in ("ready", "worker_ready"):
                    events.append(event)
        if len(events) < ready:
            why = _causes(log_file.read_text(errors="replace"))
            raise ChildProcessError(f"{module} ended with status {await process.wait()} before it was ready:\n{why}")
        self._readers.append(asyncio.create_task(_drop(process.stdout)))
        return process, events


def _causes(log: str) -> str:
    """Return the lines of a log that name an exception, each once, or its end when there are none."""
    named = [line.rpartition("] ")[2].strip() for line in log.splitlines() if "Error: " in line]
    return "\n".join(dict.fromkeys(named)) or log[-2000:]


async def _drop(stream: asyncio.StreamReader) -> None:
    while await stream.read(1 << 16):
        pass
