"""Programs that end with whoever started them, also when that is killed: a command that `tethered` returns.

This file runs first, and turns into the program with standard input set up so that the kernel sends SIGTERM when the
other end of the pipe is closed, which a dying process does whatever it dies of. (PR_SET_PDEATHSIG would not do: it
fires when the thread that started the program ends.) Only on Linux; elsewhere the program just runs.
"""

import fcntl
import os
import select
import signal
import stat
import sys
from collections.abc import Sequence


def tethered(command: Sequence[str]) -> list[str]:
    """Return what runs a command so that it gets SIGTERM when its starter is gone.

    It has to be started with a pipe as standard input (`stdin=PIPE`) into which nothing is written, and which is left
    open: closing it (as `communicate` does) ends the program too.
    """
    return [sys.executable, "-I", "-S", __file__, *command]


def _tether() -> None:
    """Have SIGTERM sent to this process when nobody holds the other end of standard input; now, if nobody does."""
    if not (stat.S_ISFIFO(mode := os.fstat(0).st_mode) or stat.S_ISSOCK(mode)):
        sys.exit("error: standard input is no pipe of a process that starts this one")
    if sys.platform != "linux":
        return
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETSIG, signal.SIGTERM)
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(0, 0)
    if poll.poll(0):  # it was closed before the lines above
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    _tether()
    os.execvp(sys.argv[1], sys.argv[1:])
