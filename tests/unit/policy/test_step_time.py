"""The step-time model as data."""

import dataclasses
import json
import math

import pytest

from services.policy.step_time import A100_LLAMA3_8B, StepShape, StepTimeBin, StepTimeModel


def test_bins_meet_at_their_limit() -> None:
    """A step of exactly the limit uses the lower bin, one token more the next."""
    model = StepTimeModel((StepTimeBin(512, 1.0), StepTimeBin(0, 2.0)))
    assert [model.step_s(StepShape(500, decodes)) for decodes in (12, 13)] == [1.0, 2.0]


def test_step_time_adds_every_feature() -> None:
    """Each coefficient multiplies its own feature."""
    model = StepTimeModel((StepTimeBin(0, 1.0, 2.0, 3.0, 5.0, 7.0, 11.0),), safety_factor=1.5)
    shape = StepShape(10, 4, 100, 1000)
    expected_s = 1 + 2 * 14 + 3 * 10 + 5 * 4 + 7 * 100 + 11 * 1000
    assert model.step_s(shape) == pytest.approx(expected_s)
    assert model.planned_step_s(shape) == pytest.approx(1.5 * expected_s)


def test_published_profile_reproduces_its_table() -> None:
    """512 tokens of prefill take 57 ms on the published profile, and 2,048 take 201 ms."""
    assert A100_LLAMA3_8B.step_s(StepShape(512)) == pytest.approx(0.0566, abs=1e-4)
    assert A100_LLAMA3_8B.step_s(StepShape(2048)) == pytest.approx(0.2012, abs=1e-4)


def test_problems_names_the_falling_feature() -> None:
    """The published profile falls in decodes in its upper bin, and only there."""
    assert [problem.split(" is ")[0] for problem in A100_LLAMA3_8B.problems()] == ["seconds per decode"]


def test_model_survives_json() -> None:
    """What to_dict wrote is read back equal."""
    assert StepTimeModel.from_dict(json.loads(json.dumps(A100_LLAMA3_8B.to_dict()))) == A100_LLAMA3_8B


@pytest.mark.parametrize(
    "change",
    [{"format_version": 2}, {"bins": []}, {"safety_factor": 0.5}, {"safety_factor": "x"}, {"bins": [{"a0": 1}]}],
)
def test_unreadable_models_are_refused(change: dict[str, object]) -> None:
    """A wrong version or impossible values raise ValueError."""
    with pytest.raises(ValueError, match=r".+"):
        StepTimeModel.from_dict({**A100_LLAMA3_8B.to_dict(), **change})


@pytest.mark.parametrize("limits", [(512,), (512, 256, 0), (0, 512), (512, 512, 0)])
def test_bins_must_rise_and_end_open(limits: tuple[int, ...]) -> None:
    """Bins that overlap or leave steps without coefficients are refused."""
    with pytest.raises(ValueError, match="max_tokens"):
        StepTimeModel(tuple(StepTimeBin(limit, 0.01) for limit in limits))


def test_coefficients_must_be_finite() -> None:
    """NaN and infinity are refused."""
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            dataclasses.replace(A100_LLAMA3_8B, bins=(StepTimeBin(0, bad),))
