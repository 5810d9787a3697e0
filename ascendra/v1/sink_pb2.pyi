from ascendra.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RelayRequest(_message.Message):
    __slots__ = ("hello", "batch")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    hello: RelayHello
    batch: RelayBatch
    def __init__(self, hello: _Optional[_Union[RelayHello, _Mapping]] = ..., batch: _Optional[_Union[RelayBatch, _Mapping]] = ...) -> None: ...

class RelayHello(_message.Message):
    __slots__ = ("router_id", "incarnation", "sink")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SINK_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    incarnation: str
    sink: str
    def __init__(self, router_id: _Optional[str] = ..., incarnation: _Optional[str] = ..., sink: _Optional[str] = ...) -> None: ...

class RelayBatch(_message.Message):
    __slots__ = ("items", "lost_requests")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    LOST_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[RelayItem]
    lost_requests: int
    def __init__(self, items: _Optional[_Iterable[_Union[RelayItem, _Mapping]]] = ..., lost_requests: _Optional[int] = ...) -> None: ...

class RelayItem(_message.Message):
    __slots__ = ("handle", "request_id", "token_offset", "token_ids", "text", "gap", "end")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_OFFSET_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    GAP_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: str
    token_offset: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    gap: RelayGap
    end: RelayEnd
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[str] = ..., token_offset: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ..., gap: _Optional[_Union[RelayGap, _Mapping]] = ..., end: _Optional[_Union[RelayEnd, _Mapping]] = ...) -> None: ...

class RelayGap(_message.Message):
    __slots__ = ("first_offset", "end_offset")
    FIRST_OFFSET_FIELD_NUMBER: _ClassVar[int]
    END_OFFSET_FIELD_NUMBER: _ClassVar[int]
    first_offset: int
    end_offset: int
    def __init__(self, first_offset: _Optional[int] = ..., end_offset: _Optional[int] = ...) -> None: ...

class RelayEnd(_message.Message):
    __slots__ = ("reason", "error")
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    reason: _common_pb2.FinishReason
    error: str
    def __init__(self, reason: _Optional[_Union[_common_pb2.FinishReason, str]] = ..., error: _Optional[str] = ...) -> None: ...

class RelayResponse(_message.Message):
    __slots__ = ("acks",)
    ACKS_FIELD_NUMBER: _ClassVar[int]
    acks: _containers.RepeatedCompositeFieldContainer[RelayAck]
    def __init__(self, acks: _Optional[_Iterable[_Union[RelayAck, _Mapping]]] = ...) -> None: ...

class RelayAck(_message.Message):
    __slots__ = ("handle", "request_id", "token_offset", "ended")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_OFFSET_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    handle: int
    request_id: str
    token_offset: int
    ended: bool
    def __init__(self, handle: _Optional[int] = ..., request_id: _Optional[str] = ..., token_offset: _Optional[int] = ..., ended: bool = ...) -> None: ...
