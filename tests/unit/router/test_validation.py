"""The table of bad input: each refusal names its field and limit."""

import math
from typing import Any

import grpc
import pytest

from ascendra.v1 import common_pb2, inference_pb2
from services.common.errors import InvalidArgument, NotFound, ResourceExhausted, ServiceError
from services.router.config import RouterConfig, SloClass, Tenant, default_slo_classes
from services.router.validation import Limits, check_ids, check_request, objective, token_limits

LIMITS = Limits(model_name="tiny", max_model_len=100, vocab_size=512, max_text_bytes=1000, default_max_tokens=64)


def request(**fields: Any) -> inference_pb2.GenerateRequest:
    """Return a request that is fine but for the given fields."""
    sampling = fields.pop("sampling", {})
    base: dict[str, Any] = {} if {"chat", "tokens"} & set(fields) else {"text": "hi"}
    return inference_pb2.GenerateRequest(**(base | fields), sampling=common_pb2.SamplingParameters(**sampling))


SAMPLING = [
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", 1e300),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", math.nan),
    ("top_k", -2),
    ("min_p", -1.0),
    ("min_p", math.inf),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", math.inf),
    ("max_tokens", 0),
    ("logprobs", 21),
    ("stop", [b"x"] * 17),
    ("stop", [b""]),
    ("stop", [b"x" * 257]),
    ("stop", [b"\xff\xfe"]),
    ("stop_token_ids", [1] * 129),
    ("stop_token_ids", [512]),
    ("logit_bias", {1: 100.5}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", {512: 1.0}),
    ("logit_bias", dict.fromkeys(range(1025), 0.0)),
    ("allowed_token_ids", [1] * 1025),
    ("bad_words", ["x"] * 65),
    ("bad_words", [""]),
    ("structured_output", common_pb2.StructuredOutput()),
    ("structured_output", common_pb2.StructuredOutput(regex="")),
]


@pytest.mark.parametrize(("field", "value"), SAMPLING)
def test_sampling_out_of_range_is_refused(field: str, value: Any) -> None:
    """Every sampling parameter has its range."""
    with pytest.raises(InvalidArgument, match=rf"sampling\.{field}"):
        check_request(request(sampling={field: value}), LIMITS)


CHAT = inference_pb2.ChatPrompt
MESSAGE = inference_pb2.ChatMessage
REQUESTS: list[tuple[dict[str, Any], type[ServiceError], str]] = [
    ({"text": ""}, InvalidArgument, "text must not be empty"),
    ({"text": "x" * 1001}, ResourceExhausted, "at most 1000 bytes"),
    ({"text": "é" * 501}, ResourceExhausted, "at most 1000 bytes, got 1002"),
    ({"chat": CHAT()}, InvalidArgument, "at least one message"),
    ({"chat": CHAT(messages=[MESSAGE(content="x")])}, InvalidArgument, r"messages\[0\]\.role"),
    ({"chat": CHAT(messages=[MESSAGE(role="user", content="x" * 2000)])}, ResourceExhausted, "chat must be at most"),
    ({"tokens": inference_pb2.TokenPrompt()}, InvalidArgument, "tokens.token_ids"),
    ({"tokens": inference_pb2.TokenPrompt(token_ids=b"123")}, InvalidArgument, "got 3 bytes"),
    ({"model": "other"}, NotFound, "'other' is not served"),
    ({"request_id": "no spaces"}, InvalidArgument, "request_id"),
    ({"request_id": "x" * 129}, InvalidArgument, "request_id"),
    ({"priority": 101}, InvalidArgument, "within -100 and 100"),
    ({"tenant": "x" * 129}, InvalidArgument, "tenant must be at most 128"),
    ({"session_id": "x" * 129}, InvalidArgument, "session_id must be at most 128"),
    ({"sinks": ["nowhere"]}, NotFound, "sinks: 'nowhere'"),
    ({"tokens_only": True, "sampling": {"stop": [b"x"]}}, InvalidArgument, "tokens_only"),
]


@pytest.mark.parametrize(("fields", "kind", "message"), REQUESTS)
def test_bad_requests_are_refused(fields: dict[str, Any], kind: type[ServiceError], message: str) -> None:
    """Every other field has its limit too."""
    with pytest.raises(kind, match=message):
        check_request(request(**fields), LIMITS)


def test_no_prompt_is_refused() -> None:
    """One of the prompts must be there."""
    with pytest.raises(InvalidArgument, match="one of text, chat and tokens"):
        check_request(inference_pb2.GenerateRequest(), LIMITS)


