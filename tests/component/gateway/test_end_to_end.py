"""OpenAI SDK, gateway, router and vLLM on CPU together."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from ascendra import AsyncClient, Message, SamplingParams
from tests.support.cluster import attached
from tests.support.gateway_process import GatewayProcess
from tests.support.router_process import RouterProcess
from tests.support.worker_process import WorkerFleet, cpu_worker

pytestmark = pytest.mark.engine

PROMPT = "Once upon a time there was"
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the sea?"}]
IDS = {"return_token_ids": True}


@dataclass(frozen=True)
class Addresses:
    """Where the services listen."""

    gateway: str
    router: str
    router_http: str


@dataclass(frozen=True)
class Clients:
    """Clients of one test."""

    openai: openai.AsyncOpenAI
    http: httpx.AsyncClient
    sdk: AsyncClient


@pytest.fixture(scope="module")
def addresses(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    """A router in front of a real worker, and a gateway in front of that."""
    directory = tmp_path_factory.mktemp("gateway")
    with (
        WorkerFleet(directory, {"cpu": cpu_worker(tiny_model)}) as fleet,
        RouterProcess(directory, model=tiny_model, model_name="tiny", workers=[fleet.address("cpu")]) as router,
        GatewayProcess(directory / "gateway.log", [router.address]) as gateway,
    ):
        yield Addresses(gateway.address, router.address, router.http)


@pytest.fixture
async def clients(addresses: Addresses) -> AsyncIterator[Clients]:
    """Clients of the gateway and of the router."""
    url = f"http://{addresses.gateway}"
    transport = openai.DefaultAsyncHttpxClient(verify=False)
    async with (
        AsyncClient(addresses.router) as sdk,
        httpx.AsyncClient(base_url=url, timeout=60, verify=False) as http,
        openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0, http_client=transport
        ) as api,
    ):
        await attached(sdk, 1)
        yield Clients(api, http, sdk)


@pytest.mark.parametrize(("temperature", "seed"), [(0.0, None), (1.0, 11)])
async def test_token_ids_equal_those_of_the_sdk(clients: Clients, temperature: float, seed: int | None) -> None:
    """The gateway changes nothing: whole, streamed and through the SDK, greedy and sampled, the ids are the same."""
    sampling = SamplingParams(temperature=temperature, seed=seed, max_tokens=40, ignore_eos=True)
    expected = await clients.sdk.generate(PROMPT, sampling=sampling)
    options: Any = {
        "model": "tiny",
        "prompt": PROMPT,
        "temperature": temperature,
        "max_tokens": 40,
        "extra_body": {**IDS, "ignore_eos": True},
    }
    if seed is not None:
        options["seed"] = seed
    whole = await clients.openai.completions.create(**options)
    stream = await clients.openai.completions.create(**options, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    parts = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert len(expected.token_ids) == 40
    assert whole.choices[0].model_extra["token_ids"] == expected.token_ids
    assert [i for part in parts for i in part.model_extra["token_ids"]] == expected.token_ids
    assert whole.choices[0].text == "".join(part.text for part in parts) == expected.text
    assert whole.usage == chunks[-1].usage
    assert whole.usage.completion_tokens == 40
    assert whole.usage.prompt_tokens == len(await clients.sdk.tokenize(PROMPT))


async def test_chat_equals_the_sdk(clients: Clients) -> None:
    """A conversation is rendered once, in the router."""
    messages = [Message(message["role"], message["content"]) for message in MESSAGES]
    expected = await clients.sdk.generate(messages=messages, sampling=SamplingParams(temperature=0, max_tokens=20))
    answer = await clients.openai.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_completion_tokens=20, extra_body=IDS
    )
    assert answer.choices[0].message.content == expected.text
    assert answer.choices[0].model_extra is not None
    assert answer.choices[0].model_extra["token_ids"] == expected.token_ids
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens


async def test_samples_have_consecutive_seeds(clients: Clients) -> None:
    """Sample i of n equals a request of its own with seed + i; ids as a prompt equal its text."""
    ids = await clients.sdk.tokenize(PROMPT)
    both = await clients.openai.completions.create(model="tiny", prompt=ids, n=2, seed=7, max_tokens=12)
    for index, choice in enumerate(both.choices):
        sampling = SamplingParams(seed=7 + index, max_tokens=12)
        assert choice.text == (await clients.sdk.generate(PROMPT, sampling=sampling)).text
    assert both.choices[0].text != both.choices[1].text


async def test_logprobs(clients: Clients) -> None:
    """Greedy tokens are the likeliest of their position, and each is named by its text."""
    chat = await clients.openai.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, max_completion_tokens=6, logprobs=True, top_logprobs=3
    )
    text = await clients.openai.completions.create(model="tiny", prompt=PROMPT, temperature=0, max_tokens=6, logprobs=2)
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content
    assert content is not None
    assert len(content) == 6
    for position in content:
        assert len(position.top_logprobs) == 3
        assert position.logprob == pytest.approx(max(top.logprob for top in position.top_logprobs), abs=1e-4)
        assert position.top_logprobs[0].token == position.token
    columns = text.choices[0].logprobs
    assert columns is not None
    assert columns.tokens is not None
    assert columns.text_offset is not None
    assert [len(columns.tokens), len(columns.text_offset)] == [6, 6]
    assert all(value <= 0 for value in columns.token_logprobs or [1])


async def test_stop_and_choice(clients: Clients) -> None:
    """A stop string ends the text before it and is named; a choice constrains the output."""
    options: Any = {"model": "tiny", "prompt": PROMPT, "temperature": 0}
    free = (await clients.openai.completions.create(**options, max_tokens=30)).choices[0].text
    stop = next(free[i : i + 2] for i in range(4, 20) if free[i : i + 2].isascii() and free[i : i + 2].isprintable())
    stopped = (await clients.openai.completions.create(**options, max_tokens=30, stop=stop)).choices[0]
    assert stopped.text == free[: free.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.model_extra is not None
    assert stopped.model_extra["stop_reason"] == stop
    guided = {"structured_outputs": {"choice": ["left", "right"]}}
    chosen = await clients.openai.completions.create(**options, max_tokens=30, extra_body=guided)
    assert chosen.choices[0].text in ("left", "right")


async def test_failures(clients: Clients) -> None:
    """What the router and the worker refuse has OpenAI's status and code."""
    with pytest.raises(openai.NotFoundError) as unknown:
        await clients.openai.completions.create(model="other", prompt="x")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        await clients.openai.completions.create(model="tiny", prompt=[5] * 1100)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="top_p"):
        await clients.openai.completions.create(model="tiny", prompt="x", top_p=2)
    with pytest.raises(openai.BadRequestError):
        await clients.openai.completions.create(model="tiny", prompt=[4_000_000])


