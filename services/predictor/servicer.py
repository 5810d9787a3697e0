"""PredictorService: takes in telemetry and outcomes, publishes models, answers risk."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from typing import Any

from ascendra.v1 import common_pb2, predictor_pb2, predictor_pb2_grpc
from services.common.errors import InvalidArgument
from services.common.logging import get_logger
from services.common.wire import (
    CONFIDENCE_TO_PROTO,
    model_from_proto,
    model_to_proto,
    residuals_to_proto,
    shape_from_proto,
)
from services.policy.calibration import SLICE_LIMITS_S, Confidence
from services.policy.delivery import is_allowance
from services.policy.step_time import StepTimeModel
from services.predictor import metrics
from services.predictor.assess import answer
from services.predictor.models import CardLine, ModelStore, WorkerModels

log = get_logger()

_STEPS_A_TURN = 128
"""Steps learned before other streams get their turn."""
_MAX_ID_LENGTH = 256


class PredictorServicer(predictor_pb2_grpc.PredictorServiceServicer):
    """The service over one ModelStore. `publish` must run while it serves; `close` ends the streams it feeds."""

    def __init__(self, store: ModelStore) -> None:
        self._store = store
        self._published = asyncio.Event()
        self._left_out: Counter[str] = Counter()
        self._closed = False
        metrics.MODELS.rows = self._model_rows

    async def publish(self, interval_s: float) -> None:
        """Wake the watchers whenever something changed, at most once an interval; forget silent workers. Never ends."""
        seen = self._store.version
        while True:
            await asyncio.sleep(interval_s)
            for worker_id in self._store.forget_silent(time.monotonic()):
                log.info("worker_forgotten", worker_id=worker_id)
            self._measure()
            if self._store.version != seen:
                seen = self._store.version
                metrics.SNAPSHOTS.inc()
                self._wake()

    def close(self) -> None:
        """End the streams of watchers."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        self._published.set()
        self._published = asyncio.Event()

    async def ReportTelemetry(
        self, request_iterator: AsyncIterator[predictor_pb2.ReportTelemetryRequest], context: Any
    ) -> predictor_pb2.ReportTelemetryResponse:
        """Learn from a worker's steps."""
        taken = 0
        async for request in request_iterator:
            _check_id("worker_id", request.worker_id)
            warm_start = _warm_start(request) if request.HasField("warm_start") else None
            models = self._store.heard(request.worker_id, request.incarnation, warm_start, time.monotonic())
            for index, step in enumerate(request.steps, 1):
                taken += self._learn(models, step)
                if index % _STEPS_A_TURN == 0:
                    await asyncio.sleep(0)
            self._store.version += 1  # what was published in between had only some of these steps
        return predictor_pb2.ReportTelemetryResponse(steps=taken)

    def _learn(self, models: WorkerModels, step: common_pb2.StepTelemetry) -> bool:
        if models.observe(shape_from_proto(step), step.step_s):
            if is_allowance(step.delivery_s):
                models.delivery_s = step.delivery_s
            metrics.STEPS.inc()
            return True
        metrics.REFUSED_STEPS.inc()
        return False

    async def ReportOutcomes(
        self, request_iterator: AsyncIterator[predictor_pb2.ReportOutcomesRequest], context: Any
    ) -> predictor_pb2.ReportOutcomesResponse:
        """Calibrate by what became of predictions."""
        taken = 0
        async for request in request_iterator:
            for outcome in request.outcomes:
                taken += self._calibrate(outcome)
            await asyncio.sleep(0)
        return predictor_pb2.ReportOutcomesResponse(outcomes=taken)

    def _calibrate(self, outcome: predictor_pb2.Outcome) -> bool:
        reason = "moved" if outcome.moved else "relegated" if outcome.relegated else ""
        if not reason and self._store.get(outcome.worker_id) is None:
            reason = "unknown_worker"
        if not reason and not self._learn_outcome(outcome):
            reason = "impossible"
        if reason:
            self._left_out[reason] += 1
            metrics.REFUSED_OUTCOMES.labels(reason=reason).inc()
            return False
        metrics.OUTCOMES.inc()
        return True

    def _learn_outcome(self, outcome: predictor_pb2.Outcome) -> bool:
        return self._store.learn_outcome(
            outcome.worker_id,
            outcome.queue_ahead_s,
            outcome.predicted_ttft_s,
            outcome.actual_ttft_s,
            outcome.predicted_ttft_p90_s,
            outcome.predicted_ttft_p50_s,
        )

    async def Assess(
        self, request_iterator: AsyncIterator[predictor_pb2.AssessRequest], context: Any
    ) -> AsyncIterator[predictor_pb2.AssessResponse]:
        """Answer each question in turn."""
        async for request in request_iterator:
            began_s = time.monotonic()
            response = answer(request, self._store, began_s)
            metrics.ASSESS_SECONDS.observe(time.monotonic() - began_s)
            yield response

    async def WatchModels(
        self, request: predictor_pb2.WatchModelsRequest, context: Any
    ) -> AsyncIterator[predictor_pb2.WatchModelsResponse]:
        """Send the present models, then each newer snapshot; a slow reader skips to the newest."""
        with metrics.WATCHERS.track_inprogress():
            sent = -1
            while not self._closed:
                published = self._published
                if self._store.version != sent:
                    sent = self._store.version
                    yield self._snapshot()
                await published.wait()

    async def GetCard(self, request: predictor_pb2.GetCardRequest, context: Any) -> predictor_pb2.GetCardResponse:
        """Say how well predictions did: of all workers, then of each."""
        entries = [_card_entry("", line) for line in self._store.card()]
        entries += [_card_entry(models.worker_id, line) for models in self._store for line in models.card()]
        return predictor_pb2.GetCardResponse(entries=entries, left_out=self._left_out)

    def _snapshot(self) -> predictor_pb2.WatchModelsResponse:
        now_s = time.monotonic()
        return predictor_pb2.WatchModelsResponse(
            version=self._store.version,
            workers=[
                predictor_pb2.WorkerModel(
                    worker_id=models.worker_id,
                    step_time=model_to_proto(models.fit.model()),
                    residuals=residuals_to_proto(models.residuals),
                    confidence=CONFIDENCE_TO_PROTO[models.confidence],
                    age_s=max(now_s - models.heard_s, 0.0),
                )
                for models in self._store
            ],
        )

    def _measure(self) -> None:
        """Publish the gauges."""
        workers = list(self._store)
        for confidence in Confidence:
            count = sum(models.confidence is confidence for models in workers)
            metrics.WORKERS.labels(confidence=confidence.name.lower()).set(count)
        metrics.STEP_MAPE.set(_mean(models.steps.accuracy().mape for models in workers if models.steps.samples))
        for index, (name, _) in enumerate(SLICE_LIMITS_S):
            judged = [accuracy for m in workers if (accuracy := m.calibration.accuracy(index)).samples]
            metrics.COVERAGE.labels(slice=name).set(_mean(accuracy.coverage_p90 for accuracy in judged))
            metrics.BIAS.labels(slice=name).set(_mean(accuracy.bias for accuracy in judged))
            metrics.JUDGED.labels(slice=name).set(sum(accuracy.samples for accuracy in judged))

    def _model_rows(self) -> Iterable[metrics.ModelRow]:
        now_s = time.monotonic()
        for models in self._store:
            steps = models.steps.accuracy()
            demoted = models.confidence is Confidence.DEMOTED
            yield metrics.ModelRow(models.worker_id, now_s - models.heard_s, demoted, steps.mape, steps.bias)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed) if listed else float("nan")


def _card_entry(worker_id: str, line: CardLine) -> predictor_pb2.CardEntry:
    accuracy = line.accuracy
    return predictor_pb2.CardEntry(
        worker_id=worker_id,
        slice=line.slice,
        samples=accuracy.samples,
        median_ape=accuracy.median_ape,
        mape=accuracy.mape,
        p90_ape=accuracy.p90_ape,
        bias=accuracy.bias,
        coverage_p90=accuracy.coverage_p90,
        confidence=CONFIDENCE_TO_PROTO[line.confidence],
        note=line.note,
    )


def _check_id(name: str, value: str) -> None:
    if not value or len(value) > _MAX_ID_LENGTH:
        raise InvalidArgument(f"{name} must have 1 to {_MAX_ID_LENGTH} characters")


def _warm_start(request: predictor_pb2.ReportTelemetryRequest) -> StepTimeModel | None:
    """Return a worker's own model, or nothing (and count it) when it cannot be one."""
    if not request.warm_start.bins:
        return None
    try:
        return model_from_proto(request.warm_start)
    except ValueError as error:
        metrics.REFUSED_MODELS.inc()
        log.warning("warm_start_refused", worker_id=request.worker_id, why=str(error))
        return None
