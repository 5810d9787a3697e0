"""What people write, and their keys, stay out of logs, decision records and metrics."""

import asyncio
import contextlib
from pathlib import Path

import httpx

from ascendra import AscendraError, AsyncClient, Message, SamplingParams
from tests.component.security.conftest import digest
from tests.support.gateway_process import GatewayProcess
from tests.support.router_process import RouterProcess
from tests.support.scripted_worker import ScriptedWorker

SECRET = "xyzzyplugh"
KEY = "k3y-of-a"


async def test_prompts_and_keys_are_not_written(tokenizer_directory: Path, tmp_path: Path) -> None:
    """At the most talkative level, through successes and every kind of refusal."""
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"a: [{digest(KEY)}]\ngateway: {{keys: [{digest(KEY + 'g')}], rights: [act-for-tenants, admin]}}\n")
    own_key = tmp_path / "gateway.key"
    own_key.write_text(KEY + "g")
    decisions = tmp_path / "decisions.jsonl"
    worker = ScriptedWorker()
    await worker.start()
    router = RouterProcess(
        tmp_path, model=tokenizer_directory, model_name="tiny", workers=[worker.address], log_level="debug",
        decision_log=str(decisions), api_keys_file=str(keys), max_text_bytes=10_000,
    )  # fmt: skip
    log = tmp_path / "gateway.log"
    with router:
        front = GatewayProcess(
            log, [router.address], log_level="debug", api_keys_file=keys, api_key_file=own_key, max_body_bytes=50_000
        )
        with front:
            await asyncio.wait_for(worker.attached.wait(), 30)
            await _talk_to_router(router.address, worker)
            metrics = await _talk_to_gateway(f"http://{front.address}")
            metrics += (await asyncio.to_thread(httpx.get, f"http://{router.http}/metrics", verify=False)).text
    await worker.stop()
    written = {"router": router.log_file.read_text(), "gateway": log.read_text(), "decisions": decisions.read_text()}
    assert all("request" in text for text in written.values())
    for where, text in {**written, "metrics": metrics}.items():
        for secret in (SECRET, KEY, digest(KEY)):
            assert secret not in text, f"{secret} in {where}"


async def _talk_to_router(address: str, worker: ScriptedWorker) -> None:
    sampling = SamplingParams(max_tokens=len(SECRET))
    async with AsyncClient(address, api_key=KEY, timeout_s=10) as client, client.session() as session:
        ids = (await client.tokenize(SECRET, skip_special_tokens=True))[: len(SECRET)]
        worker.tokens = lambda _, offset: ids[offset % len(ids)]  # what is generated is secret too
        assert (await session.generate(SECRET, sampling=sampling)).text == SECRET
        await client.tokenize(SECRET)
        wrong = [
            client.generate(SECRET * 2000, sampling=sampling),
            client.generate(SECRET, sampling=SamplingParams(stop=[SECRET * 100])),
            client.generate(SECRET, sampling=SamplingParams(stop=[SECRET] * 99)),
            client.generate(SECRET, sampling=SamplingParams(bad_words=[SECRET * 100])),
            client.generate(None, messages=[Message(SECRET * 20, SECRET)]),
            session.generate(SECRET * 200, sampling=sampling),
            client.tokenize(SECRET * 2000),
        ]
        for call in wrong:
            with contextlib.suppress(AscendraError):
                await call


async def _talk_to_gateway(url: str) -> str:
    headers = {"authorization": f"Bearer {KEY}"}
    bodies = [
        {"prompt": SECRET, "max_tokens": 5},
        {"prompt": SECRET, "max_tokens": 5, "stream": True},
        {"prompt": SECRET, "max_tokens": SECRET},
        {"prompt": {SECRET: 1}},
        {"prompt": SECRET * 2000},
        {"prompt": SECRET * 20_000},
        {"prompt": SECRET, SECRET: SECRET},
        {"prompt": SECRET, "stop": [SECRET] * 99},
    ]
    async with httpx.AsyncClient(base_url=url, timeout=30, verify=False) as http:
        for body in bodies:
            await http.post("/v1/completions", json=body, headers=headers)
        await http.post("/v1/completions", content=b'{"prompt": "' + SECRET.encode(), headers=headers)
        await http.post("/v1/completions", json=bodies[0], headers={"authorization": f"Bearer {KEY}x"})
        chat = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 5}
        await http.post("/v1/chat/completions", json=chat, headers=headers)
        await http.post("/tokenize", json={"prompt": SECRET}, headers=headers)
        answer = await http.get("/metrics", headers={"authorization": f"Bearer {KEY}g"})
        assert answer.status_code == 200
        return answer.text
