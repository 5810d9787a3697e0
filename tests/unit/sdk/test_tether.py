"""Tethered programs end with whoever started them, and with nothing else."""

import signal
import subprocess
import sys
import textwrap
import threading

import psutil
import pytest

from ascendra.cli.tether import tethered

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs signals for pipes")

FOR_EVER = tethered(["sleep", "600"])
STARTER = textwrap.dedent(
    """
    import subprocess, sys, time
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE)
    print(process.pid, flush=True)
    time.sleep(600)
    """
)


def test_a_program_ends_when_its_starter_is_killed() -> None:
    """SIGKILL gives the starter no chance to stop it."""
    with subprocess.Popen([sys.executable, "-c", STARTER, *FOR_EVER], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        program = psutil.Process(int(starter.stdout.readline()))
        starter.kill()
    _, left = psutil.wait_procs([program], timeout=30)
    for process in left:
        process.kill()
    assert not left


def test_a_program_outlives_the_thread_that_started_it() -> None:
    """Servers are started from threads of a pool, too; closing the pipe ends them."""
    started: list[subprocess.Popen[bytes]] = []
    thread = threading.Thread(target=lambda: started.append(subprocess.Popen(FOR_EVER, stdin=subprocess.PIPE)))
    thread.start()
    thread.join()
    with started[0] as program, pytest.raises(subprocess.TimeoutExpired):
        program.wait(0.5)
    assert program.returncode == -signal.SIGTERM


def test_a_program_that_starts_too_late_ends_at_once() -> None:
    """Its starter was gone before the pipe was watched."""
    with subprocess.Popen(FOR_EVER, stdin=subprocess.PIPE) as program:
        pass
    assert program.returncode == -signal.SIGTERM


def test_a_terminal_is_no_tether() -> None:
    """What would never be told that its starter is gone does not run."""
    refused = subprocess.run(tethered(["true"]), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "is no pipe" in refused.stderr
