"""What the engine core's process needs before it runs: to die with its parent and to keep its signals to itself."""

import contextlib
import ctypes
import multiprocessing
import os
import signal

_PR_SET_PDEATHSIG = 1


def die_with_parent(number: signal.Signals, parent_pid: int) -> None:
    """Have the kernel send this process a signal when its parent ends, however it ends; now, if it has ended."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent_pid:  # it ended while this process started
        os.kill(os.getpid(), number)


def isolate_engine_core() -> None:
    """Make this process die when its parent does, and keep terminal and fork-inherited signals away from the parent.

    May be called again. Does nothing in a process that has no multiprocessing parent (an engine run in process).
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        return
    # A killed front end would otherwise leave the engine core running for ever.
    die_with_parent(signal.SIGKILL, parent.pid)
    # A forked core shares the event loop's wake-up socket: its own signals would look like the front end's.
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)
    # Ctrl-C goes to the whole foreground group; the front end decides when the engine stops.
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
