"""/metrics of every service during a short load: all there, in agreement with the client, free of what users sent."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from ascendra import AscendraError, AsyncClient, SamplingParams
from tests.support.cluster import Site, running
from tests.support.gateway_process import GatewayProcess
from tests.support.load import Case, Recording, random_prompts
from tests.support.scrape import Scrape
from tests.support.tiny_model import VOCAB_SIZE
from tools.reference.metrics import SERVICES, metrics_of

pytestmark = [pytest.mark.engine, pytest.mark.cluster, pytest.mark.timeout(400)]

USER = "zq7user"
"""Part of everything that the users of this test say."""
REQUESTS, TOKENS = 24, 12
SLOWER_S = 0.3
"""Most by which a client may see a first token later than its router on a busy machine, on average."""


async def one(client: AsyncClient, index: int, prompt: tuple[int, ...]) -> tuple[float, float, Recording]:
    """Run a request; return the seconds to its first token, those from there to its last, and what came."""
    names: dict[str, Any] = {
        "request_id": f"{USER}-{index}",
        "session_id": f"{USER}-s{index}",
        "slo_class": ("default", "interactive")[index % 2],
        "tenant": "team" if index < REQUESTS // 2 else f"{USER}-{index}",
    }
    recording = Recording()
    began_s = asyncio.get_running_loop().time()
    await recording.follow(client.stream(**Case(prompt, (0,) * TOKENS).options(), **names))
    return recording.times_s[0] - began_s, recording.times_s[-1] - recording.times_s[0], recording


async def scrape_of(address: str) -> Scrape:
    """Return what a service shows now."""
    return await asyncio.to_thread(Scrape, address)


async def refused(client: AsyncClient) -> None:
    """Ask for what there is not, under names of the user's own."""
    wrongs: list[dict[str, Any]] = [
        {"slo_class": f"{USER}-class"},
        {"model": f"{USER}-model"},
        {"sampling": SamplingParams(top_p=7.0)},
    ]
    for wrong in wrongs:
        with pytest.raises(AscendraError):
            await client.generate(f"{USER} text", **wrong)


async def through_the_gateway(address: str) -> None:
    """Send one good request, one bad one, and one to a path that does not exist."""
    async with httpx.AsyncClient(base_url=f"http://{address}", timeout=60, verify=False) as http:
        body = {"model": "tiny", "prompt": f"{USER} text", "max_tokens": 4, "stream": False}
        headers = {"x-request-id": f"{USER}-http", "x-tenant-id": f"{USER}-http", "user-agent": USER}
        assert (await http.post("/v1/completions", json=body, headers=headers)).status_code == 200
        assert (await http.post("/v1/completions", json=body | {"model": USER}, headers=headers)).status_code == 404
        assert (await http.get(f"/{USER}")).status_code == 404


