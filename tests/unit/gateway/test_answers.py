"""From chunks to JSON."""

import json
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ascendra import Chunk, Finished, FinishReason, MoveContract, Receipt, Role, SamplingParams, Slo, Usage
from services.gateway.answers import Answer, Choice
from services.gateway.requests import GenerationRequest, Prompt

RECEIPT = Receipt(
    target=Slo(ttft_ms=500, tbt_ms=None),
    ttft_ms=12,
    max_gap_ms=3,
    p99_gap_ms=2,
    mean_gap_ms=1,
    ttft_met=True,
    tbt_met=True,
    pool=Role.HIGH,
    attempts=(),
    relegated=False,
    seed=2**64 - 1,
    move_contract=MoveContract.EXACT,
)


def answer(kind: Literal["chat", "text"], *, model: str = "m", **options: Any) -> Answer:
    """Return an answer with one choice."""
    values: dict[str, Any] = {"sampling": SamplingParams(), **options}
    request = GenerationRequest(kind=kind, model=model, prompts=[Prompt(text="x")], n=1, **values)
    return Answer(request, [Choice("r")], name="id-1", model=model, created=5)


def end(reason: FinishReason = FinishReason.STOP, **values: Any) -> Chunk:
    """Return a last chunk."""
    finished = Finished(reason, values.get("stop", ""), values.get("stop_id"), Usage(3, 1, 2), RECEIPT)
    return Chunk(2, [], "", finished=finished, prompt_tokens=3)


def data(event: bytes) -> Any:
    """Return the JSON of one event."""
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    return json.loads(event[6:])


@pytest.mark.parametrize("continuous_usage", [False, True])
@pytest.mark.parametrize("kind", ["chat", "text"])
@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(text=st.text(), model=st.text())
def test_the_quick_form_equals_the_general_one(
    kind: Literal["chat", "text"], continuous_usage: bool, text: str, model: str
) -> None:
    """An event put together from constants is the one that the general code would make, but for the role."""
    made = answer(kind, model=model, continuous_usage=continuous_usage)
    general, quick = (data(made.event(0, Chunk(i, [i], text, prompt_tokens=3), None)) for i in range(2))
    if kind == "chat":
        assert general["choices"][0]["delta"].pop("role") == "assistant"
    if continuous_usage:
        assert general.pop("usage")["completion_tokens"] == 1
        assert quick.pop("usage") == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert quick == general
    assert quick["model"] == model


def test_stop_reasons() -> None:
    """The stop string or token id that ended a completion is named, as vLLM does."""
    for chunk, reason, stop_reason in (
        (end(), "stop", None),
        (end(stop="END"), "stop", "END"),
        (end(stop_id=0), "stop", 0),
        (end(stop_id=1), "stop", None),  # end-of-sequence
        (end(FinishReason.LENGTH), "length", None),
        (end(FinishReason.CANCELLED), "abort", None),
    ):
        choice = data(answer("text", sampling=SamplingParams(stop_token_ids=[0])).event(0, chunk, None))["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == (reason, stop_reason)


def test_receipt() -> None:
    """The end carries the receipt, with every digit of the seed."""
    receipt = data(answer("text").event(0, end(), None))["ascendra"]
    assert receipt["seed"] == 2**64 - 1
    assert receipt["target"] == {"ttft_ms": 500, "tbt_ms": None}
    assert (receipt["met"], receipt["pool"], receipt["move_contract"]) == (True, "high", "exact")


def test_whole_answer() -> None:
    """Kept chunks become one message, with the router's own counts."""
    made = answer("chat")
    made.keep(0, Chunk(0, [1], "a", prompt_tokens=3), {"content": [1]})
    made.keep(0, Chunk(1, [2], "b", prompt_tokens=3), {"content": [2]})
    made.keep(0, end(), None)
    whole = json.loads(made.whole())
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "ab", "refusal": None}
    assert whole["choices"][0]["logprobs"] == {"content": [1, 2]}
    assert whole["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert whole["usage"]["total_tokens"] == 5
