"""`python -m services.worker.fleet --worker A.yaml --worker B.yaml`: several workers from one import of vLLM.

The import takes about ten seconds; a forked worker then starts in one or two. Every event is one JSON line on stdout.
"""

import argparse
import contextlib
import gc
import importlib
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
from services.worker.engine.core.process import die_with_parent
from services.worker.engine.environment import prepare_environment

_POLL_S = 0.2
_RESTART_PAUSE_S = (0.5, 10.0)
"""First and longest pause before a dead worker is started again; doubles while it keeps dying."""
_STEADY_S = 30.0
"""A worker that lived this long is restarted after the first pause again."""
_KILL_MARGIN_S = 10.0
"""A worker that outlives its drain timeout by this much is killed."""


_OWN_MODULES = (
    "services.worker.app",
    "services.worker.engine.adapter",
    "services.worker.engine.core.emulated",
    "services.worker.engine.core.sampling",
    "services.worker.engine.core.scheduler",
)
_VLLM_MODULES = (
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.layers.quantization.online.base",
)


class Member:
    """One worker of the fleet, through all its lives."""

    def __init__(self, file: Path, config: WorkerConfig) -> None:
        self.file = file
        self.config = config
        self.process: BaseProcess | None = None
        self._started_s = 0.0
        self._pause_s = 0.0
        self.restart_at_s: float | None = None

    def start(self) -> None:
        """Fork the worker's process."""
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=_worker_process, args=(self.config,), name=self.file.stem)
        self._started_s = time.monotonic()
        self.restart_at_s = None
        self.process.start()
        emit("worker_starting", file=str(self.file), pid=self.process.pid)

    def plan_restart(self, now_s: float) -> None:
        """Decide when to start it again."""
        first, longest = _RESTART_PAUSE_S
        steady = now_s - self._started_s > _STEADY_S
        self._pause_s = first if steady else min(max(self._pause_s * 2, first), longest)
        self.restart_at_s = now_s + self._pause_s


class Fleet:
    """The parent process: one thread, no event loop and no gRPC, so that it can fork at any time."""

    def __init__(self, members: Sequence[Member], *, restart: bool) -> None:
        self._members = members
        self._restart = restart
        self._signalled: signal.Signals | None = None
        self._killing_at_s: float | None = None
        self._status = 0

    def run(self) -> int:
        """Run until every worker is gone for good; returns the worst exit status."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note_signal)
        for member in self._members:
            member.start()
        while any(member.process or member.restart_at_s for member in self._members):
            sentinels = [member.process.sentinel for member in self._members if member.process]
            multiprocessing.connection.wait(sentinels, timeout=_POLL_S)
            if not sentinels:
                time.sleep(_POLL_S)
            self._advance(time.monotonic())
        emit("fleet_stopped", status=self._status)
        return self._status

    def _note_signal(self, number: int, _: object) -> None:
        self._signalled = signal.Signals(number)

    def _advance(self, now_s: float) -> None:
        """Reap the dead, start again what should live, and pass a stop on."""
        if self._signalled is not None and self._killing_at_s is None:
            self._stop(now_s)
        for member in self._members:
            if member.process is not None and not member.process.is_alive():
                self._reap(member, now_s)
            if member.restart_at_s is not None and now_s >= member.restart_at_s:
                member.start()
            if member.process is not None and self._killing_at_s is not None and now_s > self._killing_at_s:
                member.process.kill()

    def _reap(self, member: Member, now_s: float) -> None:
        assert member.process is not None
        member.process.join()
        status = member.process.exitcode or 0
        restart = self._restart and self._killing_at_s is None
        emit("worker_exited", file=str(member.file), pid=member.process.pid, status=status, restart=restart)
        member.process = None
        if restart:
            member.plan_restart(now_s)
        elif status:
            self._status = self._status or (status if status > 0 else 128 - status)

    def _stop(self, now_s: float) -> None:
        assert self._signalled is not None
        longest_s = max(member.config.drain_timeout_s for member in self._members)
        self._killing_at_s = now_s + longest_s + _KILL_MARGIN_S
        emit("fleet_stopping", signal=self._signalled.name)
        for member in self._members:
            member.restart_at_s = None
            if member.process is not None:
                member.process.terminate()


def emit(event: str, **details: object) -> None:
    """Print one event; it is lost when nobody reads any more, for a fleet outlives its starter to stop its workers."""
    try:
        sys.stdout.write(orjson.dumps({"event": event, **details}).decode() + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def import_engine(*, cuda: bool) -> None:
    """Import everything a worker needs, once, and keep it out of the garbage collector's way."""
    for module in _OWN_MODULES:
        importlib.import_module(module)
    for module in _VLLM_MODULES:
        with contextlib.suppress(ImportError):  # imported only to save the forked workers time
            importlib.import_module(module)
    if not cuda:
        importlib.import_module("services.worker.engine.adapter").register_llama()
    gc.collect()
    gc.freeze()


def main(argv: Sequence[str] | None = None) -> int:
    """Run a fleet; returns the worst exit status of its workers."""
    parser = argparse.ArgumentParser(prog="python -m services.worker.fleet", description=__doc__)
    parser.add_argument(
        "--worker", metavar="FILE", action="append", required=True, type=Path, help="configuration of one worker"
    )
    parser.add_argument(
        "--restart", action="store_true", help="start a worker again that ended, also after a SIGTERM of its own"
    )
    arguments = parser.parse_args(argv)
    try:
        members = [Member(file, resolve(WorkerConfig, file=file, environ=os.environ)) for file in arguments.worker]
        for member in members:
            member.config.engine_settings()
    except ConfigError as error:
        parser.error(str(error))
    engines = {member.config.engine for member in members}
    if "cuda" in engines and len(engines) > 1:
        parser.error("a fleet is either all CUDA or has no CUDA worker: they need different vLLM builds")
    configure_logging("worker", level=members[0].config.log_level)
    prepare_environment(members[0].config.engine, members[0].config.cpu_threads)
    emit("importing", pid=os.getpid(), workers=len(members))
    started_s = time.monotonic()
    import_engine(cuda=engines == {"cuda"})
    emit("imported", seconds=round(time.monotonic() - started_s, 2))
    return Fleet(members, restart=arguments.restart).run()


def _worker_process(config: WorkerConfig) -> None:
    """Run one forked worker."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    die_with_parent(signal.SIGTERM, parent.pid)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    # Ctrl-C reaches the whole foreground group; the parent passes a stop on, once.
    os.setpgid(0, 0)
    from services.worker.app import run_worker

    def announce(worker_id: str, address: str, http_address: str) -> None:
        emit("worker_ready", worker_id=worker_id, address=address, http=http_address, pid=os.getpid())

    sys.exit(run_service(lambda stop: run_worker(config, stop, announce)))


if __name__ == "__main__":
    sys.exit(main())
