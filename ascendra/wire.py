"""Between the SDK's dataclasses and the protobuf messages."""

import itertools
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from ascendra import types
from ascendra.errors import InvalidArgumentError
from ascendra.v1 import common_pb2, inference_pb2

MAX_MS = 2**32 - 1
"""Longest time that a request can carry, in milliseconds."""
MAX_REQUEST_BYTES = 15 << 20
"""Below the 16 MiB of a message, with room to resume. In a session a larger one would break the stream of all."""

_ROLES = {
    common_pb2.ROLE_LOW_PRIORITY: types.Role.LOW,
    common_pb2.ROLE_HIGH_PRIORITY: types.Role.HIGH,
    common_pb2.ROLE_UNIFIED: types.Role.UNIFIED,
}
_FINISH_REASONS = {
    common_pb2.FINISH_REASON_STOP: types.FinishReason.STOP,
    common_pb2.FINISH_REASON_LENGTH: types.FinishReason.LENGTH,
    common_pb2.FINISH_REASON_CANCELLED: types.FinishReason.CANCELLED,
}
_MOVE_CONTRACTS = {
    common_pb2.MOVE_CONTRACT_EXACT: types.MoveContract.EXACT,
    common_pb2.MOVE_CONTRACT_CONTINUOUS: types.MoveContract.CONTINUOUS,
    common_pb2.MOVE_CONTRACT_PINNED: types.MoveContract.PINNED,
}
_OVERLOAD_ACTIONS = {
    "relegate": inference_pb2.OVERLOAD_ACTION_RELEGATE,
    "refuse": inference_pb2.OVERLOAD_ACTION_REFUSE,
}
# Ids are unique across processes and start-ups, and cheap to make.
_ID_PREFIX = os.urandom(6).hex()
_id_numbers = itertools.count(1)


def build_request(prompt: str | None, options: types.RequestOptions) -> inference_pb2.GenerateRequest:
    """Return the request of one call of `generate` or `stream`. Raises InvalidArgumentError naming the field."""
    request_id = options.get("request_id") or f"{_ID_PREFIX}-{next(_id_numbers)}"
    request = inference_pb2.GenerateRequest(request_id=request_id)
    try:
        _set_prompt(request, prompt, options)
        for name in ("model", "slo_class", "priority", "tenant", "session_id", "tokens_only", "traceparent"):
            if name in options:
                _set(request, name, options[name])
        request.sinks.extend(options.get("sinks", ()))
        if "sampling" in options:
            request.sampling.CopyFrom(sampling_to_wire(options["sampling"]))
        if options.get("slo", types.Slo()) != types.Slo():  # an empty one is that of the class
            request.slo.CopyFrom(slo_to_wire(options["slo"]))
        if "timeout_s" in options:
            milliseconds("timeout_s", options["timeout_s"])
        if "on_overload" in options:
            request.on_overload = _overload_action(options["on_overload"])
        if request.ByteSize() > MAX_REQUEST_BYTES:
            raise InvalidArgumentError(
                f"the request has {request.ByteSize()} bytes; at most {MAX_REQUEST_BYTES} can be sent"
            )
    except InvalidArgumentError as error:
        error.request_id = request_id
        raise
    return request


def _set_prompt(request: inference_pb2.GenerateRequest, prompt: str | None, options: types.RequestOptions) -> None:
    given = [name for name in ("messages", "token_ids") if name in options] + (["prompt"] if prompt is not None else [])
    if len(given) != 1:
        found = " and ".join(sorted(given)) or "none"
        raise InvalidArgumentError(f"give exactly one of prompt, messages and token_ids; found {found}")
    if prompt is not None:
        _set(request, "text", prompt)
    elif "messages" in options:
        request.chat.CopyFrom(chat_to_wire(options["messages"], options.get("continue_final_message", False)))
    else:
        request.tokens.token_ids = encode_token_ids(options["token_ids"])


def chat_to_wire(
    messages: Sequence[types.Message | Mapping[str, str]], continue_final_message: bool = False
) -> inference_pb2.ChatPrompt:
    """Return a conversation as protobuf."""
    chat = inference_pb2.ChatPrompt(continue_final_message=continue_final_message)
    for index, message in enumerate(messages):
        if isinstance(message, Mapping):
            try:
                message = types.Message(message["role"], message["content"])
            except KeyError as error:
                raise InvalidArgumentError(f"messages[{index}]: {error} is missing") from error
        added = chat.messages.add()
        _set(added, "role", message.role)
        _set(added, "content", message.content)
    return chat


def encode_token_ids(token_ids: Sequence[int]) -> bytes:
    """Return token ids as unsigned 32-bit little-endian integers."""
    try:
        return struct.pack(f"<{len(token_ids)}I", *token_ids)
    except struct.error as error:
        raise InvalidArgumentError("token_ids: each must be an integer from 0 to 4294967295") from error


def sampling_to_wire(sampling: types.SamplingParams) -> common_pb2.SamplingParameters:
    """Return sampling parameters as protobuf. Raises InvalidArgumentError naming the field."""
    wire = common_pb2.SamplingParameters()
    for field in fields(sampling):
        value = getattr(sampling, field.name)
        if value is None:
            continue
        match field.name:
            case "stop":
                wire.stop.extend(_stop_strings(value))
            case "stop_token_ids" | "allowed_token_ids" | "bad_words":
                _fill(getattr(wire, field.name).extend, field.name, value)
            case "logit_bias":
                _fill(wire.logit_bias.update, field.name, value)
            case "structured_output":
                wire.structured_output.CopyFrom(_structured_output(value))
            case _:
                _set(wire, field.name, value, prefix="sampling.")
    return wire


