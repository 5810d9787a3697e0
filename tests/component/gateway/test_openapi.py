"""The OpenAPI document says what the parsers read, and the gateway behaves as it says."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from services.gateway import openapi
from services.gateway.config import GatewayConfig
from services.gateway.fields import Fields
from services.gateway.requests import parse_chat, parse_completion
from services.gateway.sampling import UNSUPPORTED
from tests.support.api_under_test import api_under_test, run_schemathesis
from tests.support.local_router import until

_READERS = {
    "string": "text",
    "boolean": "flag",
    "number": "number",
    "integer": "integer",
    "object": "object",
}


class RecordingFields(Fields):
    """Notes which fields are read, and as what."""

    def __init__(self, values: Mapping[str, Any], *, prefix: str = "", read: dict[str, set[str]] | None = None) -> None:
        super().__init__(values, prefix=prefix)
        self.read = {} if read is None else read

    def get(self, key: str) -> Any:
        self._note(key, "get")
        return super().get(key)

    def text(self, key: str) -> str | None:
        self._note(key, "text")
        return super().text(key)

    def flag(self, key: str, default: bool = False) -> bool:
        self._note(key, "flag")
        return super().flag(key, default)

    def number(self, key: str) -> float | None:
        self._note(key, "number")
        return super().number(key)

    def integer(self, key: str) -> int | None:
        self._note(key, "integer")
        return super().integer(key)

    def texts(self, key: str) -> list[str]:
        self._note(key, "texts")
        return super().texts(key)

    def integers(self, key: str) -> list[int]:
        self._note(key, "integers")
        return super().integers(key)

    def object(self, key: str) -> Fields | None:
        self._note(key, "object")
        found = super().object(key)
        return None if found is None else RecordingFields(found.values, prefix=f"{self.name(key)}.", read=self.read)

    def _note(self, key: str, kind: str) -> None:
        self.read.setdefault(self.name(key), set()).add(kind)


def expected_readers(fields: Mapping[str, openapi.Schema], prefix: str = "") -> dict[str, str]:
    """Return the full name of every documented field with the reader that fits its type."""
    found = {}
    for name, schema in fields.items():
        given = schema.get("anyOf", [schema])
        plain = given[0] if len(given) == 2 and given[1] == {"type": "null"} else schema
        kind = plain.get("type") or ("texts" if "anyOf" in plain else "text")
        if kind == "array":
            kind = "integers" if plain["items"].get("type") == "integer" else "get"
        found[prefix + name] = _READERS.get(kind, kind)
        if kind == "object" and "additionalProperties" not in plain:
            found |= expected_readers(plain["properties"], f"{prefix}{name}.") if "properties" in plain else {}
    return found


@pytest.mark.parametrize(
    ("parse", "fields", "body"),
    [
        (parse_completion, openapi.COMPLETION, {"prompt": "x"}),
        (parse_chat, openapi.CHAT, {"messages": [{"role": "user", "content": "x"}], "logprobs": True}),
    ],
)
def test_documented_fields_are_those_that_are_read(
    parse: Callable[..., Any], fields: Mapping[str, openapi.Schema], body: dict[str, Any]
) -> None:
    """A field that a parser reads is documented with its type, and one that is documented is read."""
    nested = {
        "stream": True,
        "stream_options": {},
        "slo": {"ttft_ms": 1},
        "logit_bias": {"5": 1},
        "structured_outputs": {},
        "response_format": {"type": "json_schema", "json_schema": {"schema": {}}},
    }
    recorded = RecordingFields(body | nested)
    parse(recorded, {}, GatewayConfig())
    read = {name: kinds for name, kinds in recorded.read.items() if name not in UNSUPPORTED and name != "tool_choice"}
    documented = expected_readers(fields)
    # Read as they are, with checks of their own.
    anything = {"prompt", "messages", "response_format.json_schema.schema", "structured_outputs.json", "guided_json"}
    assert set(documented) - set(read) == {"response_format.json_schema.name"}, "documented but never read"
    assert not {name for name in read if name not in documented and not name.startswith("logit_bias.")}
    for name, kinds in read.items():
        if name in documented and name not in anything:
            assert documented[name] in kinds, name


async def test_document(tmp_path: Path) -> None:
    """The document is served, names every path that is served, and schemathesis finds nothing wrong with either."""
    async with api_under_test(tmp_path / "tiny") as (url, gateway, router):
        status, output = await run_schemathesis(url, examples=10, seconds=12, seed=1, phases="fuzzing")
        assert status == 0, output
        await until(lambda: not gateway.in_flight)
        await until(lambda: not router.router.dispatcher.live)
