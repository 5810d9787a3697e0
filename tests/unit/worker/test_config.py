"""Worker configuration."""

import json
from pathlib import Path

import pytest

from services.common.config import ConfigError, resolve
from services.policy.state import Role
from services.policy.step_time import A100_LLAMA3_8B
from services.worker.config import WorkerConfig, step_time_model

CONFIG_FILES = sorted((Path(__file__).resolve().parents[3] / "deploy" / "config").glob("worker-*.yaml"))


@pytest.mark.parametrize("file", CONFIG_FILES, ids=lambda file: file.stem)
def test_shipped_files_are_valid(file: Path) -> None:
    """Every worker file in deploy/config loads, and its role follows its name."""
    config = resolve(WorkerConfig, file=file)
    assert config.engine_settings().model == config.model
    assert config.worker_id
    if "-lp" in file.stem or "-hp" in file.stem:
        assert config.role is (Role.LOW if "-lp" in file.stem else Role.HIGH)


def test_shipped_workers_do_not_collide() -> None:
    """Ids and addresses of the shipped files differ."""
    configs = [resolve(WorkerConfig, file=file) for file in CONFIG_FILES]
    for field in ("worker_id", "listen", "metrics_listen"):
        assert len({getattr(config, field) for config in configs}) == len(configs)


def test_an_engine_with_weights_needs_a_model() -> None:
    """Only the emulated engine runs without a model."""
    with pytest.raises(ConfigError, match="model"):
        resolve(WorkerConfig, flags={"engine": "cpu"})
    assert resolve(WorkerConfig, flags={"engine": "emulated"}).engine_settings().emulated_step_time == A100_LLAMA3_8B


def test_a_model_may_be_split_over_gpus() -> None:
    """Sizes and executor reach the engine's settings; what no engine can do is refused by name."""
    base = {"engine": "cuda", "model": "m", "tensor_parallel_size": "4"}
    settings = resolve(WorkerConfig, flags={**base, "executor": "ray"}).engine_settings()
    assert (settings.tensor_parallel_size, settings.pipeline_parallel_size, settings.executor) == (4, 1, "ray")
    pipelined = {**base, "pipeline_parallel_size": "2", "token_budget": "static"}
    assert resolve(WorkerConfig, flags=pipelined).engine_settings().pipeline_parallel_size == 2
    for flags, complaint in (
        ({**base, "pipeline_parallel_size": "2"}, "token-budget"),
        ({**base, "tensor_parallel_size": "0"}, "tensor-parallel-size"),
        ({**base, "executor": "slurm"}, "executor"),
        ({"engine": "emulated", "tensor_parallel_size": "2"}, "emulated"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            resolve(WorkerConfig, flags=flags)


def test_flags_beat_environment_beats_file(tmp_path: Path) -> None:
    """The usual precedence."""
    file = tmp_path / "w.yaml"
    file.write_text("engine: emulated\nmax-num-seqs: 1\nmax-model-len: 1000\nseed: 1\n")
    environ = {"ASCENDRA_MAX_NUM_SEQS": "2", "ASCENDRA_SEED": "2"}
    config = resolve(WorkerConfig, file=file, environ=environ, flags={"seed": "3"})
    assert (config.max_model_len, config.max_num_seqs, config.seed) == (1000, 2, 3)


def test_a_step_log_needs_its_folder(tmp_path: Path) -> None:
    """Said before the engine starts, not after."""
    WorkerConfig(engine="emulated", step_log=str(tmp_path / "steps.jsonl"))
    with pytest.raises(ValueError, match=r"step-log: cannot write into the folder of .*nowhere"):
        WorkerConfig(engine="emulated", step_log=str(tmp_path / "nowhere" / "steps.jsonl"))


def test_step_time_profiles(tmp_path: Path) -> None:
    """A profile is a name or a file; anything else is named in the error."""
    file = tmp_path / "model.json"
    file.write_text(json.dumps(A100_LLAMA3_8B.to_dict()))
    assert step_time_model("") is None
    assert step_time_model("a100-llama3-8b") == step_time_model(str(file)) == A100_LLAMA3_8B
    with pytest.raises(ConfigError, match="nowhere"):
        step_time_model("nowhere")
    file.write_text("{}")
    with pytest.raises(ConfigError, match="format_version"):
        step_time_model(str(file))
