"""Hypothesis strategies for protobuf messages: any subset of fields, values at the edges and beyond."""

import math
from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import strategies as st

_M = TypeVar("_M", bound=Message)
_INT32 = st.sampled_from([-(1 << 31), -101, -1, 0, 1, 2, 100, (1 << 31) - 1])
_UINT32 = st.sampled_from([0, 1, 2, 3, 21, 512, 2048, (1 << 31) - 1, (1 << 32) - 1])
_FLOATS = st.sampled_from([0.0, -0.0, 1.0, 0.5, -1.0, 2.5, 1e-30, 1e30, math.inf, -math.inf, math.nan])
_SCALARS: dict[int, st.SearchStrategy[Any]] = {
    FieldDescriptor.TYPE_DOUBLE: _FLOATS,
    FieldDescriptor.TYPE_FLOAT: _FLOATS,
    FieldDescriptor.TYPE_INT32: _INT32,
    FieldDescriptor.TYPE_SINT32: _INT32,
    FieldDescriptor.TYPE_UINT32: _UINT32,
    FieldDescriptor.TYPE_UINT64: st.sampled_from([0, 1, (1 << 63) - 1, (1 << 64) - 1]),
    FieldDescriptor.TYPE_BOOL: st.booleans(),
    FieldDescriptor.TYPE_STRING: st.one_of(
        st.text(max_size=12), st.sampled_from(["user", "tiny", "default", "a" * 300])
    ),
    FieldDescriptor.TYPE_BYTES: st.one_of(st.binary(max_size=24), st.just(b"\x05\0\0\0" * 3), st.just(b"stop")),
}


def messages(kind: type[_M]) -> st.SearchStrategy[_M]:
    """Return messages of a class."""
    return _fields(kind.DESCRIPTOR).map(lambda values: kind(**values))


def _fields(descriptor: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional={field.name: _value(field) for field in descriptor.fields}).map(
        lambda values: _one_of_each_oneof(descriptor, values)
    )


def _value(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    kind = field.message_type
    if kind is not None and kind.GetOptions().map_entry:
        return st.dictionaries(_scalar(kind.fields_by_name["key"]), _scalar(kind.fields_by_name["value"]), max_size=3)
    one = _scalar(field) if kind is None else _fields(kind)
    return st.lists(one, max_size=4) if field.is_repeated else one


def _scalar(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    if field.enum_type is not None:
        return st.sampled_from([*field.enum_type.values_by_number, 77])
    return _SCALARS[field.type]


def _one_of_each_oneof(descriptor: Any, values: dict[str, Any]) -> dict[str, Any]:
    for oneof in descriptor.oneofs:
        for name in [field.name for field in oneof.fields if field.name in values][1:]:
            del values[name]
    return values
