"""Checks of submissions and the limits of an attempt."""

import pytest

from ascendra.v1 import common_pb2, worker_pb2
from services.common.errors import InvalidArgument
from services.worker.engine.contract import EngineInfo
from services.worker.submission import NO_OBJECTIVE_S, engine_request
from tests.support.attach_client import encode_ids

INFO = EngineInfo(
    engine="cpu",
    version="0",
    max_model_len=100,
    vocab_size=1000,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    kv_capacity_tokens=1000,
    prefix_block_tokens=0,
    guided_decoding=False,
    logprobs=True,
    policies=True,
    dtype="float32",
    keyed_noise=True,
    carried_penalties=True,
)


def submit(ids: int = 10, **fields: object) -> worker_pb2.Submit:
    """Return a submission of so many prompt ids."""
    fields.setdefault("sampling", common_pb2.SamplingParameters(max_tokens=20))
    return worker_pb2.Submit(handle=1, request_id="q", token_ids=encode_ids(list(range(ids))), **fields)  # type: ignore[arg-type]


def test_ages_become_times_of_this_host() -> None:
    """Arrival and the last token are now minus their ages; objectives turn into seconds."""
    message = submit(
        age_ms=250, last_token_age_ms=40, generated_tokens=2, slo=common_pb2.Slo(ttft_ms=1000, tbt_ms=50), priority=-3
    )
    standing = engine_request(message, INFO, "r1", now_s=50.0).standing
    assert (standing.request_id, standing.name, standing.priority) == ("r1", "q", -3)
    assert (standing.arrival_s, standing.last_token_s) == pytest.approx((49.75, 49.96))
    assert (standing.ttft_slo_s, standing.tbt_slo_s) == (1.0, 0.05)


def test_absent_objectives_never_press() -> None:
    """Without an objective the request counts as having a very loose one."""
    standing = engine_request(submit(), INFO, "r1", now_s=50.0).standing
    assert (standing.ttft_slo_s, standing.tbt_slo_s, standing.last_token_s) == (NO_OBJECTIVE_S, NO_OBJECTIVE_S, 0.0)


@pytest.mark.parametrize(
    ("ids", "generated", "max_tokens", "min_tokens", "expected"),
    [
        (10, 0, 20, 0, (20, 0)),
        (15, 5, 20, 8, (15, 3)),
        (15, 5, 20, 3, (15, 0)),
        (90, 0, 20, 15, (10, 10)),
        (10, 0, None, 0, (90, 0)),
    ],
    ids=["fresh", "continued", "minimum-passed", "clipped-to-context", "unlimited"],
)
def test_limits_count_from_the_start_of_the_completion(
    ids: int, generated: int, max_tokens: int | None, min_tokens: int, expected: tuple[int, int]
) -> None:
    """An attempt generates what is left of max_tokens, and never more than the context holds."""
    sampling = common_pb2.SamplingParameters(max_tokens=max_tokens, min_tokens=min_tokens)
    request = engine_request(submit(ids, generated_tokens=generated, sampling=sampling), INFO, "r1", now_s=0.0)
    assert (request.max_tokens, request.min_tokens) == expected


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("generated_tokens", submit(10, generated_tokens=10)),
        ("sampling.max_tokens", submit(10, generated_tokens=5, sampling=common_pb2.SamplingParameters(max_tokens=5))),
        ("token_ids", submit(100)),
        ("token_ids", worker_pb2.Submit(token_ids=b"\x01\x00\x00")),
        ("slo.ttft_ms", submit(slo=common_pb2.Slo(ttft_ms=-1))),
        ("slo.tbt_ms", submit(slo=common_pb2.Slo(tbt_ms=float("inf")))),
        ("age_ms", submit(age_ms=float("nan"))),
        ("sampling.bad_words", submit(sampling=common_pb2.SamplingParameters(bad_words=["x"]))),
        ("sampling.bad_words", submit(sampling=common_pb2.SamplingParameters(bad_words=["x"] * 65))),
        (
            "sampling.structured_output",
            submit(sampling=common_pb2.SamplingParameters(structured_output=common_pb2.StructuredOutput(regex="a"))),
        ),
        ("sampling.stop_token_ids", submit(sampling=common_pb2.SamplingParameters(stop_token_ids=range(129)))),
        ("sampling.logit_bias", submit(sampling=common_pb2.SamplingParameters(logit_bias={1: float("nan")}))),
    ],
)
def test_refusals_name_the_field(field: str, message: worker_pb2.Submit) -> None:
    """What is out of range is refused with the field's name."""
    with pytest.raises(InvalidArgument, match=field.replace(".", r"\.")):
        engine_request(message, INFO, "r1", now_s=0.0)
