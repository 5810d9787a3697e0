"""A fleet whose starter is killed."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from tests.support.tethered_process import REPOSITORY

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

STARTER = textwrap.dedent(
    """
    import pathlib, sys, time
    from tests.support.worker_process import WorkerFleet, emulated_worker

    workers = {name: emulated_worker() for name in ("one", "two")}
    fleet = WorkerFleet(pathlib.Path(sys.argv[1]), workers)
    fleet.wait_ready()
    print(fleet.process.pid, *(fleet.engine_core_pid(name) for name in workers), flush=True)
    time.sleep(600)
    """
)
_END_S = 60.0
"""It takes two seconds on a machine with nothing else to do."""


def test_fleet_workers_and_engine_cores_end_with_the_starter_of_the_fleet(tmp_path: Path) -> None:
    """SIGKILL gives the starter no chance to stop them."""
    command = [sys.executable, "-c", STARTER, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        fleet, *cores = map(int, starter.stdout.readline().split())
        family = [psutil.Process(fleet), *psutil.Process(fleet).children(recursive=True)]
        assert len(cores) == 2
        assert {process.pid for process in family} >= {*cores}
        starter.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(family, timeout=_END_S)
    for process in left:
        process.kill()
    assert not left, (tmp_path / "fleet.log").read_text()[-4000:]
