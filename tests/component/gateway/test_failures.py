"""Failures have the right HTTP status, an OpenAI error object, and say when to try again."""

import asyncio
from typing import Any

import httpx
import openai
import pytest

from services.common import errors
from tests.component.gateway.conftest import Serve
from tests.support import scripted_router as scripted
from tests.support.scripted_router import Fail, Pause, counting

BODY: dict[str, Any] = {"model": "tiny", "prompt": "x"}

LONG_PROMPT = errors.InvalidArgument("prompt too long", reason="CONTEXT_LENGTH")
LONG_TEXT = errors.ResourceExhausted("text too long", reason="TEXT_TOO_LONG")
FULL = errors.ResourceExhausted("full", retry_after_ms=2300, retry_safe=True)
CASES: list[tuple[errors.ServiceError, int, type[openai.APIStatusError], str | None, str]] = [
    (errors.InvalidArgument("sampling.top_p must be in (0, 1]"), 400, openai.BadRequestError, None, "invalid_argument"),
    (LONG_PROMPT, 400, openai.BadRequestError, None, "context_length_exceeded"),
    (errors.NotFound("model: no", reason="UNKNOWN_MODEL"), 404, openai.NotFoundError, None, "model_not_found"),
    (FULL, 429, openai.RateLimitError, "3", "resource_exhausted"),
    (LONG_TEXT, 413, openai.APIStatusError, None, "text_too_long"),
    (errors.Unavailable("no worker", reason="NO_WORKER"), 503, openai.InternalServerError, "1", "no_worker"),
    (errors.DeadlineExceeded("late"), 504, openai.InternalServerError, None, "deadline_exceeded"),
    (errors.ServiceError("internal error"), 500, openai.InternalServerError, None, "internal"),
]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_token_a_failure_is_an_http_status(serve: Serve, stream: bool) -> None:
    """The status, the error object and Retry-After follow from the router's status."""
    async with scripted.serve(counting(1)) as router, serve(router) as served:
        for error, status, kind, retry_after, code in CASES:
            router.script = scripted.always(Fail(error))
            with pytest.raises(kind) as raised:
                await served.openai.completions.create(**BODY, stream=stream)
            assert raised.value.status_code == status
            assert raised.value.code == code
            assert error.message in raised.value.message
            assert raised.value.response.headers.get("retry-after") == retry_after


async def test_an_unreachable_router_is_unavailable(serve: Serve) -> None:
    """Without any router the answer is 503, and the gateway is not ready."""
    async with scripted.serve(counting(1)) as router:
        address = router.address
    async with serve(address) as served:
        answer = await served.http.post("/v1/completions", json=BODY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "connection_lost")
        assert (await served.http.get("/health")).status_code == 503
        assert (await served.http.get("/live")).status_code == 200


async def test_a_refusal_is_not_repeated(serve: Serve) -> None:
    """Whether to try again is the client's choice: the gateway asks once."""
    script = scripted.always(Fail(errors.ResourceExhausted("full", retry_after_ms=10, retry_safe=True)))
    async with scripted.serve(script) as router, serve(router) as served:
        answer = await served.http.post("/v1/completions", json=BODY)
    assert answer.status_code == 429
    assert answer.headers["retry-after-ms"] == "10"
    assert len(router.requests) == 1


async def test_one_failed_choice_ends_all(serve: Serve) -> None:
    """A request for several completions fails as a whole, and the others are cancelled."""
    waiting = scripted.always(scripted.tokens(0, 1), Pause(60))
    script = scripted.in_order(waiting, scripted.always(Pause(0.1), Fail(errors.Unavailable("the worker died"))))
    async with scripted.serve(script) as router, serve(router) as served:
        answer = await served.http.post("/v1/completions", json={**BODY, "n": 2}, headers={"x-request-id": "r"})
        assert (answer.status_code, answer.json()["error"]["message"]) == (503, "the worker died")
        await router.until(lambda router: len(router.cancelled) == 1)


async def test_a_stream_goes_on_over_another_router(serve: Serve) -> None:
    """When a router dies, its streams continue on another one, without a token lost or repeated."""
    dying = scripted.in_order(lambda r: [scripted.accepted(r), scripted.tokens(0, 0), scripted.Break()], counting(4))
    async with scripted.serve(dying) as first, scripted.serve(counting(4)) as second, serve(first, second) as served:
        answer = await served.http.post("/v1/completions", json=BODY)
    assert answer.json()["choices"][0]["text"] == " 0 1 2 3"
    assert len(first.requests) + len(second.requests) == 2


