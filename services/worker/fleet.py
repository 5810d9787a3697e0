"""`python -m services.worker.fleet --worker A.yaml --worker B.yaml`: several workers from one import of vLLM.

The import takes about ten seconds; a forked worker then starts in one or two. Every event is one JSON line on stdout.
"""

import argparse
import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import orjson

from services.common.config import ConfigError, resolve
from services.common.lifecycle import run_service
from services.common.logging import configure_logging
from services.worker.config import WorkerConfig
from services.worker.engine.environment import prepare_environment

_RESTART_PAUSE_S = (0.5, 10.0)
"""First and longest pause before a dead worker is started again; doubles while it keeps dying."""
_STEADY_S = 30.0
"""A worker that lived this long is restarted after the first pause again."""
_KILL_MARGIN_S = 10.0
"""A worker that outlives its drain timeout by this much is killed."""


def emit(event: str, **details: object) -> None:
    """Print one event."""
    sys.stdout.write(orjson.dumps({"event": event, **details}).decode() + "\n")
    sys.stdout.flush()


class Member:
    """One worker of the fleet, through all its lives."""

    def __init__(self, file: Path, config: WorkerConfig) -> None:
        self.file = file
        self.config = config
        self.process: BaseProcess | None = None
        self.started_s = 0.0
        self.pause_s = _RESTART_PAUSE_S[0]
        self.restart_at_s: float | None = None

    def start(self) -> None:
        """Fork the worker's process."""
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_worker_process, args=(self.config, self.file), name=self.file.stem)
        self.started_s = time.monotonic()
        self.restart_at_s = None
        self.process.start()
        emit("worker_starting", file=str(self.file), pid=self.process.pid)

    def plan_restart(self) -> None:
        """Decide when to start it again."""
        steady = time.monotonic() - self.started_s > _STEADY_S
        self.pause_s = _RESTART_PAUSE_S[0] if steady else min(self.pause_s * 2, _RESTART_PAUSE_S[1])
        self.restart_at_s = time.monotonic() + self.pause_s


class Fleet:
    """The parent process: single-threaded, without an event loop and without gRPC, so that it can fork at any time."""

    def __init__(self, members: Sequence[Member], *, restart: bool) -> None:
        self._members = members
        self._restart = restart
        self._stopping_since_s: float | None = None
        self._status = 0

    def run(self) -> int:
        """Run until every worker is gone for good; returns the worst exit status."""
        import_engine(self._members)
        wake_reader, wake_writer = os.pipe()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self._stop(number, wake_writer))
        for member in self._members:
            member.start()
        while any(member.process or member.restart_at_s for member in self._members):
            sentinels = [member.process.sentinel for member in self._members if member.process]
            multiprocessing.connection.wait([*sentinels, wake_reader], timeout=self._patience_s())
            self._reap()
            self._revive()
            self._kill_late()
            if self._stopping_since_s is not None and wake_reader >= 0:
                os.close(wake_reader)
                wake_reader = os.open(os.devnull, os.O_RDONLY)
        emit("fleet_stopped", status=self._status)
        return self._status
