"""Whatever a body or a header holds, it is read or refused with 400: nothing else is raised, and nothing hangs."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascendra import InvalidArgumentError
from ascendra.wire import build_request
from services.gateway import openapi
from services.gateway.config import GatewayConfig
from services.gateway.fields import Fields, parse_object
from services.gateway.http_body import read_body
from services.gateway.logprobs import token_text
from services.gateway.problems import ApiError, BadRequest
from services.gateway.requests import TBT_HEADERS, TTFT_HEADERS, GenerationRequest, parse_chat, parse_completion

CONFIG = GatewayConfig()
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, 1, -1, 20, 2**31, 2**32, 2**63, 2**64, -(2**63)]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["text", "user", "json_schema", "relegate", "5", "-1", "²"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(
            st.sampled_from(["type", "text", "role", "content", "json_schema", "schema", "ttft_ms", "regex", "7", "x"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=8,
)
WHOLE = st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")
HEADERS = st.dictionaries(
    st.sampled_from([*TTFT_HEADERS, *TBT_HEADERS, "x-session-id", "traceparent", "x-tenant-id"]),
    st.one_of(st.text(max_size=10), st.sampled_from(["1", "-1", "nan", "inf", "1e999", "0x10", "1_0", "٣"])),
    max_size=3,
)


def bodies(fields: Mapping[str, Any], right: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Return bodies: some fields replaced by anything, the needed ones often right."""
    names = sorted({*fields, "tools", "suffix", "tool_choice", "chat_template"})
    return st.dictionaries(st.sampled_from(names), VALUES, max_size=6).map(lambda wrong: right | wrong)


def check(
    parse: Callable[[Fields, Mapping[str, str], GatewayConfig], GenerationRequest],
    body: dict[str, Any],
    headers: dict[str, str],
) -> None:
    """Parse and build what would be sent to a router."""
    try:
        request = parse(Fields(body), headers, CONFIG)
        for index in range(request.choices):
            prompt = request.prompts[index // request.n]
            options = request.choice_options(index, "fuzz")
            if prompt.messages is not None:
                options["messages"] = prompt.messages
            if prompt.token_ids is not None:
                options["token_ids"] = prompt.token_ids
            build_request(prompt.text, options)
    except BadRequest as problem:
        assert problem.status == 400
        assert problem.param
        orjson.loads(problem.json())
    except InvalidArgumentError as error:
        assert error.message


@settings(max_examples=300, deadline=None)
@given(body=bodies(openapi.COMPLETION, {"prompt": "x"}), headers=HEADERS)
def test_completions(body: dict[str, Any], headers: dict[str, str]) -> None:
    """A body of /v1/completions."""
    check(parse_completion, body, headers)


@settings(max_examples=300, deadline=None)
@given(body=bodies(openapi.CHAT, {"messages": [{"role": "user", "content": "x"}]}), headers=HEADERS)
def test_chats(body: dict[str, Any], headers: dict[str, str]) -> None:
    """A body of /v1/chat/completions."""
    check(parse_chat, body, headers)


@settings(max_examples=300, deadline=None)
@given(raw=st.one_of(st.binary(max_size=60), VALUES.map(lambda value: repr(value).encode()), st.just(b"[" * 5000)))
def test_bytes_that_are_no_json_object_are_refused(raw: bytes) -> None:
    """Any bytes: an object or a refusal."""
    try:
        assert isinstance(parse_object(raw).values, dict)
    except BadRequest as problem:
        assert problem.param == "body"


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.binary(max_size=40), max_size=5), declared=st.text(max_size=4))
async def test_bodies_are_bounded(parts: list[bytes], declared: str) -> None:
    """However it is cut and whatever length it claims, a body is whole or too large."""
    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    try:
        assert await read_body(receive, {"content-length": declared}, 64, 30) == b"".join(parts)
    except ApiError as problem:
        assert problem.status == 413


@settings(max_examples=300, deadline=None)
@given(text=st.text(WHOLE, max_size=12), cuts=st.lists(st.integers(0, 40), max_size=8))
def test_token_texts_add_up(text: str, cuts: list[int]) -> None:
    """However a text is cut into tokens of up to four pieces a character, their texts are the text."""
    raw = text.encode()
    places = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    tokens = [raw[low:high] for low, high in itertools.pairwise(places)]
    spelt = [token_text(token, tokens[max(index - 4, 0) : index]) for index, token in enumerate(tokens)]
    if "\ufffd" not in "".join(spelt):
        assert "".join(spelt) == text


@pytest.mark.parametrize(
    ("token", "before", "expected"),
    [
        (b" list", [], " list"),
        ("é".encode()[:1], [b"a"], ""),
        ("é".encode()[1:], [b"caf", "é".encode()[:1]], "é"),
        ("🙂".encode()[3:], [b"x", *(bytes([byte]) for byte in "🙂".encode()[:3])], "🙂"),
        (b"\xff", [b"a"], ""),
    ],
)
def test_half_characters(token: bytes, before: list[bytes], expected: str) -> None:
    """A token within a character has no text, the one that completes it has the character."""
    assert token_text(token, before) == expected
