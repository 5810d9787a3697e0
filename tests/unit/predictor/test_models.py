"""What the predictor remembers of workers."""

import json
import math
import random
from pathlib import Path

import pytest

from services.policy.calibration import Confidence
from services.policy.step_time import A100_LLAMA3_8B, StepShape, StepTimeModel
from services.predictor.config import PredictorConfig
from services.predictor.models import ModelStore, WorkerModels


def store(max_workers: int = 8) -> ModelStore:
    """Return an empty store."""
    return ModelStore(max_workers=max_workers, forget_after_s=60)


def run_steps(models: WorkerModels, count: int, slower: float = 1.0) -> None:
    """Report steps of a machine so many times as slow as the profile, with 3% noise."""
    rng = random.Random(1)
    for _ in range(count):
        prefill, decodes = rng.randint(0, 1500), rng.randint(1, 60)
        shape = StepShape(prefill, decodes, decodes * 900, 0)
        assert models.observe(shape, slower * A100_LLAMA3_8B.step_s(shape) * math.exp(rng.gauss(0, 0.03)))


def test_silent_workers_are_forgotten() -> None:
    """After the limit without telemetry a worker is gone, and the version says that something changed."""
    kept = store()
    kept.heard("old", "a", None, 0.0)
    kept.heard("new", "a", None, 50.0)
    version = kept.version
    assert kept.forget_silent(61.0) == ["old"]
    assert [models.worker_id for models in kept] == ["new"]
    assert kept.version > version
    assert kept.forget_silent(61.0) == []


def test_confidence_grows_with_steps_and_outcomes() -> None:
    """Prior, then fitted, then calibrated; a machine that changes is demoted until it is learned again."""
    kept = store()
    models = kept.heard("w", "a", None, 0.0)
    states = [models.confidence]
    run_steps(models, 500)
    states.append(models.confidence)
    for _ in range(60):
        assert kept.learn_outcome("w", 1.0, 1.0, 1.0, 1.2)
    states.append(models.confidence)
    run_steps(models, 30, slower=4.0)
    states.append(models.confidence)
    assert any("demoted" in line.note for line in models.card())
    run_steps(models, 800, slower=4.0)
    states.append(models.confidence)
    assert states == [
        Confidence.PRIOR,
        Confidence.FITTED,
        Confidence.CALIBRATED,
        Confidence.DEMOTED,
        Confidence.CALIBRATED,
    ]


def test_stated_bound_of_step_times_covers_ninety_per_cent() -> None:
    """Judged before it learns, the 90% bound of step times holds 87 to 94% of them, with a small error."""
    models = store().heard("w", "a", None, 0.0)
    run_steps(models, 3000, slower=1.5)
    accuracy = models.steps.accuracy()
    assert 0.87 <= accuracy.coverage_p90 <= 0.94
    assert accuracy.mape < 0.05


def test_a_restarted_engine_begins_with_its_own_model_or_what_was_learned() -> None:
    """A new incarnation takes the warm start it brings; without one, the model learned before."""
    kept = store()
    models = kept.heard("w", "a", None, 0.0)
    run_steps(models, 500, slower=2.0)
    learned = models.fit.model()
    assert kept.heard("w", "b", None, 1.0).fit.model() == learned
    own = StepTimeModel(A100_LLAMA3_8B.bins, source="profile:own")
    assert kept.heard("w", "c", own, 2.0).fit.model() is own


def test_outcomes_of_unknown_workers_teach_nothing() -> None:
    """Only workers that send telemetry are calibrated, so memory stays bounded."""
    kept = store()
    assert not kept.learn_outcome("nobody", 1.0, 1.0, 1.0, 1.0)
    assert len(kept) == 0


@pytest.mark.parametrize("wrong", [{"publish_interval_s": 0.0}, {"forget_after_s": -1.0}, {"max_workers": 0}])
def test_configuration_is_checked(wrong: dict[str, float]) -> None:
    """Values that cannot work are refused at start."""
    with pytest.raises(ValueError, match="above 0"):
        PredictorConfig(**wrong)  # type: ignore[arg-type]


def test_profile_comes_by_name_or_file(tmp_path: Path) -> None:
    """A profile's name, a JSON file, or nothing."""
    file = tmp_path / "model.json"
    file.write_text(json.dumps(A100_LLAMA3_8B.to_dict()))
    assert PredictorConfig().warm_start() is None
    assert PredictorConfig(step_time_profile="a100-llama3-8b").warm_start() is A100_LLAMA3_8B
    assert PredictorConfig(step_time_profile=str(file)).warm_start() == A100_LLAMA3_8B
