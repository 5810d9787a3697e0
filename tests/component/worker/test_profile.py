"""`python -m services.worker.profile` on the emulated engine: it finds the step times that were emulated."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from services.policy.step_time import StepShape, StepTimeBin, StepTimeModel
from services.worker.config import step_time_model

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

# Steps long enough that a busy machine, which wakes sleepers late by milliseconds, changes little.
TRUTH = StepTimeModel((StepTimeBin(0, 0.04, 0.0, 1e-4, 1.5e-3, 4e-6, 2e-7),))
SHAPES = (
    StepShape(8),
    StepShape(500),
    StepShape(400, prefill_context_products=400 * 500),
    StepShape(0, 1, 900),
    StepShape(0, 7, 7 * 30),
    StepShape(0, 7, 7 * 250),
    StepShape(300, 5, 5 * 200, 300 * 400),
)


def test_the_emulated_step_times_are_found(tmp_path: Path) -> None:
    """Step times of all kinds are met within a few per cent; the file starts a worker and says how good it is."""
    truth, config, out = tmp_path / "truth.json", tmp_path / "worker.yaml", tmp_path / "profile.json"
    truth.write_text(json.dumps(TRUTH.to_dict()))
    config.write_text(
        yaml.safe_dump(
            {
                "engine": "emulated",
                "step-time-profile": str(truth),
                "max-model-len": 1024,
                "max-num-seqs": 8,
                "max-num-batched-tokens": 512,
                "vocab-size": 1000,
            }
        )
    )
    command = [sys.executable, "-m", "services.worker.profile", "--config", str(config), "--out", str(out)]
    run = subprocess.run([*command, "--seconds", "15"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert f"written to {out}" in run.stdout

    model = step_time_model(str(out))
    assert model is not None
    assert model.problems() == []
    for shape in SHAPES:
        assert model.step_s(shape) == pytest.approx(TRUTH.step_s(shape), rel=0.08), shape
    quality = json.loads(out.read_text())["profile"]["held_out"]["all"]
    assert quality["steps"] >= 20
    assert f"{quality['steps']} steps, error {quality['mape']:.1%}" in run.stdout


def test_a_profile_without_a_file_is_refused() -> None:
    """Where the model goes has to be said."""
    command = [sys.executable, "-m", "services.worker.profile", "--engine", "emulated"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "out must name a file" in run.stderr
