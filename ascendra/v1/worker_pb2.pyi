from ascendra.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AttachRequest(_message.Message):
    __slots__ = ("hello", "submit", "withdraw", "cancel", "set_role", "begin_drain", "step_time_model", "ping", "reprioritise", "export_kv", "release_kv")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    WITHDRAW_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    SET_ROLE_FIELD_NUMBER: _ClassVar[int]
    BEGIN_DRAIN_FIELD_NUMBER: _ClassVar[int]
    STEP_TIME_MODEL_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    REPRIORITISE_FIELD_NUMBER: _ClassVar[int]
    EXPORT_KV_FIELD_NUMBER: _ClassVar[int]
    RELEASE_KV_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    submit: Submit
    withdraw: Withdraw
    cancel: Cancel
    set_role: SetRole
    begin_drain: BeginDrain
    step_time_model: _common_pb2.StepTimeModel
    ping: Ping
    reprioritise: Reprioritise
    export_kv: ExportKv
    release_kv: ReleaseKv
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., withdraw: _Optional[_Union[Withdraw, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., set_role: _Optional[_Union[SetRole, _Mapping]] = ..., begin_drain: _Optional[_Union[BeginDrain, _Mapping]] = ..., step_time_model: _Optional[_Union[_common_pb2.StepTimeModel, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., reprioritise: _Optional[_Union[Reprioritise, _Mapping]] = ..., export_kv: _Optional[_Union[ExportKv, _Mapping]] = ..., release_kv: _Optional[_Union[ReleaseKv, _Mapping]] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("welcome", "step", "withdrawn", "failed", "heartbeat", "pong", "role_changed", "draining", "cancelled", "kv_exported")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    ROLE_CHANGED_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    KV_EXPORTED_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    step: StepOutput
    withdrawn: Withdrawn
    failed: RequestFailed
    heartbeat: Heartbeat
    pong: Pong
    role_changed: RoleChanged
    draining: Draining
    cancelled: Cancelled
    kv_exported: KvExported
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., step: _Optional[_Union[StepOutput, _Mapping]] = ..., withdrawn: _Optional[_Union[Withdrawn, _Mapping]] = ..., failed: _Optional[_Union[RequestFailed, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., role_changed: _Optional[_Union[RoleChanged, _Mapping]] = ..., draining: _Optional[_Union[Draining, _Mapping]] = ..., cancelled: _Optional[_Union[Cancelled, _Mapping]] = ..., kv_exported: _Optional[_Union[KvExported, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("router_id", "protocol_version")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    protocol_version: int
    def __init__(self, router_id: _Optional[str] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("worker_id", "protocol_version", "role", "model", "max_model_len", "vocab_size", "max_num_seqs", "max_num_batched_tokens", "kv_capacity_tokens", "engine", "engine_version", "incarnation", "step_time_model", "heartbeat_ms", "policy", "draining", "continuation", "kv_transfer", "prefix_block_tokens")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SEQS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_BATCHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_VERSION_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    STEP_TIME_MODEL_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_MS_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    CONTINUATION_FIELD_NUMBER: _ClassVar[int]
    KV_TRANSFER_FIELD_NUMBER: _ClassVar[int]
    PREFIX_BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    protocol_version: int
    role: _common_pb2.Role
    model: str
    max_model_len: int
    vocab_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_capacity_tokens: int
    engine: str
    engine_version: str
    incarnation: str
    step_time_model: _common_pb2.StepTimeModel
    heartbeat_ms: int
    policy: SchedulingPolicy
    draining: bool
    continuation: Continuation
    kv_transfer: KvTransfer
    prefix_block_tokens: int
    def __init__(self, worker_id: _Optional[str] = ..., protocol_version: _Optional[int] = ..., role: _Optional[_Union[_common_pb2.Role, str]] = ..., model: _Optional[str] = ..., max_model_len: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_num_seqs: _Optional[int] = ..., max_num_batched_tokens: _Optional[int] = ..., kv_capacity_tokens: _Optional[int] = ..., engine: _Optional[str] = ..., engine_version: _Optional[str] = ..., incarnation: _Optional[str] = ..., step_time_model: _Optional[_Union[_common_pb2.StepTimeModel, _Mapping]] = ..., heartbeat_ms: _Optional[int] = ..., policy: _Optional[_Union[SchedulingPolicy, _Mapping]] = ..., draining: bool = ..., continuation: _Optional[_Union[Continuation, _Mapping]] = ..., kv_transfer: _Optional[_Union[KvTransfer, _Mapping]] = ..., prefix_block_tokens: _Optional[int] = ...) -> None: ...

class Continuation(_message.Message):
    __slots__ = ("keyed_noise", "carried_penalties", "dtype")
    KEYED_NOISE_FIELD_NUMBER: _ClassVar[int]
    CARRIED_PENALTIES_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    keyed_noise: bool
    carried_penalties: bool
    dtype: str
    def __init__(self, keyed_noise: bool = ..., carried_penalties: bool = ..., dtype: _Optional[str] = ...) -> None: ...

class KvTransfer(_message.Message):
    __slots__ = ("compatibility", "bytes_per_token", "lease_ms")
    COMPATIBILITY_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    compatibility: str
    bytes_per_token: int
    lease_ms: int
    def __init__(self, compatibility: _Optional[str] = ..., bytes_per_token: _Optional[int] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class SchedulingPolicy(_message.Message):
    __slots__ = ("value_function", "token_budget", "relegation", "calm_factor")
    VALUE_FUNCTION_FIELD_NUMBER: _ClassVar[int]
    TOKEN_BUDGET_FIELD_NUMBER: _ClassVar[int]
    RELEGATION_FIELD_NUMBER: _ClassVar[int]
    CALM_FACTOR_FIELD_NUMBER: _ClassVar[int]
    value_function: str
    token_budget: str
    relegation: str
    calm_factor: float
    def __init__(self, value_function: _Optional[str] = ..., token_budget: _Optional[str] = ..., relegation: _Optional[str] = ..., calm_factor: _Optional[float] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("handle", "request_id", "attempt", "token_ids", "generated_tokens", "sampling", "slo", "age_ms", "priority", "relegated", "traceparent", "last_token_age_ms", "kv_handle")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    GENERATED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    SLO_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    RELEGATED_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    LAST_TOKEN_AGE_MS_FIELD_NUMBER: _ClassVar[int]
    KV_HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: str
    attempt: int
    token_ids: bytes
    generated_tokens: int
    sampling: _common_pb2.SamplingParameters
    slo: _common_pb2.Slo
    age_ms: float
    priority: int
    relegated: bool
    traceparent: str
    last_token_age_ms: float
    kv_handle: bytes
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., token_ids: _Optional[bytes] = ..., generated_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_common_pb2.SamplingParameters, _Mapping]] = ..., slo: _Optional[_Union[_common_pb2.Slo, _Mapping]] = ..., age_ms: _Optional[float] = ..., priority: _Optional[int] = ..., relegated: bool = ..., traceparent: _Optional[str] = ..., last_token_age_ms: _Optional[float] = ..., kv_handle: _Optional[bytes] = ...) -> None: ...

class Withdraw(_message.Message):
    __slots__ = ("withdraw_id", "handles")
    WITHDRAW_ID_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    withdraw_id: int
    handles: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, withdraw_id: _Optional[int] = ..., handles: _Optional[_Iterable[int]] = ...) -> None: ...

class Withdrawn(_message.Message):
    __slots__ = ("withdraw_id", "withdrawn_handles", "kept_handles")
    WITHDRAW_ID_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_HANDLES_FIELD_NUMBER: _ClassVar[int]
    KEPT_HANDLES_FIELD_NUMBER: _ClassVar[int]
    withdraw_id: int
    withdrawn_handles: _containers.RepeatedScalarFieldContainer[int]
    kept_handles: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, withdraw_id: _Optional[int] = ..., withdrawn_handles: _Optional[_Iterable[int]] = ..., kept_handles: _Optional[_Iterable[int]] = ...) -> None: ...

class ExportKv(_message.Message):
    __slots__ = ("export_id", "handle")
    EXPORT_ID_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    export_id: int
    handle: int
    def __init__(self, export_id: _Optional[int] = ..., handle: _Optional[int] = ...) -> None: ...

class KvExported(_message.Message):
    __slots__ = ("export_id", "handle", "refused", "kv_handle", "next_offset")
    EXPORT_ID_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    KV_HANDLE_FIELD_NUMBER: _ClassVar[int]
    NEXT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    export_id: int
    handle: int
    refused: str
    kv_handle: bytes
    next_offset: int
    def __init__(self, export_id: _Optional[int] = ..., handle: _Optional[int] = ..., refused: _Optional[str] = ..., kv_handle: _Optional[bytes] = ..., next_offset: _Optional[int] = ...) -> None: ...

class ReleaseKv(_message.Message):
    __slots__ = ("handles",)
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    handles: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, handles: _Optional[_Iterable[int]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("handles",)
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    handles: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, handles: _Optional[_Iterable[int]] = ...) -> None: ...

class Cancelled(_message.Message):
    __slots__ = ("handles",)
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    handles: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, handles: _Optional[_Iterable[int]] = ...) -> None: ...

class SetRole(_message.Message):
    __slots__ = ("role",)
    ROLE_FIELD_NUMBER: _ClassVar[int]
    role: _common_pb2.Role
    def __init__(self, role: _Optional[_Union[_common_pb2.Role, str]] = ...) -> None: ...

class RoleChanged(_message.Message):
    __slots__ = ("role", "policy")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    role: _common_pb2.Role
    policy: SchedulingPolicy
    def __init__(self, role: _Optional[_Union[_common_pb2.Role, str]] = ..., policy: _Optional[_Union[SchedulingPolicy, _Mapping]] = ...) -> None: ...

class BeginDrain(_message.Message):
    __slots__ = ("timeout_ms",)
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    timeout_ms: int
    def __init__(self, timeout_ms: _Optional[int] = ...) -> None: ...

class Draining(_message.Message):
    __slots__ = ("remaining_ms",)
    REMAINING_MS_FIELD_NUMBER: _ClassVar[int]
    remaining_ms: int
    def __init__(self, remaining_ms: _Optional[int] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("ping_id", "gap_inflation_s")
    PING_ID_FIELD_NUMBER: _ClassVar[int]
    GAP_INFLATION_S_FIELD_NUMBER: _ClassVar[int]
    ping_id: int
    gap_inflation_s: float
    def __init__(self, ping_id: _Optional[int] = ..., gap_inflation_s: _Optional[float] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("ping_id",)
    PING_ID_FIELD_NUMBER: _ClassVar[int]
    ping_id: int
    def __init__(self, ping_id: _Optional[int] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("steps", "waiting", "running", "kv_usage")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    steps: int
    waiting: int
    running: int
    kv_usage: float
    def __init__(self, steps: _Optional[int] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., kv_usage: _Optional[float] = ...) -> None: ...

class Reprioritise(_message.Message):
    __slots__ = ("handles", "relegated")
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    RELEGATED_FIELD_NUMBER: _ClassVar[int]
    handles: _containers.RepeatedScalarFieldContainer[int]
    relegated: bool
    def __init__(self, handles: _Optional[_Iterable[int]] = ..., relegated: bool = ...) -> None: ...

class StepOutput(_message.Message):
    __slots__ = ("sequence", "handles", "token_counts", "token_ids", "logprobs", "ended", "started_handles", "telemetry", "relegated_handles", "kv_failed_handles")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HANDLES_FIELD_NUMBER: _ClassVar[int]
    TOKEN_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    STARTED_HANDLES_FIELD_NUMBER: _ClassVar[int]
    TELEMETRY_FIELD_NUMBER: _ClassVar[int]
    RELEGATED_HANDLES_FIELD_NUMBER: _ClassVar[int]
    KV_FAILED_HANDLES_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    handles: _containers.RepeatedScalarFieldContainer[int]
    token_counts: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[HandleLogprobs]
    ended: _containers.RepeatedCompositeFieldContainer[RequestEnded]
    started_handles: _containers.RepeatedScalarFieldContainer[int]
    telemetry: _containers.RepeatedCompositeFieldContainer[_common_pb2.StepTelemetry]
    relegated_handles: _containers.RepeatedScalarFieldContainer[int]
    kv_failed_handles: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sequence: _Optional[int] = ..., handles: _Optional[_Iterable[int]] = ..., token_counts: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[HandleLogprobs, _Mapping]]] = ..., ended: _Optional[_Iterable[_Union[RequestEnded, _Mapping]]] = ..., started_handles: _Optional[_Iterable[int]] = ..., telemetry: _Optional[_Iterable[_Union[_common_pb2.StepTelemetry, _Mapping]]] = ..., relegated_handles: _Optional[_Iterable[int]] = ..., kv_failed_handles: _Optional[_Iterable[int]] = ...) -> None: ...

class HandleLogprobs(_message.Message):
    __slots__ = ("handle", "positions")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    positions: _containers.RepeatedCompositeFieldContainer[_common_pb2.PositionLogprobs]
    def __init__(self, handle: _Optional[int] = ..., positions: _Optional[_Iterable[_Union[_common_pb2.PositionLogprobs, _Mapping]]] = ...) -> None: ...

class RequestEnded(_message.Message):
    __slots__ = ("handle", "reason", "stop_token_id", "cached_prompt_tokens", "preemptions")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    CACHED_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    handle: int
    reason: _common_pb2.FinishReason
    stop_token_id: int
    cached_prompt_tokens: int
    preemptions: int
    def __init__(self, handle: _Optional[int] = ..., reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., stop_token_id: _Optional[int] = ..., cached_prompt_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ...) -> None: ...

class RequestFailed(_message.Message):
    __slots__ = ("handle", "code", "message", "reason")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    handle: int
    code: int
    message: str
    reason: str
    def __init__(self, handle: _Optional[int] = ..., code: _Optional[int] = ..., message: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...
