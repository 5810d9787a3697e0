"""Bounds the start of an engine, and says where one hangs: vLLM waits for its engine core without a limit."""

import faulthandler
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.common.logging import get_logger

log = get_logger()

EXIT_START_TIMEOUT = 71
_DUMP_S = 1.0
"""Time for the engine core to write where it is."""


@contextmanager
def start_limit(limit_s: float) -> Iterator[None]:
    """Start an engine within, or end this process and its children with status 71.

    Where each of them hangs goes to stderr first. The engine core is forked from here and inherits the handler of the
    signal that asks for it; one that is spawned is ended by that signal.
    """
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    timer = threading.Timer(limit_s, _give_up, [limit_s])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _give_up(limit_s: float) -> None:
    log.error("start_timeout", limit_s=limit_s, status=EXIT_START_TIMEOUT)
    faulthandler.dump_traceback(all_threads=True)
    children = [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
    _signal(children, signal.SIGUSR1)
    time.sleep(_DUMP_S)
    _signal(children, signal.SIGKILL)
    os._exit(EXIT_START_TIMEOUT)


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
