"""/v1/models, /tokenize and /detokenize."""

from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ascendra.v1 import inference_pb2
from services.gateway.callers import caller_of
from services.gateway.fields import Fields, parse_object
from services.gateway.gateway import Gateway
from services.gateway.http_body import read_body
from services.gateway.problems import ApiError, BadRequest
from services.gateway.requests import continues_final, parse_messages


def model_routes(gateway: Gateway) -> list[Route]:
    """Return the routes."""

    async def list_models(request: Request) -> Response:
        caller_of(gateway.access, request.headers)
        return as_json({"object": "list", "data": [_card(model) for model in await gateway.view.models()]})

    async def get_model(request: Request) -> Response:
        caller_of(gateway.access, request.headers)
        return as_json(_card(await _find(gateway, request.path_params["name"])))

    async def tokenize(request: Request) -> Response:
        body = await _body(gateway, request)
        name, text, messages = body.text("model") or "", body.text("prompt"), None
        if body.get("messages") is not None:
            messages = parse_messages(body.get("messages"))
        elif text is None:
            raise BadRequest("prompt", "give prompt or messages")
        with_texts = body.flag("return_token_strs")
        ids = await gateway.routers.any.tokenize(
            text,
            messages=messages,
            model=name,
            skip_special_tokens=not body.flag("add_special_tokens", True),
            continue_final_message=continues_final(body),
        )
        answer: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": (await _find(gateway, name)).max_model_len,
            "tokens": ids,
            "token_strs": None,
        }
        if with_texts:
            tokens = await gateway.token_bytes.lookup(name, ids)
            answer["token_strs"] = [tokens[token_id].decode("utf-8", "replace") for token_id in ids]
        return as_json(answer)

    async def detokenize(request: Request) -> Response:
        body = await _body(gateway, request)
        ids = body.integers("tokens")
        if any(not 0 <= token_id < 1 << 32 for token_id in ids):
            raise BadRequest("tokens", "each must be an integer from 0 to 4294967295")
        text = await gateway.routers.any.detokenize(ids, model=body.text("model") or "")
        return as_json({"prompt": text})

    return [
        Route("/v1/models", list_models),
        Route("/v1/models/{name:path}", get_model),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
    ]


def as_json(value: Any) -> Response:
    """Return a JSON answer."""
    return Response(orjson.dumps(value), media_type="application/json")


async def _body(gateway: Gateway, request: Request) -> Fields:
    caller_of(gateway.access, request.headers)
    return parse_object(
        await read_body(request.receive, request.headers, gateway.config.max_body_bytes, gateway.config.body_timeout_s)
    )


async def _find(gateway: Gateway, name: str) -> inference_pb2.Model:
    models = await gateway.view.models()
    found = [model for model in models if model.name == name] if name else models
    if not found:
        raise ApiError(
            404, f"the model {name!r} does not exist", kind="not_found_error", code="model_not_found", param="model"
        )
    return found[0]


def _card(model: inference_pb2.Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": "ascendra",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
    }
