"""Engine cores end with their front end, whenever that dies."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
_FRONT_END = textwrap.dedent(
    """
    import multiprocessing, os, signal, sys, time
    from services.worker.engine.core.process import isolate_engine_core

    def core(when):
        if when == "late":
            while os.getppid() == multiprocessing.parent_process().pid:
                time.sleep(0.01)
        else:
            isolate_engine_core()
        print(os.getpid(), flush=True)
        if when == "late":
            isolate_engine_core()
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=core, args=(sys.argv[1],))
    process.start()
    if sys.argv[1] == "late":
        os.kill(os.getpid(), signal.SIGKILL)
    process.join()
    """
)


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_core_ends_with_its_front_end(when: str) -> None:
    """Also one whose front end was killed before it could ask to be told."""
    front_end = subprocess.Popen(
        [sys.executable, "-c", _FRONT_END, when],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert front_end.stdout is not None
    core = int(front_end.stdout.readline())
    try:
        process = psutil.Process(core)
        if when == "early":
            front_end.send_signal(signal.SIGKILL)
        process.wait(30)
    except psutil.NoSuchProcess:
        pass
    finally:
        front_end.kill()
        front_end.wait()
        front_end.stdout.close()
    assert not psutil.pid_exists(core)
