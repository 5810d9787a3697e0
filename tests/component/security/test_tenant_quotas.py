"""Quotas of tenants at a router and, as HTTP, at a gateway."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.rpc import error_details_pb2, status_pb2

from ascendra import ResourceExhaustedError, RetryPolicy, SamplingParams, UnavailableError
from services.common.access import Access
from services.common.tls import TlsConfig
from services.gateway.app import build_app
from services.gateway.config import GatewayConfig
from services.gateway.gateway import Gateway
from services.gateway.http_server import start_http_server
from services.policy.quotas import Quota
from services.router.config import Tenant
from tests.component.security.conftest import Defended
from tests.support.local_router import text_request, until

SAMPLING = SamplingParams(max_tokens=5, temperature=0)


async def refused(call: Any) -> ResourceExhaustedError:
    """Return the error of a call that a quota refuses."""
    with pytest.raises(ResourceExhaustedError) as raised:
        await call
    return raised.value


async def test_requests_at_once(defended: Defended) -> None:
    """One request more than allowed is refused until one ends, however it ends; other tenants do not notice."""
    tenants = {"a": Tenant(quota=Quota(concurrent_requests=2))}
    keys = {"tenants": tenants, "breaker_failures": 100}
    async with defended(**keys) as fortress, fortress.client("a") as a, fortress.client("b") as b:
        a._retry = RetryPolicy(max_attempts=1)
        fortress.worker.hold = True
        first, second = (asyncio.create_task(a.generate("x", sampling=SAMPLING)) for _ in range(2))
        await until(lambda: len(fortress.worker.submitted) == 2)
        error = await refused(a.generate("x", sampling=SAMPLING))
        assert (error.reason, error.retry_safe, error.retry_after_ms) == ("CONCURRENT_REQUESTS", True, 500)
        other = asyncio.create_task(b.generate("x", sampling=SAMPLING))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await until(lambda: len(fortress.router.router.dispatcher.live) == 2)
        third = asyncio.create_task(a.generate("x", sampling=SAMPLING))
        await until(lambda: len(fortress.worker.submitted) == 4)
        fortress.worker.hold = False
        await asyncio.gather(second, third, other)
        fortress.worker.refuse = (14, "full", "FULL")
        for _ in range(3):  # requests that fail leave too
            with pytest.raises(UnavailableError):
                await a.generate("x", sampling=SAMPLING, timeout_s=5)
        fortress.worker.refuse = None
        assert len((await a.generate("x", sampling=SAMPLING)).token_ids) == 5


async def test_requests_per_second_and_what_is_told(defended: Defended) -> None:
    """The refusal carries a reason and a delay, flat and as google.rpc details."""
    quota = Quota(requests_per_s=0.1, burst_requests=2)
    async with defended(quota=quota) as fortress:
        metadata = (("authorization", "Bearer a-key"),)
        for _ in range(2):
            await fortress.router.collect(text_request(max_tokens=2), metadata=metadata)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await fortress.router.collect(text_request(max_tokens=2), metadata=metadata)
        assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailing: Any = raised.value.trailing_metadata()
        status = status_pb2.Status.FromString(dict(trailing)["grpc-status-details-bin"])
        info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
        assert status.details[0].Unpack(info)
        assert status.details[1].Unpack(retry)
        assert (info.reason, info.metadata["retry_safe"]) == ("REQUEST_RATE", "true")
        assert 0 < retry.retry_delay.ToMilliseconds() <= 10_000
        await fortress.router.collect(text_request(max_tokens=2), metadata=(("authorization", "Bearer b-key"),))


async def test_tokens_per_minute(defended: Defended) -> None:
    """Prompt and max_tokens are set aside, what was not generated is given back; more than the whole never fits."""
    async with defended(quota=Quota(tokens_per_min=100)) as fortress, fortress.client("a") as a:
        a._retry = RetryPolicy(max_attempts=1)
        error = await refused(a.generate("x" * 50, sampling=SamplingParams(max_tokens=60)))
        assert (error.reason, error.retry_safe, error.retry_after_ms) == ("TOO_MANY_TOKENS", False, 0)
        stream = a.stream("x" * 10, sampling=SamplingParams(max_tokens=80))
        await anext(stream)
        error = await refused(a.generate("x", sampling=SamplingParams(max_tokens=40)))
        assert (error.reason, error.retry_safe) == ("TOKEN_RATE", True)
        assert error.retry_after_ms > 1000
        fortress.worker.flowing.clear()
        await stream.aclose()
        fortress.worker.flowing.set()
        await until(lambda: not fortress.router.router.dispatcher.live)
        assert len((await a.generate("x", sampling=SAMPLING)).token_ids) == 5


async def test_a_session_is_bound_by_the_same_quota(defended: Defended) -> None:
    """Requests of one stream count as others do, and the refusal reaches only the one that is refused."""
    quota = Quota(concurrent_requests=3)
    async with defended(quota=quota) as fortress, fortress.client("a") as a, a.session() as session:
        session._retry = RetryPolicy(max_attempts=1)
        fortress.worker.hold = True
        tasks = [asyncio.create_task(session.generate("x", sampling=SAMPLING)) for _ in range(5)]
        await until(lambda: sum(task.done() for task in tasks) == 2)
        fortress.worker.hold = False
        results = await asyncio.gather(*tasks, return_exceptions=True)
    errors = [one for one in results if isinstance(one, ResourceExhaustedError)]
    assert [error.reason for error in errors] == ["CONCURRENT_REQUESTS"] * 2
    assert sum(not isinstance(one, Exception) for one in results) == 3


async def test_the_gateway_answers_429(defended: Defended, tmp_path: Path) -> None:
    """A gateway acts for the tenants of its keys at a router that knows it by its certificate."""
    async with defended(tenants={"a": Tenant(quota=Quota(requests_per_s=0.1))}) as fortress:
        tls = TlsConfig(**fortress.certificates.block("gateway", client_auth="none"))
        config = GatewayConfig(routers=(fortress.address,), tls=tls, api_keys_file=str(tmp_path / "callers.yaml"))
        gateway = Gateway(config, Access(config.api_keys_file))
        server = await start_http_server("127.0.0.1:0", build_app(gateway))
        try:
            async with httpx.AsyncClient(base_url=f"http://{server.address}", verify=False) as http:
                ask = {"prompt": "x", "max_tokens": 3}

                async def post(name: str) -> httpx.Response:
                    return await http.post(
                        "/v1/completions", json=ask, headers={"authorization": f"Bearer {name}-key"}, timeout=30
                    )

                assert (await post("a")).status_code == 200
                answer = await post("a")
                assert answer.status_code == 429
                assert answer.json()["error"]["code"] == "request_rate"
                assert 1 <= int(answer.headers["retry-after"]) <= 10
                assert (await post("b")).status_code == 200
                request_id = (await post("b")).headers["x-request-id"]
                for name, status in (("b", 200), ("a", 404)):
                    headers = {"authorization": f"Bearer {name}-key"}
                    explained = await http.get(f"/console/explain/{request_id}", headers=headers)
                    assert explained.status_code == status
        finally:
            await server.stop()
            await gateway.close()