def slo_to_wire(slo: types.Slo) -> common_pb2.Slo:
    """Return an objective as protobuf. Raises InvalidArgumentError naming the field."""
    wire = common_pb2.Slo()
    for name, value in (("ttft_ms", slo.ttft_ms), ("tbt_ms", slo.tbt_ms)):
        if value is None:
            continue
        if not (math.isfinite(value) and value > 0):
            raise InvalidArgumentError(f"slo.{name}: must be above 0 milliseconds, got {value}")
        _set(wire, name, value, prefix="slo.")
    return wire


def milliseconds(name: str, seconds: float) -> int:
    """Return a time as the whole milliseconds that a request carries. Raises InvalidArgumentError naming the field."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise InvalidArgumentError(f"{name}: must be above 0 seconds, got {seconds:g}")
    return math.ceil(min(seconds * 1000, MAX_MS))


def role_to_wire(role: types.Role | str) -> common_pb2.Role:
    """Return a role as protobuf."""
    for wire, known in _ROLES.items():
        if known == role:
            return wire
    raise InvalidArgumentError(f"role: must be one of {', '.join(types.Role)}, got {role!r}")


def role_from_wire(role: common_pb2.Role) -> types.Role | None:
    """Return a role, None when not said."""
    return _ROLES.get(role)


def chunk_from_wire(response: inference_pb2.GenerateResponse) -> types.Chunk:
    """Return one response as a chunk."""
    finished = finished_from_wire(response.finished) if response.HasField("finished") else None
    logprobs = [_position(position) for position in response.logprobs] if response.logprobs else ()
    return types.Chunk(response.token_offset, list(response.token_ids), response.text, logprobs, finished)


def finished_from_wire(finished: inference_pb2.Finished) -> types.Finished:
    """Return the end of a completion."""
    usage = finished.usage
    return types.Finished(
        reason=finish_reason_from_wire(finished.reason),
        stop_string=finished.stop_string,
        stop_token_id=finished.stop_token_id if finished.HasField("stop_token_id") else None,
        usage=types.Usage(usage.prompt_tokens, usage.cached_prompt_tokens, usage.completion_tokens),
        receipt=receipt_from_wire(finished.receipt),
    )


def finish_reason_from_wire(reason: common_pb2.FinishReason) -> types.FinishReason:
    """Return why a completion ended; what is not known is an error."""
    return _FINISH_REASONS.get(reason, types.FinishReason.ERROR)


def receipt_from_wire(receipt: inference_pb2.SloReceipt) -> types.Receipt:
    """Return what was promised and achieved."""
    return types.Receipt(
        target=types.Slo(ttft_ms=receipt.target.ttft_ms or None, tbt_ms=receipt.target.tbt_ms or None),
        ttft_ms=receipt.ttft_ms,
        max_gap_ms=receipt.max_gap_ms,
        p99_gap_ms=receipt.p99_gap_ms,
        mean_gap_ms=receipt.mean_gap_ms,
        ttft_met=receipt.ttft_met,
        tbt_met=receipt.tbt_met,
        pool=role_from_wire(receipt.pool),
        attempts=tuple(
            types.Attempt(a.number, a.worker_id, role_from_wire(a.role), a.reason, a.first_token_offset, a.moved_by)
            for a in receipt.attempts
        ),
        relegated=receipt.relegated,
        seed=receipt.seed,
        move_contract=_MOVE_CONTRACTS.get(receipt.move_contract),
    )


def _position(position: common_pb2.PositionLogprobs) -> types.PositionLogprobs:
    return types.PositionLogprobs(_logprob(position.sampled), tuple(_logprob(token) for token in position.top))


def _logprob(token: common_pb2.TokenLogprob) -> types.TokenLogprob:
    return types.TokenLogprob(token.token_id, token.logprob, token.rank)


def _overload_action(action: str) -> inference_pb2.OverloadAction:
    if action not in _OVERLOAD_ACTIONS:
        raise InvalidArgumentError(f"on_overload: must be one of {', '.join(_OVERLOAD_ACTIONS)}, got {action!r}")
    return _OVERLOAD_ACTIONS[action]


def _structured_output(output: types.StructuredOutput) -> common_pb2.StructuredOutput:
    given = {f.name: v for f in fields(output) if (v := getattr(output, f.name)) is not None}
    if len(given) != 1:
        raise InvalidArgumentError("sampling.structured_output: give exactly one of json_schema, regex and grammar")
    return common_pb2.StructuredOutput(**given)


def _set(message: Any, name: str, value: Any, *, prefix: str = "") -> None:
    """Set a field, so that a value of the wrong type or range is an error that names the field."""
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"{prefix}{name}: {error}") from error


def _fill(add: Callable[[Any], object], name: str, values: Any) -> None:
    """Fill a repeated field or a map, with the same promise."""
    try:
        add(values)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"sampling.{name}: {error}") from error


def _stop_strings(stop: Sequence[str]) -> list[bytes]:
    strings = [stop] if isinstance(stop, str) else stop
    for text in strings:
        if not isinstance(text, str):
            raise InvalidArgumentError(f"sampling.stop: each must be a string, got {text!r}")
    return [text.encode() for text in strings]
