"""Plain data that crosses processes: reports and step-time models."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascendra.v1 import common_pb2
from services.common.wire import model_from_proto, model_to_proto
from services.policy.step_time import A100_LLAMA3_8B
from services.worker.engine.contract import EngineLoad, StepReport


@given(
    step=st.none() | st.builds(common_pb2.StepTelemetry, step=st.integers(1, 2**40), step_s=st.floats(0, 10)),
    ids=st.lists(st.text(max_size=8), max_size=5),
    load=st.none()
    | st.builds(EngineLoad, waiting=st.integers(0, 9999), running=st.integers(0, 9999), kv_usage=st.floats(0, 1)),
)
def test_reports_survive_the_datagram(
    step: common_pb2.StepTelemetry | None, ids: list[str], load: EngineLoad | None
) -> None:
    """A report decodes to what was encoded."""
    report = StepReport(
        step=step, ended_s=12.5, started=ids, relegated=ids[:1], preempted=ids[1:], kv_failed=ids[:2], load=load
    )
    assert StepReport.decode(report.encode()) == report


def test_step_time_models_survive_the_wire() -> None:
    """A model converts to its message and back unchanged."""
    assert model_from_proto(model_to_proto(A100_LLAMA3_8B)) == A100_LLAMA3_8B


def test_what_is_no_model_is_refused() -> None:
    """An empty message, and one of another format, are refused."""
    with pytest.raises(ValueError, match="format_version"):
        model_from_proto(common_pb2.StepTimeModel())
    with pytest.raises(ValueError, match="bins"):
        model_from_proto(common_pb2.StepTimeModel(format_version=1, safety_factor=1.0))
