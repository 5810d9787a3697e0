"""The sweep stays within the engine's limits and shows every feature of a step in several sizes."""

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from services.worker.sweep import Limits, fits, scenes

ENGINES = st.builds(
    Limits,
    max_model_len=st.integers(64, 131_072),
    max_num_seqs=st.integers(1, 512),
    max_num_batched_tokens=st.integers(32, 8192),
    kv_capacity_tokens=st.integers(20_000, 400_000),
)


@given(limits=ENGINES, seed=st.integers(0, 99))
def test_scenes_fit_the_engine(limits: Limits, seed: int) -> None:
    """No request is longer than the context, no scene larger than batch and cache, and each has prompts to prefill."""
    for scene in islice(scenes(limits, seed), 40):
        assert fits(limits, scene)
        assert max(scene.prefills) < limits.max_model_len
        assert min(scene.prefills) >= 1
        assert scene.decodes < limits.max_num_seqs
        assert scene.decodes * (scene.context_tokens + scene.output_tokens) <= limits.kv_capacity_tokens


def test_a_sweep_varies_everything_soon() -> None:
    """Within 60 scenes of a usual engine: decodes alone in many numbers and contexts, small and large prefills."""
    limits = Limits(max_model_len=8192, max_num_seqs=64, max_num_batched_tokens=2048, kv_capacity_tokens=380_000)
    seen = list(islice(scenes(limits), 60))
    assert {scene.decodes for scene in seen} >= {0, 1, 2, 4, 8, 16, 32}
    assert len({scene.context_tokens for scene in seen}) >= 4
    lengths = sorted(length for scene in seen for length in scene.prefills)
    assert lengths[len(lengths) // 4] < 100
    assert lengths[-len(lengths) // 4] > 1000
    assert lengths[-1] > limits.max_num_batched_tokens
