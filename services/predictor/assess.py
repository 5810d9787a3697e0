"""An Assess question as columns, and its answer."""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ascendra.v1 import predictor_pb2
from services.common.errors import InvalidArgument
from services.common.wire import CONFIDENCE_TO_PROTO
from services.policy.calibration import Confidence, prior_slices
from services.policy.relegation import MOORE_HODGSON, RULES
from services.policy.risk import RiskInstance, RiskTable, assess
from services.policy.step_time import A100_LLAMA3_8B
from services.policy.token_budget import BudgetPolicy
from services.policy.value_functions import VALUE_FUNCTIONS
from services.predictor.models import ModelStore, WorkerModels

MAX_CELLS = 65_536
"""Most requests x instances of one question: it is answered on the event loop, in some ten milliseconds."""
_COLUMNS = ("home", "prompt_tokens", "age_s", "ttft_slo_s", "tbt_slo_s")


def answer(request: predictor_pb2.AssessRequest, store: ModelStore, now_s: float) -> predictor_pb2.AssessResponse:
    """Answer a question. Raises InvalidArgument naming the field that is wrong."""
    home, tokens, age_s, ttft_slo_s, tbt_slo_s = _columns(request)
    instances, confidence, ages_s = [], [], []
    for state in request.instances:
        instance, sure, model_age_s = _instance(state, store, now_s)
        instances.append(instance)
        confidence.append(CONFIDENCE_TO_PROTO[sure])
        ages_s.append(model_age_s)
    table = assess(
        instances,
        home.astype(np.int64),
        tokens.astype(np.int64),
        age_s,
        ttft_slo_s,
        tbt_slo_s,
        request.value_function or "llf",
        request.relegation or MOORE_HODGSON,
    )
    response = _packed(table)
    response.assess_id = request.assess_id
    response.confidence.extend(confidence)
    response.model_age_s.extend(ages_s)
    return response


def _columns(request: predictor_pb2.AssessRequest) -> list[npt.NDArray[np.float64]]:
    """Return the columns, checked."""
    rows = len(request.home)
    columns = [np.fromiter(getattr(request, name), dtype=np.float64) for name in _COLUMNS]
    for name, column in zip(_COLUMNS, columns, strict=True):
        if len(column) != rows:
            raise InvalidArgument(f"{name} has {len(column)} entries, home has {rows}")
        if not np.isfinite(column).all():
            raise InvalidArgument(f"{name} must be finite")
        if name != "home" and (column < 0).any():
            raise InvalidArgument(f"{name} must not be negative")
    if rows * len(request.instances) > MAX_CELLS:
        raise InvalidArgument(f"requests x instances must be at most {MAX_CELLS}")
    if rows and not (columns[0].min() >= -1 and columns[0].max() < max(len(request.instances), 0)):
        raise InvalidArgument("home must be -1 or an index into instances")
    if request.value_function and request.value_function not in VALUE_FUNCTIONS:
        raise InvalidArgument(f"value_function must be one of {', '.join(VALUE_FUNCTIONS)}")
    if request.relegation and request.relegation not in RULES:
        raise InvalidArgument(f"relegation must be one of {', '.join(RULES)}")
    return columns


def _instance(
    state: predictor_pb2.InstanceState, store: ModelStore, now_s: float
) -> tuple[RiskInstance, Confidence, float]:
    """Return one instance with what is learned of it, how far to trust that, and its age in seconds."""
    for name in ("min_tbt_s", "age_s", "hop_s"):
        value = getattr(state, name)
        if not (np.isfinite(value) and value >= 0):
            raise InvalidArgument(f"instances.{name} must be finite and not negative, got {value}")
    models = store.get(state.worker_id)
    instance = RiskInstance(
        model=models.fit.model() if models else A100_LLAMA3_8B,
        decodes=min(state.decodes, 1 << 20),
        decode_context_tokens=min(state.decode_context_tokens, 1 << 40),
        min_tbt_s=state.min_tbt_s,
        in_progress_tokens=min(state.in_progress_prefill_tokens, 1 << 40),
        hop_s=state.hop_s,
        budget=_budget(state.max_num_batched_tokens, models),
        residuals=models.residuals if models else prior_slices(),
    )
    if models is None:
        return instance, Confidence.PRIOR, float("inf")
    return instance, models.confidence, max(now_s - models.heard_s, 0.0)


def _budget(max_tokens: int, models: WorkerModels | None) -> BudgetPolicy:
    default = BudgetPolicy(max_tokens=max_tokens or BudgetPolicy().max_tokens)
    return replace(default, delivery_s=models.delivery_s) if models and models.delivery_s else default


def _packed(table: RiskTable) -> predictor_pb2.AssessResponse:
    """Return the answer's columns; a packed field is laid out as numpy holds it, so nothing is converted one by one."""
    parts = []
    for field in predictor_pb2.AssessResponse.DESCRIPTOR.fields:
        column = getattr(table, field.name, None)
        if column is None:
            continue
        data = np.ascontiguousarray(column, dtype="<f4").tobytes()
        parts += [_varint(field.number << 3 | 2), _varint(len(data)), data]
    return predictor_pb2.AssessResponse.FromString(b"".join(parts))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
