from ascendra.v1 import common_pb2 as _common_pb2
from ascendra.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerHealth(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    WORKER_HEALTH_UNSPECIFIED: _ClassVar[WorkerHealth]
    WORKER_HEALTH_READY: _ClassVar[WorkerHealth]
    WORKER_HEALTH_CONNECTING: _ClassVar[WorkerHealth]
    WORKER_HEALTH_TRIPPED: _ClassVar[WorkerHealth]
    WORKER_HEALTH_DRAINING: _ClassVar[WorkerHealth]
WORKER_HEALTH_UNSPECIFIED: WorkerHealth
WORKER_HEALTH_READY: WorkerHealth
WORKER_HEALTH_CONNECTING: WorkerHealth
WORKER_HEALTH_TRIPPED: WorkerHealth
WORKER_HEALTH_DRAINING: WorkerHealth

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker_id", "address", "health", "role", "model", "engine", "waiting", "running", "queued_prefill_tokens", "kv_usage", "predicted_ttft_s", "age_s", "round_trip_s", "tokens_per_s", "model_source", "policy", "delivery_s")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HEALTH_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    QUEUED_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    ROUND_TRIP_S_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    MODEL_SOURCE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    DELIVERY_S_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    address: str
    health: WorkerHealth
    role: _common_pb2.Role
    model: str
    engine: str
    waiting: int
    running: int
    queued_prefill_tokens: int
    kv_usage: float
    predicted_ttft_s: float
    age_s: float
    round_trip_s: float
    tokens_per_s: float
    model_source: str
    policy: str
    delivery_s: float
    def __init__(self, worker_id: _Optional[str] = ..., address: _Optional[str] = ..., health: _Optional[_Union[WorkerHealth, str]] = ..., role: _Optional[_Union[_common_pb2.Role, str]] = ..., model: _Optional[str] = ..., engine: _Optional[str] = ..., waiting: _Optional[int] = ..., running: _Optional[int] = ..., queued_prefill_tokens: _Optional[int] = ..., kv_usage: _Optional[float] = ..., predicted_ttft_s: _Optional[float] = ..., age_s: _Optional[float] = ..., round_trip_s: _Optional[float] = ..., tokens_per_s: _Optional[float] = ..., model_source: _Optional[str] = ..., policy: _Optional[str] = ..., delivery_s: _Optional[float] = ...) -> None: ...

class AttainmentStatus(_message.Message):
    __slots__ = ("slo_class", "requests", "joint", "ttft", "tbt", "ttft_p50_s", "ttft_p99_s", "gap_p99_s")
    SLO_CLASS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    JOINT_FIELD_NUMBER: _ClassVar[int]
    TTFT_FIELD_NUMBER: _ClassVar[int]
    TBT_FIELD_NUMBER: _ClassVar[int]
    TTFT_P50_S_FIELD_NUMBER: _ClassVar[int]
    TTFT_P99_S_FIELD_NUMBER: _ClassVar[int]
    GAP_P99_S_FIELD_NUMBER: _ClassVar[int]
    slo_class: str
    requests: int
    joint: float
    ttft: float
    tbt: float
    ttft_p50_s: float
    ttft_p99_s: float
    gap_p99_s: float
    def __init__(self, slo_class: _Optional[str] = ..., requests: _Optional[int] = ..., joint: _Optional[float] = ..., ttft: _Optional[float] = ..., tbt: _Optional[float] = ..., ttft_p50_s: _Optional[float] = ..., ttft_p99_s: _Optional[float] = ..., gap_p99_s: _Optional[float] = ...) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("router_id", "version", "workers", "attainment", "window_s", "live_requests", "prediction_policy", "predictor_connected", "counters", "uptime_s", "held_requests")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    ATTAINMENT_FIELD_NUMBER: _ClassVar[int]
    WINDOW_S_FIELD_NUMBER: _ClassVar[int]
    LIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_POLICY_FIELD_NUMBER: _ClassVar[int]
    PREDICTOR_CONNECTED_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    UPTIME_S_FIELD_NUMBER: _ClassVar[int]
    HELD_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    version: str
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    attainment: _containers.RepeatedCompositeFieldContainer[AttainmentStatus]
    window_s: float
    live_requests: int
    prediction_policy: str
    predictor_connected: bool
    counters: _containers.ScalarMap[str, int]
    uptime_s: float
    held_requests: int
    def __init__(self, router_id: _Optional[str] = ..., version: _Optional[str] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., attainment: _Optional[_Iterable[_Union[AttainmentStatus, _Mapping]]] = ..., window_s: _Optional[float] = ..., live_requests: _Optional[int] = ..., prediction_policy: _Optional[str] = ..., predictor_connected: bool = ..., counters: _Optional[_Mapping[str, int]] = ..., uptime_s: _Optional[float] = ..., held_requests: _Optional[int] = ...) -> None: ...

class WatchStatusRequest(_message.Message):
    __slots__ = ("interval_ms",)
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    interval_ms: int
    def __init__(self, interval_ms: _Optional[int] = ...) -> None: ...

class WatchStatusResponse(_message.Message):
    __slots__ = ("status",)
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: GetStatusResponse
    def __init__(self, status: _Optional[_Union[GetStatusResponse, _Mapping]] = ...) -> None: ...

class RegisterWorkerRequest(_message.Message):
    __slots__ = ("address", "worker_id", "ttl_ms")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TTL_MS_FIELD_NUMBER: _ClassVar[int]
    address: str
    worker_id: str
    ttl_ms: int
    def __init__(self, address: _Optional[str] = ..., worker_id: _Optional[str] = ..., ttl_ms: _Optional[int] = ...) -> None: ...

class RegisterWorkerResponse(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class SetRoleRequest(_message.Message):
    __slots__ = ("worker_id", "role")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    role: _common_pb2.Role
    def __init__(self, worker_id: _Optional[str] = ..., role: _Optional[_Union[_common_pb2.Role, str]] = ...) -> None: ...

class SetRoleResponse(_message.Message):
    __slots__ = ("role",)
    ROLE_FIELD_NUMBER: _ClassVar[int]
    role: _common_pb2.Role
    def __init__(self, role: _Optional[_Union[_common_pb2.Role, str]] = ...) -> None: ...

class DrainWorkerRequest(_message.Message):
    __slots__ = ("worker_id", "timeout_ms")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    timeout_ms: int
    def __init__(self, worker_id: _Optional[str] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class DrainWorkerResponse(_message.Message):
    __slots__ = ("remaining",)
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    remaining: int
    def __init__(self, remaining: _Optional[int] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id", "tenant")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("worker_id", "predicted_ttft_s", "miss_ttft", "excluded", "cached_tokens")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    MISS_TTFT_FIELD_NUMBER: _ClassVar[int]
    EXCLUDED_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    predicted_ttft_s: float
    miss_ttft: float
    excluded: str
    cached_tokens: int
    def __init__(self, worker_id: _Optional[str] = ..., predicted_ttft_s: _Optional[float] = ..., miss_ttft: _Optional[float] = ..., excluded: _Optional[str] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("at_ms", "kind", "rule", "from_worker_id", "to_worker_id", "candidates", "predicted_ttft_s")
    AT_MS_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    FROM_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TO_WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_TTFT_S_FIELD_NUMBER: _ClassVar[int]
    at_ms: float
    kind: str
    rule: str
    from_worker_id: str
    to_worker_id: str
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    predicted_ttft_s: float
    def __init__(self, at_ms: _Optional[float] = ..., kind: _Optional[str] = ..., rule: _Optional[str] = ..., from_worker_id: _Optional[str] = ..., to_worker_id: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., predicted_ttft_s: _Optional[float] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("request_id", "decisions", "receipt", "state")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    decisions: _containers.RepeatedCompositeFieldContainer[Decision]
    receipt: _inference_pb2.SloReceipt
    state: str
    def __init__(self, request_id: _Optional[str] = ..., decisions: _Optional[_Iterable[_Union[Decision, _Mapping]]] = ..., receipt: _Optional[_Union[_inference_pb2.SloReceipt, _Mapping]] = ..., state: _Optional[str] = ...) -> None: ...
