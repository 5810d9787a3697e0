"""One service process: started, listened to on stdout, stopped."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ascendra.cli.tether import tethered

_LOG_TAIL_LINES = 8
_KILL_WAIT_S = 5.0

Event = dict[str, Any]
"""A JSON line that a service printed; another line is {"event": "line", "text": ...}."""


class Child:
    """A process that runs a module of the checkout and ends with this one; its output goes to a log file."""

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        *,
        root: Path,
        log: Path,
        environment: Mapping[str, str],
        on_event: Callable[["Child", Event], None],
    ) -> None:
        self.name = name
        self.arguments = list(arguments)
        self.log = log
        self._module = module
        self._root = root
        self.environment = dict(environment)
        self._on_event = on_event
        self._process: asyncio.subprocess.Process | None = None

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.returncode is None

    async def run(self) -> int:
        """Start the process and return its exit status; a cancellation kills it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *tethered([sys.executable, "-m", self._module, *self.arguments]),
                cwd=self._root,
                env=self.environment,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                # Ctrl-C in the terminal is for the parent alone, which stops its children in order.
                process_group=0,
            )
            try:
                assert self._process.stdout is not None
                async for line in self._process.stdout:
                    log.write(line)
                    log.flush()
                    self._on_event(self, _parse(line))
                return await self._process.wait()
            finally:
                self.kill()

    async def stop(self, grace_s: float) -> bool:
        """Ask the process to end, and kill it after grace_s seconds; whether it ended by itself."""
        if not self.running:
            return True
        assert self._process is not None
        self._process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), grace_s)
            return True
        self.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _KILL_WAIT_S)
        return False

    def kill(self) -> None:
        """End the process and what it has forked in its group at once."""
        if self.running:
            assert self._process is not None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        with contextlib.suppress(OSError):
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
        return ""


def _parse(line: bytes) -> Event:
    text = line.decode(errors="replace").rstrip("\n")
    with contextlib.suppress(ValueError):
        event = json.loads(text)
        if isinstance(event, dict) and "event" in event:
            return event
    return {"event": "line", "text": text}
