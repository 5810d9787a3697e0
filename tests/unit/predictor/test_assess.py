"""The answer to an Assess question is the risk table, column by column."""

import time

import numpy as np

from ascendra.v1 import predictor_pb2
from services.policy.calibration import prior_slices
from services.policy.risk import RiskInstance, assess
from services.policy.step_time import A100_LLAMA3_8B
from services.policy.token_budget import BudgetPolicy
from services.predictor.assess import answer
from services.predictor.models import ModelStore


def question(rows: int, instances: int) -> predictor_pb2.AssessRequest:
    """Return a question about random requests."""
    rng = np.random.default_rng(0)
    return predictor_pb2.AssessRequest(
        instances=[
            predictor_pb2.InstanceState(
                worker_id=f"w{i}",
                decodes=20,
                decode_context_tokens=20_000,
                min_tbt_s=0.1,
                max_num_batched_tokens=1024,
                in_progress_prefill_tokens=300 * i,
                hop_s=0.001 * i,
            )
            for i in range(instances)
        ],
        home=rng.integers(-1, instances, rows),
        prompt_tokens=rng.integers(1, 4000, rows),
        age_s=rng.uniform(0, 1, rows),
        ttft_slo_s=np.full(rows, 2.0),
        tbt_slo_s=np.full(rows, 0.1),
    )


def test_columns_equal_the_table() -> None:
    """Every repeated field holds the table's column of its name, row-major."""
    request = question(17, 3)
    response = answer(request, ModelStore(max_workers=1, forget_after_s=1), 0.0)
    table = assess(
        [
            RiskInstance(
                model=A100_LLAMA3_8B,
                decodes=20,
                decode_context_tokens=20_000,
                min_tbt_s=0.1,
                in_progress_tokens=300 * i,
                hop_s=0.001 * i,
                budget=BudgetPolicy(max_tokens=1024),
                residuals=prior_slices(),
            )
            for i in range(3)
        ],
        np.array(request.home),
        np.array(request.prompt_tokens),
        np.array(request.age_s),
        np.array(request.ttft_slo_s),
        np.array(request.tbt_slo_s),
    )
    for name in table.__dataclass_fields__:
        column = np.array(getattr(response, name)).reshape(17, 3)
        np.testing.assert_allclose(column, getattr(table, name), rtol=1e-5, atol=1e-6)


def test_a_large_question_is_answered_in_milliseconds() -> None:
    """1,000 requests on 8 instances, decoding and encoding included."""
    request, store = question(1000, 8), ModelStore(max_workers=1, forget_after_s=1)
    durations_s = []
    for _ in range(8):
        began_s = time.process_time()
        answer(request, store, 0.0).SerializeToString()
        durations_s.append(time.process_time() - began_s)
    assert min(durations_s) < 0.03
