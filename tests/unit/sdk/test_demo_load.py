"""The demo's arithmetic."""

import random

from ascendra import Slo, wire
from ascendra.cli.demo_load import LoadClass, Outcome, percentile
from ascendra.v1 import inference_pb2

CLASS = LoadClass(name="c", slo=Slo(ttft_ms=100, tbt_ms=50), share=1, burst=1, sentences=3, max_tokens=4)
RECEIPT = wire.receipt_from_wire(inference_pb2.SloReceipt())


def test_percentiles_are_values_that_occurred() -> None:
    """The nearest rank is taken, and 0 without values."""
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile(range(1, 101), 0.99) == 99
    assert percentile([5], 0.01) == 5
    assert percentile([], 0.5) == 0


def test_a_request_attains_within_both_objectives() -> None:
    """Too late a first token, too long a gap, or no end is a miss."""
    assert Outcome(CLASS, "r", ttft_s=0.1, gaps_s=[0.05], receipt=RECEIPT).attained
    assert not Outcome(CLASS, "r", ttft_s=0.11, gaps_s=[0.05], receipt=RECEIPT).attained
    assert not Outcome(CLASS, "r", ttft_s=0.1, gaps_s=[0.06], receipt=RECEIPT).attained
    assert not Outcome(CLASS, "r", ttft_s=0.1, gaps_s=[0.05]).attained
    assert not Outcome(CLASS, "r", receipt=RECEIPT).attained


def test_prompts_depend_on_the_seed_alone() -> None:
    """The same seed gives the same load."""
    assert CLASS.messages(random.Random(3)) == CLASS.messages(random.Random(3))
