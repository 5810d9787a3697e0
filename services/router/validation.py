"""Checks of what a client asks; every refusal names the field and the limit."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ascendra.v1 import common_pb2, inference_pb2
from services.common.errors import InvalidArgument, NotFound, ResourceExhausted
from services.policy.state import Slo
from services.router.config import SloClass, Tenant

MAX_STOPS, MAX_STOP_BYTES = 16, 256
MAX_STOP_TOKENS = 128
MAX_LOGPROBS = 20
MAX_BIASED_TOKENS = 1024
MAX_ALLOWED_TOKENS = 1024
MAX_BAD_WORDS, MAX_BAD_WORD_BYTES = 64, 256
MAX_GRAMMAR_BYTES = 64 << 10
MAX_MESSAGES = 4096
MAX_NAME_CHARS = 128
MAX_SINKS = 16
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the served model and the configuration allow."""

    model_name: str
    max_model_len: int
    """Context length in tokens; 0: not known yet."""
    vocab_size: int
    """0: not known yet."""
    max_text_bytes: int
    default_max_tokens: int
    sinks: frozenset[str] = frozenset()
    """Names of configured sinks."""


def check_model(name: str, served: str) -> None:
    """Raise NotFound for another model; empty means the only one."""
    if name and name != served:
        raise NotFound(
            f"model: {name[:MAX_NAME_CHARS]!r} is not served here; served: {served!r}", reason="UNKNOWN_MODEL"
        )


def check_request(request: inference_pb2.GenerateRequest, limits: Limits) -> None:
    """Check everything that needs no tokens of the prompt.

    Raises:
        InvalidArgument, NotFound, ResourceExhausted: name the field and the limit.
    """
    if request.request_id and not _REQUEST_ID.fullmatch(request.request_id):
        raise InvalidArgument("request_id must be 1 to 128 characters of [A-Za-z0-9._:-]")
    check_model(request.model, limits.model_name)
    for name in ("tenant", "session_id", "traceparent"):
        if len(getattr(request, name)) > MAX_NAME_CHARS:
            raise InvalidArgument(f"{name} must be at most {MAX_NAME_CHARS} characters")
    if not -100 <= request.priority <= 100:
        raise InvalidArgument(f"priority must be within -100 and 100, got {request.priority}")
    if request.on_overload not in inference_pb2.OverloadAction.values():
        raise InvalidArgument(f"on_overload must be a value of OverloadAction, got {request.on_overload}")
    if len(request.sinks) > MAX_SINKS:
        raise InvalidArgument(f"sinks must hold at most {MAX_SINKS} names, got {len(request.sinks)}")
    for name in request.sinks:
        if name not in limits.sinks:
            raise NotFound(f"sinks: {name[:MAX_NAME_CHARS]!r} is not configured", reason="UNKNOWN_SINK")
    _check_prompt(request, limits)
    check_sampling(request.sampling, limits.vocab_size)
    if request.tokens_only and request.sampling.stop:
        raise InvalidArgument("sampling.stop: stop strings need text; leave tokens_only unset")


def _check_prompt(request: inference_pb2.GenerateRequest, limits: Limits) -> None:
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidArgument("prompt: one of text, chat and tokens must be set")
    if kind == "tokens":
        ids = request.tokens.token_ids
        if not ids or len(ids) % 4:
            raise InvalidArgument(f"tokens.token_ids must be u32 little-endian, at least one; got {len(ids)} bytes")
        return
    if kind == "text":
        check_text("text", request.text, limits.max_text_bytes)
    else:
        check_chat(request.chat, limits.max_text_bytes)


def check_text(field: str, text: str, max_bytes: int) -> None:
    """Raise for an empty text or one of more than max_bytes."""
    if not text:
        raise InvalidArgument(f"{field} must not be empty")
    _check_size(field, len(text.encode()), max_bytes)


