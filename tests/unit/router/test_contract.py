"""What moves preserve, by sampling and by what workers say they keep."""

from typing import Any

import pytest

from ascendra.v1 import common_pb2, worker_pb2
from services.router.contract import move_contract

EXACT, CONTINUOUS = common_pb2.MOVE_CONTRACT_EXACT, common_pb2.MOVE_CONTRACT_CONTINUOUS


def worker(**lacking: Any) -> worker_pb2.Welcome:
    """Return a worker that keeps everything but what is said."""
    keeps: dict[str, Any] = {"keyed_noise": True, "carried_penalties": True, "dtype": "float32"} | lacking
    return worker_pb2.Welcome(worker_id="w", continuation=worker_pb2.Continuation(**keeps))


def test_the_engine_may_pin_a_request() -> None:
    """What an engine keeps to itself cannot be moved, whatever the workers."""
    for pinned in ({"structured_output": common_pb2.StructuredOutput(regex="a")}, {"bad_words": ["x"]}):
        contract, why = move_contract(common_pb2.SamplingParameters(**pinned), [worker()])
        assert contract == common_pb2.MOVE_CONTRACT_PINNED
        assert why


@pytest.mark.parametrize(
    ("sampling", "lacking", "why"),
    [
        ({"temperature": 1.0, "presence_penalty": 1.0}, {}, ""),
        ({"temperature": 0.0, "presence_penalty": 1.0}, {"carried_penalties": False}, "penalties"),
        ({"temperature": 0.0, "frequency_penalty": 0.5}, {"carried_penalties": False}, "penalties"),
        ({"temperature": 0.0, "repetition_penalty": 1.5}, {"carried_penalties": False}, ""),
        ({"temperature": 0.7}, {"carried_penalties": False}, ""),
        ({"temperature": 0.7}, {"keyed_noise": False}, "noise"),
        ({}, {"keyed_noise": False}, "noise"),
        ({"temperature": 0.0}, {"keyed_noise": False}, ""),
        ({"temperature": 0.0}, {"dtype": "bfloat16"}, "bfloat16"),
        ({"temperature": 0.0}, {"dtype": ""}, "computes in"),
    ],
)
def test_exact_needs_a_worker_that_keeps_what_matters(
    sampling: dict[str, Any], lacking: dict[str, Any], why: str
) -> None:
    """A request is exact unless some worker would change something that this request asks for."""
    parameters = common_pb2.SamplingParameters(**sampling)
    contract, said = move_contract(parameters, [worker(), worker(**lacking)])
    assert contract == (CONTINUOUS if why else EXACT)
    assert (why in said) if why else not said


def test_nothing_is_promised_for_what_is_not_known() -> None:
    """Without a worker, or with one that says nothing, a request is continuous."""
    greedy = common_pb2.SamplingParameters(temperature=0)
    assert move_contract(greedy, [])[0] == CONTINUOUS
    assert move_contract(greedy, [worker(), worker_pb2.Welcome(worker_id="old")])[0] == CONTINUOUS
