"""Where predictions come from: the predictor's snapshots, else the worker's own model; nobody waits for them."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import grpc.aio

from ascendra.v1 import cluster_pb2, common_pb2, predictor_pb2, predictor_pb2_grpc
from services.common.grpc_server import start_grpc_server
from tests.support.local_router import LocalRouter, local_router, text_request, until
from tests.support.scripted_worker import ScriptedWorker


def step_time(source: str, token_s: float) -> common_pb2.StepTimeModel:
    """Return a model of so many seconds a prefill token."""
    bins = [common_pb2.StepTimeBin(max_tokens=0, a0=0.01, a2=token_s)]
    return common_pb2.StepTimeModel(format_version=1, source=source, bins=bins, safety_factor=1.2, log_sigma=0.1)


class ScriptedPredictor(predictor_pb2_grpc.PredictorServiceServicer):
    """Sends the snapshots that a test puts in, and keeps the outcomes."""

    def __init__(self) -> None:
        self.snapshots: asyncio.Queue[predictor_pb2.WatchModelsResponse | None] = asyncio.Queue()
        self.outcomes: list[predictor_pb2.Outcome] = []

    async def WatchModels(
        self, request: predictor_pb2.WatchModelsRequest, context: Any
    ) -> AsyncIterator[predictor_pb2.WatchModelsResponse]:
        """Send snapshots until told to end."""
        while (snapshot := await self.snapshots.get()) is not None:
            yield snapshot

    async def ReportOutcomes(
        self, request_iterator: AsyncIterator[predictor_pb2.ReportOutcomesRequest], context: Any
    ) -> predictor_pb2.ReportOutcomesResponse:
        """Keep what routers say."""
        async for request in request_iterator:
            self.outcomes += request.outcomes
        return predictor_pb2.ReportOutcomesResponse(outcomes=len(self.outcomes))

    def learn(self, token_s: float, *, age_s: float = 0.0, demoted: bool = False) -> None:
        """Send a snapshot of worker w1."""
        confidence = predictor_pb2.CONFIDENCE_DEMOTED if demoted else predictor_pb2.CONFIDENCE_FITTED
        worker = predictor_pb2.WorkerModel(
            worker_id="w1", step_time=step_time("predictor", token_s), confidence=confidence, age_s=age_s
        )
        self.snapshots.put_nowait(predictor_pb2.WatchModelsResponse(version=1, workers=[worker]))


async def status_of(router: LocalRouter) -> cluster_pb2.GetStatusResponse:
    """Return the router's status."""
    return await router.cluster.GetStatus(cluster_pb2.GetStatusRequest())


async def test_the_best_model_at_hand_predicts(tokenizer_directory: Path) -> None:
    """A snapshot takes over while it is young and trusted; then the worker's own model does again."""
    worker = ScriptedWorker(step_time_model=step_time("profile:x", 1e-4))
    predictor = ScriptedPredictor()  # type: ignore[abstract]

    def register(server: grpc.aio.Server) -> Sequence[str]:
        predictor_pb2_grpc.add_PredictorServiceServicer_to_server(predictor, server)
        return ["ascendra.v1.PredictorService"]

    await worker.start()
    server = await start_grpc_server("127.0.0.1:0", register)
    keys = {"predictor": server.address, "prediction_max_age_s": 1.0}
    async with local_router(tokenizer_directory, [worker.address], **keys) as router:
        await router.attached(1)
        status = await status_of(router)
        assert (status.prediction_policy, status.workers[0].model_source) == ("worker_model", "profile:x")
        slow_s = status.workers[0].predicted_ttft_s
        predictor.learn(1e-3)
        await until(lambda: router.router.predictions.connected)
        status = await status_of(router)
        assert (status.prediction_policy, status.predictor_connected) == ("predictor", True)
        assert status.workers[0].predicted_ttft_s > 2 * slow_s
        await router.collect(text_request(max_tokens=3))
        await until(lambda: len(predictor.outcomes) == 1)
        outcome = predictor.outcomes[0]
        assert outcome.worker_id == "w1"
        assert 0 < outcome.predicted_ttft_s <= outcome.predicted_ttft_p90_s
        assert outcome.actual_ttft_s > 0
        await until(lambda: router.router.predictions.source("w1", 1e12) == "worker_model")
        predictor.learn(1e-3, age_s=5.0)
        predictor.learn(1e-3, demoted=True)
        predictor.snapshots.put_nowait(None)
        await until(lambda: not router.router.predictions.connected)
        assert (await status_of(router)).prediction_policy == "worker_model"
        assert len((await router.collect(text_request(max_tokens=3))).token_ids) == 3
    await server.stop(0)
    await worker.stop()
