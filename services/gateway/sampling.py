"""Sampling parameters of an OpenAI body, with vLLM's extensions."""

from typing import Any

import orjson

from ascendra import SamplingParams, StructuredOutput
from services.gateway.fields import Fields
from services.gateway.problems import BadRequest

UINT64_RANGE = 1 << 64

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # Field: values that ask for nothing. Anything else would change the answer, so it is refused rather than ignored.
    "audio": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "functions": (None, []),
    "length_penalty": (None, 1),
    "logprob_token_ids": (None, []),
    "prompt_embeds": (None, []),
    "prompt_logprobs": (None,),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "suffix": (None, ""),
    "thinking_token_budget": (None,),
    "tools": (None, []),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
}


def refuse_unsupported(body: Fields) -> None:
    """Raise BadRequest when the body asks for something that this server cannot do."""
    for name, neutral in UNSUPPORTED.items():
        if body.get(name) not in neutral and not (name == "tools" and body.get("tool_choice") == "none"):
            raise BadRequest(name, "is not supported")


def sampling_of(body: Fields, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    """Return the sampling parameters of a body. Ranges are checked by the router."""
    seed = body.integer("seed")
    return SamplingParams(
        temperature=body.number("temperature"),
        top_p=body.number("top_p"),
        top_k=body.integer("top_k"),
        min_p=body.number("min_p"),
        presence_penalty=body.number("presence_penalty"),
        frequency_penalty=body.number("frequency_penalty"),
        repetition_penalty=body.number("repetition_penalty"),
        seed=None if seed is None else seed % UINT64_RANGE,
        max_tokens=max_tokens,
        min_tokens=body.integer("min_tokens"),
        stop=body.texts("stop"),
        stop_token_ids=body.integers("stop_token_ids"),
        include_stop_in_output=body.flag("include_stop_str_in_output"),
        ignore_eos=body.flag("ignore_eos"),
        logprobs=logprobs,
        logit_bias=_logit_bias(body),
        allowed_token_ids=body.integers("allowed_token_ids"),
        bad_words=body.texts("bad_words"),
        structured_output=_structured_output(body),
    )


def _logit_bias(body: Fields) -> dict[int, float] | None:
    given = body.object("logit_bias")
    if given is None:
        return None
    bias = {}
    for key in given.values:
        if not (key.isascii() and key.isdigit()):
            raise BadRequest("logit_bias", "its keys must be token ids")
        bias[int(key)] = given.number(key) or 0.0
    return bias


def _structured_output(body: Fields) -> StructuredOutput | None:
    """Return the one constraint among `response_format`, `structured_outputs` and the older `guided_*` fields."""
    found = [output for output in (_response_format(body), *_guided(body)) if output is not None]
    if len(found) > 1:
        raise BadRequest("response_format", "give one constraint only")
    return found[0] if found else None


def _response_format(body: Fields) -> StructuredOutput | None:
    given = body.object("response_format")
    if given is None:
        return None
    match given.text("type"):
        case "text":
            return None
        case "json_object":
            return StructuredOutput(json_schema='{"type":"object"}')
        case "json_schema":
            schema = given.object("json_schema")
            if schema is None or not isinstance(schema.get("schema"), dict):
                raise BadRequest("response_format.json_schema.schema", "expected an object")
            return StructuredOutput(json_schema=_json(schema.get("schema")))
        case _:
            raise BadRequest("response_format.type", "must be text, json_object or json_schema")


def _guided(body: Fields) -> list[StructuredOutput]:
    outputs = _constraints(body, prefix="guided_")
    structured = body.object("structured_outputs")
    return outputs if structured is None else [*outputs, *_constraints(structured, prefix="")]


def _constraints(given: Fields, *, prefix: str) -> list[StructuredOutput]:
    found = []
    if (schema := given.get(f"{prefix}json")) is not None:
        found.append(StructuredOutput(json_schema=schema if isinstance(schema, str) else _json(schema)))
    if given.flag(f"{prefix}json_object"):
        found.append(StructuredOutput(json_schema='{"type":"object"}'))
    if (regex := given.text(f"{prefix}regex")) is not None:
        found.append(StructuredOutput(regex=regex))
    if (grammar := given.text(f"{prefix}grammar")) is not None:
        found.append(StructuredOutput(grammar=grammar))
    if choices := given.texts(f"{prefix}choice"):
        # A JSON string literal is also a literal of the grammar.
        found.append(StructuredOutput(grammar="root ::= " + " | ".join(map(_json, choices))))
    return found


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()
