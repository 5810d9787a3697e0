"""Typed reading of a JSON body. A field of the wrong type is an error that names it; unknown fields are ignored."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import orjson

from services.gateway.problems import BadRequest

_T = TypeVar("_T")


class Fields:
    """The fields of a JSON object; null counts as absent."""

    def __init__(self, values: Mapping[str, Any], *, prefix: str = "") -> None:
        self.values = values
        self._prefix = prefix

    def name(self, key: str) -> str:
        """Return the full name of a field, for errors."""
        return self._prefix + key

    def get(self, key: str) -> Any:
        """Return a field as it is, None when absent."""
        return self.values.get(key)

    def text(self, key: str) -> str | None:
        """Return a string."""
        return self._read(key, _text)

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a boolean."""
        value = self._read(key, _flag)
        return default if value is None else value

    def number(self, key: str) -> float | None:
        """Return a number."""
        return self._read(key, _number)

    def integer(self, key: str) -> int | None:
        """Return a whole number."""
        return self._read(key, _integer)

    def texts(self, key: str) -> list[str]:
        """Return a list of strings; one string stands for a list of it."""
        return self._read(key, _texts) or []

    def integers(self, key: str) -> list[int]:
        """Return a list of whole numbers."""
        return self._read(key, _integers) or []

    def object(self, key: str) -> "Fields | None":
        """Return the fields of a nested object."""
        value = self._read(key, _object)
        return None if value is None else Fields(value, prefix=f"{self.name(key)}.")

    def _read(self, key: str, convert: Callable[[Any], _T]) -> _T | None:
        value = self.values.get(key)
        if value is None:
            return None
        try:
            return convert(value)
        except TypeError as error:
            raise BadRequest(self.name(key), f"{error}, got {_shown(value)}") from None


def parse_object(body: bytes) -> Fields:
    """Return the fields of a JSON body. Raises BadRequest."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest("body", f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadRequest("body", "expected a JSON object")
    return Fields(value)


def _shown(value: Any) -> str:
    # The kind is enough: a value may be a piece of a prompt.
    kinds: dict[type, str] = {str: "a string", bool: "a boolean", list: "a list", dict: "an object"}
    return kinds.get(type(value)) or str(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("expected a string")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("expected true or false")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError("expected a number")
    return float(value)


def _integer(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError("expected an integer")
    return value


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TypeError("expected a list of strings")
    return value


def _integers(value: Any) -> list[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise TypeError("expected a list of integers")
    return value


def _object(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("expected an object")
    return value
