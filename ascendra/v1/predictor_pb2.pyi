from ascendra.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Confidence(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONFIDENCE_UNSPECIFIED: _ClassVar[Confidence]
    CONFIDENCE_CALIBRATED: _ClassVar[Confidence]
    CONFIDENCE_FITTED: _ClassVar[Confidence]
    CONFIDENCE_PRIOR: _ClassVar[Confidence]
    CONFIDENCE_DEMOTED: _ClassVar[Confidence]
CONFIDENCE_UNSPECIFIED: Confidence
CONFIDENCE_CALIBRATED: Confidence
CONFIDENCE_FITTED: Confidence
CONFIDENCE_PRIOR: Confidence
CONFIDENCE_DEMOTED: Confidence

class ReportTelemetryRequest(_message.Message):
    __slots__ = ("worker_id", "incarnation", "role", "steps", "warm_start")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    WARM_START_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: str
    role: _common_pb2.Role
    steps: _containers.RepeatedCompositeFieldContainer[_common_pb2.StepTelemetry]
    warm_start: _common_pb2.StepTimeModel
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., role: _Optional[_Union[_common_pb2.Role, str]] = ..., steps: _Optional[_Iterable[_Union[_common_pb2.StepTelemetry, _Mapping]]] = ..., warm_start: _Optional[_Union[_common_pb2.StepTimeModel, _Mapping]] = ...) -> None: ...

class ReportTelemetryResponse(_message.Message):
    __slots__ = ("steps",)
    STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    def __init__(self, steps: _Optional[int] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("worker_id", "prompt_tokens", "predicted_ttft_s", "predicted_ttft_p90_s", "actual_ttft_s", "queue_ahead_s", "moved", "predicted_ttft_p50_s", "relegated")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_P90_S_FIELD_NUMBER: _ClassVar[int]
    ACTUAL_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_AHEAD_S_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_P50_S_FIELD_NUMBER: _ClassVar[int]
    RELEGATED_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    prompt_tokens: int
    predicted_ttft_s: float
    predicted_ttft_p90_s: float
    actual_ttft_s: float
    queue_ahead_s: float
    moved: bool
    predicted_ttft_p50_s: float
    relegated: bool
    def __init__(self, worker_id: _Optional[str] = ..., prompt_tokens: _Optional[int] = ..., predicted_ttft_s: _Optional[float] = ..., predicted_ttft_p90_s: _Optional[float] = ..., actual_ttft_s: _Optional[float] = ..., queue_ahead_s: _Optional[float] = ..., moved: bool = ..., predicted_ttft_p50_s: _Optional[float] = ..., relegated: bool = ...) -> None: ...

class ReportOutcomesRequest(_message.Message):
    __slots__ = ("router_id", "outcomes")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    outcomes: _containers.RepeatedCompositeFieldContainer[Outcome]
    def __init__(self, router_id: _Optional[str] = ..., outcomes: _Optional[_Iterable[_Union[Outcome, _Mapping]]] = ...) -> None: ...

class ReportOutcomesResponse(_message.Message):
    __slots__ = ("outcomes",)
    OUTCOMES_FIELD_NUMBER: _ClassVar[int]
    outcomes: int
    def __init__(self, outcomes: _Optional[int] = ...) -> None: ...

class InstanceState(_message.Message):
    __slots__ = ("worker_id", "role", "decodes", "decode_context_tokens", "in_progress_prefill_tokens", "min_tbt_s", "max_num_batched_tokens", "age_s", "hop_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DECODES_FIELD_NUMBER: _ClassVar[int]
    DECODE_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IN_PROGRESS_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TBT_S_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    HOP_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: _common_pb2.Role
    decodes: int
    decode_context_tokens: int
    in_progress_prefill_tokens: int
    min_tbt_s: float
    max_num_batched_tokens: int
    age_s: float
    hop_s: float
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[_common_pb2.Role, str]] = ..., decodes: _Optional[int] = ..., decode_context_tokens: _Optional[int] = ..., in_progress_prefill_tokens: _Optional[int] = ..., min_tbt_s: _Optional[float] = ..., max_num_batched_tokens: _Optional[int] = ..., age_s: _Optional[float] = ..., hop_s: _Optional[float] = ...) -> None: ...

