"""From the wire to a checked engine request. One bad id would kill the engine, so everything is checked here."""

import math
from collections.abc import Iterable

import numpy as np

from ascendra.v1 import common_pb2, worker_pb2
from services.common.errors import InvalidArgument
from services.worker.engine.contract import EngineInfo, EngineRequest, RequestStanding

MAX_STOP_TOKENS = 128
MAX_LOGPROBS = 20
MAX_BIASED_TOKENS = 1024
MAX_ALLOWED_TOKENS = 1024
MAX_BAD_WORDS = 64
NO_OBJECTIVE_S = 3600.0
"""Stands for an objective that the router does not state."""


def engine_request(submit: worker_pb2.Submit, info: EngineInfo, request_id: str, now_s: float) -> EngineRequest:
    """Check a submission and turn its ages into times of this host's monotonic clock.

    Raises:
        InvalidArgument: names the field and the limit.
    """
    token_ids = _token_ids(submit, info)
    generated = submit.generated_tokens
    if generated >= len(token_ids):
        raise InvalidArgument(f"generated_tokens must be below the {len(token_ids)} token_ids, got {generated}")
    _check_sampling(submit.sampling, info)
    max_tokens, min_tokens = _token_limits(submit.sampling, generated, room=info.max_model_len - len(token_ids))
    _check_range("age_ms", submit.age_ms, 0, 1e9)
    _check_range("last_token_age_ms", submit.last_token_age_ms, 0, 1e9)
    return EngineRequest(
        standing=RequestStanding(
            request_id=request_id,
            name=submit.request_id,
            arrival_s=now_s - submit.age_ms / 1000,
            ttft_slo_s=_objective_s("slo.ttft_ms", submit.slo.ttft_ms),
            tbt_slo_s=_objective_s("slo.tbt_ms", submit.slo.tbt_ms),
            priority=submit.priority,
            relegated=submit.relegated,
            generated_tokens=generated,
            last_token_s=now_s - submit.last_token_age_ms / 1000 if generated else 0.0,
        ),
        token_ids=token_ids,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        sampling=submit.sampling,
        kv_handle=submit.kv_handle,
    )


def _token_ids(submit: worker_pb2.Submit, info: EngineInfo) -> list[int]:
    if not submit.token_ids or len(submit.token_ids) % 4:
        raise InvalidArgument(f"token_ids must be u32 little-endian, at least one; got {len(submit.token_ids)} bytes")
    ids = np.frombuffer(submit.token_ids, dtype="<u4")
    if ids.size >= info.max_model_len:
        raise InvalidArgument(
            f"token_ids must leave room to generate: {ids.size} tokens, the context holds {info.max_model_len}"
        )
    if (largest := int(ids.max())) >= info.vocab_size:
        raise InvalidArgument(f"token_ids must be below the vocabulary size {info.vocab_size}, got {largest}")
    return [int(token) for token in ids.tolist()]


def _token_limits(sampling: common_pb2.SamplingParameters, generated: int, room: int) -> tuple[int, int]:
    """Return max and min tokens of this attempt; `room` is what the context still holds."""
    left = room
    if sampling.HasField("max_tokens"):
        if sampling.max_tokens <= generated:
            raise InvalidArgument(
                f"sampling.max_tokens must be above generated_tokens {generated}, got {sampling.max_tokens}"
            )
        left = min(sampling.max_tokens - generated, room)
    if sampling.HasField("max_tokens") and sampling.min_tokens > sampling.max_tokens:
        raise InvalidArgument(
            f"sampling.min_tokens must be at most max_tokens {sampling.max_tokens}, got {sampling.min_tokens}"
        )
    return left, min(max(sampling.min_tokens - generated, 0), left)


def _check_sampling(sampling: common_pb2.SamplingParameters, info: EngineInfo) -> None:
    if sampling.HasField("temperature"):
        _check_range("sampling.temperature", sampling.temperature, 0, 2)
    if sampling.HasField("top_p") and not 0 < sampling.top_p <= 1:
        raise InvalidArgument(f"sampling.top_p must be in (0, 1], got {sampling.top_p}")
    if sampling.top_k < -1:
        raise InvalidArgument(f"sampling.top_k must be at least -1, got {sampling.top_k}")
    _check_range("sampling.min_p", sampling.min_p, 0, 1)
    _check_range("sampling.presence_penalty", sampling.presence_penalty, -2, 2)
    _check_range("sampling.frequency_penalty", sampling.frequency_penalty, -2, 2)
    if sampling.HasField("repetition_penalty") and not 0 < sampling.repetition_penalty <= 100:
        raise InvalidArgument(f"sampling.repetition_penalty must be in (0, 100], got {sampling.repetition_penalty}")
    if sampling.HasField("logprobs"):
        if not info.logprobs:
            raise InvalidArgument(f"sampling.logprobs is not available on the {info.engine} engine")
        _check_range("sampling.logprobs", sampling.logprobs, 0, MAX_LOGPROBS)
    _check_ids("sampling.stop_token_ids", sampling.stop_token_ids, MAX_STOP_TOKENS, info.vocab_size)
    _check_ids("sampling.allowed_token_ids", sampling.allowed_token_ids, MAX_ALLOWED_TOKENS, info.vocab_size)
    _check_ids("sampling.logit_bias", sampling.logit_bias, MAX_BIASED_TOKENS, info.vocab_size)
    for bias in sampling.logit_bias.values():
        _check_range("sampling.logit_bias", bias, -100, 100)
    if len(sampling.bad_words) > MAX_BAD_WORDS:
        raise InvalidArgument(f"sampling.bad_words holds at most {MAX_BAD_WORDS}, got {len(sampling.bad_words)}")
    for field in ("bad_words", "structured_output"):
        asked = sampling.bad_words if field == "bad_words" else sampling.structured_output.WhichOneof("constraint")
        if asked and not info.guided_decoding:
            raise InvalidArgument(f"sampling.{field} is not available on this worker (no tokenizer in the engine)")


def _check_ids(field: str, ids: Iterable[int], most: int, vocab_size: int) -> None:
    listed = list(ids)
    if len(listed) > most:
        raise InvalidArgument(f"{field} holds at most {most}, got {len(listed)}")
    if listed and max(listed) >= vocab_size:
        raise InvalidArgument(f"{field} must be below the vocabulary size {vocab_size}, got {max(listed)}")


def _check_range(field: str, value: float, least: float, most: float) -> None:
    if not (math.isfinite(value) and least <= value <= most):
        raise InvalidArgument(f"{field} must be within {least:g} and {most:g}, got {value:g}")


def _objective_s(field: str, milliseconds: float) -> float:
    _check_range(field, milliseconds, 0, NO_OBJECTIVE_S * 1000)
    return milliseconds / 1000 if milliseconds > 0 else NO_OBJECTIVE_S