def test_good_requests_pass() -> None:
    """The edges of the ranges are inside."""
    sampling = {"temperature": 2.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "logprobs": 20, "stop": [b"x" * 256]}
    check_request(request(model="tiny", priority=-100, request_id="a.B:c-1", sampling=sampling), LIMITS)


@pytest.mark.parametrize("slo", [(-1, 0), (0, -5), (math.nan, 1), (1, math.inf), (0, 0)])
def test_objectives_must_be_times(slo: tuple[float, float]) -> None:
    """Zero for both, negative, infinite and NaN objectives are refused."""
    with pytest.raises(InvalidArgument, match="slo"):
        objective(request(slo=common_pb2.Slo(ttft_ms=slo[0], tbt_ms=slo[1])), default_slo_classes(), {})


def test_objectives_default_to_the_class_and_are_clamped() -> None:
    """Absent fields take the class's; wild ones are brought within its limits."""
    classes = {"default": SloClass(ttft_ms=1000, tbt_ms=50, min_ttft_ms=100, max_tbt_ms=500)}
    assert objective(request(), classes, {})[2].ttft_s == 1.0
    name, _, slo = objective(request(slo=common_pb2.Slo(ttft_ms=1, tbt_ms=1e9)), classes, {})
    assert (name, slo.ttft_s, slo.tbt_s) == ("default", 0.1, 0.5)
    with pytest.raises(InvalidArgument, match="slo_class must be one of default"):
        objective(request(slo_class="gold"), classes, {})


def test_classes_must_be_consistent() -> None:
    """A class's objective lies within its own limits."""
    with pytest.raises(ValueError, match="ttft-ms"):
        SloClass(ttft_ms=10, min_ttft_ms=20)


def test_a_tenant_is_bound_within_its_class() -> None:
    """Its classes are the only ones it may name, the first its default; its floor is above what the class allows."""
    tenants = {"small": Tenant(slo_classes=("batch",), min_ttft_ms=20_000, min_tbt_ms=300)}
    name, _, slo = objective(request(tenant="small"), default_slo_classes(), tenants)
    assert (name, slo.ttft_s, slo.tbt_s) == ("batch", 20.0, 0.3)
    generous = request(tenant="small", slo=common_pb2.Slo(ttft_ms=60_000, tbt_ms=400))
    assert objective(generous, default_slo_classes(), tenants)[2].ttft_s == 60.0
    with pytest.raises(InvalidArgument, match="one of batch for tenant 'small'; got 'interactive'") as caught:
        objective(request(tenant="small", slo_class="interactive"), default_slo_classes(), tenants)
    assert caught.value.reason == "CLASS_NOT_ALLOWED"
    assert objective(request(tenant="other"), default_slo_classes(), tenants)[2].ttft_s == 2.0


def test_tenants_name_classes_that_exist() -> None:
    """A class that nobody configured is refused at the start, and so is a floor that is no time."""
    with pytest.raises(ValueError, match="no class 'gold'"):
        RouterConfig(tenants={"small": Tenant(slo_classes=("gold",))})
    with pytest.raises(ValueError, match="min-tbt-ms"):
        Tenant(min_tbt_ms=math.nan)


def test_the_prompt_must_leave_room() -> None:
    """A prompt of the context's length is refused; max_tokens is bounded by what is left."""
    sampling = common_pb2.SamplingParameters(max_tokens=1 << 31)
    assert token_limits(sampling, 40, LIMITS) == 60
    assert token_limits(common_pb2.SamplingParameters(), 10, LIMITS) == 64
    with pytest.raises(InvalidArgument, match="the context holds 100"):
        token_limits(sampling, 100, LIMITS)
    with pytest.raises(InvalidArgument, match="at least one token"):
        token_limits(sampling, 0, LIMITS)
    with pytest.raises(InvalidArgument, match="min_tokens"):
        token_limits(common_pb2.SamplingParameters(max_tokens=5, min_tokens=6), 10, LIMITS)


def test_ids_stay_within_the_vocabulary() -> None:
    """One id too large would be fatal to an engine."""
    check_ids("tokens.token_ids", (511).to_bytes(4, "little"), LIMITS)
    with pytest.raises(InvalidArgument, match="below the vocabulary size 512, got 512"):
        check_ids("tokens.token_ids", (512).to_bytes(4, "little"), LIMITS)


def test_statuses_are_those_of_the_api() -> None:
    """Refusals carry the codes that clients act on."""
    assert InvalidArgument("x").code is grpc.StatusCode.INVALID_ARGUMENT
    assert ResourceExhausted("x").code is grpc.StatusCode.RESOURCE_EXHAUSTED
