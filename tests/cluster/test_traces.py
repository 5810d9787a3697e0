"""One trace from an OpenAI client to the engine, over the death of a worker."""

import asyncio
import json
import os
import signal
from pathlib import Path

import httpx
import pytest

from ascendra import AsyncClient
from tests.cluster.conftest import SPANS
from tests.support.cluster import Site, running, until
from tests.support.gateway_process import GatewayProcess
from tests.support.otlp import collector

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "zq7secret"
TOKENS = 300
WORKERS = ["traced-0", "traced-1"]


async def stream_over_a_death(address: str, client: AsyncClient, site: Site) -> tuple[str, int]:
    """Stream a chat through the gateway, kill its worker at the first token; return that worker and the events read."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": SECRET}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "slo": {"ttft_ms": 60_000, "tbt_ms": 5_000},
    }
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "traced"}
    victim, tokens = "", 0
    async with (
        httpx.AsyncClient(base_url=f"http://{address}", timeout=120, verify=False) as http,
        http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as answer,
    ):
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
            if not victim:
                victim = (await client.explain("traced")).decisions[-1].to_worker_id
                os.kill(site.fleet.pid(victim), signal.SIGKILL)
    return victim, tokens


async def test_spans_connect_across_services_and_over_a_death(site: Site, tmp_path: Path) -> None:
    """Gateway, router, two linked attempts, and the second worker's engine, under the client's own span."""
    async with collector(f"unix:{site.directory / SPANS}") as (spans, endpoint):
        router = site.router(WORKERS, otlp_endpoint=endpoint)
        async with running(router, workers=2) as client:
            with GatewayProcess(tmp_path / "gateway.log", [router.address], otlp_endpoint=endpoint) as gateway:
                old = {worker: site.fleet.pid(worker) for worker in WORKERS}
                victim, tokens = await stream_over_a_death(gateway.address, client, site)
                survivor = next(worker for worker in WORKERS if worker != victim)
                await spans.until(lambda: bool(spans.named("engine ")))
                await asyncio.to_thread(gateway.stop)
            await site.restarted(victim, old[victim])
            await until(lambda: bool(spans.named("POST ")), "the gateway's span")
        await spans.until(lambda: bool(spans.named("chat ")))

    assert tokens == TOKENS
    (front,), (request,) = spans.named("POST "), spans.named("chat tiny")
    attempts = spans.named("attempt ")
    (engine,) = spans.named("engine ")  # the other one died with its worker
    assert (front.raw.trace_id.hex(), front.raw.parent_span_id.hex()) == (TRACE, PARENT)
    assert request.is_child_of(front)
    assert [attempt.attributes["ascendra.worker.id"] for attempt in attempts] == [victim, survivor]
    assert all(attempt.is_child_of(request) for attempt in attempts)
    assert attempts[0].failed
    assert not attempts[1].failed
    assert attempts[1].links_to(attempts[0])
    assert engine.is_child_of(attempts[1])
    assert {span.service for span in (front, request, *attempts, engine)} == {
        "ascendra-gateway",
        "ascendra-router",
        "ascendra-worker",
    }
    assert request.events.count("first_token") == 1
    assert request.events.index("place") < request.events.index("first_token") < request.events.index("move")
    assert engine.events[:2] == ["prefill_started", "first_token"]
    assert engine.attributes["ascendra.worker.id"] == survivor
    for span in (front, request):
        assert span.attributes["gen_ai.operation.name"] == "chat"
        assert span.attributes["gen_ai.usage.output_tokens"] == TOKENS
    assert front.attributes["http.response.status_code"] == 200
    assert front.raw.start_time_unix_nano <= request.raw.start_time_unix_nano <= attempts[0].raw.start_time_unix_nano
    assert SECRET.encode() not in b"".join(span.raw.SerializeToString() for span in spans.spans)
