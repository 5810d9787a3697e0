"""The elastic decode cap."""

from hypothesis import given
from hypothesis import strategies as st

from services.policy.elastic_batch import decode_cap
from services.policy.step_time import A100_LLAMA3_8B, StepShape, StepTimeModel
from tests.unit.policy.strategies import models


@given(models, st.floats(0.01, 0.3), st.integers(100, 8000))
def test_cap_keeps_the_share_of_the_objective(model: StepTimeModel, tbt_s: float, context: int) -> None:
    """A step with as many decodes as the cap stays within (1 - epsilon) of the objective, unless one alone does not."""
    cap = decode_cap(model, tbt_s, context, 256, 0.15)
    assert 1 <= cap <= 256
    if cap > 1:
        assert model.planned_step_s(StepShape(0, cap, cap * context)) <= 0.85 * tbt_s


def test_cap_shrinks_with_the_objective_and_the_context() -> None:
    """Tighter objectives and longer contexts leave room for fewer; no objective, no cap."""
    caps = [decode_cap(A100_LLAMA3_8B, *a, 256) for a in ((0.1, 1000), (0.05, 1000), (0.05, 4000))]
    assert caps == sorted(caps, reverse=True)
    assert len(set(caps)) == 3
    assert decode_cap(A100_LLAMA3_8B, 0.0, 1000, 256) == 256