class AssessRequest(_message.Message):
    __slots__ = ("assess_id", "instances", "home", "prompt_tokens", "age_s", "ttft_slo_s", "tbt_slo_s", "value_function", "relegation")
    ASSESS_ID_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    HOME_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_SLO_S_FIELD_NUMBER: _ClassVar[int]
    TBT_SLO_S_FIELD_NUMBER: _ClassVar[int]
    VALUE_FUNCTION_FIELD_NUMBER: _ClassVar[int]
    RELEGATION_FIELD_NUMBER: _ClassVar[int]
    assess_id: int
    instances: _containers.RepeatedCompositeFieldContainer[InstanceState]
    home: _containers.RepeatedScalarFieldContainer[int]
    prompt_tokens: _containers.RepeatedScalarFieldContainer[int]
    age_s: _containers.RepeatedScalarFieldContainer[float]
    ttft_slo_s: _containers.RepeatedScalarFieldContainer[float]
    tbt_slo_s: _containers.RepeatedScalarFieldContainer[float]
    value_function: str
    relegation: str
    def __init__(self, assess_id: _Optional[int] = ..., instances: _Optional[_Iterable[_Union[InstanceState, _Mapping]]] = ..., home: _Optional[_Iterable[int]] = ..., prompt_tokens: _Optional[_Iterable[int]] = ..., age_s: _Optional[_Iterable[float]] = ..., ttft_slo_s: _Optional[_Iterable[float]] = ..., tbt_slo_s: _Optional[_Iterable[float]] = ..., value_function: _Optional[str] = ..., relegation: _Optional[str] = ...) -> None: ...

class AssessResponse(_message.Message):
    __slots__ = ("assess_id", "ttft_mean_s", "ttft_p50_s", "ttft_p90_s", "tbt_mean_s", "tbt_p90_s", "miss_ttft", "miss_tbt", "laxity_s", "latest_move_s", "confidence", "model_age_s")
    ASSESS_ID_FIELD_NUMBER: _ClassVar[int]
    TTFT_MEAN_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_P50_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_P90_S_FIELD_NUMBER: _ClassVar[int]
    TBT_MEAN_S_FIELD_NUMBER: _ClassVar[int]
    TBT_P90_S_FIELD_NUMBER: _ClassVar[int]
    MISS_TTFT_FIELD_NUMBER: _ClassVar[int]
    MISS_TBT_FIELD_NUMBER: _ClassVar[int]
    LAXITY_S_FIELD_NUMBER: _ClassVar[int]
    LATEST_MOVE_S_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    MODEL_AGE_S_FIELD_NUMBER: _ClassVar[int]
    assess_id: int
    ttft_mean_s: _containers.RepeatedScalarFieldContainer[float]
    ttft_p50_s: _containers.RepeatedScalarFieldContainer[float]
    ttft_p90_s: _containers.RepeatedScalarFieldContainer[float]
    tbt_mean_s: _containers.RepeatedScalarFieldContainer[float]
    tbt_p90_s: _containers.RepeatedScalarFieldContainer[float]
    miss_ttft: _containers.RepeatedScalarFieldContainer[float]
    miss_tbt: _containers.RepeatedScalarFieldContainer[float]
    laxity_s: _containers.RepeatedScalarFieldContainer[float]
    latest_move_s: _containers.RepeatedScalarFieldContainer[float]
    confidence: _containers.RepeatedScalarFieldContainer[Confidence]
    model_age_s: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, assess_id: _Optional[int] = ..., ttft_mean_s: _Optional[_Iterable[float]] = ..., ttft_p50_s: _Optional[_Iterable[float]] = ..., ttft_p90_s: _Optional[_Iterable[float]] = ..., tbt_mean_s: _Optional[_Iterable[float]] = ..., tbt_p90_s: _Optional[_Iterable[float]] = ..., miss_ttft: _Optional[_Iterable[float]] = ..., miss_tbt: _Optional[_Iterable[float]] = ..., laxity_s: _Optional[_Iterable[float]] = ..., latest_move_s: _Optional[_Iterable[float]] = ..., confidence: _Optional[_Iterable[_Union[Confidence, str]]] = ..., model_age_s: _Optional[_Iterable[float]] = ...) -> None: ...

class WatchModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResidualSlice(_message.Message):
    __slots__ = ("name", "max_queue_ahead_s", "levels", "ratios", "samples")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_QUEUE_AHEAD_S_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    RATIOS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    name: str
    max_queue_ahead_s: float
    levels: _containers.RepeatedScalarFieldContainer[float]
    ratios: _containers.RepeatedScalarFieldContainer[float]
    samples: int
    def __init__(self, name: _Optional[str] = ..., max_queue_ahead_s: _Optional[float] = ..., levels: _Optional[_Iterable[float]] = ..., ratios: _Optional[_Iterable[float]] = ..., samples: _Optional[int] = ...) -> None: ...

class WorkerModel(_message.Message):
    __slots__ = ("worker_id", "step_time", "residuals", "confidence", "age_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_TIME_FIELD_NUMBER: _ClassVar[int]
    RESIDUALS_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    step_time: _common_pb2.StepTimeModel
    residuals: _containers.RepeatedCompositeFieldContainer[ResidualSlice]
    confidence: Confidence
    age_s: float
    def __init__(self, worker_id: _Optional[str] = ..., step_time: _Optional[_Union[_common_pb2.StepTimeModel, _Mapping]] = ..., residuals: _Optional[_Iterable[_Union[ResidualSlice, _Mapping]]] = ..., confidence: _Optional[_Union[Confidence, str]] = ..., age_s: _Optional[float] = ...) -> None: ...

class WatchModelsResponse(_message.Message):
    __slots__ = ("version", "workers")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    version: int
    workers: _containers.RepeatedCompositeFieldContainer[WorkerModel]
    def __init__(self, version: _Optional[int] = ..., workers: _Optional[_Iterable[_Union[WorkerModel, _Mapping]]] = ...) -> None: ...

class GetCardRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CardEntry(_message.Message):
    __slots__ = ("worker_id", "slice", "samples", "median_ape", "mape", "p90_ape", "bias", "coverage_p90", "confidence", "note")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    SLICE_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    MEDIAN_APE_FIELD_NUMBER: _ClassVar[int]
    MAPE_FIELD_NUMBER: _ClassVar[int]
    P90_APE_FIELD_NUMBER: _ClassVar[int]
    BIAS_FIELD_NUMBER: _ClassVar[int]
    COVERAGE_P90_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    slice: str
    samples: int
    median_ape: float
    mape: float
    p90_ape: float
    bias: float
    coverage_p90: float
    confidence: Confidence
    note: str
    def __init__(self, worker_id: _Optional[str] = ..., slice: _Optional[str] = ..., samples: _Optional[int] = ..., median_ape: _Optional[float] = ..., mape: _Optional[float] = ..., p90_ape: _Optional[float] = ..., bias: _Optional[float] = ..., coverage_p90: _Optional[float] = ..., confidence: _Optional[_Union[Confidence, str]] = ..., note: _Optional[str] = ...) -> None: ...

class GetCardResponse(_message.Message):
    __slots__ = ("entries", "left_out")
    class LeftOutEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    entries: _containers.RepeatedCompositeFieldContainer[CardEntry]
    left_out: _containers.ScalarMap[str, int]
    def __init__(self, entries: _Optional[_Iterable[_Union[CardEntry, _Mapping]]] = ..., left_out: _Optional[_Mapping[str, int]] = ...) -> None: ...