def check_chat(chat: inference_pb2.ChatPrompt, max_bytes: int) -> None:
    """Raise for a conversation that is empty, has nameless roles, too many messages or too much text."""
    if not chat.messages:
        raise InvalidArgument("chat.messages must hold at least one message")
    if len(chat.messages) > MAX_MESSAGES:
        raise InvalidArgument(f"chat.messages must hold at most {MAX_MESSAGES}, got {len(chat.messages)}")
    for index, message in enumerate(chat.messages):
        if not 0 < len(message.role) <= MAX_NAME_CHARS:
            raise InvalidArgument(f"chat.messages[{index}].role must be 1 to {MAX_NAME_CHARS} characters")
    _check_size("chat", chat.ByteSize(), max_bytes)


def _check_size(field: str, size: int, limit: int) -> None:
    if size > limit:
        raise ResourceExhausted(f"{field} must be at most {limit} bytes, got {size}", reason="TEXT_TOO_LONG")


def check_sampling(sampling: common_pb2.SamplingParameters, vocab_size: int) -> None:
    """Raise InvalidArgument for a parameter out of its range.

    Args:
        vocab_size: ids must be below it; 0: not known.
    """
    given = sampling.HasField
    if given("temperature"):
        _check_range("temperature", sampling.temperature, 0, 2)
    if given("top_p"):
        _check_range("top_p", sampling.top_p, 0, 1, above=True)
    if given("top_k") and sampling.top_k < -1:
        raise InvalidArgument(f"sampling.top_k must be at least -1, got {sampling.top_k}")
    if given("min_p"):
        _check_range("min_p", sampling.min_p, 0, 1)
    for name in ("presence_penalty", "frequency_penalty"):
        if given(name):
            _check_range(name, getattr(sampling, name), -2, 2)
    if given("repetition_penalty"):
        _check_range("repetition_penalty", sampling.repetition_penalty, 0, 100, above=True)
    if given("max_tokens") and sampling.max_tokens < 1:
        raise InvalidArgument("sampling.max_tokens must be at least 1, got 0")
    if given("logprobs") and sampling.logprobs > MAX_LOGPROBS:
        raise InvalidArgument(f"sampling.logprobs must be at most {MAX_LOGPROBS}, got {sampling.logprobs}")
    stop_strings(sampling)
    _check_ids("stop_token_ids", sampling.stop_token_ids, MAX_STOP_TOKENS, vocab_size)
    _check_ids("logit_bias", list(sampling.logit_bias), MAX_BIASED_TOKENS, vocab_size)
    for token_id, bias in sampling.logit_bias.items():
        _check_range(f"logit_bias[{token_id}]", bias, -100, 100)
    _check_ids("allowed_token_ids", sampling.allowed_token_ids, MAX_ALLOWED_TOKENS, vocab_size)
    _check_bad_words(sampling.bad_words)
    if given("structured_output"):
        kind = sampling.structured_output.WhichOneof("constraint")
        text = getattr(sampling.structured_output, kind) if kind else ""
        if not text:
            raise InvalidArgument("sampling.structured_output must hold one constraint that is not empty")
        _check_size(f"sampling.structured_output.{kind}", len(text.encode()), MAX_GRAMMAR_BYTES)


def _check_range(name: str, value: float, low: float, high: float, *, above: bool = False) -> None:
    # Written so that NaN fails.
    if not (low < value if above else low <= value) or not value <= high:
        bounds = f"above {low} and at most {high}" if above else f"within {low} and {high}"
        raise InvalidArgument(f"sampling.{name} must be {bounds}, got {value}")


def _check_ids(name: str, ids: Sequence[int], most: int, vocab_size: int) -> None:
    if len(ids) > most:
        raise InvalidArgument(f"sampling.{name} must hold at most {most}, got {len(ids)}")
    if ids and vocab_size and max(ids) >= vocab_size:
        raise InvalidArgument(f"sampling.{name} must be below the vocabulary size {vocab_size}, got {max(ids)}")


def _check_bad_words(words: Sequence[str]) -> None:
    if len(words) > MAX_BAD_WORDS:
        raise InvalidArgument(f"sampling.bad_words must hold at most {MAX_BAD_WORDS}, got {len(words)}")
    for index, word in enumerate(words):
        if not 0 < len(word.encode()) <= MAX_BAD_WORD_BYTES:
            raise InvalidArgument(f"sampling.bad_words[{index}] must be 1 to {MAX_BAD_WORD_BYTES} bytes")


