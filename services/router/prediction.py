"""Step-time models for predictions: the predictor's, else the worker's own, else one made of its token throughput."""

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias

import grpc
import grpc.aio

from ascendra.errors import InvalidArgumentError
from ascendra.tls import Tls
from ascendra.v1 import predictor_pb2, predictor_pb2_grpc
from services.common.channels import Connector
from services.common.logging import get_logger
from services.common.reporting import write_reports
from services.common.wire import model_from_proto
from services.policy.calibration import P50, P90, ResidualSlice, prior_slices, slice_index
from services.policy.step_time import StepTimeBin, StepTimeModel
from services.router import metrics

log = get_logger()

_Stub: TypeAlias = "predictor_pb2_grpc.PredictorServiceAsyncStub"
PREDICTOR, WORKER_MODEL, TOKEN_LOAD = "predictor", "worker_model", "token_load"
_POLICIES = (PREDICTOR, WORKER_MODEL, TOKEN_LOAD)
_RETRY_S = (0.2, 5.0)
_MAX_OUTCOMES = 4096
_OUTCOME_BATCH_S = 0.25
_DEFAULT_OVERHEAD_S, _DEFAULT_TOKEN_S = 0.01, 1e-4


def token_load_model(overhead_s: float = _DEFAULT_OVERHEAD_S, token_s: float = _DEFAULT_TOKEN_S) -> StepTimeModel:
    """Return the crudest model: a constant per step and per prefill token."""
    return StepTimeModel((StepTimeBin(0, overhead_s, 0.0, token_s),), source=TOKEN_LOAD)


@dataclass(frozen=True, slots=True)
class _Learned:
    model: StepTimeModel
    residuals: tuple[ResidualSlice, ...]
    demoted: bool
    heard_s: float
    """When its telemetry was last heard of."""


class TokenLoad:
    """Learns the crudest model of one worker from its steps."""

    __slots__ = ("overhead_s", "token_s")

    def __init__(self) -> None:
        self.overhead_s = _DEFAULT_OVERHEAD_S
        self.token_s = _DEFAULT_TOKEN_S

    def observe(self, prefill_tokens: int, step_s: float) -> None:
        """Take in one step."""
        if prefill_tokens >= 16:
            self.token_s += 0.1 * (max(step_s - self.overhead_s, 0.1 * step_s) / prefill_tokens - self.token_s)
        elif prefill_tokens == 0:
            self.overhead_s += 0.05 * (step_s - self.overhead_s)

    def model(self) -> StepTimeModel:
        """Return it as a step-time model."""
        return token_load_model(self.overhead_s, self.token_s)


