"""Running a service: uvloop, signals that ask it to stop, a ready line on stdout."""

import asyncio
import contextlib
import os
import resource
import signal
import sys
from collections.abc import Awaitable, Callable

import orjson
import uvloop

from services.common.listening import CannotListen
from services.common.logging import get_logger

log = get_logger()

OPEN_FILES = 1 << 16
"""Files and sockets that a service may have open, where the system lets it: a stream is a socket, and 1,024 are few."""


def run_service(main: Callable[[asyncio.Event], Awaitable[int]]) -> int:
    """Run `main(stop)` on uvloop; SIGTERM and SIGINT set `stop`. Returns the exit status of `main`.

    `main` drains when `stop` is set; a second signal ends the process at once with status 1. An address that cannot
    be had is status 2.
    """

    allow_open_files(OPEN_FILES)

    async def run() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def ask_to_stop(number: signal.Signals) -> None:
            if stop.is_set():
                log.warning("second_signal", signal=number.name)
                os._exit(1)
            log.info("stopping", signal=number.name)
            stop.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ask_to_stop, number)
        try:
            return await main(stop)
        except CannotListen as error:
            log.error("cannot_listen", problem=str(error))
            return 2

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


def allow_open_files(most: int) -> None:
    """Raise this process's limit of open files to `most`, or as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def announce_ready(service: str, **details: object) -> None:
    """Print one JSON line on stdout that says where the service can be reached: {"event": "ready", ...}."""
    line = {"event": "ready", "service": service, "pid": os.getpid(), **details}
    sys.stdout.write(orjson.dumps(line).decode() + "\n")
    sys.stdout.flush()