def stop_strings(sampling: common_pb2.SamplingParameters) -> list[str]:
    """Return the stop strings as text. Raises InvalidArgument."""
    if len(sampling.stop) > MAX_STOPS:
        raise InvalidArgument(f"sampling.stop must hold at most {MAX_STOPS} strings, got {len(sampling.stop)}")
    stops = []
    for index, raw in enumerate(sampling.stop):
        if not 0 < len(raw) <= MAX_STOP_BYTES:
            raise InvalidArgument(f"sampling.stop[{index}] must be 1 to {MAX_STOP_BYTES} bytes, got {len(raw)}")
        try:
            stops.append(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"sampling.stop[{index}] is not valid UTF-8: {error.reason}") from error
    return stops


def objective(
    request: inference_pb2.GenerateRequest, classes: Mapping[str, SloClass], tenants: Mapping[str, Tenant]
) -> tuple[str, SloClass, Slo]:
    """Return the class's name, the class, and the objective after defaults and clamping.

    Raises:
        InvalidArgument: the class is unknown or not for this tenant, or an objective is not a finite time above 0.
    """
    tenant = tenants.get(request.tenant, Tenant())
    allowed = tenant.slo_classes or tuple(classes)
    name = request.slo_class or ("default" if "default" in allowed else allowed[0])
    if name not in allowed:
        known, given = ", ".join(allowed), name[:MAX_NAME_CHARS]
        whose = f" for tenant {request.tenant!r}" if name in classes else ""
        reason = "CLASS_NOT_ALLOWED" if name in classes else "UNKNOWN_CLASS"
        raise InvalidArgument(f"slo_class must be one of {known}{whose}; got {given!r}", reason=reason)
    slo_class = classes[name]
    asked = request.slo
    if request.HasField("slo") and asked.ttft_ms == 0 and asked.tbt_ms == 0:
        raise InvalidArgument("slo: ttft_ms or tbt_ms must be above 0; leave slo unset for the class's objective")
    for field in ("ttft_ms", "tbt_ms"):
        value = getattr(asked, field)
        if not (math.isfinite(value) and value >= 0):
            raise InvalidArgument(f"slo.{field} must be a finite time above 0, got {value}")
    ttft_ms = min(max(asked.ttft_ms or slo_class.ttft_ms, slo_class.min_ttft_ms), slo_class.max_ttft_ms)
    tbt_ms = min(max(asked.tbt_ms or slo_class.tbt_ms, slo_class.min_tbt_ms), slo_class.max_tbt_ms)
    ttft_ms, tbt_ms = max(ttft_ms, tenant.min_ttft_ms), max(tbt_ms, tenant.min_tbt_ms)
    return name, slo_class, Slo(ttft_s=ttft_ms / 1000, tbt_s=tbt_ms / 1000)


def check_ids(field: str, token_ids: bytes, limits: Limits) -> None:
    """Raise InvalidArgument for ids outside the vocabulary: one of them would be fatal to an engine."""
    if token_ids and limits.vocab_size:
        largest = int(np.frombuffer(token_ids, dtype="<u4").max())
        if largest >= limits.vocab_size:
            raise InvalidArgument(f"{field} must be below the vocabulary size {limits.vocab_size}, got {largest}")


def token_limits(sampling: common_pb2.SamplingParameters, prompt_tokens: int, limits: Limits) -> int:
    """Return the most tokens to generate: what was asked, bounded by what the context still holds.

    Raises:
        InvalidArgument: the prompt is empty or fills the context, or min_tokens is above max_tokens.
    """
    if prompt_tokens < 1:
        raise InvalidArgument("prompt must hold at least one token")
    asked = sampling.max_tokens if sampling.HasField("max_tokens") else limits.default_max_tokens
    if limits.max_model_len:
        room = limits.max_model_len - prompt_tokens
        if room < 1:
            raise InvalidArgument(
                f"prompt must leave room to generate: {prompt_tokens} tokens, the context holds {limits.max_model_len}",
                reason="CONTEXT_LENGTH",
            )
        asked = min(asked, room)
    if sampling.min_tokens > asked:
        raise InvalidArgument(f"sampling.min_tokens must be at most max_tokens ({asked}), got {sampling.min_tokens}")
    return asked
