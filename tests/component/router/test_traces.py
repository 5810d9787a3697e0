"""The router's spans: attempts, decisions, sampling, and a collector that is not there."""

import asyncio
import itertools
import time
from pathlib import Path

import pytest

from ascendra.v1 import common_pb2, inference_pb2, worker_pb2
from services.policy.state import Role
from tests.support.local_router import cluster, local_router, text_request, until
from tests.support.otlp import collector
from tests.support.scripted_worker import ScriptedWorker

TRACE = "0af7651916cd43dd8448eb211c80319c"
SAMPLED, NOT_SAMPLED = f"00-{TRACE}-b7ad6b7169203331-01", f"00-{TRACE}-b7ad6b7169203331-00"
SECRET = "zq7secret"


def ask(request_id: str, traceparent: str = SAMPLED, **fields: object) -> inference_pb2.GenerateRequest:
    """Return a request for eight tokens."""
    request = inference_pb2.GenerateRequest(
        request_id=request_id,
        text=f"{SECRET} text",
        sampling=common_pb2.SamplingParameters(max_tokens=8),
        traceparent=traceparent,
    )
    for name, value in fields.items():
        setattr(request, name, value)
    return request


async def test_attempts_are_linked_and_decisions_are_events(tokenizer_directory: Path) -> None:
    """A worker that refuses, then another: two attempts under the request's span, the second linked to the first."""
    bad, good = ScriptedWorker("bad"), ScriptedWorker("good")
    bad.refuse = (14, "no room", "QUEUE_FULL")
    async with (
        collector("127.0.0.1:0") as (spans, endpoint),
        # In turn: the first request goes to the worker whose id comes first.
        cluster(tokenizer_directory, bad, good, otlp_endpoint=endpoint, placement="round_robin") as router,
    ):
        done = await router.collect(ask("moved"))
    assert len(done.token_ids) == 8
    (request,) = spans.named("text_completion tiny")
    attempts = spans.named("attempt ")
    assert request.raw.trace_id.hex() == TRACE
    assert request.raw.parent_span_id.hex() == SAMPLED.split("-")[2]
    assert len(attempts) >= 2
    assert all(attempt.is_child_of(request) for attempt in attempts)
    for before, after in itertools.pairwise(attempts):
        assert before.failed
        assert before.attributes["error.type"] == "request_failed"
        assert after.links_to(before)
    assert not attempts[0].raw.links
    assert attempts[-1].attributes["ascendra.outcome"] == "finished"
    assert attempts[-1].events == ["first_token"]
    assert request.events[0] == "place"
    assert {"move", "first_token"} <= set(request.events)
    assert request.event("move")["ascendra.rule"].startswith("QUEUE_FULL")
    assert request.attributes["gen_ai.usage.output_tokens"] == 8
    assert request.attributes["ascendra.moves"] == len(attempts) - 1
    assert not request.failed
    last = (good.submitted or bad.submitted)[-1]
    assert last.traceparent.split("-")[1:3] == [TRACE, attempts[-1].raw.span_id.hex()]
    assert SECRET.encode() not in b"".join(span.raw.SerializeToString() for span in spans.spans)


async def test_an_offload_is_an_event_and_a_new_attempt(tokenizer_directory: Path) -> None:
    """A waiting request that leaves LP for HP: the first attempt ends, which is no failure."""
    policy = worker_pb2.SchedulingPolicy(value_function="fcfs")
    low, high = ScriptedWorker("low", role=Role.LOW, policy=policy), ScriptedWorker("high", role=Role.HIGH)
    low.hold = True
    async with (
        collector("127.0.0.1:0") as (spans, endpoint),
        cluster(tokenizer_directory, low, high, otlp_endpoint=endpoint, tickets=False, hp_fill=0.0) as router,
    ):
        patient = common_pb2.Slo(ttft_ms=600_000)
        backlog = [
            asyncio.create_task(router.collect(text_request("word " * 350, traceparent=NOT_SAMPLED, slo=patient)))
            for _ in range(20)
        ]
        await until(lambda: len(low.submitted) == len(backlog))
        await router.collect(ask("offloaded"))
        low.hold = False
        await asyncio.gather(*backlog)
    (request,) = spans.named("text_completion tiny")
    first, second = spans.named("attempt ")
    assert second.links_to(first)
    assert first.attributes["ascendra.outcome"] == "moved"
    assert not first.failed
    assert (first.attributes["ascendra.worker.role"], second.attributes["ascendra.worker.role"]) == (
        "low_priority",
        "high_priority",
    )
    assert request.event("offload")["ascendra.from_worker"] == "low"
    assert request.event("offload")["ascendra.to_worker"] == "high"
    assert request.event("offload")["ascendra.predicted_ttft"] > 0


async def test_refusals_are_failed_spans(tokenizer_directory: Path) -> None:
    """A request that is refused has a span with the reason."""
    worker = ScriptedWorker()
    await worker.start()
    async with (
        collector("127.0.0.1:0") as (spans, endpoint),
        local_router(tokenizer_directory, [worker.address], otlp_endpoint=endpoint) as router,
    ):
        await router.attached(1)
        with pytest.raises(Exception, match="slo_class"):
            await router.collect(ask("refused", slo_class="none"))
    (request,) = spans.named("text_completion tiny")
    assert request.failed
    assert request.attributes["error.type"] == "unknown_class"
    assert not spans.named("attempt ")


async def test_sampling_is_the_callers(tokenizer_directory: Path) -> None:
    """What the caller does not sample is not exported, and the worker hears so; what begins here follows the ratio."""
    worker = ScriptedWorker()
    await worker.start()
    async with (
        collector("127.0.0.1:0") as (spans, endpoint),
        local_router(tokenizer_directory, [worker.address], otlp_endpoint=endpoint, trace_sample_ratio=0.0) as router,
    ):
        await router.attached(1)
        await router.collect(ask("not-sampled", NOT_SAMPLED))
        await router.collect(ask("begun-here", ""))
        await router.collect(ask("sampled", SAMPLED))
    given = {submit.request_id: submit.traceparent.split("-") for submit in worker.submitted}
    assert (given["not-sampled"][1], given["sampled"][1]) == (TRACE, TRACE)
    flags = {request_id: int(parts[3], 16) & 1 for request_id, parts in given.items()}
    assert flags == {"not-sampled": 0, "begun-here": 0, "sampled": 1}
    assert [span.attributes["ascendra.request.id"] for span in spans.named("text_completion")] == ["sampled"]
    assert len(spans.spans) == 2


async def test_a_collector_that_is_away_harms_nothing(tokenizer_directory: Path) -> None:
    """Requests are served, and the router stops within its limit."""
    worker = ScriptedWorker()
    await worker.start()
    async with local_router(tokenizer_directory, [worker.address], otlp_endpoint="http://127.0.0.1:1") as router:
        await router.attached(1)
        assert len((await router.collect(ask("a"))).token_ids) == 8
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 15
