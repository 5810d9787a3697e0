"""From HTTP bodies to requests."""

import contextlib
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ascendra import Message, Slo, StructuredOutput
from services.gateway.config import GatewayConfig
from services.gateway.fields import Fields, parse_object
from services.gateway.problems import BadRequest
from services.gateway.requests import GenerationRequest, parse_chat, parse_completion

CONFIG = GatewayConfig()
USER = {"role": "user", "content": "x"}


def completion(body: dict[str, Any], **headers: str) -> GenerationRequest:
    """Parse a body of /v1/completions with a prompt."""
    return parse_completion(parse_object(orjson.dumps({"prompt": "x", **body})), headers, CONFIG)


def chat(body: dict[str, Any]) -> GenerationRequest:
    """Parse a body of /v1/chat/completions with a message."""
    return parse_chat(parse_object(orjson.dumps({"messages": [USER], **body})), {}, CONFIG)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": 5}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 33, "prompt": ["a", "b"]}, "n"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"stream": "yes"}, "stream"),
        ({"suffix": "y"}, "suffix"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"slo": {"ttft_ms": "soon"}}, "slo.ttft_ms"),
        ({"on_overload": "panic"}, "on_overload"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format"),
    ],
)
def test_a_wrong_field_of_a_completion_is_named(body: dict[str, Any], param: str) -> None:
    """The error says which field is wrong."""
    with pytest.raises(BadRequest) as raised:
        completion(body)
    assert raised.value.param == param


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [USER, {"content": "x"}]}, "messages[1].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"tools": [{}]}, "tools"),
        ({"chat_template": "x"}, "chat_template"),
        ({"echo": True}, "echo"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
    ],
)
def test_a_wrong_field_of_a_chat_is_named(body: dict[str, Any], param: str) -> None:
    """The error says which field is wrong."""
    with pytest.raises(BadRequest) as raised:
        chat(body)
    assert raised.value.param == param


def test_null_is_the_same_as_absent() -> None:
    """Clients send null for what they leave to the server."""
    names = [
        "temperature",
        "n",
        "stop",
        "stream",
        "stream_options",
        "logprobs",
        "seed",
        "slo",
        "tools",
        "suffix",
        "echo",
    ]
    assert completion(dict.fromkeys(names)) == completion({})


def test_neutral_values_of_unsupported_fields_pass() -> None:
    """A field that asks for nothing is no error."""
    neutral = {"suffix": "", "use_beam_search": False, "length_penalty": 1.0, "skip_special_tokens": True}
    assert completion(neutral) == completion({})
    assert chat({"tools": [{}], "tool_choice": "none"}) == chat({})


def test_prompts() -> None:
    """A prompt is text or ids, alone or in a list."""
    assert [prompt.text for prompt in completion({"prompt": "a"}).prompts] == ["a"]
    assert [prompt.text for prompt in completion({"prompt": ["a", "b"]}).prompts] == ["a", "b"]
    assert [prompt.token_ids for prompt in completion({"prompt": [1, 2]}).prompts] == [[1, 2]]
    assert [prompt.token_ids for prompt in completion({"prompt": [[1], [2, 3]]}).prompts] == [[1], [2, 3]]


def test_messages() -> None:
    """Text parts are joined; a missing content is empty."""
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "a"}, "b"], "name": "ignored"},
        {"role": "assistant"},
    ]
    assert chat({"messages": messages}).prompts[0].messages == [Message("system", "a\nb"), Message("assistant", "")]


def test_limits_on_tokens() -> None:
    """max_completion_tokens goes before max_tokens; only completions have a default."""
    assert chat({"max_tokens": 5, "max_completion_tokens": 7}).sampling.max_tokens == 7
    assert chat({"max_tokens": 5}).sampling.max_tokens == 5
    assert chat({}).sampling.max_tokens is None
    assert completion({}).sampling.max_tokens == 16


def test_logprobs_of_both_shapes() -> None:
    """Chat asks with a flag and a number, completions with a number."""
    assert chat({"logprobs": True, "top_logprobs": 3}).sampling.logprobs == 3
    assert chat({"logprobs": True}).sampling.logprobs == 0
    with pytest.raises(BadRequest, match="only allowed with logprobs"):
        chat({"top_logprobs": 3})
    assert completion({"logprobs": 0}).sampling.logprobs == 0
    assert completion({}).sampling.logprobs is None


def test_objectives() -> None:
    """The body goes before the headers, and the plain header before llm-d's."""
    headers = {"x-slo-ttft-ms": "1", "x-llm-d-slo-ttft-ms": "2", "x-llm-d-slo-tpot-ms": "3"}
    assert completion({}, **headers).options["slo"] == Slo(ttft_ms=1, tbt_ms=3)
    assert completion({"slo": {"tbt_ms": 9}}, **headers).options["slo"] == Slo(ttft_ms=1, tbt_ms=9)
    assert "slo" not in completion({}).options


def test_seeds_of_samples() -> None:
    """Sample i of every prompt has seed + i, within 64 bits; negative seeds wrap."""
    request = completion({"prompt": ["a", "b"], "n": 2, "seed": -1})
    seeds = [request.choice_options(index, "r")["sampling"].seed for index in range(4)]
    assert seeds == [2**64 - 1, 0, 2**64 - 1, 0]
    assert [request.choice_id(index, "r") for index in range(4)] == ["r-0", "r-1", "r-2", "r-3"]
    assert completion({}).choice_id(0, "r") == "r"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, StructuredOutput(json_schema='{"type":"object"}')),
        ({"guided_json": {"type": "array"}}, StructuredOutput(json_schema='{"type":"array"}')),
        ({"guided_json": '{"type":"array"}'}, StructuredOutput(json_schema='{"type":"array"}')),
        ({"structured_outputs": {"regex": "a+"}}, StructuredOutput(regex="a+")),
        ({"structured_outputs": {"grammar": "root ::= x"}}, StructuredOutput(grammar="root ::= x")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutput(grammar='root ::= "a" | "b"')),
    ],
)
def test_structured_output(body: dict[str, Any], expected: StructuredOutput | None) -> None:
    """Every spelling of a constraint is understood."""
    assert completion(body).sampling.structured_output == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
KNOWN = [
    *("prompt", "messages", "n", "stream", "stream_options", "seed", "stop", "slo", "logit_bias", "response_format"),
    *("temperature", "max_tokens", "logprobs", "top_logprobs", "echo", "tools", "priority", "guided_json"),
]


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(KNOWN), json_values, max_size=6))
def test_no_body_is_a_fault_of_the_server(body: dict[str, Any]) -> None:
    """Whatever the body holds, it is a request or an error of the client."""
    for parse in (parse_completion, parse_chat):
        with contextlib.suppress(BadRequest):
            assert parse(Fields(body), {}, CONFIG).choices >= 1
