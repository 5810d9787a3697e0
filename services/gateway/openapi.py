"""The gateway's OpenAPI document, from tables of the fields that the parsers read.

A test compares the tables with what services/gateway/requests.py really reads, so that neither can drift.
"""

from collections.abc import Mapping
from typing import Any

from ascendra import __version__
from services.gateway.config import GatewayConfig
from services.gateway.requests import TBT_HEADERS, TTFT_HEADERS
from services.gateway.sampling import UNSUPPORTED

Schema = dict[str, Any]
MAX_INT32 = (1 << 31) - 1


def _number(low: float | None = None, high: float | None = None, *, above: float | None = None) -> Schema:
    bounds = {"minimum": low, "maximum": high, "exclusiveMinimum": above}
    return {"type": "number", **{name: value for name, value in bounds.items() if value is not None}}


def _integer(low: int | None = None, high: int | None = None) -> Schema:
    bounds = {"minimum": low, "maximum": high}
    return {"type": "integer", **{name: value for name, value in bounds.items() if value is not None}}


def _object(properties: Mapping[str, Schema], *required: str, description: str = "") -> Schema:
    made: Schema = {"type": "object", "properties": {name: _or_null(of) for name, of in properties.items()}}
    for name in required:
        made["properties"][name] = properties[name]
    if required:
        made["required"] = list(required)
    return made | ({"description": description} if description else {})


def _or_null(schema: Schema) -> Schema:
    """Null counts as absent."""
    return {"anyOf": [schema, {"type": "null"}]} if schema else {}


def _array(of: Schema, *, low: int = 0, high: int | None = None) -> Schema:
    return {"type": "array", "items": of, "minItems": low} | ({"maxItems": high} if high is not None else {})


TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
TOKEN_ID = _integer(0, (1 << 32) - 1)
TOKEN_IDS = _array(TOKEN_ID)
STOP = {"type": "string", "minLength": 1, "maxLength": 64}
STOPS: Schema = {"anyOf": [STOP, _array(STOP, high=16)]}

_CONSTRAINT = {
    "json": {"anyOf": [{"type": "string"}, {"type": "object"}]},
    "json_object": FLAG,
    "regex": TEXT,
    "grammar": TEXT,
    "choice": {"anyOf": [TEXT, _array(TEXT)]},
}
"""Ways to constrain the output: fields of `structured_outputs`, and with the prefix `guided_` of the body."""

