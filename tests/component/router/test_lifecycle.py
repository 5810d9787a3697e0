"""A router's own life: drain on SIGTERM, a shared port, resumed streams, an absent predictor, bad neighbours."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import httpx
import numpy as np
import pytest

from ascendra.v1 import cluster_pb2, cluster_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc
from services.common.channels import open_channel
from tests.support.local_router import Collected, LocalRouter, local_router, metadata_of, text_request, until
from tests.support.router_process import RouterProcess
from tests.support.scripted_worker import ScriptedWorker

EXPECTED = [66 + i % 26 for i in range(2000)]


@pytest.fixture
async def worker() -> AsyncIterator[ScriptedWorker]:
    """A started worker."""
    worker = ScriptedWorker()
    await worker.start()
    yield worker
    await worker.stop()


@pytest.fixture
async def router(worker: ScriptedWorker, tokenizer_directory: Path) -> AsyncIterator[LocalRouter]:
    """A router attached to it."""
    async with local_router(tokenizer_directory, [worker.address]) as router:
        await router.attached(1)
        yield router


async def test_a_terminated_router_finishes_its_streams(
    worker: ScriptedWorker, tokenizer_directory: Path, tmp_path: Path
) -> None:
    """SIGTERM: not ready, new requests refused as retryable, running ones finished, exit status 0."""
    worker.step_s = 0.02
    process = RouterProcess(
        tmp_path, model=tokenizer_directory, workers=[worker.address], decision_log=str(tmp_path / "decisions.jsonl")
    )
    with process:
        async with open_channel(process.address) as channel, httpx.AsyncClient() as http:
            stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(channel)
            await asyncio.wait_for(worker.attached.wait(), 20)
            call = stub.Generate(text_request(max_tokens=60))
            collected = Collected()
            async for response in call:
                collected.add(response)
                if len(collected.token_ids) == 3:
                    assert (await http.get(f"http://{process.http}/health")).status_code == 200
                    exported = (await http.get(f"http://{process.http}/metrics")).text
                    assert "ascendra_router_live_requests 1.0" in exported
                    assert re.search(r'^ascendra_router_backlog_seconds{role="\w+",worker="\w+"} 0\.0$', exported, re.M)
                    assert "ascendra_router_held_backlog_seconds 0.0" in exported
                    process.terminate()
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        while True:
                            await stub.Generate(text_request(max_tokens=1)).read()
                    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
                    assert metadata_of(caught.value)["ascendra-retry-safe"] == "true"
                    assert (await http.get(f"http://{process.http}/health")).status_code == 503
    assert collected.token_ids == EXPECTED[:60]
    assert process.process.returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "decisions.jsonl").read_text().splitlines()]
    assert lines[0]["kind"] == "place"
    [end] = [line for line in lines if line["kind"] == "end" and line["output_tokens"] == 60]
    assert (end["request_id"], end["outcome"]) == (lines[0]["request_id"], "finished")
    assert 0 < end["ttft_ms"] < end["at_ms"]
    assert 0 < end["p99_gap_ms"] < end["at_ms"]


async def test_two_routers_share_a_port(tokenizer_directory: Path, tmp_path: Path) -> None:
    """With --reuse-port a second process serves the same port; connections go to both."""
    with (
        RouterProcess(tmp_path / "a", model=tokenizer_directory, reuse_port=True) as one,
        RouterProcess(tmp_path / "b", model=tokenizer_directory, reuse_port=True, listen=one.address) as two,
    ):
        assert one.address == two.address
        ids = set()
        for _ in range(60):
            async with new_connection(one.address) as channel:
                stub: cluster_pb2_grpc.ClusterServiceAsyncStub = cluster_pb2_grpc.ClusterServiceStub(channel)
                ids.add((await stub.GetStatus(cluster_pb2.GetStatusRequest())).router_id)
        assert len(ids) == 2


def new_connection(address: str) -> grpc.aio.Channel:
    """Return a channel that shares its connection with no other."""
    return grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])


async def test_a_stream_resumes_through_another_router(worker: ScriptedWorker, tokenizer_directory: Path) -> None:
    """What was received is not sent again: tokens and text go on where they broke, under the same seed."""
    request = text_request(max_tokens=40)
    request.sampling.stop.append(b"zzz")
    async with local_router(tokenizer_directory, [worker.address]) as first:
        await first.attached(1)
        whole = await first.collect(request)
    assert whole.accepted.resume_cursor
    async with local_router(tokenizer_directory, [worker.address]) as second:
        await second.attached(1)
        for received in (0, 7, 39, 40):
            ids = np.asarray(whole.token_ids[:received], dtype="<u4").tobytes()
            text = second.router.codec.decode(whole.token_ids[:received])
            resumed = text_request(max_tokens=40)
            resumed.sampling.stop.append(b"zzz")
            resumed.resume.CopyFrom(
                inference_pb2.Resume(
                    cursor=whole.accepted.resume_cursor, token_ids=ids, text_bytes=max(len(text.encode()) - 1, 0)
                )
            )
            rest = Collected()
            rest.token_ids = whole.token_ids[:received]
            async for response in second.inference.Generate(resumed):
                rest.add(response)
            assert rest.token_ids == whole.token_ids
            assert text[: max(len(text) - 1, 0)] + rest.text == whole.text
            assert rest.finished.usage.completion_tokens == 40
            assert rest.finished.receipt.seed == whole.finished.receipt.seed


async def test_a_stream_that_goes_on_is_no_newcomer(worker: ScriptedWorker, tokenizer_directory: Path) -> None:
    """Its worker is busy beyond its objective, and it asked to be refused then: it was let in before."""
    async with local_router(tokenizer_directory, [worker.address]) as first:
        await first.attached(1)
        whole = await first.collect(text_request(max_tokens=40))
    async with local_router(tokenizer_directory, [worker.address]) as second:
        await second.attached(1)
        worker.hold = True
        backlog = [asyncio.create_task(second.collect(text_request("word " * 350, max_tokens=2))) for _ in range(20)]
        await until(lambda: len(worker.submitted) == 21)
        resumed = text_request(max_tokens=40, on_overload=inference_pb2.OVERLOAD_ACTION_REFUSE)
        resumed.slo.ttft_ms = 50
        ids = np.asarray(whole.token_ids[:7], dtype="<u4").tobytes()
        resumed.resume.CopyFrom(inference_pb2.Resume(cursor=whole.accepted.resume_cursor, token_ids=ids))
        rest = Collected()
        rest.token_ids = whole.token_ids[:7]
        going_on = second.inference.Generate(resumed)
        await until(lambda: len(worker.submitted) == 22)
        worker.hold = False
        async for response in going_on:
            rest.add(response)
        assert rest.token_ids == whole.token_ids
        await asyncio.gather(*backlog)


async def test_a_foreign_cursor_is_refused(router: LocalRouter) -> None:
    """A cursor of another prompt, or of nothing, names itself."""
    done = await router.collect(text_request(max_tokens=3))
    for prompt, cursor in (("other", done.accepted.resume_cursor), ("hello", b"nonsense")):
        request = text_request(prompt)
        request.resume.cursor = cursor
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.collect(request)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "cursor" in str(caught.value.details())


async def test_serving_does_not_need_the_predictor(worker: ScriptedWorker, tokenizer_directory: Path) -> None:
    """With a predictor that is not there, the named fallback predicts and requests are served."""
    async with local_router(tokenizer_directory, [worker.address], predictor="127.0.0.1:1") as router:
        await router.attached(1)
        assert (await router.collect(text_request(max_tokens=5))).token_ids == EXPECTED[:5]
        status = await router.cluster.GetStatus(cluster_pb2.GetStatusRequest())
    assert status.prediction_policy == "token_load"
    assert not status.predictor_connected


BAD: list[inference_pb2.GenerateRequest] = [
    inference_pb2.GenerateRequest(),
    text_request(""),
    text_request("x " * 3000),
    text_request(model="nobody"),
    text_request(slo_class="gold"),
    text_request(sinks=["nowhere"]),
    text_request(request_id="a b"),
    text_request(sampling=common_pb2.SamplingParameters(stop=[b"\xff"])),
    text_request(slo=common_pb2.Slo(ttft_ms=float("nan"))),
    text_request(tokens=inference_pb2.TokenPrompt(token_ids=(10**6).to_bytes(4, "little"))),
    text_request(chat=inference_pb2.ChatPrompt(messages=[inference_pb2.ChatMessage(role="robot", content="x")])),
]


async def test_bad_input_does_not_disturb_a_neighbour(router: LocalRouter, worker: ScriptedWorker) -> None:
    """Every kind of bad input is refused with a client error while another stream runs on, whole."""
    worker.step_s = 0.01
    neighbour = asyncio.create_task(router.collect(text_request(max_tokens=80)))
    await until(lambda: bool(worker.submitted))
    for bad in BAD:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.collect(bad)
        assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND)
        assert caught.value.details() != "internal error"
    assert (await neighbour).token_ids == EXPECTED[:80]
    assert len(worker.submitted) == 1


async def test_a_request_id_is_served_once(router: LocalRouter, worker: ScriptedWorker) -> None:
    """The id of a live request is refused; x-request-id and SLO headers are read."""
    worker.step_s = 0.01
    metadata = (("x-request-id", "mine"), ("x-slo-ttft-ms", "321"), ("x-slo-tpot-ms", "45"))
    first = asyncio.create_task(router.collect(text_request(max_tokens=60), metadata=metadata))
    await until(lambda: "mine" in router.router.dispatcher.live)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await router.collect(text_request(request_id="mine"))
    assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
    done = await first
    assert done.accepted.request_id == "mine"
    assert (done.finished.receipt.target.ttft_ms, done.finished.receipt.target.tbt_ms) == (321, 45)


async def test_the_tokenizer_is_served(router: LocalRouter) -> None:
    """Tokenize and Detokenize are inverse; ListModels names the model and its workers."""
    tokens = await router.inference.Tokenize(inference_pb2.TokenizeRequest(text="naïve 🙂"))
    back = await router.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=tokens.token_ids))
    assert back.text == "naïve 🙂"
    models = await router.inference.ListModels(inference_pb2.ListModelsRequest())
    assert [(model.name, model.workers, model.max_model_len) for model in models.models] == [("tiny", 1, 2048)]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await router.inference.Tokenize(inference_pb2.TokenizeRequest())
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_stop_strings_end_the_request_at_the_worker(router: LocalRouter, worker: ScriptedWorker) -> None:
    """The router finds the stop string, ends the stream and aborts the rest."""
    text = router.router.codec.decode(EXPECTED[:30])
    request = text_request(max_tokens=2000)
    request.sampling.stop.append(text[10:13].encode())
    done = await router.collect(request)
    assert done.text == text[:10]
    assert done.finished.stop_string == text[10:13]
    assert done.finished.reason == common_pb2.FINISH_REASON_STOP
    assert done.finished.usage.completion_tokens == 13
    await until(lambda: bool(worker.cancelled))


async def test_watched_status_goes_on(router: LocalRouter) -> None:
    """WatchStatus repeats; what was served shows in the attainment."""
    await router.collect(text_request(max_tokens=3))
    seen = []
    call = router.cluster.WatchStatus(cluster_pb2.WatchStatusRequest(interval_ms=100))
    async for update in call:
        seen.append(update.status)
        if len(seen) == 3:
            break
    call.cancel()
    assert [entry.slo_class for entry in seen[-1].attainment] == ["default"]
    assert seen[-1].attainment[0].requests == 1
    assert seen[-1].counters["placements"] == 1
