"""Engines that never come up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from services.worker.engine.start_limit import EXIT_START_TIMEOUT
from tests.support.tethered_process import REPOSITORY
from tests.support.worker_process import cpu_worker

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def test_an_engine_that_hangs_at_its_start_ends_the_worker_and_says_where(tmp_path: Path, tiny_model: Path) -> None:
    """The engine core waits for weights that nobody writes; neither it nor the front end stays behind."""
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny_model.iterdir():
        if file.suffix == ".safetensors":
            os.mkfifo(model / file.name)
        else:
            (model / file.name).symlink_to(file)
    config = tmp_path / "worker.yaml"
    config.write_text(
        yaml.safe_dump({**cpu_worker(model), "listen": f"unix:{tmp_path}/worker.sock", "start-timeout-s": 20})
    )
    # A fleet, for it has imported everything before the limit begins.
    command = [sys.executable, "-m", "services.worker.fleet", "--worker", str(config)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as fleet:
        assert fleet.stdout is not None
        said = fleet.stdout.read().decode(errors="replace")  # until the last of them is gone
        assert fleet.wait() == EXIT_START_TIMEOUT, said[-4000:]
    assert "start_timeout" in said
    assert "run_engine_core" in said, "where the engine core hangs"
    assert "launch_core_engines" in said, "where the front end waits for it"