async def test_requests_are_spread_over_the_routers(serve: Serve) -> None:
    """Each router gets its share."""
    async with scripted.serve(counting(1)) as first, scripted.serve(counting(1)) as second:
        async with serve(first, second) as served:
            await asyncio.gather(*(served.http.post("/v1/completions", json=BODY) for _ in range(8)))
        assert (len(first.requests), len(second.requests)) == (4, 4)
        assert (first.sessions, second.sessions) == (1, 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after_first_token", [False, True])
async def test_a_client_that_leaves_cancels_its_request(serve: Serve, stream: bool, after_first_token: bool) -> None:
    """The router hears of it, whether or not a token was sent, for every choice."""
    steps = [scripted.tokens(0, 1)] if after_first_token else []
    async with scripted.serve(scripted.always(*steps, Pause(60))) as router, serve(router) as served:
        body = {**BODY, "stream": stream, "n": 2}
        headers = {"x-request-id": "gone"}
        timeout = httpx.Timeout(30, read=0.3)
        with pytest.raises(httpx.ReadTimeout):
            await served.http.post("/v1/completions", json=body, headers=headers, timeout=timeout)
        await router.until(lambda router: {"gone-0", "gone-1"} <= set(router.cancelled))


async def test_a_wrong_field_is_named(serve: Serve) -> None:
    """The answer is 400 with the name of the field, and no router is asked."""
    async with scripted.serve(counting(1)) as router, serve(router) as served:
        text = await served.http.post("/v1/completions", json={"prompt": "x", "temperature": "hot"})
        chat = await served.http.post("/v1/chat/completions", json={"messages": [{"content": "x"}]})
    assert (text.status_code, text.json()["error"]["param"]) == (400, "temperature")
    assert (chat.status_code, chat.json()["error"]["param"]) == (400, "messages[0].role")
    assert text.json()["error"]["type"] == "invalid_request_error"
    assert router.requests == []


async def test_bad_bodies_and_paths(serve: Serve) -> None:
    """What is not JSON, too large, unknown or of the wrong method has its status."""
    async with scripted.serve(counting(1)) as router, serve(router, max_body_bytes=1000) as served:

        async def parts() -> Any:
            for _ in range(30):
                yield b"x" * 100

        post = served.http.post
        assert (await post("/v1/completions", content=b"{nope")).status_code == 400
        assert (await post("/v1/completions", content=b"[]")).status_code == 400
        assert (await post("/v1/completions", json={"prompt": "x" * 2000})).status_code == 413
        assert (await post("/v1/completions", content=parts())).status_code == 413
        assert (await post("/v1/nothing", json={})).json()["error"]["code"] == "not_found"
        assert (await served.http.get("/v1/completions")).status_code == 405
        bad_id = await post("/v1/completions", json=BODY, headers={"x-request-id": "a b"})
        assert (bad_id.status_code, bad_id.json()["error"]["param"]) == (400, "x-request-id")
        assert (await post("/v1/completions", json=BODY, headers={"x-slo-ttft-ms": "fast"})).status_code == 400


async def test_more_requests_than_allowed_are_turned_away(serve: Serve) -> None:
    """The gateway's own limit answers 503 with a wait."""
    async with scripted.serve(scripted.always(Pause(60))) as router, serve(router, max_in_flight=1) as served:
        first = asyncio.create_task(served.http.post("/v1/completions", json=BODY))
        await router.until(lambda router: bool(router.requests))
        second = await served.http.post("/v1/completions", json=BODY)
        assert (second.status_code, second.headers["retry-after"]) == (503, "1")
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)


async def test_draining_cancels_what_does_not_end(serve: Serve) -> None:
    """A stream cut short by the drain says so; new requests are refused."""
    script = scripted.always(scripted.tokens(0, 1), Pause(60))
    async with scripted.serve(script) as router, serve(router) as served:
        stream = await served.openai.completions.create(**BODY, stream=True)
        chunks = aiter(stream)
        assert (await anext(chunks)).choices[0].text == " 1"
        served.gateway.draining = True
        assert (await served.http.post("/v1/completions", json=BODY)).json()["error"]["code"] == "shutting_down"
        assert (await served.http.get("/health")).status_code == 503
        await served.gateway.drain(0.01)
        with pytest.raises(openai.APIError, match="shutting down"):
            await anext(chunks)
