"""Requests are built and refused as documented."""

import struct

import pytest

from ascendra import InvalidArgumentError, Message, RequestOptions, SamplingParams, Slo, StructuredOutput, wire


def test_token_ids_are_little_endian() -> None:
    """Ids travel as unsigned 32-bit little-endian integers."""
    request = wire.build_request(None, {"token_ids": [1, 2**32 - 1]})
    assert request.tokens.token_ids == struct.pack("<2I", 1, 2**32 - 1)


def test_request_ids_are_made_up_and_unique() -> None:
    """Without an id each request gets one of its own."""
    first, second = wire.build_request("a", {}), wire.build_request("a", {})
    assert first.request_id
    assert first.request_id != second.request_id


def test_absent_sampling_parameters_stay_absent() -> None:
    """What the caller does not say is the server's to decide."""
    assert wire.sampling_to_wire(SamplingParams()).ByteSize() == 0
    assert wire.sampling_to_wire(SamplingParams(seed=0)).HasField("seed")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        (None, {}, "exactly one of prompt, messages and token_ids; found none"),
        ("a", {"token_ids": [1]}, "found prompt and token_ids"),
        (None, {"token_ids": [-1]}, "token_ids: each must be"),
        (None, {"messages": [{"role": "user"}]}, r"messages\[0\]: 'content' is missing"),
        ("a", {"slo": Slo(ttft_ms=-1)}, "slo.ttft_ms: must be above 0 milliseconds, got -1"),
        ("a", {"slo": Slo(tbt_ms=float("nan"))}, "slo.tbt_ms"),
        ("a", {"timeout_s": 0.0}, "timeout_s: must be above 0 seconds, got 0"),
        ("a", {"on_overload": "drop"}, "on_overload: must be one of relegate, refuse, got 'drop'"),
        ("a", {"priority": "high"}, "priority"),
        ("a", {"sampling": SamplingParams(max_tokens=-1)}, "sampling.max_tokens"),
        ("a", {"sampling": SamplingParams(stop=[1])}, "sampling.stop"),  # type: ignore[list-item]
        ("a", {"sampling": SamplingParams(stop_token_ids=[-1])}, "sampling.stop_token_ids"),
        ("a", {"sampling": SamplingParams(logit_bias={-1: 1.0})}, "sampling.logit_bias"),
        ("a", {"sampling": SamplingParams(structured_output=StructuredOutput())}, "exactly one of json_schema"),
    ],
)
def test_a_wrong_field_is_named(prompt: str | None, options: RequestOptions, message: str) -> None:
    """A request that cannot be sent fails before it is, saying which field is wrong."""
    with pytest.raises(InvalidArgumentError, match=message):
        wire.build_request(prompt, options)


def test_a_request_too_large_for_a_message_is_refused() -> None:
    """It would break the stream that it is sent on."""
    with pytest.raises(InvalidArgumentError, match="at most"):
        wire.build_request("a" * (wire.MAX_REQUEST_BYTES + 1), {})


def test_messages_may_be_mappings() -> None:
    """Messages are dataclasses or mappings with the same keys."""
    chat = wire.chat_to_wire([Message("system", "be brief"), {"role": "user", "content": "hi"}])
    assert [(message.role, message.content) for message in chat.messages] == [("system", "be brief"), ("user", "hi")]


def test_times_are_whole_milliseconds() -> None:
    """A time is rounded up, is at least one, and fits its field."""
    assert wire.milliseconds("timeout_s", 1e-300) == 1
    assert wire.milliseconds("timeout_s", 1.2341) == 1235
    assert wire.milliseconds("timeout_s", 1e308) == 2**32 - 1


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_time_that_is_none_is_refused(seconds: float) -> None:
    """By the name of its field."""
    with pytest.raises(InvalidArgumentError, match=f"interval_s: must be above 0 seconds, got {seconds:g}"):
        wire.milliseconds("interval_s", seconds)


def test_an_empty_objective_is_that_of_the_class() -> None:
    """Nothing is sent for an objective without values."""
    assert not wire.build_request("a", {"slo": Slo()}).HasField("slo")
    assert wire.build_request("a", {"slo": Slo(tbt_ms=5)}).HasField("slo")
