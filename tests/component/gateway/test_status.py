"""Health, metrics, models, tokenizer, keys and console."""

import hashlib
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from services.common.access import Access
from tests.component.gateway.conftest import Serve, Served
from tests.support import scripted_router as scripted
from tests.support.scripted_router import counting

ASK = {"model": "tiny", "prompt": "x"}


async def test_health_and_version(serve: Serve) -> None:
    """Ready with a ready worker, alive always."""
    async with scripted.serve(counting(1)) as router, serve(router) as served:
        for path in ("/health", "/healthz", "/readyz", "/live", "/livez"):
            assert (await served.http.get(path)).status_code == 200
        assert (await served.http.get("/version")).json()["version"]
        assert (await served.http.head("/metrics")).status_code == 200


async def test_metrics(serve: Serve) -> None:
    """Own counters, and the cluster's load under vLLM's names."""
    async with scripted.serve(counting(4)) as router, serve(router) as served:
        before = await _samples(served)
        await served.http.post("/v1/completions", json=ASK)
        await served.http.post("/v1/completions", json={"prompt": 1})
        after = await _samples(served)
    assert after["vllm:num_requests_running", "tiny"] == 2
    assert after["vllm:num_requests_waiting", "tiny"] == 4
    assert after["ascendra_gateway_router_up", router.address] == 1
    for key, more in (
        (("ascendra_gateway_requests_total", "completion", "200"), 1),
        (("ascendra_gateway_requests_total", "completion", "400"), 1),
        (("ascendra_gateway_tokens_total", "completion"), 4),
        (("ascendra_gateway_time_to_first_token_seconds_count", "completion"), 1),
    ):
        assert after[key] - before.get(key, 0) == more
    assert after[("ascendra_gateway_in_flight",)] == 0


async def _samples(served: Served) -> dict[tuple[str, ...], float]:
    text = (await served.http.get("/metrics")).text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_tokenize_and_detokenize(serve: Serve) -> None:
    """Text and conversations become ids, ids become text."""
    async with scripted.serve(counting(1)) as router, serve(router) as served:
        plain = await served.http.post("/tokenize", json={"prompt": "hi", "return_token_strs": True})
        chat = await served.http.post("/tokenize", json={"messages": [{"role": "user", "content": "yo"}]})
        back = await served.http.post("/detokenize", json={"model": "tiny", "tokens": [104, 105]})
        unknown = await served.http.post("/tokenize", json={"prompt": "hi", "model": "other"})
        nothing = await served.http.post("/tokenize", json={})
    assert plain.json() == {"count": 2, "max_model_len": 2048, "tokens": [104, 105], "token_strs": ["h", "i"]}
    assert chat.json()["tokens"] == [121, 111]
    assert back.json() == {"prompt": "hi"}
    assert unknown.status_code == 404
    assert nothing.status_code == 400


async def test_keys(serve: Serve, tmp_path: Path) -> None:
    """With keys configured, requests carry the tenant of theirs, and others are turned away."""
    file = tmp_path / "keys.yaml"
    digest = hashlib.sha256(b"secret").hexdigest()
    watcher = f"{{keys: [{hashlib.sha256(b'eyes').hexdigest()}], rights: [monitor]}}"
    file.write_text(f"team-a: [{digest}]\nwatcher: {watcher}\n")
    async with scripted.serve(counting(1)) as router, serve(router, access=Access(str(file))) as served:
        good = {"authorization": "Bearer secret"}
        assert (await served.http.post("/v1/completions", json=ASK, headers=good)).status_code == 200
        other = await served.http.post("/v1/completions", json=ASK, headers={**good, "x-tenant-id": "team-b"})
        assert (other.status_code, other.json()["error"]["code"]) == (403, "other_tenant")
        for bad in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
            refused = await served.http.post("/v1/completions", json=ASK, headers=bad)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
        for path in ("/v1/models", "/console/status", "/console/explain/x", "/metrics"):
            assert (await served.http.get(path)).status_code == 401
        eyes = {"authorization": "Bearer eyes"}
        for path in ("/console/status", "/metrics"):
            assert (await served.http.get(path, headers=good)).status_code == 403
            assert (await served.http.get(path, headers=eyes)).status_code == 200
        assert (await served.http.post("/v1/completions", json=ASK, headers=eyes)).status_code == 403
        for path in ("/health", "/version", "/"):
            assert (await served.http.get(path)).status_code == 200
    assert [request.tenant for request in router.requests] == ["team-a"]


async def test_console_status(serve: Serve) -> None:
    """The console's data: every worker once, attainment by router, counters summed, unreachable routers named."""
    async with scripted.serve(counting(1)) as gone:
        address = gone.address
    script = counting(1)
    async with scripted.serve(script) as one, scripted.serve(script) as two, serve(one, two, address) as served:
        status = (await served.http.get("/console/status")).json()
    assert [(w["worker_id"], w["role"], w["health"]) for w in status["workers"]] == [
        ("w0", "low_priority", "ready"),
        ("w1", "high_priority", "connecting"),
    ]
    assert status["workers"][0]["queued_prefill_tokens"] == 1200
    assert status["counters"] == {"offloads": 6}
    assert [(row["router_id"], row["joint"]) for row in status["attainment"]] == [("router-0", 0.95)] * 2
    assert [router["reachable"] for router in status["routers"]] == [True, True, False]
    assert status["attainment_target"] == 0.99


async def test_console_explain(serve: Serve) -> None:
    """A request's decisions are found by its id, whichever router served it."""
    script = counting(1)
    async with scripted.serve(script) as one, scripted.serve(script) as two, serve(one, two) as served:
        for name in ("a", "b"):
            await served.http.post("/v1/completions", json=ASK, headers={"x-request-id": name})
        found = [(await served.http.get(f"/console/explain/{name}")).json() for name in ("a", "b")]
        missing = await served.http.get("/console/explain/nobody")
    assert [explanation["request_id"] for explanation in found] == ["a", "b"]
    assert [decision["kind"] for decision in found[0]["decisions"]] == ["place", "offload"]
    assert found[0]["decisions"][0]["candidates"][1]["excluded"] == "high priority"
    assert found[0]["receipt"]["target"] == {"ttft_ms": 500, "tbt_ms": 50}
    assert found[0]["receipt"]["pool"] == "high_priority"
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")


async def test_console_page(serve: Serve) -> None:
    """The page is served as a whole: it loads nothing from elsewhere and asks only for data that exists."""
    async with scripted.serve(counting(1)) as router, serve(router) as served:
        page = await served.http.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        status = (await served.http.get("/console/status")).json()
    text = page.text
    assert "http://" not in text
    assert "https://" not in text
    assert "innerHTML" not in text
    for field in ("worker_id", "predicted_ttft_s", "tokens_per_s", "queued_prefill_tokens", "kv_usage", "policy"):
        assert f"w.{field}" in text
        assert field in status["workers"][0]