SAMPLING: dict[str, Schema] = {
    "temperature": _number(0, 2),
    "top_p": _number(above=0, high=1),
    "top_k": _integer(-1, MAX_INT32),
    "min_p": _number(0, 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(above=0, high=100),
    "seed": _integer(-(1 << 63), (1 << 63) - 1),
    "min_tokens": _integer(0, MAX_INT32),
    "stop": STOPS,
    "stop_token_ids": _array(TOKEN_ID, high=128),
    "include_stop_str_in_output": FLAG,
    "ignore_eos": FLAG,
    "logit_bias": {
        "type": "object",
        "patternProperties": {"^[0-9]{1,9}$": _number(-100, 100)},
        "additionalProperties": False,
    },
    "allowed_token_ids": _array(TOKEN_ID, high=1024),
    "bad_words": {"anyOf": [STOP, _array(STOP, high=64)]},
    "response_format": _object(
        {
            "type": {"enum": ["text", "json_object", "json_schema"]},
            "json_schema": _object({"name": TEXT, "schema": {"type": "object"}}),
        },
        "type",
    ),
    "structured_outputs": _object(_CONSTRAINT),
    **{f"guided_{name}": schema for name, schema in _CONSTRAINT.items()},
}

COMMON: dict[str, Schema] = {
    "model": {"type": "string", "description": "Name of a served model; empty: the only one."},
    "n": _integer(1, 64),
    "stream": FLAG,
    "stream_options": _object({"include_usage": FLAG, "continuous_usage_stats": FLAG}),
    "max_tokens": _integer(1, MAX_INT32),
    "return_tokens_as_token_ids": FLAG,
    "return_token_ids": FLAG,
    "slo": _object(
        {"ttft_ms": _number(above=0), "tbt_ms": _number(above=0)},
        description="Objective of this request, clamped to the limits of class and tenant.",
    ),
    "slo_class": TEXT,
    "priority": _integer(-100, 100),
    "on_overload": {"enum": ["relegate", "refuse"]},
    "session_id": TEXT,
}

COMPLETION: dict[str, Schema] = {
    "prompt": {
        "anyOf": [
            TEXT,
            _array(TEXT, low=1, high=16),
            _array(TOKEN_ID, low=1),
            _array(_array(TOKEN_ID, low=1), low=1, high=16),
        ]
    },
    "logprobs": _integer(0, 20),
    "echo": FLAG,
    "add_special_tokens": FLAG,
    **COMMON,
    "max_tokens": _integer(0, MAX_INT32),
    **SAMPLING,
}

_MESSAGE = _object(
    {
        "role": {"type": "string", "minLength": 1, "maxLength": 128},
        "content": {
            "anyOf": [
                TEXT,
                _array({"anyOf": [TEXT, _object({"type": {"const": "text"}, "text": TEXT}, "type", "text")]}),
            ]
        },
    },
    "role",
)
MESSAGES = _array(_MESSAGE, low=1, high=4096)

CHAT: dict[str, Schema] = {
    "messages": MESSAGES,
    "logprobs": FLAG,
    "top_logprobs": _integer(0, 20),
    "max_completion_tokens": _integer(1, MAX_INT32),
    "add_generation_prompt": FLAG,
    "continue_final_message": FLAG,
    "echo": {"type": "boolean", "enum": [False]},
    **COMMON,
    **SAMPLING,
}

TOKENIZE: dict[str, Schema] = {
    "model": TEXT,
    "prompt": TEXT,
    "messages": MESSAGES,
    "add_special_tokens": FLAG,
    "add_generation_prompt": FLAG,
    "continue_final_message": FLAG,
    "return_token_strs": FLAG,
}
DETOKENIZE: dict[str, Schema] = {"model": TEXT, "tokens": TOKEN_IDS}

_SLO_HEADERS = [
    {"name": name, "in": "header", "schema": {"type": "string", "pattern": r"^[0-9]{1,6}(\.[0-9]{1,3})?$"}}
    for name in (*TTFT_HEADERS, *TBT_HEADERS)
]
_NAME_HEADERS = [
    {"name": "x-request-id", "in": "header", "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,120}$"}},
    {"name": "x-session-id", "in": "header", "schema": {"type": "string", "maxLength": 128}},
    {"name": "x-tenant-id", "in": "header", "schema": {"type": "string", "maxLength": 128}},
    {"name": "traceparent", "in": "header", "schema": TEXT},
]
_ERROR = _object(
    {
        "error": {
            "type": "object",
            "properties": {
                "message": TEXT,
                "type": TEXT,
                "param": {"anyOf": [TEXT, {"type": "null"}]},
                "code": {"anyOf": [TEXT, {"type": "null"}]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "error",
)
_USAGE = _object({"prompt_tokens": _integer(0), "completion_tokens": _integer(0), "total_tokens": _integer(0)})
_ANSWER = {
    "type": "object",
    "required": ["id", "object", "created", "model", "choices", "usage", "ascendra"],
    "properties": {"choices": _array({"type": "object"}, low=1), "usage": _USAGE, "ascendra": {"type": "object"}},
}
_EVENT = {
    "type": "object",
    "properties": {"data": {"type": "string", "description": "A chunk as JSON, or [DONE]."}},
    "required": ["data"],
}
"""Of a stream."""
_ERRORS = {
    "400": "a wrong field",
    "401": "no valid key",
    "403": "the caller may not do this",
    "404": "not found",
    "408": "the request did not arrive in time",
    "409": "the request id is in use",
    "413": "too large",
    "429": "the share or the capacity is used up",
    "431": "headers too large",
    "503": "nobody can serve it now",
    "504": "the time limit passed",
}


def openapi(config: GatewayConfig) -> dict[str, Any]:
    """Return the document, OpenAPI 3.1."""
    generate = {"parameters": [*_SLO_HEADERS, *_NAME_HEADERS]}
    text, events = {"text/plain": {"schema": TEXT}}, {"text/event-stream": {"schema": _EVENT}}
    answers = {"application/json": {"schema": _ANSWER}, **events}
    model = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    found = _object({"id": TEXT, "object": {"const": "model"}, "max_model_len": _integer(0)}, "id", "object")
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Ascendra gateway",
            "version": __version__,
            "description": "OpenAI's API with latency objectives, in front of Ascendra routers. Fields that would "
            f"change the answer and are not supported are refused: {', '.join(UNSUPPORTED)}. Unknown fields are "
            f"ignored. At most {config.max_body_bytes} bytes of body and {config.max_choices} choices.",
        },
        "paths": {
            "/v1/completions": _post("complete", "Complete prompts.", COMPLETION, answers, "prompt", **generate),
            "/v1/chat/completions": _post("chat", "Answer a conversation.", CHAT, answers, "messages", **generate),
            "/tokenize": _post("tokenize", "Turn text or messages into ids.", TOKENIZE, _json({"type": "object"})),
            "/detokenize": _post("detokenize", "Turn ids into text.", DETOKENIZE, _json(_object({"prompt": TEXT}))),
            "/v1/models": _get("models", "List the served models.", _json(_object({"data": _array(found)}, "data"))),
            "/v1/models/{name}": _get("model", "Find a served model.", _json(found), parameters=[model]),
            "/health": _get("health", "Whether a request could be served.", text, plain_503=True),
            "/live": _get("live", "Whether the process lives.", text),
            "/version": _get("version", "The version.", _json(_object({"version": TEXT}, "version"))),
            "/metrics": _get("metrics", "Prometheus metrics.", text),
            "/openapi.json": _get("openapi", "This document.", _json({"type": "object"})),
        },
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _json(schema: Schema) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _post(
    name: str, summary: str, fields: Mapping[str, Schema], content: Mapping[str, Any], *required: str, **more: Any
) -> dict[str, Any]:
    body = {"required": True, "content": _json(_object(fields, *required))}
    return {"post": _operation(name, summary, content, requestBody=body, **more)}


def _get(name: str, summary: str, content: Mapping[str, Any], *, plain_503: bool = False, **more: Any) -> Schema:
    operation = _operation(name, summary, content, **more)
    if plain_503:
        operation["responses"]["503"]["content"] = {"text/plain": {"schema": TEXT}}
    return {"get": operation}


def _operation(name: str, summary: str, content: Mapping[str, Any], **more: Any) -> Schema:
    responses: Schema = {"200": {"description": "served", "content": dict(content)}}
    for status, reason in _ERRORS.items():
        responses[status] = {"description": reason, "content": _json(_ERROR)}
    return {"operationId": name, "summary": summary, "responses": responses, **more}