class Predictions:
    """The newest snapshot of the predictor's models, and what stands in for it. Times are seconds, monotonic."""

    def __init__(self, address: str, router_id: str, max_age_s: float, tls: Tls | None = None) -> None:
        """Prepare; `run` connects.

        Args:
            address: of the predictor; empty: there is none.
            max_age_s: a learned model is not used when its worker's telemetry is older.
            tls: how to connect; None: in plaintext.
        """
        self.address = address
        self.connected = False
        self._router_id = router_id
        self._max_age_s = max_age_s
        self._tls = tls
        self._learned: dict[str, _Learned] = {}
        self._own: dict[str, StepTimeModel] = {}
        self._loads: dict[str, TokenLoad] = {}
        self._outcomes: deque[predictor_pb2.Outcome] = deque(maxlen=_MAX_OUTCOMES)
        self._priors = prior_slices()
        self._policy = ""
        self._publish(TOKEN_LOAD)
        metrics.PREDICTOR_CONNECTED.set(0 if address else math.nan)

    def worker_model(self, worker_id: str, model: StepTimeModel | None) -> None:
        """Keep the model that a worker's Welcome carried; None: it has none."""
        if model is None:
            self._own.pop(worker_id, None)
        else:
            self._own[worker_id] = model

    def observe_step(self, worker_id: str, prefill_tokens: int, step_s: float) -> None:
        """Feed the last fallback."""
        load = self._loads.get(worker_id)
        if load is None:
            load = self._loads[worker_id] = TokenLoad()
        load.observe(prefill_tokens, step_s)

    def model(self, worker_id: str, now_s: float) -> StepTimeModel:
        """Return the model to predict a worker with."""
        return self._choose(worker_id, now_s)[1]

    def source(self, worker_id: str, now_s: float) -> str:
        """Return which of the three policies predicts a worker."""
        return self._choose(worker_id, now_s)[0]

    def stated_ratios(self, worker_id: str, queue_ahead_s: float) -> tuple[float, float]:
        """Return median and 90% bound of actual over predicted TTFT at a load."""
        ratios = self._residual(worker_id, queue_ahead_s).ratios
        return ratios[P50], ratios[P90]

    def age_s(self, worker_id: str, now_s: float) -> float | None:
        """Return how old the telemetry is that a worker's learned model rests on; None without one."""
        learned = self._learned.get(worker_id)
        return now_s - learned.heard_s if learned is not None else None

    def miss_probability(self, worker_id: str, queue_ahead_s: float, predicted_s: float, left_s: float) -> float:
        """Return P(first token later than left_s) when predicted_s is expected, from the residuals at that load."""
        residual = self._residual(worker_id, queue_ahead_s)
        allowed = left_s / max(predicted_s, 1e-6)
        below = 0.0
        for level, ratio in zip(residual.levels, residual.ratios, strict=True):
            if allowed < ratio:
                return 1.0 - below
            below = level
        return 1.0 - below

    def _residual(self, worker_id: str, queue_ahead_s: float) -> ResidualSlice:
        learned = self._learned.get(worker_id)
        residuals = learned.residuals if learned and learned.residuals else self._priors
        return residuals[min(slice_index(queue_ahead_s), len(residuals) - 1)]

    def policy(self, worker_ids: "list[str]", now_s: float) -> str:
        """Return the policy that predicts most workers, and publish it."""
        sources = [self.source(worker_id, now_s) for worker_id in worker_ids] or [TOKEN_LOAD]
        policy = max(_POLICIES, key=sources.count)
        self._publish(policy)
        return policy

    def report(self, outcome: predictor_pb2.Outcome) -> None:
        """Queue an outcome; the oldest is dropped when the predictor is away."""
        if self.address:
            self._outcomes.append(outcome)

    async def run(self) -> None:
        """Follow the predictor until cancelled; without an address return at once."""
        if not self.address:
            return
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._for_ever(self._watch))
            tasks.create_task(self._for_ever(self._report))

    async def _for_ever(self, follow: Callable[[_Stub], Awaitable[None]]) -> None:
        # A connection each: the one must not end when the other is made again.
        connector = Connector(self.address, self._tls)
        pause_s = _RETRY_S[0]
        try:
            while True:
                began_s = time.monotonic()
                try:
                    await follow(predictor_pb2_grpc.PredictorServiceStub(await connector.channel()))
                except grpc.aio.AioRpcError as error:
                    log.debug("predictor_away", address=self.address, status=error.code().name)
                except InvalidArgumentError as error:
                    log.error("certificates_unreadable", why=error.message)
                pause_s = _RETRY_S[0] if time.monotonic() - began_s > _RETRY_S[1] else min(pause_s * 2, _RETRY_S[1])
                await asyncio.sleep(pause_s)
        finally:
            await connector.close()

    async def _watch(self, stub: _Stub) -> None:
        call = stub.WatchModels(predictor_pb2.WatchModelsRequest())
        try:
            async for snapshot in call:
                if not self.connected:
                    log.info("predictor_connected", address=self.address)
                self.connected = True
                metrics.PREDICTOR_CONNECTED.set(1)
                self.take(snapshot, time.monotonic())
        finally:
            call.cancel()
            if self.connected:
                log.warning("predictor_lost", address=self.address)
            self.connected = False
            metrics.PREDICTOR_CONNECTED.set(0)

    def take(self, snapshot: predictor_pb2.WatchModelsResponse, now_s: float) -> None:
        """Take in a snapshot; a model that cannot be is skipped."""
        for worker in snapshot.workers:
            try:
                learned = _Learned(
                    model_from_proto(worker.step_time),
                    tuple(map(_residual, worker.residuals)),
                    worker.confidence == predictor_pb2.CONFIDENCE_DEMOTED,
                    now_s - worker.age_s,
                )
            except ValueError as error:
                log.warning("model_refused", worker_id=worker.worker_id, why=str(error))
                continue
            self._learned[worker.worker_id] = learned

    async def _report(self, stub: _Stub) -> None:
        call = stub.ReportOutcomes()  # type: ignore[call-arg]  # written through the call
        await write_reports(call, self._due, _OUTCOME_BATCH_S)

    def _due(self) -> predictor_pb2.ReportOutcomesRequest | None:
        if not self._outcomes:
            return None
        batch = list(self._outcomes)
        self._outcomes.clear()
        return predictor_pb2.ReportOutcomesRequest(router_id=self._router_id, outcomes=batch)

    def _choose(self, worker_id: str, now_s: float) -> tuple[str, StepTimeModel]:
        learned = self._learned.get(worker_id)
        if learned is not None and not learned.demoted and now_s - learned.heard_s <= self._max_age_s:
            return PREDICTOR, learned.model
        own = self._own.get(worker_id)
        if own is not None:
            return WORKER_MODEL, own
        load = self._loads.get(worker_id)
        return TOKEN_LOAD, load.model() if load else token_load_model()

    def _publish(self, policy: str) -> None:
        if policy != self._policy:
            self._policy = policy
            for name in _POLICIES:
                metrics.PREDICTION_POLICY.labels(policy=name).set(name == policy)


def _residual(message: predictor_pb2.ResidualSlice) -> ResidualSlice:
    if len(message.ratios) <= P90 or len(message.levels) != len(message.ratios):
        raise ValueError(f"residual slice {message.name!r} has {len(message.ratios)} quantiles")
    return ResidualSlice(
        message.name, message.max_queue_ahead_s, tuple(message.levels), tuple(message.ratios), message.samples
    )
