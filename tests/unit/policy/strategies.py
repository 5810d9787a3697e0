"""Hypothesis strategies for the policy's state."""

from hypothesis import strategies as st

from services.policy.state import QueuedRequest, Slo
from services.policy.step_time import A100_LLAMA3_8B, StepTimeBin, StepTimeModel
from services.policy.token_budget import DecodeLoad

seconds = st.floats(0, 20, allow_nan=False)


@st.composite
def requests(draw: st.DrawFn, max_size: int = 12, started: bool = True) -> list[QueuedRequest]:
    """Draw waiting requests with distinct ids."""
    return [
        QueuedRequest(
            request_id=f"r{i}",
            arrival_s=draw(seconds),
            prompt_tokens=(prompt := draw(st.integers(1, 8000))),
            computed_tokens=draw(st.integers(0, prompt - 1)) if started else 0,
            slo=Slo(ttft_s=draw(st.floats(0.1, 10)), tbt_s=draw(st.sampled_from([0.05, 0.1, 0.2]))),
            priority=draw(st.integers(-2, 2)),
            urgent=draw(st.booleans()),
            ticketed=draw(st.booleans()),
            relegated=draw(st.booleans()),
            started=started and draw(st.booleans()),
        )
        for i in range(draw(st.integers(0, max_size)))
    ]


loads = st.builds(
    lambda decodes, context: DecodeLoad(decodes, decodes * context), st.integers(0, 256), st.integers(1, 4000)
)
_slope = st.floats(0, 2e-4)
_bins = st.builds(
    lambda limit, a0, a2, a3, a4, a5: StepTimeBin(limit, a0, 1e-6, a2, a3, a4, a5),
    st.just(0),
    st.floats(1e-4, 0.05),
    _slope,
    _slope,
    st.floats(0, 1e-6),
    st.floats(0, 1e-8),
)
models = st.one_of(
    st.just(A100_LLAMA3_8B),
    st.builds(lambda bin, safety: StepTimeModel((bin,), safety_factor=safety), _bins, st.floats(1, 2)),
)