async def test_metrics_agree_with_the_client(site: Site, tmp_path: Path) -> None:
    """Each documented metric is served; counts are those of the client, times near; users make no label values."""
    workers = ["lp-0", "hp"]
    router = site.router(workers, tenants={"team": {}})
    prompts = random_prompts(REQUESTS, (40, 400), seed=31, vocab_size=VOCAB_SIZE)
    before = {name: await scrape_of(site.fleet.http(name)) for name in workers}
    async with running(router, workers=2) as client:
        with GatewayProcess(tmp_path / "gateway.log", [router.address]) as gateway:
            runs = await asyncio.gather(*(one(client, index, prompt) for index, prompt in enumerate(prompts)))
            await refused(client)
            await through_the_gateway(gateway.address)
            scrapes = {
                "gateway": await scrape_of(gateway.address),
                "router": await scrape_of(router.ready["http"]),
                "worker": await scrape_of(site.fleet.http("lp-0")),
                "predictor": await scrape_of(site.predictor.ready["http"]),
            }
            after = {name: await scrape_of(site.fleet.http(name)) for name in workers}

    for service in SERVICES:
        missing = {e.name for e in metrics_of(service)} - scrapes[service].names
        assert not missing, service
        assert not [value for value in scrapes[service].label_values() if USER in value]

    seen = scrapes["router"]
    half = REQUESTS // 2
    receipts = [recording.finished.receipt for _, _, recording in runs if recording.finished is not None]
    for slo_class, mine in (("default", receipts[::2]), ("interactive", receipts[1::2])):
        extra = slo_class == "default"  # the gateway's
        assert seen.total("ascendra_router_requests_total", slo_class=slo_class, outcome="finished") == half + extra
        assert seen.total("ascendra_router_slo_judged_requests_total", slo_class=slo_class) == half + extra
        joint = sum(receipt.ttft_met and receipt.tbt_met for receipt in mine)
        assert (
            0
            <= seen.total("ascendra_router_slo_met_requests_total", slo_class=slo_class, objective="joint") - joint
            <= extra
        )
        assert seen.total("ascendra_router_ttft_seconds_count", slo_class=slo_class) == half + extra
    assert seen.total("ascendra_router_tenant_requests_total", tenant="team") == half
    assert seen.total("ascendra_router_tenant_requests_total", tenant="other") == half + 1
    refusals = {tuple(s.labels.values()): s.value for s in seen.find("ascendra_router_refusals_total")}
    assert refusals["unknown_class", "INVALID_ARGUMENT"] == 1
    assert sum(refusals.values()) == 4  # three of the client's, one of the gateway's
    assert seen.total("ascendra_router_tokens_total") == REQUESTS * TOKENS + 4
    assert seen.total("ascendra_router_tbt_seconds_count") <= REQUESTS * (TOKENS - 1) + 3
    assert seen.total("ascendra_router_decisions_total", kind="place") == REQUESTS + 1
    assert seen.total("ascendra_router_workers", health="ready") == 2
    assert {s.labels["worker"] for s in seen.find("ascendra_router_telemetry_age_seconds")} == set(workers)

    ttfts_s, rests_s = [ttft_s for ttft_s, _, _ in runs], [rest_s for _, rest_s, _ in runs]
    near(seen.total("ascendra_router_ttft_seconds_sum"), sum(ttfts_s))
    near(seen.total("ascendra_router_tbt_seconds_sum"), sum(rests_s))

    front = scrapes["gateway"]
    assert front.total("ascendra_gateway_requests_total", endpoint="completion", status="200") == 1
    assert front.total("ascendra_gateway_requests_total", endpoint="completion", status="404") == 1
    assert front.total("ascendra_gateway_tokens_total") == 4
    assert front.find("vllm:num_requests_running", model_name="tiny")

    for name, counted in (
        ("vllm:generation_tokens_total", REQUESTS * TOKENS + 4),
        ("vllm:request_success_total", REQUESTS + 1),
        ("vllm:time_to_first_token_seconds_count", REQUESTS + 1),
    ):
        grown = sum(after[one].total(name) - before[one].total(name) for one in workers)
        assert grown == counted, name


def near(measured: float, by_client: float) -> None:
    """Assert that a router's sum over all requests is close to the client's, which has seen everything later."""
    assert abs(measured - by_client) <= REQUESTS * SLOWER_S


async def test_engines_keep_vllms_names(site: Site) -> None:
    """The CPU engine shows all that the emulated one does, by the served model's name and by engine."""
    cpu = await scrape_of(site.fleet.http("cpu-lp"))
    emulated = await scrape_of(site.fleet.http("lp-0"))
    real, imitated = ({name for name in scrape.names if name.startswith("vllm:")} for scrape in (cpu, emulated))
    assert imitated <= real  # an engine with a KV connector has more
    assert {"vllm:kv_cache_usage_perc", "vllm:num_requests_waiting", "vllm:num_preemptions_total"} <= imitated
    for scrape, kind in ((cpu, "cpu"), (emulated, "emulated")):
        labelled = [sample.labels for sample in scrape.samples if sample.name.startswith("vllm:")]
        named = [
            (labels["model_name"], labels["engine"]) for labels in labelled if {"model_name", "engine"} <= set(labels)
        ]
        assert set(named) == {("tiny", "0")}
        # The configuration of the KV cache has no model's name, and a connector's metrics no engine's number.
        assert len(named) > 0.9 * len(labelled)
        assert scrape.find("ascendra_worker_info", engine_kind=kind, role="low", model_name="tiny")