async def test_explain_and_status(clients: Clients) -> None:
    """A finished request can be explained by its id, and the console sees the worker."""
    await clients.openai.completions.create(model="tiny", prompt="x", extra_headers={"x-request-id": "ask-me"})
    explanation = (await clients.http.get("/console/explain/ask-me")).json()
    assert explanation["state"] == "finished"
    assert explanation["decisions"][0]["to_worker_id"] == "cpu"
    status = (await clients.http.get("/console/status")).json()
    assert [(worker["worker_id"], worker["health"]) for worker in status["workers"]] == [("cpu", "ready")]
    assert (await clients.http.get("/health")).status_code == 200
    models = (await clients.http.get("/v1/models")).json()["data"]
    assert [(model["id"], model["max_model_len"]) for model in models] == [("tiny", 1024)]


async def test_a_client_that_leaves_frees_the_engine(clients: Clients, addresses: Addresses) -> None:
    """After a disconnect the worker no longer runs the request."""
    body = {"prompt": PROMPT, "stream": True, "max_tokens": 900, "ignore_eos": True}
    async with clients.http.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "leaver"}) as answer:
        await anext(answer.aiter_lines())
    async with asyncio.timeout(30):
        async for status in clients.sdk.watch_status(interval_s=0.1):
            if status.live_requests == 0 and status.workers[0].running == 0:
                break
    assert 'outcome="cancelled"' in (await clients.http.get(f"http://{addresses.router_http}/metrics")).text
